"""`Scheduler`: many requests at a time, each behind its memory; rows join and leave between two tokens."""

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .batching import left_padded
from .generation import is_prefix
from .integrations.compat import cache_argument
from .integrations.scoped import compact_head, evaluating
from .memory.memory import Memory
from .memory.reader import positions_of_mask
from .memory.room import roomy_cache
from .memory.rotary import depends_on_pass
from .memory.shared import SharedMemories
from .memory.states import right_aligned
from .network import Network


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt that is continued; made by `Scheduler.submit`.

    Attributes:
        ids: Token ids of the prompt, int64 `[T]`, on the CPU.
        memory: The memory before it, of one row.
        source: Requests whose memories have one source, the same object, share them.
        max_new_tokens: Tokens that are written at most.
        choose: How a token is chosen from scores `[1, V]`; None: the most probable one.
        tokens: Token ids that have been written, without the end token.
        finished: Whether it is done.
    """

    ids: torch.Tensor
    memory: Memory
    source: Any
    max_new_tokens: int
    choose: "_Sampler | None"
    tokens: list[int] = dataclasses.field(default_factory=list)
    finished: bool = False


class Scheduler:
    """Continues the prompts of many requests together, by the base model, one token of each at a time.

    What a request gets does not depend on the others, but for rounding: rows of one pass are padded to the longest.
    A step reads the prompts of requests that join, in one pass, and then writes one token of all. If it fails, all is
    as it was before it. A memory that several requests were given, one and the same object, is kept once and read
    once for all of them.

    `with Scheduler(model) as scheduler:` keeps the model in the state in which it is read, from the first step to the
    last, so that it need not be brought there for each of them. Nothing else can use the model meanwhile.

    Args:
        model: The model, an `R3MemModel`. Its memories are matched ones of the base model, without sliding windows.
        max_rows: Requests that are continued at one time; others wait.

    Raises:
        ValueError: max_rows is below 1.
    """

    def __init__(self, model: Network, *, max_rows: int = 32):
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        self._model, self._max_rows, self._ends = model, max_rows, _end_tokens(model)
        self._waiting: deque[Request] = deque()
        self._rows: list[Request] = []
        # What the rows have: keys and values of their own tokens, the padding in front of these, the position of each
        # row's last token, and their memories.
        self._cache = roomy_cache(0)
        self._starts: list[int] = []
        self._positions = torch.zeros(0, dtype=torch.int64, device=model.device)
        self._memories: SharedMemories | None = None
        self._open: contextlib.ExitStack | None = None

    def __enter__(self) -> "Scheduler":
        """Bring the model into the state in which it is read."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._reading())
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Bring it back."""
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def __len__(self) -> int:
        """Number of requests that are not done."""
        return len(self._waiting) + len(self._rows)

    def submit(
        self,
        ids: torch.Tensor | Sequence[int],
        memory: Memory,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Request:
        """Add a request, which joins the others with one of the next steps.

        Args:
            ids: Token ids of the prompt, int64 `[T]`.
            memory: The memory that it is read behind, of one row; its unfinished tokens are read before the prompt.
            max_new_tokens: Tokens that are written at most; the end token ends them, too.
            do_sample: Whether tokens are drawn; otherwise the most probable one is taken.
            temperature: Divides the scores.
            top_k: Number of tokens that are drawn from; None: all.
            top_p: Share of probability that is drawn from; None: all.
            seed: Seed of the draws of this request; None: another one each time.

        Raises:
            ValueError: The memory is another model's or of several rows, it is more than keys and values, there is no
                token to begin with, there are more tokens than positions, or a setting does not fit.
        """
        model = self._model
        prompt = torch.as_tensor(ids, dtype=torch.int64).cpu()
        if prompt.dim() != 1:
            raise ValueError(f"a request is one prompt, int64 [T], got {list(prompt.shape)}")
        model.check_memory(memory, 1)
        if not is_prefix(model, memory) or memory.layout.is_adaptive:
            raise ValueError(
                "many requests are read together behind matched memories of a base model without sliding windows, "
                'with attn_implementation "sdpa" or "eager", in which all heads have as many slots '
                '(memory_allocation="uniform"); for others use model.generate'
            )
        count = len(prompt) + len(memory.recent[0]) + len(memory.unfinished[0])
        if not count:
            raise ValueError("there is neither a prompt nor unfinished tokens that could be continued")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        model.check_length(count + max_new_tokens - 1, behind_memory=True)
        # Where keys are rotated otherwise for each pass, requests cannot share them.
        source = object() if depends_on_pass(model.reader.decoder) else memory.states
        choose = _Sampler(model.device, temperature, top_k, top_p, seed) if do_sample else None
        request = Request(prompt, memory, source, max_new_tokens, choose)
        self._waiting.append(request)
        return request

    @torch.no_grad()
    def step(self) -> list[tuple[Request, int]]:
        """Write one token of every request that is under way, those that join included.

        Returns:
            The requests with their new tokens, in the order in which they joined; without an end token, with which a
            request may be done, too.
        """
        count = min(len(self._waiting), self._max_rows - len(self._rows))
        joining = list(itertools.islice(self._waiting, count))
        before = self._state()
        with contextlib.nullcontext() if self._open else self:
            try:
                read = self._read(joining) if joining else None
                scores = [self._continue()] if self._rows else []
                if read is not None:
                    scores.append(read[0])
                    self._join(*read[1:])
                tokens = self._chosen(torch.cat(scores), [*self._rows, *joining]) if scores else []
            except BaseException:
                self._go_back(*before)
                raise
        self._rows += joining
        for _ in joining:
            self._waiting.popleft()
        return self._write(tokens)

    def _state(self):
        """What a step changes of the rows, for `_go_back`."""
        states = [(layer.keys, layer.values) for layer in self._cache.layers]
        return self._cache, states, self._starts, self._positions, self._memories

    def _go_back(self, cache, states, starts, positions, memories):
        """Let the rows be as they were."""
        for layer, (keys, values) in zip(cache.layers, states, strict=True):
            layer.keys, layer.values = keys, values
        self._cache, self._starts, self._positions, self._memories = cache, starts, positions, memories

    def run(self) -> None:
        """Take steps until all requests are done."""
        with contextlib.nullcontext() if self._open else self:
            while len(self):
                self.step()

    @contextlib.contextmanager
    def _reading(self):
        """Let the model be its base model, as transformers made it."""
        model = self._model
        with evaluating(model), model.unconverted(), compact_head(model.plain_model):
            yield

    def _read(self, joining):
        """Read prompts: the scores of their first tokens, their cache, its padding, last positions, memories."""
        model = self._model
        texts = [torch.cat([*request.memory.recent, *request.memory.unfinished, request.ids]) for request in joining]
        longest = max(map(len, texts))
        starts = [longest - len(text) for text in texts]
        rows = left_padded(texts, model.device)
        positions = model.reader.layout.first_position + positions_of_mask(rows.mask)
        memories = SharedMemories.of(
            model, [request.memory for request in joining], [request.source for request in joining], positions
        )
        cache = roomy_cache(len(memories.keys))
        scores = self._scores(rows.ids, cache, starts, positions, memories)
        return scores, cache, starts, positions[:, -1], memories

    def _continue(self):
        """Read the last token of each row: the scores of the next, `[R, V]`."""
        last = torch.tensor([[request.tokens[-1]] for request in self._rows], device=self._positions.device)
        positions = self._positions + 1
        scores = self._scores(last, self._cache, self._starts, positions[:, None], self._memories)
        self._positions = positions
        return scores

    def _join(self, cache, starts, positions, memories):
        """Put rows that have been read below the others."""
        if self._memories is not None:
            widths = [some.get_seq_length() for some in (self._cache, cache)]
            width = max(widths)
            for mine, its in zip(self._cache.layers, cache.layers, strict=True):
                mine.keys = torch.cat([right_aligned(layer.keys, width) for layer in (mine, its)])
                mine.values = torch.cat([right_aligned(layer.values, width) for layer in (mine, its)])
            mine, its = (width - some for some in widths)
            starts = [start + mine for start in self._starts] + [start + its for start in starts]
            positions, memories = torch.cat([self._positions, positions]), self._memories.followed_by(memories)
        else:
            self._cache = cache
        self._starts, self._positions, self._memories = starts, positions, memories

    def _scores(self, ids, cache, starts, positions, memories):
        base = self._model.plain_model
        last = {"logits_to_keep": 1} if self._model.slices_logits else {}
        with memories.read_by(self._model.decoder.config, starts):
            output = base(ids, position_ids=positions, use_cache=True, **cache_argument(base, cache), **last)
        return output.logits[:, -1].float()

    @staticmethod
    def _chosen(scores, requests):
        """The next token of each request, by its scores; samplers are as before where one of them fails."""
        samplers = [request.choose for request in requests if request.choose is not None]
        states = [sampler.state() for sampler in samplers]
        best = scores.argmax(-1).tolist()
        try:
            return [
                best[row] if request.choose is None else request.choose(scores[row : row + 1])
                for row, request in enumerate(requests)
            ]
        except BaseException:
            for sampler, state in zip(samplers, states, strict=True):
                sampler.go_back(state)
            raise

    def _write(self, tokens):
        """Give each row its next token, and let rows that are done leave."""
        found = []
        for token, request in zip(tokens, self._rows, strict=True):
            if token not in self._ends:
                request.tokens.append(token)
                found.append((request, token))
            request.finished = token in self._ends or len(request.tokens) == request.max_new_tokens
        stay = [row for row, request in enumerate(self._rows) if not request.finished]
        if len(stay) < len(self._rows):
            self._keep(stay)
        return found

    def _keep(self, rows):
        """Keep some rows, and of them the columns that one of them has."""
        self._rows = [self._rows[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.int64, device=self._positions.device)
        self._positions = self._positions[index]
        if not rows:
            self._cache, self._starts, self._memories = roomy_cache(0), [], None
            return
        assert self._memories is not None
        used = min(self._starts[row] for row in rows)
        self._starts, self._memories = [self._starts[row] - used for row in rows], self._memories.rows(rows)
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[index, :, used:], layer.values[index, :, used:]


def _end_tokens(model):
    """Ids of the tokens that end a text, as transformers' `generate` knows them."""
    ends = model.plain_model.generation_config.eos_token_id
    if ends is None:
        return {model.end_token_id}
    return {ends} if isinstance(ends, int) else set(ends)


class _Sampler:
    """Draws tokens of one request, by a generator of its own."""

    def __init__(self, device, temperature, top_k, top_p, seed):
        kinds = [TemperatureLogitsWarper(float(temperature))]
        kinds += [] if top_k is None else [TopKLogitsWarper(top_k)]
        kinds += [] if top_p is None else [TopPLogitsWarper(top_p)]
        self._warpers = LogitsProcessorList(kinds)
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def state(self) -> torch.Tensor:
        """What the next draws depend on, for `go_back`."""
        return self._generator.get_state()

    def go_back(self, state: torch.Tensor) -> None:
        """Draw as if nothing had been drawn since a state."""
        self._generator.set_state(state)

    def __call__(self, scores: torch.Tensor) -> int:
        """Draw a token from scores `[1, V]`."""
        none = torch.zeros(1, 0, dtype=torch.int64, device=scores.device)
        return int(torch.multinomial(self._warpers(none, scores).softmax(-1), 1, generator=self._generator))
