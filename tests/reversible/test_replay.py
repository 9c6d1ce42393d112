"""Replay over segments of a reversible model of one's own: a recurrent soft prompt, with the gradients of a loop."""

import gc
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from r3mem_fast import IntegrityError, check_integrity, make_reversible, replay
from r3mem_fast.measure import StorageRecorder
from r3mem_fast.reversible.replay import _Run
from tests.reversible.tiny import assert_same_gradients, build, gradients, token_ids


class Recurrent(nn.Module):
    """Each segment reads a soft prompt, and leaves one: the last hidden states of the places behind it."""

    def __init__(self, seed=0, **settings):
        super().__init__()
        self.base = make_reversible(build(scale=2.0, seed=seed), **settings)
        self.places = nn.Parameter(torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)))

    def forward(self, ids, state):
        embeddings = self.base.get_input_embeddings()(ids)
        prompt, count = state["prompt"], len(self.places)
        places = self.places.expand(len(ids), -1, -1)
        output = self.base(inputs_embeds=torch.cat([prompt, embeddings, places], 1), output_hidden_states=True)
        logits = output.logits[:, count : count + ids.shape[1] - 1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return {"loss": loss, "read": state["read"]}, {
            "prompt": output.hidden_states[-1][:, -count:],
            "read": state["read"] + ids.shape[1],
        }

    def start(self, requires_grad=False):
        prompt = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(9))
        return {"prompt": prompt.requires_grad_(requires_grad), "read": torch.tensor(0)}


def looped(model, segments, state, bptt_segments=None):
    outputs = []
    for index, segment in enumerate(segments):
        if index and bptt_segments and index % bptt_segments == 0:
            state = {name: value.detach() for name, value in state.items()}
        output, state = model(segment, state)
        outputs.append(output)
    return outputs, state


def trained(model, run, segments, **settings):
    """Losses, the last state, and the gradients of them, of the first state's too."""
    start = model.start(requires_grad=True)
    outputs, state = run(segments, start, **settings)
    (sum(output["loss"] for output in outputs) + state["prompt"].square().mean()).backward()
    found = gradients(model) | {"start": start["prompt"].grad}
    model.zero_grad(set_to_none=True)
    losses = [output["loss"].item() for output in outputs]
    return losses, [output["read"].item() for output in outputs], state, found


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=5), bptt=st.sampled_from([None, 2, 3]))
def test_gradients_of_a_loop(lengths, bptt):
    """Of any number and length of segments, truncated or not: outputs, states and all gradients."""
    model = Recurrent()
    segments = [token_ids(tokens=n, seed=n) for n in lengths]

    def replayed(segments, state, **settings):
        return replay(model.base, model, segments, state, others=[model.places], **settings)

    losses, read, state, found = trained(model, replayed, segments, bptt_segments=bptt)
    expected = trained(model, lambda *a, **k: looped(model, *a, **k), segments, bptt_segments=bptt)
    assert losses == expected[0] and read == expected[1]
    assert torch.equal(state["prompt"], expected[2]["prompt"]) and state["read"] == sum(lengths)
    assert_same_gradients(found, expected[3], 1e-5)


def test_what_a_segment_computes_is_not_kept():
    """Between the passes only states are, whatever a segment computes: bytes grow by a state a segment."""
    model, kept = Recurrent(), []
    for count in (2, 3, 4):
        segments = [token_ids(tokens=40, seed=n) for n in range(count)]
        with StorageRecorder() as recorder:
            result = replay(model.base, model, segments, model.start(), others=[model.places])
        kept.append(sum(storage.nbytes for storage in recorder.live()))
        del result
    state = 2 * 3 * 32 * 4
    assert kept[1] - kept[0] <= 2 * state and kept[2] - kept[1] <= 2 * state


def test_nothing_of_a_segment_is_alive_when_the_next_one_runs():
    """Neither its graph, which the head's weights want, nor garbage that waits for the collector: states alone are."""
    model, alive = Recurrent(), []
    segments = [token_ids(tokens=40, seed=n) for n in range(5)]

    def step(segment, state):
        alive.append(sum(storage.nbytes for storage in recorder.live()))
        return model(segment, state)

    gc.collect()
    gc.disable()
    try:
        with StorageRecorder() as recorder:
            outputs, _ = replay(model.base, step, segments, model.start(), others=[model.places])
            sum(output["loss"] for output in outputs).backward()
    finally:
        gc.enable()
    first, again = alive[:5], alive[5:]
    state = 2 * 3 * 32 * 4
    assert len(again) == 4
    assert all(after - before <= 2 * state for before, after in itertools.pairwise(first))
    assert all(after <= before for before, after in itertools.pairwise(again))


