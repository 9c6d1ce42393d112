"""Moves keys to other positions: takes the rotation off the keys that a memory keeps, and puts another one on."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..integrations.compat import setting_of
from .recurrent import has_no_positions
from .rotary_functions import OwnTables, of_pairs, rotary_function, rotated_by_pairs
from .sizes import LayerSizes, padded

# Names of position embeddings in models without rotary ones, modules or tables.
_ABSOLUTE = ("wpe", "embed_positions", "pos_encoding")
# Name of the tables in the attention of models that rotate keys by those (GPT-J, CodeGen).
_OWN_TABLES = "embed_positions"
# Kinds of rotary embeddings whose frequencies are others for long texts.
_CHANGING = ("dynamic", "longrope")
# In place of the kind of a layer that does not rotate its keys.
_STILL = "still"
# Bytes of keys in float32 that are turned at once.
_BYTES = 2**28


def is_rotary(decoder: nn.Module) -> bool:
    """Whether a decoder puts positions into its keys, not into its tokens.

    Args:
        decoder: The module whose loop calls the layers.

    Raises:
        ValueError: The decoder's kind of positions is not known.
    """
    if getattr(decoder, "rotary_emb", None) is not None:
        return True
    if any(isinstance(getattr(decoder, name, None), nn.Module | torch.Tensor) for name in _ABSOLUTE):
        return False
    if has_no_positions(decoder):
        return False
    if _own_tables(decoder) is not None:
        return True
    raise ValueError(
        f"a {type(decoder).__name__} has positions of a kind that is not known here, neither rotary, learned nor "
        "sinusoidal, so a memory cannot be placed before its tokens"
    )


def depends_on_pass(decoder: nn.Module) -> bool:
    """Whether a decoder chooses the frequencies of its rotary embedding by the largest position of a pass.

    Args:
        decoder: The module whose loop calls the layers.
    """
    kinds = getattr(getattr(decoder, "rotary_emb", None), "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return any(kind in _CHANGING for kind in named)


class Rotation:
    """Applies the rotary embedding of a decoder to keys outside of it.

    For a model with absolute positions, and in layers without a rotation, keys stay as they are.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layers: Sequence[nn.Module],
        order: Sequence[int],
        config: Any,
        still: Collection[int] = (),
    ) -> None:
        """Find the rotary embedding.

        Args:
            decoder: The module whose loop calls the layers.
            layers: The decoder's layers, reversible or not.
            order: Indices of the layers, in the order in which the loop calls them; see `Route`.
            config: The decoder's configuration.
            still: Indices of the layers that do not rotate their keys, in the cache.

        Raises:
            ValueError: The decoder's kind of positions is not known, or its module has no `apply_rotary_pos_emb`.
        """
        self._rotary: Any = None
        self._apply: Any = None
        self._types: dict[int, str] | None = None
        self._still = frozenset(still)
        self._is_partial = _rotates_a_part(config)
        # Latent attention rotates the end of a key, which is all of what it keeps apart where it keeps a latent.
        self._at_end: int | None = setting_of(config, "qk_rope_head_dim")
        self._latent: int | None = setting_of(config, "kv_lora_rank")
        if not is_rotary(decoder):
            return
        self._rotary, tables = getattr(decoder, "rotary_emb", None), _own_tables(decoder)
        if tables is not None:
            self._rotary, self._apply, self._is_partial = OwnTables(tables), rotated_by_pairs, True
            return
        kind = type(layers[0])
        base: type = getattr(kind, "unreversed", kind)  # as `make_reversible` sets it
        self._apply = rotary_function(base.__module__)
        if "layer_type" in inspect.signature(self._rotary.forward).parameters:
            self._types = dict(zip(order, config.layer_types, strict=True))
            known = getattr(self._rotary, "rope_type", None)
            if isinstance(known, dict):  # layers of other kinds rotate nothing
                self._still |= {index for index, kind in self._types.items() if kind not in known}

    def carrier(self, sizes: Sequence[LayerSizes]) -> int:
        """Which of the two that a cache keeps has positions: 0 for keys; 1 where keys are a latent without any.

        Args:
            sizes: Sizes of the layers' keys and values.
        """
        return int(bool(sizes) and sizes[0][1:] == (self._latent, self._at_end))

    def tables(
        self, position_ids: torch.Tensor, like: torch.Tensor, seen_with: torch.Tensor | None = None
    ) -> Callable[[int], tuple[torch.Tensor, torch.Tensor] | None]:
        """Make the tables of a rotation, as the model makes them.

        Args:
            position_ids: Positions of the keys, int64 `[1 or B, T]`.
            like: A tensor of the model's dtype, on its device.
            seen_with: Positions of the tokens of the same pass, int64 `[B, N]`; None: there are no others. Some models
                choose their frequencies by the largest position of a pass.

        Returns:
            A function of a layer's index that returns `(cos, sin)`, float32 `[1 or B, T, rotary dim]`; None for a
            layer that does not rotate its keys.
        """
        if self._rotary is None:
            return lambda index: None
        made: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {}
        count = position_ids.shape[1]
        if seen_with is not None:
            position_ids = torch.cat([position_ids.expand(len(seen_with), -1), seen_with], 1)

        def tables_of_layer(index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
            kind = self._kind(index)
            if kind == _STILL:
                return None
            if kind not in made:
                extra = () if kind is None else (kind,)
                # Tables in the model's dtype, as the model uses them: keys that were rotated by rounded tables have to
                # be turned back by the same ones.
                cos, sin = (table[:, :count].float() for table in of_pairs(self._rotary(like, position_ids, *extra)))
                made[kind] = cos, sin
            return made[kind]

        return tables_of_layer

    def rotated(self, keys: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Rotate keys to the positions of the tables.

        Args:
            keys: Keys without rotation, `[B, kv_heads, T, head_dim]`.
            tables: What a function that `tables` returned gives for the keys' layer.

        Returns:
            The rotated keys, in the shape and dtype of `keys`.
        """
        if tables is None:
            return keys
        return self._turned(keys, *tables).to(keys.dtype)

    def rotated_to(
        self, keys: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None, places: torch.Tensor
    ) -> torch.Tensor:
        """Rotate each key to a position of its own.

        Args:
            keys: Keys without rotation, `[B, kv_heads, N, head_dim]`.
            tables: What a function that `tables` returned gives for the keys' layer, for positions `[1, T]`.
            places: Place of each key's position among these, int64 `[B, kv_heads, N]`.

        Returns:
            The rotated keys, in the shape and dtype of `keys`.
        """
        if tables is None or not places.numel():
            return keys
        by_head, tables = _by_head(keys, tables, places)
        return self.rotated(by_head, tables)[:, 0].reshape(keys.shape)

    def unrotated_from(
        self, keys: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None, places: torch.Tensor
    ) -> torch.Tensor:
        """Take the rotation to its own position off each key; the inverse of `rotated_to`, with its arguments."""
        if tables is None or not places.numel():
            return keys
        by_head, tables = _by_head(keys, tables, places)
        return self.unrotated(by_head, tables)[:, 0].reshape(keys.shape)

    def unrotated(self, keys: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Take the rotation to the positions of the tables off keys; the inverse of `rotated`.

        Args:
            keys: Rotated keys, `[B, kv_heads, T, head_dim]`.
            tables: What a function that `tables` returned gives for the keys' layer.

        Returns:
            The keys without rotation, in the shape and dtype of `keys`.
        """
        if tables is None:
            return keys
        cos, sin = tables
        # Tables may carry a scale s (YaRN's attention scaling): turning back by them gives s², which is divided out.
        square = (cos * cos + sin * sin)[:, None]
        before, back, after = self._parts(self._turned(keys, cos, -sin), cos)
        square = torch.cat([square] * (back.shape[-1] // square.shape[-1]), -1)  # a table may be for halves of a key
        return torch.cat([before, back / square, after], -1).to(keys.dtype)

    def of_layers(
        self,
        turn: Callable[..., torch.Tensor],
        keys: torch.Tensor,
        layers: Sequence[int],
        tables: Callable[[int], tuple[torch.Tensor, torch.Tensor] | None],
        sizes: Sequence[LayerSizes],
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Turn the keys of several layers, with one call for those that follow one another and rotate alike.

        Args:
            turn: `rotated`, `unrotated`, `rotated_to` or `unrotated_from` of this object.
            keys: Keys, `[layers, B, kv_heads, N, head_dim]`, with zeros behind those of smaller layers.
            layers: Indices of the layers.
            tables: What `tables` returned, for positions of one row or of each of the B.
            sizes: Sizes of these layers' keys and values.
            places: Places of the keys, int64 `[layers, B, kv_heads, N]`, if `turn` takes them.

        Returns:
            The turned keys, in the shape and dtype of `keys`.
        """
        carrier = self.carrier(sizes)
        found, size = [], max(1, _BYTES // max(1, 4 * keys[0].numel()))
        start = 0
        while start < len(layers):
            end = start + 1
            width = sizes[start][1 + carrier]
            alike = (self._kind(layers[start]), width)
            while end < min(len(layers), start + size) and alike == (
                self._kind(layers[end]),
                sizes[end][1 + carrier],
            ):
                end += 1
            some, own = keys[start:end, ..., :width].flatten(0, 1), tables(layers[start])
            if places is not None:
                turned = turn(some, own, places[start:end].flatten(0, 1))
            else:
                if own is not None and len(own[0]) > 1:  # rows with tables of their own, in each layer
                    own = (own[0].repeat(end - start, 1, 1), own[1].repeat(end - start, 1, 1))
                turned = turn(some, own)
            found.append(padded(turned, *keys.shape[2::2]).view(keys[start:end].shape))
            start = end
        return found[0] if len(found) == 1 else torch.cat(found)

    def _kind(self, index: int) -> str | None:
        if index in self._still:
            return _STILL
        return None if self._types is None else self._types[index]

    def _turned(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Apply the model's own rotation in float32, to as much of each key as it rotates."""
        before, part, after = self._parts(keys.float(), cos)
        return torch.cat([before, self._apply(part, cos, sin), after], -1)

    def _parts(self, keys: torch.Tensor, cos: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split keys into what is rotated, and what stands before it and behind it."""
        width, start = keys.shape[-1], 0
        if self._at_end is not None:
            start = width - self._at_end
        elif self._is_partial:
            width = cos.shape[-1]
        return keys[..., :start], keys[..., start:width], keys[..., width:]


def _own_tables(decoder: nn.Module) -> torch.Tensor | None:
    """Tables of a decoder's attention, `[positions, width]`: sines in the first half, cosines in the second.

    Since transformers 5.24 they are those of its rotary embedding, before it of its layers.
    """
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is not None:
        table = getattr(rotary, _OWN_TABLES, None)
        return table if isinstance(table, torch.Tensor) else None
    modules = (
        module for layers in decoder.children() if isinstance(layers, nn.ModuleList) for module in layers[:1].modules()
    )
    found = (getattr(module, _OWN_TABLES, None) for module in modules)
    return next((table for table in found if isinstance(table, torch.Tensor)), None)


def _rotates_a_part(config: Any) -> bool:
    """Whether a configuration says that a part of each key is rotated."""
    parameters = getattr(config, "rope_parameters", None) or {}
    named = [parameters, *(some for some in parameters.values() if isinstance(some, dict))]
    factors = [getattr(config, "partial_rotary_factor", None), *(some.get("partial_rotary_factor") for some in named)]
    return any(factor is not None and factor < 1 for factor in factors)


def in_columns(
    placed: Callable[[torch.Tensor, Sequence[int], torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    carrier: int,
    places: torch.Tensor,
    columns: Mapping[int, torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Put keys to their positions where layers have other columns of them, layer by layer.

    Args:
        placed: `PrefixCache.placed`.
        states: Keys and values, `[layers, 2, B, kv_heads, N, head_dim]`.
        carrier: See `Rotation.carrier`.
        places: Positions of the keys, int64 `[layers, B, kv_heads, N]`.
        columns: The n of N columns that a layer has, int64 `[n]`.

    Returns:
        Keys and values of each layer in its columns, `[2, B, kv_heads, n, head_dim]`, and those that carry positions,
        at these, `[B, kv_heads, n, head_dim]`.
    """
    own = [states[layer].index_select(-2, chosen) for layer, chosen in columns.items()]
    turned = [
        placed(own[layer][None, carrier], [layer], places[None, layer].index_select(-1, chosen))[0]
        for layer, chosen in columns.items()
    ]
    return own, turned


def _by_head(
    keys: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], places: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Make each head of each row a row of its own, with its tables: the model's function has positions by row."""
    cos, sin = (table[0][places].flatten(0, 1) for table in tables)
    return keys.flatten(0, 1)[:, None], (cos, sin)
