"""What a run is told of its machine: how many steps at most, and that its cores are busy."""

import os

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
    ("threads", "load", "busy"), [(1, 9.0, False), (4, 0.2, False), (4, 0.6, True), (4, 4.0, True), (2, 2.0, False)]
)
def test_busy_cores(monkeypatch, threads, load, busy):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    note = machine.busy_note()
    assert (note is not None) is busy
    assert not busy or ("--threads 1" in note and f"{load:.1f} of 4 cores" in note)
