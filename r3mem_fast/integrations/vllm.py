"""`R3MemConnector`: vLLM reads a memory before a prompt, by its interface for KV connectors (V1).

    prefix = memory.to_prefix(model)
    prefix.save("book.prefix.safetensors")

    llm = LLM(model, kv_transfer_config=KVTransferConfig(
        kv_connector="R3MemConnector", kv_role="kv_consumer",
        kv_connector_module_path="r3mem_fast.integrations.vllm",
    ))
    llm.generate(
        {"prompt_token_ids": prefix.prompt(question_ids), "cache_salt": "r3mem"},
        SamplingParams(extra_args={"kv_transfer_params": {"r3mem_prefix": "book.prefix.safetensors"}}),
    )

The slots of a memory are N placeholder tokens at the beginning of the prompt, of which vLLM computes none: before the
first pass the connector writes their keys and values into the blocks that vLLM has given to the request. N must fill
whole blocks. Placeholder ids are of this memory alone, so that vLLM's prefix cache keeps memories apart, and shares
one among the requests that read it; the salt keeps blocks that hold a memory from requests that read none. (Penalties
for repetition see placeholder ids as a part of the prompt.)

It is written for the layout of vLLM 0.33: the cache of a layer is `[blocks, kv_heads, block_size, 2 head_dim]`, keys
before values (FLASH_ATTN, TRITON_ATTN), for one worker that holds the whole model. A request that is wrong is a
ValueError in vLLM's scheduler, which ends the engine with all its requests: check requests before they come here.
"""

import dataclasses
import functools
import json
import os
import re
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

# Name of the file among the `kv_transfer_params` of a request.
PARAMETER = "r3mem_prefix"
# Salt of vLLM's prefix cache for all requests that read a memory.
SALT = "r3mem"


@dataclasses.dataclass
class Load:
    """Slots of a memory to be written into blocks of vLLM.

    Attributes:
        path: The prefix's file.
        first: First slot to be written; vLLM has those before it.
        blocks: Block of each slot from there on.
        offsets: Its place in the block.
    """

    path: str
    first: int
    blocks: list[int]
    offsets: list[int]


@dataclasses.dataclass
class R3MemConnectorMetadata(KVConnectorMetadata):
    """What is to be written before a pass.

    Attributes:
        loads: The slots.
    """

    loads: list[Load] = dataclasses.field(default_factory=list)


class R3MemConnector(KVConnectorBase_V1):
    """Writes memories into vLLM's blocks; it saves nothing. Its methods are those of vLLM's interface."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._block_size = vllm_config.cache_config.block_size
        self._loads: list[Load] = []

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Number of slots that vLLM has not got yet, and whether they come later, which they do not.

        Raises:
            ValueError: The slots do not fill whole blocks, the prompt does not begin with their placeholders, nothing
                follows them, or vLLM would compute them as tokens.
        """
        path = (request.kv_transfer_params or {}).get(PARAMETER)
        if path is None:
            return 0, False
        if request.cache_salt != SALT or request.skip_reading_prefix_cache:
            raise ValueError(
                f"a request that reads a memory needs cache_salt={SALT!r}, and no prompt_logprobs, for which vLLM "
                "would compute its placeholders as tokens"
            )
        placeholders = _placeholders(path)
        count, ids = len(placeholders), list(request.prompt_token_ids or [])
        if count % self._block_size:
            raise ValueError(
                f"{path} has {count} slots, which do not fill blocks of {self._block_size}: choose num_memory_tokens "
                "and memory_budget so that they do"
            )
        if ids[:count] != placeholders or len(ids) == count:
            raise ValueError(
                f"the prompt does not begin with the placeholders of {path}, with tokens behind them: make it with "
                "Prefix.load(path).prompt(ids)"
            )
        return max(0, count - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note which blocks a request's slots go to."""
        if not num_external_tokens:
            return
        path = request.kv_transfer_params[PARAMETER]
        count = len(_placeholders(path))
        places, own = range(count - num_external_tokens, count), blocks.get_block_ids()[0]
        size = self._block_size
        self._loads.append(
            Load(path, places[0], [own[place // size] for place in places], [place % size for place in places])
        )

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the workers are to write before the next pass."""
        loads, self._loads = self._loads, []
        return R3MemConnectorMetadata(loads)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write slots into their blocks, in every layer.

        Raises:
            ValueError: A layer's cache has another layout than this connector knows.
        """
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, R3MemConnectorMetadata)
        caches = {
            name: layer.kv_cache
            for name, layer in forward_context.no_compile_layers.items()
            if getattr(layer, "kv_cache", None) is not None
        }
        for load in metadata.loads:
            with safe_open(load.path, framework="pt") as file:
                for name, cache in caches.items():
                    layer = _layer_of(name)
                    keys, values = (
                        file.get_tensor(f"{part}.{layer}")[0, :, load.first :] for part in ("keys", "values")
                    )
                    states = torch.cat([keys, values], -1).transpose(0, 1)  # [slots, kv_heads, 2 head_dim]
                    heads, width = states.shape[1:]
                    if (cache.dtype, list(cache.shape[1:])) != (states.dtype, [heads, self._block_size, width]):
                        raise ValueError(
                            f"the cache of {name} is {cache.dtype} {list(cache.shape)}, and not {states.dtype} "
                            f"[blocks, {heads}, {self._block_size}, {width}] as a memory's slots are: use one worker "
                            "(tensor_parallel_size=1), attention_backend FLASH_ATTN or TRITON_ATTN, and a cache that "
                            "is not quantised, in the dtype of the prefix"
                        )
                    where = [torch.tensor(places, device=cache.device) for places in (load.blocks, load.offsets)]
                    cache[where[0], :, where[1]] = states.to(cache.device)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return at once: `start_load_kv` has written everything."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Save nothing."""

    def wait_for_save(self) -> None:
        """Return at once: nothing is saved."""


def _placeholders(path: str) -> list[int]:
    """Ids that stand for the slots of a prefix's file, as it is now."""
    state = os.stat(path)
    return _read_placeholders(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1024)
def _read_placeholders(path: str, changed: int, size: int) -> list[int]:
    with safe_open(path, framework="pt") as file:
        found = json.loads((file.metadata() or {}).get("r3mem", "{}")).get("placeholder_ids")
    if found is None:
        raise ValueError(f"{path} is not the prefix of one memory: write it with memory[row].to_prefix(model).save")
    return found


def _layer_of(name: str) -> int:
    """Index of a layer by vLLM's name of its attention, such as model.layers.3.self_attn.attn."""
    found = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    if len(found) != 1:
        raise ValueError(f"{name} names {len(found)} layers, and one is expected")
    return int(found[0])
