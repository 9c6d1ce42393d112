"""Looks at the machine before a training run starts: are its cores busy, and are steps to be cut short?"""

import os
import time
import warnings
from pathlib import Path

import torch

# Seconds for which other programs are watched.
_SECONDS = 0.25
# Fewer busy cores than this are not worth a word.
_REALLY_BUSY = 0.5


def steps_at_most(steps: int) -> int:
    """Limit a number of steps by the environment variable R3MEM_MAX_STEPS, which serves to try commands out.

    Args:
        steps: Number of steps that was asked for.

    Returns:
        The smaller of the two numbers; `steps` if the variable is not set.

    Raises:
        ValueError: The variable is set and is no positive number.
    """
    text = os.environ.get("R3MEM_MAX_STEPS", "")
    if not text:
        return steps
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"the environment variable R3MEM_MAX_STEPS must be a positive number, got {text!r}")
    return min(steps, int(text))


def busy_note() -> str | None:
    """Say why training will be slow on this machine as it is now, and what to do.

    Threads of one operation wait for each other: with less than a free core for each, small operations take many
    times as long. This looks for a quarter of a second at what other programs do, on systems that have /proc/stat.

    Returns:
        A note for the user; None if nothing suggests that training will be slow.
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


def warn_if_busy(device: torch.device) -> None:
    """Warn with `busy_note`, if there is one, before a run that computes on the CPU.

    Args:
        device: Where the run computes.
    """
    if device.type == "cpu" and (note := busy_note()):
        warnings.warn(note, stacklevel=3)


def _cores() -> set[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _busy_cores(cores: set[int]) -> float | None:
    """Return how many of these cores are busy while this process waits; None where that cannot be told."""
    before = _busy_and_all(cores)
    time.sleep(_SECONDS)
    after = _busy_and_all(cores)
    if before is None or after is None or after[1] <= before[1]:
        return None
    return len(cores) * (after[0] - before[0]) / (after[1] - before[1])


def _busy_and_all(cores: set[int]) -> tuple[int, int] | None:
    """Return the ticks that these cores were busy, and all ticks, since the system was started; None if unknown."""
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
