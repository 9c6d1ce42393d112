"""Every variant of every coupling kernel that training or inference launches: what the benchmarks go through."""

from dataclasses import dataclass

import torch

from r3mem_fast.kernels import coupling
from r3mem_fast.kernels.coupling import reference

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FRACTION_BITS = 14
BITS_ABOVE = 4
_INT32 = (-(2**24), 2**24)  # streams that leave room for what is added


@dataclass(frozen=True)
class Case:
    """One variant. operation: the function of the implementing module. bits: side bits, None for the first layer.

    variant: of momentum_forward `training`, `first` (the layer where the backward pass ends: takes checksums of the
    streams) or `inference` (keeps nothing); of momentum_backward `training`, `first` or `values` (no gradients);
    of momentum_gradient `training` or `top`.
    """

    operation: str
    variant: str
    bits: int | None
    dtype: torch.dtype

    @property
    def name(self):
        """Name of the case, for tables."""
        return f"{self.operation}/{self.variant}"

    @property
    def fields(self):
        """What a record says of the case."""
        return {"kernel": self.name, "dtype": str(self.dtype).removeprefix("torch."), "bits": self.bits}

    def launch(self, target, numel=1 << 24):
        """Its launch, the same on every target: of sizes divisible by 16, as every model's are."""
        from r3mem_fast.kernels.coupling import triton as implementation

        tensors, settings = self.inputs(numel, "meta")
        return getattr(implementation, f"plan_{self.operation}")(*tensors.values(), **settings)[0]

    def inputs(self, numel, device):
        """`(tensors by name, settings)` of a call, random where values matter."""
        seed = torch.Generator().manual_seed(0) if device == "cpu" else None

        def values(dtype):
            if device == "meta":
                return torch.empty(numel, dtype=dtype, device=device)
            return torch.randn(numel, device=device, generator=seed).to(dtype)

        def stream():
            if device == "meta":
                return torch.empty(numel, dtype=torch.int32, device=device)
            return torch.randint(*_INT32, (numel,), dtype=torch.int32, device=device, generator=seed)

        def take(size, dtype):
            return torch.zeros(size, dtype=dtype, device=device)

        tiles = reference.num_tiles(numel)
        flags = coupling.new_flags(device)
        side = None if self.bits is None else take(coupling.side_bits_size(numel, self.bits), torch.uint8)
        settings = {"fraction_bits": FRACTION_BITS, "dtype": self.dtype, "bits": self.bits, "flags": flags}
        if self.operation == "momentum_enter":
            return {"hidden": values(self.dtype)}, {"fraction_bits": FRACTION_BITS, "flags": flags}
        if self.operation == "momentum_rewind":
            tensors = {"position": stream(), "velocity": stream()}
            return tensors, {"fraction_bits": FRACTION_BITS, "dtype": self.dtype}
        if self.operation == "momentum_forward":
            tensors = {"position": stream(), "velocity": stream(), "branch": values(self.dtype)}
            return tensors, {**settings, "keep": self.variant != "inference", "sum_streams": self.variant == "first"}
        if self.operation == "momentum_gradient":
            del settings["fraction_bits"]
            branch = values(self.dtype)
            tensors = {
                "grad_output": values(self.dtype),
                "grad_velocity": None if self.variant == "top" else values(torch.float32),
                "branch": branch,
                "sums": take(tiles, torch.int32) if device == "meta" else reference.branch_sums(branch),
            }
            return tensors, {**settings, "bits_above": BITS_ABOVE}
        tensors = {
            "position": stream(),
            "velocity": stream(),
            "branch": values(self.dtype),
            "side": side,
            "entry_sums": take(tiles, torch.int64) if self.variant == "first" else None,
            "grad_output": None if self.variant == "values" else values(self.dtype),
            "grad_branch": None if self.variant == "values" else values(self.dtype),
        }
        return tensors, {**settings, "last": self.variant == "first"}

    def call(self, module, tensors, settings):
        """Run the operation as `module` (reference or triton) implements it."""
        return getattr(module, self.operation)(*tensors.values(), **settings)

    def least_bytes(self, numel):
        """The least that must move: every input read once, every output written once, streams both.

        In the first layer v' does not depend on v, which is read only for a checksum.
        """
        float_bytes, tiles = self.dtype.itemsize, reference.num_tiles(numel)
        side = 0 if self.bits is None else coupling.side_bits_size(numel, self.bits)
        if self.operation == "momentum_enter":
            return numel * (float_bytes + 4 + 4 + float_bytes)
        if self.operation == "momentum_rewind":
            return numel * (4 + 4 + 4 + float_bytes)
        if self.operation == "momentum_gradient":
            carried = 0 if self.variant == "top" else 4
            return numel * (float_bytes + carried + float_bytes + 4 + float_bytes) + 4 * tiles
        streams = 8 + 8
        if self.operation == "momentum_forward":
            if self.bits is None and self.variant != "first":
                streams -= 4
            least = numel * (streams + 2 * float_bytes)
            if self.variant != "inference":
                least += side + 4 * tiles
            return least + (8 * tiles if self.variant == "first" else 0)
        least = numel * (streams + 2 * float_bytes) + side
        if self.variant == "first":  # neither position nor hidden is written
            least += 8 * tiles - numel * (4 + float_bytes)
        return least + (0 if self.variant == "values" else 3 * numel * float_bytes)


def cases(dtypes):
    """All of them for each dtype; bits from few to many, None (the first layer) before."""
    found = []
    for dtype in dtypes:
        found.append(Case("momentum_enter", "training", None, dtype))
        found.append(Case("momentum_forward", "first", None, dtype))
        found += [Case("momentum_forward", "training", bits, dtype) for bits in coupling.SIDE_BITS]
        found.append(Case("momentum_forward", "first", 4, dtype))
        found += [Case("momentum_forward", "inference", bits, dtype) for bits in (None, 4)]
        found.append(Case("momentum_rewind", "training", None, dtype))
        found += [Case("momentum_gradient", variant, 4, dtype) for variant in ("top", "training")]
        found += [Case("momentum_backward", "training", bits, dtype) for bits in coupling.SIDE_BITS]
        found += [Case("momentum_backward", "first", bits, dtype) for bits in (None, 4)]
        found.append(Case("momentum_backward", "values", 4, dtype))
    return found