def test_parameters_that_get_one_gradient():
    """What is summed over the segments is each one's own, where autograd gives several the same tensor."""
    model = Recurrent()
    pair = [nn.Parameter(torch.zeros(2, 3, 32)) for _ in range(2)]
    segments = [token_ids(seed=n) for n in range(4)]

    def step(segment, state):
        return model(segment, {**state, "prompt": state["prompt"] + pair[0] + pair[1]})

    found = []
    for run in (
        lambda: replay(model.base, step, segments, model.start(), others=[model.places, *pair]),
        lambda: looped(step, segments, model.start()),
    ):
        sum(output["loss"] for output in run()[0]).backward()
        found.append({str(index): parameter.grad for index, parameter in enumerate(pair)})
        model.zero_grad(set_to_none=True)
        for parameter in pair:
            parameter.grad = None
    assert_same_gradients(*found, 1e-5)


def test_nothing_to_replay():
    model = Recurrent()
    state = model.start()
    assert replay(model.base, model, [], state) == ([], state)


def _outside_at_first(model):
    """A step that uses a tensor from outside, in the first segment alone."""

    def step(segment, state):
        if state["read"] == 0:
            state = {**state, "prompt": state["prompt"] + model.places}
        with torch.no_grad():
            places = model.places.clone()
        return torch.func.functional_call(model, {"places": places}, (segment, state), strict=False)

    return step


def test_what_is_refused():
    model, segments = Recurrent(), [token_ids(), token_ids(seed=2)]
    with pytest.raises(ValueError, match=r"a tensor \[3, 32\] that requires a gradient enters a segment from outside"):
        replay(model.base, model, segments, model.start())
    with pytest.raises(ValueError, match="enters a segment from outside"):
        outputs, _ = replay(model.base, _outside_at_first(model), segments, model.start())
        outputs[1]["loss"].backward()
    with pytest.raises(ValueError, match="bptt_segments must be an integer of at least 2"):
        replay(model.base, model, segments, model.start(), others=[model.places], bptt_segments=1)
    with pytest.raises(ValueError, match="others must be leaves"):
        replay(model.base, model, segments, model.start(), others=[model.places * 2])
    with pytest.raises(ValueError, match="the model is not reversible"):
        replay(build(), model, segments, model.start())
    with pytest.raises(ValueError, match="step returned a state of"):
        replay(model.base, lambda s, state: (model(s, state)[0], ()), segments, model.start(), others=[model.places])
    outputs, _ = replay(model.base, model, segments, model.start(), others=[model.places])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(outputs[0]["loss"], model.places, create_graph=True)


def test_a_step_that_does_something_else_the_second_time():
    """It is found out: raised at once on the CPU, or, as on a GPU, NaN until it is asked for."""
    for integrity in ("auto", "nan"):
        model, calls = Recurrent(integrity=integrity), []

        def step(segment, state, model=model, calls=calls):
            calls.append(None)
            state = {**state, "prompt": state["prompt"] + 1e-3 * (len(calls) > 2)}
            return model(segment, state)

        outputs, _ = replay(model.base, step, [token_ids(), token_ids(seed=2)], model.start(), others=[model.places])
        loss = sum(output["loss"] for output in outputs)
        if integrity == "auto":
            with pytest.raises(IntegrityError, match="segment 0, run again: the backward pass did not find again"):
                loss.backward()
        else:
            loss.backward()
            assert model.places.grad.isnan().all()
            with pytest.raises(IntegrityError):
                check_integrity(model.base)


def test_dropout_and_hooks_are_met_once():
    """Random numbers are the same in both passes, and a hook on a parameter's gradient runs once."""
    model = Recurrent()
    scaled = []
    model.places.register_hook(lambda gradient: scaled.append(None) or 2 * gradient)
    segments = [token_ids(), token_ids(seed=2), token_ids(seed=3)]

    def step(segment, state):
        return model(segment, {**state, "prompt": nn.functional.dropout(state["prompt"], 0.5)})

    found = []
    for run in (
        lambda: replay(model.base, step, segments, model.start(), others=[model.places]),
        lambda: looped(step, segments, model.start()),
    ):
        scaled.clear()
        torch.manual_seed(0)
        sum(output["loss"] for output in run()[0]).backward()
        found.append(gradients(model))
        model.zero_grad(set_to_none=True)
        assert len(scaled) == 1
    assert_same_gradients(*found, 1e-5)


def test_a_backward_pass_that_failed_is_not_gone_on_with():
    """Half of the segments are gone then, and the rest would get other segments' gradients."""
    model, segments = Recurrent(), [token_ids(), token_ids(seed=2)]
    outputs, _ = replay(model.base, model, segments, model.start(), others=[model.places])
    loss = sum(output["loss"] for output in outputs)
    with mock.patch.object(_Run, "_again", side_effect=torch.OutOfMemoryError), pytest.raises(torch.OutOfMemoryError):
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="have already been run backward"):
        loss.backward()
