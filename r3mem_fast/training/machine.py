"""What a training run should know of its machine before it starts."""

import os
import time
import warnings
from pathlib import Path

import torch

_SECONDS = 0.25
# Cores that others use before anything is said.
_REALLY_BUSY = 0.5


def steps_at_most(steps: int) -> int:
    """`steps`, or fewer if the environment variable R3MEM_MAX_STEPS says so, to try commands out.

    Raises ValueError if the variable is set and is no positive number.
    """
    text = os.environ.get("R3MEM_MAX_STEPS", "")
    if not text:
        return steps
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"the environment variable R3MEM_MAX_STEPS must be a positive number, got {text!r}")
    return min(steps, int(text))


def busy_note() -> str | None:
    """Why training will be slow on this machine as it is now, and what to do; None if nothing speaks for it.

    Threads of one operation wait for each other: with less than a free core for each, small operations take many
    times as long. It looks for a quarter of a second at what other programs do, on systems that have /proc/stat.
    """
    threads, cores = torch.get_num_threads(), _cores()
    busy = _busy_cores(cores) if threads > 1 else None
    if busy is None or busy < _REALLY_BUSY or len(cores) - busy > threads - _REALLY_BUSY:
        return None
    free = max(1, int(len(cores) - busy + 1 - _REALLY_BUSY))
    return (
        f"other programs keep {busy:.1f} of {len(cores)} cores busy, and torch computes in {threads} threads, which "
        f"wait for each other; steps may take many times as long. Use fewer (--threads {free}, "
        f"torch.set_num_threads({free})), or let the others end first"
    )


def warn_if_busy(device: torch.device):
    """Warn of `busy_note` before a run that computes on the CPU."""
    if device.type == "cpu" and (note := busy_note()):
        warnings.warn(note, stacklevel=3)


def _cores():
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _busy_cores(cores):
    """How many of these cores are busy while this process waits; None where that cannot be told."""
    before = _busy_and_all(cores)
    time.sleep(_SECONDS)
    after = _busy_and_all(cores)
    if before is None or after is None or after[1] <= before[1]:
        return None
    return len(cores) * (after[0] - before[0]) / (after[1] - before[1])


def _busy_and_all(cores):
    """Ticks that these cores were busy, and all ticks, since the system was started."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    busy = total = 0
    for name, *ticks in (line.split() for line in lines):
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cores:
            user, nice, system, idle, waiting, *others = map(int, ticks[:8])
            total += user + nice + system + idle + waiting + sum(others)
            busy += user + nice + system + sum(others)
    return (busy, total) if total else None
