"""How a decoder reads a memory: its states become keys and values that every layer sees before its own tokens."""

import contextlib
import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..integrations.capture import captured_attention, scaled_attention
from ..integrations.compat import as_of_tokens, cache_argument, inputs_of_layers
from ..integrations.scoped import evaluating, kinds_of_layers, temporarily
from ..reversible.convert import text_config
from ..reversible.refusals import refuse_cross_attention
from ..reversible.stack import ReversibleStack
from .cache import PrefixCache
from .layout import MemoryLayout, Origin
from .memory import Memory, empty_memory
from .recurrent import Carried, check_states, no_states, states_that_go_on
from .rotary import is_rotary
from .sizes import LayerSizes
from .states import uploaded


class MemoryReader:
    """Reads memories with the decoder of a reversible model.

    Args:
        model: A reversible causal language model, with adapters or without.
        stack: Its reversible stack.
        decoder: The module of it whose loop calls the layers.
        layout: What its memories have in common.
    """

    def __init__(self, model: Any, stack: ReversibleStack, decoder: nn.Module, layout: MemoryLayout):
        self._model, self._stack, self.decoder, self.layout = model, stack, decoder, layout
        self._kinds = _kinds_of(text_config(model.config))
        self._measured: tuple[int, ...] | None = None
        self._windows: tuple[int | None, ...] = ()
        self._keyed: tuple[int, ...] = ()
        self._key_sources: tuple[int, ...] = ()
        self._still: frozenset[int] = frozenset()
        self._carried: Carried = {}  # states of recurrent layers, of one row
        self._sizes: tuple[LayerSizes, ...] = ()
        self._carrier = 0
        self._normalises: bool | None = None

    def embeddings_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of token ids, `[batch, tokens, width]`, on the model's device."""
        embeddings = self._model.get_input_embeddings()(uploaded(ids, self._model.device))
        if embeddings.requires_grad and embeddings.is_leaf:
            # By the hook that checkpointing puts there for frozen embeddings, so that a backward pass comes by at all.
            embeddings = embeddings.detach()
        return embeddings

    def new_cache(self, *, first_position: int | None = None, **settings) -> PrefixCache:
        """A cache without a memory, for `read`.

        Args:
            first_position: Position of its first token; None: behind as many slots as a memory can have.
            settings: More arguments of `PrefixCache`.
        """
        first = self.layout.first_position if first_position is None else first_position
        settings = {"decoder": self.decoder, "still": self._still, "sizes": self._sizes, **settings}
        config = text_config(self._model.config)
        # While the model is read backward, its configuration names the kinds of its layers in another order.
        in_order = _kinds_of(config) == self._kinds
        with contextlib.nullcontext() if in_order else kinds_of_layers(config, self._kinds):
            return PrefixCache(config, first_position=first, **settings)

    def read(self, cache: PrefixCache, memory: Memory) -> PrefixCache:
        """Let a cache hold a memory, in the direction that the model is being read in; returns the cache."""
        device = self._model.device
        states, visible = memory.states.to(device, self._model.dtype), memory.visible_on_host()
        all_visible, sizes = bool(visible.all()), self._sizes
        if self.layout.placement == "input" and visible.shape[1]:
            # Standing before all else, they see nothing else: what they leave in each layer can be had without it.
            count = visible.shape[1]
            seen = self.new_cache(keep=False, capture=count, first_position=self.layout.first_position - count)
            places = torch.arange(count).expand(len(states), -1)
            self.decode(states, visible.to(torch.int64), seen, places)
            states, sizes = seen.captured(), tuple(seen.sizes)
        visible, carried = uploaded(visible, device), memory.carried
        if carried is not None:
            carried = {name: state.to(device, self._carried[name].dtype) for name, state in carried.items()}
        if memory.ages is None:
            return cache.read(states, visible, all_visible, carried=carried, sizes=sizes)
        ages, uneven = memory.ages.to(device), memory.layout.is_adaptive
        return cache.read(states, visible, all_visible, ages, self.windows(), carried, uneven=uneven)

    def decode(
        self,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        cache: PrefixCache,
        positions: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the decoder on embeddings behind a memory; no logits are computed.

        Args:
            embeddings: `[batch, tokens, width]`, as `embeddings_of` gives them.
            mask: int64 `[batch, tokens]`, on the CPU, 0 for padding among these tokens; the memory is not in it.
            cache: The memory, as `read` made it. If it keeps keys and values, those of the tokens are appended to it.
            positions: int64 `[batch, tokens]`; 0 is the place right behind the memory. None: each row's first token
                that is no padding has it, and the others follow.
            ids: Token ids of the first embeddings, int64 `[batch, n]`; None: they are of no tokens.

        Returns:
            The last hidden states, `[batch, tokens, hidden_size]`.
        """
        positions = positions_of_mask(mask) if positions is None else positions
        given = cache_argument(self.decoder, cache) | inputs_of_layers(self.decoder, ids, embeddings)
        if not mask.all():  # without padding there is nothing to ask of a mask, on a device least of all
            given["attention_mask"] = uploaded(mask, embeddings.device)
        positions = uploaded(positions, embeddings.device)
        embeddings = as_of_tokens(self.decoder, embeddings)
        with self._stack.must_read(cache):
            return self.decoder(inputs_embeds=embeddings, position_ids=positions, **given).last_hidden_state

    def entering(self, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """What the decoder gives its first layer, for rows of tokens without padding that begin behind a memory.

        Args:
            ids: Token ids, int64 `[batch, tokens]`.

        Returns:
            Hidden states `[batch, tokens, width]`, and more arguments of the layer, with no cache among them.
        """
        found: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def passing(layer: Any, index: int, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
            found.append((hidden, arguments))
            return hidden

        embeddings = self.embeddings_of(ids)
        positions = self.layout.first_position + torch.arange(ids.shape[1], device=embeddings.device)[None]
        # An empty cache, because without one transformers asks the device whether rows hold several texts.
        empty = cache_argument(self.decoder, DynamicCache(config=text_config(self._model.config)))
        others = inputs_of_layers(self.decoder, ids, embeddings)
        with temporarily(self._stack, run=passing):
            self.decoder(
                inputs_embeds=as_of_tokens(self.decoder, embeddings), position_ids=positions, **empty, **others
            )
        hidden, arguments = found[0]
        return hidden, {name: value for name, value in arguments.items() if name not in empty}

    def state_sizes(self) -> tuple[int, ...]:
        """Sizes of a memory's states that are the model's: `(layers, kv_heads, head_dim)`, or `(width,)`.

        The latter of placement "input". The first call runs the decoder on a few tokens, once to see the sizes and
        once more, elsewhere, to prove that keys can be moved to other positions; with recurrent layers also in parts,
        to prove that these go on from their states.

        Raises:
            ValueError: They cannot, so that no memory could stand before a text.
        """
        if self.layout.placement == "input":
            refuse_cross_attention(text_config(self._model.config))
            return (self._model.get_input_embeddings().weight.shape[1],)
        if self._measured is None:
            self._refuse_layers_that_no_memory_suits()
            with evaluating(self._model), torch.autocast(self._model.device.type, enabled=False):
                self._carried = states_that_go_on(self)
            with captured_attention(self.decoder) as calls:
                cache = self._keys_at(0)
            layers, _, heads, tokens, width = cache.captured_keys().shape
            self._sizes, self._carrier = tuple(cache.sizes), cache.carrier
            self._keyed, self._key_sources = tuple(cache.keyed), tuple(cache.key_sources)
            self._refuse_attention_that_looks_ahead()
            self._find_layers_that_do_not_rotate(tokens)
            self._refuse_keys_that_cannot_be_moved(tokens)
            self._windows = tuple(calls[index].window if index in calls else None for index in cache.keyed)
            self._measured = (layers, heads, width)
        return self._measured

    def windows(self) -> tuple[int | None, ...]:
        """Number of keys that a query of each layer sees, its own included; None for all. Raises as `state_sizes`."""
        self.state_sizes()
        return self._windows

    def keyed_layers(self) -> tuple[int, ...]:
        """Indices, in the cache, of the layers that have keys of their own, in order. Raises as `state_sizes`."""
        self.state_sizes()
        return self._keyed

    def has_gaps(self) -> bool:
        """Whether layers without keys of their own stand before others that have some. Raises as `state_sizes`."""
        return self.keyed_layers() != tuple(range(len(self.keyed_layers())))

    def key_sources(self) -> tuple[int, ...]:
        """For each layer, by its index in the cache, the one whose keys it reads. Raises as `state_sizes`."""
        self.state_sizes()
        return self._key_sources

    def still_layers(self) -> frozenset[int]:
        """Indices of the layers, in the cache, that do not rotate their keys. Raises as `state_sizes`."""
        self.state_sizes()
        return self._still

    def empty_memory(self, rows: int, origin: Origin, layout: MemoryLayout, pinned: int = 0) -> Memory:
        """Make a memory of nothing.

        Args:
            rows: Number of rows.
            origin: Fingerprints that it carries.
            layout: Its layout: the model's, or one of another size.
            pinned: Tokens at the beginning of each row whose slots stay as they are.

        Raises:
            ValueError: There are pinned tokens and no matched memories, or too many; or as of `state_sizes`.
        """
        device, dtype = self._model.device, self._model.dtype
        if pinned and layout.writer != "matched":
            raise ValueError(f"pinned={pinned!r} is for matched memories, not for memory tokens that learned")
        most = layout.most_pinned
        if not 0 <= pinned <= most:
            raise ValueError(
                f"pinned must be 0 to {most} tokens, beside a budget of {layout.budget}; got {pinned!r}. What a chat "
                "template or a tokenizer puts first is pinned, too; a smaller memory_budget leaves more room, and "
                'beyond_budget="forget"'
            )
        sizes = self.state_sizes()
        carried = no_states(self._carried, rows) if self._carried else None
        return empty_memory(layout, origin, rows, sizes, dtype=dtype, device=device, pinned=pinned, carried=carried)

    def check_states(self, memory: Memory):
        """Raise ValueError for a memory whose states are of other sizes than this model's."""
        sizes = list(self.state_sizes())
        shape = list(memory.states.shape)
        found = shape[2:] if self.layout.placement == "input" else [shape[0], shape[3], shape[5]]
        if found != sizes:
            raise ValueError(f"the memory's states are {shape}, of another model than one of {sizes}")
        check_states(memory.carried, self._carried)

    def normalises_attention(self) -> bool:
        """Whether layers normalise what their attention gives, as Gemma 3 and OLMo 2 do. Raises as `state_sizes`.

        Then the length of values says nothing of how much they count. The first call runs the decoder on a few tokens:
        with attention twice as large, which normalised makes no difference, and with none.
        """
        self.state_sizes()
        if self._normalises is None:
            ids, hidden = torch.arange(4, device=self._model.device)[None], []
            for factor in (1.0, 2.0, 0.0):
                with scaled_attention(self.decoder, factor) as scaled:
                    hidden.append(self._read_few(ids, self.new_cache(keep=False)).float())
            plain, twice, without = hidden
            change, most = (float((some - plain).norm()) for some in (twice, without))
            self._normalises = bool(scaled) and change < 0.1 * most
        return self._normalises

    def layer_sizes(self) -> tuple[LayerSizes, ...]:
        """Sizes of keys and values, of the layers that have some of their own. Raises as `state_sizes`."""
        self.state_sizes()
        return self._sizes

    def keeps_latents(self) -> bool:
        """Whether a cache keeps latents in place of keys and values. Raises as `state_sizes`."""
        self.state_sizes()
        return self._carrier == 1

    def _step(self, tokens):
        """How far a few tokens are moved to see what becomes of their keys; 0 where nothing ever is."""
        limit = getattr(text_config(self._model.config), "max_position_embeddings", None)
        # Learned positions are part of what the tokens are, and nothing is moved.
        return min(37, (limit or 64) - tokens) if is_rotary(self.decoder) else 0

    def _find_layers_that_do_not_rotate(self, tokens):
        """Find the layers whose keys, as they are, are the same at other positions."""
        if step := self._step(tokens):
            caches = [self._keys_at(position) for position in (0, step)]
            as_they_are = _changes(*(cache.captured_keys() for cache in caches))
            turned_back = _changes(*(cache.captured()[:, cache.carrier] for cache in caches))
            # Long wavelengths hardly turn a key in so few positions, and in bfloat16 that may look like rounding: a
            # layer that rotates is known by keys that agree better when they are turned back.
            self._still = frozenset(
                index
                for index, change, rotated in zip(caches[0].keyed, as_they_are, turned_back, strict=True)
                if change <= self._tolerance() and change < rotated
            )

    def _refuse_keys_that_cannot_be_moved(self, tokens):
        step = self._step(tokens)
        errors = _changes(*(self._captured_at(position) for position in (0, step)))
        error = max(errors)
        if not all(change <= self._tolerance() for change in errors):  # NaN is no small one
            base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
            raise ValueError(
                f"in a {type(base).__name__} keys that were moved by {step} positions "
                f"differ by {error:.2g}, so a memory cannot be placed before its tokens; "
                'use memory_placement="input", or another model'
            )

    def _refuse_layers_that_no_memory_suits(self):
        name, config = type(self.decoder).__name__, getattr(self.decoder, "config", None)
        if config is None:
            raise ValueError(f"a {name} has no configuration that would say how it attends, so it can read no memory")
        refuse_cross_attention(text_config(config))
        if any("indexer" in part.rpartition(".")[2] for part, _ in self.decoder.named_modules()):
            raise ValueError(
                f"the layers of a {name} choose keys by an index of all tokens, where a memory's slots have no place"
            )
        kinds = {getattr(type(part), "unreversed", type(part)) for part in self.decoder.modules()}
        if any("causal_mask" in inspect.signature(kind.forward).parameters for kind in kinds):
            raise ValueError(f"a {name} gives its attention a causal_mask of its own, in which no memory is let in")
        chunk = getattr(text_config(config), "attention_chunk_size", None)
        chunked = any("chunk" in str(kind) for kind in getattr(text_config(config), "layer_types", None) or ())
        if chunked and chunk is not None and chunk < self.layout.first_position:
            raise ValueError(
                f"a {name} has layers that see nothing before a chunk of {chunk} tokens, and a memory would stand for "
                f"{self.layout.first_position}; use a smaller memory_budget or shorter segments"
            )

    def _refuse_attention_that_looks_ahead(self):
        """Doge does in transformers 5.10, with sdpa, where no mask is made: what is read behind nothing."""
        hidden = []
        for last in (3, 4):
            cache, ids = self.new_cache(keep=False), torch.tensor([[0, 1, 2, last]], device=self._model.device)
            hidden.append(self._read_few(ids, cache)[:, :3])
        if not max(_changes(*hidden)) <= self._tolerance():
            raise ValueError(
                f"a {type(self.decoder).__name__} lets tokens see those behind them, so a memory would not be read as "
                'its text; load it with attn_implementation="eager", or install a newer transformers'
            )

    @torch.no_grad()
    def _read_few(self, ids, cache):
        mask = torch.ones(ids.shape, dtype=torch.int64)
        # In the weights' precision: autocast's would look like keys that cannot be moved.
        with evaluating(self._model), torch.autocast(self._model.device.type, enabled=False):
            return self.decode(self._model.get_input_embeddings()(ids), mask, cache, ids=ids)

    def _captured_at(self, position):
        """What carries the positions of a few tokens from this one on, without them."""
        cache = self._keys_at(position)
        return cache.captured()[:, cache.carrier]

    def _tolerance(self):
        return max(0.01, 16 * torch.finfo(self._model.dtype).eps)

    def _keys_at(self, position):
        """A cache that has captured a few tokens from this position on."""
        cache = self.new_cache(keep=False, capture=4, first_position=position)
        self._read_few(torch.arange(4, device=self._model.device)[None], cache)
        return cache


def _changes(keys, others):
    """How much the keys of each layer differ, relative to their size; NaN where they are not finite."""
    keys, others = keys.float().flatten(1), others.float().flatten(1)
    return ((others - keys).norm(dim=1) / keys.norm(dim=1)).tolist()


def _kinds_of(config):
    return tuple(getattr(config, "layer_types", None) or ())


def positions_of_mask(mask: torch.Tensor) -> torch.Tensor:
    """Positions of a row's tokens, counted from its first: int64, the shape of the mask; 0 in padding before it."""
    return (mask.cumsum(1) - 1).clamp_min(0)
