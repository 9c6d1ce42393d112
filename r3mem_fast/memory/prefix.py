"""`Prefix`: a matched memory as what every engine reads, keys at their positions and values, right before a text.

A matched memory needs no mask, bias or adapter of its own: to the base model it is a text of N tokens that has been
read already. So transformers' own caches can hold it, dynamic ones and static ones (which can be compiled, and
captured as a graph), and so can the caches of other engines.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from transformers.cache_utils import Cache, StaticCache

from ..integrations.capture import SlotsOfHeads
from ..reversible.convert import text_config
from . import file as memory_file
from .masks import columns_in_use
from .room import roomy_cache
from .rotary import Rotation, is_rotary

KIND = "r3mem_fast prefix"


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values that every layer reads before a text; made by `Memory.to_prefix`.

    Attributes:
        keys: Keys of each layer that has some of its own (where the last layers read those of others, of the layers
            before these), at their positions (after the rotary embedding), `[B, kv_heads, N, head_dim]` each.
        values: Values of each layer, likewise. Of latent attention: latents in place of keys, and in place of values
            the part of the keys that is rotated.
        mask: Slots that each row has, the last ones, int64 `[B, N]`, 0 for those that it has not.
        tail: Token ids of each row that are read behind it, before all else, int64 `[n]`, on the CPU: the end of the
            history, which a memory keeps as it is.
        first_position: Position of the first token behind it.
        base: Fingerprint of the model that it is for.
        vocabulary: Number of token ids of the model.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    mask: torch.Tensor
    tail: tuple[torch.Tensor, ...]
    first_position: int
    base: str
    vocabulary: int

    def __len__(self) -> int:
        return self.mask.shape[1]

    def to_cache(self, config: Any, max_length: int | None = None) -> Cache:
        """Make a cache of transformers that holds it as tokens that have been read.

        A model is then given this cache and the tokens of `tail` with those that follow, and, where rows have fewer
        slots, an attention mask `[B, N + T]` that begins with `mask`, and `position_ids` `[B, T]` from
        `first_position` on. The model computes in the dtype of `keys`, on their device.

        Args:
            config: The model's configuration.
            max_length: Tokens that a `StaticCache` has room for, the N included; None: a `DynamicCache`.

        Raises:
            ValueError: There is no room for the N.
        """
        if max_length is not None and max_length < len(self):
            raise ValueError(f"a cache of max_length={max_length} has no room for {len(self)} slots")
        if max_length is None:
            cache = roomy_cache(len(self.keys))
        else:
            cache = StaticCache(text_config(config), max_cache_len=max_length)
        if len(self):
            for index, states in enumerate(zip(self.keys, self.values, strict=True)):
                cache.update(*states, index)
        return cache

    def placeholder_ids(self) -> list[int]:
        """Token ids that stand for its slots where an engine counts them as tokens, the same for the same memory.

        Of another memory they are others, so that an engine that finds what it has read by token ids keeps them apart.

        Raises:
            ValueError: It has more than one row, or the first token behind it has another position than N.
        """
        if not self._is_single():
            raise ValueError(f"an engine reads one memory a request, this has {len(self.mask)} rows: take memory[row]")
        if self.first_position != len(self):
            raise ValueError(
                f"an engine that counts {len(self)} slots as tokens begins behind them at position {len(self)}, and "
                f"this prefix is for position {self.first_position}"
            )
        content = hashlib.sha256(self.base.encode())
        for tensor in (*self.keys, *self.values):
            content.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        chosen = random.Random(content.digest())
        return [chosen.randrange(self.vocabulary) for _ in range(len(self))]

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """Token ids of a whole prompt, for an engine that counts slots as tokens.

        They are the placeholders, the end of the history, and what follows it.

        Args:
            ids: What follows.

        Raises:
            ValueError: As of `placeholder_ids`.
        """
        return [*self.placeholder_ids(), *self.tail[0].tolist(), *ids]

    def _is_single(self):
        return len(self.mask) == 1

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file, whole or not at all.

        The file has `keys.LAYER` and `values.LAYER`, `[B, kv_heads, N, head_dim]`, `mask`, and `tail` (the ids of all
        rows, joined) with `tail_lengths`; its metadata, JSON at "r3mem", have `kind`, `first_position`, `base`,
        `vocabulary`, a checksum of every byte, and, where an engine can count slots as tokens, `placeholder_ids`.

        Args:
            path: The file, replaced if it is there. Folders above it are made.
        """
        lengths = torch.tensor(list(map(len, self.tail)))
        tensors = {"mask": self.mask, "tail": torch.cat(self.tail), "tail_lengths": lengths}
        for index, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            tensors |= {f"keys.{index}": keys, f"values.{index}": values}
        metadata: dict[str, Any] = {"kind": KIND, "digest": memory_file.NO_DIGEST}
        metadata |= {name: getattr(self, name) for name in ("first_position", "base", "vocabulary")}
        if self._is_single() and self.first_position == len(self):
            metadata["placeholder_ids"] = self.placeholder_ids()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        memory_file.write(path, to_safetensors(tensors, {memory_file.METADATA: json.dumps(metadata)}))

    @classmethod
    def load(cls, path: str | Path) -> "Prefix":
        """Read a file that `save` wrote.

        Args:
            path: The file.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is damaged, or another kind of file.
        """
        try:
            with memory_file.opened(path), safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(memory_file.METADATA, "{}"))
                if metadata.pop("kind", None) != KIND:
                    raise ValueError("it is another kind of file")
                del metadata["digest"]
                metadata.pop("placeholder_ids", None)
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            layers = range(sum(name.startswith("keys.") for name in found))
            keys, values = (tuple(found[f"{part}.{layer}"] for layer in layers) for part in ("keys", "values"))
            tail = found["tail"].split(found["tail_lengths"].tolist())
            return cls(keys, values, found["mask"], tail, **metadata)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is no prefix of a memory, as Prefix.save writes it: {error}") from None


