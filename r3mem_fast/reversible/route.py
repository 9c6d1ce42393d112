"""The order in which the layers run: first to last, or with a core that is read backward."""

from collections.abc import Container, Sequence
from typing import NamedTuple

from .forms import Update


class Route(NamedTuple):
    """Order in which the layers run, and how they join the streams.

    Attributes:
        order: Indices of the layers, in the order in which they run.
        updates: How each layer's branch joins the streams, by index of the layer.
    """

    order: tuple[int, ...]
    updates: tuple[Update, ...]


def route_through(
    bits: Sequence[int], order: Sequence[int], inverse: Container[int] = (), inverse_bits: int | None = None
) -> Route:
    """Make a route through the layers.

    Args:
        bits: Side bits of each layer.
        order: Indices of the layers, in the order in which they are to run.
        inverse: Indices of layers that join the streams in the coupling's inverse form.
        inverse_bits: Number b of the inverse form's momentum, `2**-b`.
    """
    updates = [Update("inverse", inverse_bits) if i in inverse else Update("momentum", b) for i, b in enumerate(bits)]
    first = next((index for index in order if updates[index].form == "momentum"), None)
    if first is not None:
        updates[first] = Update("momentum", None)
    return Route(tuple(order), tuple(updates))
