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

What a tokenizer puts before a text stands before all of these, in place of the first tokens of a whole segment or of
seven, and is pinned in a memory, beside its N slots.

And, at fewer places, of seven segments: `full_of_7`, `raw_B_of_7`, and `matched_B_of_7` in B slots, matched again and
again; and, at places with 64 segments before them, also `matched_B_of_64`. `closed` is the share of the gap between
`tail` and `full` (or `full_of_7`) that an arm closes, with a bootstrapped interval of 95 % over segments.

With --output, what is measured is saved beside it batch by batch: the same command goes on where it was interrupted.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from r3mem_fast import Memory, R3MemConfig, R3MemModel, load_model
from r3mem_fast.choices import BEYOND_BUDGET, QUERIES
from r3mem_fast.codec import TextCodec
from r3mem_fast.data.text import opening_ids, read_text
from r3mem_fast.memory import MemoryLayout
from r3mem_fast.memory.segments import advance, cut_segments
from r3mem_fast.memory.writers.matched import MatchedWriter, Pass
from r3mem_fast.questions import SegmentQuestions

from .anchored import anchored_memory, load_adapter
from .places import CHAIN, LONG, Place, begun, foreign_of, interval, places_of
from .presses import PRESSES, REPEAT, add_presses_option, keep_best, press_scores
from .records import add_output_option, add_records
from .rivals import evenly_spaced, laid_out, values_kept
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
            lambda some: _losses(options, model, learned, tokenizer, found[some], foreign[some]),
        )
        yield from _compared(options, losses)
    if chains:
        losses = unfinished.losses(
            "chains",
            len(chains),
            lambda some: _chain_losses(options, model, learned, tokenizer, chains[some], [CHAIN]),
        )
        yield from _means(losses, places="chains")
        yield from _closed(losses, "full_of_7")
        arms = {
            name: losses.get(f"{name}_{options.budget}_of_7") for name in ("raw", "matched", "adaptive", "anchored")
        }
        yield _better(arms["raw"], arms["matched"], "raw", slots=options.budget, of=CHAIN)
        for mine, rival in (("adaptive", "matched"), ("anchored", "matched"), ("anchored", "adaptive")):
            if arms[mine] is not None and arms[rival] is not None:
                better = _better(arms[rival], arms[mine], rival, slots=options.budget, of=CHAIN)
                yield {"arm": f"{mine}_{options.budget}_of_7", **better}
    if long:
        losses = unfinished.losses(
            "long chains",
            len(long),
            lambda some: _chain_losses(options, model, learned, tokenizer, long[some], [CHAIN, LONG]),
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


@torch.no_grad()
def _losses(
    options: argparse.Namespace,
    model: R3MemModel,
    learned: R3MemModel | None,
    tokenizer: Any,
    places: list[Place],
    foreign: list[Place],
) -> Losses:
    """Read segments behind one segment: nats a token by arm, `[segments]` each."""
    opening = opening_ids(tokenizer)
    context, others = (torch.stack([place.segments for place in some]) for some in (places, foreign))
    segment, tail = context[:, -1], context[:, -2, -options.tail :]
    before, other = (begun(opening, rows[:, -2], replace=True) for rows in (context, others))
    raw = {"tail": begun(opening, tail), "full": before}
    if options.foreign:
        raw["foreign"] = torch.cat([other, tail], 1)
    if "raw" in options.rivals:
        raw |= {f"raw_{n}": begun(opening, context[:, -2, -options.tail - n :]) for n in options.slots}
    arms = {arm: _raw_loss(model, ids, segment) for arm, ids in raw.items()}
    for arm, memory in _memories(options, model, tokenizer, before):
        arms[arm] = _loss_behind(options, model, memory, segment)
    for slots in options.foreign:
        for kind in ("", "adaptive_") if options.adaptive else ("",):
            layout = _layout(options, model, slots, slots, "adaptive" if kind else "uniform")
            memory = dataclasses.replace(_matched(model, other, layout, len(opening)), recent=tuple(tail))
            arms[f"foreign_{kind}{slots}"] = _loss_behind(options, model, memory, segment)
    if learned is not None and learned.is_anchored:
        wanted = [(f"anchored_{slots}", before, slots) for slots in options.slots]
        wanted += [(f"foreign_anchored_{slots}", other, slots) for slots in options.foreign]
        for arm, rows, slots in wanted:
            memory = _anchored(options, learned, rows, slots, slots, len(opening))
            memory = dataclasses.replace(memory, recent=tuple(tail))
            arms[arm] = _loss_behind(options, model, memory, segment)
    elif learned is not None:
        # Compute as in training, where adapters ran in bfloat16, too.
        with torch.autocast("cpu", torch.bfloat16, enabled=learned.peft_model.dtype == torch.bfloat16):
            memory = dataclasses.replace(learned.compress(context[:, -2], finish=True), recent=tuple(tail))
            logits = learned(segment, memory=memory).logits
            arms[f"learned_{learned.r3mem_config.num_memory_tokens}"] = _mean_loss(logits, segment)
            logits = learned(torch.cat([tail, segment], 1), logits_to_keep=options.length).logits
            arms["learned_tail"] = _mean_loss(logits, segment)
    return arms


def _memories(
    options: argparse.Namespace, model: R3MemModel, tokenizer: Any, before: torch.Tensor
) -> Iterator[tuple[str, Memory]]:
    """Memories of segments, by arm, all of the same pass over them but those of another pass's queries."""
    rows, pinned = list(before), len(opening_ids(tokenizer))
    with model.disable_adapters(), laid_out(model, _layout(options, model, options.length, options.length)):
        none = model.new_memory(len(rows), origin=None, pinned=pinned)
        segments = cut_segments(none, rows, finish=True, writes_all=True)
        found = _writer(model).pass_over(segments[0], none)
        whole = _written(model, found)
    carried = advance(none, rows, segments)
    kinds = {"matched": contextlib.nullcontext, "attended": values_kept, "even": evenly_spaced}
    kinds = {kind: choice for kind, choice in kinds.items() if kind in ("matched", *options.rivals)}
    for slots in options.slots:
        layout = _layout(options, model, slots, slots)
        for kind, choice in kinds.items():
            with model.disable_adapters(), choice(), laid_out(model, layout):
                yield f"{kind}_{slots}", dataclasses.replace(_written(model, found), **carried)
        if options.adaptive:
            sharing = _layout(options, model, slots, slots, "adaptive")
            for kind, choice in (("adaptive", contextlib.nullcontext), ("attended_adaptive", values_kept)):
                with model.disable_adapters(), choice(), laid_out(model, sharing):
                    memory = dataclasses.replace(_written(model, found), layout=sharing, **carried)
                yield f"{kind}_{slots}", memory
        for queries in options.queries:
            asking = dataclasses.replace(layout, queries=queries)
            with model.disable_adapters(), laid_out(model, asking):
                memory = _written(model, found)
                yield f"matched_{slots} by {queries}", dataclasses.replace(memory, **carried)
    repeat = torch.tensor(tokenizer(f"{REPEAT}\n", add_special_tokens=False).input_ids)
    for name in options.presses:
        with model.disable_adapters():
            press = PRESSES[name](2 * options.tail)
            scores = press_scores(model.plain_model, press, before, prefix=pinned, repeat_ids=repeat)
        for slots in options.slots:
            memory = keep_best(whole, scores[..., : -options.tail], pinned + slots)
            yield f"{name}_{slots}", dataclasses.replace(memory, **carried)


@torch.no_grad()
def _chain_losses(
    options: argparse.Namespace,
    model: R3MemModel,
    learned: R3MemModel | None,
    tokenizer: Any,
    places: list[Place],
    lengths: Sequence[int],
) -> Losses:
    """Read segments behind so many segments: nats a token by arm, `[segments]` each."""
    budget, opening = options.budget, opening_ids(tokenizer)
    context = torch.stack([place.segments for place in places])
    segment = context[:, -1]
    seven = context[:, -1 - CHAIN : -1].flatten(1)
    raw = {
        "tail": begun(opening, seven[:, -options.tail :]),
        "full_of_7": begun(opening, seven, replace=True),
        f"raw_{budget}_of_7": begun(opening, seven[:, -options.tail - budget :]),
    }
    arms = {arm: _raw_loss(model, ids, segment) for arm, ids in raw.items()}
    for count in lengths:
        before = begun(opening, context[:, -1 - count : -1].flatten(1), replace=True)
        slots, pinned = options.chain_slots or max(options.slots), len(opening)
        for kind in ("matched", "adaptive") if options.adaptive else ("matched",):
            layout = _layout(options, model, slots, budget, "adaptive" if kind == "adaptive" else "uniform")
            memory = _matched(model, before, layout, pinned)
            arms[f"{kind}_{budget}_of_{count}"] = _loss_behind(options, model, memory, segment)
        if learned is not None and learned.is_anchored:
            memory = _anchored(options, learned, before, slots, budget, pinned)
            arms[f"anchored_{budget}_of_{count}"] = _loss_behind(options, model, memory, segment)
    return arms


def _raw_loss(model: R3MemModel, before: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """Nats a token of segments behind raw tokens, by row."""
    with model.disable_adapters():
        ids = torch.cat([before, segment], 1)
        logits = model.plain_model(ids, logits_to_keep=segment.shape[1], use_cache=False).logits
    return _mean_loss(logits, segment)


def _writer(model: R3MemModel) -> MatchedWriter:
    return MatchedWriter(model.reader, model.reader.layout, model.questions_of)


def _written(model: R3MemModel, found: Pass) -> Memory:
    """Match what a pass has read, and warn if something could not be matched."""
    writer = _writer(model)
    memory = writer.written(found)
    writer.finish()
    return memory


def _matched(model: R3MemModel, before: torch.Tensor, layout: MemoryLayout, pinned: int) -> Memory:
    """Matched memories of what is before segments, int64 `[B, T]`."""
    with laid_out(model, layout):
        return model.compress(before, finish=True, pinned=pinned)


def _anchored(
    options: argparse.Namespace, learned: R3MemModel, before: torch.Tensor, slots: int, budget: int, pinned: int
) -> Memory:
    """Memories as `_matched` makes them, with what an adapter of anchors has learned."""
    nothing = learned.empty_memory(len(before), pinned=pinned)
    layout = _layout(options, learned, slots, budget, learned.r3mem_config.memory_allocation)
    return anchored_memory(learned, before, nothing, layout)


def _loss_behind(
    options: argparse.Namespace, model: R3MemModel, memory: Memory, segment: torch.Tensor
) -> torch.Tensor:
    """Nats a token of segments behind memories, and the last tokens before them, by row."""
    # Layouts differ in numbers of slots, which only matter while a memory is made.
    layout = _layout(options, model, options.length, options.length)
    with laid_out(model, dataclasses.replace(layout, allocation=memory.layout.allocation)):
        memory = dataclasses.replace(memory, layout=model.layout, origin=model.origin())
        return _mean_loss(model(segment, memory=memory).logits, segment)


def _layout(
    options: argparse.Namespace, model: R3MemModel, slots: int, budget: int, allocation: str = "uniform"
) -> MemoryLayout:
    """Layout of matched memories with so many slots a segment, and in all."""
    config = R3MemConfig(
        memory_writer="matched", num_memory_tokens=slots, memory_budget=budget, segment_length=options.length,
        segment_overlap=options.tail, beyond_budget=options.beyond, memory_allocation=allocation,
    )  # fmt: skip
    layout = config.memory_layout(model.max_tokens)
    assert layout is not None
    return layout


def _mean_loss(logits: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    # By row, because a batch's logits take gigabytes in float32 where the vocabulary is large.
    rows = zip(logits, segment, strict=True)
    return torch.stack([cross_entropy(row[:-1].float(), ids[1:], reduction="none") for row, ids in rows]).mean(1)


if __name__ == "__main__":
    raise SystemExit(main())
