"""Triton kernels of the momentum coupling: what `reference.py` specifies, one pass over memory each.

    kernel             reads, bytes an element              writes
    momentum_enter     hidden                               x 4, v 4, hidden
    momentum_forward   x 4, v 4, f                          x 4, v 4, hidden, side bits b/8
    momentum_rewind    x 4, v 4                             x 4, hidden
    momentum_gradient  g_x', g_v' 4, f                      g_v' 4, g_f
    momentum_backward  x 4, v 4, f, side b/8, g_x', J^T g   x 4, v 4, hidden, g_x

and 4 bytes a tile of 4096 elements for checksums. f, hidden and their gradients take 2 bytes (bf16, fp16) or 4.
A program owns one tile, so that neither atomics nor a second pass are needed and results are the same at every run.
Between `momentum_gradient` and `momentum_backward` of a layer stands that layer's own backward pass. Fusing the second
with the first of the layer below would save 2 of these 40 bytes; it would be wrong wherever something else than that
layer uses the hidden state, whose gradient autograd adds in between.

All are compiled with `enable_fp_fusion=False`: a fused multiply-add could quantise another value than the reference,
and another one forward than backward.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ..common.launch import Launch
from .fixed_point import CHECKSUM_MISMATCH, NON_FINITE, OUT_OF_RANGE, QUANTIZED_MAX, gain_of, momentum_of
from .tiles import POSITION_WEIGHT, TILE, VELOCITY_WEIGHT, num_tiles, side_bits_plane, side_bits_size

# Elements that a program takes at a time, four a thread: 16 bytes of a stream in one access, the same layout for every
# dtype, so that nothing is shuffled. It divides the smallest plane, TILE / 8.
_LANES = 512

_MAX_FINITE = tl.constexpr(3.4028234663852886e38)
_QUANTIZED_MAX = tl.constexpr(QUANTIZED_MAX)
_TWO_TO_23 = tl.constexpr(8388608.0)
_POSITION_WEIGHT = tl.constexpr(POSITION_WEIGHT)
_VELOCITY_WEIGHT = tl.constexpr(VELOCITY_WEIGHT)
_NON_FINITE = tl.constexpr(NON_FINITE)
_OUT_OF_RANGE = tl.constexpr(OUT_OF_RANGE)
_CHECKSUM_MISMATCH = tl.constexpr(CHECKSUM_MISMATCH)


@triton.jit
def _quantize(value, scale):
    """Compute `(Q, not finite, clamped)`, elementwise; scale is gain * 2**fraction_bits."""
    scaled = value.to(tl.float32) * scale
    size = tl.abs(scaled)
    # Half-even: at 2**23 the spacing of float32 is 1, so that the addition rounds to an integer. From there on every
    # float32 is one.
    rounded = tl.where(size < _TWO_TO_23, (size + _TWO_TO_23) - _TWO_TO_23, size)
    rounded = tl.where(size <= _QUANTIZED_MAX, rounded, _QUANTIZED_MAX)
    rounded = tl.where(scaled == scaled, rounded, 0.0)
    quantized = tl.where(scaled < 0, -rounded, rounded).to(tl.int32)
    return quantized, (size <= _MAX_FINITE) == 0, size > _QUANTIZED_MAX


@triton.jit
def _overflows(left, right, total):
    """Return whether a wrapping sum left the range: both summands differ in sign from it."""
    return ((left ^ total) & (right ^ total)) < 0


@triton.jit
def _events(not_finite, out_of_range):
    """Put both conditions into one integer, so that a loop carries one register for them."""
    return not_finite.to(tl.int32) | (out_of_range.to(tl.int32) << 1)


@triton.jit
def _set_flags(flags, events):
    """Set the flags of events, by plain stores: programs that set a flag all store the same."""
    tl.store(flags + _NON_FINITE, 1, mask=tl.max(events & 1, axis=0) != 0)
    tl.store(flags + _OUT_OF_RANGE, 1, mask=tl.max(events, axis=0) > 1)


@triton.jit
def _bit_pattern(value):
    """Return the bits of floats as signed integers of their width, in int32."""
    if value.dtype.primitive_bitwidth == 16:
        return value.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        return value.to(tl.int32, bitcast=True)


@triton.jit
def _wrapping_sum(value):
    """Sum modulo 2**32, through int64 because the interpreter raises where an int32 sum wraps."""
    return tl.sum(value.to(tl.int64), axis=0).to(tl.int32)


@triton.jit
def _weighted_streams(position, velocity, index):
    """Compute the summands of `stream_sums`; `index` counts the elements of their tile from 0."""
    odd = 2 * index + 1
    weighted = (odd * _POSITION_WEIGHT).to(tl.int64) * position.to(tl.int64)
    return weighted + (odd * _VELOCITY_WEIGHT).to(tl.int64) * velocity.to(tl.int64)


@triton.jit
def momentum_enter_kernel(
    hidden,
    position,
    velocity,
    output,
    flags,
    numel,
    scale,
    INVERSE: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Quantise a tile of the hidden state to the position, and clear the velocity."""
    start = tl.program_id(0).to(tl.int64) * TILE
    events = tl.zeros([LANES], tl.int32)
    for chunk in range(TILE // LANES):
        lane = chunk * LANES + tl.arange(0, LANES)
        mask = lane < numel - start
        x, not_finite, too_large = _quantize(tl.load(hidden + start + lane, mask=mask, other=0.0), scale)
        tl.store(position + start + lane, x, mask=mask)
        tl.store(velocity + start + lane, tl.zeros([LANES], tl.int32), mask=mask)
        tl.store(output + start + lane, (x.to(tl.float32) * INVERSE).to(output.dtype.element_ty), mask=mask)
        events |= _events(not_finite, too_large)
    _set_flags(flags, events)


@triton.jit
def momentum_forward_kernel(
    position,
    velocity,
    branch,
    hidden,
    side,  # None: no side bits are kept
    branch_sums,  # None: neither
    stream_sums,  # None: not taken here
    flags,
    numel,
    last_plane,  # bytes that the side bits of a short last tile take
    scale,  # a number, not a constant: layers may have gains of their own
    INVERSE: tl.constexpr,
    BITS: tl.constexpr,  # 0: the first layer
    PLANES: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Run one layer forward on a tile."""
    PLANE: tl.constexpr = TILE // PLANES
    program = tl.program_id(0).to(tl.int64)
    start = program * TILE
    # Elements from plane to plane: a short tile is packed into as few bytes as it needs.
    stride = tl.where(numel - start < TILE, last_plane, PLANE)
    events = tl.zeros([LANES], tl.int32)
    sums = tl.zeros([LANES], tl.int32)
    mixed = tl.zeros([LANES], tl.int64)
    for chunk in range(PLANE // LANES):
        lane = chunk * LANES + tl.arange(0, LANES)
        packed = tl.zeros([LANES], tl.int32)
        # Both planes of 4 side bits at a time, but not all eight of one: a thread would need 250 registers.
        for plane in tl.range(PLANES, loop_unroll_factor=2 if PLANES == 2 else 1):
            first = start + plane * stride  # of this plane
            mask = lane < numel - first
            if PLANES > 1:
                mask = mask & (lane < stride)
            x = tl.load(position + first + lane, mask=mask, other=0)
            f = tl.load(branch + first + lane, mask=mask, other=0.0)
            if BITS > 0 or stream_sums is not None:
                v = tl.load(velocity + first + lane, mask=mask, other=0)
            if stream_sums is not None:
                mixed += _weighted_streams(x, v, plane * stride + lane)
            increment, not_finite, too_large = _quantize(f, scale)
            if BITS == 0:
                new_v = increment
            else:
                packed |= (v & ((1 << BITS) - 1)) << (plane * BITS)
                shifted = v >> BITS
                new_v = shifted + increment
                too_large |= _overflows(shifted, increment, new_v)
            new_x = x + new_v
            too_large |= _overflows(x, new_v, new_x)
            tl.store(velocity + first + lane, new_v, mask=mask)
            tl.store(position + first + lane, new_x, mask=mask)
            tl.store(hidden + first + lane, (new_x.to(tl.float32) * INVERSE).to(hidden.dtype.element_ty), mask=mask)
            events |= _events(not_finite, too_large)
            if branch_sums is not None:
                sums += _bit_pattern(f)
        if side is not None:
            tl.store(side + program * (TILE * BITS // 8) + lane, packed.to(tl.uint8), mask=lane < stride)
    if branch_sums is not None:
        tl.store(branch_sums + program, _wrapping_sum(sums))
    if stream_sums is not None:
        tl.store(stream_sums + program, tl.sum(mixed, axis=0))
    _set_flags(flags, events)


@triton.jit
def momentum_rewind_kernel(
    position, velocity, hidden, numel, INVERSE: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr
):
    """Compute `x = x' - v'` for a tile."""
    start = tl.program_id(0).to(tl.int64) * TILE
    for chunk in range(TILE // LANES):
        lane = chunk * LANES + tl.arange(0, LANES)
        mask = lane < numel - start
        x = tl.load(position + start + lane, mask=mask) - tl.load(velocity + start + lane, mask=mask)
        tl.store(position + start + lane, x, mask=mask)
        tl.store(hidden + start + lane, (x.to(tl.float32) * INVERSE).to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def momentum_gradient_kernel(
    grad_output,
    grad_velocity,
    branch,
    branch_sums,
    gradient,
    flags,
    numel,
    gain,  # of this layer, 1 - m or another one
    ABOVE: tl.constexpr,  # m of the layer above
    TOP: tl.constexpr,  # grad_velocity counts as 0 on entry
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Compute the gradient of a tile of the branch, and compare the tile's checksum."""
    program = tl.program_id(0).to(tl.int64)
    start = program * TILE
    sums = tl.zeros([LANES], tl.int32)
    for chunk in range(TILE // LANES):
        lane = chunk * LANES + tl.arange(0, LANES)
        sums += _bit_pattern(tl.load(branch + start + lane, mask=lane < numel - start, other=0.0))
    differs = _wrapping_sum(sums) != tl.load(branch_sums + program)
    tl.store(flags + _CHECKSUM_MISMATCH, 1, mask=differs)
    for chunk in range(TILE // LANES):
        lane = chunk * LANES + tl.arange(0, LANES)
        mask = lane < numel - start
        g_v = tl.load(grad_output + start + lane, mask=mask, other=0.0).to(tl.float32)
        if not TOP:
            g_v = tl.load(grad_velocity + start + lane, mask=mask, other=0.0) * ABOVE + g_v
        g_f = tl.where(differs, float("nan"), g_v * gain)
        tl.store(grad_velocity + start + lane, g_v, mask=mask)
        tl.store(gradient + start + lane, g_f.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def momentum_backward_kernel(
    position,
    velocity,
    branch,
    side,
    entry_sums,  # None: there is a layer below, else there is none
    grad_output,
    grad_branch,
    hidden,  # None where there is no layer below
    grad,  # None: no gradient is wanted
    flags,
    numel,
    last_plane,
    scale,
    INVERSE: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Cross one layer boundary backward on a tile."""
    PLANE: tl.constexpr = TILE // PLANES
    program = tl.program_id(0).to(tl.int64)
    start = program * TILE
    stride = tl.where(numel - start < TILE, last_plane, PLANE)
    mixed = tl.zeros([LANES], tl.int64)
    for chunk in range(PLANE // LANES):
        lane = chunk * LANES + tl.arange(0, LANES)
        if BITS > 0:
            packed = tl.load(side + program * (TILE * BITS // 8) + lane, mask=lane < stride, other=0).to(tl.int32)
        for plane in tl.range(PLANES, loop_unroll_factor=2 if PLANES == 2 else 1):
            first = start + plane * stride
            mask = lane < numel - first
            if PLANES > 1:
                mask = mask & (lane < stride)
            x = tl.load(position + first + lane, mask=mask, other=0)
            v = tl.load(velocity + first + lane, mask=mask, other=0)
            increment, _, _ = _quantize(tl.load(branch + first + lane, mask=mask, other=0.0), scale)
            v -= increment
            if BITS > 0:
                v = (v << BITS) | ((packed >> (plane * BITS)) & ((1 << BITS) - 1))
            tl.store(velocity + first + lane, v, mask=mask)
            if entry_sums is not None:
                mixed += tl.where(mask, _weighted_streams(x, v, plane * stride + lane), 0)
            else:
                below = x - v
                tl.store(position + first + lane, below, mask=mask)
                below = (below.to(tl.float32) * INVERSE).to(hidden.dtype.element_ty)
                tl.store(hidden + first + lane, below, mask=mask)
            if grad is not None:
                g = tl.load(grad_output + first + lane, mask=mask, other=0.0).to(tl.float32)
                g += tl.load(grad_branch + first + lane, mask=mask, other=0.0).to(tl.float32)
                tl.store(grad + first + lane, g.to(grad.dtype.element_ty), mask=mask)
    if entry_sums is not None:
        tl.store(flags + _CHECKSUM_MISMATCH, 1, mask=tl.sum(mixed, axis=0) != tl.load(entry_sums + program))


def plan_momentum_enter(
    hidden: torch.Tensor, *, fraction_bits: int, flags: torch.Tensor
) -> tuple[Launch, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Plan the launch of `momentum_enter`, and make its outputs.

    Args:
        hidden: Hidden state that enters the first layer.
        fraction_bits: Bits behind the binary point, 0 to 24.
        flags: int32 `[3]`.

    Returns:
        The launch, and `(position, velocity, hidden')`, which it will write.
    """
    hidden = hidden.contiguous()
    position = torch.empty_like(hidden, dtype=torch.int32)
    velocity, output = torch.empty_like(position), torch.empty_like(hidden)
    arguments = {"hidden": hidden, "position": position, "velocity": velocity, "output": output, "flags": flags}
    arguments["scale"] = 2.0**fraction_bits
    launch = _launch(momentum_enter_kernel, hidden.numel(), arguments, {"INVERSE": 2.0**-fraction_bits})
    return launch, (position, velocity, output)


def plan_momentum_forward(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    *,
    bits: int | None,
    fraction_bits: int,
    flags: torch.Tensor,
    dtype: torch.dtype,
    keep: bool = True,
    sum_streams: bool = False,
    gain: float | None = None,
) -> tuple[Launch, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
    """Plan the launch of `momentum_forward`, and make its outputs.

    Args:
        position: x, int32; becomes x'.
        velocity: v, int32; becomes v'.
        branch: f(x).
        bits: Side bits of an element; None for the first layer (m = 0).
        fraction_bits: Bits behind the binary point, 0 to 24.
        flags: int32 `[3]`.
        dtype: Dtype of the hidden state.
        keep: Whether the layer will be run backward.
        sum_streams: Whether to take the streams' checksums on entry.
        gain: Factor of the branch; None: 1 - m.

    Returns:
        The launch, and `(hidden, side, branch sums, stream sums)`, which it will write.
    """
    numel, device = position.numel(), position.device
    hidden = torch.empty_like(position, dtype=dtype)
    side = sums = entry_sums = None
    if keep:
        sums = torch.empty(num_tiles(numel), dtype=torch.int32, device=device)
        if bits is not None:
            side = torch.empty(side_bits_size(numel, bits), dtype=torch.uint8, device=device)
    if sum_streams:
        entry_sums = torch.empty(num_tiles(numel), dtype=torch.int64, device=device)
    arguments = {
        "position": position,
        "velocity": velocity,
        "branch": branch.contiguous(),
        "hidden": hidden,
        "side": side,
        "branch_sums": sums,
        "stream_sums": entry_sums,
        "flags": flags,
        "last_plane": 0 if side is None or bits is None else side_bits_plane(numel, bits),
        "scale": gain_of(gain, bits) * 2.0**fraction_bits,
    }
    constexprs = _bit_constexprs(bits, fraction_bits, packed=side is not None)
    return _launch(momentum_forward_kernel, numel, arguments, constexprs), (hidden, side, sums, entry_sums)


def plan_momentum_rewind(
    position: torch.Tensor, velocity: torch.Tensor, *, fraction_bits: int, dtype: torch.dtype
) -> tuple[Launch, torch.Tensor]:
    """Plan the launch of `momentum_rewind`, and make its output.

    Args:
        position: x', int32; becomes x.
        velocity: v', int32.
        fraction_bits: Bits behind the binary point, 0 to 24.
        dtype: Dtype of the hidden state.

    Returns:
        The launch, and the hidden state, which it will write.
    """
    hidden = torch.empty_like(position, dtype=dtype)
    arguments = {"position": position, "velocity": velocity, "hidden": hidden}
    constexprs = {"INVERSE": 2.0**-fraction_bits}
    return _launch(momentum_rewind_kernel, position.numel(), arguments, constexprs), hidden


def plan_momentum_gradient(
    grad_output: torch.Tensor,
    grad_velocity: torch.Tensor | None,
    branch: torch.Tensor,
    sums: torch.Tensor,
    *,
    bits: int | None,
    bits_above: int | None,
    flags: torch.Tensor,
    dtype: torch.dtype,
    gain: float | None = None,
) -> tuple[Launch, tuple[torch.Tensor, torch.Tensor]]:
    """Plan the launch of `momentum_gradient`, and make its outputs.

    Args:
        grad_output: `g_x'`.
        grad_velocity: `g_v'` of the layer above, float32; becomes that of this layer. None at the top.
        branch: f(x), recomputed.
        sums: `branch_sums` of the forward pass.
        bits: Side bits of this layer; None for m = 0.
        bits_above: Side bits of the layer above; None for m = 0.
        flags: int32 `[3]`.
        dtype: Dtype of the branch's gradient.
        gain: Factor of the branch in the forward pass; None: 1 - m.

    Returns:
        The launch, and `(g_f, g_v')`, which it will write.
    """
    top = grad_velocity is None
    grad_output = grad_output.contiguous()
    if grad_velocity is None:
        grad_velocity = torch.empty_like(grad_output, dtype=torch.float32)
    gradient = torch.empty_like(grad_velocity, dtype=dtype)
    arguments = {
        "grad_output": grad_output,
        "grad_velocity": grad_velocity,
        "branch": branch.contiguous(),
        "branch_sums": sums,
        "gradient": gradient,
        "flags": flags,
        "gain": gain_of(gain, bits),
    }
    # The layer above matters only below the top.
    constexprs = {"ABOVE": 0.0 if top else momentum_of(bits_above), "TOP": top}
    launch = _launch(momentum_gradient_kernel, grad_output.numel(), arguments, constexprs)
    return launch, (gradient, grad_velocity)


def plan_momentum_backward(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    side: torch.Tensor | None,
    entry_sums: torch.Tensor | None,
    grad_output: torch.Tensor | None,
    grad_branch: torch.Tensor | None,
    *,
    bits: int | None,
    fraction_bits: int,
    flags: torch.Tensor,
    dtype: torch.dtype,
    last: bool,
    gain: float | None = None,
) -> tuple[Launch, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Plan the launch of `momentum_backward`, and make its outputs.

    Args:
        position: x of this layer, int32; becomes that of the layer below, and stays with `last`.
        velocity: v' of this layer, int32; becomes v.
        branch: f(x), recomputed.
        side: Packed side bits of the forward pass; None if `bits` is.
        entry_sums: `stream_sums` of the forward pass; read with `last` only.
        grad_output: `g_x'`; None where no gradient is wanted.
        grad_branch: `J_f^T g_f`; None where `grad_output` is.
        bits: Side bits of this layer; None for m = 0.
        fraction_bits: Bits behind the binary point, 0 to 24.
        flags: int32 `[3]`.
        dtype: Dtype of the hidden state.
        last: Whether there is no layer below.
        gain: Factor of the branch in the forward pass; None: 1 - m.

    Returns:
        The launch, and `(hidden, g_x)`, which it will write; None where there is none.
    """
    numel = position.numel()
    hidden = None if last else torch.empty_like(position, dtype=dtype)
    grad = None
    if grad_output is not None and grad_branch is not None:
        grad_output, grad_branch = grad_output.contiguous(), grad_branch.contiguous()
        grad = torch.empty_like(grad_output, dtype=torch.result_type(grad_output, grad_branch))
    arguments = {
        "position": position,
        "velocity": velocity,
        "branch": branch.contiguous(),
        "side": side,
        "entry_sums": entry_sums if last else None,
        "grad_output": None if grad is None else grad_output,
        "grad_branch": grad_branch,
        "hidden": hidden,
        "grad": grad,
        "flags": flags,
        "last_plane": 0 if bits is None else side_bits_plane(numel, bits),
        "scale": gain_of(gain, bits) * 2.0**fraction_bits,
    }
    constexprs = _bit_constexprs(bits, fraction_bits, packed=bits is not None)
    return _launch(momentum_backward_kernel, numel, arguments, constexprs), (hidden, grad)


def _bit_constexprs(bits: int | None, fraction_bits: int, *, packed: bool) -> dict[str, Any]:
    """Return the constexprs that depend on the side bits, which the kernel reads or writes if they are `packed`."""
    planes = 8 // bits if packed and bits is not None else 1
    return {"INVERSE": 2.0**-fraction_bits, "BITS": bits or 0, "PLANES": planes}


def _launch(kernel: Any, numel: int, arguments: dict[str, Any], constexprs: dict[str, Any]) -> Launch:
    """Make a launch of one program a tile."""
    return Launch(
        kernel,
        grid=num_tiles(numel),
        arguments={**arguments, "numel": numel},
        constexprs={**constexprs, "TILE": TILE, "LANES": _LANES},
        threads=_LANES // 4,
        options={"enable_fp_fusion": False},
    )


def _launched(plan: Callable[..., tuple[Launch, Any]]) -> Callable[..., Any]:
    """Make a function that launches what `plan` plans; it takes and returns what the reference's function does."""

    def run(*tensors: Any, **settings: Any) -> Any:
        launch, outputs = plan(*tensors, **settings)
        launch.run()
        return outputs

    return run


# What the functions of these names in `reference.py` do.
momentum_enter = _launched(plan_momentum_enter)
momentum_forward = _launched(plan_momentum_forward)
momentum_rewind = _launched(plan_momentum_rewind)
momentum_gradient = _launched(plan_momentum_gradient)
momentum_backward = _launched(plan_momentum_backward)
