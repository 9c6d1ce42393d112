"""What trainers look for on a model beside its forward pass: a backbone and a head, tags, checkpoints."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from .peft import own_parameters


class TrainerInterface(torch.nn.Module):
    """A mixin of `R3MemModel`: what transformers' Trainer and TRL's trainers ask of a PreTrainedModel.

    The model it is mixed into has `peft_model`, and `hidden_states(input_ids, attention_mask)`.
    """

    if TYPE_CHECKING:  # of the network that it is mixed into
        peft_model: Any
        plain_model: Any

    # Trainer reads it when a checkpoint lacks something.
    _keys_to_ignore_on_save = None

    def _register_checkpoint_hooks(self):
        self.register_state_dict_post_hook(_leave_frozen_base_out)
        self.register_load_state_dict_post_hook(_do_not_miss_frozen_base)

    def to(self, *args, **settings) -> "TrainerInterface":
        """Move or cast it, as `torch.nn.Module.to` does. Raises ValueError for the meta device."""
        if any(str(value) == "meta" for value in (*args, *settings.values())):
            raise ValueError(
                "an R3MemModel cannot wait on the meta device: its state_dict, from which accelerate would bring it "
                "back, leaves the frozen base out. Set fsdp_cpu_ram_efficient_loading: false"
            )
        return super().to(*args, **settings)

    @property
    def loss_type(self) -> str:
        """The base model's, by which Trainer tells that a row's first label is never predicted, and not counted."""
        return self.plain_model.loss_type

    @property
    def base_model(self) -> "Backbone":
        """The model without its head, read as it is in training: see `Backbone`."""
        return Backbone(self)

    @property
    def generation_config(self) -> Any:
        """The base model's generation config."""
        return self.plain_model.generation_config

    def get_input_embeddings(self) -> torch.nn.Module:
        """The base model's."""
        return self.plain_model.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        """The base model's."""
        return self.plain_model.get_output_embeddings()

    def add_model_tags(self, tags: list[str] | str):
        """Add tags to the base model's card."""
        self.plain_model.add_model_tags(tags)

    def activation_checkpointing_enable(self, *args, **settings):
        """Warn once that there are no activations to save (as on any reversible model), and turn nothing on."""
        self.plain_model.activation_checkpointing_enable(*args, **settings)

    def activation_checkpointing_disable(self):
        """Turn off what is not on."""
        self.plain_model.activation_checkpointing_disable()

    def gradient_checkpointing_enable(self, *args, **settings):
        """Do what `activation_checkpointing_enable` does; transformers up to 5.2x calls it by this name."""
        self.plain_model.gradient_checkpointing_enable(*args, **settings)

    def gradient_checkpointing_disable(self):
        """Turn off what is not on."""
        self.plain_model.gradient_checkpointing_disable()

    def _refuse_adapters(self, peft_config):
        raise TypeError(
            "an R3MemModel has its adapters already. Give a trainer no peft_config; to choose the adapters, make "
            "R3MemModel(get_peft_model(base, peft_config), config)"
        )

    # PEFT sets it on what it puts adapters on, whose memory tokens it would freeze.
    peft_config = property(None, _refuse_adapters)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A model without its head, for trainers that apply the head themselves (TRL's, in tiles over the vocabulary).

    Attributes:
        model: The `R3MemModel`.
    """

    model: Any

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, use_cache: bool = False, **inputs
    ) -> BaseModelOutputWithPast:
        """The hidden states before the head, as `R3MemModel.hidden_states` has them.

        Args:
            input_ids: int64 `[B, T]`.
            attention_mask: `[B, T]`, 0 for padding.
            use_cache: Must be False.
            inputs: There must be none.

        Returns:
            `last_hidden_state` `[B, T, hidden_size]`, in the model's or autocast's dtype.

        Raises:
            ValueError: There are other inputs (of packed rows, say), or it is trained with a `distillation_weight`,
                whose teacher needs the logits.
        """
        if "position_ids" in inputs:
            raise ValueError(
                "R3MemModel cuts rows into segments itself, and takes no position_ids: several texts packed into one "
                "row would be read as one. Set packing=False and padding_free=False"
            )
        if use_cache or inputs:
            raise ValueError(f"R3MemModel's backbone takes no {sorted(inputs) or 'cache'}")
        if self.model.training and self.model.r3mem_config.distillation_weight:
            raise ValueError(
                "distillation_weight: this trainer applies the head itself (TRL's do), so there are no logits that a "
                "teacher's could be compared with; use transformers' Trainer, or set the weight to 0"
            )
        return BaseModelOutputWithPast(last_hidden_state=self.model.hidden_states(input_ids, attention_mask))


def _left_out(model):
    """Names that a checkpoint does not have: of frozen parameters of the base model, and all but one of tied ones."""
    own = {id(parameter) for _, parameter in own_parameters(model.peft_model)}
    names, seen = set(), set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (id(parameter) in own and not parameter.requires_grad) or id(parameter) in seen:
            names.add(name)
        seen.add(id(parameter))
    return names


def _leave_frozen_base_out(model, state, prefix, metadata):
    """What is saved is what learns: a trainer's checkpoints hold no copy of the base model."""
    for name in _left_out(model):
        state.pop(prefix + name, None)
        # A quantised weight has more entries of its own, such as the scales of its blocks.
        for entry in [entry for entry in state if entry.startswith(f"{prefix}{name}.")]:
            del state[entry]


def _do_not_miss_frozen_base(model, incompatible):
    # Keys begin with the names of what the model is wrapped in, if in anything.
    left_out = tuple(_left_out(model))
    found = [key for key in incompatible.missing_keys if not f".{key}".endswith(tuple(f".{n}" for n in left_out))]
    incompatible.missing_keys[:] = found
