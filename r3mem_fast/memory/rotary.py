"""Positions of keys: taking the rotation off those that a memory keeps, and putting another one on."""

import inspect
import sys

import torch
from torch import nn

# What models without rotary embeddings call theirs.
_ABSOLUTE = ("wpe", "embed_positions")


def is_rotary(decoder) -> bool:
    """Whether positions are put into a decoder's keys, not into its tokens.

    Raises ValueError for a decoder whose kind of positions is not known.
    """
    if getattr(decoder, "rotary_emb", None) is not None:
        return True
    if any(isinstance(getattr(decoder, name, None), nn.Embedding) for name in _ABSOLUTE):
        return False
    raise ValueError(
        f"a {type(decoder).__name__} has positions of a kind that is not known here, neither rotary nor learned, so a "
        "memory cannot be placed before its tokens"
    )


class Rotation:
    """The rotary embedding of a decoder, for keys outside of it; of a model with absolute positions, nothing.

    decoder: the module whose loop calls the layers. order: the order in which it does, see `Route`.
    Raises ValueError for a decoder whose kind of positions is not known.
    """

    def __init__(self, decoder, layers, order, config):
        self._rotary = self._apply = self._types = None
        if not is_rotary(decoder):
            return
        self._rotary = decoder.rotary_emb
        base = type(layers[0]).unreversed
        self._apply = getattr(sys.modules[base.__module__], "apply_rotary_pos_emb", None)
        if self._apply is None:
            raise ValueError(f"{base.__module__} has no apply_rotary_pos_emb, so a memory's keys cannot be rotated")
        if "layer_type" in inspect.signature(self._rotary.forward).parameters:
            self._types = dict(zip(order, config.layer_types, strict=True))

    def tables(self, position_ids, like, seen_with=None):
        """A function of a layer's index: `(cos, sin)` as the model makes them, in float32. like: of the model's dtype.

        position_ids: int64 `[1 or B, T]`. seen_with: those of the same pass's tokens, int64 `[B, N]`: some models
        choose their frequencies by the largest position of a pass.
        """
        if self._rotary is None:
            return lambda index: None
        made, count = {}, position_ids.shape[1]
        if seen_with is not None:
            position_ids = torch.cat([position_ids.expand(len(seen_with), -1), seen_with], 1)

        def of(index):
            kind = None if self._types is None else self._types[index]
            if kind not in made:
                extra = () if kind is None else (kind,)
                # In the model's dtype first: what was rotated by rounded tables is turned back by the same.
                made[kind] = tuple(table[:, :count].float() for table in self._rotary(like, position_ids, *extra))
            return made[kind]

        return of

    def rotated(self, keys, tables):
        """Keys `[B, kv_heads, T, head_dim]` at the positions of the tables, in their dtype."""
        if tables is None:
            return keys
        return self._turned(keys, *tables).to(keys.dtype)

    def unrotated(self, keys, tables):
        """The inverse. Tables may carry a scale s (YaRN's attention scaling), which the transpose gives twice."""
        if tables is None:
            return keys
        cos, sin = tables
        square = (cos * cos + sin * sin)[:, None]
        back = self._turned(keys, cos, -sin)
        turned, rest = back[..., : square.shape[-1]], back[..., square.shape[-1] :]
        return torch.cat([turned / square, rest], -1).to(keys.dtype)

    def _turned(self, keys, cos, sin):
        keys = keys.float()
        return self._apply(keys[:, :1], keys, cos, sin)[1]
