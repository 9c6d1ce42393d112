"""The two integer streams of one forward pass: forward layer by layer, and backward again.

A backward pass needs nothing else from the forward pass but them, and what `Passed` says of each layer.
"""

from typing import Any, NamedTuple

import torch

from r3mem_fast.kernels import coupling

from ..integrations.scoped import hooks_paused
from . import offload
from .forms import FORMS_OF_UPDATE, Update
from .step import Step


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
        first_form: Form of the first layer's update.

    Attributes:
        position: int32, the shape of the hidden state.
        velocities: The same by form; that of a form which is not running waits. Two-step couplings have the position
            of one layer before in its place.
        flags: int32 `[3]`, see `Integrity`.
        level: Number of layers that the streams have passed.
        start: Index of the first layer that autograd reaches, from which on side bits are kept; None: none so far.
        passed: What is known of each layer below `level`; None where autograd does not reach.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        fraction_bits: int,
        recording: Any = None,
        side_bits_on_host: bool = False,
        first_form: str = "momentum",
    ):
        self.fraction_bits, self.dtype = fraction_bits, hidden.dtype
        self.flags = coupling.new_flags(hidden.device)
        self.position: Any
        self.position, velocity, self._entered = coupling.momentum_enter(
            hidden, fraction_bits=fraction_bits, flags=self.flags
        )
        # A second stream that starts as a copy hands its gradient on to the input, too.
        self._copied = FORMS_OF_UPDATE[first_form].start is torch.clone
        self.velocities: Any = {first_form: self.position.clone() if self._copied else velocity}
        self.surrogates: Any = None  # of `Mode.STORED`
        self.level = 0
        self.start: int | None = None
        self.passed: list[Passed | None] = []
        self._form: str | None = None  # of the layer below, while running forward
        self._grad_velocities: dict[str, torch.Tensor] = {}
        self._above: dict[str, Update] = {}
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
            self.velocities[form] = FORMS_OF_UPDATE[form].start(self.position)
        if step is not None and self.start is None:
            self.start = self.level
        opens = step is not None and (self.level == self.start or form != self._form)
        hidden, kept = FORMS_OF_UPDATE[form].forward(
            update,
            self.position,
            self.velocities[form],
            branch,
            fraction_bits=self.fraction_bits,
            flags=self.flags,
            dtype=self.dtype,
            keep=step is not None,
            sum_streams=opens,
        )
        if update.adapter is not None:
            hidden = self._adapt(update)
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
            update = self.layer(index).update
            form = update.form
            if update.adapter is not None:
                self._adapt(update, undo=True)
            self._hidden = FORMS_OF_UPDATE[form].rewind(
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
        self._graph_task, self._grad_velocities, self._above = graph_task, {}, {}
        return True

    def branch_gradient(
        self, grad_output: torch.Tensor, index: int, branch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[torch.Tensor, torch.Tensor]]:
        """Compute the gradients of a layer's branch and adapter, and of its input beside the branch.

        Args:
            grad_output: Gradient of the layer's output.
            index: Index of the layer, counted as the streams passed them.
            branch: The second evaluation of the branch. Where it is not what the first one was, the gradient is NaN
                and a flag is set.

        Returns:
            The gradient of the branch; that of the input but for what passes through the branch; and those of the
            adapter's parameters, by parameter.
        """
        passed = self.layer(index)
        update = passed.update
        above, grad_velocity = self._above.get(update.form), self._grad_velocities.get(update.form)
        of_parameters: dict[torch.Tensor, torch.Tensor] = {}
        through_adapter = grad_output
        if update.adapter is not None:
            of_adapted = grad_output if FORMS_OF_UPDATE[update.form].adapts_position else grad_velocity
            if of_adapted is not None:
                read, of_parameters = self._through_adapter(update, of_adapted)
                through_adapter = grad_output + read.to(grad_output.dtype)
        gradient, self._grad_velocities[update.form], beside = FORMS_OF_UPDATE[update.form].gradient(
            update, above, through_adapter, grad_velocity, branch, passed.kept, flags=self.flags, dtype=branch.dtype
        )
        self._above[update.form] = update
        return gradient, grad_output if beside is None else beside, of_parameters

    def _adapt(self, update: Update, *, undo: bool = False) -> torch.Tensor:
        """Let an adapter change one stream by what the other is, or take that away again; return the hidden state."""
        position, velocity = self.position, self.velocities[update.form]
        changed, read = position, velocity
        if not FORMS_OF_UPDATE[update.form].adapts_position:
            changed, read = velocity, position
        with torch.no_grad():
            value = update.adapter(coupling.dequantize(read, self.fraction_bits, self.dtype))
        flags, sign = (None, -1) if undo else (self.flags, 1)
        coupling.others.add_quantized_(changed, value, fraction_bits=self.fraction_bits, flags=flags, sign=sign)
        return coupling.dequantize(position, self.fraction_bits, self.dtype)

    def _through_adapter(
        self, update: Update, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, dict[torch.Tensor, torch.Tensor]]:
        """Run an adapter backward, once the position is the layer's input: gradients of its input and parameters."""
        # In either form the second stream is now what the adapter read.
        read = coupling.dequantize(self.velocities[update.form], self.fraction_bits, self.dtype).requires_grad_()
        parameters = [p for p in update.adapter.parameters() if p.requires_grad]
        with torch.enable_grad():
            value = update.adapter(read)
        with hooks_paused(parameters):
            found = torch.autograd.grad(value, [read, *parameters], gradient.to(value.dtype))
        of_read, *of_parameters = found
        return of_read, dict(zip(parameters, of_parameters, strict=True))

    def finish(
        self,
        index: int,
        branch: torch.Tensor,
        grad_beside: torch.Tensor | None,
        grad_branch: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Undo layer `index`, whose input is known; returns the gradient of its input: the sum of both.

        Where the layer opens, the streams are compared with what they were there in the forward pass.
        """
        passed, self.passed[index] = self.layer(index), None
        form = passed.update.form
        self._hidden, gradient = FORMS_OF_UPDATE[form].backward(
            passed.update,
            self.position,
            self.velocities[form],
            branch,
            passed.kept._replace(side=offload.back(passed.kept.side)),
            grad_beside,
            grad_branch,
            fraction_bits=self.fraction_bits,
            flags=self.flags,
            dtype=self.dtype,
            last=passed.opens,
        )
        self.level = index
        if index == 0 and self._copied and gradient is not None:
            gradient = gradient + self._grad_velocities[form].to(gradient.dtype)
        return gradient

    def release(self):
        """Let the streams go."""
        self.position = self.velocities = None
        self._grad_velocities = {}
