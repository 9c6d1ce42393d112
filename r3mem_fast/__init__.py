"""R3Mem's reversible memory networks as a fast runtime for Hugging Face models."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

# Loaded on first use, so that `r3mem_fast.kernels` alone can be used without importing transformers.
_EXPORTS = {
    "AdaptedCoupling": "reversible",
    "AdapterShelf": "store",
    "AdditiveCoupling": "reversible",
    "BDIACoupling": "reversible",
    "Calibration": "reversible",
    "DocumentStore": "store",
    "GradientReport": "reversible",
    "IntegrityError": "reversible",
    "InverseReport": "reversible",
    "MasterAdamW": "integrations.masters",
    "Memory": "memory",
    "MemoryNotReadError": "reversible.past",
    "MemoryReport": "memory_check",
    "MemoryStore": "store",
    "MomentumCoupling": "reversible",
    "PairCollator": "training.collate",
    "R3MemConfig": "config",
    "R3MemModel": "model",
    "R3MemPipeline": "pipeline",
    "RefineReport": "training.refine",
    "RefineSettings": "training.settings",
    "RememberReport": "training.remember",
    "RememberSettings": "training.settings",
    "ScaledCoupling": "reversible",
    "TrainReport": "training.history",
    "TrainSettings": "training.settings",
    "build_pairs": "hierarchy",
    "calibrate": "reversible",
    "check_gradients": "reversible",
    "check_integrity": "reversible",
    "check_inverse": "reversible",
    "check_memories": "memory_check",
    "compile_layers": "reversible",
    "load_model": "data.models",
    "make_reversible": "reversible",
    "master_weights": "integrations.masters",
    "reading_backward": "reversible",
    "reference_model": "reversible",
    "replay": "reversible",
    "restore": "reversible",
    "uncompile_layers": "reversible",
}

if TYPE_CHECKING:  # the same names for editors and type checkers, which cannot follow `__getattr__`
    from .config import R3MemConfig
    from .data.models import load_model
    from .hierarchy import build_pairs
    from .integrations.masters import MasterAdamW, master_weights
    from .memory import Memory
    from .memory_check import MemoryReport, check_memories
    from .model import R3MemModel
    from .pipeline import R3MemPipeline
    from .reversible import (
        AdaptedCoupling,
        AdditiveCoupling,
        BDIACoupling,
        Calibration,
        GradientReport,
        IntegrityError,
        InverseReport,
        MomentumCoupling,
        ScaledCoupling,
        calibrate,
        check_gradients,
        check_integrity,
        check_inverse,
        compile_layers,
        make_reversible,
        reading_backward,
        reference_model,
        replay,
        restore,
        uncompile_layers,
    )
    from .reversible.past import MemoryNotReadError
    from .store import AdapterShelf, DocumentStore, MemoryStore
    from .training.collate import PairCollator
    from .training.history import TrainReport
    from .training.refine import RefineReport
    from .training.remember import RememberReport
    from .training.settings import RefineSettings, RememberSettings, TrainSettings

__all__ = [
    "AdaptedCoupling",
    "AdapterShelf",
    "AdditiveCoupling",
    "BDIACoupling",
    "Calibration",
    "DocumentStore",
    "GradientReport",
    "IntegrityError",
    "InverseReport",
    "MasterAdamW",
    "Memory",
    "MemoryNotReadError",
    "MemoryReport",
    "MemoryStore",
    "MomentumCoupling",
    "PairCollator",
    "R3MemConfig",
    "R3MemModel",
    "R3MemPipeline",
    "RefineReport",
    "RefineSettings",
    "RememberReport",
    "RememberSettings",
    "ScaledCoupling",
    "TrainReport",
    "TrainSettings",
    "__version__",
    "build_pairs",
    "calibrate",
    "check_gradients",
    "check_integrity",
    "check_inverse",
    "check_memories",
    "compile_layers",
    "load_model",
    "make_reversible",
    "master_weights",
    "reading_backward",
    "reference_model",
    "replay",
    "restore",
    "uncompile_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
