"""Matched memories: few keys with new values, for any model, with no training."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3mem_fast import IntegrityError, Memory, R3MemConfig, R3MemModel
from r3mem_fast.memory.writers import matching
from r3mem_fast.reversible.stack import Mode
from tests.reversible.tiny import build

SLOTS, LENGTH, OVERLAP = 6, 16, 4
ROTARY = ("llama", "qwen2", "qwen3", "gpt_neox", "olmo2")
ABSOLUTE = ("gpt2", "opt")
# Gemma 2 caps its logits, too; Gemma 3 has another rotary table in layers with a window.
WINDOWED = (("mistral", "sdpa"), ("mistral", "eager"), ("gemma2", "eager"), ("gemma3_text", "sdpa"))


def network(family="llama", seed=0, of_base=None, **changes):
    settings = {"num_memory_tokens": SLOTS, "memory_budget": 2 * SLOTS, "segment_length": LENGTH}
    settings |= {"segment_overlap": OVERLAP, "adapter_rows": "memory", "core": (1, 3), **changes}
    base = build(family, scale=2.0, seed=seed, **(of_base or {}))
    return R3MemModel(base, R3MemConfig(memory_writer="matched", **settings)).eval()


def ids_of(tokens, rows=1, seed=0):
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "r3mem"])
@pytest.mark.parametrize("family", ROTARY)
def test_where_nothing_is_left_out_nothing_is_lost(family, implementation):
    """A memory with a slot for every token is the context: a control for all of positions, masks and reading."""
    check_that_nothing_is_lost(family, implementation)


def test_yarn_scales_its_tables():
    """YaRN's frequencies, and the factor that it puts on its tables."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    base = {"rope_parameters": yarn, "max_position_embeddings": 512}
    check_that_nothing_is_lost("llama", "sdpa", of_base=base)


def check_that_nothing_is_lost(family, implementation, **changes):
    model = network(family, num_memory_tokens=LENGTH, memory_budget=4 * LENGTH, **changes)
    model.plain_model.set_attn_implementation(implementation)
    context, text = ids_of(40), ids_of(9, seed=1)
    memory = model.compress(context, finish=True)
    assert memory.slots.tolist() == [40 - OVERLAP]
    behind = model(text, memory=memory).logits
    with torch.no_grad(), model.disable_adapters():
        whole = model.plain_model(torch.cat([context, text], 1)).logits[:, 40:]
    assert (behind - whole).abs().max() < 2e-3 * whole.abs().max()


@pytest.mark.parametrize(("family", "implementation"), WINDOWED)
def test_a_window_hides_of_a_memory_what_it_would_hide_of_the_context(family, implementation):
    """The same control: slots beyond a layer's window of 8 are hidden, from each query and in each head."""
    check_that_nothing_is_lost(family, implementation)
    context, text = ids_of(40), ids_of(9, seed=1)
    few = network(family)
    few.plain_model.set_attn_implementation(implementation)
    memory = few.compress(torch.cat([context] * 2), torch.tensor([[1] * 40, [0] * 10 + [1] * 30]), pinned=2)
    both = few(torch.cat([text] * 2), memory=memory).logits
    for row, alone in enumerate((context, context[:, 10:])):
        alone = few.compress(alone, pinned=2)
        assert (both[row] - few(text, memory=alone).logits[0]).abs().max() < 1e-3 * both.abs().max()
    beams = few.generate(text, memory=memory[0], max_new_tokens=5, num_beams=3, do_sample=False)
    assert beams.shape == (1, text.shape[1] + 5)
    written = few.generate(text, memory=memory[0], max_new_tokens=12, do_sample=False)
    read = few(written[:, :-1], memory=memory[0]).logits[:, text.shape[1] - 1 :]
    assert torch.equal(read.argmax(-1), written[:, text.shape[1] :])
    few.plain_model.set_attn_implementation("r3mem")
    with pytest.raises(ValueError, match="cannot read a matched memory in layers with a sliding window"):
        few(text, memory=memory[0])


