"""`PrefixCache`: a key-value cache with a memory before its tokens."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicLayer

from ..integrations import attention
from ..integrations.capture import implementation_of
from ..integrations.compat import arguments_by_name, key_sources, setting_of, signature_of
from ..reversible.past import MemoryNotReadError, States
from .masks import columns_in_use, seen, with_memory
from .recurrent import CarryingCache, refuse_layers_without_memory
from .room import Room
from .rotary import Rotation, in_columns
from .sizes import LayerSizes, sizes_of, stacked


class PrefixCache(CarryingCache):
    """A cache of a reversible model with keys and values that every layer reads before its own: a memory.

    The memory lies beside the cache: masks, windows and lengths are those of the tokens alone, and no window evicts
    it. The model's layers see it because the reversible stack widens their masks, or hands it to them in their masks
    where the attention can read it there (`attention.SegmentMask`); another model's would ignore it or fail, so that
    `update` raises there. Every pass counts the layers that have read the memory and written their own keys and
    values, and `end_pass` raises if one has not: a memory is never dropped in silence, whatever a version of
    transformers does with the arguments of its layers.

    Args:
        config: The model's configuration, with its layers in order.
        first_position: Position of the tokens; the memory lies right before it.
        keep: Whether the tokens' own keys and values are kept, for decoding.
        capture: Number of trailing tokens of a pass whose keys and values are kept without their positions, for
            `captured`.
        adapted_tokens: Number of trailing tokens of a pass that adapters act on; None means all.
        decoder: The decoder whose layers' memory it is; another one is refused. None: any may read it.
        still: Indices of layers that do not rotate their keys.
        sizes: Sizes of the keys and values of each layer that has some; (): those of the memory, or of what the layers
            write.

    Attributes:
        key_sources: For each layer, the one whose keys and values it reads; () before the first pass.
        keyed: Indices of the layers that have keys and values of their own, in order, once a pass has begun.
    """

    def __init__(
        self, config: Any,
        *, first_position: int, keep: bool = True, capture: int = 0, adapted_tokens: int | None = None,
        decoder: Any = None, still: Collection[int] = (), sizes: Sequence[LayerSizes] = (),
    ):  # fmt: skip
        super().__init__(config=config)
        self.first_position, self.keep, self.capture = first_position, keep, capture
        self._decoder, self._still, self._sizes = decoder, still, sizes
        self.key_sources: Sequence[int] = ()
        self.adapted_tokens = adapted_tokens
        self._prefix: torch.Tensor | None = None
        self._visible: torch.Tensor | None = None
        self._all_visible = True
        self._ages: torch.Tensor | None = None
        self._windows: Sequence[int | None] = ()
        self._columns: dict[int, torch.Tensor] = {}  # of the memory, by layer, where heads have other numbers of keys
        self._config: Any = None
        self._placed: dict[int, States] = {}  # the memory by layer, at its positions
        self._written: dict[int, States] = {}  # the captured tokens of this pass, by layer
        self._rooms: dict[int, Room] = {}  # memory and tokens of each layer, one behind the other
        self.rotation: Any = None
        self._order: list[int] = []  # of the layers that the rotation knows
        self.keyed: list[int] = []
        self._of_pass: Any = None  # positions of the pass's tokens
        self._tables: Callable | None = None  # of all positions up to its first one
        self._positions: torch.Tensor | None = None  # of the captured tokens
        self._widened: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}  # masks of this pass
        self._counts: dict[int, int] = {}  # keys of this pass, by layer, without the memory's
        self._apart = False  # whether masks carry the memory
        self._lengths: torch.Tensor | None = None
        # Layers that must take part in the pass that is running (None: none is), and those that have.
        self._expected: set[int] | None = None
        self._extended: set[int] = set()
        self._attended: set[int] = set()
        self.passes = 0

    def read(
        self,
        prefix: torch.Tensor,
        visible: torch.Tensor,
        all_visible: bool,
        ages: torch.Tensor | None = None,
        windows: Sequence[int | None] = (),
        carried: Mapping[str, torch.Tensor] | None = None,
        sizes: Sequence[LayerSizes] = (),
        uneven: bool = False,
    ) -> "PrefixCache":
        """Set the memory; returns the cache.

        Args:
            prefix: Keys without positions, and values, `[layers, 2, B, kv_heads, N, head_dim]`, of the layers that
                have some, in order. Methods that take layers mean their places in this.
            visible: Which of them each row has, the last ones, bool `[B, N]`.
            all_visible: Whether all of `visible` is true; to ask its device would synchronise.
            ages: Tokens from each key to the cache's first token, `[layers, B, kv_heads, N]`; None: the keys stand
                right before it, in order.
            windows: Number of keys that a query of each layer sees, its own included; None: all; (): all, everywhere.
            carried: States from which recurrent layers go on; None: no layer is one.
            sizes: Sizes of each layer's keys and values in `prefix`; (): those that the cache was made with.
            uneven: Whether heads have other numbers of keys; where one has none, its age is 0.
        """
        self._columns = dict(enumerate(columns_in_use(ages))) if uneven and ages is not None else {}
        self.go_on_from(carried)
        self._prefix, self._visible = (prefix, visible) if visible.shape[-1] else (None, None)
        self._placed, self._rooms = {}, {}
        self._all_visible, self._ages = all_visible, ages
        self._windows, self._sizes = windows, sizes or self._sizes
        return self

    @property
    def prefix_length(self) -> int:
        """Tokens of the memory."""
        return 0 if self._visible is None else self._visible.shape[-1]

    def begin_pass(
        self, decoder: Any, layers: Sequence[Any], order: Sequence[int], args: tuple, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Move the positions of a pass's tokens behind the memory.

        Args:
            decoder: The module whose loop calls the layers.
            layers: Its layers, as they stand in it now.
            order: Their indices, in the order in which they run.
            args: Positional arguments of its call.
            kwargs: Keyword arguments of its call.

        Returns:
            The arguments that it is to be called with, all by name.

        Raises:
            ValueError: The attention cannot be given the memory, or the batch is of another size.
        """
        config = decoder.config
        if self._decoder not in (None, decoder):
            raise ValueError("the cache is of another model's memory; make one with memory.to_cache(model)")
        if (implementation := implementation_of(config)) not in ("eager", "sdpa", attention.NAME):
            raise ValueError(
                f"attn_implementation={implementation!r} cannot read a memory, and would drop it; load "
                f'the model with attn_implementation="sdpa", "eager" or "{attention.NAME}"'
            )
        self._apart = implementation == attention.NAME
        if "position_ids" not in signature_of(decoder).parameters:
            raise ValueError(
                f"a {type(decoder).__name__} takes no position_ids, so nothing can stand before its tokens"
            )
        arguments = arguments_by_name(decoder, args, kwargs)
        tokens = arguments["input_ids"] if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None] + self.get_seq_length()
        arguments["position_ids"] = positions = positions + self.first_position
        self._widened, self._written = {}, {}
        if len(self.key_sources) != len(layers):
            self.key_sources = key_sources(config, layers)
            while len(self.layers) < len(set(self.key_sources)):  # transformers 5.10 makes some of them later
                self.layers.append(self.layer_class_to_replicate())
        held = None if self._visible is None else len(self._visible)
        known = self._begin(len(layers), tokens, arguments.get("attention_mask"), held)
        self.keyed = [index for index in known if self.key_sources[index] == index]
        # As their attention addresses the cache.
        self._expected, self._extended, self._attended = set(self.keyed), set(), set()
        self._of_pass, self._tables, self._config = positions, None, config
        if self.rotation is None or list(order) != self._order:
            self.rotation = Rotation(decoder, layers, order, config, self._still)
            self._order = list(order)
        self._positions, self._lengths = positions[:, -self.capture :] if self.capture else None, None
        if self._apart and self._visible is not None and (self._columns or any(self._windows)):
            raise ValueError(
                f'attn_implementation="{attention.NAME}" cannot read a matched memory in layers with a sliding '
                'window, nor one of adaptive allocation (each head sees other slots); use "sdpa" or "eager"'
            )
        if self._apart and self._visible is not None and not self._all_visible:
            self._lengths = self._visible.to(tokens.device).sum(1, dtype=torch.int32)
        if self._apart and self._prefix is not None and self.carrier:
            raise ValueError(f'attn_implementation="{attention.NAME}" cannot read latents; use "sdpa" or "eager"')
        if self._prefix is not None and not self._placed:
            self._place(self._prefix, positions)
        return arguments

    def _place(self, prefix, positions):
        """Put a memory's keys to their positions. positions: those of the pass, `[1 or B, T]`."""
        first, own = self.first_position, prefix
        if self._ages is None:
            places = torch.arange(first - self.prefix_length, first, device=positions.device)
            tables = self.rotation.tables(places[None], prefix, seen_with=positions)
            turned = self._turned(self.rotation.rotated, prefix[:, self.carrier], range(len(prefix)), tables)
        else:
            places = (first - self._ages.long()).clamp_min(0)
            if self._columns:
                own, turned = in_columns(self.placed, prefix, self.carrier, places, self._columns)
            else:
                turned = self.placed(prefix[:, self.carrier], range(len(prefix)), places)
        self._placed = {}
        for index, size, states, moved in zip(self.keyed, self.sizes, own, turned, strict=True):
            key, value = (moved if part == self.carrier else states[part] for part in (0, 1))
            self._placed[index] = (size.key(key), size.value(value))

    def hold(self, prefix: torch.Tensor, ages: torch.Tensor) -> None:
        """Hold other slots for layers that are called outside of a pass, as those of the last one were.

        Args:
            prefix: See `read`; of the shape that it had in that pass, likewise visible.
            ages: See `read`.
        """
        self._prefix, self._ages = prefix, ages
        self._place(prefix, self._of_pass)

    def placed(self, keys: torch.Tensor, layers: Sequence[int], places: torch.Tensor) -> torch.Tensor:
        """Rotate keys of some layers, as the pass that runs or ran last would, to positions up to its first one.

        Args:
            keys: Keys without positions, `[layers, B, kv_heads, N, head_dim]`.
            layers: The layers.
            places: Positions of the keys, int64 `[layers, B, kv_heads, N]`.
        """
        return self._turned(self.rotation.rotated_to, keys, layers, self._tables_up_to_first(), places)

    def unplaced(self, keys: torch.Tensor, layers: Sequence[int], places: torch.Tensor) -> torch.Tensor:
        """Take the rotation off keys at these positions; the inverse of `placed`, with its arguments."""
        return self._turned(self.rotation.unrotated_from, keys, layers, self._tables_up_to_first(), places)

    def _turned(self, turn, keys, layers, tables, places=None):
        indices, sizes = [self.keyed[layer] for layer in layers], [self.sizes[layer] for layer in layers]
        return self.rotation.of_layers(turn, keys, indices, tables, sizes, places)

    @property
    def carrier(self) -> int:
        """Which of keys and values carries positions, see `Rotation.carrier`."""
        return self.rotation.carrier(self.sizes)

    @property
    def sizes(self) -> Sequence[LayerSizes]:
        """Sizes of keys and values, of the layers that have some of their own, in order."""
        if not self._sizes and self._prefix is not None:
            layers, _, _, heads, _, width = self._prefix.shape
            return [LayerSizes(heads, width, width)] * layers
        if not self._sizes:
            self._sizes = tuple(sizes_of(*self._written[index]) for index in self.keyed)
        return self._sizes

    def _tables_up_to_first(self):
        """Tables of all positions that a memory's keys can have."""
        if self._tables is None:
            like = self._prefix if self._prefix is not None else self._written[self.keyed[0]][0]
            known = torch.arange(self.first_position + 1, device=like.device)[None]
            # For all rows alike: what some models choose by the largest position of a pass is that of the whole batch.
            self._tables = self.rotation.tables(known, like, seen_with=self._of_pass.amax(0, keepdim=True))
        return self._tables

    def end_pass(self):
        """Check that each layer of the decoder's call has read the memory, and written its own keys and values.

        It looks at what the layers did in Python, and asks the device nothing.

        Raises:
            MemoryNotReadError: One has not.
            ValueError: One is of a kind that has no keys and values.
        """
        expected, self._expected = self._expected, None
        missing = self._end() | ((expected or set()) - self._extended)
        if self._apart and self._placed and expected:  # and read out of the masks
            missing |= {index for index, source in enumerate(self.key_sources) if source in expected} - self._attended
        refuse_layers_without_memory(self._config, missing)
        if missing:
            raise MemoryNotReadError(
                f"layers {sorted(missing)} did not take part in reading and writing the memory, so this output does "
                f"not depend on it as it should. transformers {transformers.__version__} gives its layers their cache "
                "in a way that is not known here: install a version that r3mem_fast supports (pip install r3mem_fast "
                "chooses one)"
            )
        self.passes += 1

    def abandon_pass(self):
        """Forget a decoder's call that failed."""
        self._expected = self._gone_on = None

    def past(self, layer_idx: int) -> States:
        """Keys and values before those of this pass: () or a pair. With the memory's, unless masks carry it."""
        if layer_idx not in self.keyed:  # it has none, or is given them by the layer that has
            return ()
        own = self.layers[layer_idx]
        parts = [self._placed[layer_idx]] if self._placed and not self._apart else []
        parts += [(own.keys, own.values)] if self.keep and own.get_seq_length() else []
        if len(parts) < 2:
            return parts[0] if parts else ()
        return tuple(torch.cat(pair, dim=-2) for pair in zip(*parts, strict=True))

    def extend(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> States:
        """Take over a layer's new keys and values; returns those of memory (as `past` does), cache and this pass.

        Raises:
            MemoryNotReadError: The layer's decoder was called without this cache.
        """
        if self._expected is None and not self.passes:  # after one, activation checkpointing runs layers again
            raise MemoryNotReadError(
                "a layer was given a memory's cache of which its decoder did not know, and would have read no memory. "
                f"transformers is {transformers.__version__}; install a version that r3mem_fast supports"
            )
        self._extended.add(layer_idx)
        if self.capture:
            self._written[layer_idx] = (key_states[..., -self.capture :, :], value_states[..., -self.capture :, :])
        states, own = (key_states, value_states), self.layers[layer_idx]
        placed = () if self._apart or not self._placed else self._placed[layer_idx]
        if self.keep and type(own) is DynamicLayer and not any(t.requires_grad for t in (*states, *placed)):
            room = self._rooms.setdefault(layer_idx, Room())
            return room.extended(own, placed, states)
        if self.keep:
            states = own.update(*states)
        if not placed:
            return states
        return tuple(torch.cat(pair, dim=-2) for pair in zip(placed, states, strict=True))

    def captured_keys(self) -> torch.Tensor:
        """Keys of the last `capture` tokens, or what carries their positions, `[layers, B, kv_heads, n, head_dim]`."""
        return stacked([self._written[index][self.carrier] for index in self.keyed], self.sizes)

    def captured(self) -> torch.Tensor:
        """Keys and values, without positions, of the last `capture` tokens, as `read` takes them."""
        tables = self.rotation.tables(self._positions, self._written[self.keyed[0]][0])
        found = [stacked([self._written[index][part] for index in self.keyed], self.sizes) for part in (0, 1)]
        places = range(len(self.keyed))
        found[self.carrier] = self._turned(self.rotation.unrotated, found[self.carrier], places, tables)
        return torch.stack(found, 1)

    def widened(self, mask: Any, hidden: torch.Tensor, layer_idx: int, implementation: str) -> Any:
        """A layer's attention mask, which lets the memory in.

        Args:
            mask: `[B, 1, T, K]`, or None where it is causal: columns for the memory are put before it (for each head,
                if a window hides slots from some). Or a `SegmentMask`: it is to carry the layer's memory.
            hidden: The layer's input.
            layer_idx: The layer's index in the cache.
            implementation: Name of the model's attention.
        """
        source = self.key_sources[layer_idx]
        if source not in self.keyed:
            return mask
        if self._apart:
            if not (self._placed and isinstance(mask, attention.SegmentMask)):
                return mask  # of which the attention refuses any other
            key, value = self._placed[source]
            read = attention.LayerRead(self._attended, layer_idx)
            return mask._replace(memory_key=key, memory_value=value, memory_lengths=self._lengths, read=read)
        tokens, place = hidden.shape[-2], self.keyed.index(source)
        window = self._windows[place] if self._windows else None
        own_columns = bool(self._columns) or window is not None  # each layer has its own
        if self._visible is None or (mask is None and tokens == 1 and self._all_visible and not own_columns):
            return mask
        if source == layer_idx:  # before it writes its own
            self._counts[source] = self.layers[source].get_mask_sizes(tokens)[0] if self.keep else tokens
        length = self._counts[source]
        known, widened = self._widened.get((id(mask), length), (None, None))
        if widened is not None and known is mask and not own_columns:  # the same for all layers of a kind
            return widened
        visible = self._visible.to(hidden.device)[:, None, None].expand(-1, 1, tokens, -1)
        if own_columns:
            assert self._ages is not None
            ages, later = self._ages[place][:, : self.sizes[place].heads], self._of_pass - self.first_position
            heads, columns = setting_of(self._config, "num_attention_heads"), self._columns.get(place)
            visible = seen(visible, ages, later, heads, window, columns)
        widened = with_memory(mask, visible, tokens, length, hidden, implementation)
        if not own_columns:
            self._widened[id(mask), length] = (mask, widened)
        return widened

    def update(self, *args, **kwargs):
        """Raise RuntimeError: called by a model that does not know of the memory."""
        raise RuntimeError(
            "a memory's cache was passed to a model that does not know how to read it, and would ignore it; pass "
            "it to the R3MemModel, or the reversible model, that it was made for"
        )

    def reorder_cache(self, beam_idx: torch.Tensor):
        """Reorder its rows, as `Cache.reorder_cache` does, with the memory's."""
        super().reorder_cache(beam_idx)
        self._each(lambda tensor, dim: tensor.index_select(dim, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int):
        """Repeat each of its rows, with the memory's."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda tensor, dim: tensor.repeat_interleave(repeats, dim=dim))

    def batch_select_indices(self, indices: torch.Tensor):
        """Keep these of its rows, with the memory's."""
        super().batch_select_indices(indices)
        self._each(lambda tensor, dim: tensor.index_select(dim, indices.to(tensor.device)))

    def _each(self, change):
        """Change the rows of the memory, by a function of a tensor and the dimension of its rows."""
        if self._visible is not None and self._prefix is not None:
            self._visible, self._prefix = change(self._visible, 0), change(self._prefix, 2)
            self._placed = {i: tuple(change(t, 0) for t in pair) for i, pair in self._placed.items()}
            self._ages = None if self._ages is None else change(self._ages, 1)
