"""`r3mem train`: an adapter that writes memories of long texts, and reads on behind them."""

import dataclasses
import json

from .common import begin, pipeline_of
from .options import OF_MEMORIES, OF_NEW_ADAPTERS, OF_TRAINING, add_new_adapter_options, add_run_options, positive


def add_commands(commands):
    train = commands.add_parser("train", help="train an adapter to make memories of long texts, and to read them")
    train.set_defaults(run=_train)
    data = "a UTF-8 text, a .jsonl file, or a folder of the datasets library"
    train.add_argument("texts", metavar="DATA", nargs="+", help=data)
    train.add_argument("--output", "-o", required=True, metavar="FOLDER", help="of the adapter; made, or resumed")
    train.add_argument("--model", help="a folder or hub id, or the folder of an adapter (smollm2-135m)")
    train.add_argument("--base", help="of an adapter that is trained on: its base model (where it was)")
    train.add_argument("--column", default="text", help="of the texts in a .jsonl file or folder (%(default)s)")
    add_new_adapter_options(train, memory_tokens=16)
    train.add_argument("--distillation", type=float, help="weight of the base model with full context, 0 to 1 (0)")
    train.add_argument("--memory-dropout", type=float, help="share of segments read without their memory (0)")
    train.add_argument("--bptt-segments", type=int, help="through which gradients pass at most (all)")
    train.add_argument("--kept-segments", choices=["none", "device", "host"], help="until the backward pass (none)")
    train.add_argument("--segments", type=positive, default=3, help="of a window (%(default)s)")
    steps = "of training (%(default)s: an hour or two on two CPU cores for the embedded model)"
    train.add_argument("--steps", type=positive, default=1000, help=steps)
    train.add_argument("--batch-size", type=positive, default=1, help="windows a pass (%(default)s)")
    train.add_argument("--accumulate", type=positive, default=1, help="passes a step (%(default)s)")
    train.add_argument("--learning-rate", type=float, default=1e-3, help="(%(default)s)")
    train.add_argument("--hold-out", type=float, default=0.0, help="share at the end of each text (%(default)s)")
    dtypes = ["bfloat16", "float32"]
    train.add_argument("--adapter-dtype", choices=dtypes, help="of the adapter's files (as trained, float32)")
    train.add_argument("--checkpoint-steps", type=positive, default=50, help="(%(default)s)")
    train.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    add_run_options(train)


def _train(options):
    from ..files import locked

    with locked(options.output):
        options.trained_folder = options.output
        return _train_in(options)


def _train_in(options):
    model = options.model or "smollm2-135m"
    begin(options, f"Loading {model}")
    import torch

    from .. import R3MemConfig, TrainSettings, adapter_folder
    from ..data.corpus import read_texts

    texts = [text for path in options.texts for text in read_texts(path, options.column)]
    settings = TrainSettings(
        steps=options.steps,
        segments=options.segments,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        learning_rate=options.learning_rate,
        held_out=options.hold_out,
        checkpoint_steps=options.checkpoint_steps,
        seed=options.seed,
    )
    named = {**OF_NEW_ADAPTERS, **OF_TRAINING}
    given = {named[name]: value for name in named if (value := getattr(options, name, None)) is not None}
    if adapter_folder.adapter_named(model) is not None:
        if fixed := [name for name in OF_NEW_ADAPTERS if getattr(options, name, None) is not None]:
            raise ValueError(f"{model} is an adapter, in which --{fixed[0].replace('_', '-')} is fixed already")
        pipeline = pipeline_of(options, model, base=options.base)
        network = pipeline.model
        network.r3mem_config = dataclasses.replace(network.r3mem_config, **given)
    else:
        if options.memory_tokens == 0 and (useless := [n for n in (*OF_MEMORIES, *OF_TRAINING) if named[n] in given]):
            raise ValueError(f"--{useless[0].replace('_', '-')} is for adapters with memory tokens")
        config = R3MemConfig(**{"num_memory_tokens": 16, **given})
        pipeline = pipeline_of(options, model, base=options.base, config=config, seed=options.seed)
    dtype = None if options.adapter_dtype is None else getattr(torch, options.adapter_dtype)
    report = pipeline.train(
        texts, folder=options.output, settings=settings, adapter_dtype=dtype, progress=not options.json
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(report)
        print(f"Make a memory with: r3mem compress {options.output} TEXT -o FILE")
    return 0
