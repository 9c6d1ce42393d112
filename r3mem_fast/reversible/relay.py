"""How the streams get from one layer to the next through the model's own loop, which knows only hidden states."""

import threading
from typing import Any

import torch


class Relay(threading.local):
    """Holds the streams between two layers, and recognises the very tensor that carries them."""

    def __init__(self):
        self.drop()

    def __reduce__(self):
        raise TypeError("a reversible model cannot be pickled; call restore(model), or save its state_dict")

    def drop(self):
        """Forget the streams; returns them, None if there were none."""
        streams = getattr(self, "_streams", None)
        self._streams: Any = None
        self._carrier: Any = None
        self._version: int | None = None
        return streams

    def hand_on(self, streams, hidden: torch.Tensor):
        """Keep the streams for the layer that is given `hidden`, unchanged."""
        # An alias: it keeps the memory from being reused, and shares the version counter.
        self._streams, self._carrier = streams, hidden.detach()
        self._version, self._differentiable = hidden._version, hidden.requires_grad

    def take(self, hidden):
        """The streams that `hidden` carries; None if it is not, unchanged, what was handed on."""
        carrier, version = self._carrier, self._version
        streams = self.drop()
        if (
            streams is None
            or not isinstance(hidden, torch.Tensor)
            or hidden.data_ptr() != carrier.data_ptr()
            or hidden.shape != carrier.shape
            or hidden.dtype != carrier.dtype
            or hidden._version != version
            or (self._differentiable and torch.is_grad_enabled() and not hidden.requires_grad)
        ):
            return None
        return streams
