"""`calibrate`: chooses the side bits of every layer, the fewest that keep to a perplexity."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from r3mem_fast.kernels.coupling import SIDE_BITS

from ..integrations.scoped import temporarily
from .convert import make_reversible, restore, stack_of, text_config
from .coupling import MomentumCoupling
from .route import Route
from .stack import Mode

# Half-width of a 95 % interval of a mean of many values, in standard errors.
_NORMAL_QUANTILE = statistics.NormalDist().inv_cdf(0.975)
# Rows that layers are ranked on; whether a choice keeps to the perplexity is measured on all.
_RANKING_ROWS = 2


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`.

    Attributes:
        bits: Side bits of every layer, for `MomentumCoupling(bits=..., balanced=True)`.
        mean_bits: Bits that are kept for an element and layer, on average over all layers. The first keeps none (its
            momentum is 0), whatever its number is.
        perplexity_ratio: Perplexity of the reversible network over that of the plain one, on the rows given.
        upper: Upper end of its 95 % interval over rows, by Student's t distribution. It is that of one choice that was
            measured once: the search over choices, on the same rows, is not counted, so that other text may be above.
        evaluations: How many choices of bits were measured.
        fraction_bits: Binary places of the streams, as they were asked for.
    """

    bits: tuple[int, ...]
    mean_bits: float
    perplexity_ratio: float
    upper: float
    evaluations: int
    fraction_bits: int | str = 14

    @property
    def coupling(self) -> MomentumCoupling:
        """The coupling with these bits, for `make_reversible`."""
        return MomentumCoupling(bits=self.bits, balanced=True, fraction_bits=self.fraction_bits)

    def __str__(self) -> str:
        """Return the result in one line."""
        return (
            f"{self.mean_bits:.2f} side bits for an element and layer, perplexity {self.perplexity_ratio:.3f} x that "
            f"of the plain network (at most {self.upper:.3f}): bits={list(self.bits)}"
        )


