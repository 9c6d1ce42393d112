"""Logits behind a memory by attention implementation: how far they are from eager's, and from float64.

    python -m bench.logits --json --text BOOK.txt

A memory is made of the text's first 512 tokens by memory tokens; the next 256 tokens are read behind it in
float32. One record a setting and implementation:

    max_from_eager      largest difference of a logit from eager's
    max_from_float64    the same from eager's in float64; only for `base` and `bypassed`, which can run in it
    same_tokens         share of positions whose most likely token is eager's
    batch_from_one      largest difference of a batch of four rows of different lengths and memories, padded on the
                        left, from each row alone
    milliseconds        for the 256 tokens, the median of some rounds

Settings: `base`, the base model without a memory; `bypassed`, behind the memory with adapters and coupling off; and
`14`, `16`: the reversible network, by fraction bits of its streams. 14 is the default.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from r3mem_fast import Memory, R3MemConfig, R3MemPipeline
from r3mem_fast.data.text import read_text, token_windows
from r3mem_fast.integrations.scoped import temporarily
from r3mem_fast.reversible.convert import stack_of

from .records import add_output_option, add_record

SETTINGS = ("base", "bypassed", "14", "16")
IMPLEMENTATIONS = ("eager", "sdpa", "r3mem")
_MEMORY, _TOKENS, _ROWS = 512, 256, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.logits", description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", help="folder of one with memory tokens (64 tokens that have learned nothing)")
    parser.add_argument("--model", default="smollm2-135m", help="without an adapter (%(default)s)")
    parser.add_argument("--text", help="a UTF-8 text (Python's help topics)")
    parser.add_argument("--settings", type=lambda text: text.split(","), default=SETTINGS, help=", ".join(SETTINGS))
    parser.add_argument("--rounds", type=int, default=5, help="timed (%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    if unknown := [setting for setting in options.settings if setting not in SETTINGS]:
        parser.error(f"unknown setting {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    new = {"config": R3MemConfig(num_memory_tokens=64)} if options.adapter is None else {}
    pipeline = R3MemPipeline(options.adapter or options.model, dtype=torch.float32, device=options.device, **new)
    model = pipeline.model.eval()
    size = _MEMORY + _TOKENS
    ids = token_windows(pipeline.tokenizer, read_text(options.text), tokens=size, count=_ROWS).to(model.device)
    memory = model.compress(ids[:, :_MEMORY], finish=True)
    memory = dataclasses.replace(memory, recent=(ids.new_zeros(0).cpu(),) * _ROWS)
    records: list[dict] = []
    for setting in options.settings:
        for record in _records_of(setting, model, memory, ids[:, _MEMORY:], options.rounds):
            add_record(record, records, options)
    return 0


@torch.no_grad()
def _records_of(setting: str, model: Any, memory: Memory, ids: torch.Tensor, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the record of each implementation."""
    found, exact = {}, None
    for implementation in IMPLEMENTATIONS:
        found[implementation] = _logits(setting, implementation, model, memory[:1], ids[:1])
    if setting in ("base", "bypassed"):
        model.double()
        exact = _logits(setting, "eager", model, memory[:1].to(torch.float64), ids[:1])
        model.float()
    lengths = [len(row) - 37 * index for index, row in enumerate(ids)]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for index, length in enumerate(lengths):
        padded[index, -length:], mask[index, -length:] = ids[index, :length], 1
    for implementation in IMPLEMENTATIONS:
        logits = found[implementation]
        batch = _logits(setting, implementation, model, memory, padded, mask)
        alone = [
            _logits(setting, implementation, model, memory[index : index + 1], ids[index : index + 1, :length])
            for index, length in enumerate(lengths)
        ]
        differences = [
            (batch[index, -length:] - one[0]).abs().max().item()
            for index, (length, one) in enumerate(zip(lengths, alone, strict=True))
        ]
        record = {
            "setting": setting,
            "attention": implementation,
            "largest_logit": round(found["eager"].abs().max().item(), 2),
            "max_from_eager": _difference(logits, found["eager"]),
        }
        if exact is not None:
            record["max_from_float64"] = _difference(logits, exact)
        same = (logits.argmax(-1) == found["eager"].argmax(-1)).float().mean().item()
        record |= {"same_tokens": round(same, 4), "batch_from_one": float(f"{max(differences):.2e}")}
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            _logits(setting, implementation, model, memory[:1], ids[:1])[0, -1, 0].item()  # waits for a GPU
            times.append(time.perf_counter() - started)
        yield {**record, "milliseconds": round(statistics.median(times) * 1e3, 1)}


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(f"{(left.double() - right.double()).abs().max().item():.2e}")


def _logits(
    setting: str,
    implementation: str,
    model: Any,
    memory: Memory,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the logits behind a memory, `[rows, tokens, vocabulary]`; of the base model without it."""
    base, stack = model.peft_model.get_base_model(), stack_of(model)
    base.set_attn_implementation(implementation)
    off = setting in ("base", "bypassed")
    with model.disable_adapters() if off else temporarily(stack, fraction_bits=int(setting)):
        if setting == "base":
            return base(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return model(ids, attention_mask=mask, memory=memory).logits


if __name__ == "__main__":
    raise SystemExit(main())
