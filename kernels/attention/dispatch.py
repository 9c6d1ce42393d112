"""Which implementation of memory-token attention runs, and why.

On the CPU the vendor's attention where it can take the segment (`vendor.py`), the reference elsewhere; measured, the
first is several times as fast (`bench/results/attention_cpu.jsonl`, table in README.md). On a GPU Triton, for
everything: no measurement there has shown yet where the vendor's is faster. float64 takes no Triton. The environment
variable R3MEM_ATTENTION, `reference`, `triton` or `vendor`, forces one, and where it is unset R3MEM_KERNELS does; a
forced one that cannot run raises.
"""

import os

import torch

from ..common import dispatch
from ..common.dispatch import Choice
from . import vendor

VARIABLE = "R3MEM_ATTENTION"
IMPLEMENTATIONS = (*dispatch.IMPLEMENTATIONS, "vendor")


def choose(query, key, memory_key, segment_starts, cu_seqlens, sinks, *, window, softcap, query_offset) -> Choice:
    """The implementation for these tensors (None where there are none).

    Raises ValueError for a variable that names none, RuntimeError if the one that it names cannot run.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced and forced not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE} must be {', '.join(IMPLEMENTATIONS)}, or unset; it is {forced!r}")
    if forced in dispatch.IMPLEMENTATIONS:
        return _without_vendor(query, forced)
    if not forced and (query.device.type != "cpu" or os.environ.get(dispatch.VARIABLE)):
        return _without_vendor(query, forced)
    reason = vendor.why_not(
        query,
        key,
        memory_key,
        segment_starts,
        cu_seqlens,
        sinks,
        window=window,
        softcap=softcap,
        query_offset=query_offset,
    )
    if reason is None:
        return Choice("vendor", f"{VARIABLE}=vendor" if forced else "the fastest on a CPU")
    if forced:
        raise RuntimeError(f"{VARIABLE}=vendor cannot run: {reason}")
    return Choice("reference", reason)


def choose_for_decoding(query) -> Choice:
    """The implementation of `memory_decode`, of which no vendor has one."""
    forced = os.environ.get(VARIABLE, "")
    if forced == "vendor":
        return Choice("reference", "no vendor's kernel decodes")
    return _without_vendor(query, forced)


def _without_vendor(query, forced):
    """The reference or Triton: whichever is forced, or by the device."""
    if query.dtype == torch.float64 and not forced and not os.environ.get(dispatch.VARIABLE):
        return Choice("reference", "float64")
    return dispatch.choose(query.device, (query.dtype,), VARIABLE if forced else dispatch.VARIABLE)