def calibrate(
    model: Any,
    input_ids: torch.Tensor,
    max_perplexity_ratio: float = 1.10,
    *,
    fraction_bits: int | str = 14,
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Choose the side bits of every layer by a little text: few in all, at a perplexity that is given.

    They are for the balanced coupling, in which layers of different bits go well with each other.

    First the fewest bits that would do for all layers alike, and the next fewer ones, are found. From the fewer,
    layers are raised, those first whose raising alone helps most; then layers are lowered as long as the perplexity
    allows. The upper end of its interval has to keep to it, so that rows that happen to be easy do not decide; it does
    not count the search, so measure what was found on other text, by `perplexity_ratio`. This takes about three passes
    over two rows for each layer, and a dozen passes over all of them.

    Args:
        model: A causal language model that `make_reversible` accepts; it is left as it is.
        input_ids: Text, int64 `[rows, tokens]`, 4 rows at least, from different places. 8 rows of 256 tokens are a
            start.
        max_perplexity_ratio: Largest perplexity of the reversible network, untrained, over that of the plain one.
        fraction_bits: Binary places of the streams, see `Coupling`.
        progress: Is told in words what was found so far; None: nobody is.

    Returns:
        The bits, and what they cost.

    Raises:
        ValueError: There are too few rows, the ratio is not above 1, no choice keeps to it, or the model is reversible
            already.
        TypeError: It is no model that can be made reversible.
    """
    if input_ids.dim() != 2 or len(input_ids) < 4 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be [rows, tokens] with 4 rows at least, got {list(input_ids.shape)}")
    if not max_perplexity_ratio > 1:
        raise ValueError(f"max_perplexity_ratio must be above 1, got {max_perplexity_ratio}")
    with _reversible(model, MomentumCoupling(fraction_bits=fraction_bits)), _evaluation(model):
        found = _Search(model, input_ids, max_perplexity_ratio, progress).result()
    return dataclasses.replace(found, fraction_bits=fraction_bits)


def perplexity_ratio(model: Any, input_ids: torch.Tensor, coupling: MomentumCoupling) -> float:
    """Measure the perplexity of the reversible network, untrained, over that of the plain one.

    Args:
        model: A causal language model that `make_reversible` accepts; it is left as it is.
        input_ids: Text, int64 `[rows, tokens]`.
        coupling: The coupling.

    Returns:
        The ratio.
    """
    with _evaluation(model):
        plain = _losses(model, input_ids)
        with _reversible(model, coupling):
            reversible = _losses(model, input_ids)
    return math.exp(statistics.fmean(reversible) - statistics.fmean(plain))


def _losses(model: Any, rows: torch.Tensor) -> list[float]:
    """Loss of each row, in nats a token."""
    return [model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in rows]


@contextmanager
def _reversible(model: Any, coupling: MomentumCoupling) -> Iterator[None]:
    """Let a model be reversible in the block; give back the checkpointing and the experts that it had."""
    checkpointing = [module for module in model.modules() if vars(module).get("gradient_checkpointing")]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    experts = getattr(text_config(base.config), "_experts_implementation", None)
    make_reversible(model, coupling)
    try:
        yield
    finally:
        restore(model)
        for module in checkpointing:
            vars(module)["gradient_checkpointing"] = True
        if getattr(text_config(base.config), "_experts_implementation", None) != experts:
            base.set_experts_implementation(experts)


@contextmanager
def _evaluation(model: Any) -> Iterator[None]:
    """Let all modules be in evaluation mode in the block, without gradients."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class _Search:
    """The search of one call. A choice of bits is a tuple with one number a layer."""

    def __init__(self, model: Any, rows: torch.Tensor, most: float, progress: Callable[[str], None] | None):
        self._model, self._rows, self._progress = model, rows, progress
        self._stack, self._most = stack_of(model), math.log(most)
        with self._stack.in_mode(Mode.PLAIN):
            self._plain = _losses(model, rows)
        self._evaluations = 0

    def result(self) -> Calibration:
        """Search, and return what was found."""
        bits = self._lowered(self._raised(*self._uniform()))
        mean, upper = self._excess(bits)
        return Calibration(bits, _kept(bits), math.exp(mean), math.exp(upper), self._evaluations)

    def _uniform(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The most bits, alike in all layers, that are too few, and the fewest that will do."""
        below: tuple[int, ...] | None = None
        for number in SIDE_BITS:
            bits = (number,) * len(self._stack.bits)
            if self._will_do(bits):
                return bits if below is None else below, bits
            below = bits
        raise ValueError(
            f"even {SIDE_BITS[-1]} side bits in every layer leave the perplexity above "
            f"{math.exp(self._most):.3f} x that of the plain network"
        )

    def _raised(self, below: tuple[int, ...], enough: tuple[int, ...]) -> tuple[int, ...]:
        """Raise the fewest layers, those first that matter most."""
        if below == enough:
            return enough
        # The first layer keeps no side bits, so its number changes nothing.
        gains = {i: self._ranking_loss(_changed(below, [i], enough[i])) for i in range(1, len(below))}
        order = sorted(gains, key=gains.__getitem__)
        few, many = 0, len(order)
        while many - few > 1:
            middle = (few + many) // 2
            if self._will_do(_changed(below, order[:middle], enough[0])):
                many = middle
            else:
                few = middle
        return _changed(below, order[:many], enough[0])

    def _lowered(self, bits: tuple[int, ...]) -> tuple[int, ...]:
        """Lower as many layers by one step as will do, those first that matter least for a bit that they save."""
        lower = {i: SIDE_BITS[SIDE_BITS.index(n) - 1] for i, n in enumerate(bits) if i and n > SIDE_BITS[0]}
        before = self._ranking_loss(bits)
        costs = {i: (self._ranking_loss(_changed(bits, [i], n)) - before) / (bits[i] - n) for i, n in lower.items()}
        for i in sorted(costs, key=costs.__getitem__)[: len(bits) // 4]:
            changed = _changed(bits, [i], lower[i])
            if self._will_do(changed):
                bits = changed
            else:
                break
        return bits

    def _will_do(self, bits: tuple[int, ...]) -> bool:
        mean, upper = self._excess(bits)
        if self._progress is not None:
            self._progress(
                f"{_kept(bits):.2f} bits: perplexity {math.exp(mean):.3f} x (at most {math.exp(upper):.3f})"
            )
        return upper <= self._most

    def _excess(self, bits: tuple[int, ...]) -> tuple[float, float]:
        """How much more a token costs than in the plain network, in nats: the mean over rows, and its upper end."""
        excess = [a - b for a, b in zip(self._losses_with(bits, self._rows), self._plain, strict=True)]
        mean = statistics.fmean(excess)
        return mean, mean + student_quantile(len(excess) - 1) * statistics.stdev(excess) / math.sqrt(len(excess))

    def _ranking_loss(self, bits: tuple[int, ...]) -> float:
        return statistics.fmean(self._losses_with(bits, self._rows[:_RANKING_ROWS]))

    def _losses_with(self, bits: tuple[int, ...], rows: torch.Tensor) -> list[float]:
        self._evaluations += 1
        updates = MomentumCoupling(bits=bits, balanced=True).updates(len(bits))
        with temporarily(self._stack, route=Route(tuple(range(len(bits))), tuple(updates))):
            return _losses(self._model, rows)


def student_quantile(degrees: int) -> float:
    """Half-width of a 95 % interval of a mean, in standard errors, from its distance to the normal distribution's.

    The expansion is that of Abramowitz and Stegun, 26.7.5. From 3 degrees of freedom on it is within 0.2 %.

    Args:
        degrees: Degrees of freedom, one less than the number of values; 3 at least.
    """
    x = _NORMAL_QUANTILE
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def _kept(bits: Sequence[int]) -> float:
    """Bits that are kept for an element and layer. The first layer keeps none."""
    return sum(bits[1:]) / len(bits)


def _changed(bits: Sequence[int], layers: Sequence[int], number: int) -> tuple[int, ...]:
    """The same bits, but for some layers."""
    chosen = set(layers)
    return tuple(number if index in chosen else own for index, own in enumerate(bits))
