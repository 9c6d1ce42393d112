"""How adapters are trained: settings of `remember` and of `train`. Needs no torch."""

import dataclasses

from ..settings import check, described, setting

RUN, OBJECTIVE, OTHER_TEXT, DECOYS = "run", "objective", "other text", "decoys"


@described
@dataclasses.dataclass(frozen=True)
class RememberSettings:
    """How context–query pairs are learned.

    Raises:
        ValueError: A setting is out of range.
    """

    max_steps: int = setting(
        2000,
        "Steps of training at most. The environment variable R3MEM_MAX_STEPS may ask for fewer.",
        group=RUN,
        option="max-steps",
        least=1,
    )
    learning_rate: float = setting(
        1.5e-3,
        "Learning rate of AdamW while little is learned. It falls with the loss.",
        group=RUN,
        option="learning-rate",
        least=0,
    )
    tokens_per_step: int = setting(
        160, "Tokens of queries and contexts in one batch, padding included.", group=RUN, least=1
    )
    compress_every: int = setting(
        8,
        "Steps from one to the next with the forward term of the objective; 0: none has it.",
        group=OBJECTIVE,
        least=0,
    )
    divergence: float | None = setting(
        0.04,
        "Divergence from the base model that the forward direction is held to, in nats a token. It is measured on "
        "text that the base model wrote itself, which keeps the perplexity of other text; learning goes on until it "
        "is no larger.",
        group=OTHER_TEXT,
        least=0,
        unset="it is let go",
    )
    anchor_weight: float = setting(20.0, "Weight of that divergence in the objective.", group=OTHER_TEXT, least=0)
    anchor_windows: int = setting(24, "Windows of that text, one of them a step.", group=OTHER_TEXT, least=1)
    anchor_tokens: int = setting(48, "Tokens of such a window.", group=OTHER_TEXT, least=2)
    decoys: int | None = setting(
        None,
        "Queries without a context, learned in every `decoys_every`-th step; 0: none. Without them any query would be "
        "answered with what was learned, and the more is learned, the more queries are near to one that is known. "
        "Those that are answered all the same are asked again, until none is.",
        group=DECOYS,
        least=0,
        unset="one for each six pairs, four at least",
    )
    decoys_every: int = setting(4, "Steps from one to the next with decoys.", group=DECOYS, least=1)
    margin: float = setting(
        0.03,
        "Loss, in nats, below which a token that is predicted teaches no more. Nothing is learned further than "
        "needed.",
        group=OBJECTIVE,
        least=0,
    )
    checkpoint_seconds: float = setting(
        30.0,
        "Seconds between checkpoints in FOLDER.",
        group=RUN,
        option="checkpoint-seconds",
        metavar="SECONDS",
        least=0,
    )
    seed: int = setting(0, "Seed of the order and the samples.", group=RUN, option="seed", least=0)

    def __post_init__(self):
        check(self)


@described
@dataclasses.dataclass(frozen=True)
class RefineSettings:
    """How the values of memories are tuned to their own texts.

    Raises:
        ValueError: A setting is out of range.
    """

    steps: int = setting(
        40,
        "Steps of each row. The environment variable R3MEM_MAX_STEPS may ask for fewer.",
        group=RUN,
        option="steps",
        least=1,
    )
    learning_rate: float = setting(
        0.02,
        "Learning rate of Adam, in units of the size of a layer's values. It goes down to 0 as a cosine.",
        group=RUN,
        option="learning-rate",
        above=0,
    )
    asked_tokens: int = setting(
        96,
        "Tokens, at most, that are read in a step behind the memory, and behind its text.",
        group=OBJECTIVE,
        least=2,
    )
    context_tokens: int = setting(
        1024, "Tokens of the text, at most, that the model reads in a step to compare with.", group=OBJECTIVE, least=2
    )
    continued_share: float = setting(
        0.5,
        "Share of the steps that read on behind the text, as the model itself goes on there, in place of what asks "
        "for a piece of it. Without them a memory learns to be copied, and what follows is read worse.",
        group=OBJECTIVE,
        option="continued-share",
        metavar="SHARE",
        least=0,
        most=1,
    )
    checkpoint_seconds: float = setting(
        30.0, "Seconds between checkpoints.", group=RUN, option="checkpoint-seconds", metavar="SECONDS", least=0
    )
    seed: int = setting(0, "Seed of what is drawn.", group=RUN, option="seed", least=0)

    def __post_init__(self):
        check(self)


@described
@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How a memory network is trained on texts.

    Raises:
        ValueError: A setting is out of range.
    """

    steps: int = setting(
        1000,
        "Steps of training: an hour or two on two CPU cores for the embedded model. The environment variable "
        "R3MEM_MAX_STEPS may ask for fewer.",
        group=RUN,
        option="steps",
        least=1,
    )
    segments: int = setting(
        3, "Segments of a window, which is a row of a batch, at most.", group=RUN, option="segments", least=2
    )
    batch_size: int = setting(1, "Windows a pass.", group=RUN, option="batch-size", least=1)
    accumulate: int = setting(1, "Passes a step.", group=RUN, option="accumulate", least=1)
    learning_rate: float = setting(
        1e-3,
        "Learning rate of AdamW. It is reached after `warmup_steps`, and goes down to 0 as a cosine.",
        group=RUN,
        option="learning-rate",
        above=0,
    )
    warmup_steps: int = setting(20, "Steps until the learning rate is reached.", group=RUN, least=0)
    adapter_precision: str = setting(
        "float32",
        "Dtype of adapters and memory tokens in training. `float32`: beside weights in bfloat16 autocast rounds them, "
        "and what they are multiplied with, in each pass; `bfloat16`, for weights in bfloat16: they are rounded after "
        "each step from float32 master weights, gradients are added in float32, and autocast is off. Checkpoints and "
        "what is saved hold float32 in both cases.",
        group=RUN,
        option="adapter-precision",
        choices=("float32", "bfloat16"),
    )
    held_out: float = setting(
        0.0, "Share of each text, at its end, that is not trained on.", group=RUN, option="hold-out", least=0, below=1
    )
    checkpoint_steps: int = setting(50, "Steps between checkpoints.", group=RUN, option="checkpoint-steps", least=1)
    drawn_memory_tokens: tuple[int, ...] | None = setting(
        None,
        "Slots of a segment N,N,..., of which each pass draws one, for anchored memories: one adapter for all sizes.",
        group=RUN,
        option="drawn-memory-tokens",
        unset="the model's, always",
    )
    foreign_memories: float = setting(
        0.0,
        "Share of the passes in which the rows of a batch read each other's memories in the last segment of a window, "
        "and learn to predict there as the base model does without one. For adapters that read, by distillation.",
        group=RUN,
        option="foreign-memories",
        least=0,
        most=1,
    )
    seed: int = setting(0, "Seed of the order.", group=RUN, option="seed", least=0)

    def __post_init__(self):
        check(self)
        if self.foreign_memories and self.batch_size < 2:
            raise ValueError("foreign_memories are those of other rows: it needs a batch_size of at least 2")
        sizes = self.drawn_memory_tokens
        if sizes is not None and not (sizes and all(type(size) is int and size > 0 for size in sizes)):
            raise ValueError(f"drawn_memory_tokens must be positive integers, or None, got {sizes!r}")
