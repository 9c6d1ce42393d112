"""Fine-tunes context–query pairs into an adapter until every context comes back exactly."""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ...decoding import sampled
from ...hierarchy import Pair
from ...hierarchy.decoys import decoys
from ...hierarchy.passage import MAX_QUERY_SHARE
from ...integrations.scoped import evaluating, unchanged_on_failure
from ...manifest import REMEMBER_CHECKPOINT
from ...model import R3MemModel
from ...objective import term_weights
from ...reversible import check_integrity
from ..collate import collate_ids
from ..machine import steps_at_most, warn_if_busy
from ..settings import RememberSettings
from . import checkpoint
from .batches import all_predicted, by_length, length, packed
from .report import RememberReport

# A context and its query together are at most this many times as long as the context alone.
MAX_QUERY_OF_CONTEXT = 1 + MAX_QUERY_SHARE


def remember(
    model: R3MemModel,
    tokenizer: Any,
    pairs: Sequence[Pair],
    settings: RememberSettings | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = True,
) -> RememberReport:
    """Train the adapters of a model until greedy recall gives every pair's context back, or `max_steps` are done.

    With memory tokens it goes on until each context comes back from its memory, too. A term of the objective without
    a weight in the model's config is not learned, and nothing waits for it. If training is interrupted, or fails, the
    adapter is as it was before.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        pairs: Pairs to be remembered.
        settings: How they are learned; None: the defaults.
        folder: Folder in which a checkpoint is kept meanwhile; None: there is none. A run of the same pairs and
            settings that was interrupted (Ctrl-C, a killed process) goes on from it, with the same result as if it had
            not been interrupted.
        progress: Show a bar.

    Returns:
        A report.

    Raises:
        ValueError: There are no pairs, a pair is too long for the model's positions, or the folder holds the
            checkpoint of another run.
        IntegrityError: A pass could not be trusted.
    """
    settings = RememberSettings() if settings is None else settings
    if not pairs:
        raise ValueError("there is nothing to remember: no pairs")
    if progress:
        warn_if_busy(model.device)
    try:
        with unchanged_on_failure(model):  # what was learned is in the checkpoint
            run = Run(model, tokenizer, list(pairs), settings, None if folder is None else Path(folder))
            model.train()
            return run.to_the_end(progress)
    finally:
        model.eval()


