"""Many requests, each behind the memory of a long history: throughput, and the time to a first token.

    python -m bench.serving --json

Requests come at once, each with a history of its own, a prompt and greedy tokens to write. `Scheduler` continues so
many rows at a time (`rows`), and as many as it can behind one history that all share (`memories` 1); "generate" is one
request after the other, by `R3MemModel.generate`. `over_generate` is the throughput over that in the same round, the
median over rounds, with the lowest and the highest. `first_ms` is how long a request waits for its first token.

The time to the first token behind a single history is that of

    memory    the memory's file is loaded, put to its positions, and the prompt is read behind it
    cache     all keys and values of the history are loaded from a file, and the prompt is read behind them
    prefill   history and prompt are read

by `generate`, one token each, with all files in the operating system's cache.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicCache

from r3mem_fast import Memory, R3MemConfig, R3MemModel, load_model
from r3mem_fast.data.text import read_text, token_windows
from r3mem_fast.integrations.compat import cache_argument
from r3mem_fast.serving import Scheduler

from .decode import Clock, milliseconds
from .records import add_output_option, add_record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--text", help="a UTF-8 text (Python's help topics, 113,000 tokens)")
    parser.add_argument("--requests", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--history", type=int, default=4096, help="tokens of each history (%(default)s)")
    parser.add_argument("--slots", type=int, default=256, help="of a memory (%(default)s)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="that are written (%(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="at one time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all arms, in turn (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    records: list[dict] = []
    base, tokenizer = load_model(options.model, dtype=options.dtype)
    config = R3MemConfig(
        memory_writer="matched", adapter_rows="memory", num_memory_tokens=64, memory_budget=options.slots
    )
    model = R3MemModel(base.to(options.device), config).eval()
    tokens = options.history + options.prompt
    ids = token_windows(tokenizer, read_text(options.text), tokens=tokens, count=options.requests)
    memory = model.compress(ids[:, : options.history], finish=True)
    for record in (*_throughput(options, model, memory, ids), *_first_token(options, model, memory[0], ids[:1])):
        add_record(record, records, options)
    return 0


def _throughput(options: argparse.Namespace, model: R3MemModel, memory: Memory, ids: torch.Tensor) -> Iterator[dict]:
    memories, prompts = memory.split(), ids[:, options.history :]
    model.plain_model.generation_config.eos_token_id = None  # so that all requests write as many tokens
    model.end_token_id = -1

    def scheduled(rows: int, shared: bool, requests: int) -> list[float]:
        """Seconds until each request's first token."""
        started, firsts = time.perf_counter(), {}
        with Scheduler(model, max_rows=rows) as scheduler:
            for index, prompt in enumerate(prompts[:requests]):
                scheduler.submit(prompt, memories[0 if shared else index], max_new_tokens=options.tokens)
            while len(scheduler):
                for request, _ in scheduler.step():
                    firsts.setdefault(request, time.perf_counter() - started)
        return list(firsts.values())

    def generated(requests: int) -> list[float]:
        started, firsts = time.perf_counter(), []
        for prompt, of_prompt in zip(prompts[:requests, None], memories, strict=False):
            clock = Clock(options.device)
            model.generate(
                prompt,
                memory=of_prompt,
                max_new_tokens=options.tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
            firsts.append(clock.times[2] - started)
        return firsts

    arms: dict[str, Callable[[int], list[float]]] = {"generate": generated}
    arms |= {str(rows): functools.partial(scheduled, rows, False) for rows in options.rows}
    arms["shared"] = functools.partial(scheduled, max(options.rows), True)
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    waits: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(options.rounds + 1):
        for arm, run in arms.items():
            requests = options.requests if number else 2  # the first round warms up
            started = time.perf_counter()
            firsts = run(requests)
            if number:
                rates[arm].append(requests * options.tokens / (time.perf_counter() - started))
                waits[arm] += firsts
    for arm in arms:
        ratios = sorted(mine / its for mine, its in zip(rates[arm], rates["generate"], strict=True))
        yield {
            **_settings(options), "rows": str(max(options.rows)) if arm == "shared" else arm,
            "memories": 1 if arm == "shared" else options.requests,
            "tokens_per_second": round(statistics.median(rates[arm]), 2),
            "first_ms": milliseconds(statistics.median(waits[arm])),
            "first_p95_ms": milliseconds(sorted(waits[arm])[int(0.95 * (len(waits[arm]) - 1))]),
            "over_generate": round(statistics.median(ratios), 3), "lowest": round(ratios[0], 3),
            "highest": round(ratios[-1], 3),
        }  # fmt: skip


@torch.no_grad()
def _first_token(options: argparse.Namespace, model: R3MemModel, memory: Memory, ids: torch.Tensor) -> Iterator[dict]:
    ids = ids.to(options.device)
    history, prompt = ids[:, : options.history], ids[:, options.history :]
    plain = load_model(options.model, dtype=options.dtype)[0].to(options.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        of_memory, of_cache = Path(folder, "memory.safetensors"), Path(folder, "cache.safetensors")
        memory.save(of_memory)
        cache = DynamicCache()
        plain(history, logits_to_keep=1, **cache_argument(plain, cache))
        save_file(
            {f"{name}.{index}": getattr(layer, name).contiguous() for index, layer in enumerate(cache.layers)
             for name in ("keys", "values")}, of_cache,
        )  # fmt: skip

        def from_memory() -> None:
            loaded = Memory.load(of_memory, model, device=options.device)
            model.generate(prompt, memory=loaded, max_new_tokens=1, do_sample=False, pad_token_id=0)

        def write_one(tokens: torch.Tensor, cache: DynamicCache) -> None:
            given = cache_argument(plain, cache)
            mask = torch.ones_like(tokens)
            plain.generate(tokens, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0, **given)

        def from_cache() -> None:
            found, whole = load_file(of_cache, device=options.device), DynamicCache()
            for index in range(len(model.layers)):
                whole.update(found[f"keys.{index}"], found[f"values.{index}"], index)
            write_one(ids, whole)  # of which it reads what the cache has not

        def prefill() -> None:
            write_one(ids, DynamicCache())

        def alone() -> None:  # without the history: what no way to keep one can go below
            write_one(prompt, DynamicCache())

        arms: dict[str, Callable[[], None]] = {"memory": from_memory, "cache": from_cache}
        arms |= {"prefill": prefill, "prompt": alone}
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(options.rounds + 1):
            for arm, run in arms.items():
                started = time.perf_counter()
                run()
                if options.device != "cpu":
                    torch.cuda.synchronize()
                if number:
                    seconds[arm].append(time.perf_counter() - started)
        sizes = {"memory": of_memory.stat().st_size, "cache": of_cache.stat().st_size}
    for arm, found in seconds.items():
        ratios = [mine / its for mine, its in zip(seconds["memory"], found, strict=True)]
        yield {
            **_settings(options), "first_token_from": arm, "ms": milliseconds(statistics.median(found)),
            "bytes": sizes.get(arm), "memory_over_it": round(statistics.median(ratios), 4),
        }  # fmt: skip


def _settings(options: argparse.Namespace) -> dict:
    names = ("model", "device", "dtype", "requests", "history", "slots", "prompt", "tokens", "rounds")
    return {**{name: getattr(options, name) for name in names}, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    raise SystemExit(main())
