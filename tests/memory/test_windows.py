"""Layers with sliding windows: no slot is held that no token will see again, and its room goes to later segments."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r3mem_fast import Memory, R3MemConfig, R3MemModel
from r3mem_fast.integrations.scoped import temporarily
from r3mem_fast.memory.slots import Slots
from r3mem_fast.memory.writers import allocation, matching
from tests.reversible.tiny import build

LENGTH, WINDOW = 16, 8  # the tiny models' window


@pytest.fixture(autouse=True)
def small_heads(monkeypatch):
    """Heads may have one slot, as here they have few on average."""
    monkeypatch.setattr(allocation, "_LEAST_SLOTS", 1)


def network(family="gemma2", slots=4, **changes):
    given = {"num_memory_tokens": slots, "memory_budget": 16 * slots, "segment_length": LENGTH, "segment_overlap": 2}
    given |= {"memory_writer": "matched", "memory_allocation": "adaptive", "adapter_rows": "memory"}
    given |= {"beyond_budget": "forget", **changes}
    torch.manual_seed(0)
    model = build(family, scale=2.0)
    model.config._attn_implementation = "eager"  # sdpa caps no logits
    return R3MemModel(model, R3MemConfig(core=(1, 3), **given)).eval()


def ids_of(tokens, rows=1, seed=0):
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def slots_of_heads(memory):
    """Slots of each head that are not pinned, int64 `[layers, B, kv_heads]`."""
    return (memory.ages > 0).sum(-1) - memory.pinned_slots()[None, :, None]


def test_slots_that_a_later_token_sees():
    ages = torch.tensor([9, 8, 7, -1, 1]).expand(2, 1, 1, -1)
    slots = Slots(torch.zeros(2, 2, 1, 1, 5, 3), ages, torch.ones(1, 5).bool(), torch.tensor([1]))
    # The first one is pinned; a token right behind the slots sees seven before it.
    assert slots.seen_within([8, None]).ages[:, 0, 0].tolist() == [[9, -1, 7, -1, 1], [9, 8, 7, -1, 1]]


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "mistral", "gpt_oss"])
def test_what_nobody_sees_is_not_held_and_not_missed(family):
    """Room for all: a memory without what nobody sees is read as one with it, and as the text itself."""
    ids, text = ids_of(60, rows=2), ids_of(9, rows=2, seed=1)
    whole = {"slots": LENGTH, "segment_overlap": 0}
    model, holding = network(family, **whole), network(family, **whole)
    memory = model.compress(ids, finish=True)
    with temporarily(Slots, seen_within=lambda slots, windows: slots):
        everything = holding.compress(ids, finish=True)
    windows = model.reader.windows()
    assert any(window == WINDOW for window in windows)
    for window, ages, every in zip(windows, memory.ages, everything.ages, strict=True):
        assert (every > 0).sum(-1).unique().tolist() == [60]
        assert ages.max() == (60 if window is None else window - 1)
        assert (ages > 0).sum(-1).unique().tolist() == [60 if window is None else window - 1]
    expected = holding(text, memory=everything).logits
    torch.testing.assert_close(model(text, memory=memory).logits, expected)
    with temporarily(Slots, seen_within=lambda slots, windows: slots):
        longer = holding.compress(text, memory=everything, finish=True)
    shorter = model.compress(text, memory=memory, finish=True)
    torch.testing.assert_close(model(text, memory=shorter).logits, holding(text, memory=longer).logits)
    with model.disable_adapters():
        read = model.plain_model(torch.cat([ids, text], 1)).logits[:, 60:]
    torch.testing.assert_close(expected, read, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_layers_that_see_everything_get_the_room():
    """Two layers of four have windows: from the third segment on, the others keep all of their keys."""
    model = network(slots=12)
    memory = model.compress(ids_of(10 * LENGTH), finish=True)
    windows = model.reader.windows()
    assert sorted(windows, key=str) == [WINDOW, WINDOW, None, None]
    for window, count in zip(windows, slots_of_heads(memory)[:, 0].tolist(), strict=True):
        assert min(count) > 8 * LENGTH if window is None else max(count) < WINDOW


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 200), st.integers(0, 3), st.sampled_from(["forget", "rematch", "rematch_once"]),
    st.sampled_from(["gemma2", "mistral"]), st.integers(2, 9),
)  # fmt: skip
def test_a_memory_has_no_more_slots_than_its_tokens_may_have(tokens, pinned, beyond, family, slots):
    model = network(family, slots=slots, beyond_budget=beyond, memory_budget=5 * slots)
    memory = model.compress(ids_of(tokens), finish=True, pinned=pinned)
    counts = slots_of_heads(memory)
    heads = counts.shape[0] * counts.shape[2]
    segments = -(-tokens // LENGTH)
    # The first slot of a head stays beside, whatever goes.
    assert counts.sum() <= (min(segments * slots, 5 * slots) + 1) * heads
    for window, ages in zip(model.reader.windows(), memory.ages, strict=True):
        if window is not None:
            assert ((ages > 0) & (ages < window)).sum(-1).max() + pinned >= (ages > 0).sum(-1).max()


@torch.no_grad()
def test_pieces_of_a_text_are_one():
    model = network(beyond_budget="rematch", memory_budget=16)
    ids = ids_of(150)
    whole, first = model.compress(ids, finish=True), model.compress(ids[:, :83])
    both = model.compress(ids[:, 83:], memory=first, finish=True)
    assert torch.equal(both.ages, whole.ages) and torch.equal(both.states, whole.states)


@torch.no_grad()
@pytest.mark.parametrize("slots", [2, 4])
def test_the_room_is_used(slots):
    """Segments here are longer than the window, so that nothing of a layer with one is left when the next comes."""
    model = network(slots=slots)
    counts = slots_of_heads(model.compress(ids_of(10 * LENGTH), finish=True))
    allowed = 10 * slots * counts.shape[0] * counts.shape[2]
    assert 0.9 * allowed <= counts.sum() <= allowed


@torch.no_grad()
def test_more_than_can_be_matched_stays_as_it_is():
    """Matched again together, wide heads keep their keys and values; without windows no head is so wide."""
    changes = {"beyond_budget": "rematch", "memory_budget": 24, "slots": 6}
    model, plain = (network(family, **changes) for family in ("gemma2", "qwen3"))
    ids = ids_of(160, rows=2)
    with temporarily(matching, MAX_KEPT=28):
        memory, alone = model.compress(ids), [model.compress(row[None]) for row in ids]
        assert (slots_of_heads(plain.compress(ids)) <= 28).all()
    wide = slots_of_heads(memory) > 28
    assert wide.any() and not wide[[window is not None for window in model.reader.windows()]].any()
    for row, its in enumerate(alone):  # whatever other rows have
        assert torch.equal(slots_of_heads(its)[:, 0], slots_of_heads(memory)[:, row])
        count = its.states.shape[4]
        torch.testing.assert_close(its.states[:, :, 0], memory.states[:, :, row, :, -count:], atol=5e-3, rtol=0)


@torch.no_grad()
def test_layers_with_fewer_heads_have_no_slots_in_others(tmp_path):
    model = network("gemma4_text", slots=12)
    memory = model.compress(ids_of(140), finish=True, pinned=2)
    counts = (memory.ages > 0).sum(-1)[:, 0]
    sizes = model.reader.layer_sizes()
    assert len({size.heads for size in sizes}) == 2
    for size, of_layer in zip(sizes, counts, strict=True):
        assert (of_layer[: size.heads] > 2).all() and not of_layer[size.heads :].any()
    memory.save(tmp_path / "memory.safetensors")
    again = Memory.load(tmp_path / "memory.safetensors", model)
    assert torch.equal(again.states, memory.states) and torch.equal(again.ages, memory.ages)


def test_a_budget_counts_what_is_held():
    """With "error", a text of any length is read where all layers have windows."""
    strict = network("mistral", beyond_budget="error", slots=8, memory_budget=8)
    memory = strict.compress(ids_of(200), finish=True)
    assert (slots_of_heads(memory) == WINDOW - 1).all()
    with pytest.raises(ValueError, match="its budget is 8"):
        network("qwen3", beyond_budget="error", slots=8, memory_budget=8).compress(ids_of(200), finish=True)


def test_uniform_memories_stay_what_they_were():
    """Where every head has as many slots, nothing can go."""
    model = network(memory_allocation="uniform")
    memory = model.compress(ids_of(100), finish=True)
    assert (slots_of_heads(memory) == 7 * 4).all()  # six segments of 16, and four tokens


def test_whether_attention_is_normalised_is_measured():
    for family, expected in (("llama", False), ("qwen3", False), ("gpt2", False), ("gemma2", True), ("olmo2", True)):
        model = R3MemModel(build(family, scale=5.0), network().r3mem_config)
        assert model.reader.normalises_attention() is expected, family


def test_where_it_is_the_length_of_values_says_nothing():
    """Values of one layer that are ten times as long change nothing in a Gemma 2: it keeps the same keys."""
    kept = {}
    for family in ("gemma2", "qwen3"):
        for factor in (1.0, 10.0):
            model = network(family)
            with torch.no_grad():
                model.plain_model.model.layers[2].self_attn.v_proj.weight.mul_(factor)
            kept[family, factor] = model.compress(ids_of(LENGTH), finish=True).ages
    assert torch.equal(kept["gemma2", 1.0], kept["gemma2", 10.0])
    assert kept["qwen3", 1.0].shape != kept["qwen3", 10.0].shape or (kept["qwen3", 1.0] != kept["qwen3", 10.0]).any()
