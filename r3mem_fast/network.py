"""`Network`: a base model with adapters and reversible layers, and what every use of it needs.

`R3MemModel` is a network with the verbs of a user; `reading`, `objective` and `generation` are what these do.
"""

import contextlib
import inspect
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import ModelOutput

from .config import R3MemConfig
from .fingerprints import FingerprintCache, adapters_are_off
from .integrations.compat import cache_argument
from .integrations.scoped import requiring_gradients_as_before, returning, temporarily
from .lora import check_tokens_can_be_chosen, let_adapters_choose_tokens, target_pattern
from .memory.cache import PrefixCache
from .memory.memory import Memory, Origin, empty_states
from .memory.reader import MemoryReader
from .memory.writers.tokens import new_memory_embeddings
from .reversible import make_reversible, reading_backward
from .reversible.convert import check_convertible, reversible_layers, text_config
from .reversible.stack import Mode


class Network(nn.Module):
    """A causal language model with adapters, reversible layers and, if its config has memory tokens, memories.

    Args:
        base: A `transformers` causal language model, or a PeftModel of one, which keeps its adapters. It is changed in
            place.
        config: Settings; None: the defaults.

    Attributes:
        peft_model: The base model with its adapters.
        r3mem_config: The settings, with a core that fits the depth.
        layout: What its memories have in common; None without memory tokens.
        memory_embeddings: `[num_memory_tokens, width]`, learned; None without memory tokens.
        stack: The reversible layers' stack.
        start_token_id: Stands before and after a prompt of the backward direction.
        end_token_id: Ends every text that is written.

    Raises:
        TypeError: The base is no model that can be made reversible. It is then as it was.
        ValueError: It cannot be made reversible, or does not fit the config. It is then as it was.
    """

    def __init__(self, base: Any, config: R3MemConfig | None = None):
        super().__init__()
        config = R3MemConfig() if config is None else config
        if isinstance(base, PeftModel):
            _check_adapters(base, config)
        plain = base.get_base_model() if isinstance(base, PeftModel) else base
        # All that can be refused is refused before the base model is changed.
        _, layers = check_convertible(plain, config.coupling())
        self.r3mem_config = config.resolved(len(layers))
        self.layout = config.memory_layout(_positions_of(plain))
        self.end_token_id = _first_id(plain.config.eos_token_id)
        self.start_token_id = _first_id(plain.config.bos_token_id, self.end_token_id)
        if self.end_token_id is None:
            raise ValueError("the model's config has no eos_token_id, which ends a recalled context; set it")
        if not isinstance(base, PeftModel):
            base = get_peft_model(base, _lora_config(base, self.r3mem_config))
        self.peft_model = make_reversible(
            base, self.r3mem_config.coupling(), offload_side_bits=config.offload_side_bits
        )
        self.stack, self.layers = reversible_layers(self.peft_model)
        self.slices_logits = "logits_to_keep" in inspect.signature(plain.forward).parameters
        self._reader: MemoryReader | None = None
        self.memory_embeddings: nn.Parameter | None = None
        if self.layout is not None:
            vocabulary = plain.get_input_embeddings().weight
            self.memory_embeddings = new_memory_embeddings(vocabulary, self.layout.num_memory_tokens)
            self._reader = MemoryReader(self.peft_model, self.stack, self.decoder, self.layout)
        if self.r3mem_config.adapter_rows == "memory":
            let_adapters_choose_tokens(self.layers)
        self._fingerprints = FingerprintCache()

    @property
    def config(self) -> Any:
        """The base model's configuration, where trainers look for it."""
        return self.peft_model.config

    @property
    def device(self) -> torch.device:
        """The base model's device."""
        return self.peft_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype."""
        return self.peft_model.dtype

    @property
    def plain_model(self) -> Any:
        """The base model without PEFT's wrapper."""
        return self.peft_model.get_base_model()

    @property
    def decoder(self) -> Any:
        """The part of the base model whose loop calls the layers."""
        return self.layers[0].reversible.decoder

    @property
    def max_tokens(self) -> int | None:
        """The base model's positions, None if it names no limit."""
        return _positions_of(self.peft_model)

    @property
    def reader(self) -> MemoryReader:
        """Reads memories. Raises ValueError for a model without memory tokens."""
        self.check_memories()
        return self._reader  # type: ignore[return-value]  # that is what was checked

    @property
    def adapts_tokens(self) -> bool:
        """Whether adapters act on all tokens of the forward direction, or on memory tokens alone."""
        return self.r3mem_config.adapter_rows == "all"

    @property
    def is_plain(self) -> bool:
        """Whether it is its base model for now, see `disable_adapters`."""
        return self.stack.mode is Mode.PLAIN

    @property
    def is_reading_backward(self) -> bool:
        """Whether its layers are in another order for now."""
        order = self.stack.route.order
        return list(order) != sorted(order)

    def reading_backward(self):
        """Read the model backward, as its config has it, while this lasts: a context manager."""
        config = self.r3mem_config
        return reading_backward(
            self.peft_model, config.core, form=config.backward, backward_momentum=config.backward_momentum
        )

    def without_memory(self):
        """Read the model forward without a memory while this lasts: where adapters act on memories alone, the base."""
        return contextlib.nullcontext() if self.adapts_tokens else self.disable_adapters()

    @contextlib.contextmanager
    def disable_adapters(self):
        """While this lasts the model is its base model, bit for bit: no adapters, no coupling, no quantisation."""
        if self.is_plain:
            yield
            return
        # PEFT lets the adapters learn again when it enables them, also those that did not before.
        with (
            requiring_gradients_as_before(self.peft_model),
            self.peft_model.disable_adapter(),
            self.stack.in_mode(Mode.PLAIN),
        ):
            yield

    def must_read(self, cache: PrefixCache | None):
        """See that every pass reads a memory while this lasts; None: there is none to be read."""
        return contextlib.nullcontext() if cache is None else self.stack.must_read(cache)

    def with_idle_parameters(self, value: torch.Tensor) -> torch.Tensor:
        """A value that no memory has a part in, with zero gradients for what only memories use: DDP waits for them."""
        if self.memory_embeddings is None:
            return value
        idle = [self.memory_embeddings]
        if not self.adapts_tokens and dist.is_initialized():
            idle = [parameter for parameter in self.parameters() if parameter.requires_grad]
        total = sum((parameter.sum() for parameter in idle[1:]), start=idle[0].sum())
        return value + 0 * total.to(value.dtype)

    def head(self, hidden: torch.Tensor, **inputs) -> ModelOutput:
        """The base model's output, by its own head and loss, where its decoder's last hidden states are known.

        Args:
            hidden: `[batch, tokens, hidden_size]`.
            inputs: More arguments of the base model, such as labels.
        """
        # As tokens and back: fused losses (Liger's) view it as tokens, and of a single row `contiguous` would leave
        # the stride of the longer tensor that it is part of, for which a head's product copies its whole weight.
        compact = hidden.flatten(0, 1).view(hidden.shape)
        with returning(self.decoder, BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=compact)):
            return self.peft_model(inputs_embeds=hidden, use_cache=False, **inputs)

    def decode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, cache: Any = None, **settings
    ) -> torch.Tensor:
        """Write on behind prompts in the current direction, by these settings alone.

        A model's own generation_config would fill in what is not set here (a penalty for repetition, say).

        Args:
            input_ids: int64 `[B, T]`.
            attention_mask: int64 `[B, T]`.
            cache: A key-value cache; None: `generate` makes one.
            settings: As of `transformers.GenerationConfig`.

        Returns:
            int64 `[B, T + n]`, ended by the end token.
        """
        base = self.plain_model
        ends = {"eos_token_id": self.end_token_id, "pad_token_id": self.end_token_id}
        with temporarily(base, generation_config=GenerationConfig()):
            return base.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=GenerationConfig(**ends, **settings),
                **({} if cache is None else cache_argument(base, cache)),
            )

    def check_length(self, tokens: int, *, behind_memory: bool):
        """Raise ValueError if the model's positions end before so many tokens."""
        before = self.reader.layout.first_position if behind_memory else 0
        if self.max_tokens is not None and before + tokens > self.max_tokens:
            behind = f", behind a memory of {before}" if before else ""
            raise ValueError(
                f"a row takes {tokens} tokens{behind}, the model has {self.max_tokens} positions; split the text into "
                "smaller documents"
            )

    def check_memories(self):
        """Raise ValueError for a model that makes and reads no memories."""
        if self.layout is None:
            raise ValueError(
                "the model has no memory tokens; make it with R3MemConfig(num_memory_tokens=16), or remember with "
                "--memory-tokens 16"
            )

    def check_memory(self, memory: Memory, rows: int | None = None):
        """Raise ValueError for a memory that was not made with this very model, or not of so many rows."""
        self.check_memories()
        if rows not in (None, len(memory)):
            raise ValueError(f"{rows} rows of tokens and {len(memory)} of memory: one of each a row")
        mine, its = self.origin(), memory.origin
        if its.base != mine.base:
            raise ValueError(
                f"the memory is of another base model ({its.base[:12]}…) than this one ({mine.base[:12]}…)"
            )
        # With its adapters off for now, it reads what it wrote with them, too.
        if its.adapter != mine.adapter and its.adapter != self._origin(adapters_off=False).adapter:
            raise ValueError("the memory was made with other adapters or settings than the model has; compress again")
        if memory.layout != self.layout:
            raise ValueError(f"the memory's layout is {memory.layout}, the model's {self.layout}")
        self.reader.check_states(memory)

    def new_memory(self, rows: int, origin: Origin | None) -> Memory:
        """The memory of nothing, of so many rows."""
        layout = self.reader.layout
        states = empty_states(layout, rows, self.reader.state_sizes(), dtype=self.dtype, device=self.device)
        return Memory(
            states=states,
            num_segments=torch.zeros(rows, dtype=torch.int64),
            tokens_seen=torch.zeros(rows, dtype=torch.int64),
            unfinished=(torch.zeros(0, dtype=torch.int64),) * rows,
            recent=(torch.zeros(0, dtype=torch.int64),) * rows,
            labels=(None,) * rows,
            layout=layout,
            origin=origin,
        )

    def reading_cache(self, memory: Memory, *, keep: bool = True, forward: bool = True) -> PrefixCache:
        """A cache that holds a memory, to read tokens behind it.

        Args:
            memory: The memory.
            keep: Whether the tokens' own keys and values are kept.
            forward: Whether this is the forward direction, in which adapters may be held to memory tokens.
        """
        held = forward and not self.adapts_tokens
        return self.reader.read(self.reader.new_cache(keep=keep, adapted_tokens=0 if held else None), memory)

    def origin(self) -> Origin:
        """Fingerprints of base model and adapters, as the memories that it makes now carry them.

        They are computed again when weights or settings of the adapters have changed; with the adapters off they are
        others.

        Raises:
            RuntimeError: The model is being read backward.
            ValueError: It has adapters that `adapter_rows="memory"` cannot hold to memory tokens.
        """
        return self._origin(adapters_are_off(self.peft_model) or self.is_plain)

    def _origin(self, adapters_off):
        if self.is_reading_backward:
            raise RuntimeError("memories are made, and caches of them, before the model is read backward")
        if not self.adapts_tokens:
            check_tokens_can_be_chosen(self.peft_model)
        return self._fingerprints.origin(self, adapters_off)

    def base_fingerprint(self) -> str:
        """Fingerprint of the base model's settings and weights, computed when they change."""
        return self._fingerprints.base(self.peft_model)

    def set_base_fingerprint(self, fingerprint: str):
        """Take over a fingerprint of the weights as they are, which has just been computed."""
        self._fingerprints.set_base(self.peft_model, fingerprint)


def _check_adapters(base, config):
    if base.active_adapter != "default":
        raise ValueError(f"the PeftModel's adapter must be called 'default', not {base.active_adapter!r}")
    if base.active_peft_config.is_prompt_learning:
        raise ValueError(
            "the PeftModel learns a prompt, which some of the methods here would read and others not; use an "
            "adapter inside the layers, such as LoRA"
        )
    if config.adapter_rows == "memory":
        check_tokens_can_be_chosen(base)


def _lora_config(base, config):
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_pattern(base, config.target_modules, config.first_adapted_layer),
    )


def _positions_of(model):
    return getattr(text_config(model.config), "max_position_embeddings", None)


def _first_id(*ids):
    """The first id that is given; of a list of them, its first."""
    for given in ids:
        given = given[0] if isinstance(given, (list, tuple)) and given else given
        if isinstance(given, int):
            return given
    return None
