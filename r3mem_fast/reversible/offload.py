"""Tensors that wait in host memory until the backward pass needs them."""

import torch


class HostCopy:
    """A tensor's values in host memory, pinned if they come from a GPU; copied in the order of its current stream.

    >>> waiting = HostCopy(tensor); del tensor   # the device's memory is free
    >>> tensor = waiting.back()
    """

    __slots__ = ("_device", "_values")

    def __init__(self, tensor):
        self._device = tensor.device
        if tensor.device.type == "cpu":
            self._values = tensor
        else:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)

    def back(self):
        """The tensor, on the device that it came from."""
        return self._values.to(self._device, non_blocking=True)


def back(value):
    """A tensor, or the one that a `HostCopy` holds."""
    return value.back() if isinstance(value, HostCopy) else value
