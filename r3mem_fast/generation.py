"""Writes text: forward behind a memory by transformers' `generate`, and backward from queries and memories."""

import contextlib
import copy
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from .batching import Rows, prompt_of, unfinished_of
from .integrations import attention, graphs
from .integrations.capture import SlotsOfHeads, implementation_of, narrowed_attention
from .integrations.compat import cache_argument, cache_name, has_recurrent_layers, key_sources
from .integrations.fsdp import units_of
from .integrations.own_attention import calls_pytorch
from .integrations.scoped import compact_head, evaluating, temporarily
from .memory.fixed import fixed_cache
from .memory.memory import Memory
from .memory.prefix import placed_prefix, with_own_slots
from .memory.reader import positions_of_mask
from .memory.rotary import depends_on_pass
from .memory.states import uploaded
from .network import Network
from .reading import held, read_but_last
from .reversible.convert import text_config
from .reversible.past import MemoryNotReadError

# Number of new tokens that transformers writes where no length is asked for.
_DEFAULT_NEW_TOKENS = 20
# Kinds of caches that transformers may be asked for behind a memory.
_CACHES = (None, "dynamic", "static")
# Tokens after which a graph is asked whether all rows have ended.
_ASKED_EVERY = 8
_LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")


def generate_alone(network: Network, rows: Rows, settings: dict[str, Any]) -> Any:
    """Run the base model's `generate` with nothing before the prompts: see `R3MemModel.generate`.

    Args:
        network: The model.
        rows: The prompts.
        settings: Arguments of `generate`.

    Returns:
        Token ids of prompts and continuations, int64 `[B, T + n]`, or an output with them as `sequences`.

    Raises:
        ValueError: A row has no token, or the positions do not suffice.
    """
    base = network.plain_model
    ids, mask = rows.left_padded()
    if not mask.any(1).all():
        raise ValueError("a row has no token that could be continued")
    _, config, _ = generation_configs(base.generation_config, settings, ids.shape[1])
    network.check_length(int(mask.sum(1).max()) + config.max_new_tokens - 1, behind_memory=False)
    if settings.get("streamer") is not None:
        settings = {**settings, "streamer": _StreamerOfPrompts(settings["streamer"], rows.ids)}
    with evaluating(network), network.without_memory():
        output = base.generate(input_ids=ids, attention_mask=mask, **settings)
    return _behind_prompts(output, rows, ids.shape[1])


