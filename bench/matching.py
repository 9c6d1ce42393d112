"""Time of the matching operations, against their reference in PyTorch on the same device: ratios of paired runs.

    python -m bench.matching --json

One record an operation, case and arm, with `milliseconds` (median, quartiles beside it) and `ratio`: the arm's time
over that of `r3mem`, the operation by the implementation that the dispatcher chooses, in paired rounds. Arms:

    r3mem       `attention_scores` over all keys, or `value_system` over those that are kept
    reference   the same by the specification in PyTorch
    attention   of `attention_scores`: PyTorch's attention of the same queries to the same keys, which all of them see.
                It gives neither scores nor log-sum-exps, so it is a mark and no rival

bfloat16 on a GPU; float32 on a CPU, where the reference is what runs, so that there is something to learn on a GPU
only.
"""

import argparse
import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention

from r3mem_fast.kernels.common import dispatch
from r3mem_fast.kernels.matching import attention_scores, value_system

from .attention import time_of
from .matching_cases import Shape
from .records import add_output_option, add_record

# By name: sizes and head_dim. `everyday` has the layers of SmolLM2 as rows; the two long ones are of Llama's shape.
CASES = {
    "small": (Shape(rows=2, heads=4, key_heads=2, queries=32, keys=48, kept=16), 64),
    "everyday": (Shape(rows=30, heads=9, key_heads=3, queries=288, keys=352, kept=64), 64),
    "segment": (Shape(rows=16, heads=32, key_heads=8, queries=1024, keys=2048, kept=256), 128),
    "long": (Shape(rows=1, heads=32, key_heads=8, queries=4096, keys=8192, kept=1024), 128),
}
OPERATIONS = ("attention_scores", "value_system")


def arms_of(operation: str, case: str, device: str) -> dict[str, Callable[[], Any]]:
    """Make the arms of an operation in one of `CASES`, by name; `forced` says what one of ours runs."""
    shape, head_dim = CASES[case]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    keys = shape.keys if operation == "attention_scores" else shape.kept
    generator = torch.Generator(device).manual_seed(0)

    def values(heads: int, tokens: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        found = torch.randn(shape.rows, heads, tokens, head_dim, generator=generator, device=device)
        return found.to(dtype)

    query = values(shape.heads, shape.queries)
    key, value = values(shape.key_heads, keys), values(shape.key_heads, keys)
    target = values(shape.heads, shape.queries, torch.float32)
    positions = torch.arange(shape.keys + shape.queries, dtype=torch.int32, device=device)
    where = {
        "query_positions": positions[shape.keys :].repeat(shape.rows, 1),
        "key_positions": positions[:keys].repeat(shape.rows, shape.key_heads, 1),
    }
    grouped = shape.heads > shape.key_heads

    def ours() -> Any:
        if operation == "attention_scores":
            return attention_scores(query, key, value, **where)
        return value_system(query, key, value, target, **where)

    found = {"r3mem": ours, "reference": ours}
    if operation == "attention_scores":
        found["attention"] = lambda: scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
    return found


def forced(arm: str) -> AbstractContextManager:
    """Force the implementation that an arm is named after in the block, not within what is timed."""
    return mock.patch.dict(os.environ, {dispatch.VARIABLE: arm} if arm == "reference" else {})


def records_of(operation: str, case: str, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Time the arms in turn, so many rounds; yield one record each."""
    arms = arms_of(operation, case, device)
    for name, arm in arms.items():
        with forced(name):
            arm()  # compiles
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            with forced(name):
                times[name].append(time_of(arm, device))
    shape, head_dim = CASES[case]
    sizes = {name: size for name, size in dataclasses.asdict(shape).items() if name != "few"}
    runs = dispatch.choose(torch.device(device)).implementation
    for name, found in times.items():
        low, _, high = statistics.quantiles(found, n=4)
        ratios = [one / other for one, other in zip(found, times["r3mem"], strict=True)]
        yield {
            "operation": operation,
            "case": case,
            **sizes,
            "head_dim": head_dim,
            "arm": name,
            "runs": runs if name == "r3mem" else name,
            "milliseconds": round(statistics.median(found), 4),
            "milliseconds_quartiles": [round(low, 4), round(high, 4)],
            "ratio": round(statistics.median(ratios), 3),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.matching", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, choices=range(2, 1000), default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="(all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    records: list[dict[str, Any]] = []
    with torch.no_grad():
        for case in options.cases:
            for operation in OPERATIONS:
                for record in records_of(operation, case, options.device, options.rounds):
                    add_record(record, records, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
