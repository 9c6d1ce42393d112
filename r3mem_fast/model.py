"""`R3MemModel`: a causal language model that reads forward, and backward from a query to its context."""

import contextlib
import dataclasses
import inspect
import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from . import storage
from .config import R3MemConfig
from .reversible import make_reversible, reading_backward
from .reversible.convert import check_convertible, find_decoder_layers, stack_of, text_config

_IGNORED = -100


@dataclasses.dataclass
class R3MemOutput(ModelOutput):
    """What `R3MemModel.forward` returns.

    loss: float scalar, or None without labels. logits: see `forward`. compress_loss, expand_loss: the terms of the
    objective, unweighted; None where they were not computed. targets: with a query, what `logits` predict.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    compress_loss: torch.Tensor | None = None
    expand_loss: torch.Tensor | None = None
    targets: torch.Tensor | None = None


class R3MemModel(nn.Module):
    """A memory network made from a pretrained causal language model (R3Mem, arXiv 2502.15957, section 3).

    The base model gets LoRA adapters, trained, and reversible layers; its own weights stay as they are. Forward it is
    a language model as before. Backward (`recall`) it runs the layers of its core from last to first, as a causal
    decoder that continues a query with the context that the query was learned for.

    base: a `transformers` causal language model, or a PeftModel of one, which keeps its adapters. It is changed in
        place. config: an `R3MemConfig`; the default's core is chosen by depth.
    Raises TypeError or ValueError for a model that cannot be made reversible, a core beyond its depth, or a model
    whose config names no end-of-text token; the base model is then as it was.
    """

    # Its loss is a mean; a trainer that accumulates gradients divides by the number of batches itself.
    accepts_loss_kwargs = False

    def __init__(self, base, config: R3MemConfig | None = None):
        super().__init__()
        config = R3MemConfig() if config is None else config
        if isinstance(base, PeftModel) and base.active_adapter != "default":
            raise ValueError(f"the PeftModel's adapter must be called 'default', not {base.active_adapter!r}")
        plain = base.get_base_model() if isinstance(base, PeftModel) else base
        # All that can be refused is refused before the base model is changed.
        _, layers = check_convertible(plain, config.coupling())
        self.r3mem_config = config.resolved(len(layers))
        self.fingerprint = None
        self.end_token_id = _first(plain.config.eos_token_id)
        self.start_token_id = _first(plain.config.bos_token_id, self.end_token_id)
        if self.end_token_id is None:
            raise ValueError("the model's config has no eos_token_id, which ends a recalled context; set it")
        if not isinstance(base, PeftModel):
            base = get_peft_model(base, self._lora_config(base))
        self.peft_model = make_reversible(base, self.r3mem_config.coupling())
        self._slices_logits = "logits_to_keep" in inspect.signature(plain.forward).parameters

    def _lora_config(self, base):
        config = self.r3mem_config
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=_target_pattern(base, config.target_modules, config.first_adapted_layer),
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
        return getattr(text_config(self.config), "max_position_embeddings", None)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        labels=None,
        query_input_ids=None,
        query_attention_mask=None,
        terms=None,
        **inputs,
    ) -> R3MemOutput:
        """The base model's forward pass; with a query, the bidirectional objective of context–query pairs.

        input_ids, attention_mask, labels: int64 `[B, T]`, of the contexts; labels are -100 where they do not count.
        query_input_ids, query_attention_mask: int64 `[B, Q]`. Rows may be padded on either side, as the masks say.

        Without a query: what the base model returns, as an `R3MemOutput`, with its `logits` `[B, T, V]`.
        With one: `loss = compress_weight * compress_loss + expand_weight * expand_loss`, means over tokens of
        `-log p(query | context)`, forward, and `-log p(context | query)`, backward (DESIGN 2.7; terms with memory
        tokens are not built yet). terms: those of the objective that are computed; None: those with a weight. A row
        whose context is wholly masked teaches that its query has none: the end at once.
        `logits` `[B, T + 1, V]` are those of the contexts, read backward, right-padded: `logits[:, t]` predicts token
        t of the context, and the end after the last;
        `targets` `[B, T + 1]` are these, -100 where none counts.
        Raises ValueError for shapes that do not agree, or rows longer than the model's positions.
        """
        if query_input_ids is None:
            output = self.peft_model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **inputs)
            return R3MemOutput(loss=output.loss, logits=output.logits)
        if inputs:
            raise ValueError(f"with query_input_ids, forward takes no {sorted(inputs)}")
        contexts = _Rows(input_ids, attention_mask, labels)
        queries = _Rows(query_input_ids, query_attention_mask, None)
        weights = {"compress": self.r3mem_config.compress_weight, "expand": self.r3mem_config.expand_weight}
        terms = [term for term, weight in weights.items() if weight] if terms is None else terms
        if not terms or set(terms) - set(weights):
            raise ValueError(f"terms must be some of {list(weights)}, got {terms!r}")
        if len(contexts.ids) != len(queries.ids):
            raise ValueError(f"{len(contexts.ids)} contexts and {len(queries.ids)} queries: one of each a row")
        output = R3MemOutput()
        if "expand" in terms:
            with self._backward():
                output.logits, output.targets = self._continued(queries, contexts)
            output.expand_loss = _mean_loss(output.logits, output.targets)
        if "compress" in terms:
            # A row without a context has nothing that its query could be told from.
            asked = contexts.mask.any(1, keepdim=True)
            logits, targets = self._continued(contexts, queries)
            output.compress_loss = _mean_loss(logits, targets.masked_fill(~asked, _IGNORED))
        if labels is not None:
            output.loss = sum(weights[term] * output[f"{term}_loss"] for term in terms)
        return output

    def _backward(self):
        config = self.r3mem_config
        return reading_backward(
            self.peft_model, config.core, form=config.backward, backward_momentum=config.backward_momentum
        )

    def _continued(self, prompts, continuations):
        """Logits that predict the continuations of prompts, `[B, N + 1, V]`, and their targets `[B, N + 1]`."""
        first, first_mask = self._prompt(prompts)
        second, second_mask, targets = continuations.right_padded(self.end_token_id)
        # The last target is predicted, not read.
        ids = torch.cat([first, second[:, :-1]], 1)
        mask = torch.cat([first_mask, second_mask[:, :-1]], 1)
        self._check_length(ids.shape[1])
        kept = second.shape[1]
        keep = {"logits_to_keep": kept} if self._slices_logits else {}
        output = self.peft_model(
            input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False, **keep
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

    def _check_length(self, tokens):
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(
                f"a query and its context take {tokens} tokens, the model has {self.max_tokens} positions; split the "
                "text into smaller documents"
            )

    @torch.no_grad()
    def recall(self, query_input_ids, query_attention_mask=None, *, max_new_tokens=256) -> list[torch.Tensor]:
        """Read backward from queries to their contexts, greedily: a list of int64 `[n]`, the ends left out.

        query_input_ids, query_attention_mask: int64 `[B, Q]`, padded on either side. A query that nothing was learned
        for gives an empty tensor, if the model was trained to know. max_new_tokens: at most so many a context; fewer
        if the model's positions end before. The model's mode stays as it is.
        Raises ValueError for a query longer than the model's positions, or max_new_tokens below 1.
        """
        ids, mask = self._prompt(_Rows(query_input_ids, query_attention_mask, None))
        self._check_length(ids.shape[1] + 1)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if self.max_tokens is not None:
            max_new_tokens = min(max_new_tokens, self.max_tokens - ids.shape[1])
        # Made before the layers change places: its own layers are made by the configuration's order.
        cache = DynamicCache(config=text_config(self.config))
        with evaluating(self), self._backward():
            output = self.decode(ids, mask, past_key_values=cache, do_sample=False, max_new_tokens=max_new_tokens)
        return [_until(row, self.end_token_id) for row in output[:, ids.shape[1] :]]

    def decode(self, input_ids, attention_mask, *, past_key_values=None, **settings) -> torch.Tensor:
        """`generate` by these settings alone: int64 `[B, T + n]`, ended by the end token, in the current direction.

        A model's own generation_config would fill in what is not set here (a penalty for repetition, say).
        """
        base = self.peft_model.get_base_model()
        ends = {"eos_token_id": self.end_token_id, "pad_token_id": self.end_token_id}
        own, base.generation_config = base.generation_config, GenerationConfig()
        try:
            return base.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                generation_config=GenerationConfig(**ends, **settings),
            )
        finally:
            base.generation_config = own

    @contextlib.contextmanager
    def disable_adapters(self):
        """While this lasts the model is its base model, bit for bit: no adapters, no coupling, no quantisation."""
        stack = stack_of(self.peft_model)
        if stack.bypassed:
            yield
            return
        # PEFT lets the adapters learn again when it enables them, also those that did not before.
        trainable = [(p, p.requires_grad) for p in self.peft_model.parameters()]
        try:
            with self.peft_model.disable_adapter():
                stack.bypassed = True
                yield
        finally:
            stack.bypassed = False
            for parameter, wanted in trainable:
                parameter.requires_grad_(wanted)

    def base_fingerprint(self) -> str:
        """Of the base model's configuration and weights (see `storage.fingerprint`)."""
        if self.fingerprint is None:
            self.fingerprint = storage.fingerprint(self.peft_model)
        return self.fingerprint

    def save_pretrained(self, folder, **details):
        """Save the adapters as a PEFT folder, with `r3mem.json` beside them (see `storage.save`)."""
        storage.save(self, folder, **details)

    @classmethod
    def from_pretrained(cls, folder, base=None, *, dtype=torch.float32) -> "R3MemModel":
        """Load what `save_pretrained` wrote, in eval mode. base: its base model, else loaded by name, in `dtype`.

        Raises OSError if the folder or a file is missing or incomplete, ValueError if a file is corrupted, or the base
        is not the model that the adapters were trained for.
        """
        return storage.load(cls, folder, base, dtype)


