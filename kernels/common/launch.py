"""How a Triton kernel is launched, and the same launch described for the ahead-of-time compiler."""

from typing import Any, NamedTuple

import torch

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

    grid: programs. arguments: tensors (or None) and integers, by parameter. constexprs: compile-time parameters.
    threads: of a program. options: of the compiler. unspecialised: integers of whose values the compiler knows nothing
    (`do_not_specialize`), so that one variant serves all of them.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    constexprs: dict[str, Any]
    threads: int
    options: dict[str, Any]
    unspecialised: tuple[str, ...] = ()

    def run(self):
        """Launch on the current stream of the tensors' device; an empty grid is nothing to do."""
        if not self.grid:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        if device.type != "cuda":
            self._run()
        else:  # Triton launches on the current device, whatever device the tensors are on
            with torch.cuda.device(device):
                self._run()

    def _run(self):
        warps = self.threads // threads_per_warp()
        self.kernel[(self.grid,)](**self.arguments, **self.constexprs, num_warps=warps, **self.options)


class Specialisation(NamedTuple):
    """What Triton compiles for a launch: the arguments of `triton.compiler.ASTSource`, and compiler options."""

    signature: dict[str, str]
    constexprs: dict[tuple[int], Any]
    attrs: dict[tuple[int], list]
    options: dict[str, Any]


def specialise(launch: Launch, threads_per_warp: int) -> Specialisation:
    """The variant of its kernel that `launch` would compile, by the rules of Triton's just-in-time compiler.

    Tensors may be on the device `meta`: their address counts as aligned. threads_per_warp: of the target.
    """
    signature, constexprs, attrs = {}, {}, {}
    for position, name in enumerate(launch.kernel.arg_names):
        if name in launch.constexprs or launch.arguments[name] is None:
            signature[name] = "constexpr"
            constexprs[(position,)] = launch.constexprs.get(name)
            continue
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            divisible = value.device.type == "meta" or value.data_ptr() % DIVISIBILITY == 0
        elif value == 1 and name not in launch.unspecialised:  # a constant to Triton
            signature[name] = "constexpr"
            constexprs[(position,)] = 1
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % DIVISIBILITY == 0 and name not in launch.unspecialised
        if divisible:
            attrs[(position,)] = [["tt.divisibility", DIVISIBILITY]]
    options = {**launch.options, "num_warps": launch.threads // threads_per_warp}
    return Specialisation(signature, constexprs, attrs, options)
