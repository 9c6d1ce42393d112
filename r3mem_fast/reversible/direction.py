"""Reading backward: the layers of a core run from last to first, through the model's own loop."""

import contextlib
import math

from r3mem_fast.kernels.coupling import SIDE_BITS

from ..choices import FORMS
from ..integrations.scoped import in_order, temporarily
from .convert import reversible_layers, text_config


def core_of(core, num_layers) -> range:
    """`core` as a range of layer indices: `"all"`, or `(first, end)` with `0 <= first < end <= num_layers`.

    Raises ValueError for anything else.
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


def momentum_bits(backward_momentum) -> int:
    """Return b of a momentum 2**-b. Raises ValueError if that is none of the supported ones."""
    if isinstance(backward_momentum, (int, float)) and 0 < backward_momentum < 1:
        bits = -math.log2(backward_momentum)
        if bits in SIDE_BITS:
            return int(bits)
    choices = ", ".join(f"1/{2**bits}" for bits in SIDE_BITS)
    raise ValueError(f"backward_momentum must be one of {choices}, got {backward_momentum!r}")


@contextlib.contextmanager
def reading_backward(model, core="all", *, form="reversed", backward_momentum=0.5):
    """While this lasts, forward passes of a reversible model run its core backward.

    The layers below the core run as usual, the core's from last to first, then those above it. Training stays
    reversible, and so does `check_inverse`. A key-value cache serves, if it was made before and its layers are made by
    type (`DynamicCache(config=model.config)`): a layer finds its own place in it in either direction.
    core: `(first, end)`, layer indices, or `"all"`. form: "reversed" applies the momentum update in this order;
    "inverse" the coupling's own inverse in the core, with the momentum `backward_momentum` (1/2, 1/4, 1/16 or 1/256),
    which amplifies by its reciprocal a layer.

    Raises ValueError for a model that is not reversible or is being read backward already, or a core, form or momentum
    that does not fit.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    stack, layers = reversible_layers(model)
    if stack.route.order != tuple(range(len(layers))):
        raise ValueError("the model is being read backward already")
    reach = core_of(core, len(layers))
    order = [*range(reach.start), *reversed(reach), *range(reach.stop, len(layers))]
    inverse = reach if form == "inverse" else ()
    route = stack.route_through(order, inverse, momentum_bits(backward_momentum))
    decoder = layers[0].reversible.decoder
    holder = next(child for child in decoder.children() if layers[0] in set(child.children()))
    with contextlib.ExitStack() as changes:
        changes.enter_context(temporarily(stack, route=route))
        changes.enter_context(in_order(holder, [layers[index] for index in order]))
        config = text_config(decoder.config)
        if types := getattr(config, "layer_types", None):  # by which the model's loop picks masks
            changes.enter_context(temporarily(config, layer_types=[types[index] for index in order]))
        yield
