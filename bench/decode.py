"""Decoding behind a memory, against the plain model's `generate` with a cache of equal length: ratios of paired runs.

    python -m bench.decode --json

Prompts of T tokens are continued, one token at a time, by

    plain_dynamic   the model as transformers loads it, behind N + T tokens that it has read, with its growing cache
    plain_room      the same with a cache that grows where it is, as that of a memory
    plain_static    the same with a cache that has room for all
    memory_dynamic  the same model behind a matched memory of N slots, through `R3MemModel.generate`
    memory_static   the same with a cache that has room for all
    hooks           the same memory read by the reversible layers' hooks, as memories are that learned
    adapters        a model with LoRA on all linear modules, behind a memory of as many tokens that learned
    merged          the same with its adapters merged into the weights

all greedily, and for as many tokens. `first_ms` is the time to the first token (a prompt of T tokens, behind N that
are there already), `token_ms` the median and `p95_ms` the 95th percentile of the time between two tokens; `operations`
are the operations that PyTorch dispatches for a token and layer, without views (none is counted with `--compile`).
`over_rival` is the ratio of the medians of `token_ms` in a round, the median over rounds, with the lowest and the
highest.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, StaticCache

from r3mem_fast import R3MemConfig, generation
from r3mem_fast.devices import as_dtype
from r3mem_fast.integrations.compat import cache_argument
from r3mem_fast.memory.room import roomy_cache

from . import models
from .records import add_output_option, add_record

_ARMS = (
    "plain_dynamic",
    "plain_room",
    "plain_static",
    "memory_dynamic",
    "memory_static",
    "hooks",
    "adapters",
    "merged",
)
_RIVALS = {
    "plain_room": "plain_dynamic", "memory_dynamic": "plain_room", "memory_static": "plain_static",
    "hooks": "plain_room", "merged": "adapters",
}  # fmt: skip
_GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Operations of these names move no data.
_VIEWS = (
    "view", "reshape", "expand", "slice", "select", "transpose", "permute", "unsqueeze", "squeeze", "split", "alias",
    "detach", "t.", "as_strided", "unbind",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--text", help="a UTF-8 text (Python's help topics)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="prompts at one time (%(default)s)")
    parser.add_argument("--slots", type=int, default=256, help="of a memory (%(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="that are written (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of all arms, in turn (%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=_ARMS, default=list(_ARMS), help="(all)")
    parser.add_argument("--compile", action="store_true", help="static caches' steps, as transformers does (on a GPU)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    if options.compile and options.device == "cpu":
        parser.error("transformers compiles no step on the CPU: --compile needs --device cuda")
    records: list[dict] = []
    for rows in options.rows:
        for record in _compare(options, rows):
            add_record(record, records, options)
    return 0


class Clock:
    """Notes when `generate` hands on its prompt, and each token."""

    def __init__(self, device: str):
        self._device, self.times = device, [time.perf_counter()]

    def put(self, value: Any) -> None:
        """Note the time: called with the prompt, and with each token."""
        if self._device != "cpu":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[2] - self.times[0]

    @property
    def between(self) -> list[float]:
        """Seconds from each token to the next."""
        return [after - before for before, after in zip(self.times[2:], self.times[3:], strict=False)]


class Operations(TorchDispatchMode):
    """Counts operations that move data; the device's kernels, where nothing compiles them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.__name__.startswith(_VIEWS)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _compare(options: argparse.Namespace, rows: int) -> Iterator[dict]:
    runs = _arms(options, rows)
    layers = runs.pop("layers")
    for run in runs.values():  # to warm up, and to compile
        run(Clock(options.device), 4)
    clocks: dict[str, list[Clock]] = {arm: [] for arm in runs}
    for _ in range(options.rounds):
        for arm, run in runs.items():
            clock = Clock(options.device)
            run(clock, options.tokens)
            clocks[arm].append(clock)
    head = {
        "model": options.model, "device": options.device, "dtype": options.dtype,
        "rows": rows, "slots": options.slots, "prompt": options.prompt, "tokens": options.tokens,
        "threads": torch.get_num_threads(), "compiled": options.compile, "rounds": options.rounds,
    }  # fmt: skip
    for arm, found in clocks.items():
        between = sorted(seconds for clock in found for seconds in clock.between)
        record = {
            **head, "arm": arm, "first_ms": milliseconds(statistics.median(clock.first for clock in found)),
            "token_ms": milliseconds(statistics.median(between)),
            "p95_ms": milliseconds(between[int(0.95 * (len(between) - 1))]),
            # A compiled step is one graph, in which there is nothing to count.
            "operations": None if options.compile else round(_operations(runs[arm]) / layers, 2),
        }  # fmt: skip
        if _RIVALS.get(arm) in clocks:
            pairs = zip(found, clocks[_RIVALS[arm]], strict=True)
            ratios = sorted(statistics.median(a.between) / statistics.median(b.between) for a, b in pairs)
            record |= {
                "over": _RIVALS[arm], "over_rival": round(statistics.median(ratios), 4),
                "lowest": round(ratios[0], 4), "highest": round(ratios[-1], 4),
            }  # fmt: skip
        yield record


