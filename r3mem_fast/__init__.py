"""R3Mem's reversible memory networks as a fast runtime for Hugging Face models."""

import importlib

__version__ = "0.2.0.dev0"

# Loaded on first use: whoever wants only `r3mem_fast.kernels` does not pay for transformers.
_EXPORTS = {
    "GradientReport": "reversible",
    "IntegrityError": "reversible",
    "InverseReport": "reversible",
    "Memory": "memory",
    "MemoryNotReadError": "reversible.cache",
    "MemoryReport": "memory_check",
    "MomentumCoupling": "reversible",
    "PairCollator": "training.collate",
    "R3MemConfig": "config",
    "R3MemModel": "model",
    "R3MemPipeline": "pipeline",
    "RememberReport": "training.remember",
    "RememberSettings": "training.remember",
    "TrainReport": "training.history",
    "TrainSettings": "training.history",
    "build_pairs": "hierarchy",
    "check_gradients": "reversible",
    "check_integrity": "reversible",
    "check_inverse": "reversible",
    "check_memories": "memory_check",
    "load_model": "models",
    "make_reversible": "reversible",
    "reading_backward": "reversible",
    "replay": "reversible",
    "restore": "reversible",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__():
    return sorted(__all__)
