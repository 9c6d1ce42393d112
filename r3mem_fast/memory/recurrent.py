"""Layers with a recurrent or convolutional state: how a memory carries what they keep along a text.

Such a layer has no keys and values to be matched. What it knows of a text is a state of constant size, from which it
goes on exactly; so a memory holds the states as they are, beside the slots of the layers with attention.
"""

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from ..integrations.compat import (
    has_recurrent_layers,
    idle_layers,
    layers_with_keys,
    recurrent_layers,
    recurrent_states,
    set_recurrent_states,
)
from ..reversible.convert import text_config
from ..reversible.past import MemoryNotReadError, PassCache, Past
from .layout import MemoryLayout
from .states import right_aligned, uploaded

# Kinds of layers, as configurations name them, that have keys and values.
_ATTENTION = ("attention", "full_attention", "sliding_attention", "chunked_attention")
_PADDED = "behind a memory, recurrent layers would take padding for tokens"
# States by layer and name, such as "3.conv.0" or "3.recurrent.0", `[B, ...]` each.
Carried = dict[str, torch.Tensor]


class CarryingCache(PassCache):
    """A cache whose recurrent layers go on from given states.

    Attributes:
        keep: Whether the cache goes on with what a pass leaves in it. If not, each pass begins with the given states.
        passes: See `PassCache`.
    """

    keep: bool
    _recurrent: Sequence[int] = ()  # layers that carry a state
    _given: Mapping[str, torch.Tensor] | None = None
    _is_read = False  # whether the layers have the given states
    _gone_on: set[int] | None = None  # recurrent layers that have read their state in the pass that is running

    def __init__(self, config: Any):
        super().__init__(config=config)
        self._idle = set(
            idle_layers(config)
        )  # now, because a model that is read backward names kinds in another order

    def __deepcopy__(self, memo: dict[int, Any]) -> "CarryingCache":
        """Copy what it holds, for one of several continuations, but not the model that it is of."""
        copied = copy.copy(self)
        memo |= {id(value): value for value in vars(self).values() if isinstance(value, nn.Module)}
        memo[id(self)] = copied
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    def go_on_from(self, states: Mapping[str, torch.Tensor] | None) -> None:
        """Set the states from which the next pass begins.

        Args:
            states: The states, in the dtypes in which the layers keep them; None: there are none, nothing was read.
        """
        self._given, self._is_read = states, False

    def states_after(self) -> Carried:
        """The states in which the last pass has left the layers: the layers' own, which the next pass may change."""
        return {
            f"{index}.{name}": state
            for index in recurrent_layers(self)
            for name, state in recurrent_states(self.layers[index]).items()
        }

    def carried(self, layer_idx: int) -> Past:
        """The states of a layer from before this pass; none for a layer without."""
        return recurrent_states(self.layers[layer_idx]) if layer_idx in recurrent_layers(self) else {}

    def carry(self, states: Mapping[str, torch.Tensor], layer_idx: int) -> None:
        """Take over a recurrent layer's new states."""
        self._note(layer_idx)
        set_recurrent_states(self.layers[layer_idx], states)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The state of a layer's convolution, as of `Cache.get_conv_state`."""
        self._note(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The state of a layer's recurrence, as of `Cache.get_recurrent_state`."""
        self._note(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether a layer has read anything, as of `Cache.has_previous_state`; older layers ask for this first."""
        if layer_idx is not None:
            self._note(layer_idx)
        return super().has_previous_state(layer_idx, *args, **kwargs)

    def _note(self, layer_idx):
        if self._gone_on is None and not self.passes:
            raise MemoryNotReadError(
                "a recurrent layer was given a memory's cache of which its decoder did not know, and would not have "
                f"gone on from the memory. transformers is {transformers.__version__}; install a version that "
                "r3mem_fast supports"
            )
        if self._gone_on is not None:
            self._gone_on.add(layer_idx)

    def take_over(self, parts: Sequence[tuple[Sequence[int], "CarryingCache"]]) -> None:
        """Hold what other caches have read, of some rows each: as this one had, with padding before shorter rows.

        Args:
            parts: Indices of the rows, and the cache of these. A row in none of them has read nothing.

        Raises:
            ValueError: A layer has a window, behind which it keeps nothing.
        """
        assert self._given is not None, "see go_on_from"
        rows, width = len(next(iter(self._given.values()))), max(part.get_seq_length() for _, part in parts)
        states, first = dict(self._given), parts[0][1]
        for some, part in parts:
            states = replaced_states(states, some, part.states_after())
        self._restore(states)
        for index in layers_with_keys(first):
            if getattr(first.layers[index], "is_sliding", False):
                raise ValueError(f"{_PADDED}: give rows of one length, or one row at a time")
            if not first.layers[index].get_seq_length():
                continue
            found = []
            for name in ("keys", "values"):
                like = getattr(first.layers[index], name)
                whole = like.new_zeros(rows, like.shape[1], width, like.shape[3])
                for some, part in parts:
                    whole[list(some)] = right_aligned(getattr(part.layers[index], name), width)
                found.append(whole)
            self.layers[index].update(*found)

    def _begin(self, layers: int, tokens: torch.Tensor, mask: Any, held: int | None) -> list[int]:
        """Begin a pass: check its rows, and give the layers their states.

        Args:
            layers: Number of its layers.
            tokens: Tokens of the pass, `[B, T]` or `[B, T, width]`.
            mask: Mask of the pass, as the decoder is given it; None: there is no padding.
            held: Rows of the slots before it; None: there are none.

        Returns:
            Indices of the layers that have keys and values.

        Raises:
            ValueError: There is padding that a state would have read, or another number of rows than of slots or
                states.
        """
        if self._given is not None and not self._is_read:
            held = len(next(iter(self._given.values())))
        if held not in (None, len(tokens)):
            raise ValueError(f"{len(tokens)} rows of tokens and {held} of memory: one of each a row")
        self._gone_on, self._recurrent = set(), [index for index in recurrent_layers(self) if index not in self._idle]
        without = {*self._idle, *self._recurrent} - set(layers_with_keys(self))
        keyed = [index for index in range(layers) if index not in without]
        if not self._recurrent:
            return keyed
        if self._given is not None and _is_padded(mask, tokens.shape[1], behind=self.keep):
            raise ValueError(
                f"{_PADDED}: give rows of one length, or one row at a time (a memory's unfinished tokens count, too: "
                "compress with finish=True leaves none)"
            )
        if not (self.keep and self._is_read):
            self._restore(self._given or {})
        return keyed

    def _restore(self, states):
        """Give the layers states, as copies, which they may change."""
        for index in recurrent_layers(self):
            if index not in self._idle:
                start = f"{index}."
                own = {name.removeprefix(start): s.clone() for name, s in states.items() if name.startswith(start)}
                set_recurrent_states(self.layers[index], own)
        self._is_read = True

    def _end(self) -> set[int]:
        """End a pass; returns the recurrent layers that have not gone on from their states in it."""
        gone_on, self._gone_on = self._gone_on, None
        return set() if gone_on is None else set(self._recurrent) - gone_on


def _is_padded(mask, tokens, *, behind):
    """Whether padding comes before one of the last tokens that a mask is of, or with `behind` there is any at all."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return False
    mask = mask[:, -tokens:] > 0
    return not bool(mask.all() if behind else (mask[:, 1:] <= mask[:, :-1]).all())


def refuse_states_at_input(layout: MemoryLayout | None, config: Any) -> None:
    """Raise ValueError where a memory would stand before the first layer of a model with recurrent layers.

    Args:
        layout: Layout of the memories; None: there are none.
        config: Configuration of the model.
    """
    if layout is not None and layout.placement == "input" and has_recurrent_layers(text_config(config)):
        raise ValueError(
            f"a {config.model_type} model has recurrent layers, which would read a memory before the first layer as "
            'tokens behind the text whose state they go on from: use memory_placement="every_layer"'
        )


def has_no_positions(decoder: Any) -> bool:
    """Whether a decoder leaves it to its recurrent layers to know where a token stands.

    Args:
        decoder: The module whose loop calls the layers.
    """
    if not has_recurrent_layers(getattr(decoder, "config", None)):
        return False
    names = [part.lower() for name, module in decoder.named_modules() for part in (name, type(module).__name__)]
    return not any(word in name for name in names for word in ("rotary", "rope", "pos_emb", "position"))


@torch.no_grad()
def states_that_go_on(reader: Any) -> Carried:
    """States that the recurrent layers of a model keep, of one row; none if it has no such layers.

    A few tokens are read in one pass and in parts, to prove that the layers go on from their states; where memory
    tokens learn, also as in training, in which layers take their states from elsewhere.

    Args:
        reader: The model's `MemoryReader`.

    Raises:
        ValueError: No layer has keys and values, or the layers do not go on.
    """
    if not has_recurrent_layers(reader.decoder.config):
        return {}
    if not layers_with_keys(reader.new_cache()):
        raise ValueError(
            f"a {type(reader.decoder).__name__} is recurrent in all its layers: what it knows of a text is the state "
            "in its own cache, exact and of constant size, and there is nothing that a memory could compress. Keep "
            "that cache (use_cache=True)"
        )
    found = _states_after_parts(reader, (4, 2, 1))
    if reader.layout.writer == "tokens":
        try:
            with torch.enable_grad():
                _states_after_parts(reader, (4, 3))
        except AttributeError as cause:  # its layers look for what only a cache without gradients has
            raise _refused(reader, " with gradients") from cause
    return {name: state.clone() for name, state in found.items()}


def _states_after_parts(reader, parts):
    """States after a few tokens, read in parts of these lengths. Raises ValueError if one pass ends in others."""
    embeddings = reader.embeddings_of(torch.arange(sum(parts))[None]).detach()
    embeddings.requires_grad_(torch.is_grad_enabled())

    def read(cache, start, end):
        mask, positions = torch.ones(1, end - start, dtype=torch.int64), torch.arange(start, end)[None]
        return reader.decode(embeddings[:, start:end], mask, cache, positions).detach()

    def read_in_parts(cache, *, forgets):
        found, start = [], 0
        for length in parts:
            if forgets:
                cache.go_on_from(None)
            found.append(read(cache, start, start + length))
            start += length
        return torch.cat(found, 1)

    cache, in_one, other = (reader.new_cache(first_position=0) for _ in range(3))
    whole, cause = read(in_one, 0, sum(parts)), None
    without = (read_in_parts(other, forgets=True) - whole).norm()
    try:
        error = (read_in_parts(cache, forgets=False) - whole).norm()
        found = cache.states_after()
        apart = max(_difference(found[name], state) for name, state in in_one.states_after().items())
    except (RuntimeError, IndexError) as raised:  # of shapes: its layers go on by one token at a time
        error, apart, cause, found = without, math.inf, raised, {}
    # Rounding is told from an error by what it takes to forget the states.
    if not (error <= max(4 * torch.finfo(whole.dtype).eps * whole.norm(), without / 20) and apart <= 0.05):
        raise _refused(reader, " with gradients" if torch.is_grad_enabled() else "") from cause
    return found


def _refused(reader, how):
    kind = ', while a matched one may (memory_writer="matched")' if how else ""
    return ValueError(
        f"the recurrent layers of a {type(reader.decoder).__name__} do not go on from their states{how} as they would "
        f"in one pass, with transformers {transformers.__version__}, so no memory can carry these{kind}; a newer "
        "version may do it"
    )


def _difference(state, other):
    """How much states differ, relative to their size."""
    return ((state - other).norm() / other.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def no_states(like: Mapping[str, torch.Tensor], rows: int) -> Carried:
    """The states of layers that have read nothing: zeros, as the layers themselves put before a text.

    Args:
        like: States of the model, of any number of rows.
        rows: Number of rows.
    """
    return {name: state.new_zeros(rows, *state.shape[1:]) for name, state in like.items()}


def rows_of(carried: Mapping[str, torch.Tensor] | None, index: torch.Tensor) -> Carried | None:
    """The states of some rows; None if there are no states.

    Args:
        carried: The states.
        index: Indices of the rows, int64, on the states' device.
    """
    return None if carried is None else {name: state.index_select(0, index) for name, state in carried.items()}


def joined_states(parts: Sequence[Carried | None]) -> Carried | None:
    """Join the rows of several states.

    Args:
        parts: States of one model; None: its layers are not recurrent.
    """
    found = [part for part in parts if part is not None]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]} if found else None


def replaced_states(carried: Carried, rows: Sequence[int], new: Mapping[str, torch.Tensor]) -> Carried:
    """States in which some rows have other ones.

    Args:
        carried: States of B rows.
        rows: Indices of the rows that change.
        new: Their new states.
    """
    index = uploaded(torch.as_tensor(list(rows), dtype=torch.int64), next(iter(carried.values())).device)
    return {name: state.index_copy(0, index, new[name].to(state.dtype)) for name, state in carried.items()}


def check_states(carried: Mapping[str, torch.Tensor] | None, known: Mapping[str, torch.Tensor]) -> None:
    """Check that a memory's states are those of a model.

    Args:
        carried: States of the memory.
        known: States of the model, of any number of rows.

    Raises:
        ValueError: They are not.
    """
    mine, its = ({name: list(s.shape[1:]) for name, s in (states or {}).items()} for states in (known, carried))
    if mine != its:
        raise ValueError(f"the memory carries states {its}, of another model than one of {mine}")


def refuse_layers_without_memory(config: Any, layers: Collection[int]) -> None:
    """Raise ValueError for layers that keep what they carry along a text where no memory can take it from.

    Args:
        config: Configuration of the decoder.
        layers: Indices of layers that have neither written keys and values, nor read or written a state.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    others = {kinds[index] for index in layers if index < len(kinds)} - set(_ATTENTION)
    if others:
        raise ValueError(
            f"layers {sorted(layers)} of a {config.model_type} model are {' and '.join(sorted(others))}: they have no "
            "keys and values that a memory could be, and what they carry along a text is not kept where a memory "
            f"could take it from (transformers {transformers.__version__})"
        )
