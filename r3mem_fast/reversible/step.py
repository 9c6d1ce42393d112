"""Evaluates a layer's branch in a forward pass, and again, with the same arguments, in its backward pass."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..integrations import fsdp
from ..integrations.compat import SHARED_STATES, cache_name
from ..integrations.parametrised import parametrised
from .past import Past, PastKeysValues, States, append_to, layer_index, past_of
from .surroundings import Surroundings


class Step:
    """One layer in one forward pass, with all that it takes to evaluate its branch again.

    Args:
        layer: The decoder layer.
        branch: Its branch function, `(layer, hidden, kwargs) -> tensor`.
        kwargs: Arguments that the model's loop gives the layer beside the hidden state.
        device: Device that the layer runs on.
        idle: Identities of parameters that have no part in the branch, and get no gradient.
        evaluated_once: Whether there is no backward pass, and so no second evaluation.

    Attributes:
        layer: The decoder layer.

    Raises:
        ValueError: A module inside the layer was sharded by `fully_shard`.
        TypeError: The cache is of a kind that two evaluations cannot read alike.
    """

    def __init__(
        self,
        layer: nn.Module,
        branch: Callable,
        kwargs: dict[str, Any],
        device: torch.device,
        *,
        idle: Collection[int] = (),
        evaluated_once: bool = False,
    ):
        if fsdp.is_sharded_inside(layer):
            # FSDP2's hooks on it would see the inner backward pass in place of the outer one, and gradients would not
            # be reduced: each process would keep its own.
            raise ValueError(
                f"fully_shard was called on a module inside a {type(layer).__name__}; shard reversible layers whole"
            )
        self.layer, self._branch = layer, branch
        self._surroundings = Surroundings(device)
        self._cache_name = cache_name(kwargs)
        self._cache: Any = None
        self._past: Past = {}
        self._tokens_before = 0  # in the cache, when the pass began
        self._names: tuple[str, ...] = ()  # of what the layer keeps of this pass
        self._left: list[Any] = []  # names under which the layer has left keys and values for others
        if self._cache_name is not None:
            kwargs = dict(kwargs)
            self._cache = kwargs.pop(self._cache_name)
            self._cache_index = layer_index(layer)
            self._past = past_of(self._cache, self._cache_index)
            if "keys" in self._past:
                self._tokens_before = int(self._cache.get_seq_length(self._cache_index))
        self._shared: Any = None
        if kwargs.get(SHARED_STATES) is not None:
            # What is in it becomes arguments of the layer, so that gradients reach who has written it.
            kwargs = dict(kwargs)
            self._shared = kwargs[SHARED_STATES]
            kwargs[SHARED_STATES] = dict(self._shared)
        self._leaves, self._structure = tree_flatten(kwargs)
        self._evaluated_once = evaluated_once
        if evaluated_once:
            return
        # Watched, not copied: after a change in place, the backward pass would reconstruct something else.
        self._parameters, self._modes, self._hooks = _watched_parts(layer)
        self._trainable = [p for p in self._parameters if p.requires_grad and id(p) not in idle]
        unknown = parametrised(layer)
        self._watched = [
            (tensor, tensor._version)
            for tensor in [*self._arguments(), *self._parameters]
            if not tensor.is_inference() and id(tensor) not in unknown
        ]

    def _arguments(self) -> list[torch.Tensor]:
        return [leaf for leaf in [*self._leaves, *self._past.values()] if isinstance(leaf, torch.Tensor)]

    def inputs(self) -> list[torch.Tensor]:
        """Tensors that need a gradient beside the hidden state: arguments, then parameters (after any unshard)."""
        return [*(tensor for tensor in self._arguments() if tensor.requires_grad), *self._trainable]

    def evaluate(self, hidden: torch.Tensor) -> tuple[torch.Tensor, States]:
        """Evaluate the branch for the first time.

        Args:
            hidden: Input of the layer, `[batch, tokens, width]`.

        Returns:
            The branch's value, in the shape of the input, and new keys, values and states, all without a graph.
        """
        # Gradients are on, as in the second evaluation, because attention libraries choose their kernels by that. What
        # autograd would save is dropped at once, so that the layers' activations do not pile up.
        leaf = hidden.detach().requires_grad_()
        leaf.register_hook(_refuse_capture)
        with self._surroundings.recorded(), torch.enable_grad(), _nothing_saved():
            branch, new_states = self._call(leaf, self._leaves, self._past)
        if not self._evaluated_once:
            refuse_outside_tensors(f"a {type(self.layer).__name__}", (branch, *new_states), [leaf, *self.inputs()])
        return branch.detach(), tuple(state.detach() for state in new_states)

    def evaluate_again(self, hidden: torch.Tensor) -> tuple[torch.Tensor, States, list[torch.Tensor]]:
        """Evaluate the branch a second time, with a graph.

        Args:
            hidden: The reconstructed input, `[batch, tokens, width]`, a leaf.

        Returns:
            The branch's value, new keys, values and states, and the leaves that receive gradients, in the order of
            `[hidden, *inputs()]`.

        Raises:
            RuntimeError: A parameter, an argument or a setting of the layer was changed since the first evaluation.
        """
        self._check_unmodified()
        substitutes: list[torch.Tensor] = []

        def leaf_of(argument):
            if not (isinstance(argument, torch.Tensor) and argument.requires_grad):
                return argument
            substitutes.append(argument.detach().requires_grad_())
            return substitutes[-1]

        arguments = [leaf_of(argument) for argument in self._leaves]
        past = {name: leaf_of(tensor) for name, tensor in self._past.items()}
        with self._surroundings.restored(), torch.enable_grad():
            branch, new_states = self._call(hidden.requires_grad_(), arguments, past)
        return branch, new_states, [hidden, *substitutes, *self._trainable]

    def value_again(self, hidden: torch.Tensor) -> torch.Tensor:
        """Evaluate the branch a second time, outside the layer's own backward pass.

        Args:
            hidden: The reconstructed input, `[batch, tokens, width]`, a leaf.

        Returns:
            The branch's value alone, without a graph.
        """
        with fsdp.gathered(self.layer):
            branch, _, _ = self.evaluate_again(hidden)
        return branch.detach()

    def write_states(self, new_states: Sequence[torch.Tensor]) -> None:
        """Hand on what the layer keeps of this pass: to the cache that the caller passed, and to layers above.

        Args:
            new_states: Keys, values and states, outputs of the layer's autograd node beside the hidden state.
        """
        states = list(new_states)
        for name in reversed(self._left):
            self._shared[name] = tuple(states[-2:])
            del states[-2:]
        if states:
            append_to(self._cache, dict(zip(self._names, states, strict=True)), self._cache_index)

    def _call(self, hidden, leaves, past):
        """The branch's value; and new keys and values, those for the cache before those for layers above."""
        kwargs = tree_unflatten(leaves, self._structure)
        view = PastKeysValues(past, self._tokens_before)
        if self._cache is not None:
            kwargs[self._cache_name] = view
        before = dict(kwargs.get(SHARED_STATES) or {})
        branch = self._branch(self.layer, hidden, kwargs)
        self._names = tuple(view.new)
        if self._shared is None:
            return branch, tuple(view.new.values())
        after = kwargs[SHARED_STATES]
        self._left = [name for name, states in after.items() if states is not before.get(name)]
        return branch, (*view.new.values(), *(state for name in self._left for state in after[name]))

    def _check_unmodified(self):
        parameters, modes, hooks = _watched_parts(self.layer)
        # Not their order: a module that parametrises some for a while puts these back behind the others.
        if {id(p) for p in self._parameters} != {id(p) for p in parameters}:
            raise RuntimeError(
                f"the parameters of a {type(self.layer).__name__} are other tensors than in the forward pass. With "
                "functional_call, run backward inside of it too. FullyShardedDataParallel does this with "
                "use_orig_params=True: use fully_shard (FSDP2: fsdp_version=2 in accelerate), or "
                "use_orig_params=False."
            )
        if modes != self._modes or not self._hooks <= hooks:
            raise RuntimeError(
                f"a {type(self.layer).__name__} is not set as it was in the forward pass: train() or eval(), the "
                "active adapters, requires_grad or a hook changed. Run backward before changing it."
            )
        for tensor, version in self._watched:
            if tensor._version != version:
                names = [name for name, p in self.layer.named_parameters() if p is tensor]
                what = f"parameter {names[0]!r}" if names else "an argument (mask, positions or cache)"
                raise RuntimeError(
                    f"{what} of a {type(self.layer).__name__} was modified in place between the forward and the "
                    "backward pass; the layer's input cannot be reconstructed. Run backward before the optimizer "
                    "step (or whatever changed it)."
                )


