"""Presses of kvpress (github.com/NVIDIA/kvpress) as rivals: which keys of a context each of them would keep.

A press scores the keys of each layer and head; those with the largest scores are kept, with their values. Only its
score is used here, and read off one pass, because the hooks of kvpress 0.5 need a transformers older than 5.3. Presses
keep the same number of keys for every head where memories have as many slots in each (`keep_best`), and share them as
memories do where these share theirs (`keep_shared`), so that both are as large.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from r3mem_fast.choices import ALLOCATIONS
from r3mem_fast.integrations.compat import cache_argument
from r3mem_fast.integrations.scoped import temporarily
from r3mem_fast.memory.memory import Memory
from r3mem_fast.memory.slots import replaced, slots_of
from r3mem_fast.memory.states import states_at
from r3mem_fast.memory.writers.allocation import shared_places
from r3mem_fast.reversible.convert import find_decoder_layers

# What KVzip puts between a text and its repetition.
REPEAT = "\n\nRepeat the previous context exactly."
_INSTALL = (
    "the benchmark needs kvpress for its presses, with what that imports, and without the rest of its dependencies: "
    "pip install --no-deps kvpress==0.5.5 cachetools fire termcolor"
)
# Newest tokens of a context whose queries SnapKV looks at, and for how many positions ExpectedAttention looks ahead.
_WINDOW, _FUTURE = 32, 256


def snapkv(slots: int) -> Any:
    """SnapKV: attention of the last queries of the context, which are always kept and at most half of what is."""
    return _kvpress().SnapKVPress(window_size=max(1, min(_WINDOW, slots // 2)))


def keydiff(slots: int) -> Any:
    """KeyDiff: keys that are unlike the mean key."""
    return _kvpress().KeyDiffPress()


def expected(slots: int) -> Any:
    """ExpectedAttention: attention of queries to come, as a Gaussian, times the norm of the value."""
    return _kvpress().ExpectedAttentionPress(n_future_positions=_FUTURE)


def kvzip(slots: int) -> Any:
    """KVzip: largest attention of any query while the model repeats the context. It reads the context twice."""
    kvpress = _kvpress()
    with temporarily(
        logging.getLogger("kvpress.presses.kvzip_press"), disabled=True
    ):  # each one warns that it is slow
        return kvpress.KVzipPress(layerwise=True)


# Each makes a press for a number of slots.
PRESSES: dict[str, Callable[[int], Any]] = {
    "snapkv": snapkv, "keydiff": keydiff, "expected": expected, "kvzip": kvzip,
}  # fmt: skip


def is_installed() -> bool:
    """Whether kvpress can be imported."""
    try:
        _kvpress()
    except ModuleNotFoundError:
        return False
    return True


def add_presses_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of the presses that are rivals: all of them, where kvpress is installed."""
    default = list(PRESSES) if is_installed() else []
    text = "presses of kvpress (all, if installed)"
    parser.add_argument("--presses", nargs="*", choices=list(PRESSES), default=default, help=text)


def add_allocation_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how many slots each head has, of memories and of what presses keep."""
    parser.add_argument("--allocation", choices=ALLOCATIONS, default="uniform", help="of slots to heads (%(default)s)")


@torch.no_grad()
def press_scores(
    model: Any, press: Any, input_ids: torch.Tensor, *, prefix: int = 0, repeat_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Score the keys of a text as a press does.

    Args:
        model: A transformers causal language model; the `plain_model` of an `R3MemModel` within its
            `disable_adapters()` is one.
        press: A press with a `score`, or a KVzipPress.
        input_ids: The text, int64 `[B, T]`, without padding.
        prefix: First tokens that are always kept, such as a system prompt, and that KVzip does not repeat; their
            scores are infinite.
        repeat_ids: Tokens between the text and its repetition, which ask for it, int64 `[R]`; KVzip needs them.

    Returns:
        float32 `[layers, B, kv_heads, T]`; of two keys, the one with the larger score is kept.

    Raises:
        ValueError: The press is KVzip, and there are no `repeat_ids`.
    """
    tokens, cache = input_ids.shape[1], DynamicCache()
    repeats = hasattr(press, "score_kvzip")
    if repeats and repeat_ids is None:
        raise ValueError("KVzip asks the model to repeat the text: it needs repeat_ids")
    scores: dict[int, torch.Tensor] = {}

    def score(module, args, kwargs, output):
        layer = cache.layers[module.layer_idx]
        found = press.score(module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs)
        scores[module.layer_idx] = found.float()

    with contextlib.nullcontext() if repeats else _hooked(model, score):
        model(input_ids, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
    if repeats:
        _score_by_repeating(model, press, input_ids, prefix, repeat_ids, cache)
        found = press.score_val.float()
        found[..., : press.n_sink] = found.amax() + 1  # which it always keeps
    else:
        assert all(found.shape[-1] == tokens for found in scores.values())
        found = torch.stack([scores[index] for index in range(len(scores))])
    found[..., :prefix] = torch.inf
    return found


def _score_by_repeating(model, press, input_ids, prefix, repeat_ids, cache):
    """Let a KVzipPress score the keys in a cache while the model repeats the text behind it; `score_val` has them."""
    batch, tokens = input_ids.shape
    keys = cache.layers[0].keys
    press.start_idx, press.end_idx, press.context_length = prefix, tokens, tokens
    press.score_val = keys.new_zeros(len(cache.layers), batch, keys.shape[1], tokens)

    def score(module, args, kwargs, output):
        layer = cache.layers[module.layer_idx]
        press.score_kvzip(module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs)

    asked = torch.cat([repeat_ids.expand(batch, -1), input_ids[:, prefix:]], 1)
    with _hooked(model, score):
        model(asked, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))


