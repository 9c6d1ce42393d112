"""The two integer streams of one forward pass: forward layer by layer, and backward again.

A backward pass needs nothing else from the forward pass but them, and what `Passed` says of each layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from r3mem_fast.kernels import coupling

from . import offload
from .step import Step


class Update(NamedTuple):
    """How a layer's branch joins the streams.

    Attributes:
        form: "momentum", or "inverse" for a layer that is read backward in the coupling's inverse form.
        bits: The momentum is `2**-bits`; None means no momentum.
    """

    form: str
    bits: int | None


class _Operations(NamedTuple):
    forward: Callable
    rewind: Callable
    gradient: Callable
    backward: Callable


_OPERATIONS = {
    "momentum": _Operations(
        coupling.momentum_forward,
        coupling.momentum_rewind,
        coupling.momentum_gradient,
        coupling.momentum_backward,
    ),
    "inverse": _Operations(
        coupling.inverse_forward,
        coupling.inverse_rewind,
        coupling.inverse_gradient,
        coupling.inverse_backward,
    ),
}


class Passed(NamedTuple):
    """A layer that the streams have passed, with what it takes to go back through it.

    Attributes:
        step: What its branch was called with.
        update: How the branch joined the streams.
        kept: What the coupling's kernel kept: side bits and checksums.
        opens: Whether the layers below have another form, or are out of autograd's reach. The streams are compared
            here with what they were in the forward pass.
    """

    step: Step
    update: Update
    kept: Any
    opens: bool


class Streams:
    """The streams of one forward pass.

    Args:
        hidden: Input of the first layer, `[batch, tokens, width]`.
        fraction_bits: Binary places of the streams.
        recording: Is told of every level; None: nobody is.
        side_bits_on_host: Whether side bits wait for the backward pass in host memory.

    Attributes:
        position: int32, the shape of the hidden state.
        velocities: The same by form; that of a form which is not running waits.
        flags: int32 `[3]`, see `Integrity`.
        level: Number of layers that the streams have passed.
        start: Index of the first layer that autograd reaches, from which on side bits are kept; None: none so far.
        passed: What is known of each layer below `level`; None where autograd does not reach.
    """

    def __init__(
        self, hidden: torch.Tensor, fraction_bits: int, recording: Any = None, side_bits_on_host: bool = False
    ):
        self.fraction_bits, self.dtype = fraction_bits, hidden.dtype
        self.flags = coupling.new_flags(hidden.device)
        self.position: Any
        self.position, velocity, self._entered = coupling.momentum_enter(
            hidden, fraction_bits=fraction_bits, flags=self.flags
        )
        self.velocities: Any = {"momentum": velocity}
        self.surrogates: Any = None  # of `Mode.STORED`
        self.level = 0
        self.start: int | None = None
        self.passed: list[Passed | None] = []
        self._form: str | None = None  # of the layer below, while running forward
        self._grad_velocities: dict[str, torch.Tensor] = {}
        self._bits_above: dict[str, int | None] = {}
        self._graph_task: int | None = None
        self._hidden: torch.Tensor | None = (
            None  # while running backward: the dequantised position, one layer below the velocity
        )
        self._side_bits_on_host = side_bits_on_host
        self._recording = recording
        if recording is not None:
            recording.begin(self)

    def input_of_next(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden state that the next layer sees: `hidden`, or for the first layer its value on the grid."""
        entered, self._entered = self._entered, None
        return hidden if entered is None else entered

    def forward(self, branch: torch.Tensor, update: Update, step: Step | None = None) -> torch.Tensor:
        """Add a layer's branch: the streams move up one level. Returns the new hidden state.

        Args:
            branch: The branch's value, in the shape of the hidden state.
            update: How it joins the streams.
            step: What the branch was called with; None for a layer that autograd cannot reach, and that need not be
                reversible.
        """
        form = update.form
        if form not in self.velocities:
            self.velocities[form] = torch.zeros_like(self.position)
        if step is not None and self.start is None:
            self.start = self.level
        opens = step is not None and (self.level == self.start or form != self._form)
        hidden, kept = _OPERATIONS[form].forward(
            self.position,
            self.velocities[form],
            branch,
            bits=update.bits,
            fraction_bits=self.fraction_bits,
            flags=self.flags,
            dtype=self.dtype,
            keep=step is not None,
            sum_streams=opens,
        )
        if step is None:
            self.passed.append(None)
        else:
            if self._side_bits_on_host:
                kept = kept._replace(side=offload.HostCopy(kept.side))
            self.passed.append(Passed(step, update, kept, opens))
        self._form = form
        self.level += 1
        if self._recording is not None:
            self._recording.append(self)
        return hidden

    def to_host(self):
        """Let the streams wait in host memory for the backward pass."""
        self.position = offload.HostCopy(self.position)
        self.velocities = {form: offload.HostCopy(velocity) for form, velocity in self.velocities.items()}

    def input_of(self, index: int) -> torch.Tensor:
        """Run the streams backward to the input of layer `index`; returns it as a hidden state, a fresh tensor.

        Raises:
            RuntimeError: The streams have been run backward already, or a layer above cannot be undone.
        """
        if index >= self.level:
            raise RuntimeError(
                "this reversible graph has already been run backward, which consumes its streams: backward through "
                "it a second time (retain_graph=True) is not supported. Run the forward pass again, or add the "
                "losses before one backward()."
            )
        if isinstance(self.position, offload.HostCopy):
            self.position = self.position.back()
            self.velocities = {form: velocity.back() for form, velocity in self.velocities.items()}
        while self.level > index + 1:  # layers above whose output has no part in the loss
            above = self.level - 1
            self.finish(above, self.layer(above).step.value_again(self.input_of(above)), None, None)
        if self._hidden is None:
            form = self.layer(index).update.form
            self._hidden = _OPERATIONS[form].rewind(
                self.position, self.velocities[form], fraction_bits=self.fraction_bits, dtype=self.dtype
            )
        hidden, self._hidden = self._hidden, None
        return hidden

    def layer(self, index: int) -> Passed:
        """A layer that the streams can be run back through.

        Raises:
            RuntimeError: It ran without gradients.
        """
        passed = self.passed[index]
        if passed is None:
            raise RuntimeError(
                f"layer {index} ran without gradients after layers that had them; what it added cannot be undone"
            )
        return passed

    def begin_backward(self) -> bool:
        """Whether this is the first node of its call of backward(), which starts with no gradient of its own."""
        graph_task = torch._C._current_graph_task_id()
        if graph_task == self._graph_task:
            return False
        self._graph_task, self._grad_velocities, self._bits_above = graph_task, {}, {}
        return True

    def branch_gradient(self, grad_output: torch.Tensor, index: int, branch: torch.Tensor) -> torch.Tensor:
        """The gradient of layer `index`'s branch from that of its output.

        NaN and a flag where `branch`, the second evaluation, is not what the first one was.
        """
        passed = self.layer(index)
        form, bits = passed.update
        gradient, self._grad_velocities[form] = _OPERATIONS[form].gradient(
            grad_output,
            self._grad_velocities.get(form),
            branch,
            passed.kept,
            bits=bits,
            bits_above=self._bits_above.get(form),
            flags=self.flags,
            dtype=branch.dtype,
        )
        self._bits_above[form] = bits
        return gradient

    def finish(
        self,
        index: int,
        branch: torch.Tensor,
        grad_output: torch.Tensor | None,
        grad_branch: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Undo layer `index`, whose input is known; returns the gradient of its input.

        Where the layer opens, the streams are compared with what they were there in the forward pass.
        """
        passed, self.passed[index] = self.layer(index), None
        form, bits = passed.update
        self._hidden, gradient = _OPERATIONS[form].backward(
            self.position,
            self.velocities[form],
            branch,
            passed.kept._replace(side=offload.back(passed.kept.side)),
            grad_output,
            grad_branch,
            bits=bits,
            fraction_bits=self.fraction_bits,
            flags=self.flags,
            dtype=self.dtype,
            last=passed.opens,
        )
        self.level = index
        return gradient

    def release(self):
        """Let the streams go."""
        self.position = self.velocities = None
        self._grad_velocities = {}