def _watched_parts(layer):
    """Parameters, modes and hooks of a layer, on which the second evaluation depends.

    Hooks that are added after the first evaluation change nothing (transformers adds some to capture outputs), nor do
    those of the layer itself, which run around the branch.
    """
    # One walk over the modules: it takes a good part of a small layer's time, and `parameters()` would walk again.
    modules = list(layer.modules())
    parameters = list(dict.fromkeys(p for m in modules for p in m._parameters.values() if p is not None))
    modes = [(m.training, _active_adapters(m)) for m in modules]
    trainable = {id(p) for p in parameters if p.requires_grad}
    inside = (m for m in modules if m is not layer)
    hooks = {(id(m), key) for m in inside for own in (m._forward_hooks, m._forward_pre_hooks) for key in own}
    return parameters, (modes, trainable), hooks


def _active_adapters(module):
    """Names of the active adapters of a module of PEFT's; () of one by somebody else with parts of the same names."""
    return tuple(getattr(module, "active_adapters", ())) if "lora_A" in module._modules else None


def refuse_outside_tensors(where: str, outputs: Iterable[torch.Tensor], known: Sequence[torch.Tensor]) -> None:
    """Refuse tensors that require a gradient, and are neither arguments nor parameters of a layer or a segment.

    Args:
        where: Name of the layer or the segment, for the message.
        outputs: Tensors that the first evaluation returned, with their graph.
        known: Tensors that gradients are delivered to.

    Raises:
        ValueError: Such a tensor had a part in the outputs.
    """
    leaves = {id(tensor) for tensor in known}
    # The graph of an argument that is no leaf is somebody else's.
    seen: set[Any] = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    waiting = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in leaves:
            raise ValueError(
                f"a tensor {list(leaf.shape)} that requires a gradient enters {where} from outside (by a hook, say) "
                "and would get none. Register it as a parameter, or pass it as an argument."
            )
        waiting += [function for function, _ in node.next_functions if function is not None]


def _nothing_saved():
    return saved_tensors_hooks(lambda tensor: None, _refuse_capture)


def _refuse_capture(_):
    raise RuntimeError(
        "a tensor captured inside a reversible layer (by a hook, say) has a part in the loss, and carries no gradient "
        "there. Use output_hidden_states, compute that loss inside the layer, or call restore(model)."
    )
