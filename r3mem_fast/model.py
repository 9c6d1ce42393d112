"""`R3MemModel`: a causal language model that reads forward, and backward from a query to its context."""

import contextlib
import copy
import dataclasses
import inspect

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import ModelOutput

from . import adapter_folder, fingerprints
from .batching import Rows, left_padded, nothing, nothing_before, positions_of_mask
from .config import R3MemConfig
from .data import hub
from .generation import LENGTHS, StreamerOfPrompts, generation_config_of, new_tokens, until
from .integrations.compat import cache_argument, cache_name
from .integrations.peft import own_parameters
from .integrations.scoped import evaluating, requiring_gradients_as_before
from .integrations.trainer import TrainerInterface
from .lora import check_rows_can_be_chosen, let_adapters_choose_rows, target_pattern
from .memory.cache import PrefixCache
from .memory.memory import Memory, Origin, appended, empty_states
from .memory.rotary import is_rotary
from .memory.segments import IGNORED, advance, cut_segments
from .reversible import make_reversible, reading_backward, restore
from .reversible.convert import check_convertible, reversible_layers, text_config
from .reversible.replay import replay
from .reversible.stack import Mode


@dataclasses.dataclass
class R3MemOutput(ModelOutput):
    """What `R3MemModel.forward` returns.

    loss: float scalar, or None without labels. logits: see `forward`; None where it trains through several segments.
    compress_loss, expand_loss, cycle_loss: the terms of the objective, unweighted; None where they were not computed.
    targets: with a query, what `logits` predict. cycle_logits: as `logits`, read from the memory of the context in
    place of the query.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    compress_loss: torch.Tensor | None = None
    expand_loss: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    cycle_loss: torch.Tensor | None = None
    cycle_logits: torch.Tensor | None = None


class R3MemModel(TrainerInterface, nn.Module):
    """A memory network made from a pretrained causal language model (R3Mem, arXiv 2502.15957, section 3).

    The base model gets LoRA adapters, trained, and reversible layers; its own weights stay as they are. Forward it is
    a language model as before. Backward (`recall`) it runs the layers of its core from last to first, as a causal
    decoder that continues a query with the context that the query was learned for. With memory tokens (`R3MemConfig`)
    it compresses a history of any length into a `Memory`, reads it forward, and expands it backward. As the layers
    change places when it is read backward, one thread at a time may use it.

    base: a `transformers` causal language model, or a PeftModel of one, which keeps its adapters. It is changed in
        place. config: an `R3MemConfig`; the default's core is chosen by depth.
    Raises TypeError or ValueError for a model that cannot be made reversible, a core beyond its depth, or a model
    whose config names no end-of-text token; the base model is then as it was.
    """

    # For a trainer that accumulates gradients: the loss is a mean over `num_items_in_batch` tokens, if that is given.
    accepts_loss_kwargs = True

    def __init__(self, base, config: R3MemConfig | None = None):
        super().__init__()
        config = R3MemConfig() if config is None else config
        if isinstance(base, PeftModel) and base.active_adapter != "default":
            raise ValueError(f"the PeftModel's adapter must be called 'default', not {base.active_adapter!r}")
        if isinstance(base, PeftModel) and base.active_peft_config.is_prompt_learning:
            raise ValueError(
                "the PeftModel learns a prompt, which some of the methods here would read and others not; use an "
                "adapter inside the layers, such as LoRA"
            )
        plain = base.get_base_model() if isinstance(base, PeftModel) else base
        if isinstance(base, PeftModel) and config.adapter_rows == "memory":
            check_rows_can_be_chosen(base)
        # All that can be refused is refused before the base model is changed.
        _, layers = check_convertible(plain, config.coupling())
        self.r3mem_config = config.resolved(len(layers))
        self.layout = config.memory_layout(_positions_of(plain))
        self._base = self._origins = self._sizes = None
        self.end_token_id = _first(plain.config.eos_token_id)
        self.start_token_id = _first(plain.config.bos_token_id, self.end_token_id)
        if self.end_token_id is None:
            raise ValueError("the model's config has no eos_token_id, which ends a recalled context; set it")
        if not isinstance(base, PeftModel):
            base = get_peft_model(base, self._lora_config(base))
        self.peft_model = make_reversible(
            base, self.r3mem_config.coupling(), offload_side_bits=config.offload_side_bits
        )
        self._stack, self._layers = reversible_layers(self.peft_model)
        self._slices_logits = "logits_to_keep" in inspect.signature(plain.forward).parameters
        self.memory_embeddings = None if self.layout is None else _new_embeddings(plain, self.layout.num_memory_tokens)
        if self.r3mem_config.adapter_rows == "memory":
            let_adapters_choose_rows(self._layers)
        self._register_checkpoint_hooks()

    def _lora_config(self, base):
        config = self.r3mem_config
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=target_pattern(base, config.target_modules, config.first_adapted_layer),
        )

    @property
    def config(self):
        """The base model's configuration, where trainers look for it."""
        return self.peft_model.config

    @property
    def device(self):
        return self.peft_model.device

    @property
    def max_tokens(self) -> int | None:
        """The base model's positions, None if it names no limit."""
        return _positions_of(self.peft_model)

    @torch.compiler.disable  # the rows' lengths decide what runs, and reversible layers are not compiled anyway
    def forward(
        self,
        input_ids,
        attention_mask=None,
        labels=None,
        query_input_ids=None,
        query_attention_mask=None,
        terms=None,
        memory: Memory | None = None,
        num_items_in_batch=None,
        **inputs,
    ) -> R3MemOutput:
        """The base model's forward pass, segment by segment behind memories; with a query, the objective of pairs.

        input_ids, attention_mask, labels: int64 `[B, T]`, of the contexts; labels are -100 where they do not count.
        query_input_ids, query_attention_mask: int64 `[B, Q]`. Rows may be padded on either side, as the masks say.
        memory: of as many rows. Its unfinished tokens are read before the row's own. num_items_in_batch: by which the
        loss is divided in place of the number of tokens that count, so that the losses of several batches add up to
        the mean over all of them (with a query: each term is multiplied by the batch's share of their labels).

        Without a query: what the base model returns, as an `R3MemOutput`, with its `logits` `[B, T, V]`. With labels
        and memory tokens, rows longer than a segment are read in segments of `segment_length` tokens, each behind the
        memory of those before (and `segment_overlap` tokens of them); the loss is the mean over all tokens. In
        training through several segments only their memories are kept, all but the last are run again in the backward
        pass (`kept_segments`), and there are no `logits`. Without its adapters (`disable_adapters`) and a
        memory it is the base model, whatever the length.

        With one, `loss` is the sum of the objective's terms with their weights from the config, each a mean over
        tokens: `compress` is `-log p(query | context)`, forward, where with memory tokens the context is
        read from the memory of it; `expand` is `-log p(context | query)`, backward; `cycle` is
        `-log p(context | memory of the context)`, backward. terms: those that are computed; None: those with a weight.
        A row whose context is wholly masked teaches that its query has none: the end at once.
        `logits` `[B, T + 1, V]` are those of the contexts, read backward, right-padded: `logits[:, t]` predicts token
        t of the context, and the end after the last; `targets` `[B, T + 1]` are these, -100 where none counts;
        `cycle_logits` are those of the third term.

        A row's results do not depend on the rows and the padding beside it but for rounding: matrix products differ by
        some ulp between shapes, of which the streams make steps of 2**-fraction_bits now and then.
        Raises ValueError for shapes that do not agree, rows longer than the model's positions, or another model's
        memory.
        """
        if query_input_ids is None:
            if inputs.pop("use_cache", None):
                raise ValueError("R3MemModel.forward returns no cache; use generate, or the base model")
            rows = Rows(input_ids, attention_mask, labels)
            if memory is None and (labels is None or self._is_one_pass(rows)):
                extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
                with self._without_memory():
                    output = self.peft_model(
                        input_ids=rows.ids, attention_mask=attention_mask, labels=labels, use_cache=False,
                        **extra, **inputs,
                    )  # fmt: skip
                loss = output.loss if labels is None else self._with_memory_tokens(output.loss)
                return R3MemOutput(loss=loss, logits=output.logits)
            inputs.pop("skip_logits", None)  # Trainer's wish, with Liger, where it needs none
            if inputs:
                raise ValueError(f"behind a memory, forward takes no {sorted(inputs)}")
            if memory is None:
                memory = self._empty(len(rows.ids), origin=None)
            else:
                self.check_memory(memory, len(rows.ids))
            return self._in_segments(memory, rows, labels is not None, num_items_in_batch)
        if refused := sorted([*inputs, *(["memory"] if memory is not None else [])]):
            raise ValueError(f"with query_input_ids, forward takes no {refused}")
        contexts = Rows(input_ids, attention_mask, labels)
        queries = Rows(query_input_ids, query_attention_mask, None)
        config = self.r3mem_config
        weights = {"compress": config.compress_weight, "expand": config.expand_weight}
        if self.layout is not None:
            weights["cycle"] = config.cycle_weight
        terms = [term for term, weight in weights.items() if weight] if terms is None else terms
        if not terms or set(terms) - set(weights):
            raise ValueError(f"terms must be some of {list(weights)}, got {terms!r}")
        if len(contexts.ids) != len(queries.ids):
            raise ValueError(f"{len(contexts.ids)} contexts and {len(queries.ids)} queries: one of each a row")
        output = R3MemOutput()
        if self.layout is not None and set(terms) & {"compress", "cycle"}:
            memory = self._compress_rows(contexts.lists(), self._empty(len(contexts.ids), origin=None), finish=True)
        if "expand" in terms:
            with self._backward():
                output.logits, output.targets = self._continuation_logits(queries, contexts)
            output.expand_loss = _mean_loss(output.logits, output.targets)
        # A row without a context has nothing that its query could be told from, and no memory.
        asked = contexts.mask.any(1, keepdim=True)
        if "compress" in terms:
            given = contexts if memory is None else nothing_before(contexts)
            logits, targets = self._continuation_logits(given, queries, memory, adapted_tokens=self._read_rows)
            output.compress_loss = _mean_loss(logits, targets.masked_fill(~asked, IGNORED))
        if "cycle" in terms:
            with self._backward():
                output.cycle_logits, targets = self._continuation_logits(nothing_before(contexts), contexts, memory)
            output.cycle_loss = _mean_loss(output.cycle_logits, targets.masked_fill(~asked, IGNORED))
            output.targets = targets if output.targets is None else output.targets
        if labels is not None:
            output.loss = sum(weights[term] * output[f"{term}_loss"] for term in terms)
            if num_items_in_batch is not None:
                # Counted as trainers count the labels of a causal model: without the first of a row.
                output.loss = output.loss * ((labels[:, 1:] != IGNORED).sum() / num_items_in_batch)
        return output

    def _is_one_pass(self, rows):
        """Whether rows without a memory are read as the base model reads them."""
        if self.layout is None or (self._stack.mode is Mode.PLAIN):
            return True
        return _most_of_ranks(self, int(rows.mask.sum(1).max())) <= self.layout.segment_length

    def _backward(self):
        config = self.r3mem_config
        return reading_backward(
            self.peft_model, config.core, form=config.backward, backward_momentum=config.backward_momentum
        )

    def _without_memory(self):
        """The forward direction without a memory: where adapters act on memory tokens alone, the base model."""
        return self.disable_adapters() if self.r3mem_config.adapter_rows == "memory" else contextlib.nullcontext()

    @property
    def _read_rows(self):
        """Number of trailing tokens that the adapters act on when reading forward behind a memory; None means all."""
        return 0 if self.r3mem_config.adapter_rows == "memory" else None

    def _in_segments(self, memory, rows, with_loss, num_items):
        """The forward pass of rows behind a memory, segment by segment."""
        # Logits alone are those that `generate` continues by: of one pass.
        segments = self._segments_of(memory, rows, in_one=not with_loss)
        if not segments:
            raise ValueError("no row has a token: all are padding, and the memory carries none")
        if num_items is None:
            num_items = max(1, sum(int((segment.targets != IGNORED).sum()) for segment in segments))
        training = with_loss and self._trains_through(segments)
        teacher = (
            self._teacher_hidden_states(memory, rows) if training and self.r3mem_config.distillation_weight else None
        )

        def outcome(segment, hidden):
            return self._segment_outcome(segment, hidden, with_loss, num_items, not training, teacher)

        outcomes, _ = self._read_segments(segments, memory, outcome)
        output = R3MemOutput()
        if with_loss:
            output.loss = sum(found["loss"] for found in outcomes)
        if not training and outcomes[0]["logits"] is not None:  # a fused loss makes none
            output.logits = self._placed(rows, segments, [found["logits"] for found in outcomes])
        return output

    @torch.compiler.disable  # the rows' lengths decide what runs, and reversible layers are not compiled anyway
    def hidden_states(self, input_ids, attention_mask=None) -> torch.Tensor:
        """The hidden states before the head that `forward` has with labels: `[B, T, hidden_size]`, zeros in padding.

        input_ids, attention_mask: int64 `[B, T]`. Rows are read in the same segments, and in training replayed in the
        backward pass in the same way. Raises ValueError as `forward` does.
        """
        rows = Rows(input_ids, attention_mask, None)
        if self._is_one_pass(rows):
            with self._without_memory():
                hidden = self._decoder(
                    input_ids=rows.ids, attention_mask=attention_mask, use_cache=False
                ).last_hidden_state
            return self._with_memory_tokens(hidden.masked_fill(rows.mask[..., None] == 0, 0))
        memory = self._empty(len(rows.ids), origin=None)
        segments = self._segments_of(memory, rows)
        found, _ = self._read_segments(segments, memory, lambda segment, hidden: hidden)
        return self._placed(rows, segments, found)

    def _with_memory_tokens(self, value):
        """A value that no memory has a part in, with zero gradients for what only memories use: DDP waits for them."""
        if self.memory_embeddings is None:
            return value
        idle = [self.memory_embeddings]
        if self.r3mem_config.adapter_rows == "memory" and dist.is_initialized():
            idle = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return value + 0 * sum(parameter.sum() for parameter in idle).to(value.dtype)

    def _segments_of(self, memory, rows, in_one=False):
        """Rows behind a memory, in the segments that they are read in, or in one."""
        ids, labels = rows.lists(), rows.lists(rows.labels)
        lengths = [len(before) + len(row) for before, row in zip(memory.unfinished, ids, strict=True)]
        length = max(1, *lengths) if in_one else None
        longest = max(lengths) if in_one else _most_of_ranks(self, max(lengths))
        if longest > max(lengths):
            # Another process has more segments: what is read here with them counts nowhere.
            more = torch.zeros(longest - lengths[-1], dtype=torch.int64)
            ids[-1], labels[-1] = torch.cat([ids[-1], more]), torch.cat([labels[-1], more + IGNORED])
        segments = cut_segments(memory, ids, labels, finish=True, writes_all=False, length=length)
        for segment in segments:
            self._check_length(segment.ids.shape[1] + (self.layout.num_memory_tokens if segment.writes else 0), memory)
        return segments

    def _segment_outcome(self, segment, hidden, with_loss, num_items, with_logits, teacher):
        """Loss and logits of a segment whose last hidden states are known, in a dict."""
        targets = segment.targets.to(self.device)
        inputs = {"labels": targets, "shift_labels": targets, "num_items_in_batch": num_items} if with_loss else {}
        output = self._head(hidden, **inputs)
        found = {"loss": output.loss} if with_loss else {}
        if with_logits:
            found["logits"] = output.logits
        if teacher is not None:
            if output.logits is None:
                raise ValueError(
                    "distillation needs the logits, which a fused loss (Liger's) does not make; apply it with "
                    "fused_linear_cross_entropy=False"
                )
            counted = targets != IGNORED
            places = segment.places.clamp_max(teacher.shape[1] - 1)
            wanted = teacher[torch.tensor(segment.rows, device=self.device)[:, None], places.to(self.device)]
            wanted = self._teacher_logits(wanted[counted]).float().log_softmax(-1)
            divergence = kl_div(
                output.logits[counted].float().log_softmax(-1), wanted, reduction="sum", log_target=True
            )
            weight = self.r3mem_config.distillation_weight
            found["loss"] = (1 - weight) * found["loss"] + weight * divergence / num_items
        return found

    @torch.no_grad()
    def _teacher_hidden_states(self, memory, rows):
        """The base model's last hidden states with the full context: `[B, T, hidden_size]`, padded on the right."""
        if memory.tokens_seen.any():
            raise ValueError(
                "distillation_weight: the teacher reads the full context, of which a memory holds only a part; train "
                "without one, or set the weight to 0"
            )
        ids, mask, _ = rows.right_padded(self.end_token_id)
        ids, mask = ids[:, :-1], mask[:, :-1]
        if self.max_tokens is not None and ids.shape[1] > self.max_tokens:
            raise ValueError(
                f"distillation_weight: the teacher reads all {ids.shape[1]} tokens at once, and the model has "
                f"{self.max_tokens} positions; use shorter rows, or set the weight to 0"
            )
        with evaluating(self), self.disable_adapters():
            return self._decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    @torch.no_grad()
    def _teacher_logits(self, hidden):
        """The base model's logits `[N, V]` for last hidden states `[N, hidden_size]`."""
        head = self.peft_model.get_output_embeddings()
        adapted = head is not None and any(isinstance(module, BaseTunerLayer) for module in head.modules())
        with self.disable_adapters() if adapted else contextlib.nullcontext():
            return self._head(hidden[None]).logits[0]

    def _placed(self, rows, segments, logits):
        """Logits `[B, T, V]` where the rows' own tokens stand, zeros in padding, from those of segments."""
        pieces = [[] for _ in rows.ids]
        for segment, found in zip(segments, logits, strict=True):
            for row, (start, end), values in zip(segment.rows, segment.own, found, strict=True):
                pieces[row].append(values[len(values) - (end - start) :])
        some = logits[0]
        placed = some.new_zeros(*rows.ids.shape, some.shape[-1])
        kept = [torch.cat(found) for found in pieces if found]
        return placed.masked_scatter(rows.mask.bool()[..., None], torch.cat(kept))

    def _read_segments(self, segments, memory, outcome, on_tokens=None):
        """Read segments one after the other: what `outcome(segment, hidden)` makes of each, and the last states."""
        config = self.r3mem_config
        states = memory.states.to(self.device, self.peft_model.dtype)

        def step(segment, states):
            hidden, states = self._segment(segment, states, memory, drops=training)
            return outcome(segment, hidden), states

        training = self._trains_through(segments)
        if training and config.kept_segments == "none":
            return replay(self, step, segments, states, bptt_segments=config.bptt_segments)
        outcomes = []
        for index, segment in enumerate(segments):
            if training and index and config.bptt_segments is not None and index % config.bptt_segments == 0:
                states = states.detach()
            with self._kept(training):
                hidden, states = self._segment(segment, states, memory, drops=training)
                if training:  # the logits are as large as all else that a segment computes
                    outcomes.append(checkpoint(outcome, segment, hidden, use_reentrant=False))
                else:
                    outcomes.append(outcome(segment, hidden))
            if on_tokens is not None:
                on_tokens(sum(end - start for start, end in segment.own))
        return outcomes, states

    def _trains_through(self, segments):
        return self.training and torch.is_grad_enabled() and len(segments) > 1

    def _kept(self, training):
        """Where what is kept of a segment for the backward pass is kept."""
        if training and self.r3mem_config.kept_segments == "host":
            return self._stack.on_host()
        return contextlib.nullcontext()

    def _segment(self, segment, states, memory, drops):
        """A segment behind the memory with these states: its last hidden states `[A, n, hidden_size]`, new states."""
        rows = list(segment.rows)
        memory = dataclasses.replace(memory, states=states, num_segments=segment.num_segments)
        read = memory.rows(rows) if len(rows) < len(memory) else memory
        if drops and self.r3mem_config.memory_dropout:
            # Drawn within the segment, so that it is the same when the segment is run again.
            seen = torch.rand(len(rows)) >= self.r3mem_config.memory_dropout
            read = dataclasses.replace(read, num_segments=read.num_segments * seen)
        embeddings = self.peft_model.get_input_embeddings()(segment.ids.to(self.device))
        if embeddings.requires_grad and embeddings.is_leaf:
            # By the hook that checkpointing puts there for frozen embeddings, so that a backward pass comes by at all.
            embeddings = embeddings.detach()
        mask, count = segment.mask.to(self.device), 0
        if segment.writes:
            count = self.layout.num_memory_tokens
            written = self.memory_embeddings.to(embeddings.dtype).expand(len(rows), -1, -1)
            embeddings = torch.cat([embeddings, written], 1)
            mask = torch.cat([mask, mask.new_ones(len(rows), count)], 1)
        adapted_tokens = count if self.r3mem_config.adapter_rows == "memory" else None
        cache = self._cache(keep=False, capture=count, adapted_tokens=adapted_tokens)
        hidden = self._decode_embeddings(embeddings, mask, self._read(cache, read))
        if segment.writes:
            written = hidden[:, -count:] if self.layout.placement == "input" else cache.captured()
            states = appended(states, written, rows, self.layout)
        return hidden[:, : hidden.shape[1] - count], states

    def _head(self, hidden, **inputs):
        """The base model's output where its decoder's last hidden states `[B, T, hidden_size]` are known.

        Its own head and loss, whatever they are: only the decoder is left out.
        """
        # As rows and back: fused losses (Liger's) view it as rows, and of a single row `contiguous` would leave the
        # stride of the longer tensor that it is part of, for which a head's product copies its whole weight.
        rows = hidden.flatten(0, 1).view(hidden.shape)
        result = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=rows)
        own = vars(self._decoder)
        before = own.get("forward")
        own["forward"] = lambda *args, **kwargs: result
        try:
            return self.peft_model(inputs_embeds=hidden, use_cache=False, **inputs)
        finally:
            del own["forward"]
            if before is not None:
                own["forward"] = before

    def _unfinished(self, memory):
        """What a memory carries as tokens, as rows padded on the left: `[B, longest]`."""
        return left_padded(list(map(torch.cat, zip(memory.recent, memory.unfinished, strict=True))), self.device)

    def _continuation_logits(self, prompts, continuations, memory=None, adapted_tokens=None):
        """Logits that predict the continuations of prompts, `[B, N + 1, V]`, and their targets `[B, N + 1]`."""
        first, first_mask = self._prompt(prompts)
        second, second_mask, targets = continuations.right_padded(self.end_token_id)
        # The last target is predicted, not read.
        ids = torch.cat([first, second[:, :-1]], 1)
        mask = torch.cat([first_mask, second_mask[:, :-1]], 1)
        self._check_length(ids.shape[1], memory)
        kept = second.shape[1]
        extra = {"logits_to_keep": kept} if self._slices_logits else {}
        if memory is not None:
            cache = self._read(self._cache(keep=False, adapted_tokens=adapted_tokens), memory)
            extra |= cache_argument(self._plain_model, cache)
        with contextlib.nullcontext() if memory is None else self._stack.must_read(cache):
            output = self.peft_model(
                input_ids=ids, attention_mask=mask, position_ids=positions_of_mask(mask), use_cache=False, **extra
            )
        return output.logits[:, -kept:], targets

    def _prompt(self, prompts):
        """`start prompt start`, padded on the left: ids and mask."""
        ids, mask = prompts.left_padded()
        before = torch.full_like(ids[:, :1], self.start_token_id)
        # Both delimiters stand next to the prompt's own tokens.
        ids = torch.cat([before, ids, before], 1)
        mask = torch.cat([mask[:, :1] * 0, mask, torch.ones_like(mask[:, :1])], 1)
        start = mask.argmax(1, keepdim=True) - 1
        ids.scatter_(1, start, self.start_token_id)
        mask.scatter_(1, start, 1)
        return ids, mask

    def _check_length(self, tokens, memory=None):
        before = 0 if memory is None else self.layout.first_position
        if self.max_tokens is not None and before + tokens > self.max_tokens:
            behind = f", behind a memory of {before}" if before else ""
            raise ValueError(
                f"a row takes {tokens} tokens{behind}, the model has {self.max_tokens} positions; split the text into "
                "smaller documents"
            )

    @torch.no_grad()
    def recall(self, query_input_ids, query_attention_mask=None, *, max_new_tokens=256) -> list[torch.Tensor]:
        """Read backward from queries to their contexts, greedily: a list of int64 `[n]`, the ends left out.

        query_input_ids, query_attention_mask: int64 `[B, Q]`, padded on either side. A query that nothing was learned
        for gives an empty tensor, if the model was trained to know. max_new_tokens: at most so many a context; fewer
        if the model's positions end before. The model's mode stays as it is.
        Raises ValueError for a query longer than the model's positions, or max_new_tokens below 1.
        """
        return self._decoded_backward(Rows(query_input_ids, query_attention_mask, None), None, max_new_tokens)

    @torch.no_grad()
    def expand(
        self, memory: Memory, query_input_ids=None, query_attention_mask=None, *, max_new_tokens=256
    ) -> list[torch.Tensor]:
        """Read backward from memories to the text that they were made of, greedily: a list of int64 `[n]`.

        memory: of B rows; what is unfinished in it is compressed first, in a copy. query_input_ids,
        query_attention_mask: int64 `[B, Q]`, read after the memory; None: the memory alone. Otherwise as `recall`.
        """
        if query_input_ids is None:
            rows = nothing(len(memory), self.device)
        else:
            rows = Rows(query_input_ids, query_attention_mask, None)
        self.check_memory(memory, len(rows.ids))
        return self._decoded_backward(rows, self.compress(None, memory=memory, finish=True), max_new_tokens)

    def _decoded_backward(self, rows, memory, max_new_tokens):
        ids, mask = self._prompt(rows)
        self._check_length(ids.shape[1] + 1, memory)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if self.max_tokens is not None:
            before = 0 if memory is None else self.layout.first_position
            max_new_tokens = min(max_new_tokens, self.max_tokens - before - ids.shape[1])
        # Made before the layers change places: its own layers are made by the configuration's order.
        cache = DynamicCache(config=text_config(self.config)) if memory is None else self._cache()
        with evaluating(self), self._backward():
            if memory is not None:
                self._read(cache, memory)
            with contextlib.nullcontext() if memory is None else self._stack.must_read(cache):
                output = self.decode(ids, mask, cache=cache, do_sample=False, max_new_tokens=max_new_tokens)
        return [until(row, self.end_token_id) for row in output[:, ids.shape[1] :]]

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, memory: Memory | None = None, **settings):
        """The base model's `generate`, behind a memory: int64 `[B, T + n]`, or an output with it as `sequences`.

        input_ids, attention_mask: int64 `[B, T]`, padded on either side. memory: of as many rows; its unfinished
        tokens are read before the prompt, and are not returned (logits processors see them). settings: as of
        `transformers`' `generate`: sampling, beams, `num_return_sequences`, `streamer` and the others. Behind a memory
        there is always a cache, and it is the memory's.
        Raises ValueError for shapes that do not agree, a row without any token, another model's memory, another cache,
        or more tokens than positions.
        """
        rows = Rows(input_ids, attention_mask, None)
        base = self.peft_model.get_base_model()
        settings.setdefault("pad_token_id", self.end_token_id)
        if memory is None:
            with evaluating(self), self._without_memory():
                return base.generate(input_ids=rows.ids, attention_mask=rows.mask, **settings)
        self.check_memory(memory, len(rows.ids))
        if given := cache_name(settings) or (settings.get("cache_implementation") and "cache_implementation"):
            raise ValueError(f"{given} cannot go with a memory, which is a cache of its own")
        if settings.get("assistant_model") is base or settings.get("assistant_early_exit"):
            raise ValueError(
                "a memory network cannot draft for itself: the drafts would be written without the memory"
            )
        before = self._unfinished(memory)
        ids, mask, _, _ = before.joined(rows).left_padded_with_labels()
        if not mask.any(1).all():
            raise ValueError("a row has neither a prompt nor unfinished tokens that could be continued")
        own = copy.deepcopy(base.generation_config)
        config = copy.deepcopy(settings.pop("generation_config", None) or own)
        lengths = {name: settings.pop(name, None) for name in LENGTHS}
        config.max_new_tokens, config.min_new_tokens = new_tokens(lengths, config, rows.ids.shape[1])
        others = settings
        for chosen in (config, own):  # by which transformers fills in what the other leaves open
            others = chosen.update(**settings)
            chosen.cache_implementation = chosen.max_length = chosen.min_length = None
            chosen.use_cache = True
        self._check_length(ids.shape[1] + config.max_new_tokens - 1, memory)
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        cache = self._cache_of(memory)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        if others.get("streamer") is not None:
            others["streamer"] = StreamerOfPrompts(others["streamer"], rows.ids)
        others |= cache_argument(base, cache)
        with evaluating(self), generation_config_of(base, own), self._stack.must_read(cache):
            output = base.generate(input_ids=ids, attention_mask=mask, generation_config=config, **others)
        found = output if isinstance(output, torch.Tensor) else output.sequences
        prompts = rows.ids.repeat_interleave(len(found) // len(ids), 0)
        found = torch.cat([prompts, found[:, ids.shape[1] :]], 1)
        if isinstance(output, torch.Tensor):
            return found
        output.sequences = found
        return output

    @torch.no_grad()
    def compress(
        self, input_ids, attention_mask=None, memory: Memory | None = None, *, finish=False, progress=False
    ) -> Memory:
        """Read a history segment by segment, and keep the memory of it alone (R3Mem, section 3).

        input_ids, attention_mask: int64 `[B, T]`, of any length, padded on either side, on any device; None: nothing
        new. memory: of what came before, of B rows; None: nothing. What does not fill a segment waits in the memory,
        so that a history in pieces leaves the same memory as in one. finish: compress that too, as a shorter segment;
        what follows then starts a new one. progress: show a bar, in tokens.

        The memory needed does not grow with T. Raises ValueError for a model without memory tokens, another model's
        memory, a number of rows that differs, or more segments than `max_memory_segments=None` can keep.
        """
        self.check_memories()
        if input_ids is None:
            if memory is None:
                raise ValueError("there is nothing to compress: neither input_ids nor a memory")
            rows = [torch.zeros(0, dtype=torch.int64)] * len(memory)
        else:
            rows = Rows(input_ids, attention_mask, None).lists()
        if memory is None:
            memory = self.empty_memory(len(rows))
        self.check_memory(memory, len(rows))
        total = sum(map(len, (*rows, *memory.unfinished)))
        with (
            evaluating(self),
            tqdm(total=total, desc="Compressing", unit="tok", unit_scale=True, disable=not progress) as bar,
        ):
            return self._compress_rows(rows, memory, finish, bar.update)

    def empty_memory(self, rows=1) -> Memory:
        """The memory of nothing, of so many rows. Raises ValueError for a model without memory tokens."""
        self.check_memories()
        return self._empty(rows, self.origin())

    def _empty(self, rows, origin):
        dtype, device = self.peft_model.dtype, self.device
        return Memory(
            states=empty_states(self.layout, rows, self._state_sizes(), dtype=dtype, device=device),
            num_segments=torch.zeros(rows, dtype=torch.int64),
            tokens_seen=torch.zeros(rows, dtype=torch.int64),
            unfinished=(torch.zeros(0, dtype=torch.int64),) * rows,
            recent=(torch.zeros(0, dtype=torch.int64),) * rows,
            labels=(None,) * rows,
            layout=self.layout,
            origin=origin,
        )

    def cache_of(self, memory: Memory) -> PrefixCache:
        """A memory as the key-value cache of the base model, or of its `generate`; see `Memory.to_cache`."""
        self.check_memory(memory)
        return self._cache_of(memory)

    def _cache_of(self, memory):
        return self._read(self._cache(adapted_tokens=self._read_rows), memory)

    def origin(self) -> Origin:
        """Fingerprints of base model and adapters, as the memories that it makes now carry them.

        They are computed again when weights or settings of the adapters have changed; with the adapters off they are
        others. Raises RuntimeError while the model is being read backward, ValueError for adapters that
        `adapter_rows="memory"` cannot hold to their rows.
        """
        return self._origin_with(fingerprints.adapters_are_off(self.peft_model) or (self._stack.mode is Mode.PLAIN))

    def _origin_with(self, adapters_off):
        if self._is_reading_backward:
            raise RuntimeError("memories are made, and caches of them, before the model is read backward")
        if self.r3mem_config.adapter_rows == "memory":
            check_rows_can_be_chosen(self.peft_model)
        settings = fingerprints.adapter_settings(self.peft_model)
        known = (_versions(self.parameters()), settings)
        if self._origins is None or self._origins[0] != known:
            self._origins = (known, {})
        found = self._origins[1]
        if adapters_off not in found:
            adapter = fingerprints.adapter_fingerprint(self, [settings, adapters_off])
            found[adapters_off] = Origin(self.base_fingerprint(), adapter)
        return found[adapters_off]

    @property
    def _is_reading_backward(self):
        order = self._stack.route.order
        return list(order) != sorted(order)

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
        if its.adapter != mine.adapter and its.adapter != self._origin_with(adapters_off=False).adapter:
            raise ValueError("the memory was made with other adapters or settings than the model has; compress again")
        if memory.layout != self.layout:
            raise ValueError(f"the memory's layout is {memory.layout}, the model's {self.layout}")
        sizes = list(self._state_sizes())
        shape = list(memory.states.shape)
        found = shape[2:] if self.layout.placement == "input" else [shape[0], shape[3], shape[5]]
        if found != sizes:
            raise ValueError(f"the memory's states are {shape}, of another model than one of {sizes}")

    def _compress_rows(self, rows, memory, finish, on_tokens=None):
        """The memory after some more tokens, lists of int64 on the CPU. Differentiable."""
        segments = cut_segments(memory, rows, finish=finish, writes_all=True)
        if _most_of_ranks(self, len(segments)) + _most_of_ranks(self, -len(segments)):
            raise ValueError(
                "a model sharded by FSDP2 gathers its layers in all processes together, so each has to compress as "
                f"many segments; here are {len(segments)}. Give all of them rows that are cut into as many"
            )
        carried = advance(memory, rows, segments)
        readable = self.layout.readable_segments
        if self.layout.keeps_all and len(carried["num_segments"]) and carried["num_segments"].max() > readable:
            raise ValueError(
                f"max_memory_segments=None keeps {readable} segments within the model's positions, and this is more "
                "(to expand a memory compresses what is unfinished in it); use a number, or longer segments"
            )
        _, states = self._read_segments(segments, memory, lambda segment, hidden: (), on_tokens)
        return dataclasses.replace(memory, states=states, **carried)

    def _read(self, cache, memory):
        """Let a cache read a memory, in the direction that the model is being read in."""
        states, visible = memory.states.to(self.device, self.peft_model.dtype), memory.visible_on_host()
        all_visible, visible = bool(visible.all()), visible.to(self.device)
        if self.layout.placement == "input" and visible.shape[1]:
            # Standing before all else, they see nothing else: what they leave in each layer can be had without it.
            count = visible.shape[1]
            seen = self._cache(keep=False, capture=count, first_position=self.layout.first_position - count)
            places = torch.arange(count, device=self.device).expand(len(states), -1)
            self._decode_embeddings(states, visible.to(torch.int64), seen, places)
            states = seen.captured()
        return cache.read(states, visible, all_visible)

    def _cache(self, first_position=None, **settings):
        first = self.layout.first_position if first_position is None else first_position
        return PrefixCache(text_config(self.config), first_position=first, decoder=self._decoder, **settings)

    @property
    def _decoder(self):
        return self._layers[0].reversible.decoder

    def _decode_embeddings(self, embeddings, mask, cache, positions=None):
        """The last hidden states, `[B, T, hidden_size]`; no logits are computed.

        positions: behind the cache's first one, `[B, T]`; None: from its first token on.
        """
        positions = positions_of_mask(mask) if positions is None else positions
        given = cache_argument(self._decoder, cache)
        with self._stack.must_read(cache):
            return self._decoder(
                inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, **given
            ).last_hidden_state

    def _state_sizes(self):
        """What a memory's states are besides rows and tokens. Asked for first, it proves that keys can be moved."""
        if self.layout.placement == "input":
            return (self.memory_embeddings.shape[1],)
        if self._sizes is None:
            keys = self._keys_at(0)
            layers, _, heads, tokens, width = keys.shape
            # Learned positions are part of what the tokens are, and nothing is moved.
            step = min(37, (self.max_tokens or 64) - tokens) if is_rotary(self._decoder) else 0
            moved = self._keys_at(step).flatten(1) - keys.flatten(1)
            error = (moved.norm(dim=1) / keys.flatten(1).norm(dim=1)).max().item()
            if not error <= max(0.01, 16 * torch.finfo(self.peft_model.dtype).eps):
                raise ValueError(
                    f"in a {type(self.peft_model.get_base_model()).__name__} keys that were moved by {step} positions "
                    f"differ by {error:.2g}, so a memory cannot be placed before its tokens; "
                    'use memory_placement="input", or another model'
                )
            self._sizes = (layers, heads, width)
        return self._sizes

    @torch.no_grad()
    def _keys_at(self, position):
        """Keys of a few tokens from this position on, without their positions: float `[layers, 1, kv_heads, 4, D]`."""
        ids = torch.arange(4, device=self.device)[None]
        cache = self._cache(keep=False, capture=4, first_position=position)
        # In the weights' precision: autocast's would look like keys that cannot be moved.
        with evaluating(self), torch.autocast(self.device.type, enabled=False):
            self._decode_embeddings(self.peft_model.get_input_embeddings()(ids), torch.ones_like(ids), cache)
        return cache.captured()[:, 0].float()

    def decode(self, input_ids, attention_mask, *, cache=None, **settings) -> torch.Tensor:
        """`generate` by these settings alone: int64 `[B, T + n]`, ended by the end token, in the current direction.

        A model's own generation_config would fill in what is not set here (a penalty for repetition, say).
        """
        base = self.peft_model.get_base_model()
        ends = {"eos_token_id": self.end_token_id, "pad_token_id": self.end_token_id}
        with generation_config_of(base, GenerationConfig()):
            return base.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=GenerationConfig(**ends, **settings),
                **({} if cache is None else cache_argument(base, cache)),
            )

    @contextlib.contextmanager
    def disable_adapters(self):
        """While this lasts the model is its base model, bit for bit: no adapters, no coupling, no quantisation."""
        if self._stack.mode is Mode.PLAIN:
            yield
            return
        # PEFT lets the adapters learn again when it enables them, also those that did not before.
        with (
            requiring_gradients_as_before(self.peft_model),
            self.peft_model.disable_adapter(),
            self._stack.in_mode(Mode.PLAIN),
        ):
            yield

    def base_fingerprint(self) -> str:
        """Fingerprint of the base model's settings and weights, computed when they change."""
        versions = self._base_versions()
        if self._base is None or self._base[0] != versions:
            self._base = (versions, fingerprints.fingerprint(self.peft_model))
        return self._base[1]

    def set_base_fingerprint(self, fingerprint):
        """Take over a fingerprint of the weights as they are, which has just been computed."""
        self._base = (self._base_versions(), fingerprint)

    def _base_versions(self):
        return _versions(parameter for _, parameter in own_parameters(self.peft_model))

    def save_pretrained(self, folder, *, adapter_dtype=None, **details):
        """Save the adapters as a PEFT folder, with `r3mem.json` beside them (see `adapter_folder.save`).

        adapter_dtype: that their weights are rounded to in the files; None: as they are.
        """
        adapter_folder.save(self, folder, adapter_dtype=adapter_dtype, **details)

    @classmethod
    def from_pretrained(cls, folder, base=None, *, dtype=torch.float32, revision=None, token=None) -> "R3MemModel":
        """Load what `save_pretrained` or `push_to_hub` wrote, in eval mode.

        Args:
            folder: A folder, the name of an adapter that comes with this package, or a hub id.
            base: Its base model, or a name by which `load_model` finds it; None: the name that it had when the adapter
                was saved. That it is the right one is told by its fingerprint, wherever it lies.
            dtype: Of a base that is loaded here.
            revision: Of the adapter on the hub.
            token: Of the hub.

        Raises:
            OSError: The folder or a file is missing or incomplete, or the base is not found.
            ValueError: A file is corrupted, or the base is not the model that the adapters were trained for.
        """
        return adapter_folder.load(cls, folder, base, dtype, revision, token)

    def push_to_hub(self, repo_id: str, *, adapter_dtype=None, details=None, **settings) -> str:
        """Send the adapters, as `save_pretrained` writes them, to the Hugging Face hub; returns the commit's address.

        Args:
            repo_id: `USER/NAME`, made if need be.
            adapter_dtype: See `save_pretrained`.
            details: More of what `save_pretrained` takes.
            settings: `private`, `token`, `revision`, `commit_message`, see `hub.upload_adapter`.
        """

        def save(folder):
            self.save_pretrained(folder, adapter_dtype=adapter_dtype, **(details or {}))

        return hub.upload_adapter(save, repo_id, **settings)

    def merge_and_unload(self):
        """The base model as an ordinary one, with the adapters merged into its weights; this model is of no use then.

        What comes back reads forward, in the base's own arithmetic: without the coupling, memories and the backward
        direction. Merging rounds to the weights' dtype.

        Raises:
            ValueError: The adapters act on memory tokens alone (`adapter_rows="memory"`), which merged weights cannot.
        """
        if self.r3mem_config.adapter_rows == "memory":
            raise ValueError('adapters that act on memory tokens alone (adapter_rows="memory") cannot be merged')
        if self._is_reading_backward:
            raise RuntimeError("merge before or after the model is read backward, not meanwhile")
        restore(self.peft_model)
        return self.peft_model.merge_and_unload()


def _versions(parameters):
    """Version stamps of the parameters. They change with every in-place modification, except through `.data`."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]


def _positions_of(model):
    return getattr(text_config(model.config), "max_position_embeddings", None)


def _new_embeddings(base, count):
    """Embeddings of memory tokens: float32 `[count, width]`, around the mean of the vocabulary's, as far apart."""
    known = base.get_input_embeddings().weight.detach().float()
    noise = torch.randn(count, known.shape[1], device=known.device)
    return nn.Parameter(known.mean(0) + known.std(0) * noise)


def _most_of_ranks(model, count):
    """The largest of all processes' counts, if FSDP2 has them gather parameters together; else this one's."""
    if not (dist.is_initialized() and any(isinstance(module, FSDPModule) for module in model.modules())):
        return count
    counts = torch.tensor(count, device=model.device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)


def _mean_loss(logits, targets):
    """Mean cross-entropy of the targets that count, 0 if none does."""
    total = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp_min(1)


def _first(*ids):
    """The first id that is given; of a list of them, its first."""
    for given in ids:
        given = given[0] if isinstance(given, (list, tuple)) and given else given
        if isinstance(given, int):
            return given
    return None
