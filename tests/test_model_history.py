"""Training through several segments: memory replay, what is kept of them, truncation, and what a teacher adds."""

import dataclasses

import pytest
import torch

from r3mem_fast import IntegrityError, R3MemConfig
from r3mem_fast.choices import PLACEMENTS
from r3mem_fast.reversible import offload
from r3mem_fast.reversible.offload import HostCopy
from r3mem_fast.training.collate import padded
from tests.reversible.tiny import (
    EXACT_FAMILIES,
    GENERIC_FAMILIES,
    assert_same_gradients,
    gradients,
    stored_activations,
)
from tests.test_model_memory import ids_of, left_padded, made

FAMILIES = [*EXACT_FAMILIES, *GENERIC_FAMILIES]
pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")
LENGTHS = (37, 20, 8, 30)


def rows(lengths=LENGTHS):
    return [ids_of(n, seed)[0].tolist() for seed, n in enumerate(lengths)]


def step(model, ids, mask=None, **inputs):
    """Loss and gradients of a training step, which are then cleared."""
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    loss = model(ids, mask, labels=labels, **inputs).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return loss.item(), found


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_is_full_back_propagation_through_time(family, placement):
    """A ragged batch of up to five segments, padded on either side: loss and gradients of a plain loop that stores."""
    for overlap in (0, 3):
        model = made(family, memory_placement=placement, segment_overlap=overlap).train()
        kept = made(family, memory_placement=placement, segment_overlap=overlap, kept_segments="device").train()
        for ids, mask in (padded(rows()), left_padded(rows())):
            loss, found = step(model, ids, mask)
            with stored_activations(kept):
                expected_loss, expected = step(kept, ids, mask)
            assert loss == expected_loss
            assert any("memory_embeddings" in name for name in found)
            assert_same_gradients(found, expected, 1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kept", ["device", "host"])
def test_kept_segments_give_the_gradients_of_replay(kept, placement, monkeypatch):
    """However a segment is kept, and wherever; on the host, each layer's side bits and the streams wait there."""
    waiting = []

    class Counted(HostCopy):
        def __init__(self, tensor):
            waiting.append(tensor.dtype)
            super().__init__(tensor.clone())  # so that a use of the original would be found out

    monkeypatch.setattr(offload, "HostCopy", Counted)
    ids, mask = padded(rows())
    loss, expected = step(made(memory_placement=placement).train(), ids, mask)
    found_loss, found = step(made(memory_placement=placement, kept_segments=kept).train(), ids, mask)
    assert found_loss == loss
    assert_same_gradients(found, expected, 1e-5)
    passes = 5 if placement == "every_layer" else 9  # with "input" a memory is read in a pass of its own
    assert len(waiting) == (0 if kept == "device" else passes * (4 + 2))
    waiting.clear()
    found_loss, found = step(made(memory_placement=placement, offload_side_bits=True).train(), ids, mask)
    assert found_loss == loss
    assert_same_gradients(found, expected, 0.0)
    assert waiting == [torch.uint8] * (passes * 4)


@pytest.mark.parametrize("kept", ["none", "device"])
def test_bptt_segments_cuts_gradients_and_nothing_else(kept):
    """With 2, the memory of segments 0 and 2 is learned from what follows it, and that of segments 1 and 3 is not."""
    ids = ids_of(40)
    labels = torch.full_like(ids, -100)
    for counted, reached in ((1, True), (2, False), (3, True)):
        # A loss in one segment alone: whether anything of the segment before it is learned.
        wanted = labels.clone()
        wanted[:, 8 * counted + 1 : 8 * counted + 8] = ids[:, 8 * counted + 1 : 8 * counted + 8]
        full, cut = (made(kept_segments=kept, bptt_segments=n, adapter_rows="memory").train() for n in (None, 2))
        losses = []
        for model in (full, cut):
            loss = model(ids, labels=wanted).loss
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == losses[1]
        assert full.memory_embeddings.grad.abs().sum() > 0
        learned = cut.memory_embeddings.grad
        assert (learned is not None and bool(learned.abs().sum() > 0)) == reached
        # Of segment 1 nothing comes before segment 0 that could be cut.
        assert (counted == 1) == (reached and torch.equal(full.memory_embeddings.grad, learned))


def test_bptt_segments_below_two_are_refused():
    with pytest.raises(ValueError, match="bptt_segments must be an integer of at least 2"):
        made(bptt_segments=1)


def test_the_head_is_given_rows_that_lie_together():
    """Also of one row, without the memory tokens behind it: a product of other rows would copy the head's weight."""
    model, given = made().train(), []
    head = model.peft_model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
    ids = ids_of(40)
    model(ids, labels=ids).loss.backward()
    assert len(given) == 9  # five segments, all but the last twice
    assert all(hidden.stride() == torch.empty(hidden.shape).stride() for hidden in given)


def test_losses_of_parts_add_up_to_the_whole():
    """`num_items_in_batch`, as trainers that accumulate gradients pass it: with segments, and without."""
    model = made().train()
    for lengths in ((37, 20, 8, 30), (8, 5, 3, 7)):
        ids, mask = padded(rows(lengths))
        labels = ids.masked_fill(mask == 0, -100)
        whole = model(ids, mask, labels=labels).loss
        items = (labels[:, 1:] != -100).sum()
        parts = [model(ids[i : i + 2], mask[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=items).loss
                 for i in (0, 2)]  # fmt: skip
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


def test_a_teacher_with_the_full_context():
    """The loss is the divergence from the base model that reads everything, as computed from logits here."""
    ids, mask = padded(rows())
    plain, both = made().train(), made(distillation_weight=0.5).train()
    only = made(distillation_weight=1.0).train()
    labels = ids.masked_fill(mask == 0, -100)
    a, b, c = (model(ids, mask, labels=labels).loss for model in (plain, both, only))
    assert b.item() == pytest.approx((a.item() + c.item()) / 2, rel=1e-5)
    with torch.no_grad(), plain.disable_adapters():
        teacher = plain(ids, mask).logits[:, :-1].log_softmax(-1)
    student = made().eval()(ids, mask, labels=labels).logits[:, :-1].log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum(-1)[mask[:, 1:].bool()].mean()
    assert c.item() == pytest.approx(expected.item(), rel=1e-4)
    c.backward()
    assert only.memory_embeddings.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="the teacher reads the full context"):
        only(ids_of(20), labels=ids_of(20), memory=only.compress(ids_of(8)))
    long = ids_of(200)
    with pytest.raises(ValueError, match="the teacher reads all 200 tokens at once"):
        only(long, labels=long)


def test_a_change_between_the_passes_is_found_out():
    model = made().train()
    ids = ids_of(30)
    loss = model(ids, labels=ids).loss
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1.0)
    with pytest.raises(RuntimeError, match="was modified in place between the forward and the backward pass"):
        loss.backward()
    loss = model(ids, labels=ids).loss
    model.memory_embeddings.data.mul_(1.5)
    with pytest.raises(IntegrityError, match=r"segment \d, run again"):
        loss.backward()
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already been run backward"):
        loss.backward()


