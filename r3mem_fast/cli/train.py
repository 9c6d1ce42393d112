"""`r3mem train`: trains an adapter to write memories of long texts, and to read on behind them."""

import argparse
import dataclasses
import json
from typing import Any

from ..config import R3MemConfig
from ..training.settings import TrainSettings
from .common import begin, pipeline_of
from .options import (
    NEW_ADAPTER,
    OF_MEMORIES,
    OF_TRAINING,
    add_run_options,
    add_settings,
    given_settings,
    option_of,
)

# This command does not train the backward direction.
_NEW_ADAPTER = tuple(name for name in NEW_ADAPTER if name not in ("core", "backward"))
_MEMORY_TOKENS = 16


def add_commands(commands: Any) -> None:
    """Add the command `train`."""
    train = commands.add_parser("train", help="train an adapter to make memories of long texts, and to read them")
    train.set_defaults(run=_train)
    data = "a UTF-8 text, a .jsonl file, or a folder of the datasets library"
    train.add_argument("texts", metavar="DATA", nargs="+", help=data)
    train.add_argument(
        "--output", "-o", required=True, metavar="FOLDER", help="folder of the adapter; made, or resumed"
    )
    train.add_argument("--model", help="a folder or hub id, or the folder of an adapter (smollm2-135m)")
    train.add_argument("--base", help="base model of an adapter that is trained on (where it was)")
    train.add_argument("--column", default="text", help="column of the texts in a .jsonl file or folder (%(default)s)")
    add_settings(train, R3MemConfig, _NEW_ADAPTER, defaults={"num_memory_tokens": _MEMORY_TOKENS})
    add_settings(train, R3MemConfig, OF_TRAINING)
    add_settings(train, TrainSettings)
    dtypes = ["bfloat16", "float32"]
    train.add_argument("--adapter-dtype", choices=dtypes, help="dtype of the adapter's files (as trained, float32)")
    add_run_options(train)


def _train(options: argparse.Namespace) -> int:
    from ..files import locked

    with locked(options.output):
        options.trained_folder = options.output
        return _train_in(options)


def _train_in(options: argparse.Namespace) -> int:
    settings = TrainSettings(**given_settings(options, TrainSettings))
    of_adapter = given_settings(options, R3MemConfig, _NEW_ADAPTER)
    of_training = given_settings(options, R3MemConfig, OF_TRAINING)
    model = options.model or "smollm2-135m"
    begin(options, f"Loading {model}")
    import torch

    from .. import adapter_folder
    from ..data.corpus import read_texts

    texts = [text for path in options.texts for text in read_texts(path, options.column)]
    if adapter_folder.adapter_named(model) is not None:
        if of_adapter:
            raise ValueError(f"{model} is an adapter, in which {option_of(next(iter(of_adapter)))} is fixed already")
        pipeline = pipeline_of(options, model, base=options.base)
        network = pipeline.model
        network.r3mem_config = dataclasses.replace(network.r3mem_config, **of_training)
    else:
        given = {**of_adapter, **of_training}
        if given.get("num_memory_tokens") == 0 and (
            useless := [n for n in (*OF_MEMORIES, *OF_TRAINING) if n in given]
        ):
            raise ValueError(f"{option_of(useless[0])} is for adapters with memory tokens")
        config = R3MemConfig(**{"num_memory_tokens": _MEMORY_TOKENS, **given})
        pipeline = pipeline_of(options, model, base=options.base, config=config, seed=settings.seed)
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
