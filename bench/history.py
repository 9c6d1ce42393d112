"""Training through long histories: peak memory and time by the number of segments.

    python -m bench.history --segments 2,8,64 --json

Each count of segments has two processes of its own: one that trains a step by memory replay, for the peak of resident
memory (on a GPU: of allocated memory), and one that times paired steps of replay and of its rival. The rival is full
back-propagation through time with every layer of the ordinary network checkpointed, and what the head computes kept:
the fastest that fits. One record a count, with

    peak_bytes            of the process, weights and libraries included. On the CPU with MALLOC_MMAP_THRESHOLD_=65536,
                          so that glibc gives tensors back when they are freed: by default its heap fragments, and the
                          peak is that of the heap, which differs by hundreds of megabytes from run to run
    resident_bytes        of the same process before the first step
    kept_bytes            created in the forward pass and alive after it, however held; up to --rival-segments
    seconds_per_token     of forward and backward pass, the median over rounds
    checkpointed_...      the same of the rival, up to --rival-segments
    time_ratio            replay over the rival: the median of the ratios within a round, with its quartiles

and one with `peak_ratio`, the peak of the largest count over that of the smallest.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import psutil
import torch
from torch.utils.checkpoint import checkpoint

from r3mem_fast import Memory, R3MemConfig, R3MemModel, load_model, reading
from r3mem_fast.data.text import read_text, token_windows
from r3mem_fast.devices import default_dtype
from r3mem_fast.integrations.scoped import temporarily
from r3mem_fast.measure import StorageRecorder, peak_rss, reset_peak_rss
from r3mem_fast.reversible import stack
from r3mem_fast.reversible.convert import stack_of
from r3mem_fast.reversible.stack import Mode

from .records import add_output_option, add_record

_GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.history", description=__doc__.split("\n")[0])
    parser.add_argument("--segments", type=_counts, default=[2, 8, 64], help="(2,8,64)")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--text", help="a UTF-8 text (Python's help topics)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--memory-tokens", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--segment-length", type=int, default=256, help="in tokens (%(default)s)")
    parser.add_argument("--kept-segments", choices=["none", "device", "host"], default="none", help="(%(default)s)")
    parser.add_argument(
        "--rounds", type=int, choices=range(2, 100), default=3, metavar="N", help="timed (%(default)s)"
    )
    parser.add_argument("--rival-segments", type=int, default=8, help="timed up to so many (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    # Tokenise in a process that ends, because the heap that a long text leaves behind is no part of a step.
    ids = _alone(_token_ids, options)
    records: list[dict] = []
    peaks: dict[int, int] = {}
    for count in options.segments:
        read = ids[: count * options.segment_length]
        record = {"segments": count, "tokens": count * options.segment_length, "kept_segments": options.kept_segments}
        record |= _alone(_peak, options, read, **_GIVEN_BACK)
        record |= _alone(_times, options, read)
        peaks[count] = record["peak_bytes"]
        add_record(record, records, options)
    if len(peaks) > 1:
        few, many = min(peaks), max(peaks)
        record = {"segments_compared": [many, few], "peak_ratio": round(peaks[many] / peaks[few], 4)}
        add_record(record, records, options)
    return 0


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _alone(function: Callable, *arguments: Any, **variables: str) -> Any:
    """Run a function in a process of its own with more environment variables, and return its result."""
    with (
        mock.patch.dict(os.environ, variables),
        concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(function, *arguments).result()


def _token_ids(options: argparse.Namespace) -> list[int]:
    """Return the token ids of the longest history."""
    _, tokenizer = load_model(options.model)
    tokens = max(options.segments) * options.segment_length
    return token_windows(tokenizer, read_text(options.text), tokens=tokens, count=1)[0].tolist()


def _made(options: argparse.Namespace, ids: list[int]) -> tuple[R3MemModel, Memory, torch.Tensor]:
    """Make a model, an empty memory and a batch of one; untrained adapters, as their gradients cost as much as any."""
    base, _ = load_model(options.model, dtype=default_dtype(options.device))
    torch.manual_seed(0)
    config = R3MemConfig(
        num_memory_tokens=options.memory_tokens,
        segment_length=options.segment_length,
        kept_segments=options.kept_segments,
    )
    model = R3MemModel(base.to(options.device), config).train()
    return model, model.empty_memory(), torch.tensor([ids], device=options.device)


def _forward(model: Any, memory: Memory, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=model.peft_model.dtype == torch.bfloat16):
        return model(ids, labels=ids, memory=memory).loss


def _step(model: R3MemModel, memory: Memory, ids: torch.Tensor) -> None:
    _forward(model, memory, ids).backward()
    model.zero_grad(set_to_none=True)


def _peak(options: argparse.Namespace, token_ids: list[int]) -> dict[str, Any]:
    """Return the peak memory of a step by replay, and what the forward pass keeps."""
    count = len(token_ids) // options.segment_length
    model, memory, ids = _made(options, token_ids)
    _step(model, memory, ids[:, : 2 * options.segment_length])  # makes what every step needs: workspaces, code
    gc.collect()
    on_gpu = ids.device.type == "cuda"
    if not on_gpu:
        ctypes.CDLL(None).malloc_trim(0)  # memory that loading has left free would hide what a step takes
    before = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif not reset_peak_rss():
        raise RuntimeError("peak memory can be measured anew on Linux alone")
    _step(model, memory, ids)
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_rss()
    record = {"peak_bytes": peak, "resident_bytes": before}
    # While storages are recorded, memory is not given back, and many segments would fill it.
    if count <= options.rival_segments:
        with StorageRecorder() as recorder:
            loss = _forward(model, memory, ids)
        record["kept_bytes"] = sum(storage.nbytes for storage in recorder.live())
        del loss
    return record


def _times(options: argparse.Namespace, token_ids: list[int]) -> dict[str, Any]:
    """Return the seconds a token of replay and, up to --rival-segments, of its rival."""
    count = len(token_ids) // options.segment_length
    model, memory, ids = _made(options, token_ids)
    arms: dict[str, Callable[[], contextlib.AbstractContextManager]] = {"": contextlib.nullcontext}
    if count <= options.rival_segments:
        arms["checkpointed_"] = lambda: _checkpointed(model)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(options.rounds + 1):
        for arm, context in arms.items():
            with context():
                started = _now(ids)
                _step(model, memory, ids)
                # The first round warms up; a long history is timed once, as warming up matters little there.
                if number or count > options.rival_segments:
                    seconds[arm].append(_now(ids) - started)
        if count > options.rival_segments:
            break
    tokens = ids.numel()
    record: dict[str, Any] = {
        f"{arm}seconds_per_token": statistics.median(found) / tokens for arm, found in seconds.items()
    }
    if len(arms) > 1:
        ratios = [a / b for a, b in zip(seconds[""], seconds["checkpointed_"], strict=True)]
        record["time_ratio"] = round(statistics.median(ratios), 4)
        record["time_ratio_quartiles"] = [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]]
    return record


def _now(ids: torch.Tensor) -> float:
    """Return the time in seconds, on a GPU after it has done all that it was given."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def _checkpointed(model: R3MemModel) -> Iterator[None]:
    """Run the ordinary network, each of its layers checkpointed, in one graph over all segments."""
    plain = stack.plain_output
    with (
        temporarily(stack, plain_output=lambda *call: checkpoint(plain, *call, use_reentrant=False)),
        temporarily(reading, checkpoint=lambda function, *arguments, use_reentrant: function(*arguments)),
        temporarily(model, r3mem_config=dataclasses.replace(model.r3mem_config, kept_segments="device")),
        stack_of(model).in_mode(Mode.PLAIN),
    ):
        yield


if __name__ == "__main__":
    raise SystemExit(main())
