"""What `R3MemModel.generate` needs of transformers' `generate`: its lengths, its configuration, its streamers."""

import contextlib

from transformers import GenerationConfig

# As transformers has it where no length is asked for.
_DEFAULT_NEW_TOKENS = 20


LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")


@contextlib.contextmanager
def generation_config_of(base, config):
    """A model's own generation config while this lasts."""
    own, base.generation_config = base.generation_config, config
    try:
        yield
    finally:
        base.generation_config = own


def new_tokens(given, config, prompt):
    """How many tokens `generate` is to add, at most and at least, as `transformers` decides it.

    given: arguments by the names of `LENGTHS`, which go before the generation config's. prompt: its width, which
    lengths of both kinds that are not of new tokens count.
    """
    if given["max_new_tokens"] is None and given["max_length"] is None:
        given = {**given, "max_new_tokens": config.max_new_tokens, "max_length": config.max_length}
        if given["max_length"] == GenerationConfig().max_length:  # nobody's choice
            given["max_length"] = None
    most = given["max_new_tokens"]
    if most is None:
        most = _DEFAULT_NEW_TOKENS if given["max_length"] is None else given["max_length"] - prompt
    if most < 1:
        raise ValueError(f"max_length={given['max_length']} leaves no token behind a prompt of {prompt}")
    least = given["min_new_tokens"] if given["min_new_tokens"] is not None else config.min_new_tokens
    if least is None:
        length = given["min_length"] if given["min_length"] is not None else config.min_length
        least = max(0, (length or 0) - prompt)
    return most, least


class StreamerOfPrompts:
    """Gives a streamer the prompts first, without the unfinished tokens before them; then what is generated."""

    def __init__(self, streamer, prompts):
        self._streamer, self._first = streamer, prompts

    def put(self, value):
        value, self._first = (value if self._first is None else self._first.cpu()), None
        self._streamer.put(value)

    def end(self):
        self._streamer.end()


def until(row, end):
    ends = (row == end).nonzero()
    return row[: ends[0]] if len(ends) else row