def test_dropout_is_the_same_in_both_passes():
    torch.manual_seed(0)
    model = made(lora_dropout=0.5).train()
    kept = made(lora_dropout=0.5, kept_segments="device").train()
    ids, mask = padded(rows())
    torch.manual_seed(3)
    loss, found = step(model, ids, mask)
    torch.manual_seed(3)
    expected_loss, expected = step(kept, ids, mask)
    assert loss == expected_loss
    assert_same_gradients(found, expected, 1e-5)


def test_contexts_of_many_segments_are_replayed_in_the_objective_of_pairs():
    contexts, queries = padded(rows()), padded(rows((4, 6, 3, 5)))
    losses = []
    for kept in ("none", "device"):
        model = made(kept_segments=kept).train()
        output = model(contexts[0], contexts[1], labels=contexts[0].masked_fill(contexts[1] == 0, -100),
                       query_input_ids=queries[0], query_attention_mask=queries[1])  # fmt: skip
        output.loss.backward()
        losses.append((output.loss.item(), gradients(model)))
    assert losses[0][0] == losses[1][0]
    assert_same_gradients(losses[0][1], losses[1][1], 1e-5)


def test_in_evaluation_logits_are_those_of_the_segments():
    """Each behind the memory of those before it and its overlap, whatever stands beside it in the batch."""
    for overlap in (0, 3):
        model = made(segment_overlap=overlap).eval()
        ids, mask = padded(rows())
        with torch.no_grad():
            output = model(ids, mask, labels=ids.masked_fill(mask == 0, -100))
            for index, row in enumerate(rows()):
                row = torch.tensor([row])
                for start in range(0, row.shape[1], 8):
                    memory = model.compress(row[:, :start]) if start else model.empty_memory()
                    expected = model(row[:, start : start + 8], memory=memory).logits[0]
                    found = output.logits[index, start : min(start + 8, row.shape[1])]
                    assert (found - expected).abs().max() <= 1e-4
        losses = torch.nn.functional.cross_entropy(
            output.logits[:, :-1][mask[:, 1:].bool()], ids[:, 1:][mask[:, 1:].bool()]
        )
        assert output.loss.item() == pytest.approx(losses.item(), rel=1e-5)


def test_memory_dropout_is_of_training_through_segments():
    """At 1 every segment is read without a memory, as behind an empty one; elsewhere it does nothing."""
    dropped, plain = made(memory_dropout=1.0, segment_overlap=3), made(segment_overlap=3)
    ids = ids_of(20)
    behind, memory = ids_of(6, 9), plain.compress(ids)
    losses = {model: model.train()(ids, labels=ids).loss.item() for model in (dropped, plain)}
    assert losses[dropped] != losses[plain]
    empty, total = plain.empty_memory(), 0.0
    with torch.no_grad():
        for start in range(0, 20, 8):
            own = ids[:, start : start + 8]
            before = (ids[0, max(0, start - 3) : start],)
            part = plain.eval()(own, labels=own, memory=dataclasses.replace(empty, recent=before))
            total += part.loss.item() * (own.shape[1] - (start == 0))
        # The first of a segment is predicted at the end of the one before it, there, and behind the overlap, here.
        assert losses[dropped] == pytest.approx(total / 19, rel=0.2)
        expected = plain(behind, labels=behind, memory=memory).loss
        found = dropped.train()(behind, labels=behind, memory=dataclasses.replace(memory, origin=dropped.origin()))
    assert found.loss.item() == expected.item()


@pytest.mark.parametrize("labels", [True, False])
def test_rows_of_nothing_but_padding_are_refused(labels):
    model = made()
    ids = ids_of(5)
    with pytest.raises(ValueError, match="no row has a token"):
        model(ids, torch.zeros_like(ids), labels=ids if labels else None, memory=model.compress(ids_of(8)))


@pytest.mark.parametrize("setting", ["memory_dropout", "distillation_weight", "bptt_segments"])
def test_settings_of_segments_need_memory_tokens(setting):
    with pytest.raises(ValueError, match="is for models with memory tokens"):
        R3MemConfig(**{setting: 2 if setting == "bptt_segments" else 0.5})