def _behind_prompts(output, rows, width):
    """What `generate` gave, with the prompts as they were given in place of the first columns, so many."""
    found = output if isinstance(output, torch.Tensor) else output.sequences
    prompts = rows.ids.repeat_interleave(len(found) // len(rows.ids), 0)
    found = torch.cat([prompts.to(found.device), found[:, width:]], 1)
    if isinstance(output, torch.Tensor):
        return found
    output.sequences = found
    return output


def generate_behind(network: Network, memory: Memory, rows: Rows, settings: dict[str, Any]) -> Any:
    """Run the base model's `generate` behind a memory: see `R3MemModel.generate`.

    Args:
        network: The model.
        memory: A memory of the model, of as many rows.
        rows: The prompts.
        settings: Arguments of `generate`.

    Returns:
        Token ids of prompts and continuations, int64 `[B, T + n]`, or an output with them as `sequences`.

    Raises:
        ValueError: The settings bring another cache, a row has no token at all, or the positions do not suffice.
    """
    base = network.plain_model
    if given := cache_name(settings):
        raise ValueError(f"{given} cannot go with a memory, which is a cache of its own")
    kind = settings.get("cache_implementation") or getattr(
        settings.get("generation_config"), "cache_implementation", None
    )
    if kind not in _CACHES:
        raise ValueError(f"cache_implementation={kind!r} cannot go with a memory, but any of {_CACHES} can")
    if settings.get("assistant_model") is base or settings.get("assistant_early_exit"):
        raise ValueError("a memory network cannot draft for itself: the drafts would be written without the memory")
    ids, mask, _, _ = unfinished_of(memory, network.device).joined(rows).left_padded_with_labels()
    if not mask.any(1).all():
        raise ValueError("a row has neither a prompt nor unfinished tokens that could be continued")
    longest = int(mask.sum(1).max())  # what is unfinished of one row may be short where another's prompt is long
    ids, mask = ids[:, -longest:], mask[:, -longest:]
    own, config, others = generation_configs(base.generation_config, settings, rows.ids.shape[1])
    network.check_length(ids.shape[1] + config.max_new_tokens - 1, behind_memory=True)
    if memory.carried is not None and memory.slots is not None and not mask.all():
        with evaluating(network):
            memory, ids, mask = _of_one_length(network, memory, ids, mask)
    if others.get("streamer") is not None:
        others["streamer"] = _StreamerOfPrompts(others["streamer"], rows.ids)
    with evaluating(network), compact_head(base), temporarily(base, generation_config=own):
        # Drafts and pieces of a prompt are counted by the tokens of the cache, where a memory's would count, too.
        counted = others.get("assistant_model") is not None or config.prompt_lookup_num_tokens
        plain = is_prefix(network, memory) and not (counted or config.prefill_chunk_size)
        read = _read_as_prefix if plain else _read_with_hooks
        output = read(network, memory, ids, mask, config, kind, others)
    return _behind_prompts(output, rows, ids.shape[1])


def _of_one_length(network, memory, ids, mask):
    """The same prompts, of one length: what longer ones begin with is held by the memory (`reading.held`)."""
    lengths, host = mask.sum(1).tolist(), ids.cpu()
    shortest, width = min(lengths), ids.shape[1]
    begun = [row[width - length : width - shortest] for row, length in zip(host, lengths, strict=True)]
    return held(network, begun, memory), ids[:, width - shortest :], mask[:, width - shortest :]


def is_prefix(network: Network, memory: Memory) -> bool:
    """Whether a memory is keys and values alone to the base model, without states, and no window hides some of them.

    Args:
        network: The model.
        memory: A memory of the model.
    """
    if implementation_of(network.decoder.config) == attention.NAME:  # whose kernels read a memory apart
        return False
    if memory.ages is None or memory.carried is not None or network.reader.has_gaps():
        return False
    if memory.layout.is_adaptive and calls_pytorch(network.decoder):  # where no head can be shown its own slots
        return False
    return network.reads_as_base and not any(network.reader.windows())


def _read_as_prefix(network, memory, ids, mask, config, kind, others):
    """Let the base model, as transformers made it, generate behind a cache of transformers that holds the memory."""
    base, first = network.plain_model, network.reader.layout.first_position
    positions = first + positions_of_mask(mask)
    copies, uneven = _copies(config), memory.layout.is_adaptive
    repeated = _repeated(memory, copies)
    if uneven and kind == "static":
        raise ValueError('cache_implementation="static" is for memories of memory_allocation="uniform"')
    prefix = placed_prefix(network, repeated, first, read_with=positions, uneven=uneven)
    room = len(prefix) + ids.shape[1] + config.max_new_tokens if kind == "static" else None
    own: dict[int, SlotsOfHeads] = {}
    if uneven and len(prefix):
        prefix, own = with_own_slots(network, repeated, prefix)
    others |= cache_argument(base, prefix.to_cache(network.config, room))
    narrowed = narrowed_attention(network.decoder, own) if own else contextlib.nullcontext(own.keys())
    with network.unconverted(), narrowed as done:
        found = base.generate(
            input_ids=ids,
            attention_mask=torch.cat([prefix.mask[::copies], mask], 1),
            position_ids=positions,
            generation_config=config,
            **others,
        )
    if missing := sorted(own.keys() - done):
        raise MemoryNotReadError(f"layers {missing} did not look at their own slots; this is a bug: please report it")
    return found


def _read_with_hooks(network, memory, ids, mask, config, kind, others):
    """Let the network generate behind a cache that its reversible layers know how to read."""
    if kind == "static":
        raise ValueError(
            'cache_implementation="static" is for matched memories of a base model without sliding windows, with '
            'attn_implementation "sdpa" or "eager", and not for drafts or prompts in pieces: all else is read by '
            "reversible layers, which no static cache knows"
        )
    copies = _copies(config)
    memory = _repeated(memory, copies)
    cache = network.reading_cache(memory)
    others |= cache_argument(network.plain_model, cache)
    with network.behind_memory():
        if memory.carried is not None and not mask.all():
            copied, mask_of_copies = (rows.repeat_interleave(copies, 0) for rows in (ids, mask))
            read_but_last(network, copied, mask_of_copies, cache, memory)
        with network.must_read(cache):
            return network.plain_model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **others)


