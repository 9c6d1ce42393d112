"""`R3MemModel`: a causal language model that reads forward, and backward from a query to its context."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import adapter_folder, decoding, generation, objective, sampling
from .batching import Rows, nothing
from .config import R3MemConfig
from .data import hub
from .integrations.packing import packed_texts
from .integrations.scoped import evaluating
from .integrations.trainer import TrainerInterface
from .memory.cache import PrefixCache
from .memory.memory import Memory
from .network import Network
from .objective import R3MemOutput, with_idle_parameters
from .reading import compress_rows, is_one_pass, placed, read_segments, segments_of
from .reversible import restore
from .reversible.stack import Mode


class R3MemModel(TrainerInterface, Network):
    """A memory network made from a pretrained causal language model (R3Mem, arXiv 2502.15957, section 3).

    The base model gets LoRA adapters, trained, and reversible layers; its own weights stay as they are. Forward it is
    a language model as before. Backward (`recall`) it runs the layers of its core from last to first, as a causal
    decoder that continues a query with the context that the query was learned for. With memory tokens (`R3MemConfig`)
    it compresses a history of any length into a `Memory`, reads it forward, and expands it backward. The layers change
    places when it is read backward, so one thread at a time may use it.

    Args:
        base: A `transformers` causal language model, or a PeftModel of one, which keeps its adapters. It is changed in
            place.
        config: Settings; None: the defaults, with a core chosen by depth.

    Raises:
        TypeError: The base is no model that can be made reversible. It is then as it was.
        ValueError: It cannot be made reversible, the core lies beyond its depth, or its config names no end-of-text
            token. It is then as it was.
    """

    # For a trainer that accumulates gradients: the loss is a mean over `num_items_in_batch` tokens, if that is given.
    accepts_loss_kwargs = True

    def __init__(self, base: Any, config: R3MemConfig | None = None):
        super().__init__(base, config)
        self._register_checkpoint_hooks()

    @torch.compiler.disable  # the rows' lengths decide what runs, and reversible layers are not compiled anyway
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        terms: Sequence[str] | None = None,
        memory: Memory | None = None,
        num_items_in_batch: float | torch.Tensor | None = None,
        **inputs,
    ) -> R3MemOutput:
        """Read rows as a language model, behind memories where there are some; with queries, the objective of pairs.

        Without a query the result is what the base model returns. With labels and memory tokens, rows longer than a
        segment are read in segments of `segment_length` tokens, each behind the memory of those before (and
        `segment_overlap` tokens of them); the loss is the mean over all tokens. In training through several segments
        only their memories are kept, all but the last are run again in the backward pass (`kept_segments`), and there
        are no logits. Without its adapters (`disable_adapters`) and a memory it is the base model, whatever the
        length.

        With a query, `loss` is the sum of the objective's terms with their weights from the config, each a mean over
        tokens. `compress` is `-log p(query | context)`, forward, where with memory tokens the context is read from
        the memory of it; `expand` is `-log p(context | query)`, backward; `cycle` is `-log p(context | memory of the
        context)`, backward. A row whose context is wholly masked teaches that its query has none: the end at once.

        A row's results do not depend on the rows and the padding beside it but for rounding: matrix products differ by
        some ulp between shapes, of which the streams make steps of `2**-fraction_bits` now and then.

        Args:
            input_ids: Contexts, int64 `[B, T]`.
            attention_mask: `[B, T]`, 0 for padding, on either side.
            labels: int64 `[B, T]`, -100 where they do not count.
            query_input_ids: Queries, int64 `[B, Q]`.
            query_attention_mask: `[B, Q]`, 0 for padding, on either side.
            terms: Terms of the objective that are computed; None: those with a weight.
            memory: A memory of as many rows. Its unfinished tokens are read before the row's own.
            num_items_in_batch: What the loss is divided by in place of the number of tokens that count, so that the
                losses of several batches add up to the mean over all of them (with a query: each term is multiplied
                by the batch's share of their labels).
            inputs: More arguments of the base model, for a single pass without memory. With labels and memory tokens,
                `position_ids` say where texts begin that are packed into a row; each is read as a row of its own.

        Returns:
            Without a query, `logits` `[B, T, V]`. With one, `logits` `[B, T + 1, V]` are those of the contexts, read
            backward, right-padded: `logits[:, t]` predicts token t of the context, and the end after the last;
            `targets` `[B, T + 1]` are these, -100 where none counts; `cycle_logits` are those of the third term.

        Raises:
            ValueError: Shapes do not agree, a row is longer than the model's positions, or the memory is another
                model's.
        """
        if query_input_ids is not None:
            if refused := sorted([*inputs, *(["memory"] if memory is not None else [])]):
                raise ValueError(f"with query_input_ids, forward takes no {refused}")
            contexts = Rows(input_ids, attention_mask, labels)
            queries = Rows(query_input_ids, query_attention_mask)
            return self._read_pairs(contexts, queries, terms, labels, num_items_in_batch)
        if inputs.pop("use_cache", None):
            raise ValueError("R3MemModel.forward returns no cache; use generate, or the base model")
        by_segments = labels is not None and memory is None and self.learns_memories
        if by_segments and (texts := packed_texts(input_ids, attention_mask, inputs)) is not None:
            if refused := sorted(inputs.keys() - {"skip_logits"}):
                raise ValueError(f"of texts that are packed into rows, forward takes no {refused}")
            return self._read_packed(texts, labels, num_items_in_batch)
        rows = Rows(input_ids, attention_mask, labels)
        if memory is None and (labels is None or is_one_pass(self, rows)):
            if num_items_in_batch is not None:
                inputs["num_items_in_batch"] = num_items_in_batch
            return objective.read_in_one_pass(self, rows.ids, attention_mask, labels, inputs)
        inputs.pop("skip_logits", None)  # Trainer's wish, with Liger, where it needs none
        if inputs:
            raise ValueError(f"behind a memory, forward takes no {sorted(inputs)}")
        if memory is None:
            memory = self.new_memory(len(rows.ids), origin=None)
        else:
            self.check_memory(memory, len(rows.ids))
        if labels is None:
            return R3MemOutput(logits=objective.history_logits(self, memory, rows))
        return R3MemOutput(*objective.history_loss(self, memory, rows, num_items_in_batch))

    def _read_pairs(self, contexts, queries, terms, labels, num_items):
        output = objective.pair_terms(self, contexts, queries, terms)
        if labels is not None:
            output.loss = objective.pair_loss(self, output, labels, num_items)
        return output

    @torch.compiler.disable  # as forward
    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The hidden states before the head that `forward` has with labels.

        Rows are read in the same segments, and in training replayed in the backward pass in the same way.

        Args:
            input_ids: int64 `[B, T]`.
            attention_mask: `[B, T]`, 0 for padding, on either side.

        Returns:
            `[B, T, hidden_size]`, zeros in padding.

        Raises:
            ValueError: As of `forward`.
        """
        rows = Rows(input_ids, attention_mask)
        if is_one_pass(self, rows):
            with self.without_memory():
                hidden = self.decoder(
                    input_ids=rows.ids, attention_mask=attention_mask, use_cache=False
                ).last_hidden_state
            return with_idle_parameters(self, hidden.masked_fill(rows.mask[..., None] == 0, 0))
        objective.refuse_to_learn(self)
        memory = self.new_memory(len(rows.ids), origin=None)
        segments = segments_of(self, memory, rows)
        found, _ = read_segments(self, segments, memory, lambda segment, hidden: hidden)
        return placed(rows, segments, found)

    @torch.no_grad()
    def recall(
        self,
        query_input_ids: torch.Tensor,
        query_attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 256,
    ) -> list[torch.Tensor]:
        """Read backward from queries to their contexts, greedily. The model's mode stays as it is.

        Args:
            query_input_ids: int64 `[B, Q]`.
            query_attention_mask: `[B, Q]`, 0 for padding, on either side.
            max_new_tokens: At most so many a context; fewer if the model's positions end before.

        Returns:
            int64 `[n]` of each row, the end left out. A query that nothing was learned for gives an empty tensor, if
            the model was trained to know.

        Raises:
            ValueError: A query is longer than the model's positions, or max_new_tokens is below 1.
        """
        return decoding.decode_backward(self, Rows(query_input_ids, query_attention_mask), None, max_new_tokens)

    @torch.no_grad()
    def expand(
        self,
        memory: Memory,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 256,
    ) -> list[torch.Tensor]:
        """Read backward from memories to the text that they were made of, greedily.

        Args:
            memory: A memory of B rows; what is unfinished in it is compressed first, in a copy.
            query_input_ids: int64 `[B, Q]`, read after the memory; None: the memory alone.
            query_attention_mask: `[B, Q]`, 0 for padding, on either side.
            max_new_tokens: See `recall`.

        Returns:
            int64 `[n]` of each row, the end left out.

        Raises:
            ValueError: As of `recall`, or the memory is another model's.
        """
        if query_input_ids is None:
            rows = nothing(len(memory), self.device)
        else:
            rows = Rows(query_input_ids, query_attention_mask)
        self.check_memory(memory, len(rows.ids))
        objective.refuse_raw_tail(memory.layout)
        finished = self.compress(None, memory=memory, finish=True)
        return decoding.decode_backward(self, rows, finished, max_new_tokens)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory: Memory | None = None,
        **settings,
    ) -> Any:
        """The base model's `generate`, behind a memory.

        Behind a memory there is always a key-value cache, and it is the memory's. For a trainer that learns from what
        it writes (TRL's GRPO), a model with memory tokens writes as training reads: rows longer than a segment are
        continued segment by segment, each behind the memory of those before.

        Args:
            input_ids: int64 `[B, T]`.
            attention_mask: `[B, T]`, 0 for padding, on either side.
            memory: A memory of as many rows; its unfinished tokens are read before the prompt, and are not returned
                (logits processors see them).
            settings: Arguments of `transformers`' `generate`: sampling, beams, `num_return_sequences`, `streamer` and
                others.

        Returns:
            int64 `[B, T + n]`, or an output with it as `sequences`.

        Raises:
            ValueError: Shapes do not agree, a row has no token, the memory is another model's, another cache is given,
                or there are more tokens than positions.
        """
        rows = Rows(input_ids, attention_mask)
        if getattr(settings.get("generation_config"), "pad_token_id", None) is None:
            settings.setdefault("pad_token_id", self.end_token_id)
        if memory is None:
            if self._is_sampled_from and sampling.is_written_by_segments(self, rows, settings):
                return sampling.generate_by_segments(self, rows, settings)
            return generation.generate_alone(self, rows, settings)
        self.check_memory(memory, len(rows.ids))
        return generation.generate_behind(self, memory, rows, settings)

    @torch.no_grad()
    def compress(
        self,
        input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None = None, memory: Memory | None = None, *,
        finish: bool = False, progress: bool = False, pinned: int = 0,
        memory_tokens: int | None = None, memory_budget: int | None = None,
    ) -> Memory:  # fmt: skip
        """Read a history segment by segment, and keep the memory of it alone (R3Mem, section 3).

        What fills no segment waits in the memory, so that a history in pieces leaves the same memory as in one.
        The memory that this takes does not grow with T.

        Args:
            input_ids: int64 `[B, T]`, of any length, on any device; None: nothing new.
            attention_mask: `[B, T]`, 0 for padding, on either side.
            memory: The memory of what came before, of B rows; None: nothing did.
            finish: The text has ended: compress what does not fill a segment, too, as a shorter one, and match what is
                held beyond the budget (`beyond_budget="rematch_once"`; do so once, as each match loses a little of the
                one before). What follows then starts a new segment.
            progress: Show a bar, in tokens.
            pinned: First tokens of each row that a matched memory keeps as they are, beside its budget.
            memory_tokens: Slots of a segment, of matched and anchored memories; None: the model's.
            memory_budget: Slots of a row's memory; None: for as many segments as the model's has.

        Raises:
            ValueError: The model makes no memories, or none with so many pinned tokens, the memory is another model's
                or of another number of rows, or it is beyond its budget and that is to be an error.
        """
        self.check_memories()
        if input_ids is None:
            if memory is None:
                raise ValueError("there is nothing to compress: neither input_ids nor a memory")
            rows = [torch.zeros(0, dtype=torch.int64)] * len(memory)
        else:
            rows = Rows(input_ids, attention_mask).lists()
        if memory is None:
            memory = self.new_memory(len(rows), self.origin(), pinned, memory_tokens, memory_budget)
        elif pinned or (memory_tokens, memory_budget) != (None, None):
            raise ValueError(
                "pinned (chat) and sizes are for a memory that begins: leave them out where a memory goes on"
            )
        self.check_memory(memory, len(rows))
        if not progress:  # a bar, also one that is not shown, takes a lock that a killed child process may have held
            with evaluating(self):
                return compress_rows(self, rows, memory, finish=finish)
        total = sum(map(len, (*rows, *memory.unfinished)))
        with evaluating(self), tqdm(total=total, desc="Compressing", unit="tok", unit_scale=True) as bar:
            return compress_rows(self, rows, memory, finish=finish, on_tokens=bar.update)

    def empty_memory(
        self, rows: int = 1, *, pinned: int = 0, memory_tokens: int | None = None, memory_budget: int | None = None
    ) -> Memory:
        """The memory of nothing, of a size as in `compress`. Raises as that does."""
        self.check_memories()
        return self.new_memory(rows, self.origin(), pinned, memory_tokens, memory_budget)

    def cache_of(self, memory: Memory) -> PrefixCache:
        """A memory as the key-value cache of the base model, or of its `generate`; see `Memory.to_cache`."""
        self.check_memory(memory)
        if (self.reads_as_base or self.is_anchored) and self.stack.mode is not Mode.PLAIN:
            raise ValueError("make and use this memory's cache within `with model.behind_memory():`, or call generate")
        return self.reading_cache(memory)

    def save_pretrained(self, folder: str | Path, *, adapter_dtype: torch.dtype | None = None, **details):
        """Save the adapters as a PEFT folder, with `r3mem.json` beside them; see `adapter_folder.save`.

        Args:
            folder: Where; made if need be.
            adapter_dtype: What their weights are rounded to in the files; None: as they are.
            details: More entries of `r3mem.json`, values for JSON.
        """
        adapter_folder.save(self, folder, adapter_dtype=adapter_dtype, **details)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base: Any = None,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "R3MemModel":
        """Load what `save_pretrained` or `push_to_hub` wrote, in eval mode.

        Args:
            folder: A folder, the name of an adapter that comes with this package, or a hub id.
            base: Its base model, or a name by which `load_model` finds it; None: the name that it had when the adapter
                was saved. That it is the right one is told by its fingerprint, wherever it lies.
            dtype: The dtype of a base that is loaded here.
            revision: Branch, tag or commit of an adapter on the hub.
            token: Token of the hub.

        Raises:
            OSError: The folder or a file is missing or incomplete, or the base is not found.
            ValueError: A file is corrupted, or the base is not the model that the adapters were trained for.
        """
        return adapter_folder.load(cls, folder, base, dtype, revision, token)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        adapter_dtype: torch.dtype | None = None,
        details: dict[str, Any] | None = None,
        **settings,
    ) -> str:
        """Send the adapters, as `save_pretrained` writes them, to the Hugging Face hub; returns the commit's address.

        Args:
            repo_id: `USER/NAME`, made if need be.
            adapter_dtype: See `save_pretrained`.
            details: More of what `save_pretrained` takes.
            settings: `private`, `token`, `revision`, `commit_message`, see `hub.upload_adapter`.
        """
        save = functools.partial(self.save_pretrained, adapter_dtype=adapter_dtype, **(details or {}))
        return hub.upload_adapter(save, repo_id, **settings)

    def merge_and_unload(self) -> Any:
        """The base model as an ordinary one, with the adapters merged into its weights; this model is of no use then.

        What comes back reads forward, in the base's own arithmetic: without the coupling, memories and the backward
        direction. Merging rounds to the weights' dtype.

        Raises:
            ValueError: The adapters act on memory tokens alone (`adapter_rows="memory"`), which merged weights cannot.
        """
        if not self.adapts_tokens:
            raise ValueError('adapters that act on memory tokens alone (adapter_rows="memory") cannot be merged')
        if self.is_reading_backward:
            raise RuntimeError("merge before or after the model is read backward, not meanwhile")
        restore(self.peft_model)
        return self.peft_model.merge_and_unload()