@pytest.mark.parametrize("beyond", ["rematch", "rematch_once", "forget"])
def test_pinned_tokens_stay_as_they_are(beyond):
    model = network(beyond_budget=beyond)
    ids = ids_of(LENGTH * 4)
    raw = network(num_memory_tokens=LENGTH, memory_budget=4 * LENGTH).compress(ids, finish=True)
    for pinned in (1, 5, LENGTH + 2):
        memory = model.compress(ids, pinned=pinned, finish=True)
        assert memory.slots.tolist() == [2 * SLOTS + pinned]
        assert torch.equal(memory.ages[..., :pinned], raw.ages[..., :pinned])
        if pinned < LENGTH:  # read behind nothing in both, so that they are the same to the last bit
            assert torch.equal(memory.states[..., :pinned, :], raw.states[..., :pinned, :])
        piece = model.compress(ids[:, 3:], memory=model.compress(ids[:, :3], pinned=pinned), finish=True)
        assert torch.equal(piece.states, memory.states)
    with pytest.raises(ValueError, match="leave them out where a memory goes on"):
        model.compress(ids, memory=memory, pinned=2)
    with pytest.raises(ValueError, match="pinned must be 0 to 32 tokens, beside a budget of 12; got -1"):
        model.compress(ids, pinned=-1)
    with pytest.raises(ValueError, match="pinned must be 0 to 4 tokens"):
        network(memory_budget=1020, beyond_budget="rematch").compress(ids, pinned=5)
    with pytest.raises(ValueError, match="pinned must be 0 to 4 tokens"):  # of the size that is asked for
        network(beyond_budget="rematch").compress(ids, pinned=5, memory_budget=1020)
    small = network(memory_budget=1024, beyond_budget="rematch").compress(ids, pinned=5, memory_budget=12)
    assert small.slots.tolist() == [12 + 5]
    learned = R3MemModel(build(), R3MemConfig(num_memory_tokens=2, segment_length=LENGTH, core=(1, 3)))
    with pytest.raises(ValueError, match="not for memory tokens that learned"):
        learned.compress(ids, pinned=1)
    with pytest.raises(ValueError, match="its budget is 12"):
        network(beyond_budget="error").compress(ids, pinned=3)


def test_pinned_tokens_keep_their_order_beyond_the_reach():
    model = network(beyond_budget="rematch")
    memory = model.compress(ids_of(LENGTH * 12), pinned=5, finish=True)
    assert model.layout.reach == 64
    assert int(memory.ages[..., 5].max()) <= 59
    assert torch.equal(memory.ages[..., :5], torch.arange(64, 59, -1, dtype=torch.int32).expand(4, 1, 2, -1))
    raw = network(num_memory_tokens=LENGTH, memory_budget=4 * LENGTH).compress(ids_of(LENGTH * 2), finish=True)
    assert torch.equal(memory.states[..., :5, :], raw.states[..., :5, :])


def test_rows_with_other_pinned_tokens_go_together(tmp_path):
    model = network()
    ids = ids_of(50)
    some = [model.compress(ids, pinned=pinned) for pinned in (0, 3)]
    both = model.compress(torch.cat([ids_of(30, seed=2)] * 2), memory=Memory.cat(some), finish=True)
    both.save(tmp_path / "memory")
    both = Memory.load(tmp_path / "memory", model)
    for row, memory in enumerate(some):
        alone = model.compress(ids_of(30, seed=2), memory=memory, finish=True)
        kept = int(alone.slots[0])
        assert both.slots[row] == kept == 2 * SLOTS + 3 * row
        difference = both.states[:, :, row, :, -kept:] - alone.states[:, :, 0]
        assert difference.abs().max() < 1e-3 * alone.states.abs().max()


