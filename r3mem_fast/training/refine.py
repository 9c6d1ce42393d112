"""Refines memories: tunes the values of their slots until the model goes on behind them as behind their text.

Keys stay as they are, and so does the model. The loss is the divergence, in nats a token, of the base model's
predictions behind a memory from those behind the text itself (context distillation; compare Cartridges, arXiv
2506.06266, which tunes keys, too).
"""

import dataclasses
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import kl_div
from tqdm import tqdm

from ..batching import unfinished_of
from ..decoding import sampled
from ..files import replacing
from ..integrations.scoped import evaluating
from ..memory.memory import Memory
from ..model import R3MemModel
from .machine import steps_at_most
from .settings import RefineSettings

# Gives what is read behind a memory, and behind its text, for a piece of that: token ids, int64 `[n]` each, of `[T]`.
AskedOf = Callable[[torch.Tensor], Sequence[torch.Tensor]]
# Continuations that are sampled of a text, at one time.
_CONTINUATIONS = 4
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class RefineReport:
    """Report of what `refine` did.

    Attributes:
        memory: The memory with the new values.
        steps: Steps that each row took, including those before an interruption.
        seconds: Seconds that this process took.
        losses: Divergence in each step, in nats a token, a list for each row.
        continued: Whether each of these steps read on behind the text, in place of what asks for a piece of it.
    """

    memory: Memory
    steps: int
    seconds: float
    losses: list[list[float]]
    continued: list[list[bool]]

    def __str__(self) -> str:
        said = [
            f"{name} {found}"
            for name, kind in (("what asks for them", False), ("what follows them", True))
            if (found := self._from_first_to_last(kind))
        ]
        return (
            f"{len(self.memory)} rows, {self.steps} steps each, in nats a token from their texts: {', '.join(said)}; "
            f"{self.seconds:.0f} s"
        )

    def _from_first_to_last(self, kind: bool) -> str:
        """Mean divergence in the first and the last quarter of the steps of a kind; "" if there are none.

        A step reads one piece of a text, and pieces differ, so that one step alone says little.
        """
        first, last = [], []
        for losses, kinds in zip(self.losses, self.continued, strict=True):
            some = [loss for loss, its in zip(losses, kinds, strict=True) if its == kind]
            part = max(1, len(some) // 4)
            first += some[:part]
            last += some[-part:]
        return f"{sum(first) / len(first):.3f} at first, {sum(last) / len(last):.3f} at last" if first else ""


def refine(
    model: R3MemModel,
    memory: Memory,
    texts: Sequence[torch.Tensor],
    asked_of: AskedOf,
    settings: RefineSettings | None = None,
    *,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> RefineReport:
    """Tune the values of memories to their own texts, row by row.

    In a share of the steps (`continued_share`) the base model reads what it itself goes on with behind the text, in
    the others something that asks for a piece of the text: behind as much of the text as `context_tokens` says, its
    end or what is around the piece, and behind the memory.

    Args:
        model: The model that made the memory.
        memory: A memory of B rows, which the base model reads: matched or anchored.
        texts: The token ids that each row was made of, pinned and unfinished ones included, int64 `[T]`.
        asked_of: Gives what asks for a piece of a text.
        settings: How it is tuned; None: the defaults.
        checkpoint: A file in which the state is kept, from which an interrupted run goes on; None: there is none. It
            is left there: delete it once the memory is saved.
        progress: Show a bar.

    Raises:
        ValueError: The memory is another model's or cannot be refined, a text is not as long as what its row has seen,
            or the checkpoint is another run's.
    """
    settings = RefineSettings() if settings is None else settings
    settings = dataclasses.replace(settings, steps=steps_at_most(settings.steps))
    model.check_memory(memory, len(texts))
    _refuse(model, memory, texts)
    run = _Run(model, memory, texts, asked_of, settings, checkpoint)
    started = time.monotonic()
    if checkpoint is not None and checkpoint.exists():
        run.resume()
    total = len(texts) * settings.steps
    with (
        evaluating(model),
        model.behind_memory(),
        tqdm(total=total, initial=run.done, desc="Refining", unit="step", disable=not progress) as bar,
    ):
        while run.done < total:
            bar.set_postfix(loss=f"{run.step():.3f}")
            bar.update()
    return RefineReport(run.memory(), settings.steps, time.monotonic() - started, run.losses, run.continued)


def _refuse(model, memory, texts):
    """Raise ValueError for memories whose values cannot be tuned, and for texts that are not theirs."""
    if memory.layout.writer != "matched" or not model.reads_as_base:
        raise ValueError(
            "memories that the base model reads can be refined, matched and anchored ones: not those that adapters "
            'write or read (adapter_rows="all")'
        )
    if model.reader.keeps_latents():
        raise ValueError("the model keeps latents in place of values, so that there is nothing to refine in a memory")
    for row, (seen, text) in enumerate(zip(memory.tokens_seen.tolist(), texts, strict=True)):
        if seen != len(text):
            raise ValueError(
                f"the text of row {row} has {len(text)} tokens, and the memory was made of {seen}: give the very text "
                "that was compressed, from its beginning. (One that was compressed in pieces can have other tokens "
                "where they meet: compress the whole of it, to refine that)"
            )
    own = memory.slots - memory.pinned_slots()
    if (own <= 0).any():
        raise ValueError(
            f"row {int((own <= 0).nonzero()[0, 0])} has no slots that could be refined, as all of its text is kept as "
            "it is: compress it with finish=True (--finish), and if it is short with a smaller segment_overlap"
        )


class _Run:
    """State of a run: the memory, with the values as far as they are tuned, and the optimizer of the row at work.

    Attributes:
        done: Steps that have been done, of all rows.
        losses: Divergence in each step, a list for each row.
        continued: Whether each step read on behind the text, a list for each row.
    """

    def __init__(self, model, memory, texts, asked_of, settings, checkpoint):
        self._model, self._texts, self._asked_of, self._settings = model, texts, asked_of, settings
        self._start = memory.to(model.device, model.dtype).detach()
        self._values = self._start.states[:, 1].clone()  # [layers, B, kv_heads, N, head_dim]
        self._checkpoint, self._saved = checkpoint, time.monotonic()
        self.done = 0
        self.losses: list[list[float]] = [[] for _ in texts]
        self.continued: list[list[bool]] = [[] for _ in texts]
        self._begin_row()

    def memory(self) -> Memory:
        """The memory with the values as they are now."""
        states = torch.stack([self._start.states[:, 0], self._values], 1)
        before = (
            torch.zeros(len(self._texts), dtype=torch.int64) if self._start.refined is None else self._start.refined
        )
        return dataclasses.replace(self._start, states=states, refined=before + self._settings.steps)

    def step(self) -> float:
        """Tune the values of a row by one step, and return the divergence before it."""
        steps, row = self._settings.steps, self._row
        number = self.done % steps
        draw = random.Random(f"{self._settings.seed} {row} {number}")
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * number / steps))
        context, asked, is_continuation = self._drawn(draw)
        with torch.enable_grad():
            loss = self._divergence(context, asked)
            loss.backward()
        self._change.grad *= self._may_change
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses[row].append(loss.item())
        self.continued[row].append(is_continuation)
        self.done += 1
        if self.done % steps == 0:
            self._values[:, row] = self._changed().detach()[:, 0]
            self._begin_row()
        if self._checkpoint is not None and time.monotonic() - self._saved >= self._settings.checkpoint_seconds:
            self._save()
            self._saved = time.monotonic()
        return self.losses[row][-1]

    def _begin_row(self):
        """Make the parameters and the optimizer of the row at work."""
        self._row = row = min(self.done // self._settings.steps, len(self._texts) - 1)
        self._one = self._start[row]
        values = self._one.states[:, 1].float()
        # Slots that are there, but pinned ones, which are tokens of the text as they are.
        slots, pinned = values.shape[3], int(self._one.pinned_slots()[0])
        self._pinned, self._sampled = pinned, None
        places = torch.arange(slots, device=values.device)
        own = (places >= slots - int(self._one.visible_on_host().sum()) + pinned) & (self._one.ages > 0)
        own = self._may_change = own[..., None].expand(values.shape).float()
        count = own.sum((1, 2, 3, 4), keepdim=True).clamp_min(1)
        # The unit of a change is the size of a layer's values.
        self._unit = ((values.square() * own).sum((1, 2, 3, 4), keepdim=True) / count).sqrt()
        self._most_asked = self._room_behind()
        self._change = torch.zeros_like(values, requires_grad=True)
        self._optimizer = torch.optim.Adam([self._change], betas=(0.9, 0.95))

    def _room_behind(self):
        """Tokens that are read behind the memory of the row at work at most, as the settings and positions allow."""
        model, asked = self._model, self._settings.asked_tokens
        carried = len(self._one.recent[0]) + len(self._one.unfinished[0])
        if model.max_tokens is not None:
            model.check_length(carried + 2, behind_memory=True)
            asked = min(asked, model.max_tokens - model.reader.layout.first_position - carried)
        return asked

    def _changed(self):
        """Values of the row at work, `[layers, 1, kv_heads, N, head_dim]`, in the model's dtype."""
        values = self._one.states[:, 1]
        return (values.float() + self._change * self._unit).to(values.dtype)

    def _drawn(self, draw):
        """Draw what is read in a step: some of the row's text, what comes behind it, and which kind that is.

        Token ids, int64 `[n]` each. Either the end of the text and how the model goes on there (True), or what is
        around a piece and something that asks for it (False).
        """
        text, pinned, length = self._texts[self._row], self._pinned, self._one.layout.segment_length
        start = draw.choice(range(pinned, max(pinned + 1, len(text)), length))
        if draw.random() < self._settings.continued_share:
            return self._around(len(text)), draw.choice(self._continuations()), True
        asked = draw.choice(self._asked_of(text[start : start + length]))
        if len(asked) > self._most_asked:
            first = draw.randrange(len(asked) - self._most_asked + 1)
            asked = asked[first : first + self._most_asked]
        return self._around(start + length // 2), asked, False

    def _around(self, place):
        """What is pinned, and as much of the row's text around a place as the settings and positions allow."""
        text, pinned = self._texts[self._row], self._pinned
        room = min(self._settings.context_tokens, len(text) - pinned)
        if self._model.max_tokens is not None:
            room = min(room, self._model.max_tokens - pinned - self._most_asked)
        first = min(max(pinned, place - room // 2), len(text) - room)
        return torch.cat([text[:pinned], text[first : first + room]])

    def _continuations(self):
        """What the model goes on with behind the row's text, int64 `[4, n]`: sampled once, the same in every run."""
        if self._sampled is None:
            context = self._around(len(self._texts[self._row]))
            ids = context.expand(_CONTINUATIONS, -1).to(self._model.device)
            found = sampled(self._model, ids, self._most_asked, self._settings.seed)
            self._sampled = found[:, len(context) :].cpu()
        return self._sampled

    def _divergence(self, context, asked):
        """Divergence of the predictions behind the memory from those behind the context, in nats a token."""
        model, count = self._model, len(asked)
        with torch.no_grad():
            ids = torch.cat([context, asked])[None].to(model.device)
            hidden = model.decoder(input_ids=ids, use_cache=False).last_hidden_state
            wanted = model.head(hidden[:, -count:]).logits[0].float().log_softmax(-1)
        states = torch.stack([self._one.states[:, 0], self._changed()], 1)
        one = dataclasses.replace(self._one, states=states)
        rows = unfinished_of(one, torch.device("cpu"))
        ids = torch.cat([rows.ids[rows.mask.bool()], asked])[None]
        cache = model.reading_cache(one, keep=False)
        hidden = model.reader.decode(model.reader.embeddings_of(ids), torch.ones_like(ids), cache, ids=ids)
        found = model.head(hidden[:, -count:]).logits[0].float().log_softmax(-1)
        return kl_div(found, wanted, reduction="sum", log_target=True) / count

    def _save(self):
        """Write the state into the checkpoint."""
        state = self._optimizer.state.get(self._change, {})
        tensors = {"values": self._values, "change": self._change.detach(), **{n: state[n] for n in _MOMENTS if state}}
        described = {"run": self._identity(), "done": self.done, "losses": self.losses, "continued": self.continued}
        with replacing(self._checkpoint) as path:
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(tensors, path, {"r3mem": json.dumps(described)})

    def resume(self) -> None:
        """Go on from the checkpoint. Raises ValueError if it is damaged, or another run's."""
        try:
            with safe_open(self._checkpoint, "pt") as file:
                state = json.loads((file.metadata() or {})["r3mem"])
                tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            identity, self.done = state["run"], state["done"]
            self.losses, self.continued = state["losses"], state["continued"]
        except (SafetensorError, ValueError, KeyError, TypeError):
            raise ValueError(f"{self._checkpoint} is damaged; delete it to start again") from None
        if identity != self._identity():
            raise ValueError(
                f"{self._checkpoint} belongs to an unfinished run with another memory, text or settings. Finish that "
                "run, delete the file, or choose another output"
            )
        self._values = tensors["values"].to(self._values.device)
        self._begin_row()
        with torch.no_grad():
            self._change.copy_(tensors["change"])
        if "step" in tensors:
            moments = {name: tensors[name].to(self._change.device) for name in _MOMENTS[1:]}
            self._optimizer.state[self._change] = {"step": tensors["step"], **moments}

    def _identity(self):
        """Digest that is the same for a run and for the checkpoint that it may go on from."""
        settings = dataclasses.asdict(self._settings)
        del settings["checkpoint_seconds"]
        digest = hashlib.sha256(json.dumps([settings, self._model.base_fingerprint()], sort_keys=True).encode())
        for tensor in (self._start.states.float(), *self._texts):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
