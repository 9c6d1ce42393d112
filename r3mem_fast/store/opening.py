"""`StoreModel`: the model of a store, loaded when it is needed, and whether the store's memories are of it."""

import dataclasses
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter_folder import adapter_named
from ..config import R3MemConfig
from ..fingerprints import layout_fingerprint
from ..integrations import attention
from ..integrations.capture import implementation_of
from ..memory.layout import MemoryLayout
from ..model import R3MemModel
from ..pipeline import R3MemPipeline
from ..positions import positions_for_memories
from .database import Database
from .defaults import OF_MATCHED

DEFAULT_MODEL = "smollm2-135m"


def pipeline_of(
    given: "str | Path | R3MemPipeline", config: R3MemConfig | None, settings: dict[str, Any]
) -> R3MemPipeline:
    """A pipeline whose memories its base model reads: matched ones, or those of an adapter of anchors.

    Args:
        given: What `R3MemPipeline` takes by name, or a pipeline.
        config: Settings of a pipeline that is loaded here; None: the defaults. An adapter has its own.
        settings: More arguments of such a pipeline.

    Raises:
        OSError: There is no such model.
        TypeError: A pipeline is given, and settings of one.
        ValueError: Its memories are other ones, or it is an adapter of another kind.
    """
    if isinstance(given, R3MemPipeline):
        if settings:
            raise TypeError(f"{next(iter(settings))} is for a model that is given by name")
        found = given
    else:
        learned = adapter_named(given, **settings) is not None
        found = R3MemPipeline(given, config=None if learned else config, **settings)
        if learned and not found.model.is_anchored:
            raise ValueError(
                f"{given} is an adapter, and not one of anchors; a store keeps memories that a base model reads: name "
                "that, or an adapter of anchors"
            )
        if found.model.is_anchored and not learned:
            raise ValueError(
                'memory_writer="anchored" is for adapters that have learned: name the folder of one as the model, or '
                'use memory_writer="matched"'
            )
    if not found.model.reads_as_base:
        raise ValueError(
            "a store keeps memories that the base model reads, and this pipeline's are written by memory tokens, or "
            'read with its adapters; use R3MemConfig(memory_writer="matched", adapter_rows="memory", ...)'
        )
    return found


def _name_of(given):
    """The name that a store keeps of a model: a folder is found from elsewhere, too."""
    return str(Path(given).resolve() if Path(given).exists() else given)


def check_config(given: Any, config: R3MemConfig | Mapping[str, Any] | None) -> None:
    """Check what a store is given as its config, before its folder is made.

    Args:
        given: What it is given as its model.
        config: The config, or some of its settings by name.

    Raises:
        TypeError: A pipeline is given, which has one; or there is no setting of a name.
    """
    if isinstance(given, R3MemPipeline) and config is not None:
        raise TypeError("an R3MemPipeline has its config already")
    names = set(config) if isinstance(config, Mapping) else set()
    if unknown := sorted(names - {field.name for field in dataclasses.fields(R3MemConfig)}):
        raise TypeError(f"config has settings that R3MemConfig has not: {', '.join(unknown)}")


def lock_of(given: Any) -> threading.RLock:
    """Return the lock that a store holds while its model reads, which changes the model for that time.

    Args:
        given: What the store was given as its model. All stores of one pipeline hold the pipeline's lock, one after
            another; a store that loads a pipeline of its own has a lock of its own.
    """
    return given.lock if isinstance(given, R3MemPipeline) else threading.RLock()


def allocation_for(model: R3MemModel) -> str:
    """How many slots heads have where nobody says: "adaptive", or "uniform" where a model knows no other memories.

    Args:
        model: The model. Anchors have learned for the memories of their own settings.
    """
    if model.is_anchored:
        return model.r3mem_config.memory_allocation
    kernels = implementation_of(model.decoder.config) == attention.NAME
    return "uniform" if kernels or model.reader.keeps_latents() else "adaptive"


