"""Which implementation of memory-token attention runs, and why.

On a CPU the vendor's attention runs where it can take the segment (`vendor.py`), or where all queries see the same
keys (`folded.py`), and the reference elsewhere. The vendor's is several times as fast, as measured
(`bench/results/attention_cpu.jsonl`, table in README.md). On a GPU Triton runs everything: no measurement there has
shown yet where the vendor's is faster; float64 is left to the reference, because Triton's kernels compute in float32.

The environment variable R3MEM_ATTENTION (`reference`, `triton` or `vendor`) forces an implementation; where it is
unset, R3MEM_KERNELS does. A forced implementation that cannot run raises.

R3MEM_ATTENTION_FORWARD=specialised has Triton run the forward pass by `triton/forward_specialised.py`, which has not
been measured on a GPU yet. It raises where the kernel cannot run at all; a call that the kernel does not take goes to
the one that takes everything.
"""

import os

import torch

from ..common import dispatch
from ..common.dispatch import Choice
from . import folded, vendor
from .arguments import AttentionInputs, AttentionSettings

VARIABLE = "R3MEM_ATTENTION"
FORWARD_VARIABLE = "R3MEM_ATTENTION_FORWARD"
IMPLEMENTATIONS = (*dispatch.IMPLEMENTATIONS, "vendor")


def choose(inputs: AttentionInputs, settings: AttentionSettings) -> Choice:
    """Choose the implementation of `memory_attention` and of its backward pass.

    Args:
        inputs: Tensors of the attention.
        settings: Its settings; `query_offset` must be an int.

    Returns:
        The implementation and the reason for it.

    Raises:
        ValueError: If the environment variable names no implementation.
        RuntimeError: If the implementation that it names cannot run.
    """
    forced = _forced()
    if _is_without_vendor(inputs.query, forced):
        return choose_without_vendor(inputs.query, forced)
    reason = (folded if inputs.key is None else vendor).why_not(inputs, settings)
    if reason is None:
        return Choice("vendor", f"{VARIABLE}=vendor" if forced else "the fastest on a CPU")
    if forced:
        raise RuntimeError(f"{VARIABLE}=vendor cannot run: {reason}")
    return Choice("reference", reason)


def choose_forward(inputs: AttentionInputs, settings: AttentionSettings) -> Choice:
    """Choose the implementation of the forward pass of `memory_attention`: that of `choose`, or `specialised`.

    Args:
        inputs: Tensors of the attention.
        settings: Its settings; `query_offset` must be an int.

    Returns:
        The implementation and the reason for it.

    Raises:
        ValueError: If an environment variable names no implementation.
        RuntimeError: If the implementation that one names cannot run.
    """
    chosen, forced = choose(inputs, settings), os.environ.get(FORWARD_VARIABLE, "")
    if not forced:
        return chosen
    if forced != "specialised":
        raise ValueError(f"{FORWARD_VARIABLE} must be specialised, or unset; it is {forced!r}")
    if chosen.implementation != "triton":
        why = f"not Triton is chosen, but {chosen.implementation} ({chosen.why})"
        raise RuntimeError(f"{FORWARD_VARIABLE}=specialised cannot run: {why}")
    from .triton import forward_specialised  # a machine without Triton must not import it

    if reason := forward_specialised.why_not_on(inputs.query):
        raise RuntimeError(f"{FORWARD_VARIABLE}=specialised cannot run: {reason}")
    if reason := forward_specialised.why_not(inputs, settings):
        return Choice("triton", f"{chosen.why}; {FORWARD_VARIABLE}=specialised: {reason}")
    return Choice("specialised", f"{FORWARD_VARIABLE}=specialised")


def choose_for_decoding(inputs: AttentionInputs, settings: AttentionSettings) -> Choice:
    """Choose the implementation of `memory_decode`: the vendor's decodes a single token on a CPU.

    Args:
        inputs: Tensors of the attention.
        settings: Its settings; `query_offset` does not matter.

    Returns:
        The implementation and the reason for it.

    Raises:
        ValueError: If the environment variable names no implementation.
        RuntimeError: If the implementation that it names cannot run.
    """
    forced = _forced()
    if _is_without_vendor(inputs.query, forced):
        return choose_without_vendor(inputs.query, forced)
    reason = folded.why_not(inputs, settings)
    if reason is None:
        return Choice("vendor", f"{VARIABLE}=vendor" if forced else "the fastest on a CPU")
    if inputs.query.device.type != "cpu":  # where no vendor's kernel decodes, whatever is forced
        return choose_without_vendor(inputs.query, "")
    return Choice("reference", reason)


def _forced() -> str:
    """Return the implementation that the environment names; an empty string for none."""
    forced = os.environ.get(VARIABLE, "")
    if forced and forced not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE} must be {', '.join(IMPLEMENTATIONS)}, or unset; it is {forced!r}")
    return forced


def _is_without_vendor(query: torch.Tensor, forced: str) -> bool:
    """Tell whether the vendor's attention is out of the question."""
    if forced:
        return forced in dispatch.IMPLEMENTATIONS
    return query.device.type != "cpu" or bool(os.environ.get(dispatch.VARIABLE))


def choose_without_vendor(query: torch.Tensor, forced: str = "") -> Choice:
    """Choose between the reference and Triton: the one that is forced, else by device, dtype and size of a head.

    Args:
        query: The queries.
        forced: The one that is forced; an empty string for none.
    """
    if query.dtype == torch.float64 and not forced and not os.environ.get(dispatch.VARIABLE):
        return Choice("reference", "float64")
    variable = VARIABLE if forced else dispatch.VARIABLE
    return dispatch.choose(query.device, (query.dtype,), variable, head_dim=query.shape[-1])