class Run:
    """One run: what it learns, and its progress. Everything random depends on the seed and the step alone.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        pairs: Pairs to be remembered.
        settings: How they are learned.
        folder: Folder for a checkpoint; None: there is none. The run takes over the state of one that is there.

    Attributes:
        rows: Token ids of each pair.
        decoys: Number of new decoys in a step that has some; 0: decoys are not learned.
        parameters: Parameters that are trained, by name.
        step: Number of steps done.
        epoch: Number of epochs begun.
        seconds: Seconds of training.
        queue: Batches that are left of this epoch, lists of indices of pairs.
        weights: Weights of the terms by which a context comes back: "expand" from its query, "cycle" from its memory.
        known: For each term, which contexts were predicted to the last token when they were last seen.
        losses: Running loss of each term, in nats a token; None before it was measured.
        answered: Queries of decoys that were answered when they were last asked.
        compress_loss: Last loss of queries given their contexts, in nats a token.
        divergence: Running divergence from the base model, in nats a token.
        checkpoint: File of the checkpoint; None: there is none.

    Raises:
        ValueError: A pair cannot come back, nothing can be trained, or the checkpoint is of another run.
    """

    def __init__(
        self,
        model: R3MemModel,
        tokenizer: Any,
        pairs: list[Pair],
        settings: RememberSettings,
        folder: Path | None,
    ):
        self.model, self.tokenizer, self.pairs, self.settings = model, tokenizer, pairs, settings
        self.rows = [(self._ids(pair.context), self._ids(pair.query)) for pair in pairs]
        self.decoys = max(4, len(pairs) // 6) if settings.decoys is None else settings.decoys
        self._refuse_what_cannot_come_back()
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("no parameter of the model requires a gradient, so it can learn nothing")
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.95)
        )
        self.optimizer.zero_grad(set_to_none=True)  # what an earlier run may have left
        self.step, self.epoch, self.seconds = 0, 0, 0.0
        self.queue: list[list[int]] = []
        config = model.r3mem_config
        weights = {"expand": config.expand_weight, "cycle": config.cycle_weight if model.learns_memories else 0}
        self.weights = {term: weight for term, weight in weights.items() if weight}
        self.known = {term: [False] * len(pairs) for term in self.weights}
        self.losses: dict[str, float | None] = dict.fromkeys(self.weights)
        self.answered: list[str] = []
        self.compress_loss: float | None = None
        self.divergence: float | None = None
        self.bar: Any = tqdm(disable=True)
        self.checkpoint = None if folder is None else folder / REMEMBER_CHECKPOINT
        if self.checkpoint is not None and self.checkpoint.exists():
            checkpoint.read(self)
        self.wanted: dict[int, torch.Tensor] = {}  # log-probabilities of the base model, by window
        # Adapters that act on memory tokens alone leave the forward direction as it is.
        free = settings.divergence is None or config.adapter_rows == "memory"
        self.anchor: Any = None if free else self._anchor()

    def to_the_end(self, progress: bool) -> RememberReport:
        """Train until all contexts come back exactly, or `max_steps` are done.

        Args:
            progress: Show a bar.

        Returns:
            A report.

        Raises:
            IntegrityError: A pass could not be trusted.
        """
        settings = self.settings
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        # The bar counts exact contexts, because nobody knows how many steps it takes until all are exact.
        layout = "{desc}: {n_fmt} of {total_fmt} exact |{bar}| {elapsed}{postfix}"
        bar = self.bar = tqdm(total=len(self.pairs), desc="Remembering", bar_format=layout, disable=not progress)
        self._show(bar)
        max_steps = steps_at_most(settings.max_steps)
        try:
            while self.step < max_steps:
                if not self.queue:
                    known = self.weights and all(self._all_known()) and self._is_near() and not self.answered
                    if known and self._verified():
                        break
                    self._begin_epoch()
                with torch.random.fork_rng():  # for dropout: the same after an interruption
                    torch.manual_seed(settings.seed * 1_000_003 + self.step)
                    self._train_on(self.queue.pop(0))
                self._show(bar)
                self.seconds = time.monotonic() - started
                if self.checkpoint is not None and time.monotonic() - saved > settings.checkpoint_seconds:
                    checkpoint.write(self)
                    saved = time.monotonic()
            else:
                self._recall_all()
            self._show(bar)
        finally:  # also Ctrl-C, which may come within a step: only the last checkpoint is whole
            bar.close()
        self.seconds = time.monotonic() - started
        return RememberReport(
            self.pairs,
            self.known["expand"] if "expand" in self.known else self._recalled("expand"),
            self.step,
            self.seconds,
            self.losses.get("expand"),
            self.compress_loss,
            expanded=self.known.get("cycle"),
            cycle_loss=self.losses.get("cycle"),
        )

    def _show(self, bar):
        """Show the number of exact contexts, and what else must come true before training ends."""
        if bar.disable:
            return
        bar.n = sum(self._all_known())
        parts: dict[str, Any] = {"step": self.step}
        if self._loss() is not None:
            parts["loss"] = f"{self._loss():.3f}"
        if self.divergence is not None and not self._is_near():
            parts["divergence"] = f"{self.divergence:.3f} (to be {self.settings.divergence})"
        if self.answered:
            parts["foreign queries answered"] = len(self.answered)
        bar.set_postfix(parts)

    def _train_on(self, batch):
        settings, model = self.settings, self.model
        inputs = self._batch([self.rows[index] for index in batch])
        for term in self.weights:
            self._learn(term, batch, inputs)
        weight = term_weights(model).get("compress", 0.0)
        if weight and settings.compress_every and self.step % settings.compress_every == 0:
            compress = model(**inputs, terms=["compress"]).compress_loss
            (weight * compress).backward()
            self.compress_loss = compress.item()
        if self.decoys and "expand" in self.weights and self.step % settings.decoys_every == 0:
            self._refuse(decoys(self.pairs, self.decoys, random.Random(f"{settings.seed}/{self.step}")))
        if self.anchor is not None:
            self._stay_near(self.step % len(self.anchor))

        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * self._pace()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        check_integrity(model.peft_model)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _learn(self, term, batch, inputs):
        """Add the gradient of a backward term, and note which contexts of the batch are known by it."""
        logits, targets = self._predictions(term, inputs)
        losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
        counted = (targets != -100).sum()
        # Tokens that are known well enough teach nothing, and the others count the more.
        wanting = losses.detach() > self.settings.margin
        loss = (losses * wanting).sum() / wanting.sum().clamp_min(counted / 2)
        (self.weights[term] * loss).backward()
        for index, right in zip(batch, all_predicted(logits, targets), strict=True):
            self.known[term][index] = right
        now, before = (losses.detach().sum() / counted).item(), self.losses[term]
        self.losses[term] = now if before is None else 0.7 * before + 0.3 * now

    def _refuse(self, foreign):
        """Add the gradient of decoys: new ones, and those that were answered when they were last asked."""
        queries = list(dict.fromkeys([*self.answered, *(pair.query for pair in foreign)]))
        queries, later = queries[: 2 * self.decoys], queries[2 * self.decoys : len(self.answered)]
        logits, targets = self._predictions("expand", self._batch([([], self._ids(query)) for query in queries]))
        losses = cross_entropy(logits[:, 0].float(), targets[:, 0], reduction="none")
        # The mean is over the few decoys that are not learned yet, not over the many that are.
        wanting = losses.detach() > self.settings.margin
        ((losses * wanting).sum() / wanting.sum().clamp_min(len(queries) / 4)).backward()
        refused = all_predicted(logits, targets)
        self.answered = [query for query, right in zip(queries, refused, strict=True) if not right] + later

    def _predictions(self, term, inputs):
        """Logits of the contexts, read backward from their queries or from their memories, and their targets."""
        output = self.model(**inputs, terms=[term])
        return (output.cycle_logits if term == "cycle" else output.logits), output.targets

    def _stay_near(self, index):
        """Add the gradient of the divergence from the base model in the forward direction."""
        window = self.anchor[index][None]
        if index not in self.wanted:
            with torch.no_grad(), evaluating(self.model), self.model.disable_adapters():
                self.wanted[index] = self.model(window).logits.log_softmax(-1)
        wanted = self.wanted[index].float()
        found = self.model(window).logits.float().log_softmax(-1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
        (self.settings.anchor_weight * divergence).backward()
        now = divergence.item()
        self.divergence = now if self.divergence is None else 0.8 * self.divergence + 0.2 * now

    def _is_near(self):
        """Whether the forward direction is as near to the base model as it has to be."""
        limit = self.settings.divergence
        return self.anchor is None or limit is None or (self.divergence is not None and self.divergence <= limit)

    def _loss(self):
        """The larger of the terms' losses; None before the first step."""
        return max((loss for loss in self.losses.values() if loss is not None), default=None)

    def _pace(self):
        """Factor of the learning rate: 1 while little is learned, then falling to 0.1."""
        loss = self._loss()
        return 1.0 if loss is None else min(1.0, max(0.1, loss / 0.3))

    def _all_known(self):
        """For each context, whether it is known by every term."""
        return [all(known) for known in zip(*self.known.values(), strict=True)] or [False] * len(self.pairs)

    def _begin_epoch(self):
        """Fill the queue with pairs that are not known, and with half of the others, lest they be forgotten."""
        generator = random.Random(f"{self.settings.seed}/epoch {self.epoch}")
        chosen = [i for i, known in enumerate(self._all_known()) if generator.random() < 0.5 or not known]
        lengths = [length(row) for row in self.rows]
        chosen.sort(key=lambda i: lengths[i] * generator.uniform(0.9, 1.1))
        chosen = chosen or list(range(len(self.pairs)))
        self.queue = packed(chosen, lengths, self.settings.tokens_per_step)
        generator.shuffle(self.queue)
        self.epoch += 1

    def _verified(self):
        """Whether greedy recall gives every context back by every term, and new decoys are refused."""
        self.known = {term: self._predicted(term, self.rows) for term in self.weights}
        if self.decoys and "expand" in self.weights:
            new = decoys(self.pairs, len(self.pairs), random.Random(f"{self.settings.seed}/verify {self.step}"))
            refused = self._predicted("expand", [([], self._ids(pair.query)) for pair in new])
            self.answered = [pair.query for pair, right in zip(new, refused, strict=True) if not right]
        if all(self._all_known()) and not self.answered:
            self._recall_all()
            return all(self._all_known())
        return False

    def _predicted(self, term, rows):
        """For each row, whether every token of its context is predicted from those before it; cheaper than recall."""
        right = [False] * len(rows)
        self.model.eval()
        for batch in by_length([length(row) for row in rows], 4 * self.settings.tokens_per_step):
            with torch.no_grad():
                predictions = self._predictions(term, self._batch([rows[index] for index in batch]))
            for index, known in zip(batch, all_predicted(*predictions), strict=True):
                right[index] = known
        self.model.train()
        return right

    def _recall_all(self):
        """Find out by greedy recall which contexts are known by each term."""
        self.known = {term: self._recalled(term) for term in self.weights}

    def _recalled(self, term):
        """For each pair, whether greedy recall gives its context back, from its query or from its memory."""
        exact = [False] * len(self.pairs)
        batches = by_length([len(context) for context, _ in self.rows], 32 * 64)
        for number, batch in enumerate(batches, 1):
            self.bar.set_description_str(f"Recalling all, {number} of {len(batches)}")
            inputs = self._batch([self.rows[index] for index in batch])
            # One token more than the longest: a context must end where it ends.
            longest = inputs["input_ids"].shape[1] + 1
            if term == "cycle":
                memory = self.model.compress(inputs["input_ids"], inputs["attention_mask"], finish=True)
                found = self.model.expand(memory, max_new_tokens=longest)
            else:
                asked = inputs["query_input_ids"], inputs["query_attention_mask"]
                found = self.model.recall(*asked, max_new_tokens=longest)
            for index, ids in zip(batch, found, strict=True):
                exact[index] = ids.tolist() == self.rows[index][0]
        self.bar.set_description_str("Remembering")
        return exact

    def _anchor(self):
        """Windows of text that the base model writes from its start token: int64 `[windows, tokens]`."""
        settings, model = self.settings, self.model
        starts = torch.full((settings.anchor_windows, 1), model.start_token_id, device=model.device)
        tokens = settings.anchor_tokens - 1
        with evaluating(model), model.disable_adapters():
            return sampled(model, starts, tokens, settings.seed)

    def _batch(self, rows):
        return {name: tensor.to(self.model.device) for name, tensor in collate_ids(rows).items()}

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _refuse_what_cannot_come_back(self):
        """Raise ValueError for a pair that is too long, or a context with the end token in it."""
        limit = self.model.max_tokens
        for index, pair in enumerate(self.pairs):
            if self.model.end_token_id in self.rows[index][0]:
                raise ValueError(
                    f"document {pair.document!r}: a context ({pair.level}) has the model's end token in it, with "
                    "which every recall ends; take it out of the text"
                )
            before = self.model.reader.layout.first_position if self.model.learns_memories else 0
            if limit is not None and length(self.rows[index]) + before > limit:
                raise ValueError(
                    f"document {pair.document!r}: a context of {len(self.rows[index][0])} tokens ({pair.level}) "
                    f"with its query does not fit the model's {limit} positions; split it into smaller documents"
                )
