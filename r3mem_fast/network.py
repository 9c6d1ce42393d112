"""`Network`: a base model with adapters and reversible layers, and what every use of it needs.

`R3MemModel` adds the methods that users call; `reading`, `objective` and `generation` do the work of these.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.utils import ModelOutput

from .config import R3MemConfig
from .fingerprints import FingerprintCache, layout_fingerprint
from .integrations.compat import decoder_output, inputs_of_composite, key_sources
from .integrations.peft import MergedAdapters, adapters_are_off, adapters_off
from .integrations.scoped import compacted, returning, temporarily
from .lora import check_adapters, check_tokens_can_be_chosen, let_adapters_choose_tokens, lora_config
from .memory.cache import PrefixCache
from .memory.layout import Origin
from .memory.memory import Memory
from .memory.reader import MemoryReader
from .memory.recurrent import refuse_states_at_input
from .memory.writers.anchored import new_anchor_embedding
from .memory.writers.matched import QuestionsOf
from .memory.writers.tokens import new_memory_embeddings
from .positions import default_matched, first_id, positions_for_memories, positions_of, special_id
from .reversible import make_reversible, reading_backward
from .reversible.convert import check_convertible, reversible_layers, text_config, unconverted
from .reversible.refusals import refuse_cross_attention, refuse_returned_states
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
        layout: Sizes and settings that its memories share; None if it has too few positions for any.
        learns_memories: Whether its config has memory tokens. If not, its memories are matched ones of its base model.
        memory_embeddings: Learned embeddings of memory tokens, or the one of anchors, `[n, width]`; None without any.
        stack: The stack of the reversible layers.
        layers: The reversible layers, in order.
        is_plain: Whether it acts as its base model for now, see `disable_adapters`.
        slices_logits: Whether the base model can compute the logits of the last tokens alone (`logits_to_keep`).
        start_token_id: Token before and after a prompt of the backward direction.
        end_token_id: Token that ends every text that is written.
        questions_of: Gives what will be asked of the token ids of a text, for `memory_queries` of "pairs".
        drawn_sizes: Slots of a segment, of which each pass in training draws one; (): those of the layout.
        foreign_share: Share of the passes in training in which rows read each other's memories, see `TrainSettings`.

    Raises:
        TypeError: The base is no model that can be made reversible. It is then as it was.
        ValueError: It cannot be made reversible, or does not fit the config. It is then as it was.
    """

    def __init__(self, base: Any, config: R3MemConfig | None = None):
        super().__init__()
        config = R3MemConfig() if config is None else config
        if isinstance(base, PeftModel):
            check_adapters(base, config)
        plain = base.get_base_model() if isinstance(base, PeftModel) else base
        # Everything is checked before the base model is changed.
        _, layers = check_convertible(plain, config.coupling())
        self.r3mem_config = config.resolved(len(layers), key_sources(text_config(plain.config), layers))
        learned = config.memory_layout(positions_for_memories(config, plain))
        refuse_states_at_input(learned, plain.config)
        refuse_returned_states(text_config(plain.config))
        if learned is not None:
            refuse_cross_attention(text_config(plain.config))
        self.learns_memories = learned is not None
        self.layout = learned or default_matched(plain)
        self.end_token_id = special_id(plain, "eos_token_id")
        self.start_token_id = first_id(special_id(plain, "bos_token_id"), self.end_token_id)
        if self.end_token_id is None:
            raise ValueError("the model's config has no eos_token_id, which ends a recalled context; set it")
        if not isinstance(base, PeftModel):
            base = get_peft_model(base, lora_config(base, self.r3mem_config))
        self.peft_model = make_reversible(
            base, self.r3mem_config.coupling(), offload_side_bits=config.offload_side_bits
        )
        self.stack, self.layers = reversible_layers(self.peft_model)
        self.slices_logits = "logits_to_keep" in inspect.signature(plain.forward).parameters
        self._reader: MemoryReader | None = None
        self.memory_embeddings: nn.Parameter | None = None
        if self.layout is not None:
            if self.is_anchored:
                self.memory_embeddings = new_anchor_embedding(plain.get_input_embeddings().weight)
            elif self.layout.writer == "tokens":
                known = plain.get_input_embeddings().weight
                self.memory_embeddings = new_memory_embeddings(known, self.layout.num_memory_tokens)
            self._reader = MemoryReader(self.peft_model, self.stack, self.decoder, self.layout)
        if self.r3mem_config.adapter_rows == "memory" and self.memory_embeddings is not None:
            let_adapters_choose_tokens(self.layers)
        self.questions_of: QuestionsOf | None = None
        self.drawn_sizes: tuple[int, ...] = ()
        self.is_plain, self.foreign_share = False, 0.0
        self._fingerprints = FingerprintCache()
        # While adapters are merged: they, and the fingerprints that memories carry, which are those of before.
        self._merged: tuple[MergedAdapters, Origin] | None = None

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
        """Number of positions of the base model; None if it names no limit."""
        return positions_of(self.peft_model)

    @property
    def reader(self) -> MemoryReader:
        """Reader of memories. Raises ValueError for a model without memory tokens."""
        self.check_memories()
        return cast(MemoryReader, self._reader)

    @property
    def memories_are_of_base(self) -> bool:
        """Whether memories are written and read by the base model, whatever the adapters have learned."""
        matched = self.layout is not None and self.layout.writer == "matched" and not self.is_anchored
        return matched and not (self.learns_memories and self.adapts_tokens)

    @property
    def reads_as_base(self) -> bool:
        """Whether the base model reads behind memories, whoever has written them."""
        return self.memories_are_of_base or (self.is_anchored and not self.adapts_tokens)

    @property
    def is_anchored(self) -> bool:
        """Whether its memories are matched ones with a learned change."""
        return self.learns_memories and self.r3mem_config.memory_writer == "anchored"

    @property
    def adapts_tokens(self) -> bool:
        """Whether adapters act on all tokens of the forward direction, or on memory tokens alone."""
        return self.r3mem_config.adapter_rows == "all"

    @property
    def is_reading_backward(self) -> bool:
        """Whether its layers run in another order for now."""
        order = self.stack.route.order
        return list(order) != sorted(order)

    def reading_backward(self) -> contextlib.AbstractContextManager[None]:
        """Run the layers of the core from last to first in the block: a context manager.

        That is how a query is continued with its context, and has nothing to do with gradients. Core and form are the
        config's; when the block ends, or fails, the layers are in order again.
        """
        config = self.r3mem_config
        return reading_backward(
            self.peft_model, config.core, form=config.backward, backward_momentum=config.backward_momentum
        )

    def without_memory(self) -> contextlib.AbstractContextManager[None]:
        """Read the model forward without a memory, and adapters of memory tokens, in the block: a context manager."""
        return self._reading() if self.adapts_tokens else self.disable_adapters()

    def behind_memory(self) -> contextlib.AbstractContextManager[None]:
        """Read the model forward, behind memories or to write them, in the block: a context manager."""
        return self.disable_adapters() if self.reads_as_base else self._reading()

    def _reading(self):
        """Let its adapters read forward, behind anchored memories in the network without the coupling."""
        # In the coupled network anchors would learn to make up for the coupling.
        return self.stack.in_mode(Mode.PLAIN) if self.is_anchored else contextlib.nullcontext()

    @contextlib.contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Let the model act as its base model in the block, without adapters and coupling: a context manager.

        Yields:
            Nothing.
        """
        if self.is_plain:
            yield
            return
        merged = contextlib.nullcontext() if self._merged is None else self._merged[0].set_aside()
        with merged, adapters_off(self.peft_model), self.stack.in_mode(Mode.PLAIN), temporarily(self, is_plain=True):
            yield

    @contextlib.contextmanager
    def merged_adapters(self) -> Iterator[None]:
        """Add the adapters to the weights in the block, for faster inference: a context manager.

        What is computed is the same but for the rounding of sums, so that memories fit from inside to outside; it
        takes the bytes of the adapted weights once more. Afterwards the weights are what they were, bit for bit.

        Raises:
            RuntimeError: It is trained, or in such a block; in it: something would train, move or change weights.
            ValueError: With `adapter_rows="memory"` adapters act on some tokens alone; or see `MergedAdapters`.
        """
        if not self.adapts_tokens:
            raise ValueError('with adapter_rows="memory" adapters act on some tokens alone, and cannot be merged')
        if self.training or self._merged is not None or self.is_plain:
            raise RuntimeError("adapters are merged once, for inference: call eval(), outside of other such blocks")
        merged, origin = MergedAdapters(self.peft_model), self.origin_of_adapters()
        with merged.used(), temporarily(self, _merged=(merged, origin)):
            yield

    @contextlib.contextmanager
    def unconverted(self) -> Iterator[None]:
        """Let it be the base model as transformers made it, without adapters, in the block: a context manager."""
        with self.disable_adapters(), unconverted(self.stack, self.layers):
            yield

    def must_read(self, cache: PrefixCache | None) -> contextlib.AbstractContextManager[None]:
        """Make sure that every pass in the block reads a memory: a context manager.

        Args:
            cache: The cache that holds the memory; None: there is none, and nothing is checked.
        """
        return contextlib.nullcontext() if cache is None else self.stack.must_read(cache)

    def head(self, hidden: torch.Tensor, **inputs: Any) -> ModelOutput:
        """Apply the base model's own head and loss to the last hidden states of its decoder.

        Args:
            hidden: The hidden states, `[batch, tokens, hidden_size]`.
            inputs: More arguments of the base model, such as labels.

        Returns:
            The base model's output.

        Raises:
            ValueError: The model is to return router logits.
        """
        # Fused losses (Liger's) view it as `[tokens, hidden_size]`, and the head's product would copy its weight.
        compact = compacted(hidden)
        if getattr(self.config, "output_router_logits", False):
            raise ValueError(
                "output_router_logits asks for a loss of the experts' router, which reversible layers do not give; "
                "set it to False in the model's config"
            )
        inputs |= inputs_of_composite(self.plain_model, self.decoder, hidden)
        with returning(self.decoder, decoder_output(compact)):
            return self.peft_model(inputs_embeds=hidden, use_cache=False, **inputs)

    def check_length(self, tokens: int, *, behind_memory: bool) -> None:
        """Check that a number of tokens fits into the model's positions.

        Args:
            tokens: Number of tokens.
            behind_memory: Whether they are read behind a memory, which takes positions, too.

        Raises:
            ValueError: They do not fit.
        """
        before = self.reader.layout.first_position if behind_memory else 0
        if self.max_tokens is not None and before + tokens > self.max_tokens:
            behind = f", behind a memory of {before}" if before else ""
            raise ValueError(
                f"a row takes {tokens} tokens{behind}, the model has {self.max_tokens} positions; split the text into "
                "smaller documents"
            )

    def check_memories(self) -> None:
        """Raise ValueError for a model that makes and reads no memories."""
        if self.layout is None:
            raise ValueError(f"a model of {self.max_tokens} positions is too small for memories")

    def check_memory(self, memory: Memory, rows: int | None = None) -> None:
        """Check that a memory was made with this very model.

        Args:
            memory: The memory.
            rows: Number of rows that it must have; None: any.

        Raises:
            ValueError: It was made with other weights or settings, or it has another number of rows.
        """
        self.check_memories()
        if rows not in (None, len(memory)):
            raise ValueError(f"{rows} rows of tokens and {len(memory)} of memory: one of each a row")
        mine, its = self.origin(), memory.origin
        # Attention reads memories of whatever size, if slots stand where it looks for them.
        matched = self.reader.layout.writer == memory.layout.writer == "matched"
        any_size = matched and memory.layout.reach == self.reader.layout.reach
        if any_size and self.memories_are_of_base:
            mine = dataclasses.replace(mine, adapter=layout_fingerprint(memory.layout))
        if its.base != mine.base:
            raise ValueError(
                f"the memory is of another base model ({its.base[:12]}…) than this one ({mine.base[:12]}…)"
            )
        # While its adapters are off, it may still read what it wrote with them.
        if its.adapter != mine.adapter and its.adapter != self._origin(adapters_off=False).adapter:
            raise ValueError("the memory was made with other adapters or settings than the model has; compress again")
        if memory.layout != self.layout and not any_size:
            raise ValueError(f"the memory's layout is {memory.layout}, the model's {self.layout}")
        self.reader.check_states(memory)

    def new_memory(
        self, rows: int, origin: Origin | None, pinned: int = 0, memory_tokens: int | None = None,
        memory_budget: int | None = None,
    ) -> Memory:  # fmt: skip
        """Make a memory of nothing.

        Args:
            rows: Number of rows.
            origin: Fingerprints that it carries; None: it is used within one pass, and nobody asks for them.
            pinned: Tokens at the beginning of each row whose slots stay as they are.
            memory_tokens: Slots of a segment, for matched and anchored memories; None: the model's.
            memory_budget: Slots of a row's memory; None: for as many segments as the model's has.

        Raises:
            ValueError: There are pinned tokens and no matched memories, or too many; or so many slots cannot be.
        """
        layout = self.reader.layout
        if (memory_tokens, memory_budget) != (None, None):
            layout = layout.with_memory_tokens(memory_tokens, memory_budget)
            if self.memories_are_of_base and origin is not None:
                origin = dataclasses.replace(origin, adapter=layout_fingerprint(layout))
        return self.reader.empty_memory(rows, cast(Origin, origin), layout, pinned)

    def reading_cache(self, memory: Memory, *, keep: bool = True, forward: bool = True) -> PrefixCache:
        """A cache that holds a memory, to read tokens behind it.

        Args:
            memory: The memory.
            keep: Whether the tokens' own keys and values are kept.
            forward: Whether this is the forward direction, in which adapters may act on memory tokens alone.
        """
        unadapted = forward and not self.adapts_tokens and self.memory_embeddings is not None
        # Its own first position, because `reading.hold_beginnings` extends the reach.
        first = memory.layout.first_position
        cache = self.reader.new_cache(keep=keep, adapted_tokens=0 if unadapted else None, first_position=first)
        return self.reader.read(cache, memory)

    def origin(self) -> Origin:
        """Fingerprints of base model and adapters that memories made now carry.

        While the adapters are off they are different ones.

        Raises:
            RuntimeError: The model is being read backward.
            ValueError: It has adapters that `adapter_rows="memory"` cannot hold to memory tokens.
        """
        return self._origin(self.adapters_are_off)

    def origin_of_adapters(self) -> Origin:
        """Fingerprints of base model and adapters, also where memories depend on the base model alone."""
        return self._origin_of_adapters(self.adapters_are_off)

    def _origin_of_adapters(self, adapters_off):
        if self._merged is not None and not adapters_off:
            return self._merged[1]
        return self._fingerprints.origin(self, adapters_off)

    @property
    def adapters_are_off(self) -> bool:
        """Whether its adapters do not act for now."""
        return self.is_plain or (self._merged is None and adapters_are_off(self.peft_model))

    def _origin(self, adapters_off):
        if self.is_reading_backward:
            raise RuntimeError("memories are made, and caches of them, before the model is read backward")
        if self.memories_are_of_base:
            return Origin(self.base_fingerprint(), layout_fingerprint(self.reader.layout))
        if not self.adapts_tokens:
            check_tokens_can_be_chosen(self.peft_model)
        return self._origin_of_adapters(adapters_off)

    def base_fingerprint(self) -> str:
        """Fingerprint of the base model's settings and weights, computed again only when the weights change."""
        return self._merged[1].base if self._merged is not None else self._fingerprints.base(self.peft_model)

    def set_base_fingerprint(self, fingerprint: str) -> None:
        """Take over the fingerprint of the base model as it is now, which has just been computed."""
        self._fingerprints.set_base(self.peft_model, fingerprint)
