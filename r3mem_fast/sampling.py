"""Continues rows as training reads them: segment by segment, each behind the memory of those before it.

A trainer that learns from what a model writes (GRPO) scores a row in segments. Had `generate` read the row in one
pass, another network would have written it than the one that is scored.
"""

import copy
from typing import Any

import torch
from transformers import GenerationConfig

from .batching import Rows, left_padded
from .generation import generate_behind, generation_configs
from .integrations.scoped import evaluating
from .network import Network
from .reading import compress_rows

# What looks at a whole text, of which a segment has a part alone, and the value of each that does nothing.
_NEEDS_WHOLE_TEXT = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "stop_strings": None,
    "prompt_lookup_num_tokens": None,
    "return_dict_in_generate": False,
}


def is_written_by_segments(network: Network, rows: Rows, settings: dict[str, Any]) -> bool:
    """Whether prompts, and what is to follow them, are longer than one segment of a model that learns memories.

    Args:
        network: The model.
        rows: The prompts.
        settings: Arguments of `generate`.
    """
    if not network.learns_memories or network.is_plain:
        return False
    _, config, _ = generation_configs(network.plain_model.generation_config, settings, rows.ids.shape[1])
    longest = int(rows.mask.sum(1).max()) + config.max_new_tokens
    return longest > network.reader.layout.segment_length


@torch.no_grad()
def generate_by_segments(network: Network, rows: Rows, settings: dict[str, Any]) -> torch.Tensor:
    """Continue rows, and compress each segment of them that is full.

    Args:
        network: A model that learns memories.
        rows: The prompts.
        settings: Arguments of `generate`, but for those that look at a whole text.

    Returns:
        Token ids of prompts and continuations, int64 `[B, T + n]`.

    Raises:
        ValueError: A setting looks at a whole text, a row has no token, or the positions do not suffice.
    """
    own, config, others = generation_configs(network.plain_model.generation_config, settings, rows.ids.shape[1])
    _refuse_whole_text(config, others)
    ends = own.eos_token_id if config.eos_token_id is None else config.eos_token_id
    length = network.reader.layout.segment_length
    texts = rows.lists()
    if not all(map(len, texts)):
        raise ValueError("a row has no token that could be continued")
    prompts = [len(text) for text in texts]
    compressed = [0] * len(texts)
    with evaluating(network):
        # A memory that the base model reads becomes a prefix, which says what it is of.
        origin = network.origin() if network.reads_as_base else None
        # Rows that have not ended, and their memory.
        active, memory, written = list(range(len(texts))), network.new_memory(len(texts), origin), 0
        while active and written < config.max_new_tokens:
            # The last token of a full segment is read again, because it predicts the first of the next one.
            full = [(len(texts[row]) - 1) // length * length for row in active]
            news = [texts[row][compressed[row] : end] for row, end in zip(active, full, strict=True)]
            memory = compress_rows(network, news, memory, finish=False, follows=True)
            for row, end in zip(active, full, strict=True):
                compressed[row] = end
            read = [texts[row][compressed[row] :] for row in active]
            config_of_part = copy.deepcopy(config)
            config_of_part.max_new_tokens = min(
                config.max_new_tokens - written, *(length + 1 - len(tokens) for tokens in read)
            )
            least = max(0, (config.min_new_tokens or 0) - written)
            config_of_part.min_new_tokens = min(least, config_of_part.max_new_tokens)
            part = left_padded(read, network.device)
            asked = {"generation_config": config_of_part, "eos_token_id": ends, **others}
            found = generate_behind(network, memory, part, asked)
            written += config_of_part.max_new_tokens
            left = []
            for place, (row, tokens) in enumerate(zip(active, found[:, part.ids.shape[1] :].cpu(), strict=True)):
                tokens, ended = _until_end(tokens, ends)
                texts[row] = torch.cat([texts[row], tokens])
                if not ended:
                    left.append(place)
            active, memory = [active[place] for place in left], memory.rows(left) if left else memory
    return _joined(rows, [text[prompt:] for text, prompt in zip(texts, prompts, strict=True)], config)


def _refuse_whole_text(config: GenerationConfig, others: dict[str, Any]) -> None:
    wrong = [name for name, value in _NEEDS_WHOLE_TEXT.items() if getattr(config, name, None) not in (None, value)]
    wrong += [name for name, value in others.items() if value is not None and name != "use_cache"]
    if wrong:
        raise ValueError(
            f"{wrong[0]} cannot go with rows that are written segment by segment, as a trainer that samples needs "
            "them: leave it out, or keep prompt and completion within the segment_length"
        )


def _until_end(tokens, ends):
    """The tokens up to the first end token, which is one of them; and whether there is one."""
    ends = torch.as_tensor([] if ends is None else ends, dtype=tokens.dtype).reshape(-1)
    places = torch.isin(tokens, ends).nonzero()
    return (tokens[: places[0] + 1], True) if len(places) else (tokens, False)


def _joined(rows, continuations, config):
    """Prompts with their continuations behind them, padded on the right."""
    padding = rows.ids.new_full((len(rows.ids), max(map(len, continuations))), config.pad_token_id)
    for row, tokens in zip(padding, continuations, strict=True):
        row[: len(tokens)] = tokens.to(row.device)
    return torch.cat([rows.ids, padding], 1)
