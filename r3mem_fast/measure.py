"""Measures the memory that a training step takes: bytes kept between forward and backward, and a process's peak."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


@dataclass(frozen=True)
class LiveStorage:
    """A tensor storage that a recorded block created and that is still alive.

    Attributes:
        nbytes: Its size now.
        device: Device whose memory it is in.
        shape: Shape of the first tensor seen on it.
        dtype: dtype of that tensor.
        origin: Name of the operator that returned that tensor; None if no operator did (`torch.get_rng_state`,
            `torch.from_numpy`).
        phase: The recorder's phase when it was created.
    """

    nbytes: int
    device: torch.device
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str | None
    phase: str | int | None


class StorageRecorder(TorchDispatchMode):
    """Records every tensor storage that comes into being inside a `with` block, by weak references.

    However a storage is held later, by autograd, by a Python object or by a closure, it counts as long as it lives,
    and only once. What existed before the block does not count. Operators run slower while it records.

    >>> with StorageRecorder() as recorder:
    ...     loss = model(input_ids, labels=input_ids).loss
    >>> sum(storage.nbytes for storage in recorder.live())

    Attributes:
        phase: Label of what is created from now on; `begin` changes it.
    """

    # Compiled code has some, such as those that save random states for checkpointing.
    supports_higher_order_operators = True

    def __init__(self, phase: str | int | None = None) -> None:
        """Prepare to record.

        Args:
            phase: Label of what is created until `begin` is called.
        """
        super().__init__()
        self.phase = phase
        # Keys are addresses of C++ storages; an address is not used again while a weak reference to it exists.
        self._before: dict[int, StorageWeakRef] = {}
        self._created: dict[int, tuple] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run as it is while this records; torch.compile would give it up for good otherwise."""
        return True

    def __enter__(self) -> "StorageRecorder":
        """Note the storages that exist already, and begin to record."""
        for tensor in _python_tensors():
            if (storage := _storage(tensor)) is not None:
                self._before.setdefault(storage._cdata, StorageWeakRef(storage))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Stop recording."""
        super().__exit__(*exception)
        self._note_undispatched()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operator, and note the storages of its arguments and results."""
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            self._note(value, None)
        result = function(*args, **kwargs)
        for value in tree_leaves(result):
            self._note(value, function)
        return result

    def begin(self, phase: str | int | None) -> None:
        """Begin another phase.

        Args:
            phase: Label of what is created from now on.
        """
        self._note_undispatched()
        self.phase = phase

    def relabel(self, tensor: torch.Tensor, phase: str | int | None) -> None:
        """Move the storage of a tensor to another phase, if it was created in the block.

        Args:
            tensor: A strided tensor.
            phase: The new label.
        """
        key = _storage(tensor)._cdata
        if key in self._created:
            reference, *what, _ = self._created[key]
            self._created[key] = (reference, *what, phase)

    def live(self) -> list[LiveStorage]:
        """Return the storages created in the block that are alive now, in order of creation."""
        found = []
        for reference, *what in self._created.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                found.append(LiveStorage(storage.nbytes(), storage.device, *what))
        return found

    def _note_undispatched(self) -> None:
        """Note tensors that Python sees and the dispatcher did not (random states, wrapped numbers)."""
        for tensor in _python_tensors():
            self._note(tensor, None)

    def _note(self, value: Any, function: object) -> None:
        """Note the storage of a value if it is new; `function` is the operator that returned it, or None."""
        storage = _storage(value)
        if storage is None or storage._cdata in self._before or storage._cdata in self._created:
            return
        origin = None if function is None else str(function)
        what = (tuple(value.shape), value.dtype, origin, self.phase)
        self._created[storage._cdata] = (StorageWeakRef(storage), *what)


@dataclass(frozen=True)
class ForwardMemory:
    """Storages that a forward pass left alive.

    Attributes:
        storages: The storages, in order of creation. Their phase is "layers" up to the exit of the last layer, then
            "head".
    """

    storages: list[LiveStorage]

    @property
    def layers(self) -> int:
        """Bytes created up to the exit of the last layer, without that layer's output, which is the head's input."""
        return sum(storage.nbytes for storage in self.storages if storage.phase == "layers")

    @property
    def total(self) -> int:
        """Bytes of all storages, those of head and loss included."""
        return sum(storage.nbytes for storage in self.storages)

    def on(self, device_type: str) -> "ForwardMemory":
        """Select the storages in one type of device's memory.

        Args:
            device_type: "cpu" or "cuda", for example.

        Returns:
            A `ForwardMemory` of these storages.
        """
        return ForwardMemory([storage for storage in self.storages if storage.device.type == device_type])


def forward_memory(forward: Callable[[], T], last_layer: torch.nn.Module) -> tuple[T, ForwardMemory]:
    """Run a forward pass and find out which storages it leaves alive.

    Its result is alive while the storages are counted, because it carries the graph. Objects in reference cycles
    count too, whether or not the garbage collector would get to them.

    Args:
        forward: Runs the pass.
        last_layer: The module whose exit ends the part that `ForwardMemory.layers` counts.

    Returns:
        `(result of forward, ForwardMemory)`.

    Raises:
        RuntimeError: `last_layer` did not run.
    """

    def leave(module, args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        recorder.begin("head")
        recorder.relabel(tensor, "head")

    recorder = StorageRecorder("layers")
    handle = last_layer.register_forward_hook(leave)
    try:
        with _collector_paused(), recorder:
            result = forward()
        storages = recorder.live()
    finally:
        handle.remove()
    if recorder.phase != "head":
        raise RuntimeError(f"the forward pass did not run the layer given, a {type(last_layer).__name__}")
    return result, ForwardMemory(storages)


def reset_peak_rss() -> bool:
    """Start counting the process's peak resident memory anew.

    Returns:
        Whether the system could do it, which takes Linux.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int | None:
    """Return the peak resident memory of this process in bytes.

    Returns:
        The peak since `reset_peak_rss` was called last, or else since the process began; None if unknown.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return _peak_rss_since_start()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)


def _peak_rss_since_start() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak if sys.platform == "darwin" else peak * 1024


def _storage(value: Any) -> Any:
    """Return the storage of a tensor, or None for a value that has none."""
    # Ask for the type: `isinstance` would ask proxies for their __class__ and import what they stand for.
    if not issubclass(type(value), torch.Tensor) or value.layout is not torch.strided:
        return None
    try:
        storage = value.untyped_storage()
    except (NotImplementedError, RuntimeError):  # functional wrappers
        return None
    return storage


def _python_tensors() -> list[torch.Tensor]:
    """Return all tensors that the garbage collector tracks."""
    return [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the garbage collector from running at a moment of its own, which would make counts differ between runs."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
