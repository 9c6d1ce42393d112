"""What a matched memory is worth, beside rivals of the same number of slots: cross-entropy of text, no training.

    python -m bench.matched --json --kind novels --data FOLDER

Segments of 256 tokens at the ends of the texts are read, their first token not counted, behind the last 32 tokens of
the segment before and

    tail        nothing else
    full        all of the segment before
    raw_N       N more of its tokens, as they are
    even_N      N slots: evenly spaced keys, with their values
    attended_N  N slots: the keys that are attended most, with their values
    matched_N   N slots: the same keys, with values that match the attention to all of them (`memory_writer="matched"`)
    matched_N by Q   the same, matched to other queries (`memory_queries`)
    adaptive_N  N slots of a head on average, which heads share (`memory_allocation="adaptive"`), with values that
                match; `attended_adaptive_N` with their own values (with --adaptive)
    snapkv_N …  N slots: the keys that a press of kvpress chooses, with their values (where kvpress is installed)
    learned_N   the memory of a trained adapter of N memory tokens, and its `learned_tail` (with --adapter)
    anchored_N  N slots: the matched memory, allocated as the adapter's are, with the change that an adapter of anchors
                has learned (with --adapter); `foreign_anchored_N` of a segment of another text
    foreign_N   the matched memory of a segment of another text; also `foreign_adaptive_N` (with --adaptive)
    foreign     the whole segment of another text
    foreign_matched_B_of_7 …  the memory of seven segments of another text, in B slots

What a tokenizer puts before a text stands before all of these, in place of the first tokens of a whole segment or of
seven, and is pinned in a memory, beside its N slots.

And, at fewer places, of seven segments: `full_of_7`, `raw_B_of_7`, and `matched_B_of_7` in B slots, matched again and
again; and, at places with 64 segments before them, also `matched_B_of_64`. `closed` is the share of the gap between
`tail` and `full` (or `full_of_7`) that an arm closes, with a bootstrapped interval of 95 % over segments.

With --output, what is measured is saved beside it batch by batch: the same command goes on where it was interrupted.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from r3mem_fast import R3MemModel, load_model
from r3mem_fast.choices import BEYOND_BUDGET, QUERIES
from r3mem_fast.codec import TextCodec
from r3mem_fast.data.text import read_text
from r3mem_fast.questions import SegmentQuestions

from .anchored import load_adapter
from .matched_arms import Arms
from .places import CHAIN, LONG, Place, foreign_of, interval, places_of
from .presses import add_presses_option
from .records import add_output_option, add_records
from .texts import KINDS, texts_of
from .unfinished import Losses, Unfinished, settings_of

# Kinds of rivals beside presses.
RIVALS = ("raw", "even", "attended")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.matched", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--kind", default="help", help=f"{', '.join(KINDS)}, or a name for the texts (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder of the data sets, see bench/texts.py")
    parser.add_argument("--text", nargs="+", help="UTF-8 texts, in place of those of the kind")
    parser.add_argument("--held-out", type=float, default=0.5, help="share at the end of each text (%(default)s)")
    parser.add_argument("--segments", type=int, default=200, help="that are read, at most (%(default)s)")
    parser.add_argument("--chains", type=int, default=48, help="others, read behind seven others (%(default)s)")
    parser.add_argument("--long", type=int, default=0, help="others, read behind 64 others (%(default)s)")
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64], help="of a segment (%(default)s)")
    parser.add_argument("--budget", type=int, default=152, help="slots of seven segments (%(default)s)")
    parser.add_argument("--chain-slots", type=int, help="of each of seven segments (the most of --slots)")
    parser.add_argument("--beyond", choices=BEYOND_BUDGET, default="forget", help="the budget (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a segment (%(default)s)")
    parser.add_argument(
        "--tail", type=int, default=32, help="tokens before it that are read as they are (%(default)s)"
    )
    parser.add_argument("--adaptive", action="store_true", help="also memories whose heads share their slots")
    parser.add_argument("--queries", nargs="*", choices=QUERIES, default=[], help="to match to, beside own")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS), help="(all)")
    parser.add_argument(
        "--foreign", type=int, nargs="*", help="slots of memories of another text (those of the others)"
    )
    add_presses_option(parser)
    parser.add_argument("--adapter", help="folder of a trained adapter with memory tokens, whose memories are a rival")
    parser.add_argument("--batch", type=int, default=8, help="segments at one time (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    if options.foreign is None:
        options.foreign = options.slots
    add_records(_records(options), options)
    return 0


def _records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base, tokenizer = load_model(options.model, dtype=options.dtype)
    model = R3MemModel(base).eval()
    model.questions_of = SegmentQuestions(TextCodec(tokenizer))
    texts = [read_text(path) for path in options.text] if options.text else texts_of(options.kind, options.data)

    def places(before: int, count: int) -> list[Place]:
        held_out = options.held_out
        if count == 0:
            return []
        return places_of(texts, tokenizer, options.length, held_out=held_out, count=count, before=before)

    found, chains, long = places(1, options.segments), places(CHAIN, options.chains), places(LONG, options.long)
    learned = _learned(options, model) if options.adapter else None
    arms = Arms(options, model, learned, tokenizer)
    yield {
        "kind": options.kind, "model": Path(options.model).name, "dtype": options.dtype,
        "segment_length": options.length, "tail": options.tail,
        "segments": len(found), "chains": len(chains), "long_chains": len(long), "chain_slots": options.chain_slots,
        "texts": len({place.text for place in found}), "presses": options.presses,
        "beyond_budget": options.beyond, "adaptive": options.adaptive,
    }  # fmt: skip
    unfinished = Unfinished(options.output, settings_of(options), batch=options.batch, progress=not options.json)
    if found:
        foreign = foreign_of(found)
        losses = unfinished.losses(
            "segments",
            len(found),
            lambda some: arms.behind_one(found[some], foreign[some]),
        )
        yield from _compared(options, losses)
    if chains:
        others = foreign_of(chains)
        losses = unfinished.losses(
            "chains",
            len(chains),
            lambda some: arms.behind_many(chains[some], [CHAIN], foreign=others[some]),
        )
        yield from _means(losses, places="chains")
        yield from _closed(losses, "full_of_7")
        behind = {
            kind: losses.get(f"{kind}_{options.budget}_of_7") for kind in ("raw", "matched", "adaptive", "anchored")
        }
        yield _better(behind["raw"], behind["matched"], "raw", slots=options.budget, of=CHAIN)
        for mine, rival in (("adaptive", "matched"), ("anchored", "matched"), ("anchored", "adaptive")):
            if behind[mine] is not None and behind[rival] is not None:
                better = _better(behind[rival], behind[mine], rival, slots=options.budget, of=CHAIN)
                yield {"arm": f"{mine}_{options.budget}_of_7", **better}
    if long:
        losses = unfinished.losses(
            "long chains",
            len(long),
            lambda some: arms.behind_many(long[some], [CHAIN, LONG]),
        )
        yield from _means(losses, places="long chains")
        shorter, mine = (losses[f"matched_{options.budget}_of_{count}"] for count in (CHAIN, LONG))
        yield _better(shorter, mine, "matched, of 7 segments", slots=options.budget, of=LONG)
    unfinished.remove()


def _learned(options: argparse.Namespace, model: R3MemModel) -> R3MemModel:
    """Load the adapter that is a rival; raise ValueError if it would read other tokens, or with another model."""
    learned = load_adapter(options.adapter, model)
    config = learned.r3mem_config
    if (config.segment_length, config.segment_overlap) != (options.length, options.tail):
        raise ValueError(
            f"{options.adapter} reads segments of {config.segment_length} tokens and the last {config.segment_overlap}"
            " again: give --length and --tail these"
        )
    return learned


def _compared(options: argparse.Namespace, losses: Losses) -> Iterator[dict[str, Any]]:
    """Records of all arms behind one segment."""
    yield from _means(losses)
    yield from _closed(losses, "full")
    for slots in options.slots:
        mine = losses[f"matched_{slots}"]
        for rival in (*options.rivals, *options.presses):
            yield _better(losses[f"{rival}_{slots}"], mine, rival, slots=slots)
        for queries in options.queries:
            name = f"matched by {queries}"
            yield _better(losses[f"matched_{slots} by {queries}"], mine, name, slots=slots)
        if options.adaptive:
            for rival in ("matched", "attended_adaptive"):
                better = _better(losses[f"{rival}_{slots}"], losses[f"adaptive_{slots}"], rival, slots=slots)
                yield {"arm": f"adaptive_{slots}", **better}
        for rival in ("matched", "adaptive"):
            if f"anchored_{slots}" in losses and f"{rival}_{slots}" in losses:
                better = _better(losses[f"{rival}_{slots}"], losses[f"anchored_{slots}"], rival, slots=slots)
                yield {"arm": f"anchored_{slots}", **better}
        if f"learned_{slots}" in losses:
            yield _better(losses[f"learned_{slots}"], mine, "learned", slots=slots)


def _means(losses: Losses, **about: Any) -> Iterator[dict[str, Any]]:
    for arm, values in losses.items():
        yield {"arm": arm, **about, "nats_per_token": round(values.mean().item(), 4)}


def _closed(losses: Losses, full: str) -> Iterator[dict[str, Any]]:
    """Shares of the gap between the tail alone and all that is before a segment."""
    wanted = losses["tail"] - losses[full]
    for arm in losses:
        if arm not in ("tail", full):
            yield {"closed_by": arm, "of": full, **interval(losses["tail"] - losses[arm], wanted)}


def _better(rival: torch.Tensor, mine: torch.Tensor, name: str, **about: Any) -> dict[str, Any]:
    """How many nats a token a matched memory is better than a rival."""
    return {"nats_better_than": name, **about, **interval(rival - mine, torch.ones_like(rival))}


if __name__ == "__main__":
    raise SystemExit(main())
