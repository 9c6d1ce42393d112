"""The ways of training that `bench.training` compares: what every arm does, and how a model is set up for one."""

import gc
import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from r3mem_fast import MomentumCoupling, compile_layers, make_reversible, restore
from r3mem_fast.integrations.compat import checkpointing_switches
from r3mem_fast.kernels.coupling import kept_bytes, side_bits_size
from r3mem_fast.measure import ForwardMemory, forward_memory
from r3mem_fast.reversible.convert import find_decoder_layers

from .models import fused_linear_cross_entropy
from .training_host import checkpoint_hidden_on_host, checkpoint_on_host, host_bytes

BASELINE = "checkpoint"
ARMS = ("plain", BASELINE, "checkpoint-offload", "checkpoint-every-4", "reversible-b4", "reversible-b2")
LIGER = "-liger"  # an arm whose name ends with this runs on Liger's kernels
LIGER_ARMS = tuple(arm + LIGER for arm in (BASELINE, "checkpoint-offload", "reversible-b4"))
COMPILED = "-compiled"  # an arm whose name ends with this has layers that torch.compile compiles, one graph for all
COMPILED_ARMS = tuple(arm + COMPILED for arm in ("plain", BASELINE, "reversible-b4", "reversible-b2"))
# More arms that keep something in host memory: each layer's input alone, and the side bits.
HOST_ARMS = ("checkpoint-hidden-offload", "reversible-b4-offload", "reversible-b2-offload")
ALL_ARMS = ARMS + LIGER_ARMS + COMPILED_ARMS + HOST_ARMS
_OFFLOAD = "-offload"
_LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Task:
    """What every arm does.

    Attributes:
        model: Name of the model, as `bench.models.load` takes it.
        dtype: Name of the weights' dtype.
        tokens: Tokens of a sequence.
        batch: Number of sequences.
        depth: Number of decoder layers kept; None: all.
        lora_rank: Rank of the adapters.
        text: A text file; None: the topics of Python's help.
        threads: Number of PyTorch's threads.
        device: "cpu" or "cuda".
        loss: "model" or "fused".
    """

    model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    tokens: int = 512
    batch: int = 1
    depth: int | None = None
    lora_rank: int = 16
    text: str | None = None
    threads: int = 1
    device: str = "cpu"
    loss: str = "model"


class Unavailable(Exception):
    """Says why an arm cannot run here."""


class TrainingArm:
    """A model set up for one arm, its optimizer and its batch.

    Attributes:
        model: The model with adapters.
        input_ids: int64 `[batch, tokens]`.
        loss: "model" or "fused".
        layers: The decoder layers.
        note: What a reader must know about how the arm runs; None: nothing.
        host_bytes: What the layers kept in host memory in the last call of `live`, see `training_host.host_bytes`.
    """

    def __init__(self, arm: str, model: Any, input_ids: torch.Tensor, *, lora_rank: int, loss: str = "model") -> None:
        """Set a model up, in place.

        Args:
            arm: Name of the arm.
            model: A causal language model with Llama's names of linear layers.
            input_ids: int64 `[batch, tokens]`.
            lora_rank: Rank of the adapters.
            loss: "model" for the model's own, "fused" for one that never holds the whole logits.

        Raises:
            Unavailable: The arm cannot run here.
            ValueError: The arm is unknown.
        """
        torch.manual_seed(0)
        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=_LINEAR_LAYERS, lora_dropout=0.0)
        # On a GPU the adapters have the model's dtype: in float32, PEFT's default, they would run without tensor cores
        # and cast every activation up.
        widen = not input_ids.is_cuda
        self.model = get_peft_model(model, config, autocast_adapter_dtype=widen).train()
        # After the adapters: on a model with checkpointing, peft would make the embeddings' output want a gradient.
        self.note = set_up(model, arm)
        self.input_ids, self.loss = input_ids, loss
        self.layers = find_decoder_layers(model)[1]
        self.host_bytes = 0
        self._optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def forward(self) -> torch.Tensor:
        """Run the forward pass, and return its loss."""
        if self.loss == "fused":
            base: Any = self.model.get_base_model()
            hidden = base.model(input_ids=self.input_ids, use_cache=False).last_hidden_state
            return fused_linear_cross_entropy(hidden, base.lm_head.weight, self.input_ids)
        return self.model(input_ids=self.input_ids, labels=self.input_ids, use_cache=False).loss

    def step(self) -> float:
        """Make one training step, and return its loss."""
        loss = self.forward()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def time_as(self, arm: str) -> float:
        """Set a plain arm's model up for `arm`, time a training step in seconds, and make the model plain again."""
        base = self.model.get_base_model()
        set_up(base, arm)
        if arm.endswith(COMPILED):
            self.step()  # compiles, the first time
        seconds = self.timed_step()
        tear_down(base, arm)
        return seconds

    def timed_step(self) -> float:
        """Return the seconds that one training step takes, on a GPU until it is done."""
        self._synchronize()
        start = time.perf_counter()
        self.step()
        self._synchronize()
        return time.perf_counter() - start

    def measure_as(self, arm: str) -> tuple[str | None, float, ForwardMemory, int]:
        """Set a plain arm's model up for `arm`, measure it on a GPU, and make the model plain again.

        Args:
            arm: Name of the arm.

        Returns:
            `(note, loss, memory, peak)`, where `peak` is `torch.cuda.max_memory_allocated` over some training steps.
        """
        base = self.model.get_base_model()
        note = set_up(base, arm)
        try:
            loss = self.step()
            torch.cuda.reset_peak_memory_stats(self.input_ids.device)
            memory = self.live()
            self.step()
            return note, loss, memory, torch.cuda.max_memory_allocated(self.input_ids.device)
        finally:
            self._optimizer.zero_grad()
            tear_down(base, arm)

    def count_as(self, arm: str) -> tuple[str | None, float, ForwardMemory]:
        """Set a plain arm's model up for `arm`, count its bytes on the CPU, and make the model plain again.

        Args:
            arm: Name of the arm.

        Returns:
            `(note, loss, memory)`. No step is made, so that all arms have the adapters of before.
        """
        base = self.model.get_base_model()
        note = set_up(base, arm)
        try:
            self.live()  # makes what stays for good
            memory = self.live()
            return note, self.forward().item(), memory
        finally:
            tear_down(base, arm)

    def live(self) -> ForwardMemory:
        """Return what a forward pass leaves alive; the pass is then run backward without a step."""
        loss, memory = forward_memory(self.forward, self.layers[-1])
        self.host_bytes = host_bytes(memory, self.input_ids.device.type)
        loss.backward()
        self._optimizer.zero_grad()
        return memory

    def bytes_per_layer(self, arm: str) -> dict[str, int]:
        """Return what a layer of a reversible arm keeps, its side bits and its checksums; nothing for other arms."""
        if not arm.startswith("reversible"):
            return {}
        elements = self.input_ids.numel() * self.model.config.hidden_size
        side_bytes = side_bits_size(elements, _side_bits_of(arm))
        return {"side_bytes_per_layer": side_bytes, "checksum_bytes_per_layer": kept_bytes(elements, None)}

    def _synchronize(self) -> None:
        if self.input_ids.is_cuda:
            torch.cuda.synchronize(self.input_ids.device)


