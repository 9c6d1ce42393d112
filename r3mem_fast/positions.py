"""What a model's configuration says of its positions and of the tokens that begin and end its texts."""

from typing import Any

from .config import REACH, R3MemConfig
from .memory import MemoryLayout
from .reversible.convert import text_config


def positions_of(model: Any) -> int | None:
    """Number of positions of a model; None if its configuration names no limit."""
    config = text_config(model.config)
    # The other name is Whisper's, whose decoder has other positions than its encoder.
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)


def original_positions_of(model: Any) -> int | None:
    """Positions that a model was first trained on: beyond them some rotary embeddings change their frequencies."""
    rope = getattr(text_config(model.config), "rope_parameters", None)
    original = rope.get("original_max_position_embeddings") if isinstance(rope, dict) else None
    known = [count for count in (original, positions_of(model)) if count]
    return int(min(known)) if known else None


def positions_for_memories(config: R3MemConfig, model: Any) -> int | None:
    """Positions that a model's memories share with what is read behind them.

    Args:
        config: Settings of the memory network.
        model: The base model.
    """
    return positions_of(model) if config.memory_writer == "tokens" else original_positions_of(model)


def special_id(model: Any, name: str) -> Any:
    """An id that a model's configuration names, or that of its language model; None if neither does.

    Args:
        model: The model.
        name: Name of the setting, such as `eos_token_id`.
    """
    return first_id(*(getattr(config, name, None) for config in (model.config, text_config(model.config))))


def first_id(*ids: Any) -> Any:
    """The first argument that is an id, or a list of ids (then its first); None if there is none."""
    for given in ids:
        given = given[0] if isinstance(given, (list, tuple)) and given else given
        if isinstance(given, int):
            return given
    return None


def default_matched(model: Any) -> MemoryLayout | None:
    """Layout of the matched memories of a model that has learned none; None if it has too few positions.

    Args:
        model: The base model.
    """
    positions = original_positions_of(model)
    length = min(256, (positions or 2 * REACH) // 4)
    if length < 16:
        return None
    return R3MemConfig(
        memory_writer="matched", num_memory_tokens=length // 4, memory_budget=length, segment_length=length,
        segment_overlap=length // 8,
    ).memory_layout(positions)  # fmt: skip
