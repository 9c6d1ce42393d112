"""vLLM's connector, against its interface (0.33, written down here) and a cache in blocks as vLLM lays it out."""

import abc
import importlib
import pickle
import sys
import types
from unittest import mock

import pytest
import torch
from transformers.cache_utils import DynamicCache

from tests.memory.test_matched import ids_of, network
from tests.reversible.tiny import build

BLOCK, BLOCKS = 4, 11
BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"


class KVConnectorMetadata(abc.ABC):  # noqa: B024  # as in vLLM
    pass


class KVConnectorBase_V1(abc.ABC):  # as in vLLM
    def __init__(self, vllm_config, role, kv_cache_config):
        self._connector_metadata = None

    def bind_connector_metadata(self, connector_metadata):
        self._connector_metadata = connector_metadata

    def _get_connector_metadata(self):
        assert self._connector_metadata is not None
        return self._connector_metadata

    @abc.abstractmethod
    def start_load_kv(self, forward_context, **kwargs): ...

    @abc.abstractmethod
    def wait_for_layer_load(self, layer_name): ...

    @abc.abstractmethod
    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs): ...

    @abc.abstractmethod
    def wait_for_save(self): ...

    @abc.abstractmethod
    def get_num_new_matched_tokens(self, request, num_computed_tokens): ...

    @abc.abstractmethod
    def update_state_after_alloc(self, request, blocks, num_external_tokens): ...

    @abc.abstractmethod
    def build_connector_meta(self, scheduler_output): ...


