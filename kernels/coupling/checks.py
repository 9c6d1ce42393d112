"""Checks of the arguments of the coupling's functions."""

import torch

from .kept import Kept
from .tiles import num_tiles, side_bits_size

SIDE_BITS = (1, 2, 4, 8)
MAX_FRACTION_BITS = 24
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def describe(value: object) -> str:
    """Describe a value for an error message: a tensor by dtype and shape, anything else by its type."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(type(value).__name__)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError unless a dtype is a supported float."""
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be torch.bfloat16, float16 or float32, got {dtype}")


def check_float(name: str, value: torch.Tensor) -> None:
    """Raise TypeError unless a tensor is of a supported float."""
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {describe(value)}")


def check_alike(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless two tensors, given by name, agree in shape and device."""
    (first, left), (second, right) = tensors.items()
    if left.shape != right.shape:
        raise ValueError(f"{second} {list(right.shape)} and {first} {list(left.shape)} must agree")
    if left.device != right.device:
        raise ValueError(f"{second} on {right.device} and {first} on {left.device} must be on one device")


def check_layer(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    bits: int | None,
    fraction_bits: int,
    flags: torch.Tensor,
    dtype: torch.dtype,
    *,
    required: bool = False,
) -> None:
    """Raise TypeError or ValueError unless the arguments of a layer fit; with `required`, bits may not be None."""
    check_streams(position, velocity, branch)
    check_flags(flags, position)
    check_bits(bits, required=required)
    check_fraction_bits(fraction_bits)
    check_dtype(dtype)


def check_gradient(
    grad_output: torch.Tensor,
    branch: torch.Tensor,
    kept: Kept,
    flags: torch.Tensor,
    dtype: torch.dtype,
    grad_velocity: torch.Tensor | None = None,
) -> None:
    """Raise TypeError or ValueError unless the arguments of a branch's gradient fit; one changed in place, too."""
    check_float("branch", branch)
    check_float("grad_output", grad_output)
    check_flags(flags, branch)
    check_dtype(dtype)
    check_kept(kept, branch)
    check_alike(branch=branch, grad_output=grad_output)
    if grad_velocity is not None:
        check_alike(branch=branch, grad_velocity=grad_velocity)
        if grad_velocity.dtype != torch.float32 or not grad_velocity.is_contiguous():
            raise TypeError(f"grad_velocity must be a contiguous float32 tensor, got {describe(grad_velocity)}")


def check_gradients(branch: torch.Tensor, grad_output: torch.Tensor | None, grad_branch: torch.Tensor | None) -> None:
    """Raise TypeError or ValueError unless there are both gradients, and they fit, or neither."""
    if (grad_output is None) != (grad_branch is None):
        raise ValueError("grad_output and grad_branch must both be given, or neither")
    if grad_output is not None and grad_branch is not None:
        for name, gradient in (("grad_output", grad_output), ("grad_branch", grad_branch)):
            check_float(name, gradient)
            check_alike(branch=branch, **{name: gradient})


def check_flags(flags: torch.Tensor, like: torch.Tensor) -> None:
    """Raise ValueError unless `flags` is as `new_flags` makes it, on the device of `like`."""
    if flags.dtype != torch.int32 or flags.shape != (3,) or not flags.is_contiguous() or flags.device != like.device:
        raise ValueError(
            f"flags must be contiguous int32 [3] on {like.device}, got {describe(flags)} on {flags.device}"
        )


def check_kept(
    kept: Kept, like: torch.Tensor, *, bits: int | None = None, side: bool = False, entry_sums: bool = False
) -> None:
    """Raise ValueError unless the fields that a function reads fit the stream `like`; a kernel does not look.

    Args:
        kept: What a forward pass left.
        like: A tensor of the streams' shape and device.
        bits: Side bits of the layer.
        side: Whether the side bits are read, in place of the branch's checksums.
        entry_sums: Whether the streams' checksums are read.

    Raises:
        ValueError: If a field has another dtype, size or device, or is not contiguous.
    """
    numel = like.numel()
    wanted = [("branch_sums", torch.int32, num_tiles(numel), "")]
    if side:
        wanted = [("side", torch.uint8, 0 if bits is None else side_bits_size(numel, bits), f" for {bits} side bits")]
    if entry_sums:
        wanted.append(("entry_sums", torch.int64, num_tiles(numel), ", of a forward pass with sum_streams=True"))
    for name, dtype, size, note in wanted:
        value = getattr(kept, name)
        if value.dtype != dtype or value.shape != (size,) or value.device != like.device or not value.is_contiguous():
            raise ValueError(
                f"kept.{name} must be contiguous {dtype} [{size}] on {like.device}{note}, "
                f"got {describe(value)} on {value.device}"
            )


def check_streams(position: torch.Tensor, velocity: torch.Tensor, branch: torch.Tensor | None = None) -> None:
    """Raise TypeError or ValueError unless the streams, and the branch if there is one, fit each other."""
    for name, stream in (("position", position), ("velocity", velocity)):
        if stream.dtype != torch.int32 or not stream.is_contiguous():
            raise TypeError(f"{name} must be a contiguous int32 tensor, got {describe(stream)}")
    check_alike(position=position, velocity=velocity)
    if branch is not None:
        check_float("branch", branch)
        check_alike(position=position, branch=branch)


def check_bits(bits: int | None, *, required: bool = False) -> None:
    """Raise ValueError unless there can be so many side bits; with `required`, None is refused, too."""
    if bits is None and required:
        raise ValueError(f"bits must be one of {SIDE_BITS}: no layer of the inverse form has m = 0")
    if bits is not None and bits not in SIDE_BITS:
        raise ValueError(f"bits must be one of {SIDE_BITS}, or None for a layer with m = 0, got {bits!r}")


def check_fraction_bits(fraction_bits: int) -> None:
    """Raise ValueError unless there can be so many bits behind the binary point."""
    if not 0 <= fraction_bits <= MAX_FRACTION_BITS:
        raise ValueError(f"fraction_bits must lie in 0..{MAX_FRACTION_BITS}, got {fraction_bits}")