def queries_for(model: R3MemModel) -> str:
    """Whose queries memories are matched to where nobody says: those that anchors have learned for, or "own".

    Args:
        model: The model.
    """
    return model.r3mem_config.memory_queries if model.is_anchored else "own"


def _known_to(model: R3MemModel, config: R3MemConfig) -> R3MemConfig:
    """Settings of memories with what a model knows no other of, or what its anchors have learned for."""
    changed: dict[str, Any] = {"memory_allocation": allocation_for(model), "memory_queries": queries_for(model)}
    if model.is_anchored:
        learned = model.r3mem_config
        changed |= {n: getattr(learned, n) for n in ("num_memory_tokens", "segment_length", "segment_overlap")}
        changed["memory_budget"] = max(config.memory_budget or 0, learned.num_memory_tokens)
    return dataclasses.replace(config, **changed)


def _sizes_of(model: R3MemModel) -> R3MemConfig:
    """Settings that memories of the sizes of a model's are made with, anchored ones too."""
    config = model.r3mem_config
    if not model.is_anchored:
        return config
    sizes = {name: getattr(config, name) for name in (*OF_MATCHED, "max_memory_segments")}
    if sizes["beyond_budget"] == "rematch_once":  # when a text has ended, and a conversation goes on
        sizes["beyond_budget"] = "rematch"
    return R3MemConfig(memory_writer="matched", adapter_rows="memory", **sizes)