@contextlib.contextmanager
def _hooked(model: Any, score: Callable) -> Iterator[None]:
    """Call a function after the attention of each layer, in the block; modules have what kvpress looks for there."""
    decoder, layers = find_decoder_layers(model)
    # A method, because a module would be registered as a part of the attention.
    rotary = decoder.rotary_emb.forward
    by_type = "layer_type" in inspect.signature(rotary).parameters
    with contextlib.ExitStack() as stack:
        for layer in layers:
            mine = functools.partial(rotary, layer_type=layer.self_attn.layer_type) if by_type else rotary
            stack.enter_context(temporarily(layer.self_attn, rotary_emb=mine))
            hook = layer.self_attn.register_forward_hook(score, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def keep_best(memory: Memory, scores: torch.Tensor, limit: int) -> Memory:
    """Keep the slots with the largest scores, with their values, by layer and head.

    Args:
        memory: A matched memory of which every row has as many slots as there are scores, in their order.
        scores: float32 `[layers, B, kv_heads, N]`.
        limit: Number of slots that stay, at most.

    Returns:
        A memory of the same layout, with `min(limit, N)` slots a row.
    """
    assert memory.ages is not None and memory.slots is not None
    assert scores.shape == memory.ages.shape and bool((memory.slots == scores.shape[-1]).all())
    places = scores.topk(min(limit, scores.shape[-1]), -1).indices.sort(-1).values
    return dataclasses.replace(
        memory,
        states=states_at(memory.states, places),
        ages=memory.ages.gather(3, places),
        slots=torch.full_like(memory.slots, places.shape[-1]),
    )


def keep(memory: Memory, scores: torch.Tensor, limit: int) -> Memory:
    """Keep slots as the memory's layout allocates them: `keep_shared`, or `keep_best` beside the pinned ones.

    Args:
        memory: A memory of one row, or of rows with as many pinned slots.
        scores: See `keep_best`; infinite for pinned slots.
        limit: Number of slots of a head that stay, on average, beside the pinned ones.
    """
    if memory.layout.is_adaptive:
        return keep_shared(memory, scores, limit)
    return keep_best(memory, scores, int(memory.pinned_slots()[0]) + limit)


def keep_shared(memory: Memory, scores: torch.Tensor, limit: int) -> Memory:
    """Keep the slots with the largest scores of all layers and heads, with their values: others in each head.

    Args:
        memory: See `keep_best`; of adaptive allocation.
        scores: See there; infinite for pinned slots.
        limit: Number of slots of a head that stay on average, at most, beside the pinned ones.
    """
    assert memory.ages is not None and memory.slots is not None and memory.layout.is_adaptive
    # Scores of some presses are negative, which says that there is no key where heads share slots.
    finite = scores.masked_fill(scores.isinf(), scores[scores.isfinite()].min())
    weights = torch.where(scores.isinf(), scores, finite - finite.min())
    stays = shared_places(weights, limit)
    slots = slots_of(memory, torch.zeros(len(memory), dtype=torch.int64))
    kept = slots._replace(ages=slots.ages.masked_fill(~stays, -1)).packed()
    return replaced(memory, range(len(memory)), [(range(len(memory)), kept)])


def _kvpress() -> Any:
    """kvpress, without the wrappers that it puts around all of transformers' attention functions as it is imported.

    They let a model generate from what a press has kept, other keys in each head, which nothing here does.
    """
    try:
        with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping):
            import kvpress
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_INSTALL, name=error.name) from error
    return kvpress
