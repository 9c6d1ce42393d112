"""What a training run should know of its machine before it starts."""

import os

import torch


def steps_at_most(steps: int) -> int:
    """`steps`, or fewer if the environment variable R3MEM_MAX_STEPS says so, which rehearses a run.

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
    times as long.
    """
    if not hasattr(os, "getloadavg"):  # Windows
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    if threads < 2 or cores - load > threads - 0.5:
        return None
    return (
        f"other programs keep {load:.1f} of {cores} cores busy, and torch computes in {threads} threads, which wait "
        "for each other; steps may take many times as long. Use one thread (--threads 1, torch.set_num_threads(1)), "
        "or let the others end first"
    )
