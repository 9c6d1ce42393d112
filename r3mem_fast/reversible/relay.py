"""Carries the streams from one layer to the next, although the model's own loop hands on only hidden states."""

import threading
from typing import Any

import torch


class Relay(threading.local):
    """Holds the streams between two layers, each thread for itself.

    The next layer gets them only if it is given the very tensor that the layer before it returned.
    """

    def __init__(self):
        self.drop()

    def __reduce__(self) -> Any:
        raise TypeError("a reversible model cannot be pickled; call restore(model), or save its state_dict")

    def drop(self) -> Any:
        """Forget the streams, and return them; None if there are none."""
        streams = getattr(self, "_streams", None)
        self._streams: Any = None
        self._carrier: Any = None
        self._version: int | None = None
        return streams

    def hand_on(self, streams: Any, hidden: torch.Tensor) -> None:
        """Keep the streams for the next layer.

        Args:
            streams: The `Streams` of the pass.
            hidden: Output of a layer, which the next one must be given unchanged.
        """
        # An alias, which shares the version counter, and keeps the tensor's memory from being used for another one.
        self._streams, self._carrier = streams, hidden.detach()
        self._version, self._differentiable = hidden._version, hidden.requires_grad

    def take(self, hidden: Any) -> Any:
        """Return the streams to a layer, and forget them.

        Args:
            hidden: Input of the layer.

        Returns:
            The streams; None if the input is not the tensor that was handed on, unchanged.
        """
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
