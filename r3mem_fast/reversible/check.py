"""Proofs on the user's own model: the inverse is exact, and the gradients are those of stored activations."""

import contextlib
import dataclasses
import math

import torch

from ..integrations.scoped import temporarily
from .convert import stack_of
from .integrity import raise_for
from .stack import Mode


@dataclasses.dataclass(frozen=True)
class InverseReport:
    """What `check_inverse` found.

    exact: every layer's reconstructed streams equal the forward pass's, bit for bit.
    max_abs_error: the largest difference of a position, in the hidden state's units.
    first_inexact_layer: counted from the last layer down, the first whose input differs; None if exact.
    layer_errors: with `per_layer`, the error of each layer's input, in the order in which they ran; else None.
    side_bytes, stream_bytes: what the pass keeps between forward and backward. checkpoint_bytes: one hidden state a
    layer, which gradient checkpointing keeps.
    max_abs_position: of the residual stream; must stay below 2**(31 - fraction_bits).
    """

    exact: bool
    layers: int
    tokens: int
    dtype: str
    bits: list[int]
    fraction_bits: int
    max_abs_error: float
    first_inexact_layer: int | None
    layer_errors: list[float] | None
    side_bytes: int
    stream_bytes: int
    checkpoint_bytes: int
    max_abs_position: float

    def __str__(self):
        if self.exact:
            verdict = "exact, bit for bit"
        else:
            verdict = f"NOT exact: layer {self.first_inexact_layer}, error up to {self.max_abs_error:.3g}"
        kept = self.side_bytes + self.stream_bytes
        return (
            f"inverse of {self.layers} layers over {self.tokens} tokens ({self.dtype}): {verdict}; "
            f"keeps {kept:,} bytes, checkpointing {self.checkpoint_bytes:,}"
        )


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """What `check_gradients` found.

    max_relative_error: the largest `|g - g_stored| / |g_stored|` (2-norms) of a parameter, `worst_parameter` its name.
    Where `g_stored` is zero but for rounding, the difference is taken relative to the largest gradient. 0.0, in any
    dtype, where the operators give the same bits for the same input.
    loss, loss_stored: of the two passes; equal, bit for bit.
    """

    max_relative_error: float
    worst_parameter: str
    parameters: int
    loss: float
    loss_stored: float

    def __str__(self):
        return (
            f"gradients of {self.parameters} parameters: relative difference from stored activations at most "
            f"{self.max_relative_error:.2e} ({self.worst_parameter})"
        )


def check_inverse(model, input_ids, *, per_layer=True, **inputs) -> InverseReport:
    """Run a reversible model forward, then backward from its final streams alone, and compare every layer.

    input_ids: int64 `[batch, tokens]`; further inputs (attention_mask, ...) as the model takes them. per_layer: report
    the error of every layer. Keeps all streams of the forward pass to compare with: 8 bytes an element and layer.
    The model's mode, gradients and random state stay as they are. Raises ValueError if it is not reversible,
    IntegrityError if a value is not finite or out of range.
    """
    stack = stack_of(model)
    recording = _Recording()
    with _restored_random_state(), temporarily(stack, recording=recording), torch.enable_grad():
        model(input_ids=input_ids, use_cache=False, **inputs)
        state = recording.state
        raise_for(state.flags, state.fraction_bits)
        report = {
            "layers": state.level,
            "tokens": input_ids.numel(),
            "dtype": str(state.dtype).removeprefix("torch."),
            "bits": list(stack.bits),
            "fraction_bits": state.fraction_bits,
            "side_bytes": sum(passed.kept.side.nbytes for passed in state.passed),
            "stream_bytes": state.position.nbytes + sum(v.nbytes for v in state.velocities.values()),
            "checkpoint_bytes": state.level * state.position.numel() * state.dtype.itemsize,
        }
        errors, exact = [0.0] * state.level, [True] * state.level
        while state.level:
            index = state.level - 1
            hidden = state.input_of(index)
            position_error = _largest(state.position.long() - recording.positions[index])
            state.finish(index, state.passed[index].step.value_again(hidden), None, None)
            velocity_error = max(
                _largest(velocity.long() - recording.velocities[index].get(form, 0))
                for form, velocity in state.velocities.items()
            )
            errors[index] = position_error * 2.0**-state.fraction_bits
            exact[index] = position_error == velocity_error == 0
    inexact = [index for index, equal in enumerate(exact) if not equal]
    return InverseReport(
        exact=not inexact,
        max_abs_error=max(errors),
        first_inexact_layer=stack.route.order[max(inexact)] if inexact else None,
        layer_errors=errors if per_layer else None,
        max_abs_position=max(_largest(p) for p in recording.positions) * 2.0**-state.fraction_bits,
        **report,
    )


def check_gradients(model, input_ids, *, labels=None, **inputs) -> GradientReport:
    """Compare a reversible model's gradients with those of the same network with stored activations.

    input_ids: int64 `[batch, tokens]`; labels default to them. Every parameter that requires a gradient is compared.
    The parameters' `.grad`, the model's mode and the random state stay as they are. The reference pass stores all
    activations, so it needs the memory of plain training. Raises ValueError if the model is not reversible, or has
    no parameter that requires a gradient.
    """
    stack = stack_of(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient")
    if any(hasattr(p, "full_tensor") for p in parameters.values()):
        raise ValueError("check_gradients needs the whole model on one device: call it before fully_shard")
    labels = input_ids if labels is None else labels

    def gradients():
        with _restored_random_state(), torch.enable_grad():
            loss = model(input_ids=input_ids, labels=labels, use_cache=False, **inputs).loss
            return loss.item(), torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    loss, computed = gradients()
    with stack.in_mode(Mode.STORED):
        loss_stored, expected = gradients()
    stack.integrity.raise_pending(stack.fraction_bits)
    norms = [0.0 if g is None else g.double().norm().item() for g in expected]
    errors = {}
    for name, a, b, norm in zip(parameters, computed, expected, norms, strict=True):
        if a is None or b is None:
            errors[name] = 0.0 if a is b else math.inf
            continue
        # A gradient that is zero but for rounding (a key bias under softmax) has no relative error of its own.
        noise = 8 * torch.finfo(b.dtype).eps * max(norms)
        difference = (a - b).double().norm().item()
        if not math.isfinite(difference):
            errors[name] = math.inf
            continue
        errors[name] = difference and difference / (norm if norm > noise else max(norms))
    worst = max(errors, key=errors.get)
    return GradientReport(errors[worst], worst, len(errors), loss, loss_stored)


def _largest(tensor):
    return tensor.abs().amax().item()


class _Recording:
    """Copies of both streams at every level of a forward pass, level 0 first."""

    def begin(self, state):
        self.state, self.positions, self.velocities = state, [], []
        self.append(state)

    def append(self, state):
        self.positions.append(state.position.clone())
        self.velocities.append({form: velocity.clone() for form, velocity in state.velocities.items()})


@contextlib.contextmanager
def _restored_random_state():
    with torch.random.fork_rng():
        yield
