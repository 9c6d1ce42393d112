"""Loads what a pipeline is made from: a model by name, an adapter with its base model, or objects in memory."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import adapter_folder
from .config import R3MemConfig
from .data.models import load_model
from .devices import DTYPES, as_device, as_dtype, default_dtype
from .manifest import interrupted_run, read_manifest
from .model import R3MemModel
from .remembered import Entry


class Loaded(NamedTuple):
    """A memory network with what belongs to it.

    Attributes:
        model: The network.
        tokenizer: Its tokenizer.
        remembered: Entries for what its adapter remembers.
        folder: The folder of its adapter; None: there is none.
    """

    model: R3MemModel
    tokenizer: Any
    remembered: list[Entry]
    folder: Path | None


def load(
    model: Any,
    tokenizer: Any = None,
    *,
    base: "str | Path | R3MemModel | None",
    config: R3MemConfig | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    attn_implementation: str | None,
    seed: int,
    **settings: Any,
) -> Loaded:
    """Load a memory network. Arguments and errors are those of `R3MemPipeline`, which describes them in full.

    Args:
        model: A model, or its name, or the folder or name of an adapter.
        tokenizer: Tokenizer of a model that is given as an object.
        base: Folder or hub id of an adapter's base model, or a memory network whose adapter it takes the place of;
            None: the base model in its manifest.
        config: Settings of a new adapter.
        device: Device of a model that is given by name.
        dtype: Dtype of the weights of a model that is given by name.
        attn_implementation: Attention implementation of a model that is given by name.
        seed: Seed of new adapters.
        settings: More keyword arguments of `load_model`.

    Raises:
        OSError: A model or an adapter is not found.
        TypeError: Arguments do not go together.
        ValueError: A model cannot be made reversible, or does not fit the adapter.
    """
    dtype = None if dtype is None else as_dtype(dtype)
    if device is not None:
        as_device(device)
    of_names = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation, **settings}
    given = sorted(name for name, value in of_names.items() if value is not None)
    if isinstance(base, R3MemModel):
        if tokenizer is None or not isinstance(model, (str, Path)):
            raise TypeError("a memory network as base takes the folder of an adapter, and its tokenizer")
        if given or config is not None:
            raise TypeError(f"{(given or ['config'])[0]} is for a model that is loaded here, and base is one already")
        folder = adapter_folder.find(model)
        manifest = adapter_folder.replace_weights(base, folder)
        return Loaded(base, tokenizer, manifest.get("remembered", []), folder)
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise TypeError("a model that is given by name brings its own tokenizer")
        settings |= {"device": device, "attn_implementation": attn_implementation}
        if (adapter := adapter_folder.adapter_named(model, **settings)) is not None:
            if config is not None:
                raise TypeError(f"{model} was saved with its config; another one does not fit its adapters")
            return _load_adapter(adapter, base, dtype, settings)
        if base is not None:
            raise TypeError(f"base is of an adapter, and {model} is a model of its own")
        if run := interrupted_run(model):
            raise ValueError(f"{model} holds no adapter yet. {run}")
        model, tokenizer = load_model(model, dtype=dtype or default_dtype(device or "cpu"), **settings)
    elif tokenizer is None:
        raise TypeError("a model object needs its tokenizer: R3MemPipeline(model, tokenizer)")
    elif given or base is not None:
        raise TypeError(f"{(given or ['base'])[0]} is for a model that is given by name")
    if not isinstance(model, R3MemModel):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = R3MemModel(model, config)
    elif config is not None:
        raise TypeError("an R3MemModel has its config already")
    return Loaded(model, tokenizer, [], None)


def _load_adapter(folder, base, dtype, settings):
    manifest = read_manifest(folder)
    # The dtype of training: contexts that are exact in one dtype may not be exact in another.
    dtype = dtype or DTYPES.get(manifest.get("dtype", ""), torch.float32)
    # A revision is one of the adapter, not of its base model.
    settings = {key: value for key, value in settings.items() if key != "revision"}
    found, tokenizer = adapter_folder.load_base(folder, manifest, base, dtype=dtype, **settings)
    return Loaded(R3MemModel.from_pretrained(folder, found), tokenizer, manifest.get("remembered", []), Path(folder))