@pytest.mark.parametrize("queries", ["reread", "pairs", "own+reread", "own+reread+pairs"])
def test_queries_of_other_passes(queries):
    """They change what is kept; and where nothing is left out, nothing."""
    model = network(memory_queries=queries)
    model.questions_of = lambda ids: [ids[:3], ids[4:9]]
    ids = ids_of(60)
    memory = model.compress(ids, finish=True)
    assert not torch.equal(memory.states, network().compress(ids, finish=True).states)
    whole = {"num_memory_tokens": LENGTH, "memory_budget": 4 * LENGTH}
    all_of_it = network(memory_queries=queries, **whole)
    all_of_it.questions_of = model.questions_of
    assert torch.equal(all_of_it.compress(ids, finish=True).states, network(**whole).compress(ids, finish=True).states)
    pieces = model.compress(ids[:, 33:], memory=model.compress(ids[:, :33]), finish=True)
    assert torch.equal(pieces.states, memory.states)
    model.questions_of = lambda found: [found[:3], found[4:9]] if found[0] in ids else []  # of the first row
    rows = model.compress(torch.cat([ids, ids_of(60, seed=1)]), finish=True)
    difference = rows.states[:, :, :1] - memory.states
    assert difference.abs().max() < 1e-3 * memory.states.abs().max()


def test_nothing_is_asked():
    with pytest.raises(ValueError, match="nothing says what that is"):
        network(memory_queries="pairs").compress(ids_of(40))
    network(memory_queries="pairs").compress(ids_of(4))  # nothing is matched yet
    model = network(memory_queries="pairs")
    model.questions_of = lambda ids: []
    ids = ids_of(60)
    assert torch.equal(model.compress(ids).states, network().compress(ids).states)  # its own queries, then
    with pytest.raises(ValueError, match="memory_queries must be "):
        network(memory_queries="all")


@pytest.mark.parametrize("family", [*ROTARY, *ABSOLUTE])
def test_the_base_model_reads_and_is_as_it_was(family):
    model = network(family)
    text = ids_of(9, seed=1)
    with torch.no_grad(), model.disable_adapters():
        before = model.plain_model(text).logits
    implementation = model.plain_model.config._attn_implementation
    memory = model.compress(ids_of(40), finish=True)
    assert model.plain_model.config._attn_implementation == implementation
    assert model.stack.mode is Mode.REVERSIBLE
    assert torch.equal(model(text).logits, before)
    assert not torch.equal(model(text, memory=memory).logits, before)
    other = model.compress(ids_of(40, seed=2), finish=True)
    assert not torch.equal(model(text, memory=memory).logits, model(text, memory=other).logits)


def test_new_values_are_nearer_to_the_context_than_old_ones(monkeypatch):
    """That of the kept keys, with their own values and with those in closed form: what the match is for."""
    model = network()
    context, text = ids_of(LENGTH + OVERLAP), ids_of(LENGTH, seed=1)
    with torch.no_grad(), model.disable_adapters():
        whole = model.plain_model(torch.cat([context, text], 1)).logits[:, context.shape[1] :]

    def error():
        return (model(text, memory=model.compress(context, finish=True)).logits - whole).pow(2).mean()

    fitted = error()
    monkeypatch.setattr(matching, "solved", lambda gram, residual: (residual * 0, gram.new_ones(gram.shape[:2]) > 0))
    assert fitted < 0.8 * error()  # with the same keys


@settings(max_examples=12)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from(["rematch", "rematch_once", "forget"]))
def test_in_pieces_as_in_one(pieces, beyond):
    model = network(beyond_budget=beyond)
    ids = ids_of(sum(pieces))
    whole, memory, start = model.compress(ids), None, 0
    for piece in pieces:
        memory = model.compress(ids[:, start : start + piece], memory=memory)
        start += piece
    assert torch.equal(memory.states, whole.states) and torch.equal(memory.ages, whole.ages)
    assert memory.slots.tolist() == whole.slots.tolist() and memory.tokens_seen.tolist() == [len(ids[0])]
    assert torch.equal(memory.unfinished[0], whole.unfinished[0]) and torch.equal(memory.recent[0], whole.recent[0])


@pytest.mark.parametrize("beyond", ["rematch", "rematch_once", "forget"])
def test_rows_do_not_depend_on_the_rows_beside_them(beyond):
    model = network(beyond_budget=beyond)
    lengths = (70, 9, 33, 1)
    rows = [ids_of(n, seed=n)[0] for n in lengths]
    for side in ("left", "right"):
        ids, mask = torch.zeros(2, len(rows), max(lengths), dtype=torch.int64)
        for index, row in enumerate(rows):
            here = slice(0, len(row)) if side == "right" else slice(max(lengths) - len(row), max(lengths))
            ids[index, here], mask[index, here] = row, 1
        batch = model.compress(ids, mask, finish=True)
        for index, row in enumerate(rows):
            alone = model.compress(row[None], finish=True)
            kept = int(alone.slots[0])
            assert batch.slots[index] == kept and kept <= 2 * SLOTS
            if kept:
                assert torch.equal(batch.ages[:, index, :, -kept:], alone.ages[:, 0, :, -kept:])
                difference = batch.states[:, :, index, :, -kept:] - alone.states[:, :, 0, :, -kept:]
                assert difference.abs().max() < 1e-3 * alone.states.abs().max()


