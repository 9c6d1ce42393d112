"""CUDA graphs: a step that the host has dispatched once, and the GPU repeats by itself."""

import os
from collections.abc import Callable, Sequence

import torch

VARIABLE = "R3MEM_GRAPHS"

# A function of tensors that gives tensors, of the same shapes at every call.
Step = Callable[..., tuple[torch.Tensor, ...]]


def are_wanted(device: torch.device) -> bool:
    """Whether steps that repeat are to be captured on a device: on a GPU, where R3MEM_GRAPHS is 1 or "diagonal".

    It is opt-in, because no GPU was at hand to measure what it gains.

    Args:
        device: The device.

    Raises:
        ValueError: The variable is none of 0, 1 and "diagonal", nor unset.
    """
    return _value() in ("1", "diagonal") and device.type == "cuda"


def are_diagonal() -> bool:
    """Whether histories are to be read by diagonals, on any device: R3MEM_GRAPHS=diagonal. Raises as `are_wanted`."""
    return _value() == "diagonal"


def _value():
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1", "diagonal"):
        raise ValueError(f'{VARIABLE} must be 0, 1 or "diagonal", or unset; it is {value!r}')
    return value


def captured(step: Step, inputs: Sequence[torch.Tensor]) -> Step:
    """Capture a step as a graph. Waits for the GPU, and frees what PyTorch keeps unused on it.

    Args:
        step: The step. It has run before, so that all its kernels are compiled, and neither waits for the GPU nor
            uploads anything.
        inputs: Tensors of the shapes and dtypes that all calls will have, all on one GPU.

    Returns:
        A function that copies its arguments to where the graph reads, runs it, and returns copies of the results.
    """
    static = [tensor.clone() for tensor in inputs]
    results: tuple[torch.Tensor, ...] = ()

    def run() -> None:
        nonlocal results
        results = step(*static)

    repeat = captured_in_place(run, static[0].device)

    def replay(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for to, tensor in zip(static, given, strict=True):
            to.copy_(tensor)
        repeat()
        return tuple(result.clone() for result in results)

    return replay


def captured_in_place(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture a step that changes tensors in place, as `captured` captures others.

    Args:
        step: The step, as `captured` takes it, but without arguments.
        device: The GPU on which it runs.

    Returns:
        A function that does what the step does, to the same tensors. The step has not run by being captured.
    """
    graph = torch.cuda.CUDAGraph()
    # On a stream of this device: PyTorch's own for captures belongs to the device that was the current one first, and
    # what runs on others is not captured. Other threads may do with CUDA what they like meanwhile.
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay
