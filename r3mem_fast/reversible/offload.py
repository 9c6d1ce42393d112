"""Lets tensors wait in host memory until the backward pass needs them."""

import torch


class HostCopy:
    """Holds a tensor's values in host memory, which is pinned if they come from a GPU.

    Copies are asynchronous, in the order of the device's current stream.

    >>> waiting = HostCopy(tensor); del tensor   # the device's memory is free
    >>> tensor = waiting.back()
    """

    __slots__ = ("_device", "_values")

    def __init__(self, tensor: torch.Tensor) -> None:
        """Copy a tensor to host memory; a tensor that is there already is kept as it is.

        Args:
            tensor: The tensor, on any device.
        """
        self._device = tensor.device
        if tensor.device.type == "cpu":
            self._values = tensor
        else:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self._values.nbytes

    def back(self) -> torch.Tensor:
        """Return the tensor, on the device that it came from."""
        return self._values.to(self._device, non_blocking=True)


def back(value: "torch.Tensor | HostCopy | None") -> torch.Tensor | None:
    """Return a tensor itself, or the one that a `HostCopy` holds.

    Args:
        value: A tensor or a `HostCopy`; None for no tensor.

    Returns:
        The tensor, on the device where it was first; None for None.
    """
    return value.back() if isinstance(value, HostCopy) else value
