"""The place of the coupling's forward kernel under the roofline: bytes that it must move, over what a copy moves.

python examples/kernel_roofline.py --mebibytes 64     # Triton's kernel on a GPU, the reference on a CPU
"""

import argparse
import statistics
import time

import torch

from r3mem_fast.kernels import coupling


def main(arguments=None):
    """Time a copy and the kernel; returns the kernel's share of the copy's bandwidth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=64, help="of a stream (%(default)s)")
    parser.add_argument("--bits", type=int, default=4, help="side bits (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="(%(default)s)")
    options = parser.parse_args(arguments)

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    count = options.mebibytes * 2**18  # int32
    hidden, branch = (torch.randn(1, count, device=device).to(torch.bfloat16) for _ in range(2))
    flags = coupling.new_flags(device)
    position, velocity, _ = coupling.momentum_enter(hidden, fraction_bits=14, flags=flags)
    target = torch.empty_like(position)
    settings = {"bits": options.bits, "fraction_bits": 14, "flags": flags, "dtype": torch.bfloat16}

    # position, velocity and branch are read; position, velocity, hidden state and side bits are written.
    least = count * (4 + 4 + 2 + 4 + 4 + 2 + options.bits / 8)
    copied = 2 * position.nbytes / _seconds(lambda: target.copy_(position), device, options.rounds)
    moved = least / _seconds(lambda: coupling.momentum_forward(position, velocity, branch, **settings), device,
                             options.rounds)  # fmt: skip
    print(f"{device}: copy {copied / 1e9:.1f} GB/s; momentum_forward {moved / 1e9:.1f} GB/s of the least bytes")
    print(f"share of the copy's bandwidth: {moved / copied:.2f}")
    return moved / copied


def _seconds(function, device, rounds):
    """Median seconds of a call, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
