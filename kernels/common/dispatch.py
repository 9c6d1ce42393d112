"""Which implementation of an operation runs, and why.

Triton runs on CUDA and HIP, the reference elsewhere. The environment variable R3MEM_KERNELS (`reference` or `triton`)
forces an implementation. A forced one that cannot run raises; an automatic choice falls back to the reference, and
warns of it once.
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
    """An implementation, and why it was chosen.

    Attributes:
        implementation: Its name, `reference` or `triton`; an operation may have more.
        why: The reason, in a few words.
    """

    implementation: str
    why: str


def choose(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = (), variable: str = VARIABLE, *, head_dim: int = 1
) -> Choice:
    """Choose the implementation for tensors of this device and these dtypes.

    Args:
        device: Device of the tensors.
        dtypes: Dtypes of the tensors.
        variable: Environment variable that may force an implementation.
        head_dim: Size of a head, where there are any.

    Returns:
        The implementation and the reason for it.

    Raises:
        ValueError: If the variable names no implementation.
        RuntimeError: If the implementation that it names cannot run.
    """
    forced = os.environ.get(variable, "")
    if not forced:
        return _automatic(device, dtypes, head_dim)
    if forced not in IMPLEMENTATIONS:
        raise ValueError(f"{variable} must be {' or '.join(IMPLEMENTATIONS)}, or unset; it is {forced!r}")
    if forced == "triton":
        reason = why_no_triton_on(device, dtypes, head_dim)
        if reason is not None:
            raise RuntimeError(f"{variable}=triton cannot run on {device}: {reason}")
        if interpreting():
            return Choice("triton", f"{variable}=triton, interpreted")
    return Choice(forced, f"{variable}={forced}")


def _automatic(device: torch.device, dtypes: tuple[torch.dtype, ...], head_dim: int) -> Choice:
    """Choose Triton on a GPU, if it can run there, else the reference."""
    if device.type == "cuda":
        reason = why_no_triton_on(device, dtypes, head_dim)
        if reason is None:
            return Choice("triton", "a GPU")
        _say_once(f"the reference implementation runs on {device}, slowly: {reason}")
        return Choice("reference", reason)
    return Choice("reference", f"device type {device.type}")


@functools.cache
def _say_once(message: str) -> None:
    """Warn, once for each message."""
    warnings.warn(message, RuntimeWarning, stacklevel=5)
