"""Tries a family of models: a tiny random one is made reversible, given memories, and read with our attention.

That needs no weights, so every causal language model that the installed transformers registers can be tried, new ones
on the day they appear.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .config import R3MemConfig
from .integrations.attention import NAME
from .memory.rotary import is_rotary
from .model import R3MemModel
from .reversible import MomentumCoupling, check_gradients, check_inverse, make_reversible, restore
from .reversible.convert import find_decoder_layers, text_config
from .tiny_models import tiny_model

# What is tried, in this order.
CHECKS = ("reversible", "large", "base", "matched", "generate", "padded", "attention", "learned", "expand")
# What is not tried where another check failed.
_NEEDS = dict.fromkeys(CHECKS[1:], "reversible") | {"generate": "matched", "padded": "matched"}
_TOLERANCE = 5e-3  # of logits behind a memory that has a slot for every token, relative to the largest
_SAME = 1e-4  # of logits of one network that are computed in another way, relative to the largest
_LARGE = 5e5  # the residual stream of "large"


@dataclasses.dataclass(frozen=True)
class FamilyReport:
    """What a family of models can do here.

    Attributes:
        family: Name of the family, `model_type` of its configurations.
        results: For each of `CHECKS` "yes", or why not; none if no model was made.
        refused: Why no tiny model could be made, or run as transformers made it; None if one was.
    """

    family: str
    results: dict[str, str]
    refused: str | None = None

    @property
    def does_all(self) -> bool:
        """Whether it can do everything that is tried."""
        return self.refused is None and all(result == "yes" for result in self.results.values())

    def __str__(self) -> str:
        """Return the report in one line."""
        if self.refused is not None:
            return f"{self.family}: not tried: {self.refused}"
        return f"{self.family}: " + "; ".join(f"{check}: {result}" for check, result in self.results.items())


def families() -> list[str]:
    """Names of all families of causal language models that the installed transformers registers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_family(family: str) -> FamilyReport:
    """Make a tiny random model of a family, and try it.

    - reversible: the inverse is exact, and gradients are those of stored activations.
    - large: so they are where weights make hidden states larger than 5e5, with `fraction_bits="auto"`.
    - base: with its adapters off, it is the model that transformers made, bit for bit.
    - matched: it compresses without training. Behind a memory with a slot for every token, a text is read as behind
      the tokens (if positions are rotary).
    - generate: it writes behind such a memory what its logits say.
    - padded: rows behind memories, padded on the left, are read as each is alone.
    - attention: `attn_implementation="r3mem"` gives what the family's own attention gives, reversibly, too, and behind
      a memory: a matched one, or where layers have windows (in which it refuses those) of memory tokens.
    - learned: a loss through segments with memory tokens has gradients.
    - expand: a memory that memory tokens wrote is read forward and backward.

    Args:
        family: Name of the family.

    Raises:
        ValueError: transformers registers no causal language model of that name.
    """
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"transformers registers no causal language model {family!r}; r3mem families lists them")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            base = tiny_model(family)
            with torch.no_grad():
                base(input_ids=_ids(17, 2), use_cache=False)
        except Exception as error:  # of any kind: it is transformers' model, and the report says what it was
            return FamilyReport(family, {}, _in_words(error))
        return FamilyReport(family, _Trial(base).results())


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _ids(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


class _Trial:
    """Tries one tiny model. A check is a method of its name that returns "yes" or why not, or raises."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self._found: dict[str, str] = {}

    def results(self) -> dict[str, str]:
        """What each check found."""
        for check in CHECKS:
            needed = _NEEDS.get(check)
            if needed is not None and self._found[needed] != "yes":
                self._found[check] = f"see {needed}"
                continue
            try:
                self._found[check] = getattr(self, check)()
            except Exception as error:  # of any kind, and reported
                self._found[check] = _in_words(error)
        return self._found

    def _copy(self) -> Any:
        return copy.deepcopy(self._base)

    @functools.cached_property
    def _with_matched(self) -> R3MemModel:
        return _matched_model(self._copy())

    @functools.cached_property
    def _with_learned(self) -> R3MemModel:
        return _learned_model(self._copy())

    def reversible(self) -> str:
        ids = _ids(17, 2)
        try:
            with torch.no_grad():
                self._base(input_ids=ids, labels=ids, use_cache=False)
        except Exception as error:  # of any kind: gradients have nothing to be compared by
            return f"transformers' own loss cannot be computed of text alone ({_in_words(error)})"
        return _reversibly(self._copy().train(), MomentumCoupling())

    def large(self) -> str:
        model = self._copy()
        if not _enlarge(model):
            return f"no scale of its weights makes hidden states larger than {_LARGE:.0e}"
        if not _has_finite_gradients(model):
            return "gradients of the plain network are not finite with such hidden states"
        return _reversibly(model.train(), MomentumCoupling(fraction_bits="auto"))

    def base(self) -> str:
        ids = _ids(17, 2)
        model = R3MemModel(self._copy(), R3MemConfig(num_memory_tokens=0, core=(1, 3))).eval()
        with torch.no_grad(), model.disable_adapters():
            same = torch.equal(model.plain_model(input_ids=ids).logits, self._base(input_ids=ids).logits)
        return "yes" if same else "logits are others"

    def matched(self) -> str:
        return _read_behind_all(self._with_matched)

    def generate(self) -> str:
        model, text = self._with_matched, _ids(9, seed=1)
        memory = model.compress(_ids(40), finish=True)
        written = model.generate(text, memory=memory, max_new_tokens=3, do_sample=False, eos_token_id=None)
        with torch.no_grad():
            said = model(written, memory=memory).logits[0, 8:-1]
        chosen = said.gather(1, written[0, 9:, None])[:, 0]
        return _same(chosen, said.amax(1), "logits of the tokens that it writes")

    def padded(self) -> str:
        model, text = self._with_matched, _ids(9, 2, seed=1)
        memory = model.compress(_ids(40, 2), finish=True)
        mask = torch.ones_like(text)
        mask[1, :4] = 0
        with torch.no_grad():
            together = model(text, mask, memory=memory).logits
            alone = [model(text[:1], memory=memory[0]).logits[0], model(text[1:, 4:], memory=memory[1]).logits[0]]
        return _same(torch.cat([together[0], together[1, 4:]]), torch.cat(alone), "logits of padded rows")

    def attention(self) -> str:
        model, ids = self._copy(), _ids(17, 2)
        model.set_attn_implementation(NAME)
        if text_config(model.config)._attn_implementation != NAME:
            return f"transformers lets a {type(model).__name__} have no attention but its own"
        with torch.no_grad():
            result = _same(model(input_ids=ids).logits, self._base(input_ids=ids).logits, "logits")
        if result == "yes":
            result = _reversibly(model.train(), MomentumCoupling())
        if result != "yes" or self._found["matched"] != "yes":
            return result
        if getattr(text_config(model.config), "sliding_window", None) is None:
            return _read_behind_all(_matched_model(restore(model).eval()))
        # In layers with a window it refuses memories that were matched.
        model = _learned_model(self._copy()).eval()
        own = _read_behind_tokens(model)
        model.plain_model.set_attn_implementation(NAME)
        return _same(_read_behind_tokens(model), own, "logits behind memory tokens", _TOLERANCE)

    def learned(self) -> str:
        model, ids = self._with_learned.train(), _ids(17, 2)
        model(ids, labels=ids).loss.backward()
        learned = model.memory_embeddings
        finite = learned is not None and learned.grad is not None and bool(learned.grad.isfinite().all())
        return "yes" if finite else "memory tokens get no finite gradient"

    def expand(self) -> str:
        model, ids = self._with_learned.eval(), _ids(17, 2)
        memory = model.compress(ids)
        model.generate(ids[:, :4], memory=memory, max_new_tokens=3, do_sample=False)
        model.expand(memory, max_new_tokens=3)
        return "yes"


def _matched_model(base: Any) -> R3MemModel:
    config = R3MemConfig(
        memory_writer="matched",
        adapter_rows="memory",
        core=(1, 3),
        num_memory_tokens=16,
        memory_budget=64,
        segment_length=16,
        segment_overlap=4,
    )
    return R3MemModel(base, config).eval()


def _learned_model(base: Any) -> R3MemModel:
    return R3MemModel(base, R3MemConfig(num_memory_tokens=3, segment_length=8, core=(1, 3)))


def _read_behind_tokens(model: R3MemModel) -> torch.Tensor:
    """Logits of a text behind the memory of another one that memory tokens wrote."""
    with torch.no_grad():
        return model(_ids(9, seed=1), memory=model.compress(_ids(40), finish=True)).logits


def _read_behind_all(model: R3MemModel) -> str:
    """Read behind a memory that has a slot for every token, and behind the tokens."""
    context, text = _ids(40), _ids(9, seed=1)
    memory = model.compress(context, finish=True)
    with torch.no_grad():
        behind = model(text, memory=memory).logits
        with model.disable_adapters():
            whole = model.plain_model(torch.cat([context, text], 1)).logits[:, 40:]
    if not is_rotary(model.decoder):
        return "yes" if behind.isfinite().all() else "logits behind a memory are not finite"
    return _same(behind, whole, "logits behind a memory of all tokens", _TOLERANCE)


def _reversibly(model: Any, coupling: MomentumCoupling) -> str:
    make_reversible(model, coupling)
    ids = _ids(17, 2)
    report = check_inverse(model, ids)
    if not report.exact:
        return f"the inverse of layer {report.first_inexact_layer} is not exact"
    error = check_gradients(model, ids).max_relative_error
    return "yes" if error < _SAME else f"gradients differ by {error:.1e}"


def _same(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = _SAME) -> str:
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    return "yes" if error < tolerance else f"{what} differ by {error:.1e}"


def _enlarge(model: Any) -> bool:
    """Scale weights of a layer until what it returns is large, in place; returns whether that was found."""
    _, layers = find_decoder_layers(model)
    second, last = layers[1], layers[-1]
    # The matrix that comes last usually adds to the hidden state. Where a norm follows, that one's weights do: of the
    # last layer, because attention behind such hidden states overflows in the plain network, too.
    norms = [weight for name, weight in last.named_parameters() if weight.dim() == 1 and name.endswith("weight")]
    choices = ((second, _matrices(second)[-1:]), (last, norms[-1:]), (second, _matrices(second)))
    return any(_scaled_until_large(model, layer, weights) for layer, weights in choices)


def _has_finite_gradients(model: Any) -> bool:
    model.train()(input_ids=_ids(17, 2), labels=_ids(17, 2), use_cache=False).loss.backward()
    finite = all(weight.grad is None or bool(weight.grad.isfinite().all()) for weight in model.parameters())
    model.zero_grad(set_to_none=True)
    return finite


def _matrices(layer: Any) -> list[Any]:
    return [weight for weight in layer.parameters() if weight.dim() > 1]


@torch.no_grad()
def _scaled_until_large(model: Any, layer: Any, weights: list[Any]) -> bool:
    before = [weight.clone() for weight in weights]
    for exponent in range(1, 17):
        for weight, value in zip(weights, before, strict=True):
            # Some norms add 1 to their weights, which are zero.
            weight.copy_((value if weight.dim() > 1 else torch.ones_like(value)) * 4.0**exponent)
        with _hooked(layer) as seen:
            model(input_ids=_ids(17, 2), use_cache=False)
        if _LARGE < seen[-1] < math.inf:
            return True
    for weight, value in zip(weights, before, strict=True):
        weight.copy_(value)
    return False


@contextlib.contextmanager
def _hooked(layer: Any) -> Iterator[list[float]]:
    """The largest magnitude of each output of a layer in the block."""
    seen: list[float] = []

    def note(_: Any, __: Any, output: Any) -> None:
        seen.append((output if torch.is_tensor(output) else output[0]).abs().max().item())

    handle = layer.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def try_families(names: Sequence[str] = ()) -> Iterator[FamilyReport]:
    """Try families one after the other.

    Args:
        names: Names of the families; none: all.

    Yields:
        A report for each.
    """
    for name in names or families():
        yield try_family(name)
