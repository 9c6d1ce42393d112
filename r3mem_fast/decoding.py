"""Writes text token by token: backward, from queries and memories, and samples of what a model writes itself."""

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from .batching import Rows, prompt_of
from .integrations import graphs
from .integrations.capture import implementation_of
from .integrations.compat import cache_argument, has_recurrent_layers, key_sources
from .integrations.fsdp import units_of
from .integrations.scoped import compact_head, evaluating, temporarily
from .memory.fixed import fixed_cache
from .memory.memory import Memory
from .memory.reader import positions_of_mask
from .memory.rotary import depends_on_pass
from .memory.states import uploaded
from .network import Network
from .reading import read_but_last
from .reversible.convert import text_config

# Tokens after which a graph is asked whether all rows have ended.
_ASKED_EVERY = 8


def decode_backward(network: Network, rows: Rows, memory: Memory | None, max_new_tokens: int) -> list[torch.Tensor]:
    """Read backward, greedily, from queries and memories to the contexts.

    Args:
        network: The model.
        rows: The queries. A row without a token is read from its memory alone.
        memory: The memory before the queries, of as many rows; None: there is none.
        max_new_tokens: Tokens of a context at most; fewer if the model's positions end before.

    Returns:
        Token ids of each row's context, int64 `[n]`, without the end token.

    Raises:
        ValueError: A query is longer than the model's positions, or max_new_tokens is below 1.
    """
    ids, mask = prompt_of(rows, network.start_token_id)
    if memory is not None and memory.carried is not None:  # what is padding in all rows is not read
        ids, mask = ids[:, -int(mask.sum(1).max()) :], mask[:, -int(mask.sum(1).max()) :]
    network.check_length(ids.shape[1] + 1, behind_memory=memory is not None)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if network.max_tokens is not None:
        before = 0 if memory is None else network.reader.layout.first_position
        max_new_tokens = min(max_new_tokens, network.max_tokens - before - ids.shape[1])
    # Made before the layers change places, because its own layers are made in the order of the configuration.
    cache = DynamicCache(config=text_config(network.config)) if memory is None else network.reader.new_cache()
    with evaluating(network), network.reading_backward():
        if memory is not None:
            network.reader.read(cache, memory)
            if memory.carried is not None and not mask.all():
                read_but_last(network, ids, mask, cache, memory)
        if graphs.are_wanted(network.device) and _is_capturable(network, memory):
            found = _written_by_graphs(network, ids, mask, memory, cache, max_new_tokens)
        else:
            with network.must_read(None if memory is None else cache):
                output = continued(network, ids, mask, cache=cache, do_sample=False, max_new_tokens=max_new_tokens)
            found = output[:, ids.shape[1] :]
    return [_until(row, network.end_token_id) for row in found]


def _is_capturable(network, memory):
    """Whether a step is the same for every token, in which a mask is all that hides places of a cache."""
    if memory is not None and memory.layout.is_adaptive:  # from each head other ones, and layers have other numbers
        return False
    config = network.decoder.config
    # Such frequencies are chosen by the host, which would ask the device for the largest position.
    if depends_on_pass(network.decoder) or units_of(network):
        return False
    # A cache with places for a graph has keys of every layer, in order.
    if key_sources(config, network.layers) != tuple(range(len(network.layers))) or has_recurrent_layers(config):
        return False
    windowed = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    windowed = windowed or bool(getattr(config, "sliding_window", None))
    return implementation_of(config) in ("sdpa", "eager") and not windowed


@torch.no_grad()
def _written_by_graphs(network, ids, mask, memory, cache, max_new_tokens):
    """Continue prompts greedily, in the current direction: the new ids, int64 `[B, n]`, with what follows an end.

    The prompts are read as always. Each token is then the same step on the same tensors: it is run once, and then
    captured. Whether all rows have ended is asked once in so many tokens.
    """
    base, device = network.plain_model, network.device
    positions = positions_of_mask(mask)
    with compact_head(base), network.must_read(None if memory is None else cache):
        last = {"logits_to_keep": 1} if network.slices_logits else {}
        logits = base(
            ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache_argument(base, cache), **last
        ).logits
    states, visible, first = [(layer.keys, layer.values) for layer in cache.layers], mask.bool(), 0
    if memory is not None:
        states, first = [cache.past(index) for index in range(len(states))], cache.first_position
        visible = torch.cat([uploaded(memory.visible_on_host()[:, -cache.prefix_length :], device), visible], 1)
    count = states[0][0].shape[2]
    place = torch.tensor([count], device=device)
    behind = fixed_cache(states, count + max_new_tokens, place)
    seen = torch.nn.functional.pad(visible, (0, max_new_tokens))[:, None, None]
    token, position = logits[:, -1:].argmax(-1), first + positions[:, -1:] + 1
    found = token.new_zeros(len(ids), max_new_tokens)
    found[:, 0] = token[:, 0]
    additive = implementation_of(network.decoder.config) == "eager"

    def step():
        seen.index_fill_(3, place, True)
        shown = torch.where(seen, 0.0, torch.finfo(logits.dtype).min).to(logits.dtype) if additive else seen
        given = cache_argument(base, behind)
        scores = base(token, attention_mask=shown, position_ids=position, use_cache=True, **given).logits
        token.copy_(scores[:, -1:].argmax(-1))
        position.add_(1)
        place.add_(1)
        found.index_copy_(1, place - count, token)

    run = step
    for index in range(1, max_new_tokens):
        if index % _ASKED_EVERY == 1 and bool((found[:, :index] == network.end_token_id).any(1).all()):
            return found[:, :index]
        if index == 2:
            run = graphs.captured_in_place(step, device)
        run()
    return found


def continued(
    network: Network, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, cache: Any = None, **settings: Any
) -> torch.Tensor:
    """Continue prompts in the current direction, with the given settings alone.

    The model's own generation_config is not used: it would fill in what is not set here, such as a penalty for
    repetition.

    Args:
        network: The model.
        input_ids: Token ids of the prompts, int64 `[B, T]`.
        attention_mask: Mask of the prompts, int64 `[B, T]`, 0 for padding.
        cache: A key-value cache; None: `generate` makes one.
        settings: Arguments of `transformers.GenerationConfig`.

    Returns:
        Token ids of prompts and continuations, int64 `[B, T + n]`, ended by the end token.
    """
    base = network.plain_model
    ends = {"eos_token_id": network.end_token_id, "pad_token_id": network.end_token_id}
    with compact_head(base), temporarily(base, generation_config=GenerationConfig()):
        return base.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(**ends, **settings),
            **({} if cache is None else cache_argument(base, cache)),
        )


def sampled(network: Network, input_ids: torch.Tensor, tokens: int, seed: int) -> torch.Tensor:
    """Sample how a model goes on behind prompts, the same for the same seed; the random state stays as it is.

    Args:
        network: The model.
        input_ids: Token ids of the prompts, int64 `[B, T]`.
        tokens: Number of new tokens.
        seed: The seed.

    Returns:
        Token ids of prompts and continuations, int64 `[B, T + tokens]`.
    """
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        return continued(network, input_ids, torch.ones_like(input_ids), do_sample=True, top_k=0, **length)


def _until(row, end):
    """The tokens of a row before its first end token."""
    ends = (row == end).nonzero()
    return row[: ends[0]] if len(ends) else row
