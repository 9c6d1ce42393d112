"""The machine and the versions that run here. It names no path and no host."""

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

_PACKAGES = ("torch", "triton", "transformers", "peft", "r3mem_fast")


def environment() -> dict:
    """Machine and versions, as plain values for JSON; None stands for what is not known."""
    return {**machine(), **torch_settings()}


def machine() -> dict:
    """The part of `environment` that is known before torch is imported, which takes a second or more."""
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def torch_settings() -> dict:
    """The part of `environment` that torch knows."""
    import torch

    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _cpu():
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1]
    return platform.processor() or platform.machine()


def _memory_bytes():
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
