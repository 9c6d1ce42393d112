"""Whether a pass can be trusted: its flags, what they mean, and what happens when one is set."""

from typing import Any

import torch

from .inference import versioned_tensors


class IntegrityError(RuntimeError):
    """The streams cannot be trusted: reconstruction failed, a value left the range, or a value is not finite."""


class Integrity:
    """Acts on the flags of passes by a policy, and collects those that nobody has asked for yet.

    Flags are int32 `[3]`, nonzero where a value was not finite, left the range of the streams, or was reconstructed
    wrongly. To look at those of a GPU synchronises with it.

    Args:
        policy: "auto" raises at once on the CPU and collects elsewhere, "raise" raises at once, "nan" collects.
    """

    def __init__(self, policy: str):
        self.policy = policy
        self._pending: dict[torch.device, torch.Tensor] = {}

    def __deepcopy__(self, memo):
        return Integrity(self.policy)

    def report(self, flags: torch.Tensor, fraction_bits: int | None, where: str = ""):
        """Raise IntegrityError for flags that are set, if that is to happen at once; else collect them.

        Args:
            flags: The flags of a pass.
            fraction_bits: Binary places of its streams.
            where: Beginning of the message, such as the layer.
        """
        if self.policy == "raise" or (self.policy == "auto" and flags.device.type == "cpu"):
            raise_for(flags, fraction_bits, where)
        elif flags.device in self._pending:
            # In place, always: a CUDA graph goes on writing where it wrote when it was captured.
            self._pending[flags.device] |= flags
        else:
            with versioned_tensors():
                self._pending[flags.device] = flags.clone()

    def report_if_known(self, flags: torch.Tensor, fraction_bits: int | None, where: str = ""):
        """Report flags now, if that does not synchronise or if raising at once was asked for."""
        if (self.policy == "raise" or flags.device.type == "cpu") and flags.any():
            self.report(flags, fraction_bits, where)

    def raise_pending(self, fraction_bits: int | None):
        """Raise IntegrityError if any pass since the last call set a flag. Synchronises."""
        found = [flags.clone() for flags in self._pending.values()]
        for flags in self._pending.values():
            flags.zero_()
        for flags in found:
            raise_for(flags, fraction_bits)


def raise_for(flags: torch.Tensor, fraction_bits: int | None, where: str = ""):
    """Raise IntegrityError for the flags that are set, if any; see `Integrity.report`."""
    non_finite, out_of_range, checksum_mismatch = flags.tolist()
    if non_finite:
        raise IntegrityError(
            "a reversible layer computed a NaN or an infinity; look for non-finite weights or inputs, or an overflow "
            "in float16"
        )
    if out_of_range:
        reach = "" if fraction_bits is None else f" of ±{2 ** (31 - fraction_bits)}"
        raise IntegrityError(
            f"the residual stream left the range{reach} that fraction_bits="
            f"{fraction_bits} gives; pass MomentumCoupling(fraction_bits='auto'), or a smaller number"
        )
    if checksum_mismatch:
        raise IntegrityError(
            f"{where}the backward pass did not find again what the forward pass computed, so its gradients would be "
            "wrong. Likely causes: a branch that is not deterministic (atomics, a random source of its own), "
            "parameters or buffers changed through .data between the passes, global settings changed in between. "
            "check_inverse(model, input_ids=..., per_layer=True) names the first layer that differs."
        )


def poisoned(tensor: torch.Tensor | None, flags: torch.Tensor) -> Any:
    """The tensor, NaN throughout if any flag is set, and its gradient likewise; None for None. Never synchronises."""
    if tensor is None:
        return None
    return tensor * torch.where((flags != 0).any(), torch.nan, 1.0)
