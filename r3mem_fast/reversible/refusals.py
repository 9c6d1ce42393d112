"""What a reversible layer refuses to do, and why."""

from typing import Any

from torch.autograd import forward_ad

from ..integrations.compat import captured_outputs
from .forms import Update


def refuse_surroundings(layer: Any) -> None:
    """Raise RuntimeError if a layer runs where no reversible layer can: DataParallel, forward-mode derivatives.

    Args:
        layer: The layer.

    Raises:
        RuntimeError: It does.
    """
    if getattr(layer, "_is_replica", False):
        raise RuntimeError(
            "a reversible model does not run under nn.DataParallel, whose replicas have no parameters of their "
            "own; use DistributedDataParallel (torchrun, accelerate launch), or show the process one GPU"
        )
    if forward_ad._current_level >= 0:
        raise RuntimeError("a reversible layer has no forward-mode derivative; call restore(model) first")


def refuse_evaluated_bdia(layer: Any, update: Update) -> None:
    """Raise ValueError if gradients are wanted of a layer of BDIA in evaluation.

    Args:
        layer: The layer.
        update: How its branch joins the streams.

    Raises:
        ValueError: They are.
    """
    if update.form == "bdia" and not layer.training:
        raise ValueError(
            "BDIACoupling: in evaluation the network is the plain one, which has no inverse. Call model.train(), use "
            "torch.no_grad(), or call restore(model)"
        )


def refuse_cross_attention(config: Any) -> None:
    """Raise ValueError for memories of a model in which some layers read something else than the text.

    Args:
        config: Configuration of the decoder.

    Raises:
        ValueError: It is one of Mllama.
    """
    if layers := getattr(config, "cross_attention_layers", None):
        raise ValueError(
            f"the layers {list(layers)} of a model of type {config.model_type} read an image, and do not run without "
            "one, so that they can neither write a memory nor read one: use another model, or no num_memory_tokens"
        )


def refuse_returned_states(config: Any) -> None:
    """Raise ValueError for a model whose layers give their states back to its loop, which reversible layers do not.

    Args:
        config: Configuration of the decoder.

    Raises:
        ValueError: It is one of xLSTM.
    """
    if getattr(config, "model_type", None) == "xlstm":
        raise ValueError(
            "the layers of a model of type xlstm return their states beside the hidden state, and reversible layers "
            "return the hidden state alone, so that no text can be read in parts: use make_reversible(model) alone, "
            "to train it with use_cache=False, or another model"
        )


def refuse_captured_outputs(kwargs: dict[str, Any]) -> None:
    """Raise ValueError if a pass with gradients is to return attention weights or the like.

    Args:
        kwargs: Keyword arguments of a layer.

    Raises:
        ValueError: It is.
    """
    wrong = [key for key in captured_outputs() if key != "hidden_states" and not key.startswith("_")]
    if wrong or kwargs.get("output_attentions"):
        name = wrong[0] if wrong else "attentions"
        raise ValueError(
            f"output_{name}=True while gradients are on: a reversible layer discards the graph of its first "
            "evaluation, so these tensors would carry no gradient. Use torch.no_grad(), or restore(model)."
        )
