"""What a matched memory is worth, beside rivals of the same number of slots: cross-entropy of text, no training.

    python -m bench.matched --json --kind novels --text BOOK.txt OTHER.txt

Segments of 256 tokens at the ends of the texts are read, their first token not counted, behind the last 32 tokens of
the segment before and

    tail        nothing else
    full        all of the segment before
    raw_N       N more of its tokens, as they are
    even_N      N slots: evenly spaced keys, with their values
    attended_N  N slots: the keys that are attended most, with their values
    matched_N   N slots: the same keys, with values that match the attention to all of them (`memory_writer="matched"`)
    foreign_N   the matched memory of a segment of another text
    foreign     the whole segment of another text

and, at fewer places, of seven segments: `full_of_7`, `raw_B_of_7`, and `matched_B_of_7` in B slots, matched again and
again. `closed` is the share of the gap between `tail` and `full` (or `full_of_7`) that an arm closes, with a
bootstrapped interval of 95 % over segments.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from r3mem_fast import R3MemConfig, R3MemModel, load_model
from r3mem_fast.integrations.scoped import temporarily
from r3mem_fast.memory.writers import matching

from .places import Place, foreign_of, interval, places_of, spread
from .records import add_output_option, add_record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.matched", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", help="(%(default)s)")
    parser.add_argument("--kind", default="help", help="name of the kind of text (%(default)s)")
    parser.add_argument("--text", nargs="+", default=[None], help="UTF-8 texts (Python's help topics)")
    parser.add_argument("--held-out", type=float, default=0.5, help="share at the end of each text (%(default)s)")
    parser.add_argument("--segments", type=int, default=200, help="that are read, at most (%(default)s)")
    parser.add_argument("--chains", type=int, default=24, help="of them, read behind seven others (%(default)s)")
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64], help="of a segment (%(default)s)")
    parser.add_argument("--budget", type=int, default=152, help="slots of seven segments (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a segment (%(default)s)")
    parser.add_argument(
        "--tail", type=int, default=32, help="tokens before it that are read as they are (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=8, help="segments at one time (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    records: list[dict] = []
    for record in _records(options):
        add_record(record, records, options)
    return 0


def _records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base, tokenizer = load_model(options.model, dtype=options.dtype)
    model = R3MemModel(base).eval()
    found = places_of(options.text, tokenizer, options.length, held_out=options.held_out, count=options.segments)
    chains = spread(found, options.chains)
    yield {
        "kind": options.kind, "model": options.model, "dtype": options.dtype, "segment_length": options.length,
        "tail": options.tail,
        "segments": len(found), "chains": len(chains), "texts": len({place.text for place in found}),
    }  # fmt: skip
    losses = _losses(options, model, found)
    for arm, values in losses.items():
        yield {"arm": arm, "nats_per_token": round(values.mean().item(), 4)}
    wanted = losses["tail"] - losses["full"]
    for arm in losses:
        if arm not in ("tail", "full"):
            yield {"closed_by": arm, "of": "full", **interval(losses["tail"] - losses[arm], wanted)}
    for slots in options.slots:
        mine = losses[f"matched_{slots}"]
        for rival in ("raw", "even", "attended"):
            more = losses[f"{rival}_{slots}"] - mine
            yield {"nats_better_than": rival, "slots": slots, **interval(more, torch.ones_like(more))}
    losses = _chain_losses(options, model, chains)
    for arm, values in losses.items():
        yield {"arm": arm, "of_chains": True, "nats_per_token": round(values.mean().item(), 4)}
    wanted = losses["tail"] - losses["full_of_7"]
    for arm in losses:
        if arm not in ("tail", "full_of_7"):
            yield {"closed_by": arm, "of": "full_of_7", **interval(losses["tail"] - losses[arm], wanted)}


@torch.no_grad()
def _losses(options: argparse.Namespace, model: R3MemModel, places: list[Place]) -> dict[str, torch.Tensor]:
    """Read segments behind one segment: nats a token by arm, `[segments]` each."""
    arms: dict[str, list[torch.Tensor]] = {}
    foreign = foreign_of(places)
    for start in tqdm(range(0, len(places), options.batch), disable=options.json, desc="Reading"):
        context = torch.stack([place.segments for place in places[start : start + options.batch]])
        others = torch.stack([place.segments for place in foreign[start : start + options.batch]])
        before, segment, tail = context[:, -2], context[:, -1], context[:, -2, -options.tail :]
        raw = {"tail": tail, "full": before, "foreign": torch.cat([others[:, -2], tail], 1)}
        raw |= {f"raw_{slots}": before[:, -options.tail - slots :] for slots in options.slots}
        for arm, ids in raw.items():
            _add(arms, arm, _raw_loss(model, ids, segment))
        for slots in options.slots:
            kinds = {"matched": contextlib.nullcontext(), "attended": _values_kept(), "even": _evenly_spaced()}
            for kind, choice in kinds.items():
                with choice:
                    _add(arms, f"{kind}_{slots}", _memory_loss(options, model, before, segment, slots, slots))
            _add(arms, f"foreign_{slots}", _memory_loss(options, model, others[:, -2], segment, slots, slots, tail))
    return {arm: torch.cat(found) for arm, found in arms.items()}


@torch.no_grad()
def _chain_losses(options: argparse.Namespace, model: R3MemModel, places: list[Place]) -> dict[str, torch.Tensor]:
    """Read segments behind seven segments: nats a token by arm, `[segments]` each."""
    arms: dict[str, list[torch.Tensor]] = {}
    budget = options.budget
    for start in tqdm(range(0, len(places), options.batch), disable=options.json, desc="Reading chains"):
        context = torch.stack([place.segments for place in places[start : start + options.batch]])
        before, segment = context[:, :-1].flatten(1), context[:, -1]
        for arm, count in (
            ("tail", options.tail),
            ("full_of_7", before.shape[1]),
            (f"raw_{budget}_of_7", options.tail + budget),
        ):
            _add(arms, arm, _raw_loss(model, before[:, -count:], segment))
        for slots in (options.slots[-1], budget):
            name = f"matched_{budget}_of_7" + ("" if slots < budget else ", all slots from the first segment on")
            _add(arms, name, _memory_loss(options, model, before, segment, slots, budget))
    return {arm: torch.cat(found) for arm, found in arms.items()}


def _add(arms: dict[str, list[torch.Tensor]], arm: str, losses: torch.Tensor) -> None:
    arms.setdefault(arm, []).append(losses)


def _raw_loss(model: R3MemModel, before: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """Nats a token of segments behind raw tokens, by row."""
    with model.disable_adapters():
        ids = torch.cat([before, segment], 1)
        logits = model.plain_model(ids, logits_to_keep=segment.shape[1], use_cache=False).logits
    return _mean_loss(logits, segment)


def _memory_loss(
    options: argparse.Namespace,
    model: R3MemModel,
    before: torch.Tensor,
    segment: torch.Tensor,
    slots: int,
    budget: int,
    tail: torch.Tensor | None = None,
) -> torch.Tensor:
    """Nats a token of segments behind the memory of what is before them, and its last tokens, by row.

    Args:
        options: Options of the command.
        model: Any memory network, whose base model is used.
        before: What is compressed, int64 `[B, T]`.
        segment: What is read, int64 `[B, T]`.
        slots: Slots that a segment gets.
        budget: Slots at most.
        tail: Other tokens to read before the segment, int64 `[B, n]`; None: the last ones before it.
    """
    with _slots_of(options, model, slots, budget):
        memory = model.compress(before, finish=True)
        if tail is not None:
            memory = dataclasses.replace(memory, recent=tuple(tail))
        return _mean_loss(model(segment, memory=memory).logits, segment)


@contextlib.contextmanager
def _slots_of(options: argparse.Namespace, model: R3MemModel, slots: int, budget: int) -> Iterator[None]:
    """Let a model's matched memories have so many slots in the block."""
    config = R3MemConfig(
        memory_writer="matched", num_memory_tokens=slots, memory_budget=budget, segment_length=options.length,
        segment_overlap=options.tail,
    )  # fmt: skip
    layout = config.memory_layout(model.max_tokens)
    with temporarily(model, layout=layout), temporarily(model.reader, layout=layout):
        yield


def _values_kept() -> contextlib.AbstractContextManager[None]:
    """Let kept keys keep their values."""
    return temporarily(matching, solved=lambda gram, residual: torch.zeros_like(residual))


@contextlib.contextmanager
def _evenly_spaced() -> Iterator[None]:
    """Keep evenly spaced keys, with their values."""

    def spaced(scores: torch.Tensor, positions: torch.Tensor, limit: int) -> torch.Tensor:
        # Existing keys have the first places in this order, by position.
        order = torch.where(positions >= 0, positions, positions.max() + 1).sort(dim=-1, stable=True).indices
        count = int((positions[0, 0] >= 0).sum())
        steps = torch.linspace(0, count - 1, min(limit, count)).round().long()
        return order[..., steps]

    with _values_kept(), temporarily(matching, best_places=spaced):
        yield


def _mean_loss(logits: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), segment[:, 1:], reduction="none").mean(1)


if __name__ == "__main__":
    raise SystemExit(main())
