"""Proves on the user's own model that the inverse is exact and the gradients are those of stored activations."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from ..integrations.scoped import temporarily
from .convert import stack_of
from .integrity import raise_for
from .stack import Mode


@dataclasses.dataclass(frozen=True)
class InverseReport:
    """The result of `check_inverse`.

    Attributes:
        exact: Whether every layer's reconstructed streams equal those of the forward pass, bit for bit.
        layers: Number of layers that ran.
        tokens: Number of tokens of the input.
        dtype: Name of the hidden state's dtype.
        bits: Side bits of every layer.
        fraction_bits: Fraction bits of the streams.
        max_abs_error: Largest difference of a position, in the hidden state's units.
        first_inexact_layer: Index of the first layer, counted from the last one down, whose input differs; None if
            exact.
        layer_errors: With `per_layer`, the error of each layer's input, in the order in which they ran; else None.
        side_bytes: Bytes of side bits that the pass keeps between forward and backward.
        stream_bytes: Bytes of the streams that it keeps.
        checkpoint_bytes: Bytes that gradient checkpointing keeps: one hidden state a layer.
        max_abs_position: Largest absolute value of the residual stream; must stay below 2**(31 - fraction_bits).
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

    def __str__(self) -> str:
        """Return the report in one line."""
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
    """The result of `check_gradients`.

    Attributes:
        max_relative_error: Largest `|g - g_stored| / |g_stored|` (2-norms) of a parameter. Where `g_stored` is zero
            but for rounding, the difference is taken relative to the largest gradient. It is 0.0, in any dtype, where
            the operators give the same bits for the same input.
        worst_parameter: Name of the parameter with this error.
        parameters: Number of parameters compared.
        loss: Loss of the reversible pass.
        loss_stored: Loss of the pass with stored activations; equal to `loss`, bit for bit.
    """

    max_relative_error: float
    worst_parameter: str
    parameters: int
    loss: float
    loss_stored: float

    def __str__(self) -> str:
        """Return the report in one line."""
        return (
            f"gradients of {self.parameters} parameters: relative difference from stored activations at most "
            f"{self.max_relative_error:.2e} ({self.worst_parameter})"
        )


def check_inverse(
    model: torch.nn.Module, input_ids: torch.Tensor | None = None, *, per_layer: bool = True, **inputs: Any
) -> InverseReport:
    """Run a reversible model forward, then backward from its final streams alone, and compare every layer.

    All streams of the forward pass are kept to compare with: 8 bytes an element and layer. The model's mode, gradients
    and random state stay as they are.

    Args:
        model: A model that `make_reversible` has changed.
        input_ids: int64 `[batch, tokens]`; None for a model that takes something else.
        per_layer: Report the error of every layer.
        inputs: Further inputs of the model (`attention_mask`, `pixel_values`, ...).

    Returns:
        What was found.

    Raises:
        IntegrityError: A value is not finite or out of range.
        ValueError: The model is not reversible.
    """
    stack = stack_of(model)
    recording = _Recording()
    with _restored_random_state(), temporarily(stack, recording=recording), torch.enable_grad():
        model(**_arguments(input_ids, inputs))
        state = recording.state
        raise_for(state.flags, state.fraction_bits)
        report: dict[str, Any] = {
            "layers": state.level,
            "tokens": state.position[..., 0].numel() if input_ids is None else input_ids.numel(),
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


def check_gradients(
    model: torch.nn.Module,
    input_ids: torch.Tensor | None = None,
    *,
    labels: torch.Tensor | None = None,
    **inputs: Any,
) -> GradientReport:
    """Compare a reversible model's gradients with those of the same network with stored activations.

    Every parameter that requires a gradient is compared. The parameters' `.grad`, the model's mode and the random
    state stay as they are. The second pass stores all activations, so it needs the memory of plain training.

    Args:
        model: A model that `make_reversible` has changed.
        input_ids: int64 `[batch, tokens]`; None for a model that takes something else.
        labels: What the model computes its loss with, for a language model int64 `[batch, tokens]`; None: `input_ids`.
        inputs: Further inputs of the model (`attention_mask`, `pixel_values`, ...).

    Returns:
        What was found.

    Raises:
        ValueError: The model is not reversible, is sharded, or has no parameter that requires a gradient, or there are
            no labels.
    """
    stack = stack_of(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient")
    if any(hasattr(p, "full_tensor") for p in parameters.values()):
        raise ValueError("check_gradients needs the whole model on one device: call it before fully_shard")
    labels = input_ids if labels is None else labels
    if labels is None:
        raise ValueError("check_gradients needs a loss: pass the model's labels")

    def gradients() -> tuple[float, tuple[torch.Tensor | None, ...]]:
        with _restored_random_state(), torch.enable_grad():
            loss = model(**_arguments(input_ids, inputs), labels=labels).loss
            return loss.item(), torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    loss, computed = gradients()
    with stack.in_mode(Mode.STORED):
        loss_stored, expected = gradients()
    stack.integrity.raise_pending(stack.fraction_bits)
    norms = [0.0 if g is None else g.double().norm().item() for g in expected]
    errors: dict[str, float] = {}
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
    worst = max(errors, key=errors.__getitem__)
    return GradientReport(errors[worst], worst, len(errors), loss, loss_stored)


def _arguments(input_ids: torch.Tensor | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the model. One that reads no tokens has no cache that could be turned off."""
    return inputs if input_ids is None else {"input_ids": input_ids, "use_cache": False, **inputs}


def _largest(tensor: torch.Tensor) -> int | float:
    return tensor.abs().amax().item()


class _Recording:
    """Copies both streams at every level of a forward pass, level 0 first."""

    def begin(self, state: Any) -> None:
        """Begin with the streams at level 0."""
        self.state = state
        self.positions: list[torch.Tensor] = []
        self.velocities: list[dict[Any, torch.Tensor]] = []
        self.append(state)

    def append(self, state: Any) -> None:
        """Copy the streams at the next level."""
        self.positions.append(state.position.clone())
        self.velocities.append({form: velocity.clone() for form, velocity in state.velocities.items()})


@contextlib.contextmanager
def _restored_random_state() -> Iterator[None]:
    """Give the random state back, at the end of the block, as it was at its beginning."""
    with torch.random.fork_rng():
        yield
