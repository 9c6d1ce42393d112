"""`Memory`: what a model keeps of the histories that it has compressed, and its memory file."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from . import file as memory_file
from .layout import MemoryLayout, Origin
from .prefix import Prefix, prefix_of
from .recurrent import Carried, joined_states, rows_of
from .states import BATCH, SLOTS, empty_states, joined_ages, uploaded, widened, without_gaps
from .tensors import is_label, memory_from


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """The memory of a batch of histories; made by `R3MemModel.compress`. No operation changes it in place.

    Attributes:
        states: What a model reads, on any device. With placement "every_layer": keys (without positions) and values
            of the memory tokens in each layer, `[layers, 2, B, kv_heads, N, head_dim]`. With placement "input":
            hidden states that stand before the first layer, `[B, N, hidden_size]`. N is the same for all rows: a row
            with fewer memory tokens has zeros before them.
        num_segments: Compressed segments of each row, int64 `[B]`, on the CPU.
        tokens_seen: Tokens of each row, the unfinished ones included, int64 `[B]`, on the CPU.
        unfinished: Token ids of each row's last segment, if it is not read yet: int64 `[n]`, on the CPU.
        recent: Token ids that come before the unfinished ones and are read again with them: at most
            `segment_overlap` for each row, int64 `[n]`, on the CPU.
        labels: Label of each row, `(level, name)` such as ("document", "chapter 1"), or None.
        layout: Sizes and settings that it was made with.
        origin: Fingerprints of what it was made with.
        ages: Tokens from each slot of a matched memory to the first token behind it, int32
            `[layers, B, kv_heads, N]`, on the states' device, 0 where a head has none; None: the slots stand right
            before it, in order.
        slots: Slots that each row of a matched memory has, int64 `[B]`, on the CPU; None: its segments say it. Where
            heads have other numbers of them (`memory_allocation`), those of the head that has most.
        pinned: Tokens at the beginning of each row whose slots a matched memory keeps as they are, beside its budget,
            int64 `[B]`, on the CPU; None: none.
        carried: States of recurrent and convolutional layers, by layer and name ("3.conv.0", "3.recurrent.0"),
            `[B, ...]` each, on the states' device, in the dtypes in which the layers keep them; None: no layer is one.
            `states` and `ages` are then those of the layers that have keys and values, in order.
        refined: Steps by which each row's values were tuned to its own text, int64 `[B]`, on the CPU; None: by none.
    """

    states: torch.Tensor
    num_segments: torch.Tensor
    tokens_seen: torch.Tensor
    unfinished: tuple[torch.Tensor, ...]
    recent: tuple[torch.Tensor, ...]
    labels: tuple[tuple[str, str] | None, ...]
    layout: MemoryLayout
    origin: Origin
    ages: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    pinned: torch.Tensor | None = None
    carried: Carried | None = None
    refined: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.num_segments)

    def __repr__(self) -> str:
        placement, dtype = self.layout.placement, str(self.states.dtype).removeprefix("torch.")
        return (
            f"Memory(rows={len(self)}, segments={self.num_segments.tolist()}, tokens={self.tokens_seen.tolist()}, "
            f"{placement}, {dtype}, {self.nbytes} bytes)"
        )

    @property
    def device(self) -> torch.device:
        """Device of the states."""
        return self.states.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors of its file, by name.

        Returns:
            `states`, `num_segments`, `tokens_seen`, `unfinished` (the ids of all rows, joined) and
            `unfinished_lengths` (their number in each row, int64 `[B]`); with a segment overlap also `recent` and
            `recent_lengths`; of a matched memory also `ages` and `slots`, `pinned` and `refined` if any is, and what
            it carries, as `carried.3.conv.0`. Where heads have other numbers of slots, `states`, `ages` and
            `head_slots` are those of `states.without_gaps`, so that nothing is kept where there is no slot.
        """
        ragged = {"unfinished": self.unfinished}
        if self.layout.segment_overlap:
            ragged["recent"] = self.recent
        found = {"states": self.states, "num_segments": self.num_segments, "tokens_seen": self.tokens_seen}
        for name, rows in ragged.items():
            found[name] = torch.cat([*rows, torch.zeros(0, dtype=torch.int64)])
            found[f"{name}_lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        if self.ages is not None and self.slots is not None:
            found |= {"ages": self.ages, "slots": self.slots}
            if self.layout.is_adaptive:
                found |= without_gaps(self.states, self.ages)
            else:  # a row may have been one of others that have more
                unused = self.ages.shape[-1] - int(self.slots.max() if len(self) else 0)
                found |= {"states": self.states[..., unused:, :], "ages": self.ages[..., unused:]}
        if self.pinned is not None:
            found["pinned"] = self.pinned
        if self.refined is not None:
            found["refined"] = self.refined
        return found | {f"{memory_file.CARRIED}{name}": state for name, state in (self.carried or {}).items()}

    def pinned_slots(self) -> torch.Tensor:
        """Tokens at the beginning of each row whose slots stay as they are, int64 `[B]`, on the CPU."""
        return torch.zeros(len(self), dtype=torch.int64) if self.pinned is None else self.pinned

    def visible(self) -> torch.Tensor:
        """Mask of the memory tokens that each row has: bool `[B, N]`, on the memory's device."""
        return uploaded(self.visible_on_host(), self.device)

    def visible_on_host(self) -> torch.Tensor:
        """Mask of the memory tokens that each row has: bool `[B, N]`, on the CPU."""
        slots = self.states.shape[SLOTS[self.layout.placement]]
        kept = self.slots
        if kept is None:
            kept = self.num_segments.clamp_max(self.layout.readable_segments) * self.layout.num_memory_tokens
        return torch.arange(slots) >= slots - kept[:, None]

    def to(self, *args: Any, **kwargs: Any) -> "Memory":
        """Copy of it with the states on another device or in another dtype; what it carries keeps its dtypes.

        Args:
            args: Arguments of `Tensor.to`.
            kwargs: Keyword arguments of `Tensor.to`.
        """
        states = self.states.to(*args, **kwargs)
        ages = None if self.ages is None else self.ages.to(states.device)
        carried = self.carried and {name: state.to(states.device) for name, state in self.carried.items()}
        return dataclasses.replace(self, states=states, ages=ages, carried=carried)

    def detach(self) -> "Memory":
        """Copy of it with states that carry no gradient."""
        carried = self.carried and {name: state.detach() for name, state in self.carried.items()}
        return dataclasses.replace(self, states=self.states.detach(), carried=carried)

    def to_cache(self, model: Any) -> Any:
        """A cache to be passed to the base model of `model`, or to its `generate`.

        The argument is called `cache`, and `past_key_values` where transformers is older than 5.24. Unfinished tokens
        are not in it: `R3MemModel.generate` reads them before the prompt.

        Args:
            model: The `R3MemModel` that the memory was made with.
        """
        return model.cache_of(self)

    def to_prefix(self, model: Any, first_position: int | None = None) -> "Prefix":
        """The keys and values of a matched memory at their positions, for other engines; see `prefix_of`.

        Args:
            model: The `R3MemModel` that the memory was made with.
            first_position: Position of the first token behind it; None: the number of its slots.
        """
        return prefix_of(model, self, first_position)

    def labelled(self, labels: Sequence[tuple[str, str] | None]) -> "Memory":
        """Copy of it with other labels.

        Args:
            labels: A `(level, name)` or None for each row.

        Raises:
            ValueError: There is not one label for each row, or one is neither None nor two strings.
        """
        labels = tuple(labels)
        if len(labels) != len(self) or not all(map(is_label, labels)):
            raise ValueError(f"{len(self)} rows need as many labels, each (level, name) or None, got {labels!r}")
        return dataclasses.replace(self, labels=tuple(label and (label[0], label[1]) for label in labels))

    def select(self, level: str | None = None, name: str | None = None) -> "Memory":
        """Rows with a label.

        Args:
            level: Level that they have; None: any.
            name: Name that they have; None: any.

        Raises:
            KeyError: No row has such a label.
        """
        found = [
            row
            for row, label in enumerate(self.labels)
            if label is not None and level in (None, label[0]) and name in (None, label[1])
        ]
        if not found:
            raise KeyError(f"no memory with level={level!r}, name={name!r}; there are {list(self.labels)}")
        return self.rows(found)

    def rows(self, indices: Sequence[int]) -> "Memory":
        """Some of its rows, in the order that is asked for.

        Args:
            indices: Indices of the rows; one may come more than once.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        index, pick = uploaded(chosen, self.device), chosen.tolist()
        states = self.states.index_select(BATCH[self.layout.placement], index)
        return dataclasses.replace(
            self,
            states=states,
            num_segments=self.num_segments[chosen],
            tokens_seen=self.tokens_seen[chosen],
            unfinished=tuple(self.unfinished[i] for i in pick),
            recent=tuple(self.recent[i] for i in pick),
            labels=tuple(self.labels[i] for i in pick),
            ages=None if self.ages is None else self.ages.index_select(1, index),
            slots=None if self.slots is None else self.slots[chosen],
            pinned=None if self.pinned is None else self.pinned[chosen],
            carried=rows_of(self.carried, index),
            refined=None if self.refined is None else self.refined[chosen],
        )

    def __getitem__(self, row: int | slice | tuple[str | None, str | None]) -> "Memory":
        """One row by its index, several by a slice, or those with a label `(level, name)`."""
        if isinstance(row, tuple):
            return self.select(*row)
        if isinstance(row, slice):
            return self.rows(range(len(self))[row])
        return self.rows([range(len(self))[row]])

    def split(self) -> list["Memory"]:
        """One memory for each row."""
        return [self[row] for row in range(len(self))]

    @staticmethod
    def cat(memories: Sequence["Memory"]) -> "Memory":
        """Join the rows of several memories into one.

        Args:
            memories: The memories, one at least.

        Raises:
            ValueError: There is none, or they differ in model, tokenizer, layout, dtype or device.
        """
        if not memories:
            raise ValueError("there is no memory to put together")
        first = memories[0]
        for other in memories[1:]:
            for what, mine, its in (
                ("layout", first.layout, other.layout),
                ("model or tokenizer", first.origin, other.origin),
                ("dtype", first.states.dtype, other.states.dtype),
                ("device", first.device, other.device),
            ):
                if mine != its:
                    raise ValueError(f"memories of one batch must have the same {what}: {mine} and {its}")
        placement = first.layout.placement
        slots = max(memory.states.shape[SLOTS[placement]] for memory in memories)
        return dataclasses.replace(
            first,
            states=torch.cat([widened(m.states, slots, placement) for m in memories], BATCH[placement]),
            num_segments=torch.cat([m.num_segments for m in memories]),
            tokens_seen=torch.cat([m.tokens_seen for m in memories]),
            unfinished=sum((m.unfinished for m in memories), ()),
            recent=sum((m.recent for m in memories), ()),
            labels=sum((m.labels for m in memories), ()),
            ages=joined_ages([m.ages for m in memories], slots),
            slots=None if first.slots is None else torch.cat([m.slots for m in memories if m.slots is not None]),
            pinned=_counts(memories, "pinned"),
            carried=joined_states([m.carried for m in memories]),
            refined=_counts(memories, "refined"),
        )

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file, whole or not at all.

        Args:
            path: The file, replaced if it is there. Folders above it are made.
        """
        metadata = {
            "kind": memory_file.KIND,
            "format_version": self._format_version(),
            "digest": memory_file.NO_DIGEST,
            "layout": self.layout.to_dict(),
            "origin": dataclasses.asdict(self.origin),
            "labels": self.labels,
        }
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors().items()}
        memory_file.write(path, to_safetensors(tensors, {memory_file.METADATA: json.dumps(metadata)}))

    def _format_version(self):
        if self.layout.is_adaptive:
            return memory_file.ADAPTIVE_VERSION
        if self.carried is not None:
            return memory_file.CARRIED_VERSION
        return memory_file.FORMAT_VERSION if self.slots is None else memory_file.MATCHED_VERSION

    @classmethod
    def load(cls, path: str | Path, model: Any = None, *, device: str | torch.device = "cpu") -> "Memory":
        """Read a file that `save` wrote.

        Args:
            path: The file.
            model: The `R3MemModel` that the memory must have been made with; None: this is not checked.
            device: Where its states go.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is damaged, of another format, or of another model.
        """
        metadata = memory_file.read_header(path).metadata
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                memory = memory_from(cls, metadata, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is no memory that this version of r3mem_fast can read: {error}") from None
        if model is not None:
            model.check_memory(memory)
        return memory


def _counts(memories, name):
    """Join counts of the rows of several memories, int64 `[B]`, where None stands for zeros; None if all are None."""
    found = [getattr(memory, name) for memory in memories]
    if all(counts is None for counts in found):
        return None
    rows = zip(memories, found, strict=True)
    return torch.cat([torch.zeros(len(m), dtype=torch.int64) if counts is None else counts for m, counts in rows])


def empty_memory(
    layout: MemoryLayout,
    origin: Origin,
    rows: int,
    sizes: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    pinned: int = 0,
    carried: Carried | None = None,
) -> Memory:
    """The memory of nothing.

    Args:
        layout: Its layout.
        origin: What it is made with.
        rows: Number of rows.
        sizes: See `empty_states`.
        dtype: Dtype of its states.
        device: Their device.
        pinned: See `Memory.pinned`; the same for all rows.
        carried: See `Memory.carried`.
    """
    states, none = empty_states(layout, rows, sizes, dtype=dtype, device=device), torch.zeros(rows, dtype=torch.int64)
    nothing = (none[:0],) * rows
    matched = layout.writer == "matched"
    ages = states.new_zeros(*states.shape[:1], *states.shape[2:5], dtype=torch.int32) if matched else None
    slots, pins = none.clone() if matched else None, torch.full_like(none, pinned) if pinned else None
    labels = (None,) * rows
    return Memory(states, none, none.clone(), nothing, nothing, labels, layout, origin, ages, slots, pins, carried)
