"""The training objective: the loss of texts that are read through memories, and terms for context–query pairs."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers.utils import ModelOutput

from .batching import Rows, columns_at, nothing_before, padding_behind, prompt_of
from .integrations.compat import cache_argument
from .integrations.fsdp import units_of
from .memory.layout import MemoryLayout
from .memory.memory import Memory
from .memory.reader import positions_of_mask
from .memory.segments import IGNORED
from .network import Network
from .reading import compress_rows, placed, read_segments, segments_of, trains_through
from .teacher import Teacher

TERMS = ("compress", "expand", "cycle")


@dataclasses.dataclass
class R3MemOutput(ModelOutput):
    """Output of `R3MemModel.forward`.

    Attributes:
        loss: Loss, a float scalar; None without labels.
        logits: Logits, see `R3MemModel.forward`; None in training through several segments.
        compress_loss: Term `compress` of the objective, without its weight; None if it was not computed.
        expand_loss: Term `expand` of the objective, without its weight; None if it was not computed.
        targets: Tokens that `logits` predict, if there are queries; see `R3MemModel.forward`.
        cycle_loss: Term `cycle` of the objective, without its weight; None if it was not computed.
        cycle_logits: Logits like `logits`, but read from the memory of the context in place of the query.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    compress_loss: torch.Tensor | None = None
    expand_loss: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    cycle_loss: torch.Tensor | None = None
    cycle_logits: torch.Tensor | None = None


def read_in_one_pass(
    network: Network,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    inputs: dict[str, Any],
) -> R3MemOutput:
    """Output of the base model with its adapters for rows without a memory before them.

    Args:
        network: The model.
        ids: Token ids, int64 `[B, T]`.
        mask: Mask, `[B, T]`, 0 for padding; None: there is none.
        labels: Labels, int64 `[B, T]`; None: no loss is asked for.
        inputs: More arguments of the base model.
    """
    with network.without_memory():
        output = network.peft_model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, **inputs)
    loss = output.loss if labels is None else with_idle_parameters(network, output.loss)
    return R3MemOutput(loss=loss, logits=output.logits)


