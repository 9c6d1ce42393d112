"""Reading backward: the layers of a core run from last to first, called by the model's own loop."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from r3mem_fast.kernels.coupling import SIDE_BITS

from ..choices import FORMS
from ..integrations.compat import key_sources
from ..integrations.scoped import in_order, kinds_of_layers, temporarily
from .convert import reversible_layers, text_config
from .route import route_through


def core_of(core: Any, num_layers: int) -> range:
    """The layer indices of a core, as a range.

    Args:
        core: "all", or `(first, end)` with `0 <= first < end <= num_layers`.
        num_layers: Number of layers of the model.

    Raises:
        ValueError: The core is anything else.
    """
    if isinstance(core, str) and core == "all":
        return range(num_layers)
    try:
        first, end = core
        if 0 <= first < end <= num_layers:
            return range(first, end)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"core must be 'all' or (first, end) with 0 <= first < end <= {num_layers}, got {core!r}")


def core_above_shared(core: tuple[int, int], sources: Sequence[int]) -> tuple[int, int]:
    """Move the first layer of a core up, until none of it reads the keys of another one of it.

    Args:
        core: The core, `(first, end)`.
        sources: For each layer the one whose keys and values it reads.
    """
    first, end = core
    if _shares(range(*core), sources) is not None:
        first = max(sources) + 1
    return first, max(first + 1, end)


def check_core(core: range, sources: Sequence[int]) -> None:
    """Raise ValueError for a core in which a layer reads the keys of one that would run after it.

    Args:
        core: The core.
        sources: For each layer the one whose keys and values it reads.
    """
    if (index := _shares(core, sources)) is not None:
        first = max(sources) + 1
        raise ValueError(
            f"layer {index} reads the keys and values of layer {sources[index]}, which would run after it in a core "
            f"of layers {core.start} to {core.stop - 1}: take a core that ends at {first}, core=({core.start}, "
            f"{first}), or begins there, core=({first}, end)"
        )


def _shares(core, sources):
    return next((index for index in core if sources[index] in core and sources[index] != index), None)


def momentum_bits(backward_momentum: Any) -> int:
    """The number b of a momentum `2**-b`.

    Args:
        backward_momentum: The momentum: 1/2, 1/4, 1/16 or 1/256.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(backward_momentum, (int, float)) and 0 < backward_momentum < 1:
        bits = -math.log2(backward_momentum)
        if bits in SIDE_BITS:
            return int(bits)
    choices = ", ".join(f"1/{2**bits}" for bits in SIDE_BITS)
    raise ValueError(f"backward_momentum must be one of {choices}, got {backward_momentum!r}")


@contextlib.contextmanager
def reading_backward(
    model: Any, core: Any = "all", *, form: str = "reversed", backward_momentum: float = 0.5
) -> Iterator[None]:
    """Read a reversible model backward in the block: a context manager.

    Forward passes then run the layers below the core as usual, those of the core from last to first, and those above
    it as usual again. Training stays reversible, and `check_inverse` works, too. A key-value cache can be used if it
    was made before the block, by `DynamicCache(config=model.config)`: a layer finds its own place in it in either
    direction.

    Args:
        model: A reversible model.
        core: Layer indices `(first, end)`, or "all".
        form: "reversed" applies the momentum update, in the new order; "inverse" applies the coupling's own inverse in
            the core.
        backward_momentum: Momentum of the form "inverse": 1/2, 1/4, 1/16 or 1/256. Each layer amplifies by its
            reciprocal.

    Yields:
        Nothing.

    Raises:
        ValueError: The model is not reversible or is being read backward already, or the core, the form or the
            momentum does not fit.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    stack, layers = reversible_layers(model)
    if stack.route.order != tuple(range(len(layers))):
        raise ValueError("the model is being read backward already")
    if any(update.form != "momentum" or update.gain is not None for update in stack.route.updates):
        raise ValueError("only a model with a MomentumCoupling that is not balanced can be read backward")
    reach = core_of(core, len(layers))
    check_core(reach, key_sources(text_config(layers[0].reversible.decoder.config), layers))
    order = [*range(reach.start), *reversed(reach), *range(reach.stop, len(layers))]
    inverse = reach if form == "inverse" else ()
    route = route_through(stack.bits, order, inverse, momentum_bits(backward_momentum))
    decoder = layers[0].reversible.decoder
    holder = next(child for child in decoder.children() if layers[0] in set(child.children()))
    with contextlib.ExitStack() as changes:
        changes.enter_context(temporarily(stack, route=route))
        changes.enter_context(in_order(holder, [layers[index] for index in order]))
        config = text_config(decoder.config)
        if types := getattr(config, "layer_types", None):  # the model's loop picks masks by them
            changes.enter_context(kinds_of_layers(config, [types[index] for index in order]))
        yield
