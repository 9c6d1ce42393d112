"""Compressing a history into a matched memory, against plain prefill of the same segments: ratios of paired runs.

    python -m bench.compress_speed --json
    python -m bench.compress_speed --device cuda --model llama-3.1-8b-shape --tokens 131072 --length 256 4096 --whole

The rival reads the same tokens in the same segments, each alone, by the base model's decoder with its key-value cache:
no memory before them, no logits. With `--whole` another rival reads all tokens in one pass, as a prompt of that length
is read. On a GPU compressing is measured with R3MEM_GRAPHS=1 (`graphs`) and R3MEM_GRAPHS=diagonal (`diagonal`), too.
`..._operations` are the operations that PyTorch dispatches for a segment and layer, without views. `again` is the
share of tokens that are read twice, as the overlap of segments; both arms read them.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from transformers.cache_utils import DynamicCache

from r3mem_fast import R3MemConfig, R3MemModel
from r3mem_fast.devices import as_dtype
from r3mem_fast.integrations import graphs
from r3mem_fast.integrations.compat import cache_argument
from r3mem_fast.integrations.scoped import temporarily

from . import models
from .decode import Operations
from .records import add_output_option, add_record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.compress_speed", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], help="(%(default)s)")
    parser.add_argument("--text", help="a UTF-8 text (Python's help topics)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--tokens", type=int, help="of a history (12 segments)")
    parser.add_argument("--length", type=int, nargs="+", default=[256], help="tokens of a segment (%(default)s)")
    parser.add_argument("--whole", action="store_true", help="a rival that reads all tokens in one pass, too")
    parser.add_argument("--overlap", type=int, default=32, help="of these read again with the next (%(default)s)")
    parser.add_argument("--slots", type=int, default=64, help="of a segment (%(default)s)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256], help="slots in all (%(default)s)")
    parser.add_argument("--attention", default="sdpa", help="of compress; the rivals' is sdpa (%(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="histories at one time (%(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="of runs, alternating (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    records: list[dict] = []
    for dtype in options.dtype:
        whole = options.whole  # which depends on no length
        for length in options.length:
            for budget in options.budgets:
                add_record(_compare(options, dtype, length, budget, whole=whole), records, options)
                whole = False
    return 0


@torch.no_grad()
def _compare(options: argparse.Namespace, dtype: str, length: int, budget: int, *, whole: bool) -> dict:
    tokens = options.tokens or 12 * length
    tokens -= tokens % length  # whole segments, which both read
    given: dict[str, Any] = {
        "dtype": as_dtype(dtype), "device": options.device, "tokens": tokens, "batch": options.rows,
        "text": options.text,
    }  # fmt: skip
    settings = {"segment_length": length, "segment_overlap": options.overlap, "memory_budget": budget}
    # The base model makes these memories, as it does by default.
    settings |= {"memory_writer": "matched", "adapter_rows": "memory", "num_memory_tokens": options.slots}
    model, ids = models.network(options.model, R3MemConfig(**settings), **given)
    starts = [max(0, start - options.overlap) for start in range(0, tokens, length)]
    pieces = [ids[:, start : (index + 1) * length] for index, start in enumerate(starts)]
    history = ids.cpu()

    model.plain_model.set_attn_implementation(options.attention)

    def prefill(pieces: Sequence[torch.Tensor] = pieces) -> None:
        with model.unconverted(), temporarily(model.decoder.config, _attn_implementation="sdpa"):
            for piece in pieces:
                cache = DynamicCache(config=model.config)
                model.decoder(input_ids=piece, use_cache=True, **cache_argument(model.decoder, cache))

    arms: dict[str, Callable[[], Any]] = {"prefill": prefill, "compress": lambda: model.compress(history)}
    if options.device != "cpu":
        arms |= {"graphs": lambda: _by_graphs(model, history, "1")}
        arms |= {"diagonal": lambda: _by_graphs(model, history, "diagonal")}
    if whole:
        arms["whole"] = lambda: prefill([ids])
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(options.pairs + 1):
        for arm, run in arms.items():
            started = time.perf_counter()
            run()
            if options.device != "cpu":
                torch.cuda.synchronize()
            if number:  # the first pair warms up
                seconds[arm].append(time.perf_counter() - started)
    counts = {}
    for arm in ("prefill", "compress"):
        run = arms[arm]
        with Operations() as counted:
            run()
        counts[f"{arm}_operations"] = round(counted.count / len(pieces) / len(model.layers), 2)
    ratios = sorted(a / b for a, b in zip(seconds["prefill"], seconds["compress"], strict=True))
    more = {}
    for arm in ("graphs", "diagonal"):
        if found := [a / b for a, b in zip(seconds["prefill"], seconds.get(arm, []), strict=False)]:
            more[f"{arm}_of_prefill"] = round(statistics.median(found), 4)
    total = tokens * options.rows
    read = sum(piece.numel() for piece in pieces)
    return {
        "model": options.model, "device": options.device,
        "dtype": dtype, "attention": options.attention, "slots": options.slots, "budget": budget,
        "segment_length": length, "rows": options.rows, "tokens": total, "again": round(read / total - 1, 4),
        "threads": torch.get_num_threads(),
        **{f"{arm}_tokens_per_second": round(total / statistics.median(times), 1) for arm, times in seconds.items()},
        "of_prefill": round(statistics.median(ratios), 4), "lowest": round(ratios[0], 4),
        "highest": round(ratios[-1], 4), "pairs": options.pairs, **counts, **more,
    }  # fmt: skip


def _by_graphs(model: R3MemModel, history: torch.Tensor, value: str) -> None:
    with mock.patch.dict(os.environ, {graphs.VARIABLE: value}):
        model.compress(history)


if __name__ == "__main__":
    raise SystemExit(main())
