"""What a run is told of its machine: how many steps at most, and that its cores are busy."""

import os
from pathlib import Path

import pytest
import torch

from r3mem_fast.training import machine


def test_steps_at_most(monkeypatch):
    monkeypatch.delenv("R3MEM_MAX_STEPS", raising=False)
    assert machine.steps_at_most(7) == 7
    for value, steps in (("", 7), ("3", 3), ("9", 7)):
        monkeypatch.setenv("R3MEM_MAX_STEPS", value)
        assert machine.steps_at_most(7) == steps
    for value in ("0", "-1", "many"):
        monkeypatch.setenv("R3MEM_MAX_STEPS", value)
        with pytest.raises(ValueError, match="R3MEM_MAX_STEPS must be a positive number"):
            machine.steps_at_most(7)


@pytest.mark.parametrize(
    ("threads", "busy", "use"),
    [(1, 3.0, None), (4, 0.3, None), (4, 0.9, 3), (4, 1.0, 3), (4, 4.0, 1), (2, 1.0, None), (4, None, None)],
)
def test_busy_cores(monkeypatch, threads, busy, use):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(machine, "_cores", lambda: set(range(4)))
    monkeypatch.setattr(machine, "_busy_cores", lambda cores: busy)
    note = machine.busy_note()
    assert (note is None) == (use is None)
    assert use is None or (f"--threads {use}," in note and f"{busy:.1f} of 4 cores" in note)


def test_what_others_do_is_read_from_the_system(monkeypatch):
    """Two of the cores that may be used, of which one was busy half of the time; a third one does not count."""
    lines = ("cpu 9 9 9 9 9 9", "cpu0 {} 0 0 {} 0 0 0 0", "cpu1 0 0 0 {} 0 0 0 0", "cpu2 {} 0 0 0 0 0 0 0", "intr 1 2")
    texts = iter("\n".join(lines).format(*ticks) for ticks in ((5, 5, 9, 9), (55, 55, 109, 109)))
    monkeypatch.setattr(machine, "_SECONDS", 0)
    monkeypatch.setattr(machine.Path, "read_text", lambda self: next(texts))
    assert machine._busy_cores({0, 1}) == 0.5
    monkeypatch.undo()
    monkeypatch.setattr(machine, "Path", lambda name: Path("/no/such/file"))
    assert machine._busy_cores({0, 1}) is None
    assert machine._cores() <= set(range(os.cpu_count()))