@pytest.fixture
def vllm():
    """The connector's module, with vLLM's interface in place of vLLM."""
    module = types.ModuleType(BASE)
    module.KVConnectorBase_V1, module.KVConnectorMetadata = KVConnectorBase_V1, KVConnectorMetadata
    names = ["vllm"] + [".".join(BASE.split(".")[:count]) for count in range(2, 6)]
    with mock.patch.dict(sys.modules, {**{name: types.ModuleType(name) for name in names}, BASE: module}):
        sys.modules.pop("r3mem_fast.integrations.vllm", None)
        yield importlib.import_module("r3mem_fast.integrations.vllm")
        sys.modules.pop("r3mem_fast.integrations.vllm", None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, the prefix of a memory of three blocks of slots, and its file."""
    model = network()
    prefix = model.compress(ids_of(50)).to_prefix(model)
    path = tmp_path_factory.mktemp("prefix") / "book.safetensors"
    prefix.save(path)
    return model, prefix, str(path)


def connector(vllm, block=BLOCK):
    config = types.SimpleNamespace(cache_config=types.SimpleNamespace(block_size=block))
    return vllm.R3MemConnector(config, "scheduler", None)


def request(ids, path=None, **changes):
    found = {"cache_salt": "r3mem", "skip_reading_prefix_cache": False, **changes}
    parameters = None if path is None else {"r3mem_prefix": path}
    return types.SimpleNamespace(request_id="1", prompt_token_ids=ids, kv_transfer_params=parameters, **found)


def layers(heads=2, width=16, block=BLOCK, dtype=torch.float32):
    names = [f"model.layers.{index}.self_attn.attn" for index in range(4)]
    caches = {
        name: types.SimpleNamespace(kv_cache=torch.zeros(BLOCKS, heads, block, width, dtype=dtype)) for name in names
    }
    return types.SimpleNamespace(no_compile_layers={**caches, "model.layers.0.mlp.experts": types.SimpleNamespace()})


def test_a_request_reads_its_memory_out_of_blocks(vllm, made):
    """What is gathered from the blocks, as attention does it, continues the prompt as the memory network does."""
    model, prefix, path = made
    text = ids_of(7, seed=1)
    ids = prefix.prompt(text[0].tolist())
    asked, blocks = request(ids, path), [7, 2, 9, 4, 1, 0]
    scheduler, worker = connector(vllm), connector(vllm)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (12, False)
    scheduler.update_state_after_alloc(asked, types.SimpleNamespace(get_block_ids=lambda: (blocks,)), 12)
    worker.bind_connector_metadata(pickle.loads(pickle.dumps(scheduler.build_connector_meta(None))))
    assert scheduler.build_connector_meta(None).loads == []
    context = layers()
    worker.start_load_kv(context)
    cache, plain = DynamicCache(), build("llama", scale=2.0).eval()
    for index, layer in enumerate(list(context.no_compile_layers.values())[:4]):
        assert not layer.kv_cache[[0, 1, 3, 4, 5, 6, 8, 10]].any()  # blocks of others
        read = layer.kv_cache[blocks[:3]].transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]
        cache.update(*read.split(8, -1), index)
    with torch.no_grad():
        found = plain(torch.tensor([ids[12:]]), past_key_values=cache).logits[:, len(prefix.tail[0]) :]
    expected = model(text, memory=model.compress(ids_of(50))).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_what_vllm_has_already_is_not_written_again(vllm, made):
    _, prefix, path = made
    asked, scheduler = request(prefix.prompt([5]), path), connector(vllm)
    assert scheduler.get_num_new_matched_tokens(asked, 4) == (8, False)
    scheduler.update_state_after_alloc(asked, types.SimpleNamespace(get_block_ids=lambda: ([7, 2, 9, 4],)), 8)
    (load,) = scheduler.build_connector_meta(None).loads
    assert (load.first, load.blocks, load.offsets) == (4, [2] * 4 + [9] * 4, [0, 1, 2, 3] * 2)
    assert (
        scheduler.get_num_new_matched_tokens(asked, 12)
        == scheduler.get_num_new_matched_tokens(asked, 16)
        == (0, False)
    )
    scheduler.update_state_after_alloc(asked, None, 0)
    assert scheduler.build_connector_meta(None).loads == []


def test_requests_without_a_memory(vllm):
    scheduler = connector(vllm)
    assert scheduler.get_num_new_matched_tokens(request([1, 2, 3]), 0) == (0, False)
    scheduler.wait_for_layer_load("model.layers.0.self_attn.attn")
    scheduler.save_kv_layer("model.layers.0.self_attn.attn", torch.zeros(1), None)
    scheduler.wait_for_save()


def test_requests_that_would_be_wrong(vllm, made):
    _, prefix, path = made
    with pytest.raises(ValueError, match="12 slots, which do not fill blocks of 16"):
        connector(vllm, block=16).get_num_new_matched_tokens(request(prefix.prompt([5]), path), 0)
    for ids in ([5] * 20, prefix.placeholder_ids()):
        with pytest.raises(ValueError, match="does not begin with the placeholders"):
            connector(vllm).get_num_new_matched_tokens(request(ids, path), 0)
    for changes in ({"cache_salt": None}, {"skip_reading_prefix_cache": True}):
        with pytest.raises(ValueError, match="needs cache_salt='r3mem', and no prompt_logprobs"):
            connector(vllm).get_num_new_matched_tokens(request(prefix.prompt([5]), path, **changes), 0)
    worker = connector(vllm)
    worker.bind_connector_metadata(vllm.R3MemConnectorMetadata([vllm.Load(path, 0, [0] * 12, list(range(4)) * 3)]))
    for sizes in ({"heads": 1}, {"width": 8}, {"block": 2}, {"dtype": torch.uint8}, {"dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match="use one worker"):
            worker.start_load_kv(layers(**sizes))
    with pytest.raises(ValueError, match="names 2 layers"):
        worker.start_load_kv(
            types.SimpleNamespace(no_compile_layers={"a.1.b.2.attn": types.SimpleNamespace(kv_cache=1)})
        )


def test_a_file_that_was_written_again(vllm, made, tmp_path):
    model, prefix, _ = made
    path = tmp_path / "again.safetensors"
    prefix.save(path)
    assert connector(vllm).get_num_new_matched_tokens(request(prefix.prompt([5]), str(path)), 0) == (12, False)
    other = model.compress(ids_of(50, seed=1)).to_prefix(model)
    other.save(path)
    assert connector(vllm).get_num_new_matched_tokens(request(other.prompt([5]), str(path)), 0) == (12, False)
    with pytest.raises(ValueError, match="does not begin with the placeholders"):
        connector(vllm).get_num_new_matched_tokens(request(prefix.prompt([5]), str(path)), 0)
    model.compress(ids_of(50)).to_prefix(model, 64).save(path)
    with pytest.raises(ValueError, match="is not the prefix of one memory"):
        connector(vllm).get_num_new_matched_tokens(request([5] * 20, str(path)), 0)