def history_loss(
    network: Network, memory: Memory, rows: Rows, num_items: float | torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss of predicting rows that are read segment by segment behind a memory.

    Args:
        network: The model.
        memory: The memory before the rows, of as many rows.
        rows: Tokens and labels.
        num_items: Number that the sum over tokens is divided by; None: the number of labels that count.

    Returns:
        The loss, a float scalar, and logits `[B, T, V]`. In training through several segments the loss includes the
        divergence from the base model, if that has a weight, and the logits are None. They are also None where a fused
        loss makes none.

    Raises:
        ValueError: No row has a token, or a segment does not fit into the model's positions.
    """
    memory = _of_drawn_size(network, memory)
    segments = _some_segments(network, memory, rows, in_one=False)
    if num_items is None:
        num_items = max(1, sum(int((segment.targets != IGNORED).sum()) for segment in segments))
    training = trains_through(network, segments)
    refuse_to_learn(network)
    teacher = Teacher(network, memory, rows) if training and network.r3mem_config.distillation_weight else None
    foreign = segments[-1] if teacher is not None and _reads_foreign(network, len(memory)) else None

    # Anchors learn nothing from a first segment. Processes of FSDP2 must run alike, whatever counts.
    may_skip = training and network.is_anchored and not units_of(network)

    def outcome(segment, hidden):
        if may_skip and bool((segment.targets == IGNORED).all()):
            return {"loss": hidden.new_zeros((), dtype=torch.float32)}
        targets = segment.targets.to(network.device)
        wanted = {"labels": targets, "shift_labels": targets, "num_items_in_batch": num_items}
        output = network.head(hidden, **(wanted if teacher is None or teacher.weight < 1 else {}))
        if teacher is None:
            loss = output.loss
        else:
            loss = teacher.blended(output, segment, targets, num_items, alone=segment is foreign)
        return {"loss": loss} if training else {"loss": loss, "logits": output.logits}

    outcomes, _ = read_segments(network, segments, memory, outcome, foreign=foreign)
    loss = sum(found["loss"] for found in outcomes)
    if training or outcomes[0]["logits"] is None:
        return loss, None
    return loss, placed(rows, segments, [found["logits"] for found in outcomes])


def history_logits(network: Network, memory: Memory, rows: Rows) -> torch.Tensor:
    """Logits of rows that are read behind a memory in one pass, as `generate` does.

    Args:
        network: The model.
        memory: The memory before the rows, of as many rows.
        rows: Tokens.

    Returns:
        Logits `[B, T, V]`.

    Raises:
        ValueError: No row has a token, or they do not fit into the model's positions.
    """
    refuse_to_learn(network)
    segments = _some_segments(network, memory, rows, in_one=True)
    outcomes, _ = read_segments(network, segments, memory, lambda segment, hidden: network.head(hidden).logits)
    return placed(rows, segments, outcomes)


def with_idle_parameters(network: Network, value: torch.Tensor) -> torch.Tensor:
    """Give a value zero gradients for parameters that only memories use, because DDP waits for these.

    Args:
        network: The model.
        value: A value that was computed without a memory, of any shape.

    Returns:
        The same value.
    """
    if network.memory_embeddings is None:
        return value
    idle = [network.memory_embeddings]
    if not network.adapts_tokens and dist.is_initialized():
        idle = [parameter for parameter in network.parameters() if parameter.requires_grad]
    total = sum((parameter.sum() for parameter in idle[1:]), start=idle[0].sum())
    return value + 0 * total.to(value.dtype)


def refuse_to_learn(network: Network) -> None:
    """Raise ValueError where matched memories would be read, without a gradient, by a network in training."""
    if network.memory_embeddings is None and network.training and torch.is_grad_enabled():
        raise ValueError(
            "matched memories are written and read with no gradient, so that nothing would learn from this pass: call "
            'eval() first, or let memory tokens learn (memory_writer="tokens")'
        )


def refuse_raw_tail(layout: MemoryLayout) -> None:
    """Raise ValueError for memories that leave the end of a text raw, where a memory alone is read."""
    if layout.writer == "matched" and layout.segment_overlap:
        raise ValueError(
            f"matched memories with a segment_overlap leave out the last {layout.segment_overlap} tokens of a text, "
            "which cannot be given back then; use segment_overlap=0"
        )


def _of_drawn_size(network, memory):
    """A memory of nothing of a size that is drawn, if the network is being trained for several."""
    if not (network.drawn_sizes and network.training and torch.is_grad_enabled()):
        return memory
    size = network.drawn_sizes[int(torch.randint(len(network.drawn_sizes), ()))]
    return dataclasses.replace(memory, layout=memory.layout.with_memory_tokens(size))


def _reads_foreign(network, rows):
    """Draw whether so many rows read each other's memories in this pass."""
    share = network.foreign_share
    if share and units_of(network):
        raise ValueError("foreign_memories is not for a model sharded by FSDP2, whose processes must run alike")
    return rows > 1 and share > 0 and bool(torch.rand(()) < share)


def _some_segments(network, memory, rows, in_one):
    segments = segments_of(network, memory, rows, in_one=in_one)
    if not segments:
        raise ValueError("no row has a token: all are padding, and the memory carries none")
    return segments


def pair_terms(network: Network, contexts: Rows, queries: Rows, terms: Sequence[str] | None) -> R3MemOutput:
    """Compute terms of the objective for context–query pairs (R3Mem, section 3.3).

    Args:
        network: The model.
        contexts: Contexts. A row that is wholly masked says that its query has no context.
        queries: Queries, as many.
        terms: Some of `TERMS`; None: those with a weight in the config.

    Returns:
        The terms' losses, without their sum, and their logits; see `R3MemModel.forward`.

    Raises:
        ValueError: The terms are unknown, or the shapes do not agree.
    """
    weights = term_weights(network)
    terms = [term for term, weight in weights.items() if weight] if terms is None else terms
    if not terms or set(terms) - set(weights):
        raise ValueError(f"terms must be some of {list(weights)}, got {terms!r}")
    if len(contexts.ids) != len(queries.ids):
        raise ValueError(f"{len(contexts.ids)} contexts and {len(queries.ids)} queries: one of each a row")
    found, memory = R3MemOutput(), None
    if network.learns_memories and set(terms) & {"compress", "cycle"}:
        refuse_raw_tail(network.reader.layout)
        empty = network.new_memory(len(contexts.ids), origin=None)
        memory = compress_rows(network, contexts.lists(), empty, finish=True)
    if "expand" in terms:
        with network.reading_backward():
            found.logits, found.targets = continuation_logits(network, queries, contexts)
        found.expand_loss = _mean_loss(found.logits, found.targets)
    # A row without a context has no memory, and its query cannot be predicted from anything.
    asked = contexts.mask.any(1, keepdim=True)
    if "compress" in terms:
        given = contexts if memory is None else nothing_before(contexts)
        with contextlib.nullcontext() if memory is None else network.behind_memory():
            logits, targets = continuation_logits(network, given, queries, memory, forward=True)
        found.compress_loss = _mean_loss(logits, targets.masked_fill(~asked, IGNORED))
    if "cycle" in terms:
        with network.reading_backward():
            logits, targets = continuation_logits(network, nothing_before(contexts), contexts, memory)
        found.cycle_logits = logits
        found.cycle_loss = _mean_loss(logits, targets.masked_fill(~asked, IGNORED))
        found.targets = targets if found.targets is None else found.targets
    return found


def pair_loss(
    network: Network, found: R3MemOutput, labels: torch.Tensor, num_items: float | torch.Tensor | None
) -> torch.Tensor:
    """Sum of the terms that `pair_terms` computed, with their weights from the config.

    Args:
        network: The model.
        found: The output of `pair_terms`.
        labels: Labels of the contexts, int64 `[B, T]`, -100 where they do not count.
        num_items: Number of labels of all batches of a step, of which this one has a share; None: it is alone.
    """
    losses = {term: found[f"{term}_loss"] for term in TERMS if f"{term}_loss" in found}
    loss = sum(weight * losses[term] for term, weight in term_weights(network).items() if term in losses)
    # Counted as trainers count the labels of a causal model: without the first of a row.
    return loss if num_items is None else loss * ((labels[:, 1:] != IGNORED).sum() / num_items)


def term_weights(network: Network) -> dict[str, float]:
    """Weights of the terms that a model can learn; `cycle` needs memory tokens."""
    config = network.r3mem_config
    terms = TERMS if network.learns_memories else TERMS[:2]
    if network.learns_memories and network.memories_are_of_base:
        terms = TERMS[1:]  # forward nothing learns
    return {term: getattr(config, f"{term}_weight") for term in terms}


def continuation_logits(
    network: Network, prompts: Rows, continuations: Rows, memory: Memory | None = None, *, forward: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict the continuations of prompts, in the direction that the model is being read in.

    Args:
        network: The model.
        prompts: Prompts, which are given.
        continuations: Continuations, one for each prompt.
        memory: The memory before the prompts, of as many rows; None: there is none.
        forward: Whether this is the forward direction, in which adapters may act on memory tokens alone.

    Returns:
        Logits `[B, N + 1, V]` of the continuations and of the end token after them, and their targets, int64
        `[B, N + 1]`, -100 where they do not count.

    Raises:
        ValueError: Prompts and continuations do not fit into the model's positions.
    """
    first, first_mask = prompt_of(prompts, network.start_token_id)
    second, second_mask, targets = continuations.right_padded(network.end_token_id)
    # The last target is predicted, not read.
    ids = torch.cat([first, second[:, :-1]], 1)
    mask = torch.cat([first_mask, second_mask[:, :-1]], 1)
    network.check_length(ids.shape[1], behind_memory=memory is not None)
    kept = second.shape[1]
    extra, cache = {"logits_to_keep": kept} if network.slices_logits else {}, None
    if memory is not None:
        cache = network.reading_cache(memory, keep=False, forward=forward)
        if memory.carried is not None:
            return _logits_behind_states(network, ids, mask, cache, kept), targets
        extra |= cache_argument(network.plain_model, cache)
    with network.must_read(cache):
        output = network.peft_model(
            input_ids=ids, attention_mask=mask, position_ids=positions_of_mask(mask), use_cache=False, **extra
        )
    return output.logits[:, -kept:], targets


def _logits_behind_states(network, ids, mask, cache, kept):
    """Logits of the last columns of rows, all of whose padding is put behind them: recurrent layers would read it."""
    ids, moved, places = padding_behind(ids, mask)
    hidden = network.reader.decode(network.reader.embeddings_of(ids), moved.cpu(), cache, ids=ids)
    return network.head(columns_at(hidden, places[:, -kept:])).logits


def _mean_loss(logits, targets):
    """Mean cross-entropy of the targets that count, 0 if none does."""
    total = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp_min(1)