def _repeated(memory, copies):
    """A memory with so many copies of each row, one behind the other."""
    return memory if copies == 1 else memory.rows([row for row in range(len(memory)) for _ in range(copies)])


def _copies(config):
    """Rows that `generate` makes of each."""
    return max(config.num_beams or 1, config.num_return_sequences or 1)


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


def generation_configs(
    own: GenerationConfig, settings: dict[str, Any], prompt: int
) -> tuple[GenerationConfig, GenerationConfig, dict[str, Any]]:
    """Make generation configs for use behind a memory.

    Args:
        own: The model's own generation config.
        settings: Arguments of `generate`.
        prompt: Number of tokens of the prompts, padding included.

    Returns:
        The model's own config, the config that is asked for, and settings that belong to neither.
    """
    own, settings = copy.deepcopy(own), dict(settings)
    config = copy.deepcopy(settings.pop("generation_config", None) or own)
    lengths = {name: settings.pop(name, None) for name in _LENGTHS}
    config.max_new_tokens, config.min_new_tokens = _new_tokens(lengths, config, prompt)
    others = settings
    for chosen in (config, own):  # both, because transformers takes from `own` what `config` leaves open
        others = chosen.update(**settings)
        chosen.cache_implementation = chosen.max_length = chosen.min_length = None
        chosen.use_cache = True
    return own, config, others


def _new_tokens(given, config, prompt):
    """Number of tokens that `generate` is to add, at most and at least, as transformers decides it.

    Args:
        given: Arguments of `generate` by the names in `_LENGTHS`; they have precedence over the config.
        config: Generation config.
        prompt: Number of tokens of the prompts, which `max_length` and `min_length` count.
    """
    if given["max_new_tokens"] is None and given["max_length"] is None:
        given = {**given, "max_new_tokens": config.max_new_tokens, "max_length": config.max_length}
        if given["max_length"] == GenerationConfig().max_length:  # a default that nobody has chosen
            given["max_length"] = None
    most = given["max_new_tokens"]
    if most is None:
        most = _DEFAULT_NEW_TOKENS if given["max_length"] is None else given["max_length"] - prompt
    if most < 1:
        if given["max_new_tokens"] is not None:
            raise ValueError(f"max_new_tokens must be at least 1, got {most}")
        raise ValueError(f"max_length={given['max_length']} leaves no token behind a prompt of {prompt}")
    least = given["min_new_tokens"] if given["min_new_tokens"] is not None else config.min_new_tokens
    if least is None:
        length = given["min_length"] if given["min_length"] is not None else config.min_length
        least = max(0, (length or 0) - prompt)
    return most, least


class _StreamerOfPrompts:
    """Gives a streamer the prompts, without the unfinished tokens before them, and then the generated tokens."""

    def __init__(self, streamer, prompts):
        self._streamer, self._first = streamer, prompts

    def put(self, value):
        value, self._first = (value if self._first is None else self._first.cpu()), None
        self._streamer.put(value)

    def end(self):
        self._streamer.end()


def _until(row, end):
    """The tokens of a row before its first end token."""
    ends = (row == end).nonzero()
    return row[: ends[0]] if len(ends) else row
