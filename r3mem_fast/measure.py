"""Memory that a training step really takes: bytes kept between forward and backward, and a process's peak."""

import contextlib
import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class LiveStorage:
    """A tensor storage that a recorded block created and that is still alive.

    nbytes: its size now. device: where. shape, dtype: of the first tensor seen on it. origin: the operator that
    returned that tensor, or None if no operator did (`torch.get_rng_state`, `torch.from_numpy`). phase: the recorder's
    when it was created.
    """

    nbytes: int
    device: torch.device
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str | None
    phase: str | None


class StorageRecorder(TorchDispatchMode):
    """Weak references to every tensor storage that comes into being inside the `with` block.

    However a storage is held later, by autograd, by a Python object or by a closure, it counts as long as it lives,
    and only once. What existed before the block does not count. Operators run slower while it records.

    >>> with StorageRecorder() as recorder:
    ...     loss = model(input_ids, labels=input_ids).loss
    >>> sum(storage.nbytes for storage in recorder.live())

    phase: a label for what is created from now on; `begin` changes it.
    """

    def __init__(self, phase=None):
        super().__init__()
        self.phase = phase
        # By the address of the C++ storage, which is not used again while a weak reference to it exists.
        self._before, self._created = {}, {}

    def __enter__(self):
        for tensor in _python_tensors():
            if (storage := _storage(tensor)) is not None:
                self._before.setdefault(storage._cdata, StorageWeakRef(storage))
        return super().__enter__()

    def __exit__(self, *exception):
        result = super().__exit__(*exception)
        self._note_undispatched()
        return result

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            self._note(value, None)
        result = function(*args, **kwargs)
        for value in tree_leaves(result):
            self._note(value, function)
        return result

    def begin(self, phase):
        """Label what is created from now on."""
        self._note_undispatched()
        self.phase = phase

    def relabel(self, tensor, phase):
        """Move the storage of `tensor` to another phase, if it was created in the block."""
        key = _storage(tensor)._cdata
        if key in self._created:
            reference, *what, _ = self._created[key]
            self._created[key] = (reference, *what, phase)

    def live(self) -> list[LiveStorage]:
        """Storages created in the block that are alive now, in order of creation."""
        found = []
        for reference, *what in self._created.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                found.append(LiveStorage(storage.nbytes(), storage.device, *what))
        return found

    def _note_undispatched(self):
        """Tensors that were made past the dispatcher (random states, wrapped numbers) and that Python can see."""
        for tensor in _python_tensors():
            self._note(tensor, None)

    def _note(self, value, function):
        storage = _storage(value)
        if storage is None or storage._cdata in self._before or storage._cdata in self._created:
            return
        origin = None if function is None else str(function)
        what = (tuple(value.shape), value.dtype, origin, self.phase)
        self._created[storage._cdata] = (StorageWeakRef(storage), *what)


@dataclass(frozen=True)
class ForwardMemory:
    """What a forward pass left alive: `layers` and `total` in bytes, and the storages themselves.

    layers: created up to the exit of the last layer, without that layer's output, which is the head's input.
    total: everything, head and loss too.
    """

    storages: list[LiveStorage]

    @property
    def layers(self) -> int:
        return sum(storage.nbytes for storage in self.storages if storage.phase == "layers")

    @property
    def total(self) -> int:
        return sum(storage.nbytes for storage in self.storages)

    def on(self, device_type: str) -> "ForwardMemory":
        """What of it lies in the memory of this type of device."""
        return ForwardMemory([storage for storage in self.storages if storage.device.type == device_type])


def forward_memory(forward, last_layer) -> tuple[object, ForwardMemory]:
    """Run `forward()` and return `(its result, ForwardMemory)`.

    last_layer: the module whose exit ends the part that `layers` counts. The result is kept alive while counting: it
    carries the graph. Objects in reference cycles count too, whether or not the collector would get to them.
    Raises RuntimeError if `last_layer` did not run.
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


def reset_peak_rss():
    """Start counting the process's peak resident memory anew. False where the system cannot (it needs Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss():
    """Peak resident memory of this process in bytes, since `reset_peak_rss` or its start; None if unknown."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return _peak_rss_since_start()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)


def _peak_rss_since_start():
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _storage(value):
    """The storage of a tensor, or None for what has none."""
    # By type: `isinstance` would ask proxies for their __class__ and import what they stand for.
    if not issubclass(type(value), torch.Tensor) or value.layout is not torch.strided:
        return None
    try:
        storage = value.untyped_storage()
    except (NotImplementedError, RuntimeError):  # functional wrappers
        return None
    return storage


def _python_tensors():
    return [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]


@contextlib.contextmanager
def _collector_paused():
    """Collected or not by chance, garbage would make the count differ from run to run."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
