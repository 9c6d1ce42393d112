"""Which implementation of an operation runs, and why.

Triton on CUDA and HIP, the reference elsewhere. The environment variable R3MEM_KERNELS, `reference` or `triton`,
forces one. A forced choice that cannot run raises; an automatic one falls back to the reference and says so once.
"""

import functools
import os
import warnings
from typing import NamedTuple

import torch

from .compat import interpreting, why_no_triton_on

VARIABLE = "R3MEM_KERNELS"
IMPLEMENTATIONS = ("reference", "triton")


class Choice(NamedTuple):
    """implementation: one of `IMPLEMENTATIONS`. why: in a few words."""

    implementation: str
    why: str


def choose(device: torch.device, dtypes: tuple[torch.dtype, ...] = (), variable: str = VARIABLE) -> Choice:
    """The implementation for tensors of `device` and `dtypes`. variable: that may force one.

    Raises ValueError if the variable names none, RuntimeError if the one that it names cannot run.
    """
    forced = os.environ.get(variable, "")
    if not forced:
        return _automatic(device, dtypes)
    if forced not in IMPLEMENTATIONS:
        raise ValueError(f"{variable} must be {' or '.join(IMPLEMENTATIONS)}, or unset; it is {forced!r}")
    if forced == "triton":
        reason = why_no_triton_on(device, dtypes)
        if reason is not None:
            raise RuntimeError(f"{variable}=triton cannot run on {device}: {reason}")
        if interpreting():
            return Choice("triton", f"{variable}=triton, interpreted")
    return Choice(forced, f"{variable}={forced}")


def _automatic(device, dtypes):
    if device.type == "cuda":
        reason = why_no_triton_on(device, dtypes)
        if reason is None:
            return Choice("triton", "a GPU")
        _say_once(f"the reference implementation runs on {device}, slowly: {reason}")
        return Choice("reference", reason)
    return Choice("reference", f"device type {device.type}")


@functools.cache
def _say_once(message):
    warnings.warn(message, RuntimeWarning, stacklevel=5)
