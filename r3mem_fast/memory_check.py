"""Checks that a model reads the memories that it is given, and is its base model without one."""

import contextlib
import dataclasses
from typing import Any

import torch

from .config import R3MemConfig
from .integrations.scoped import evaluating
from .model import R3MemModel
from .reversible import restore

# For three texts of some tokens each.
LEAST_TOKENS = 12
_MEMORY_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The result of `check_memories`.

    Attributes:
        layers: Number of layers that read and wrote memories in every pass: all layers of the model.
        between_memories: Largest absolute difference between the logits behind two memories of different texts.
        from_none: Largest absolute difference between the logits behind a memory and without one.
        base_without_memory: Whether the logits without a memory are those that the base model had before it became a
            memory network, bit for bit; None where it was one already.
        refused: Why a model of this kind can have no memories; None if it can.
    """

    layers: int = 0
    between_memories: float = 0.0
    from_none: float = 0.0
    base_without_memory: bool | None = None
    refused: str | None = None

    @property
    def right(self) -> bool:
        """Whether all is well: memories are read, and the logits without one are the base model's, where compared."""
        if self.refused is not None:
            return True
        return self.between_memories > 0 and self.from_none > 0 and self.base_without_memory is not False

    def __str__(self) -> str:
        """Return the report in one line."""
        if self.refused is not None:
            return f"memories: not for this model: {self.refused}"
        base = {
            None: "",
            True: "; without one: the base model's, bit for bit",
            False: "; without one: NOT the base model's",
        }
        read = "read" if self.between_memories > 0 and self.from_none > 0 else "NOT read"
        return (
            f"memories: {read} by all {self.layers} layers, logits differ by up to {self.between_memories:.3g} "
            f"between two of them and by {self.from_none:.3g} from none{base[self.base_without_memory]}"
        )


@torch.no_grad()
def check_memories(model: torch.nn.Module, input_ids: torch.Tensor) -> MemoryReport:
    """Compress two texts, read a third behind each of the memories and behind none, and compare the logits.

    Args:
        model: An `R3MemModel` with memory tokens; or a `transformers` causal language model, not reversible and
            without adapters, which gets memory tokens and adapters for the check and is as before afterwards.
        input_ids: int64 `[1, T]`, at least 12 tokens; its thirds are the three texts.

    Returns:
        What was found. A model that can have no memories is reported, not refused with an error.

    Raises:
        MemoryNotReadError: A layer did not read a memory, or did not write one.
        ValueError: There are too few tokens.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < LEAST_TOKENS:
        raise ValueError(f"input_ids must be [1, T] with at least {LEAST_TOKENS} tokens, got {list(input_ids.shape)}")
    length = input_ids.shape[1] // 3
    first, second, prompt = (input_ids[:1, part * length : (part + 1) * length] for part in range(3))
    if isinstance(model, R3MemModel):
        model.check_memories()
        return _report(model, first, second, prompt, None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        base = model(input_ids=prompt, use_cache=False).logits
        config = R3MemConfig(num_memory_tokens=_MEMORY_TOKENS, segment_length=length, adapter_rows="memory")
        try:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(0)
            network = R3MemModel(model, config)
        except ValueError as error:
            return MemoryReport(refused=str(error))
        stack.callback(_unload, network)
        try:
            network.empty_memory()  # raises if the positions of this model's keys cannot be changed
        except ValueError as error:
            return MemoryReport(refused=str(error))
        return _report(network, first, second, prompt, base)


def _unload(network: Any) -> None:
    """Make a memory network the ordinary model again."""
    restore(network.peft_model)
    network.peft_model.unload()


def _report(
    network: Any, first: torch.Tensor, second: torch.Tensor, prompt: torch.Tensor, base: torch.Tensor | None
) -> MemoryReport:
    """Compare the logits of a prompt behind memories of two texts, behind none, and of the base model if given."""
    with evaluating(network):
        one, other = (network.compress(ids, finish=True) for ids in (first, second))
        if not all(bool(memory.visible().any()) for memory in (one, other)):
            raise ValueError("the texts are too short: all of them is read as it is, and nothing is in the memories")
        behind = [network(prompt, memory=memory).logits for memory in (one, other)]
        with network.behind_memory():
            alone = network(prompt).logits
        network.generate(prompt, memory=one, max_new_tokens=2)
    return MemoryReport(
        layers=len(network.layers),
        between_memories=(behind[0] - behind[1]).abs().max().item(),
        from_none=(behind[0] - alone).abs().max().item(),
        base_without_memory=None if base is None else torch.equal(alone, base),
    )