def _operations(run: Callable) -> float:
    """Operations of a token, by the difference of two lengths."""
    counts = []
    for tokens in (2, 6):
        with Operations() as counted:
            run(Clock("cpu"), tokens)
        counts.append(counted.count)
    return (counts[1] - counts[0]) / 4


def milliseconds(seconds: float) -> float:
    """Round to microseconds."""
    return round(seconds * 1e3, 3)


def _arms(options: argparse.Namespace, rows: int) -> dict[str, Any]:
    """What writes, by arm: functions of a clock and a number of tokens. And `layers`, their number."""
    slots, prompt = options.slots, options.prompt
    settings: dict[str, Any] = {
        "dtype": as_dtype(options.dtype), "device": options.device, "batch": rows, "text": options.text,
        "tokens": 4 * slots + 256 + prompt,
    }  # fmt: skip
    plain, history = models.load(options.model, **settings)
    plain.eval()
    config = R3MemConfig(
        memory_writer="matched", adapter_rows="memory", num_memory_tokens=min(64, slots), memory_budget=slots
    )
    model, _ = models.network(options.model, config, **settings)
    memory = model.compress(history[:, :-prompt], finish=True)
    ids = history[:, -prompt:]
    tail = memory.recent[0].numel() + memory.unfinished[0].numel()
    long = history[:, -(slots + tail + prompt) :]

    def plainly(kind: str) -> Callable:
        def run(clock: Clock, tokens: int) -> None:
            cache: Any = DynamicCache()
            if kind == "room":
                cache = roomy_cache(len(model.layers))
            elif kind == "static":
                cache = StaticCache(plain.config, max_cache_len=long.shape[1] + tokens)
            plain(long[:, :slots], **cache_argument(plain, cache), logits_to_keep=1)
            if options.device != "cpu":
                torch.cuda.synchronize()
            clock.times[0] = time.perf_counter()
            plain.generate(
                long, max_new_tokens=tokens, streamer=clock, disable_compile=not options.compile, **_GREEDY,
                **cache_argument(plain, cache),
            )  # fmt: skip

        return run

    def behind(kind: str | None, *, hooks: bool = False) -> Callable:
        def run(clock: Clock, tokens: int) -> None:
            way: Any = (
                mock.patch.object(generation, "is_prefix", lambda *_: False) if hooks else contextlib.nullcontext()
            )
            with way:
                model.generate(
                    ids, memory=memory, max_new_tokens=tokens, cache_implementation=kind, streamer=clock,
                    disable_compile=not options.compile, **_GREEDY,
                )  # fmt: skip

        return run

    runs: dict[str, Any] = {
        "plain_dynamic": plainly("dynamic"), "plain_room": plainly("room"), "plain_static": plainly("static"),
        "memory_dynamic": behind(None), "memory_static": behind("static"), "hooks": behind(None, hooks=True),
    }  # fmt: skip
    if {"adapters", "merged"} & set(options.arms):
        runs |= _adapted(options, settings, history[:, :-prompt], ids)
    return {arm: runs[arm] for arm in options.arms} | {"layers": len(model.layers)}


def _adapted(
    options: argparse.Namespace, settings: dict[str, Any], history: torch.Tensor, ids: torch.Tensor
) -> dict[str, Callable]:
    """What writes with adapters, which take as long when they have learned nothing yet."""
    config = R3MemConfig(
        num_memory_tokens=options.slots // 4, max_memory_segments=4, segment_length=256, segment_overlap=32
    )
    model, _ = models.network(options.model, config, **settings)
    memory = model.compress(history, finish=True)

    def adapted(merged: bool) -> Callable:
        def run(clock: Clock, tokens: int) -> None:
            with model.merged_adapters() if merged else contextlib.nullcontext():
                clock.times[0] = time.perf_counter()
                model.generate(ids, memory=memory, max_new_tokens=tokens, streamer=clock, **_GREEDY)

        return run

    return {"adapters": adapted(False), "merged": adapted(True)}


if __name__ == "__main__":
    raise SystemExit(main())
