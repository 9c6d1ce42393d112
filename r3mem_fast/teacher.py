"""`Teacher`: the base model, whose predictions a network is taught to give behind memories."""

import contextlib
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import kl_div

from .batching import Rows, columns_at, padding_behind
from .integrations.scoped import evaluating
from .memory.memory import Memory
from .memory.segments import IGNORED, Segment
from .network import Network


class Teacher:
    """The base model, which reads rows in full, to compare with what is read through memories.

    Args:
        network: The model.
        memory: The memory before the rows; it must be empty.
        rows: Tokens.

    Attributes:
        weight: Weight of the divergence from it, the `distillation_weight`.

    Raises:
        ValueError: The base model cannot read the whole rows.
    """

    def __init__(self, network: Network, memory: Memory, rows: Rows):
        self._network, self.weight = network, network.r3mem_config.distillation_weight
        self._hidden = self._hidden_states(memory, rows)

    def blended(
        self, output: Any, segment: Segment, targets: torch.Tensor, num_items: float | torch.Tensor,
        *, alone: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Loss of a segment, `(1 - w) * cross-entropy + w * divergence`, where w is the `distillation_weight`.

        Args:
            output: The base model's output for the segment, with logits, and with the cross-entropy as loss unless
                w is 1.
            segment: The segment.
            targets: Targets of the segment, int64 `[A, n]`, on the device of the logits.
            num_items: Number that sums over tokens are divided by.
            alone: Whether the base model reads the segment alone, with the tokens of its overlap and nothing before.

        Raises:
            ValueError: The output has no logits.
        """
        if output.logits is None:
            raise ValueError(
                "distillation needs the logits, which a fused loss (Liger's) does not make; apply it with "
                "fused_linear_cross_entropy=False"
            )
        counted = targets != IGNORED
        if alone:
            wanted = self._read_alone(segment)
        else:
            places = segment.places.clamp_max(self._hidden.shape[1] - 1)
            rows = torch.tensor(segment.rows, device=targets.device)[:, None]
            wanted = self._hidden[rows, places.to(targets.device)]
        wanted = self._logits(wanted[counted]).float().log_softmax(-1)
        divergence = kl_div(output.logits[counted].float().log_softmax(-1), wanted, reduction="sum", log_target=True)
        if self.weight == 1:
            return divergence / num_items
        return (1 - self.weight) * output.loss + self.weight * divergence / num_items

    @torch.no_grad()
    def _hidden_states(self, memory, rows):
        """Last hidden states of the base model for the whole rows: `[B, T, hidden_size]`, padded on the right."""
        network = self._network
        if memory.tokens_seen.any():
            raise ValueError(
                "distillation_weight: the teacher reads the full context, of which a memory holds only a part; train "
                "without one, or set the weight to 0"
            )
        ids, mask, _ = rows.right_padded(network.end_token_id)
        ids, mask = ids[:, :-1], mask[:, :-1]
        if network.max_tokens is not None and ids.shape[1] > network.max_tokens:
            raise ValueError(
                f"distillation_weight: the teacher reads all {ids.shape[1]} tokens at once, and the model has "
                f"{network.max_tokens} positions; use shorter rows, or set the weight to 0"
            )
        return self._read(ids, mask)

    @torch.no_grad()
    def _read(self, ids, mask):
        """Last hidden states of the base model for rows padded on the right, `[B, T, hidden_size]`."""
        network = self._network
        ids, mask = ids.to(network.device), mask.to(network.device)
        with evaluating(network), network.disable_adapters():
            return network.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def _read_alone(self, segment):
        """Last hidden states of the base model for a segment, with nothing before it, `[A, n, hidden_size]`."""
        # Its padding is on the left, where recurrent layers would read it, and positions would count it.
        ids, mask, places = padding_behind(segment.ids, segment.mask)
        return columns_at(self._read(ids, mask), places)

    @torch.no_grad()
    def _logits(self, hidden):
        """The base model's logits `[N, V]` for last hidden states `[N, hidden_size]`."""
        network = self._network
        head = network.peft_model.get_output_embeddings()
        adapted = head is not None and any(isinstance(module, BaseTunerLayer) for module in head.modules())
        with network.disable_adapters() if adapted else contextlib.nullcontext():
            return network.head(hidden[None]).logits[0]