class StoreModel:
    """The model that a store's memories are made with.

    Args:
        given: What `R3MemPipeline` takes by name, or a pipeline; None: what the store was made with.
        config: Settings of a pipeline that is loaded here, or some of them by name, in place of those that it would
            have; None: what the store was made with.
        database: The store's database.
        settings: More arguments of such a pipeline.
    """

    def __init__(
        self,
        given: "str | Path | R3MemPipeline | None",
        config: R3MemConfig | Mapping[str, Any] | None,
        database: Database,
        settings: dict[str, Any],
    ):
        self._changes: dict[str, Any] = dict(config) if isinstance(config, Mapping) else {}
        self._config: R3MemConfig | None = None if isinstance(config, Mapping) else config
        self._given, self._database, self._settings = given, database, settings
        self._pipeline: R3MemPipeline | None = None

    def pipeline(self, default: R3MemConfig) -> R3MemPipeline:
        """The pipeline, which the first call loads.

        Args:
            default: Settings of a new store where none are given, but for what the model knows no other of.

        Raises:
            OSError: There is no such model.
            ValueError: Its base model does not read its memories.
        """
        if self._pipeline is None:
            self._pipeline = self._opened(default)
        return self._pipeline

    def _opened(self, default):
        """Load the pipeline; again, where the model turns out to know no memories of settings that nobody chose."""
        given = self._given or self._database.setting("model") or DEFAULT_MODEL
        if isinstance(given, R3MemPipeline):
            return pipeline_of(given, None, self._settings)
        goes_on, settings = self._goes_on(), dict(self._settings)
        if goes_on and settings.get("dtype") is None:
            settings["dtype"] = kept(self._database, "dtype", None)  # not what this machine would choose
        earlier = self._kept_config() if goes_on and self._config is None else None
        config = dataclasses.replace(self._config or earlier or default, **self._changes)
        found = pipeline_of(given, config, settings)
        if self._config is None:
            self._config = self._fitting(found.model, config, is_kept=earlier is not None)
            if self._config != config and not found.model.is_anchored:
                found = pipeline_of(given, self._config, settings)
        return found

    def _fitting(self, model, config, is_kept):
        """Settings of memories that a model knows, in place of those that nobody chose for it."""
        if is_kept and model.is_anchored:  # what is kept may be of another adapter, or of none
            is_kept = model.origin().adapter == kept(self._database, "adapter", None)
        if not is_kept:
            return dataclasses.replace(_known_to(model, config), **self._changes)
        if not self._is_used() and allocation_for(model) == "uniform":
            # Nothing is lost if the model is opened in a way in which it reads no other memories.
            return dataclasses.replace(config, **{"memory_allocation": "uniform", **self._changes})
        return config

    @property
    def layout(self) -> MemoryLayout:
        """Layout of the store's memories, once the pipeline is loaded.

        Raises:
            ValueError: The settings are not those of matched memories, or do not fit into the model's positions.
        """
        assert self._pipeline is not None, "see pipeline"
        model = self._pipeline.model
        if not model.is_anchored:
            return model.reader.layout
        config = self._config or _sizes_of(model)
        if config.memory_writer != "matched" or not config.num_memory_tokens:
            raise ValueError(
                'config gives the sizes of an adapter\'s memories here: use memory_writer="matched", with '
                "num_memory_tokens"
            )
        layout = config.memory_layout(positions_for_memories(config, model))
        assert layout is not None, "see above"
        return layout

    def identity(self, **more: Any) -> dict[str, str]:
        """Settings of the database that say what memories of this model are made with.

        Args:
            more: What they depend on beside the model, values for JSON.
        """
        assert self._pipeline is not None, "see pipeline"
        model = self._pipeline.model
        origin = model.origin()
        made_with = {
            "base": origin.base, "layout": layout_fingerprint(self.layout),
            "tokenizer": self._pipeline.codec.fingerprint, "dtype": str(model.dtype).removeprefix("torch."), **more,
        }  # fmt: skip
        if model.is_anchored:
            made_with["adapter"] = origin.adapter
        if self._given is None:
            name = self._database.setting("model") or DEFAULT_MODEL
        elif isinstance(self._given, R3MemPipeline):
            name = model.peft_model.get_base_model().name_or_path or DEFAULT_MODEL
            if model.is_anchored:  # without a folder it has to be given again
                folder = self._given.folder
                name = self._database.setting("model") or name if folder is None else str(folder.resolve())
        else:
            name = _name_of(self._given)
        config = json.dumps((self._config or _sizes_of(model)).to_dict())
        return {"made_with": json.dumps(made_with, sort_keys=True), "model": name, "config": config}

    def _goes_on(self):
        """Whether settings that the store keeps are for the model that is given.

        Where nothing was said, that need not be the one that the folder was opened with before.
        """
        if self._given is None or self._is_used():
            return True
        return not isinstance(self._given, R3MemPipeline) and _name_of(self._given) == self._database.setting("model")

    def _is_used(self):
        """Whether something was said."""
        return bool(self._database.rows("SELECT 1 FROM items LIMIT 1"))

    def _kept_config(self):
        config = self._database.setting("config")
        return None if config is None else R3MemConfig.from_dict(json.loads(config))

    def check(self, identity: dict[str, str]) -> None:
        """Check that a store's memories are of a model, or take note of it in a new store.

        Args:
            identity: What `identity` gave.

        Raises:
            ValueError: They are of another model, or were made with other settings.
        """
        its = self._database.setting("made_with")
        if its is None:
            self._database.put_settings(identity)
        elif its != identity["made_with"]:  # a store in which nothing was said has no memories that could be others
            self._database.put_settings(identity, anew=True, if_empty=True)
        its = self._database.setting("made_with")
        if its is not None and its != identity["made_with"]:
            made, asked = json.loads(its), json.loads(identity["made_with"])
            differs = ", ".join(name for name in made | asked if asked.get(name) != made.get(name))
            raise ValueError(
                f"the memories in {self._database.path.parent} were made with another model or other settings than "
                f"these (they differ in: {differs}). Open the folder with those, or make the memories anew from the "
                "texts: rebuild(), r3mem store rebuild"
            )
        if self._given is not None and self._database.setting("model") != identity["model"]:  # it was moved
            self._database.put_settings({"model": identity["model"]}, anew=True)


def kept(database: Database, name: str, default: Any) -> Any:
    """What a store's memories are made with.

    Args:
        database: The store's database.
        name: What is asked for, as `StoreModel.identity` names it.
        default: That of a new store.
    """
    made_with = database.setting("made_with")
    return default if made_with is None else json.loads(made_with).get(name, default)