def test_an_endless_stream_takes_constant_memory_and_positions():
    model = network()
    memory = model.compress(ids_of(LENGTH * 3))
    for seed in range(12):
        memory = model.compress(ids_of(LENGTH, seed=seed), memory=memory)
        assert memory.states.shape[4] == 2 * SLOTS and memory.slots.tolist() == [2 * SLOTS]
    assert int(memory.ages.max()) <= model.layout.reach == 64  # half of the model's positions
    assert int(memory.ages.min()) >= 1
    assert model(ids_of(20), memory=memory).logits.isfinite().all()


@pytest.mark.parametrize("beyond", ["forget", "rematch"])
def test_what_happens_beyond_the_budget(beyond):
    """The oldest slots go but the first; or all of them are matched again, and none of a segment must stay."""
    model = network(beyond_budget=beyond)
    ids = ids_of(LENGTH * 4 + OVERLAP)
    memory = model.compress(ids)
    ages = memory.ages[:, 0]
    assert memory.slots.tolist() == [2 * SLOTS] and bool((ages.diff(dim=-1) < 0).all())  # oldest first
    if beyond == "forget":
        recent = (ages <= LENGTH).sum(-1)
        assert bool((recent == SLOTS).all()) and bool((ages[..., 0] > 2 * LENGTH).all())
    with pytest.raises(ValueError, match="its budget is 12: raise the budget"):
        network(beyond_budget="error").compress(ids)


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_slots_are_held_until_a_text_ends_and_matched_again_once(allocation, tmp_path):
    """While it is read, nothing is lost to the budget; the last segment matches all of them together."""
    settings = {"memory_allocation": allocation, "segment_overlap": 0}
    once, roomy = network(beyond_budget="rematch_once", **settings), network(memory_budget=6 * SLOTS, **settings)
    ids = ids_of(4 * LENGTH)
    reading = once.compress(ids)
    # The last segment waits: whether more follows is not known. It is read with the next token, or at the end.
    assert len(reading.unfinished[0]) == LENGTH and int(reading.num_segments) == 3
    held = roomy.compress(ids[:, : 3 * LENGTH])
    assert torch.equal(reading.states, held.states) and torch.equal(reading.ages, held.ages)
    reading.save(tmp_path / "memory")
    reading = Memory.load(tmp_path / "memory", once)
    assert reading.slots.tolist() == held.slots.tolist() and int(reading.slots) > 2 * SLOTS

    ended = once.compress(None, memory=reading, finish=True)
    again = network(beyond_budget="rematch", **settings)
    before = dataclasses.replace(held, layout=again.layout, origin=again.origin())
    wanted = again.compress(ids[:, 3 * LENGTH :], memory=before, finish=True)
    assert torch.equal(ended.states, wanted.states) and torch.equal(ended.ages, wanted.ages)
    whole = once.compress(ids, finish=True)
    assert torch.equal(whole.states, ended.states)
    if allocation == "uniform":
        assert ended.slots.tolist() == [2 * SLOTS]
    assert once.compress(None, memory=ended, finish=True).states is ended.states  # nothing is left to do
    text = ids_of(5)
    read = roomy(torch.cat([ids[:, 3 * LENGTH :], text], 1), memory=held).logits[:, LENGTH:]
    assert torch.equal(once(text, memory=reading).logits, read)  # what waits is read before what follows
    assert once.generate(text, memory=reading, max_new_tokens=3).shape[1] == 8