def set_up(model: Any, arm: str) -> str | None:
    """Turn checkpointing on, or make a model reversible, as an arm's name says.

    Liger's kernels are put in where the model is loaded.

    Args:
        model: A causal language model, changed in place.
        arm: Name of the arm.

    Returns:
        What a reader must know about how the arm runs; None: nothing.

    Raises:
        Unavailable: The arm cannot run here.
        ValueError: The arm is unknown.
    """
    arm = arm.removesuffix(LIGER)
    if arm.endswith(COMPILED):
        note = set_up(model, arm.removesuffix(COMPILED))
        if arm.startswith("reversible"):
            compile_layers(model)
        else:
            for layer in find_decoder_layers(model)[1]:
                layer.compile(dynamic=False)
        return note
    if arm == "plain":
        return None
    if arm.startswith("reversible-b"):
        make_reversible(model, MomentumCoupling(bits=_side_bits_of(arm)), offload_side_bits=arm.endswith(_OFFLOAD))
        return None
    if arm == "checkpoint-every-4":
        _enable_checkpointing(model, every_n_layers=4)
        return None
    if arm == "checkpoint-offload":
        if not torch.accelerator.is_available():
            note = "no accelerator: transformers' own offload needs one to pin memory; hooks on saved tensors copy "
            note += "them in its place, and these copies are counted as the host's"
        else:
            try:
                _enable_checkpointing(model, offload=True)
                return None
            except Unavailable as reason:
                note = f"{reason}; save_on_cpu(pin_memory=True) in its place"
        _checkpoint_with(model, checkpoint_on_host)
        return note
    if arm == "checkpoint-hidden-offload":
        _checkpoint_with(model, checkpoint_hidden_on_host)
        model.enable_input_require_grads()  # a layer is run again only if its input wants a gradient
        return None
    if arm == BASELINE:
        _enable_checkpointing(model)
        return None
    raise ValueError(f"unknown arm {arm!r}; there are {', '.join(ALL_ARMS)}")


def _side_bits_of(arm):
    bits = arm.removesuffix(LIGER).removesuffix(COMPILED).removesuffix(_OFFLOAD)
    return int(bits.removeprefix("reversible-b"))


def tear_down(model: Any, arm: str) -> None:
    """Undo `set_up`."""
    if arm.endswith(COMPILED):
        for layer in find_decoder_layers(model)[1]:
            layer._compiled_call_impl = None  # torch has no method that undoes `compile`
    if arm.startswith("reversible"):
        restore(model)
    elif arm.startswith(BASELINE):
        _, disable = checkpointing_switches(model)
        disable()
        model.disable_input_require_grads()


def _enable_checkpointing(model: Any, **options: Any) -> None:
    enable, _ = checkpointing_switches(model)
    if missing := options.keys() - inspect.signature(enable).parameters.keys():
        raise Unavailable(f"this version of transformers has no {', '.join(missing)} for checkpointing")
    enable({"use_reentrant": False}, **options)
    # Enabling may ask for a gradient of the embeddings' output, which only reentrant checkpointing needs and no other
    # arm computes.
    model.disable_input_require_grads()


def _checkpoint_with(model, function):
    _enable_checkpointing(model)
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = function


def truncate(model: Any, depth: int | None) -> None:
    """Keep the first `depth` decoder layers of a model, in place; None keeps all.

    Raises:
        ValueError: The model is not that deep.
    """
    if depth is None:
        return
    decoder: Any
    decoder, layers = find_decoder_layers(model)
    if not 1 <= depth <= len(layers):
        raise ValueError(f"depth must lie in 1..{len(layers)}, got {depth}")
    decoder.layers = decoder.layers[:depth]
    model.config.num_hidden_layers = depth
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:depth]


def recover(error: Exception) -> None:
    """Let go of the tensors that the traceback of an out-of-memory error holds, and of PyTorch's cache."""
    error.__traceback__ = None
    gc.collect()
    torch.cuda.empty_cache()
