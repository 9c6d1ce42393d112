"""How a Triton kernel is launched, and the same launch described for the ahead-of-time compiler."""

import contextvars
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .compat import threads_per_warp

# Triton specialises on pointers and integers that this divides; without it, it emits no wide access.
DIVISIBILITY = 16

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


class Launch(NamedTuple):
    """A kernel with all that it is launched with.

    Attributes:
        kernel: Function decorated with `triton.jit`.
        grid: Number of programs.
        arguments: Tensors (or None), tensor descriptors, integers and named tuples of integers, by parameter.
        constexprs: Values of the compile-time parameters.
        threads: Threads of a program.
        options: Options of the compiler.
        unspecialised: Parameters whose integers the compiler knows nothing of (`do_not_specialize`), so that one
            variant of the kernel serves all their values.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    constexprs: dict[str, Any]
    threads: int
    options: dict[str, Any]
    unspecialised: tuple[str, ...] = ()

    def run(self) -> None:
        """Launch on the current stream of the tensors' device; do nothing for an empty grid."""
        if not self.grid:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        if device.type != "cuda":
            self._run()
        else:  # Triton launches on the current device, whatever device the tensors are on
            with torch.cuda.device(device):
                self._run()

    def _run(self) -> None:
        # In a context of its own, so that the user's choice of an allocator stays what it is.
        contextvars.copy_context().run(self._run_with_allocator)

    def _run_with_allocator(self) -> None:
        triton.set_allocator(_allocate)
        warps = self.threads // threads_per_warp()
        self.kernel[(self.grid,)](**self.arguments, **self.constexprs, num_warps=warps, **self.options)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Allocate what a kernel asks for: memory on the current device for the tensor descriptors that it makes itself.

    PyTorch's allocator aligns to more than any kernel asks for, and gives the memory to later work of the stream only.
    """
    return torch.empty(size, dtype=torch.int8, device="cuda")


class Specialisation(NamedTuple):
    """What Triton compiles for a launch: the arguments of `triton.compiler.ASTSource`, and compiler options.

    Attributes:
        signature: Triton's types, by parameter; a named tuple of types for a named tuple.
        constexprs: Compile-time constants, by the parameter's position; with the position within it for a tuple.
        attrs: What is known of the other values, by the same.
        options: Options of the compiler.
    """

    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list]
    options: dict[str, Any]


def specialise(launch: Launch, threads_per_warp: int) -> Specialisation:
    """Determine the variant of its kernel that a launch would compile, by the rules of Triton's just-in-time compiler.

    Args:
        launch: The launch. Its tensors may be on the device `meta`: their addresses count as aligned.
        threads_per_warp: Threads of a warp of the target.

    Returns:
        The variant.
    """
    found = Specialisation({}, {}, {}, {**launch.options, "num_warps": launch.threads // threads_per_warp})

    def describe(path: tuple[int, ...], value: Any, specialised: bool) -> Any:
        """Return the value's type; note down at its path what else is known of it."""
        if isinstance(value, tuple):
            parts = (describe((*path, index), part, specialised) for index, part in enumerate(value))
            return type(value)(*parts)
        if isinstance(value, torch.Tensor):
            kind = "*" + _TYPES[value.dtype]
            divisible = value.device.type == "meta" or value.data_ptr() % DIVISIBILITY == 0
        elif isinstance(value, TensorDescriptor):  # its strides are divisible, and its sizes unknown to the compiler
            return f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, float):
            return "fp32"
        elif value is None or (value == 1 and specialised):  # constants to Triton
            found.constexprs[path] = value
            return "constexpr"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % DIVISIBILITY == 0 and specialised
        if divisible:
            found.attrs[path] = [["tt.divisibility", DIVISIBILITY]]
        return kind

    for position, name in enumerate(launch.kernel.arg_names):
        if name in launch.constexprs:
            found.signature[name] = "constexpr"
            found.constexprs[(position,)] = launch.constexprs[name]
        else:
            specialised = name not in launch.unspecialised
            found.signature[name] = describe((position,), launch.arguments[name], specialised)
    return found
