"""Describes the machine and the versions that run here, without naming a path or a host."""

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "triton", "transformers", "peft", "r3mem_fast")


def environment() -> dict[str, Any]:
    """Return `machine()` and `torch_settings()` as one dictionary of plain values for JSON; None means unknown."""
    return {**machine(), **torch_settings()}


def machine() -> dict[str, Any]:
    """Return the part of `environment` that is known without importing torch, which takes a second or more.

    Returns:
        Platform, CPU, number of cores, memory in bytes, and the versions of Python and of the packages that matter;
        None means unknown.
    """
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def torch_settings() -> dict[str, Any]:
    """Return the part of `environment` that torch knows.

    Returns:
        torch's version, the CPU's instruction set that it uses, its number of threads, and the GPU's name or None.
    """
    import torch

    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _cpu() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1]
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