def prefix_of(model: Any, memory: Any, first_position: int | None = None) -> Prefix:
    """Put the keys of a matched memory to their positions before a text.

    Args:
        model: The `R3MemModel` that the memory was made with.
        memory: The `Memory`.
        first_position: Position of the first token behind it; None: the number of its slots, as where an engine counts
            them as tokens. With rotary embeddings distances alone matter, and a key older than its first position
            stands at a negative one.

    Raises:
        ValueError: The memory is another model's; it is not the base model's alone; a layer has a sliding window,
            which hides some of its slots, or is recurrent; layers without keys stand between others; or positions are
            learned, and the first position is another one than the memory was made for.
    """
    model.check_memory(memory)
    if memory.ages is None or not model.reads_as_base:
        raise ValueError(
            "only a memory that the base model reads is keys and values alone; what memory tokens have learned, or "
            "adapters read, needs these: use model.generate, or memory.to_cache(model)"
        )
    return placed_prefix(model, memory, first_position)


@torch.no_grad()
def placed_prefix(
    model: Any,
    memory: Any,
    first_position: int | None = None,
    *,
    read_with: torch.Tensor | None = None,
    uneven: bool = False,
) -> Prefix:
    """Do what `prefix_of` does, with a memory that was checked.

    Args:
        model: See `prefix_of`.
        memory: A matched memory of the base model.
        first_position: See `prefix_of`.
        read_with: Positions of the tokens that are read first, int64 `[B, T]`; None: the first position alone. Some
            models choose their frequencies by the largest position of a pass.
        uneven: Whether who reads it lets each head see its own slots (`with_own_slots`).

    Raises:
        ValueError: Heads have other numbers of slots and uneven is false, a layer has a sliding window or is
            recurrent, layers without keys stand between those that have some, or positions are learned, as of
            `prefix_of`.
    """
    reader, layout = model.reader, memory.layout
    if memory.carried is not None:
        raise ValueError(
            f"a {type(model.plain_model).__name__} has recurrent layers, whose states a memory carries beside keys "
            "and values, as no other engine knows: use model.generate, or memory.to_cache(model)"
        )
    if layout.is_adaptive and not uneven:
        raise ValueError(
            "heads of a memory of adaptive allocation have other numbers of slots, as no other engine knows: use "
            'model.generate, memory.to_cache(model), or memories of memory_allocation="uniform"'
        )
    if any(reader.windows()):
        raise ValueError(
            f"a {type(model.plain_model).__name__} has layers with a sliding window, which hides slots by their age, "
            "as no other engine knows: use model.generate, or memory.to_cache(model)"
        )
    keyed = reader.keyed_layers()
    if reader.has_gaps():
        raise ValueError(
            f"in a {type(model.plain_model).__name__} the layers {list(keyed)} have keys, and those between them have "
            "none, so that other engines would take them for others: use model.generate, or memory.to_cache(model)"
        )
    visible = memory.visible_on_host()
    count = int(visible.sum(1).max())
    start = visible.shape[1] - count  # rows of a batch may have columns before it that other rows needed
    first = count if first_position is None else first_position
    if first != layout.first_position and not is_rotary(reader.decoder):
        raise ValueError(
            f"a {type(model.plain_model).__name__} has learned positions, so what is behind its memories begins at "
            f"position {layout.first_position}, not {first}"
        )
    device = model.device
    states, ages = memory.states[..., start:, :].to(device, model.dtype), memory.ages[..., start:].to(device).long()
    sizes, config = reader.layer_sizes(), text_config(model.config)
    rotation = Rotation(reader.decoder, model.layers, range(len(model.layers)), config, reader.still_layers())
    known = torch.arange(first - layout.reach, first + 1, device=device)[None]
    if read_with is None:
        read_with = torch.tensor([[first]], device=device)
    tables = rotation.tables(known, states, seen_with=read_with.amax(0, keepdim=True))
    parts, carrier = [states[:, 0], states[:, 1]], rotation.carrier(sizes)
    places = layout.reach - ages
    parts[carrier] = rotation.of_layers(rotation.rotated_to, parts[carrier], keyed, tables, sizes, places)
    keys = tuple(size.key(some) for size, some in zip(sizes, parts[0], strict=True))
    values = tuple(size.value(some) for size, some in zip(sizes, parts[1], strict=True))
    tail = tuple(torch.cat(pair) for pair in zip(memory.recent, memory.unfinished, strict=True))
    mask, vocabulary = visible[:, start:].to(device, torch.int64), config.vocab_size
    return Prefix(keys, values, mask, tail, first, memory.origin.base, vocabulary)


