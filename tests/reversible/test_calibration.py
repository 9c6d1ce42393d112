"""`calibrate` finds few side bits that keep to a perplexity, and leaves the model as it was."""

import math
import statistics
from unittest import mock

import pytest
import torch

from r3mem_fast import MomentumCoupling, calibrate, make_reversible, restore
from r3mem_fast.cli.main import main
from r3mem_fast.reversible import stack
from r3mem_fast.reversible.calibration import perplexity_ratio, student_quantile
from r3mem_fast.reversible.streams import Streams
from tests.reversible.test_trainer import Letters
from tests.reversible.tiny import build


@pytest.fixture(scope="module")
def trained():
    """A small model that has learned something, in which the coupling matters, and text."""
    model, windows = build(scale=2.0, num_hidden_layers=6), Letters(tokens=48, count=160).windows
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        batch = windows[(step * 16) % 144 :][:16]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, windows[:12]


def test_the_choice_keeps_to_the_perplexity_with_few_bits(trained):
    model, rows = trained
    all_two = perplexity_ratio(model, rows, MomentumCoupling(bits=2, balanced=True))
    all_one = perplexity_ratio(model, rows, MomentumCoupling(bits=1, balanced=True))
    assert all_one > 1.02 * all_two > 1.02
    most = math.sqrt(all_one * all_two)  # between them, so that a mixture is to be found
    told = []
    found = calibrate(model, rows, most, progress=told.append)
    assert found.perplexity_ratio <= found.upper <= most
    assert 1.0 < statistics.fmean(found.bits[1:]) <= 2.0
    assert found.mean_bits == bits_kept(model, rows, found.coupling)
    assert found.perplexity_ratio == pytest.approx(perplexity_ratio(model, rows, found.coupling), rel=1e-6)
    assert told and str(list(found.bits)) in str(found)
    assert calibrate(model, rows, 1.5 * all_one).bits == (1,) * 6  # any choice will do


def bits_kept(model, rows, coupling):
    """Bits of what layers keep beside checksums, for an element and layer, as a forward pass leaves them."""
    made = []

    class Noted(Streams):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    make_reversible(model, coupling)
    try:
        with mock.patch.object(stack, "Streams", Noted):
            logits = model(rows[:4], use_cache=False).logits
        (streams,) = made
        assert logits.requires_grad
        kept = sum(passed.kept.side.nbytes for passed in streams.passed)
        return 8 * kept / (streams.position.numel() * len(streams.passed))
    finally:
        restore(model)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(3, 3.182446), (4, 2.776445), (5, 2.570582), (7, 2.364624), (11, 2.200985), (30, 2.042272), (100, 1.983972)],
)
def test_student_s_distribution(degrees, quantile):
    """Values of tables; of few rows they are far from 1.96, which 95 % of such intervals would not hold to."""
    assert student_quantile(degrees) == pytest.approx(quantile, rel=2e-3)


def test_the_interval_is_student_s(trained):
    """With four rows the interval is 3.18 / 1.96 times as wide as that of a normal distribution."""
    model, rows = trained
    found = calibrate(model, rows[:4], 2.0)
    plain = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows[:4]]
    with torch.no_grad():
        make_reversible(model, found.coupling).eval()
        excess = [
            model(input_ids=row[None], labels=row[None]).loss.item() - loss
            for row, loss in zip(rows[:4], plain, strict=True)
        ]
        restore(model)
    half = math.log(found.upper) - math.log(found.perplexity_ratio)
    assert half / (statistics.stdev(excess) / 2) == pytest.approx(3.182446, rel=5e-3)


def test_the_model_is_left_as_it_was(trained):
    model, rows = trained
    kinds, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    model.gradient_checkpointing_enable()
    found = calibrate(model, rows[:4], 2.0, fraction_bits="auto")
    assert found.coupling.fraction_bits == "auto"
    assert model.is_gradient_checkpointing and all(layer.gradient_checkpointing for layer in model.model.layers)
    model.gradient_checkpointing_disable()
    assert [type(m) for m in model.modules()] == kinds and [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_done_is_said(trained):
    model, rows = trained
    with pytest.raises(ValueError, match="4 rows at least"):
        calibrate(model, rows[:3])
    with pytest.raises(ValueError, match="above 1"):
        calibrate(model, rows, 1.0)
    with pytest.raises(ValueError, match="even 8 side bits"):
        calibrate(model, rows, 1.0 + 1e-9)
    make_reversible(model)
    try:
        with pytest.raises(ValueError, match="reversible already"):
            calibrate(model, rows)
    finally:
        restore(model)


@pytest.mark.slow
def test_the_command(capsys, tmp_path):
    """On the real model, two rows of few tokens would be too few; four will do for a test of the command."""
    text = tmp_path / "text.txt"
    text.write_text("Real English text, of which there is a little. " * 40, encoding="utf-8")
    options = ["calibrate", "smollm2-135m", "--rows", "4", "--tokens", "24", "--max-perplexity-ratio", "3.0"]
    assert main([*options, "--held-out", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "side bits for an element and layer" in printed and "balanced=True" in printed
    assert f"{text}: perplexity" in printed
    assert main([*options, "--text", str(tmp_path / "missing.txt")]) == 2
