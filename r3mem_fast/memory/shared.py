"""`SharedMemories`: the memories of a batch's rows at their positions, each stored once however many rows read it."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from r3mem_fast.kernels.attention import MAX_DECODED, memory_attention, memory_decode, merge
from r3mem_fast.kernels.attention.shared import Readers, read_shared_memories, readers_of

from ..integrations.attention import SegmentMask, as_autocast, offset_of
from ..integrations.capture import replaced_attention
from .memory import Memory
from .prefix import placed_prefix
from .states import right_aligned, uploaded


@dataclasses.dataclass(frozen=True, eq=False)
class SharedMemories:
    """Matched memories of a base model, and the rows that read them. No operation changes it in place.

    Attributes:
        sources: What each of the N memories was made of, in order; rows read one memory if they have one source.
        of_rows: The memory of each row, a number below N.
        keys: Keys of each layer at their positions, `[N, kv_heads, M, head_dim]` each; a memory with fewer slots has
            them last.
        values: Values of each layer, likewise.
        counts: Number of slots of each memory.
        key_sources: For each layer of the model, the one whose keys and values it reads.
        device: Device of the model.
    """

    sources: tuple[Any, ...]
    of_rows: tuple[int, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    counts: tuple[int, ...]
    key_sources: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(
        cls, model: Any, memories: Sequence[Memory], sources: Sequence[Any], positions: torch.Tensor
    ) -> "SharedMemories":
        """Put memories to their positions.

        Args:
            model: The `R3MemModel` of which they are.
            memories: The memory of each row, of one row itself, of any dtype and on any device.
            sources: What each was made of. Of those that are one object the first is taken for all.
            positions: Positions of the tokens that are read first, int64 `[B, T]`.
        """
        if model.reader.keeps_latents():
            raise ValueError(
                f"a {type(model.plain_model).__name__} keeps latents, of which its attention makes keys and "
                "values, and no memory can be read beside these by several rows: use model.generate"
            )
        found: dict[int, int] = {}
        of_rows = tuple(found.setdefault(id(source), len(found)) for source in sources)
        firsts = [of_rows.index(number) for number in range(len(found))]
        # To the base model, layouts of memories differ in nothing but what may be written.
        layout, origin = model.reader.layout, model.origin()
        own = [memories[row].to(model.device, model.dtype) for row in firsts]
        together = Memory.cat([dataclasses.replace(memory, layout=layout, origin=origin) for memory in own])
        prefix = placed_prefix(model, together, model.reader.layout.first_position, read_with=positions)
        counts = tuple(together.visible_on_host().sum(1).tolist())
        values = tuple(tensor.clone() for tensor in prefix.values)  # alone, without the keys beside them
        stored = tuple(sources[row] for row in firsts)
        return cls(stored, of_rows, prefix.keys, values, counts, model.reader.key_sources(), model.device)

    def followed_by(self, others: "SharedMemories") -> "SharedMemories":
        """The memories of these rows and, below them, of others; what both have is stored once.

        Args:
            others: The memories of the other rows, at positions that fit these.
        """
        known = {id(source): number for number, source in enumerate(self.sources)}
        new = [number for number, source in enumerate(others.sources) if id(source) not in known]
        known |= {id(others.sources[number]): len(self.sources) + index for index, number in enumerate(new)}
        of_others = tuple(known[id(others.sources[number])] for number in others.of_rows)
        width = max(self._width, others._width)
        joined = dataclasses.replace(self, of_rows=self.of_rows + of_others)
        if not new:
            return joined
        index = torch.tensor(new, device=self.device)

        def stacked(mine, its):
            return tuple(
                torch.cat([right_aligned(a, width), right_aligned(b.index_select(0, index), width)])
                for a, b in zip(mine, its, strict=True)
            )

        return dataclasses.replace(
            joined,
            sources=self.sources + tuple(others.sources[number] for number in new),
            keys=stacked(self.keys, others.keys),
            values=stacked(self.values, others.values),
            counts=self.counts + tuple(others.counts[number] for number in new),
        )

    def rows(self, rows: Sequence[int]) -> "SharedMemories":
        """The memories of some of these rows, at least one; those that no row reads any more are left out.

        Args:
            rows: Indices of the rows, in their new order.
        """
        stay = sorted({self.of_rows[row] for row in rows})
        of_rows = tuple(stay.index(self.of_rows[row]) for row in rows)
        if len(stay) == len(self.sources):
            return dataclasses.replace(self, of_rows=of_rows)
        counts = tuple(self.counts[number] for number in stay)
        width, index = max(counts), torch.tensor(stay, device=self.device)

        def kept(tensors):
            return tuple(tensor[:, :, tensor.shape[2] - width :].index_select(0, index) for tensor in tensors)

        return dataclasses.replace(
            self,
            sources=tuple(self.sources[number] for number in stay),
            of_rows=of_rows,
            keys=kept(self.keys),
            values=kept(self.values),
            counts=counts,
        )

    @property
    def _width(self) -> int:
        return self.keys[0].shape[2]

    @functools.cached_property
    def _lengths(self) -> torch.Tensor | None:
        """Slots of each memory, on the device; None: all have as many."""
        if len(set(self.counts)) == 1:
            return None
        return uploaded(torch.tensor(self.counts, dtype=torch.int32), self.device)

    @functools.cached_property
    def _readers(self) -> Readers | None:
        """Which rows read which memory, on the device; None: each row has one of its own."""
        if self.of_rows == tuple(range(len(self.sources))):
            return None
        return Readers(*(uploaded(tensor, self.device) for tensor in readers_of(self.of_rows)))

    @contextlib.contextmanager
    def read_by(self, config: Any, starts: Sequence[int]) -> Iterator[None]:
        """Let a model's attention read these memories before its own keys in the block: a context manager.

        Args:
            config: Configuration of the decoder, as transformers made it.
            starts: Tokens of each row's own keys that are padding, the first ones.

        Raises:
            RuntimeError: After the block: a layer has not read them.
        """
        own_starts = uploaded(torch.tensor(starts, dtype=torch.int32), self.device) if any(starts) else None
        have_read: set[int] = set()

        def mask(*sizes: Any, **settings: Any) -> SegmentMask:
            return SegmentMask(None, segment_starts=own_starts)

        def attention(module: Any, query: torch.Tensor, key: Any, value: Any, mask: SegmentMask, **settings: Any):
            have_read.add(module.layer_idx)
            source = self.key_sources[module.layer_idx]
            tensors = as_autocast(query, key, value, self.keys[source], self.values[source])
            output = _attend(tensors, mask, self._lengths, self._readers, settings)
            return output.transpose(1, 2), None

        with replaced_attention(config, attention, mask):
            yield
        reading = {layer for layer, source in enumerate(self.key_sources) if source < len(self.keys)}
        if missing := sorted(reading - have_read):
            raise RuntimeError(
                f"the attention of layers {missing} is none of transformers' interchangeable functions, so it has not "
                "read the memories; use model.generate"
            )


def _attend(tensors, mask, lengths, readers, settings):
    """Attend to own keys and a layer's memories, `[B, heads, T, head_dim]`; tensors: the query, and both of each."""
    query, key, value, memory_key, memory_value = tensors
    scale = settings.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    given = {"scale": scale, "softcap": settings.get("softcap"), "sinks": settings.get("s_aux")}
    given["segment_starts"] = mask.segment_starts
    attend = memory_decode
    if query.shape[1] // key.shape[1] * query.shape[2] > MAX_DECODED:
        attend, given["query_offset"] = memory_attention, offset_of(mask, query, key)
    if not memory_key.shape[2]:
        return attend(query, key, value, **given)
    if readers is None:
        return attend(query, key, value, memory_key, memory_value, memory_lengths=lengths, **given)
    own = attend(query, key, value, **given, return_lse=True)
    common = {"memory_lengths": lengths, "scale": scale, "softcap": given["softcap"]}
    return merge(*own, *read_shared_memories(query, memory_key, memory_value, readers, **common))[0]
