"""Gives the second evaluation of a branch the random state and the autocast settings of the first one."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Surroundings:
    """Remembers the autocast settings around a branch, and the random state before it if the branch draws numbers.

    >>> with Surroundings(device).recorded() as surroundings: ...   # first evaluation
    >>> with surroundings.restored(): ...                           # second evaluation
    """

    __slots__ = ("_autocast", "_device", "_random")

    def __init__(self, device: torch.device) -> None:
        """Note the autocast settings.

        Args:
            device: Where the branch is evaluated.
        """
        self._device = device
        # Settings of both device types, as a model on a GPU may still run an operation on the CPU.
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {device.type, "cpu"}
        }
        self._random: tuple[torch.Tensor, ...] | None = None

    @contextlib.contextmanager
    def recorded(self) -> Iterator["Surroundings"]:
        """Note the random state before the block if the block draws random numbers.

        Yields:
            This object.
        """
        before = _random_state(self._device)
        yield self
        # Most branches draw nothing, and 5 kB a layer would be most of the memory that a short input takes.
        if not _same(before, _random_state(self._device)):
            self._random = before

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put the recorded settings in force inside the block; afterwards they are what they were before it."""
        with contextlib.ExitStack() as stack:
            for kind, (enabled, dtype) in self._autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            if self._random is not None:
                stack.callback(_set_random_state, self._device, _random_state(self._device))
                _set_random_state(self._device, self._random)
            yield


def _random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the random state of the CPU and, if it is another device that can be asked, that of the device."""
    cpu = torch.get_rng_state()
    # While a CUDA graph is captured, nobody can read its generator. A branch that draws there fails its checksum.
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return (cpu,)
    return cpu, torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device: torch.device, state: tuple[torch.Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.get_device_module(device).set_rng_state(state[1], device)


def _same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
