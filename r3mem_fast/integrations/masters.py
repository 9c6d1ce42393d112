"""`MasterAdamW`: AdamW with float32 master weights of parameters that are bfloat16 in the model.

A step of a small learning rate is often less than the distance from one bfloat16 number to the next, and would be
lost. So the steps are made in float32 copies, the masters, and rounded into the model. No optimizer of torch has them;
FSDP2 does (`MixedPrecisionPolicy`), and needs no such optimizer.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .scoped import holding

# Attribute of a parameter: `(its master, its version when it was rounded from that)`.
_MASTER = "r3mem_master"
_DTYPE = torch.bfloat16


class MasterAdamW(torch.optim.AdamW):
    """AdamW that makes the parameters it is given bfloat16, and steps float32 master weights of them.

    Adapters of a model whose weights are bfloat16 then compute in that dtype without autocast. Gradients of their
    parameters are float32 (`grad_dtype`), and are added in float32, over uses within a pass and over the passes of a
    step. Clip the gradients of the model's parameters, as with any optimizer. After each step the masters are rounded
    into the parameters, to the nearest number.

    `save_pretrained` and `state_dict` of an `R3MemModel` give the masters; `master_weights(model)` lets any model hold
    them while it is saved. The optimizer's own `state_dict` has them as "masters". Frozen parameters stay as they are.

    Args:
        params: Parameters, or groups of them, float32 or bfloat16.
        settings: Keyword arguments of `torch.optim.AdamW`.

    Raises:
        ValueError: A parameter has another dtype (float16 needs a scaled loss) or comes twice, or several processes
            train together.
    """

    def __init__(self, params: Any, **settings: Any):
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                "master weights in the optimizer are for one process: DDP adds up gradients in the dtype of the "
                "parameters. With fully_shard keep adapters in float32 and set MixedPrecisionPolicy("
                "param_dtype=torch.bfloat16, reduce_dtype=torch.float32), which has masters of its own"
            )
        groups = [params] if isinstance(params, torch.Tensor) else list(params)
        everything = [p for group in groups for p in (_parameters_of(group) if isinstance(group, dict) else [group])]
        _check_parameters([p[1] if isinstance(p, tuple) else p for p in everything])  # before any is changed
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        super().__init__(groups, **settings)
        # As hooks, because a `step` of its own would have every hook on it called twice.
        self.register_step_pre_hook(_hand_gradients_to_masters)
        self.register_step_post_hook(_round_masters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group` does; its parameters become bfloat16.

        Args:
            param_group: The parameters as "params", and settings of the group.

        Raises:
            ValueError: A parameter is neither float32 nor bfloat16.
        """
        given = _parameters_of(param_group)
        parameters = [p[1] if isinstance(p, tuple) else p for p in given]
        _check_parameters(parameters)
        masters = [self._master_for(parameter) for parameter in parameters]
        named = [(p[0], master) if isinstance(p, tuple) else master for p, master in zip(given, masters, strict=True)]
        super().add_param_group({**param_group, "params": named})
        for parameter, master in zip(parameters, masters, strict=True):
            if parameter.requires_grad:
                self._take(parameter, master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of the gradients of the model's parameters.

        Args:
            set_to_none: Whether they become None, or zero.
        """
        super().zero_grad(set_to_none)  # of frozen ones, which are their own masters
        for parameter in self._masters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `torch.optim.AdamW` returns, with the masters as "masters"."""
        return {**super().state_dict(), "masters": [master.detach() for master in self._masters.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that `state_dict` gave, and round its masters into the model.

        Args:
            state_dict: The state.

        Raises:
            ValueError: It has no masters, or not as many.
        """
        saved = state_dict.get("masters")
        if saved is None or len(saved) != len(self._masters):
            raise ValueError(
                f"the optimizer's state has {'no' if saved is None else len(saved)} master weights, and "
                f"{len(self._masters)} are wanted: it is of another optimizer or model"
            )
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "masters"})
        with torch.no_grad():
            for master, value in zip(self._masters.values(), saved, strict=True):
                master.copy_(value)
        _round_masters(self)

    def _master_for(self, parameter: nn.Parameter) -> nn.Parameter:
        """The master that a parameter gets, or has; for a frozen one it is the parameter itself."""
        if not parameter.requires_grad:
            return parameter
        if parameter in self._masters:
            return self._masters[parameter]
        # A parameter that has one goes on from it, as its own value is rounded.
        known = _master_of(parameter)
        return nn.Parameter(parameter.detach().float().clone()) if known is None else known

    def _take(self, parameter: nn.Parameter, master: nn.Parameter) -> None:
        """Make a parameter bfloat16, with a master."""
        self._masters[parameter] = master
        parameter.grad = None  # of another dtype, perhaps
        parameter.data = parameter.data.to(_DTYPE)
        parameter.grad_dtype = torch.float32
        _link(parameter, master)


def _parameters_of(group):
    """The parameters of a group, or pairs of names and parameters, as a list."""
    given = group["params"]
    if not isinstance(given, (torch.Tensor, list)):
        group["params"] = given = list(given)
    return [given] if isinstance(given, torch.Tensor) else given


def _check_parameters(parameters):
    """Raise ValueError for parameters that cannot have masters."""
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError("a parameter comes twice: in one group two times, or in two groups")
    for parameter in parameters:
        if parameter.requires_grad and parameter.dtype not in (torch.float32, _DTYPE):
            raise ValueError(f"master weights are for float32 and bfloat16 parameters, not for {parameter.dtype}")


@torch.no_grad()
def _hand_gradients_to_masters(optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    if any(closure is not None for closure in (*args[1:], *kwargs.values())):
        raise ValueError("MasterAdamW takes no closure: compute the loss and its gradients before step()")
    for parameter, master in optimizer._masters.items():
        if _master_of(parameter) is None:
            # Something else wrote it meanwhile (a checkpoint that was loaded), and training goes on from that.
            master.copy_(parameter)
        master.grad = parameter.grad


@torch.no_grad()
def _round_masters(optimizer: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
    parameters, masters = list(optimizer._masters), list(optimizer._masters.values())
    torch._foreach_copy_(parameters, masters)  # one kernel for all; and, unlike through `.data`, versions change
    for parameter, master in zip(parameters, masters, strict=True):
        master.grad = None
        _link(parameter, master)


def _link(parameter, master):
    setattr(parameter, _MASTER, (master, parameter._version))


def _master_of(parameter):
    """The master of a parameter; None if it has none, or was written since by something else than its optimizer."""
    master, version = getattr(parameter, _MASTER, (None, None))
    return master if parameter._version == version else None


def masters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Master weights of a model's parameters, by name of the parameter.

    Args:
        model: The model.

    Returns:
        float32 tensors, of those parameters that have one.
    """
    found = ((name, _master_of(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False))
    return {name: master.detach() for name, master in found if master is not None}


@torch.no_grad()
def load_masters(model: nn.Module, state: dict[str, torch.Tensor], prefix: str = "") -> None:
    """Let masters take over what is about to be loaded into their parameters, before it is rounded.

    Args:
        model: The model.
        state: Tensors by name, as `load_state_dict` takes them.
        prefix: What the names begin with.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        master, _ = getattr(parameter, _MASTER, (None, None))
        if master is not None and (loaded := state.get(prefix + name)) is not None:
            master.copy_(loaded)
            parameter.copy_(master)
            # One more than now, as loading will write it once more.
            setattr(parameter, _MASTER, (master, parameter._version + 1))


@contextlib.contextmanager
def master_weights(model: nn.Module) -> Iterator[None]:
    """Let a model hold its float32 master weights in the block, to be saved: a context manager.

    Args:
        model: A model that is trained with `MasterAdamW`; nothing happens to another one.

    Yields:
        Nothing.
    """
    masters = masters_of(model)
    with holding((parameter, masters[name]) for name, parameter in model.named_parameters() if name in masters):
        yield


def keep_master_weights(model: nn.Module) -> None:
    """Make parameters that `MasterAdamW` made bfloat16 float32 for good, with the values of their masters.

    Args:
        model: The model. Its optimizer is of no use afterwards.
    """
    masters = masters_of(model)
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, _MASTER):
            continue
        parameter.grad = None
        parameter.data = masters[name] if name in masters else parameter.data.float()
        delattr(parameter, _MASTER)