def with_own_slots(model: Any, memory: Any, prefix: Prefix) -> tuple[Prefix, dict[int, SlotsOfHeads]]:
    """Leave out what no head of a layer has, and say what each has of the rest.

    The first layer keeps all N: transformers takes the length of a cache to be that of its first layer.

    Args:
        model: The `R3MemModel`.
        memory: A memory of adaptive allocation.
        prefix: The prefix of it.

    Returns:
        The prefix, with other numbers of keys in each layer, and what the query heads of each see, by its index in a
        cache.
    """
    reader, count = model.reader, len(prefix)
    ages = memory.ages[..., memory.ages.shape[-1] - count :].to(model.device)
    columns = columns_in_use(ages)
    columns[0] = torch.arange(count, device=ages.device)
    keys, values = (
        tuple(some.index_select(2, chosen) for some, chosen in zip(states, columns, strict=True))
        for states in (prefix.keys, prefix.values)
    )
    keyed, sizes = reader.keyed_layers(), reader.layer_sizes()
    heads = text_config(model.config).num_attention_heads
    own = {}
    for index, source in enumerate(reader.key_sources()):
        place = keyed.index(source)
        exists = ages[place, :, : sizes[place].heads].index_select(-1, columns[place])[:, :, None] > 0
        own[index] = SlotsOfHeads(exists.repeat_interleave(heads // sizes[place].heads, 1), columns[place], count)
    return dataclasses.replace(prefix, keys=keys, values=values), own
