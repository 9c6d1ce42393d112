"""`TrainerInterface`: what trainers use of a model beside its forward pass, such as backbone, head and checkpoints."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from .masters import load_masters, masters_of
from .packing import PackedTexts, packed_texts
from .peft import own_parameters

# TRL's trainers that learn from what the model's `generate` writes, by the tags that they give it.
_SAMPLING_TRAINERS = {"grpo", "rloo"}


class TrainerInterface(torch.nn.Module):
    """Mixin of `R3MemModel` with what transformers' Trainer and TRL's trainers use of a PreTrainedModel.

    The model has `peft_model`, `plain_model`, and `hidden_states(input_ids, attention_mask)`.
    """

    if TYPE_CHECKING:  # attributes of the model
        peft_model: Any
        plain_model: Any

    # Trainer reads it when parameters are missing from a checkpoint.
    _keys_to_ignore_on_save = None
    # Whether the trainer learns from what `generate` writes, which then has to read as training does.
    _is_sampled_from = False

    def _register_checkpoint_hooks(self):
        self.register_state_dict_post_hook(_leave_frozen_base_out)
        self.register_state_dict_post_hook(_give_masters)
        self.register_load_state_dict_pre_hook(_take_masters)
        self.register_load_state_dict_post_hook(_do_not_miss_frozen_base)

    def to(self, *args: Any, **settings: Any) -> "TrainerInterface":
        """Move or cast the model, as `torch.nn.Module.to` does.

        Args:
            args: Arguments of `torch.nn.Module.to`.
            settings: Keyword arguments of `torch.nn.Module.to`.

        Raises:
            ValueError: The device is "meta".
        """
        if any(str(value) == "meta" for value in (*args, *settings.values())):
            raise ValueError(
                "an R3MemModel cannot wait on the meta device: its state_dict, from which accelerate would bring it "
                "back, leaves the frozen base out. Set fsdp_cpu_ram_efficient_loading: false"
            )
        return super().to(*args, **settings)

    @property
    def loss_type(self) -> str:
        """Loss type of the base model. Trainer sees by it that the first label of a row is not predicted."""
        return self.plain_model.loss_type

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are checkpointed: never. TRL asks before a reference's passes, and before generation."""
        return False

    @property
    def is_activation_checkpointing(self) -> bool:
        """The newer name of `is_gradient_checkpointing`."""
        return False

    @property
    def base_model(self) -> "Backbone":
        """The model without its head, see `Backbone`."""
        return Backbone(self)

    @property
    def generation_config(self) -> Any:
        """Generation config of the base model."""
        return self.plain_model.generation_config

    def get_input_embeddings(self) -> torch.nn.Module:
        """Input embeddings of the base model."""
        return self.plain_model.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        """Output embeddings of the base model."""
        return self.plain_model.get_output_embeddings()

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags to the card of the base model. TRL's trainers name themselves so, once each of them is made.

        Args:
            tags: The tags.
        """
        self.plain_model.add_model_tags(tags)
        names = {tags} if isinstance(tags, str) else set(tags)
        if "trl" in names:
            self._is_sampled_from = bool(names & _SAMPLING_TRAINERS)

    def activation_checkpointing_enable(self, *args: Any, **settings: Any) -> None:
        """Turn nothing on, and warn once that a reversible model stores no activations that could be saved.

        Args:
            args: Arguments of the base model's method.
            settings: Keyword arguments of the base model's method.
        """
        self.plain_model.activation_checkpointing_enable(*args, **settings)

    def activation_checkpointing_disable(self) -> None:
        """Do nothing: activation checkpointing is never on."""
        self.plain_model.activation_checkpointing_disable()

    def gradient_checkpointing_enable(self, *args: Any, **settings: Any) -> None:
        """Do what `activation_checkpointing_enable` does; older versions of transformers call it by this name.

        Args:
            args: Arguments of the base model's method.
            settings: Keyword arguments of the base model's method.
        """
        self.plain_model.gradient_checkpointing_enable(*args, **settings)

    def gradient_checkpointing_disable(self) -> None:
        """Do nothing: activation checkpointing is never on."""
        self.plain_model.gradient_checkpointing_disable()

    def _read_packed(self, texts: PackedTexts, labels: Any, num_items: float | torch.Tensor | None) -> Any:
        """The output of `forward` for texts that are packed into rows, each read as a row of its own."""
        output = self(texts.ids, texts.mask, labels=texts.unpacked(labels, -100), num_items_in_batch=num_items)
        if output.logits is not None:
            output.logits = texts.packed(output.logits)
        return output

    def _refuse_adapters(self, peft_config):
        raise TypeError(
            "an R3MemModel has its adapters already. Give a trainer no peft_config; to choose the adapters, make "
            "R3MemModel(get_peft_model(base, peft_config), config)"
        )

    # PEFT sets it when it puts adapters on a model, and would freeze the memory tokens.
    peft_config = property(None, _refuse_adapters)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A model without its head, for trainers that apply the head themselves (TRL's, in tiles over the vocabulary).

    Attributes:
        model: The `R3MemModel`.
    """

    model: Any

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool = False,
        **inputs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states before the head, see `R3MemModel.hidden_states`.

        Args:
            input_ids: Token ids, int64 `[B, T]`.
            attention_mask: Mask, `[B, T]`, 0 for padding.
            use_cache: Whether a cache is asked for; must be False.
            inputs: More inputs: `position_ids` of texts that are packed into rows, and what says the same beside them
                (`packing.PACKING_INPUTS`). Each text is read as a row of its own.

        Returns:
            An output with `last_hidden_state` `[B, T, hidden_size]`, in the model's or autocast's dtype.

        Raises:
            ValueError: There are other inputs, or the model is trained with a `distillation_weight`, which needs the
                logits.
        """
        texts = packed_texts(input_ids, attention_mask, inputs)
        if use_cache or inputs:
            raise ValueError(f"R3MemModel's backbone takes no {sorted(inputs) or 'cache'}")
        if self.model.training and self.model.r3mem_config.distillation_weight:
            raise ValueError(
                "distillation_weight: this trainer applies the head itself (TRL's do), so there are no logits that a "
                "teacher's could be compared with; use transformers' Trainer, or set the weight to 0"
            )
        if texts is None:
            return BaseModelOutputWithPast(last_hidden_state=self.model.hidden_states(input_ids, attention_mask))
        hidden = self.model.hidden_states(texts.ids, texts.mask)
        return BaseModelOutputWithPast(last_hidden_state=texts.packed(hidden))


def _left_out(model):
    """Names of parameters that checkpoints leave out: frozen ones of the base model, and all but one of tied ones."""
    own = {id(parameter) for _, parameter in own_parameters(model.peft_model)}
    names, seen = set(), set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (id(parameter) in own and not parameter.requires_grad) or id(parameter) in seen:
            names.add(name)
        seen.add(id(parameter))
    return names


def _leave_frozen_base_out(model, state, prefix, metadata):
    """Leave frozen parameters of the base model out of a checkpoint: hook after `state_dict`."""
    for name in _left_out(model):
        state.pop(prefix + name, None)
        # A quantised weight has more entries of its own, such as the scales of its blocks.
        for entry in [entry for entry in state if entry.startswith(f"{prefix}{name}.")]:
            del state[entry]


def _give_masters(model, state, prefix, metadata):
    """Put master weights into a checkpoint, in place of what they were rounded to: hook after `state_dict`."""
    state.update({prefix + name: master for name, master in masters_of(model).items() if prefix + name in state})


def _take_masters(model, state, prefix, *others):
    """Let master weights take over what is loaded: hook before `load_state_dict`."""
    load_masters(model, state, prefix)


def _do_not_miss_frozen_base(model, incompatible):
    """Do not report parameters as missing that are left out of checkpoints: hook after `load_state_dict`."""
    # If the model is inside of another module, keys begin with the name of that.
    left_out = tuple(_left_out(model))
    found = [key for key in incompatible.missing_keys if not f".{key}".endswith(tuple(f".{n}" for n in left_out))]
    incompatible.missing_keys[:] = found
