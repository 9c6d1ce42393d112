"""What a memory is worth to a language model: cross-entropy of held-out text, with it and without.

    python -m bench.memory_ppl --json --adapter FOLDER --text BOOK.txt OTHER.txt

The last tenth of each text, which `r3mem train --hold-out 0.1` did not see, is cut into segments of 256 tokens. Each
is read in several ways, its first token not counted:

    none        alone
    tail        behind the last tokens of the segment before it, as many as the adapter's overlap
    memory      behind these, and the memory of the segment before
    shuffled    behind these, and the memory of a segment of another text
    full        behind the whole segment before
    memory_of_7, full_of_7      behind the memory, or the whole, of the seven segments before, and the tail
    memory_of_third             behind the memory of the third segment before alone, and the tail

`closed` is the share of the gap between `tail` and `full` that the memory closes, (tail - memory) / (tail - full),
with a bootstrapped interval of 95 % over segments. One record an arm, with nats a token, and one a share. With
--plain, an adapter that was trained equally without memory (`--memory-tokens 0 --first-adapted-layer 0`), there are
its `none`, `tail` and `full`, the shares over its gap, and what the memory wins over its `tail`, too.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from r3mem_fast import Memory, R3MemPipeline
from r3mem_fast.data.text import read_text

from .places import Place, foreign_of, interval, places_of, spread
from .records import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory_ppl", description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="folder of a trained adapter with memory tokens")
    parser.add_argument("--plain", help="folder of an adapter that was trained equally, without memory")
    parser.add_argument("--text", nargs="+", default=[None], help="UTF-8 texts (Python's help topics)")
    parser.add_argument("--held-out", type=float, default=0.1, help="share at the end of each text (%(default)s)")
    parser.add_argument("--segments", type=int, default=200, help="that are read, at most (%(default)s)")
    parser.add_argument("--chains", type=int, default=64, help="of them, read behind seven others (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="of them at one time (%(default)s)")
    return run(parser, _records, arguments)


def _records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the record of the adapter, one for each arm, and one for each share."""
    pipeline = R3MemPipeline(options.adapter)
    config = pipeline.model.r3mem_config
    places = places_of(
        [read_text(path) for path in options.text],
        pipeline.tokenizer,
        config.segment_length,
        held_out=options.held_out,
        count=options.segments,
    )
    tail = config.segment_overlap
    if not tail:
        raise ValueError(f"{options.adapter} was made without a segment_overlap, so there is no tail to compare with")
    losses = _losses(options, pipeline.model, places, tail)
    chains = _losses(options, pipeline.model, spread(places, options.chains), tail, chains=True)
    yield {
        "adapter": {
            name: getattr(config, name)
            for name in ("num_memory_tokens", "segment_length", "segment_overlap", "max_memory_segments",
                         "memory_placement", "adapter_rows", "distillation_weight", "lora_r")
        },
        "memory_bytes": pipeline.model.compress(places[0].segments[:1], finish=True).nbytes,
        "segments": len(places),
        "chains": len(spread(places, options.chains)),
        "texts": len({place.text for place in places}),
    }  # fmt: skip
    for arm, values in losses.items():
        yield {"arm": arm, "nats_per_token": round(values.mean().item(), 4)}
    for arm, values in chains.items():
        yield {"arm": arm, "of_chains": True, "nats_per_token": round(values.mean().item(), 4)}
    yield from _shares(losses, losses, "the same model")
    yield from _chain_shares(chains)
    if options.plain:
        plain = R3MemPipeline(options.plain)
        gap = _losses(options, plain.model, places, tail)
        for arm, values in gap.items():
            yield {"arm": f"{arm}, trained without memory", "nats_per_token": round(values.mean().item(), 4)}
        yield from _shares(losses, gap, "a model trained equally without memory")
        won, name = gap["tail"] - losses["memory"], "nats a token that the memory wins over the tail of that model"
        yield {"difference": name, **interval(won, torch.ones_like(won))}


@torch.no_grad()
def _losses(
    options: argparse.Namespace, model: Any, places: list[Place], tail_length: int, chains: bool = False
) -> dict[str, torch.Tensor]:
    """Read segments in several ways.

    Args:
        options: Options of the command.
        model: An `R3MemModel`; without memory tokens it has only the arms that read no memory.
        places: The segments.
        tail_length: Tokens before a segment that most arms read as they are.
        chains: Whether to read in the ways that need seven segments, and in those that they are compared with; else in
            the others.

    Returns:
        Nats a token by arm, `[segments]` each.
    """
    arms: dict[str, list[torch.Tensor]] = {}

    def add(arm: str, logits: torch.Tensor, segments: torch.Tensor) -> None:
        found = cross_entropy(logits[:, :-1].float().transpose(1, 2), segments[:, 1:], reduction="none").mean(1)
        arms.setdefault(arm, []).append(found)

    foreign = foreign_of(places)
    device = model.device.type
    for start in tqdm(range(0, len(places), options.batch), disable=options.json, desc="Reading"):
        context = torch.stack([place.segments for place in places[start : start + options.batch]]).to(model.device)
        others = torch.stack([place.segments for place in foreign[start : start + options.batch]]).to(model.device)
        segment, length = context[:, -1], context.shape[-1]
        tail = context[:, -2, -tail_length:]
        whole = {"tail": torch.cat([tail, segment], 1)}
        behind = {"memory": context[:, -2]}
        if chains:
            whole |= {"full_of_7": context.flatten(1)}
            behind |= {"memory_of_7": context[:, :-1].flatten(1)}
        else:
            whole |= {"none": segment, "full": context[:, -2:].flatten(1)}
            behind |= {"shuffled": others[:, -2], "memory_of_third": context[:, -4]}
        # Compute as in training, where adapters ran in bfloat16, too.
        with torch.autocast(device, torch.bfloat16, enabled=model.peft_model.dtype == torch.bfloat16):
            for arm, ids in whole.items():
                # Keep the logits of the segment alone: those of all tokens would take gigabytes.
                add(arm, model(ids, logits_to_keep=length).logits, segment)
            for arm, before in behind.items() if model.learns_memories else ():
                memory: Memory = model.compress(before, finish=True)
                memory = dataclasses.replace(memory, recent=tuple(tail.cpu()))
                add(arm, model(segment, memory=memory).logits, segment)
    return {arm: torch.cat(found) for arm, found in arms.items()}


def _shares(losses: dict[str, torch.Tensor], gap: dict[str, torch.Tensor], of: str) -> Iterator[dict[str, Any]]:
    """Yield the shares that memories close of the gap between `tail` and `full`, which is that of the model `of`."""
    for name, arm in (
        ("closed", "memory"),
        ("closed by a foreign memory", "shuffled"),
        ("closed by the memory of the third segment before", "memory_of_third"),
    ):
        won, wanted = losses["tail"] - losses[arm], gap["tail"] - gap["full"]
        yield {"share": name, "gap_of": of, **interval(won, wanted)}


def _chain_shares(losses: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """Yield what a memory of seven segments closes, and what it wins over that of one."""
    won, wanted = losses["tail"] - losses["memory_of_7"], losses["tail"] - losses["full_of_7"]
    yield {"share": "closed by the memory of seven segments, of all seven", **interval(won, wanted)}
    more = losses["memory"] - losses["memory_of_7"]
    name = "nats a token that the memory of seven segments wins over that of one"
    yield {"difference": name, **interval(more, torch.ones_like(more))}


if __name__ == "__main__":
    raise SystemExit(main())
