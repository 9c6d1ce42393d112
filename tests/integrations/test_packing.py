"""Texts that are packed into rows: each is read as a row of its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from r3mem_fast.integrations.packing import PackedTexts
from tests.reversible.tiny import assert_same_gradients, gradients, token_ids
from tests.test_model_memory import made


def packed_batch(lengths, seed=0):
    """What transformers' collator gives for random texts of these lengths, and the texts."""
    texts = [token_ids(1, length, seed + index)[0] for index, length in enumerate(lengths)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    return collator([{"input_ids": text.tolist()} for text in texts]), texts


def padded_batch(texts):
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


rows_of_texts = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


@given(rows=rows_of_texts, left=st.booleans())
def test_unpacked_and_packed_again(rows, left):
    """Any texts in any rows, padded on either side: each comes out as a row, and goes back to where it was."""
    width = max(map(sum, rows))
    ids = torch.arange(1, len(rows) * width + 1).view(len(rows), width)
    positions, mask, texts = torch.full_like(ids, 7), torch.zeros_like(ids), []
    for row, lengths in enumerate(rows):
        at = width - sum(lengths) if left else 0
        for length in lengths:
            positions[row, at : at + length], mask[row, at : at + length] = torch.arange(length), 1
            texts.append(ids[row, at : at + length])
            at += length
    packed = PackedTexts(ids, positions, mask)
    assert [row[keep.bool()].tolist() for row, keep in zip(packed.ids, packed.mask, strict=True)] == [
        text.tolist() for text in texts
    ]
    assert torch.equal(packed.packed(packed.ids[..., None])[..., 0], ids * mask)
    assert torch.equal(packed.unpacked(ids, -1), packed.ids.masked_fill(packed.mask == 0, -1))


@pytest.mark.parametrize("lengths", [(20, 5, 9, 8), (3, 8, 1)], ids=["segments", "one pass"])
@pytest.mark.parametrize("settings", [{}, {"memory_placement": "input"}], ids=["every_layer", "input"])
def test_a_memory_network_reads_each_text_alone(lengths, settings):
    """Loss, gradients and logits are those of the texts as rows of their own."""
    batch, texts = packed_batch(lengths)
    found = []
    for inputs in (batch, padded_batch(texts)):
        model = made(**settings).train()
        loss = model(**inputs).loss
        loss.backward()
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        found.append((loss.item(), gradients(model), logits))
    (loss, own, logits), (expected_loss, expected, expected_logits) = found
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(own, expected, 1e-4)
    for row, (start, text) in enumerate(zip(batch["cu_seq_lens_q"], texts, strict=False)):
        assert torch.allclose(logits[0, start : start + len(text)], expected_logits[row, : len(text)], atol=1e-5)


def test_losses_of_packed_rows_add_up():
    """With `num_items_in_batch`, as trainers that accumulate give it."""
    (first, _), (second, _) = packed_batch((20, 5)), packed_batch((9, 3), seed=7)
    texts = packed_batch((20, 5))[1] + packed_batch((9, 3), seed=7)[1]
    model = made().train()
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in (first, second))
    parts = [model(**batch, num_items_in_batch=items).loss.item() for batch in (first, second)]
    assert sum(parts) == pytest.approx(model(**padded_batch(texts)).loss.item(), rel=1e-5)


def test_positions_that_are_none_of_packed_texts():
    model, ids = made(), token_ids(1, 12)
    for positions in (torch.arange(1, 13), torch.tensor([0, 1, 2, 4, *range(8)])):
        with pytest.raises(ValueError, match="must count 0, 1, 2"):
            model(ids, labels=ids, position_ids=positions[None])
    with pytest.raises(ValueError, match="must have the shape of ids"):
        model(ids, labels=ids, position_ids=torch.arange(11)[None])
