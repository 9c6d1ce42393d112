"""What it is worth that adapters read, too, and do not only write the anchors of a memory.

    python -m bench.adapted ANCHORED ADAPTED --data FOLDER --output FILE

ANCHORED and ADAPTED are folders of adapters of anchors, trained alike, with `adapter_rows` of "memory" and of "all".
Segments are read behind the last tokens of the segment before and

    tail, adapted_tail                  nothing else, by the base model and by the adapted one
    full, adapted_full                  all of the segment before
    anchored_N, adapted_N               a memory of N slots of each adapter, read as each is read
    foreign_anchored_N, foreign_adapted_N   the same, of a segment of another text

An adapted model may read better without a memory, too: so `closed` is the share of the gap between the same model's
own `tail` and `full`. Intervals are bootstrapped ones of 95 % over segments; differences are paired.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from r3mem_fast import R3MemModel, R3MemPipeline
from r3mem_fast.data.text import opening_ids, read_text

from .matched_arms import mean_loss
from .places import Place, begun, foreign_of, interval, places_of
from .records import run
from .texts import KINDS, texts_of
from .unfinished import Losses, Unfinished, settings_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.adapted", description=__doc__.split("\n")[0])
    parser.add_argument("anchored", help="folder of an adapter of anchors, which the base model reads")
    parser.add_argument("adapted", help="folder of one that reads, too")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="novels", help="of texts (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder of the data sets, see bench/texts.py")
    parser.add_argument("--text", nargs="+", help="UTF-8 texts, in place of those of the kind")
    parser.add_argument("--held-out", type=float, default=0.5, help="share at the end of each text (%(default)s)")
    parser.add_argument("--segments", type=int, default=48, help="that are read, at most (%(default)s)")
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 16], help="of a segment (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="segments at one time (%(default)s)")
    return run(parser, _records, arguments)


def _records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    anchored, adapted = (R3MemPipeline(f, dtype=options.dtype) for f in (options.anchored, options.adapted))
    models = {"anchored": anchored.model.eval(), "adapted": adapted.model.eval()}
    _check(models)
    layout = models["anchored"].reader.layout
    texts = [read_text(path) for path in options.text] if options.text else texts_of(options.kind, options.data)
    found = places_of(
        texts, anchored.tokenizer, layout.segment_length, held_out=options.held_out, count=options.segments, before=1
    )
    yield {
        "kind": options.kind, "model": Path(models["anchored"].plain_model.name_or_path).name, "dtype": options.dtype,
        "segment_length": layout.segment_length, "tail": layout.segment_overlap, "segments": len(found),
        "allocation": layout.allocation,
    }  # fmt: skip
    opening, others = opening_ids(anchored.tokenizer), foreign_of(found)
    unfinished = Unfinished(options.output, settings_of(options), batch=options.batch, progress=not options.json)
    losses = unfinished.losses(
        "segments", len(found), lambda some: _losses(models, options.slots, opening, found[some], others[some])
    )
    for arm, values in losses.items():
        yield {"arm": arm, "nats_per_token": round(values.mean().item(), 4)}
    for kind, before in (("anchored", ""), ("adapted", "adapted_")):
        tail, full = losses[f"{before}tail"], losses[f"{before}full"]
        for slots in options.slots:
            mine = losses[f"{kind}_{slots}"]
            yield {"closed_by": f"{kind}_{slots}", **interval(tail - mine, tail - full)}
            yield _better(f"foreign_{kind}_{slots}", losses, f"{before}tail")
    pairs = [("adapted_tail", "tail"), ("adapted_full", "full")]
    pairs += [(f"adapted_{slots}", f"anchored_{slots}") for slots in options.slots]
    pairs += [(f"foreign_adapted_{slots}", f"foreign_anchored_{slots}") for slots in options.slots]
    for mine, rival in pairs:
        yield _better(mine, losses, rival)
    unfinished.remove()


def _check(models: dict[str, R3MemModel]) -> None:
    """Raise ValueError for adapters that are none of anchors, do not read as they must, or are not alike."""
    for name, adapts in (("anchored", False), ("adapted", True)):
        if not models[name].is_anchored or models[name].adapts_tokens is not adapts:
            rows = "all" if adapts else "memory"
            raise ValueError(
                f'the {name} adapter must be one of anchors (memory_writer="anchored") with rows "{rows}"'
            )
    layouts = {model.reader.layout for model in models.values()}
    if len(layouts) > 1 or len({model.base_fingerprint() for model in models.values()}) > 1:
        raise ValueError("the adapters are of other base models, or make other memories")


@torch.no_grad()
def _losses(
    models: dict[str, R3MemModel],
    slots: Sequence[int],
    opening: Sequence[int],
    places: list[Place],
    others: list[Place],
) -> Losses:
    """Nats a token of segments behind every arm."""
    context, foreign = (torch.stack([place.segments for place in some]) for some in (places, others))
    segment = context[:, -1]
    overlap = models["anchored"].reader.layout.segment_overlap
    tail = context[:, -2, -overlap:]
    before, other = (begun(opening, rows[:, -2], replace=True) for rows in (context, foreign))
    losses: Losses = {}
    for kind, prefix in (("anchored", ""), ("adapted", "adapted_")):
        model = models[kind]
        for arm, ids in (("tail", begun(opening, tail)), ("full", before)):
            with model.without_memory():
                whole = torch.cat([ids, segment], 1)
                logits = model.peft_model(whole, logits_to_keep=segment.shape[1], use_cache=False).logits
            losses[f"{prefix}{arm}"] = mean_loss(logits, segment)
        for count in slots:
            for arm, ids in ((f"{kind}_{count}", before), (f"foreign_{kind}_{count}", other)):
                sizes = {"memory_tokens": count, "memory_budget": count}
                memory = model.compress(ids, finish=True, pinned=len(opening), **sizes)
                memory = dataclasses.replace(memory, recent=tuple(tail))
                losses[arm] = mean_loss(model(segment, memory=memory).logits, segment)
    return losses


def _better(mine: str, losses: Losses, rival: str) -> dict[str, Any]:
    """How many nats a token one arm is better than another."""
    difference = losses[rival] - losses[mine]
    return {"arm": mine, "nats_better_than": rival, **interval(difference, torch.ones_like(difference))}


if __name__ == "__main__":
    raise SystemExit(main())
