"""What the second evaluation of a branch must find as the first one found it: random state and autocast."""

import contextlib

import torch


class Surroundings:
    """Autocast settings around a branch, and the random state before it if the branch drew from it.

    >>> with Surroundings(device).recorded() as surroundings: ...   # first evaluation
    >>> with surroundings.restored(): ...                           # second evaluation
    """

    __slots__ = ("_autocast", "_device", "_random")

    def __init__(self, device):
        self._device = device
        # Both device types: a model on a GPU may still run an operation on the CPU.
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {device.type, "cpu"}
        }
        self._random = None

    @contextlib.contextmanager
    def recorded(self):
        before = _random_state(self._device)
        yield self
        # Most branches draw nothing; keeping 5 kB a layer for them would be most of a short input's memory.
        if not _same(before, _random_state(self._device)):
            self._random = before

    @contextlib.contextmanager
    def restored(self):
        """The recorded settings; on leaving, autocast and random state are what they were on entering."""
        with contextlib.ExitStack() as stack:
            for kind, (enabled, dtype) in self._autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            if self._random is not None:
                stack.callback(_set_random_state, self._device, _random_state(self._device))
                _set_random_state(self._device, self._random)
            yield


def _random_state(device):
    cpu = torch.get_rng_state()
    # A CUDA graph under capture lets nobody read its generator. A branch that draws there is found by its checksum.
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return (cpu,)
    return cpu, torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device, state):
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.get_device_module(device).set_rng_state(state[1], device)


def _same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
