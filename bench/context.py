"""The longest context that trains within a memory limit, and its tokens per second. Needs a GPU.

    python -m bench.context --model llama-3.1-8b-shape --limits 24,48,80 --json

One record an arm and limit (GB, 10**9 bytes, of PyTorch's allocator, weights included; the driver's own context comes
on top):

    tokens             the longest sequence whose training step fitted, in steps of --granularity
    fails_at           the shortest that was tried and did not fit; the truth lies between these two
    tokens_per_second  of training steps at `tokens`, the median of three
"""

import argparse
import gc
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import training
from .models import SHAPES
from .records import add_output_option, add_record

DEFAULT_ARMS = ("checkpoint", "reversible-b4", "checkpoint-liger", "reversible-b4-liger")
_STEPS = 3


def longest(
    fits: Callable[[int], bool], *, guess: float, granularity: int, tolerance: float = 0.03
) -> tuple[int, int]:
    """Find the longest sequence that fits, by trials.

    Args:
        fits: Whether a sequence of so many tokens fits; called as rarely as possible, since it trains.
        guess: Tokens that probably just fit.
        granularity: Tokens of a step; only its multiples are tried.
        tolerance: How close the two results must come, as a share of the first; they may always differ by one step.

    Returns:
        `(the largest multiple of granularity found to fit, the smallest found not to)`. The first is 0 if not even one
        step fits.
    """
    length = max(granularity, _down(guess, granularity))
    # Guesses are good, so look closely around them first, then further and further away.
    stride = max(granularity, _down(length * tolerance, granularity))
    if fits(length):
        low, high = length, length + stride
        while fits(high):
            stride *= 2
            low, high = high, high + stride
    else:
        low, high = max(0, length - stride), length
        while low > 0 and not fits(low):
            stride *= 2
            low, high = max(0, low - stride), low
    while high - low > max(granularity, tolerance * low):
        middle = _down((low + high) / 2, granularity)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def _down(length: float, granularity: int) -> int:
    return math.floor(length / granularity) * granularity


def measure(options: argparse.Namespace, arm: str, limits: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Yield records of one arm at every limit in GB, smallest first."""
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    loaded = "plain" + (training.LIGER if arm.endswith(training.LIGER) else "")
    task = training.Task(model=options.model, tokens=options.max_tokens, device="cuda", loss="fused")
    trained = training.load_arm(task, loaded)
    every_token = trained.input_ids
    training.set_up(trained.model.get_base_model(), arm)

    def peak_of(tokens: int) -> int:
        trained.input_ids = every_token[:, :tokens]
        torch.cuda.reset_peak_memory_stats(device)
        trained.step()
        return torch.cuda.max_memory_allocated(device)

    def fits(tokens: int) -> bool:
        if tokens > every_token.shape[1]:
            raise ValueError(f"--max-tokens {options.max_tokens} is too small for {arm}")
        try:
            peak_of(tokens)
        except torch.OutOfMemoryError as error:
            trained.model.zero_grad()
            training.recover(error)
            return False
        return True

    peak_of(options.granularity)  # the first step makes what stays: optimizer states, workspaces
    short, long = 2 * options.granularity, 4 * options.granularity
    constant, slope = _line((short, peak_of(short)), (long, peak_of(long)))
    for limit in sorted(limits):
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total), device)
        guess = int((limit * 1e9 - constant) / slope)
        tokens, fails_at = longest(fits, guess=guess, granularity=options.granularity)
        record = {"arm": arm, "model": options.model, "limit_gb": limit, "tokens": tokens, "fails_at": fails_at}
        if tokens:
            trained.input_ids = every_token[:, :tokens]
            record["tokens_per_second"] = tokens / statistics.median(trained.timed_step() for _ in range(_STEPS))
        yield record
    torch.cuda.set_per_process_memory_fraction(1.0, device)


def _line(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Return constant and slope of the line through two points."""
    slope = (second[1] - first[1]) / (second[0] - first[0])
    return first[1] - slope * first[0], slope


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.context", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama-3.1-8b-shape", choices=SHAPES, help="random weights (%(default)s)")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(DEFAULT_ARMS))
    parser.add_argument("--limits", type=lambda text: [float(part) for part in text.split(",")], default=[24, 48, 80])
    parser.add_argument("--granularity", type=int, default=1024, help="tokens (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=1 << 19, help="never longer than this (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON line a record")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    if unknown := [arm for arm in options.arms if arm not in training.ARMS + training.LIGER_ARMS]:
        parser.error(f"unknown arm {unknown[0]!r}")
    if not torch.cuda.is_available():
        sys.exit(f"{parser.prog}: PyTorch sees no GPU here")
    records: list[dict] = []
    failed = False
    # Liger's arms come last, because its kernels are not taken out again.
    for arm in sorted(options.arms, key=lambda arm: arm.endswith(training.LIGER)):
        try:
            for record in measure(options, arm, options.limits):
                add_record(record, records, options)
        except training.Unavailable as reason:
            print(f"{arm}: {reason}", file=sys.stderr)
        except (torch.OutOfMemoryError, ValueError) as error:
            print(f"{arm}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
        torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())
        gc.collect()
        torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