def test_what_is_held_ends_at_the_reach():
    """So a text of any length takes constant memory; the oldest slots go, but the first."""
    once = network(beyond_budget="rematch_once")
    most = -(-once.layout.reach // LENGTH) * SLOTS
    assert once.layout.most_slots == most > once.layout.budget and once.layout.lifetime == once.layout.reach - 1
    memory = once.compress(ids_of(LENGTH))
    for seed in range(12):
        memory = once.compress(ids_of(LENGTH, seed=seed), memory=memory)
    assert memory.slots.tolist() == [most]
    ended = once.compress(None, memory=memory, finish=True)
    assert ended.slots.tolist() == [2 * SLOTS] and torch.equal(ended.states[..., :1, :], memory.states[..., :1, :])


def test_what_is_matched_again_does_not_grow_old():
    """Beside the first slot, which stays as it is, none is older than the lifetime, where that fits into the reach."""
    model = network(beyond_budget="rematch", segment_length=4, segment_overlap=2, num_memory_tokens=3, memory_budget=7)
    assert model.layout.lifetime == 8 * 4 < model.layout.reach == 64
    check_what_grows_old(model, 0, 32)
    # Ages of a row with pinned tokens end before the reach.
    far = network(beyond_budget="rematch", segment_length=8, segment_overlap=2, num_memory_tokens=3, memory_budget=7)
    assert far.layout.lifetime == 63
    check_what_grows_old(far, 2, 61)
    assert network(memory_budget=6 * SLOTS).layout.lifetime == 63  # all of the reach
    assert network(memory_budget=60, num_memory_tokens=6, segment_length=2).layout.lifetime == 40


def check_what_grows_old(model, pinned, age):
    """After many segments: the first slots are what they were, and the others are at most so old."""
    memory, first = None, None
    for _ in range(40):
        ids = ids_of(model.layout.segment_length)
        memory = model.compress(ids, memory=memory) if memory else model.compress(ids, pinned=pinned)
        kept = memory.states[..., : max(1, pinned), :]
        first = kept if first is None and int(memory.slots) >= max(1, pinned) else first
        if int(memory.slots) == 7 + pinned:
            assert torch.equal(kept, first) and len(memory.ages[..., 0].unique()) == 1
            assert int(memory.ages[..., max(1, pinned) :].max()) <= age
    assert int(memory.ages[..., 0].max()) == 64 and int(memory.slots) == 7 + pinned


def test_files(tmp_path):
    model = network()
    memory = model.compress(ids_of(50, rows=2), finish=False).labelled([("document", "a"), None])
    memory.save(tmp_path / "memory.safetensors")
    again = Memory.load(tmp_path / "memory.safetensors", model)
    assert torch.equal(again.states, memory.states) and torch.equal(again.ages, memory.ages)
    assert again.slots.tolist() == memory.slots.tolist() and again.layout == memory.layout
    text = ids_of(5, rows=2, seed=3)
    assert torch.equal(model(text, memory=again).logits, model(text, memory=memory).logits)
    joined = Memory.cat([memory[1], memory[0]])
    assert torch.equal(joined.ages, memory.ages[:, [1, 0]]) and joined.slots.tolist() == memory.slots.tolist()[::-1]
    short = model.compress(ids_of(10), finish=True)
    assert Memory.cat([short, memory]).ages.shape[-1] == memory.ages.shape[-1]
    with pytest.raises(ValueError, match="of another base model"):
        network(seed=1).check_memory(memory)
    with pytest.raises(ValueError, match="made with other adapters or settings"):
        network(adapter_rows="all").check_memory(memory)


def test_a_memory_of_another_size_is_read_and_goes_on_in_its_own(tmp_path):
    """The base model made it, so any network of the same base reads it; what follows is cut and matched as before."""
    model, other = network(memory_queries="reread"), R3MemModel(build(scale=2.0), R3MemConfig(core=(1, 3))).eval()
    ids, text = ids_of(70), ids_of(5, seed=1)
    model.compress(ids[:, :40]).save(tmp_path / "memory")
    memory = Memory.load(tmp_path / "memory", other)
    assert torch.equal(other(text, memory=memory).logits, model(text, memory=memory).logits)
    assert torch.equal(other(text, memory=memory, labels=text).loss, model(text, memory=memory, labels=text).loss)
    memory, whole = other.compress(ids[:, 40:], memory=memory), model.compress(ids)
    assert torch.equal(memory.states, whole.states) and memory.layout == whole.layout != other.layout
    moved = dataclasses.replace(memory, layout=dataclasses.replace(memory.layout, reach=32))
    with pytest.raises(ValueError, match="made with other adapters or settings"):
        other.check_memory(moved)


def test_any_model_has_them_and_adapters_do_not_matter():
    """A model without memory tokens: its base model writes and reads, whatever the adapters have learned."""
    model = R3MemModel(build(scale=2.0), R3MemConfig(core=(1, 3))).eval()
    assert not model.learns_memories and model.layout.writer == "matched" and model.memory_embeddings is None
    memory = model.compress(ids_of(60), finish=True)
    text = ids_of(7, seed=1)
    before = model(text, memory=memory).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    assert torch.equal(model(text, memory=memory).logits, before)
    assert torch.equal(model.compress(ids_of(60), finish=True).states, memory.states)
    found = model.generate(text, memory=memory, max_new_tokens=4, num_beams=2)
    assert found.shape == (1, 11)
    with pytest.raises(ValueError, match=r"within `with model.behind_memory\(\):`"):
        memory.to_cache(model)
    with model.disable_adapters():
        cache = memory.to_cache(model)
    assert cache.prefix_length == memory.states.shape[4]


def test_bad_input():
    model = network()
    for ids in (ids_of(1), ids_of(OVERLAP), torch.full((1, 300), 7)):
        memory = model.compress(ids, finish=True)
        assert model(ids_of(3), memory=memory).logits.isfinite().all()
    with pytest.raises(ValueError, match="do not fit together"):
        network(memory_budget=SLOTS - 1)
    for beyond in ("rematch", "rematch_once"):
        with pytest.raises(ValueError, match="too large to be matched together"):
            network(memory_budget=1025, beyond_budget=beyond)
    full = {"segment_length": 60, "segment_overlap": 4, "num_memory_tokens": SLOTS}  # in 64 of 128 positions
    assert network(**full).layout.segment_length == 60
    with pytest.raises(ValueError, match="do not fit together"):  # no prompt behind a whole segment that waits
        network(beyond_budget="rematch_once", **full)
    with pytest.raises(ValueError, match="is for memory tokens, not for matched memories"):
        R3MemConfig(memory_writer="matched", num_memory_tokens=4, memory_dropout=0.5)
    with pytest.raises(ValueError, match="nothing would learn"):
        model.train()(ids_of(60), labels=ids_of(60))
    broken = network()
    with torch.no_grad():
        broken.plain_model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(IntegrityError, match="look for non-finite weights"):
        broken.compress(ids_of(40), finish=True)


def test_equations_that_cannot_be_solved_change_nothing():
    gram, residual = torch.eye(3).repeat(1, 3, 1, 1), torch.ones(1, 3, 3, 2)
    gram[0, 1], residual[0, 2, 0, 0] = float("nan"), float("inf")
    change, right = matching.solved(gram, residual)
    assert (change[0, 0] != 0).all() and not change[0, 1:].any() and right.tolist() == [[True, False, False]]
    change, right = matching.solved(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert not change.any() and right.all()


def test_what_cannot_be_matched_is_said_once(monkeypatch):
    model, found = network(), matching.solved
    monkeypatch.setattr(matching, "solved", lambda gram, residual: found(gram * float("nan"), residual))
    with pytest.warns(UserWarning, match="could not be matched") as warned:
        memory = model.compress(ids_of(4 * LENGTH), finish=True)
    assert len(warned) == 1 and memory.states.isfinite().all()


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_moved_keys_have_the_mass_of_all(scale):
    """Queries with a large part in common miss, on average, nothing after the move; others do not count."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 40, 16, generator=generator) + 3 * torch.randn(2, 6, 1, 16, generator=generator)
    missing = 0.3 + 0.1 * torch.rand(2, 6, 40, generator=generator)
    missing[1, :, 30:], query[1, :, 30:] = float("nan"), float("nan")
    missing[0, 2, 5] = float("inf")
    move = matching.move_for_mass(query, missing, 6, scale)
    gained = scale * (query * move[:, :, None]).sum(-1)
    for row, head in ((0, 0), (0, 2), (1, 3)):
        counted = missing[row, head].isfinite()
        assert abs((gained - missing)[row, head, counted].mean()) < 0.02 and gained[row, head, counted].std() < 0.15
    # Heads that share a key head, 3 each, are one head with all their queries.
    shared = matching.move_for_mass(query, missing, 2, scale)
    together = (tensor.reshape(2, 2, 120, *tensor.shape[3:]) for tensor in (query, missing))
    torch.testing.assert_close(shared, matching.move_for_mass(*together, 2, scale))
    assert not matching.move_for_mass(query * float("nan"), missing, 6, scale).any()
    assert not matching.move_for_mass(torch.zeros_like(query), missing, 6, scale).any()


@pytest.mark.parametrize("family", ["llama", "yarn", "qwen3", "gpt_neox", "gpt2"])
def test_slots_weigh_as_much_as_all_that_they_stand_for(family, monkeypatch):
    """As they are stored, put where they will be read: what queries miss of all keys' mass, on average."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    of_base = {"rope_parameters": yarn, "max_position_embeddings": 512} if family == "yarn" else None
    model = network("llama" if family == "yarn" else family, of_base=of_base)
    found = []

    class Weighing(matching.Match):
        def __call__(self, slots, limit, rows):
            kept = super().__call__(slots, limit, rows)
            for index, call in self._queries.calls.items():
                found.append(self._mass(slots, index, call) - self._mass(kept, index, call))
            return kept

        def _mass(self, slots, index, call):
            places = (self._first - slots.ages[index].clamp_min(0)).clamp_min(0)
            keys = self._cache.placed(slots.states[index, 0][None], [index], places[None])[0]
            keys = keys.repeat_interleave(call.query.shape[1] // keys.shape[1], 1)
            exists = (slots.ages[index] >= 0).repeat_interleave(call.query.shape[1] // slots.ages.shape[2], 1)
            logits = (call.scale * call.query @ keys.mT).masked_fill(~exists[:, :, None], -torch.inf)
            return logits.logsumexp(-1).mean()

    monkeypatch.setattr("r3mem_fast.memory.writers.matched.Match", Weighing)
    model.compress(ids_of(LENGTH), finish=True)
    moved, found = torch.stack(found), []
    monkeypatch.setattr(matching, "move_for_mass", lambda query, *others: query.new_zeros(1, 1, query.shape[-1]))
    model.compress(ids_of(LENGTH), finish=True)
    kept = torch.stack(found)
    assert len(kept) == 4 and kept.min() > 0.02
    # The queries of a tiny model have not much in common, in the first layer least.
    assert (moved.abs() < 0.8 * kept).all() and moved.mean() < 0.4 * kept.mean(), (moved, kept)


def test_backward_it_learns_to_read_them():
    """The third term of the objective has a gradient, and the memory that it reads none."""
    model = network(first_adapted_layer=0, segment_overlap=0).train()
    context, query = ids_of(30), ids_of(4, seed=1)
    output = model(context, labels=context, query_input_ids=query, terms=["expand", "cycle"])
    output.loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name and p.grad is not None]
    assert any(gradient.abs().sum() > 0 for gradient in gradients)
    with pytest.raises(ValueError, match="leave out the last 4 tokens of a text"):
        network().expand(network().compress(context))
    with pytest.raises(ValueError, match="terms must be some of"):
        model(context, query_input_ids=query, terms=["compress"])
    assert dataclasses.asdict(model.r3mem_config)["memory_writer"] == "matched"


def test_without_a_bar_nothing_is_waited_for(monkeypatch):
    """A bar takes a lock that processes share: a forked child, killed while it held it, kept others for ever."""

    class Held:
        def __new__(cls, *arguments, **settings):
            raise AssertionError("a bar was made")

    monkeypatch.setattr("r3mem_fast.model.tqdm", Held)
    assert network().compress(ids_of(40)).slots.tolist() == [2 * SLOTS]
    with pytest.raises(AssertionError, match="a bar was made"):
        network().compress(ids_of(40), progress=True)
