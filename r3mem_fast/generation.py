"""Writes text forward, by transformers' `generate`, behind memories and alone."""

import contextlib
import copy
from typing import Any

import torch
from transformers import GenerationConfig

from .batching import Rows, unfinished_of
from .integrations import attention
from .integrations.capture import SlotsOfHeads, implementation_of, narrowed_attention
from .integrations.compat import cache_argument, cache_name
from .integrations.own_attention import calls_pytorch
from .integrations.scoped import compact_head, evaluating, temporarily
from .memory.memory import Memory
from .memory.prefix import placed_prefix, with_own_slots
from .memory.reader import positions_of_mask
from .network import Network
from .reading import hold_beginnings, read_but_last
from .reversible.past import MemoryNotReadError

# Number of new tokens that transformers writes where no length is asked for.
_DEFAULT_NEW_TOKENS = 20
# Kinds of caches that transformers may be asked for behind a memory.
_CACHES = (None, "dynamic", "static")
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
    # What nobody asked for, but the model's own settings, need not fit: it ends where the text does.
    is_asked = any(settings.get(name) is not None for name in ("max_new_tokens", "max_length", "generation_config"))
    longest, new = int(mask.sum(1).max()), config.max_new_tokens if is_asked else 1
    if network.max_tokens is not None and longest + new - 1 > network.max_tokens:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones are more than the {network.max_tokens} positions: "
            "ask for fewer (max_new_tokens), or give it less to read"
        )
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
    """The same prompts, of one length: what longer ones begin with is held by the memory (`hold_beginnings`)."""
    lengths, host = mask.sum(1).tolist(), ids.cpu()
    shortest, width = min(lengths), ids.shape[1]
    begun = [row[width - length : width - shortest] for row, length in zip(host, lengths, strict=True)]
    return hold_beginnings(network, begun, memory), ids[:, width - shortest :], mask[:, width - shortest :]


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
