"""Tiles of streams: the packed format of side bits, and checksums.

A tile is `TILE` consecutive elements of a stream. Side bits are packed, and checksums summed, tile by tile, so that
one program of a kernel owns a tile and needs no other.
"""

from collections.abc import Iterator

import torch

# Number of elements of a tile. Part of the format of side bits and checksums.
TILE = 4096

# Odd 32-bit constants, signed, unlike each other: position and velocity, or two elements, cannot trade places.
POSITION_WEIGHT, VELOCITY_WEIGHT = -1640531535, -2048144777

# int64 temporaries of the stream checksum stay this small, whatever the length of the stream.
_TILES_AT_ONCE = 256


def num_tiles(numel: int) -> int:
    """Return the number of tiles of `numel` elements, the last of which may be short."""
    return -(-numel // TILE)


def side_bits_plane(numel: int, bits: int) -> int:
    """Return the bytes that the side bits of the last tile take, if it is short.

    Args:
        numel: Number of elements of a stream.
        bits: Side bits of an element: 1, 2, 4 or 8.

    Returns:
        A multiple of 16; 0 if `numel` elements leave no short tile.
    """
    rest = numel % TILE
    per_byte = 8 // bits
    return -(-rest // (16 * per_byte)) * 16


def side_bits_size(numel: int, bits: int) -> int:
    """Return the bytes that the packed side bits of a stream take.

    Args:
        numel: Number of elements of the stream.
        bits: Side bits of an element: 1, 2, 4 or 8.

    Returns:
        `numel * bits / 8`, rounded up by less than 16.
    """
    return numel // TILE * (TILE * bits // 8) + side_bits_plane(numel, bits)


def pack_side_bits(velocity: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the low bits of every element.

    They are planar within a tile: with P bytes a tile (TILE * bits / 8; `side_bits_plane` in a short last one), its
    byte i holds its elements i, i + P, i + 2P, ... from the byte's low bits up. A plane is contiguous, so that packing
    needs no shuffle, and both sides use wide accesses.

    Args:
        velocity: int32 tensor.
        bits: Side bits of an element: 1, 2, 4 or 8.

    Returns:
        uint8 `[side_bits_size(numel, bits)]`.
    """
    packed = torch.zeros(side_bits_size(velocity.numel(), bits), dtype=torch.uint8, device=velocity.device)
    for index, low, target in _planes(velocity.to(torch.uint8), packed, bits):
        target.bitwise_or_(low.bitwise_and((1 << bits) - 1).bitwise_left_shift_(index * bits))
    return packed


def unpack_side_bits_(velocity: torch.Tensor, packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Put packed side bits back into a velocity, in place: the inverse of `pack_side_bits`.

    Args:
        velocity: int32 tensor, whose low `bits` bits are 0.
        packed: What `pack_side_bits` returned.
        bits: Side bits of an element: 1, 2, 4 or 8.

    Returns:
        `velocity`.
    """
    mask = (1 << bits) - 1
    for index, plane, source in _planes(velocity, packed, bits):
        plane.bitwise_or_((source >> (index * bits)).bitwise_and_(mask))
    return velocity


def _planes(
    elements: torch.Tensor, packed: torch.Tensor, bits: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield `(index, elements, their bytes)` for every plane: views, of all full tiles and of a short last one."""
    flat = elements.view(-1)
    full = flat.numel() // TILE * TILE
    per_byte = 8 // bits
    if full:
        tiles = flat[:full].view(-1, per_byte, TILE // per_byte)
        for index in range(per_byte):
            yield index, tiles[:, index], packed[: full // per_byte].view(-1, TILE // per_byte)
    if full < flat.numel():
        rest = packed[full // per_byte :]
        for index, plane in enumerate(flat[full:].split(rest.numel())):
            yield index, plane, rest[: plane.numel()]


def stream_sums(position: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """Compute checksums of both streams: for each tile `sum_i p_i x_i + w_i v_i mod 2**64`.

    p_i = int32((2i + 1) POSITION_WEIGHT), w_i = int32((2i + 1) VELOCITY_WEIGHT), where i counts the elements of the
    tile from 0. Integer sums do not depend on the order of additions, so any implementation gives the same. An odd
    weight is invertible modulo 2**64: one changed element always changes a sum.

    Args:
        position: x, int32.
        velocity: v, int32.

    Returns:
        int64 `[num_tiles]`.
    """
    flat_x, flat_v = position.view(-1), velocity.view(-1)
    sums = torch.empty(num_tiles(flat_x.numel()), dtype=torch.int64, device=position.device)
    odd = torch.arange(1, 2 * TILE, 2, dtype=torch.int32, device=position.device)
    of_x, of_v = (odd * POSITION_WEIGHT).to(torch.int64), (odd * VELOCITY_WEIGHT).to(torch.int64)
    chunk = _TILES_AT_ONCE * TILE
    for start in range(0, flat_x.numel(), chunk):
        x, v = flat_x[start : start + chunk], flat_v[start : start + chunk]
        full = x.numel() // TILE
        target = sums[start // TILE :]
        mixed = x[: full * TILE].view(-1, TILE) * of_x
        torch.sum(mixed.addcmul_(v[: full * TILE].view(-1, TILE), of_v), dim=1, out=target[:full])
        if rest := x.numel() - full * TILE:
            target[full] = (x[full * TILE :] * of_x[:rest] + v[full * TILE :] * of_v[:rest]).sum()
    return sums


def branch_sums(branch: torch.Tensor) -> torch.Tensor:
    """Compute checksums of a branch, weaker and cheaper than those of streams: for each tile the sum of bit patterns.

    Patterns are signed integers of the element's width; sums are modulo 2**32. Values that agree bit for bit have the
    same checksums, and one changed bit always changes one.

    Args:
        branch: f(x), in bfloat16, float16 or float32.

    Returns:
        int32 `[num_tiles]`.
    """
    flat = branch.reshape(-1)
    flat = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
    full = flat.numel() // TILE
    sums = flat[: full * TILE].view(-1, TILE).sum(1, dtype=torch.int32)
    if full * TILE == flat.numel():
        return sums
    return torch.cat([sums, flat[full * TILE :].sum(dtype=torch.int32).view(1)])
