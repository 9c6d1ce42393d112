"""A store with a tiny model, of a letter a token."""

import pytest

from r3mem_fast import MemoryStore, R3MemConfig, R3MemPipeline
from r3mem_fast.memory.writers import allocation

CONFIG = R3MemConfig(
    memory_writer="matched",
    adapter_rows="memory",
    num_memory_tokens=4,
    memory_budget=16,
    segment_length=16,
    segment_overlap=2,
    cycle_weight=0.0,
    memory_allocation="adaptive",
    core=(1, 3),
    first_adapted_layer=0,
)
RAW_TOKENS = 8


@pytest.fixture(autouse=True)
def small_heads(monkeypatch):
    """Heads may have one slot, as here they have few on average."""
    monkeypatch.setattr(allocation, "_LEAST_SLOTS", 1)


@pytest.fixture(scope="session")
def pipeline(folder):
    """One model for all stores."""
    return R3MemPipeline(str(folder), config=CONFIG)


@pytest.fixture
def opened(pipeline, tmp_path):
    """Opens stores in folders below `tmp_path`, and closes them at the end."""
    stores = []

    def open_store(name="store", model=pipeline, raw_tokens=RAW_TOKENS, **settings):
        stores.append(MemoryStore(tmp_path / name, model, raw_tokens=raw_tokens, **settings))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def store(opened):
    return opened()


def bits_of(memory):
    """All that a memory holds, for comparisons."""
    return None if memory is None else {name: tensor.tolist() for name, tensor in memory.tensors().items()}
