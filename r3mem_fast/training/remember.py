"""Fine-tuning context–query pairs into an adapter until every context comes back exactly."""

import dataclasses
import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ..files import replacing
from ..hierarchy import Pair
from ..hierarchy.decoys import decoys
from ..hierarchy.passage import MAX_QUERY_SHARE
from ..integrations.scoped import evaluating, unchanged_on_failure
from ..manifest import REMEMBER_CHECKPOINT
from ..model import R3MemModel
from ..reversible import check_integrity
from .collate import collate_ids
from .machine import steps_at_most, warn_if_busy

# At most so many times as long as a context is it together with its query, by what a query may have of its tokens.
MAX_QUERY_OF_CONTEXT = 1 + MAX_QUERY_SHARE
_CHECKPOINT_VERSION = 4


_AT_LEAST = {"max_steps": 1, "tokens_per_step": 1, "anchor_windows": 1, "anchor_tokens": 2, "decoys_every": 1}


@dataclasses.dataclass(frozen=True)
class RememberSettings:
    """How pairs are learned.

    max_steps: of AdamW, at most (and at most R3MEM_MAX_STEPS, an environment variable). learning_rate: while little is
    learned; it falls with the loss.
    tokens_per_step: of queries and contexts in one batch, padding included.
    compress_every: every so many steps also the forward term of the objective; 0: never.
    divergence: the Kullback-Leibler divergence from the base model, in nats a token, that the forward direction is
        held to, on text that the base model wrote itself: this is what keeps the perplexity of other text. Learning
        goes on until it is no larger. None: without. anchor_weight: its weight in the objective. anchor_windows,
        anchor_tokens: of that text; one window a step.
    decoys: queries that have no context, in every `decoys_every`-th step: without them any query would be answered
        with what was learned. None: one for each six pairs, four at least; the more is learned, the more queries are
        near to one that is known. Those that are answered all the same are asked again, until none is. 0: without.
    margin: tokens predicted with a loss below it (nats) teach no more, so that nothing is learned further than needed.
    checkpoint_seconds: between checkpoints. seed: of the order and the samples.
    """

    max_steps: int = 2000
    learning_rate: float = 1.5e-3
    tokens_per_step: int = 160
    compress_every: int = 8
    divergence: float | None = 0.04
    anchor_weight: float = 20.0
    anchor_windows: int = 24
    anchor_tokens: int = 48
    decoys: int | None = None
    decoys_every: int = 4
    margin: float = 0.03
    checkpoint_seconds: float = 30.0
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in ("divergence", "decoys"):
                continue
            least = _AT_LEAST.get(field.name, 0)
            if not least <= value < float("inf"):
                raise ValueError(f"{field.name} must be at least {least}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class RememberReport:
    """What `remember` did.

    pairs: what was to be remembered. exact: of each, whether its context came back, token for token, by greedy recall.
    expanded: of each, whether its context came back from its memory alone; None where that was not learned (no memory
    tokens, or no `cycle_weight`).
    steps, seconds: of training, with those before an interruption. expand_loss, compress_loss, cycle_loss: nats a
    token, the last measured; None of what never was. lost: queries of earlier contexts that the adapter did not know
    any more when it was asked to remember others.
    """

    pairs: list[Pair]
    exact: list[bool]
    steps: int
    seconds: float
    expand_loss: float | None
    compress_loss: float | None
    lost: tuple[str, ...] = ()
    expanded: list[bool] | None = None
    cycle_loss: float | None = None

    @property
    def exact_match(self) -> float:
        """Share of the pairs whose context came back exactly."""
        return sum(self.exact) / len(self.exact)

    def by_level(self) -> dict[str, tuple[int, int]]:
        """Count by level the contexts that came back exactly, and all of them."""
        counts = {}
        for pair, exact in zip(self.pairs, self.exact, strict=True):
            right, total = counts.get(pair.level, (0, 0))
            counts[pair.level] = (right + exact, total + 1)
        return counts

    def __str__(self):
        levels = ", ".join(f"{level} {right}/{total}" for level, (right, total) in self.by_level().items())
        counted = f"{sum(self.exact)} of {len(self.exact)} contexts exact ({levels})"
        lost = f"; {len(self.lost)} of those remembered before were lost" if self.lost else ""
        expanded = "" if self.expanded is None else f", {sum(self.expanded)} from their memory alone"
        return f"{counted}{expanded}, {self.steps} steps, {self.seconds:.0f} s{lost}"


def remember(
    model: R3MemModel,
    tokenizer,
    pairs: Sequence[Pair],
    settings: RememberSettings | None = None,
    *,
    folder=None,
    progress=True,
) -> RememberReport:
    """Train the adapters of `model` until greedy recall gives every pair's context back, or `max_steps` are done.

    With memory tokens it goes on until each context comes back from its memory, too. A term of the objective that has
    no weight in the model's config is not learned, and nothing waits for it.

    folder: where a checkpoint is kept while it runs. A run of the same pairs and settings that was interrupted
    (Ctrl-C, a killed process) goes on from there, with the same result as if it had not been. progress: show a bar.
    If it is interrupted, or fails, the adapter is as it was before.

    Raises ValueError for no pairs, a pair too long for the model's positions, or a folder that holds the checkpoint
    of another run; IntegrityError if a pass could not be trusted.
    """
    settings = RememberSettings() if settings is None else settings
    if not pairs:
        raise ValueError("there is nothing to remember: no pairs")
    if progress:
        warn_if_busy(model.device)
    try:
        with unchanged_on_failure(model):  # what was learned is in the checkpoint
            run = _Run(model, tokenizer, list(pairs), settings, None if folder is None else Path(folder))
            model.train()
            return run.to_the_end(progress)
    finally:
        model.eval()


class _Run:
    """One run: what it learns, and where it stands. All that is random is drawn from the seed and the step."""

    def __init__(self, model, tokenizer, pairs, settings, folder):
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
        self.queue = []  # batches that are left of this epoch, lists of indices of pairs
        # The terms by which a context comes back; of each, which contexts were predicted to the last token when seen.
        config = model.r3mem_config
        weights = {"expand": config.expand_weight, "cycle": config.cycle_weight if model.layout is not None else 0}
        self.weights = {term: weight for term, weight in weights.items() if weight}
        self.known = {term: [False] * len(pairs) for term in self.weights}
        self.losses = dict.fromkeys(self.weights)
        self.answered = []  # queries of decoys that were, as if they were known
        self.compress_loss = None
        self.divergence = None
        self.bar = tqdm(disable=True)
        self.checkpoint = None if folder is None else folder / REMEMBER_CHECKPOINT
        if self.checkpoint is not None and self.checkpoint.exists():
            self._resume()
        self.wanted = {}  # log-probabilities of the base model, by window
        # Adapters that act on memory tokens alone leave the forward direction as it is.
        free = settings.divergence is None or config.adapter_rows == "memory"
        self.anchor = None if free else self._anchor()

    def to_the_end(self, progress):
        settings = self.settings
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        # Its end is the expected end: all contexts exact. When that comes, or how many steps it takes, nobody knows.
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
                    self._save()
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
        """How far it is: contexts that are exact, and what else has to be so before it ends."""
        if bar.disable:
            return
        bar.n = sum(self._all_known())
        parts = {"step": self.step}
        if self._loss() is not None:
            parts["loss"] = f"{self._loss():.3f}"
        if self.divergence is not None and not self._is_near():
            parts["divergence"] = f"{self.divergence:.3f} (to be {self.settings.divergence})"
        if self.answered:
            parts["foreign queries answered"] = len(self.answered)
        bar.set_postfix(parts)

    def _train_on(self, batch):
        settings, config, model = self.settings, self.model.r3mem_config, self.model
        inputs = self._batch([self.rows[index] for index in batch])
        for term in self.weights:
            self._learn(term, batch, inputs)
        if config.compress_weight and settings.compress_every and self.step % settings.compress_every == 0:
            compress = model(**inputs, terms=["compress"]).compress_loss
            (config.compress_weight * compress).backward()
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
        """A backward term's gradient, and which of the batch's contexts are known by it."""
        logits, targets = self._predictions(term, inputs)
        losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
        counted = (targets != -100).sum()
        # What is known well enough is left alone, and what is left of a context counts the more.
        wanting = losses.detach() > self.settings.margin
        loss = (losses * wanting).sum() / wanting.sum().clamp_min(counted / 2)
        (self.weights[term] * loss).backward()
        for index, right in zip(batch, _right(logits, targets), strict=True):
            self.known[term][index] = right
        now, before = (losses.detach().sum() / counted).item(), self.losses[term]
        self.losses[term] = now if before is None else 0.7 * before + 0.3 * now

    def _refuse(self, foreign):
        """The gradient of decoys, new ones and those that were answered when last asked: until they no longer are."""
        queries = list(dict.fromkeys([*self.answered, *(pair.query for pair in foreign)]))
        queries, later = queries[: 2 * self.decoys], queries[2 * self.decoys : len(self.answered)]
        logits, targets = self._predictions("expand", self._batch([([], self._ids(query)) for query in queries]))
        losses = cross_entropy(logits[:, 0].float(), targets[:, 0], reduction="none")
        # The few that are not known yet count, not the many that are.
        wanting = losses.detach() > self.settings.margin
        ((losses * wanting).sum() / wanting.sum().clamp_min(len(queries) / 4)).backward()
        refused = _right(logits, targets)
        self.answered = [query for query, right in zip(queries, refused, strict=True) if not right] + later

    def _predictions(self, term, inputs):
        """Logits of the contexts, read backward from their queries or their memories, and their targets."""
        output = self.model(**inputs, terms=[term])
        return (output.cycle_logits if term == "cycle" else output.logits), output.targets

    def _stay_near(self, index):
        """The gradient of the divergence from the base model, forward."""
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
        return self.anchor is None or (self.divergence is not None and self.divergence <= self.settings.divergence)

    def _loss(self):
        """The larger of the terms' losses, None before the first step."""
        return max((loss for loss in self.losses.values() if loss is not None), default=None)

    def _pace(self):
        """The learning rate's factor: 1 while little is learned, down to 0.1."""
        loss = self._loss()
        return 1.0 if loss is None else min(1.0, max(0.1, loss / 0.3))

    def _all_known(self):
        """Whether each context is known by every term."""
        return [all(known) for known in zip(*self.known.values(), strict=True)] or [False] * len(self.pairs)

    def _begin_epoch(self):
        """Batches of like lengths: all pairs that are not known, and half of the others, lest they be forgotten."""
        generator = random.Random(f"{self.settings.seed}/epoch {self.epoch}")
        chosen = [i for i, known in enumerate(self._all_known()) if generator.random() < 0.5 or not known]
        lengths = [_length(row) for row in self.rows]
        chosen.sort(key=lambda i: lengths[i] * generator.uniform(0.9, 1.1))
        chosen = chosen or list(range(len(self.pairs)))
        self.queue = _packed(chosen, lengths, self.settings.tokens_per_step)
        generator.shuffle(self.queue)
        self.epoch += 1

    def _verified(self):
        """Whether greedy recall gives every context, by every term, and new decoys are refused; else learn on."""
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
        """Whether each token of a row's context is predicted from those before it, by row; cheaper than recall."""
        right = [False] * len(rows)
        self.model.eval()
        for batch in _by_length([_length(row) for row in rows], 4 * self.settings.tokens_per_step):
            with torch.no_grad():
                predictions = self._predictions(term, self._batch([rows[index] for index in batch]))
            for index, known in zip(batch, _right(*predictions), strict=True):
                right[index] = known
        self.model.train()
        return right

    def _recall_all(self):
        self.known = {term: self._recalled(term) for term in self.weights}

    def _recalled(self, term):
        """Whether greedy recall gives a pair's context, from its query or from its memory, by pair."""
        exact = [False] * len(self.pairs)
        batches = _by_length([len(context) for context, _ in self.rows], 32 * 64)
        for number, batch in enumerate(batches, 1):
            self.bar.set_description_str(f"Recalling all, {number} of {len(batches)}")
            inputs = self._batch([self.rows[index] for index in batch])
            # One more than the longest: that it ends there is part of it.
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
        """Text that the base model writes, from its start token: int64 `[windows, tokens]`."""
        settings, model = self.settings, self.model
        starts = torch.full((settings.anchor_windows, 1), model.start_token_id, device=model.device)
        tokens = settings.anchor_tokens - 1
        with torch.random.fork_rng(), torch.no_grad(), evaluating(model), model.disable_adapters():
            torch.manual_seed(settings.seed)
            return model.decode(
                starts, torch.ones_like(starts), do_sample=True, top_k=0, min_new_tokens=tokens, max_new_tokens=tokens
            )

    def _batch(self, rows):
        return {name: tensor.to(self.model.device) for name, tensor in collate_ids(rows).items()}

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _refuse_what_cannot_come_back(self):
        limit = self.model.max_tokens
        for index, pair in enumerate(self.pairs):
            if self.model.end_token_id in self.rows[index][0]:
                raise ValueError(
                    f"document {pair.document!r}: a context ({pair.level}) has the model's end token in it, with "
                    "which every recall ends; take it out of the text"
                )
            before = 0 if self.model.layout is None else self.model.layout.first_position
            if limit is not None and _length(self.rows[index]) + before > limit:
                raise ValueError(
                    f"document {pair.document!r}: a context of {len(self.rows[index][0])} tokens ({pair.level}) "
                    f"with its query does not fit the model's {limit} positions; split it into smaller documents"
                )

    def _save(self):
        """The whole state of the run, in one file: adapters, moments of the optimizer, and where it stands."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                if moment in self.optimizer.state[parameter]:
                    tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        state = {
            "version": _CHECKPOINT_VERSION,
            "run": self._identity(),
            **{name: getattr(self, name) for name in _STATE},
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.checkpoint) as path:
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                path,
                {"r3mem": json.dumps(state)},
            )

    def _resume(self):
        try:
            with safe_open(self.checkpoint, "pt") as file:
                state = json.loads((file.metadata() or {})["r3mem"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            version, run = state["version"], state["run"]
        except (SafetensorError, ValueError, KeyError, TypeError):
            raise ValueError(f"{self.checkpoint} is damaged; delete it to start again") from None
        if version != _CHECKPOINT_VERSION or run != self._identity():
            raise ValueError(
                f"{self.checkpoint} belongs to an unfinished run with other documents, settings or another model. "
                "Finish that run, delete the file, or choose another folder"
            )
        for name in _STATE:
            setattr(self, name, state[name])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                # What no term has reached has none; and what is reached now and then has made fewer steps.
                if f"step.{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        "step": tensors[f"step.{name}"],
                        **{m: tensors[f"{m}.{name}"].to(parameter.device) for m in ("exp_avg", "exp_avg_sq")},
                    }

    def _identity(self):
        """What a checkpoint must agree in with the run that goes on from it."""
        settings = dataclasses.asdict(self.settings)
        for free in ("max_steps", "checkpoint_seconds"):
            del settings[free]
        shapes = {name: list(p.shape) for name, p in self.parameters.items()}
        model = [
            self.model.r3mem_config.to_dict(),
            self.model.base_fingerprint(),
            str(self.model.peft_model.dtype),
            shapes,
        ]
        described = json.dumps([self.rows, settings, model], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()


# Of a run, beside tensors.
_STATE = ("step", "epoch", "seconds", "queue", "known", "losses", "answered", "compress_loss", "divergence")


def _right(logits, targets):
    """Whether every token of a row that counts is predicted, by row."""
    return ((logits.argmax(-1) == targets) | (targets == -100)).all(1).tolist()


def _length(row):
    """Tokens of a row of a batch, with those that separate and end."""
    context, query = row
    return len(context) + len(query) + 3


def _by_length(lengths, tokens):
    """All indices in batches of at most so many tokens, padding included, those of like length together."""
    return _packed(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, tokens)


def _packed(indices, lengths, tokens):
    """Neighbours in batches of at most so many tokens, padding included; a longer one is a batch of its own."""
    batches, longest = [], 0
    for index in indices:
        longest = max(longest, lengths[index])
        if batches and longest * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches
