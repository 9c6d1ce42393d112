"""A tape: the operators that one run of a step dispatches, repeated on other tensors. Stands in for a CUDA graph.

What does not depend on the step's inputs is kept as it was, as a graph keeps what the host has decided. A step that
asks for values of what does depend on them cannot be recorded, as it could not be captured.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

ASKING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique")


class Tape(TorchDispatchMode):
    """Records operators on tensors that depend on some inputs."""

    def __init__(self, inputs):
        super().__init__()
        self._kept, self._numbers, self.calls = list(inputs), {id(x): n for n, x in enumerate(inputs)}, []

    def number_of(self, leaf):
        """The number of a tensor that depends on the inputs; None for anything else."""
        return self._numbers.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves, spec = tree_flatten((args, kwargs or {}))
        numbers = [self.number_of(leaf) for leaf in leaves]
        name = function.name().removeprefix("aten::")
        depends = any(number is not None for number in numbers)
        assert not (depends and name.startswith(ASKING)), f"the host asks a device: {name}"
        written = function._schema.is_mutable and depends
        # What is written to is made anew in each replay.
        leaves = [
            leaf.clone() if written and number is None and isinstance(leaf, torch.Tensor) else leaf
            for leaf, number in zip(leaves, numbers, strict=True)
        ]
        result = function(*args, **(kwargs or {}))
        if depends:
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.calls.append((function, leaves, numbers, spec, [self._new(output) for output in outputs]))
        return result

    def _new(self, tensor):
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._kept)
            self._kept.append(tensor)  # so that no other gets its id
        return self._numbers[id(tensor)]


def captured(step, inputs):
    """Stand in for `graphs.captured`."""
    inputs = [tensor.clone() for tensor in inputs]
    tape = Tape(inputs)
    with tape:
        results = step(*inputs)
    numbers = [tape.number_of(result) for result in results]

    def replay(*given):
        assert [(t.shape, t.dtype) for t in given] == [(t.shape, t.dtype) for t in inputs]
        made = dict(enumerate(tensor.clone() for tensor in given))
        for function, leaves, known, spec, outputs in tape.calls:
            written = function._schema.is_mutable
            found = [
                made[n] if n is not None else leaf.clone() if written and isinstance(leaf, torch.Tensor) else leaf
                for leaf, n in zip(leaves, known, strict=True)
            ]
            args, kwargs = tree_unflatten(found, spec)
            result = function(*args, **kwargs)
            made |= zip(outputs, (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)), strict=True)
        return tuple((result if n is None else made[n]).clone() for result, n in zip(results, numbers, strict=True))

    return replay