def _target_pattern(base, targets, first_layer):
    """A regular expression for PEFT: the modules that are adapted, in the layers from `first_layer` on."""
    layers = find_decoder_layers(base)[1]
    name_of = {module: name for name, module in base.named_modules()}
    linear = {
        name.removeprefix(f"{name_of[layer]}.")
        for layer in layers
        for name, module in ((name_of[m], m) for m in layer.modules())
        if isinstance(module, (nn.Linear, Conv1D))
    }
    if targets != "all-linear":
        wanted = [targets] if isinstance(targets, str) else targets
        linear = {name for name in linear if any(f".{name}".endswith(f".{target}") for target in wanted)}
    if not linear:
        raise ValueError(f"target_modules={targets!r} names no linear module of a {type(layers[0]).__name__}")
    holder = name_of[layers[0]].rpartition(".")[0]
    indices = "|".join(str(index) for index in range(first_layer, len(layers)))
    return rf"{re.escape(holder)}\.({indices})\.({'|'.join(re.escape(name) for name in sorted(linear))})"


class _Rows:
    """Token rows with a mask, padded on either side."""

    def __init__(self, ids, mask, labels):
        if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
            raise ValueError(
                f"token ids must be int64 [batch, tokens], one at least, got {ids.dtype} {list(ids.shape)}"
            )
        for name, other in (("mask", mask), ("labels", labels)):
            if other is not None and other.shape != ids.shape:
                raise ValueError(f"the {name} {list(other.shape)} must have the shape of its ids {list(ids.shape)}")
        self.ids = ids
        self.mask = torch.ones_like(ids) if mask is None else mask.to(torch.int64)
        self.labels = ids if labels is None else labels

    def left_padded(self):
        order = self.mask.argsort(dim=1, stable=True)
        return self.ids.gather(1, order), self.mask.gather(1, order)

    def right_padded(self, end):
        """`ids end`, its mask, and as targets the labels and the end: `[B, N + 1]` each."""
        order = (1 - self.mask).argsort(dim=1, stable=True)
        lengths = self.mask.sum(1, keepdim=True)
        room = torch.zeros_like(lengths)
        mask = torch.cat([self.mask.gather(1, order), room], 1)
        labels = torch.cat([self.labels.gather(1, order), room], 1).masked_fill(mask == 0, _IGNORED)
        ids = torch.cat([self.ids.gather(1, order), room], 1)
        return ids.scatter(1, lengths, end), mask.scatter(1, lengths, 1), labels.scatter(1, lengths, end)


def _positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


def _mean_loss(logits, targets):
    """Mean cross-entropy of the targets that count, 0 if none does."""
    total = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=_IGNORED, reduction="sum")
    return total / (targets != _IGNORED).sum().clamp_min(1)


def _first(*ids):
    """The first id that is given; of a list of them, its first."""
    for given in ids:
        given = given[0] if isinstance(given, (list, tuple)) and given else given
        if isinstance(given, int):
            return given
    return None


def _until(row, end):
    ends = (row == end).nonzero()
    return row[: ends[0]] if len(ends) else row


@contextlib.contextmanager
def evaluating(module):
    """Evaluation mode while this lasts; then every part is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
