"""Anchored memories: matched ones with a change that adapters learn, at copies of the tokens that most heads keep."""

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from r3mem_fast import Memory, R3MemConfig, R3MemModel
from r3mem_fast.batching import Rows
from r3mem_fast.integrations.compat import cache_argument
from r3mem_fast.integrations.peft import adapters_off
from r3mem_fast.integrations.scoped import temporarily
from r3mem_fast.memory.segments import cut_segments
from r3mem_fast.objective import history_loss
from r3mem_fast.reversible.stack import Mode
from r3mem_fast.training.collate import collate_ids
from r3mem_fast.training.history import train
from r3mem_fast.training.settings import TrainSettings
from r3mem_fast.writing import writer_of
from tests.reversible.tiny import assert_same_gradients, build, gradients

SLOTS, LENGTH, OVERLAP = 4, 16, 4
ABSOLUTE = ("gpt2", "opt")
FAMILIES = ("llama", "qwen3", "gpt_neox", "olmo2", "gpt2", "opt", "mistral", "gemma2")


def network(writer="anchored", family="llama", learned=0.3, **changes):
    """A model whose adapters have learned something at random, but for the matched one."""
    given = {"num_memory_tokens": SLOTS, "memory_budget": 2 * SLOTS, "segment_length": LENGTH}
    given |= {"segment_overlap": OVERLAP, "adapter_rows": "memory", "core": (1, 3), **changes}
    torch.manual_seed(0)
    model = R3MemModel(build(family, scale=2.0), R3MemConfig(memory_writer=writer, **given)).eval()
    if writer == "anchored" and learned:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            model.memory_embeddings.normal_(std=learned, generator=generator)
            for name, parameter in sorted(model.named_parameters()):
                if "lora_B" in name:
                    parameter.normal_(std=learned, generator=generator)
    return model


def ids_of(tokens, rows=1, seed=0):
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_before_training_it_is_the_matched_memory_to_the_bit(family):
    ids = ids_of(70, rows=2)
    anchored, matched = network(family=family, learned=0), network("matched", family)
    mine, its = anchored.compress(ids), matched.compress(ids)
    assert torch.equal(mine.states, its.states) and torch.equal(mine.ages, its.ages)
    text = ids_of(5, rows=2, seed=1)
    pairs = ((anchored, mine), (matched, its))
    written = [model.generate(text, memory=memory, max_new_tokens=6, do_sample=False) for model, memory in pairs]
    assert torch.equal(*written)
    learned, its = (model.compress(ids[:, :LENGTH]) for model in (network(family=family), matched))
    assert torch.equal(learned.ages, its.ages) and (learned.states - its.states).abs().max() > 1e-2


def places_of(memory, fresh):
    """Places of the tokens that slots are of, `[layers, rows, kv_heads, slots]`, after a single segment."""
    return fresh - memory.ages


def most_kept(places, count):
    """The tokens that most heads keep, the first of equals, in order: counted in Python."""
    votes = {}
    for place in places.flatten().tolist():
        votes[place] = votes.get(place, 0) + 1
    return sorted(sorted(votes, key=lambda place: (-votes[place], place))[:count])


def changes_by_hand(model, ids, anchors):
    """What adapters change in the keys and values of anchors behind a text, with transformers' own cache."""
    first, fresh = model.layout.first_position, ids.shape[1]
    token_ids = ids[:, anchors]
    positions = torch.tensor([[first + place - fresh for place in anchors]])

    def read(adapted):
        with model.disable_adapters():
            cache = DynamicCache(config=model.config)
            before = torch.arange(first, first + fresh)[None] - (0 if model.config.model_type in ABSOLUTE else fresh)
            found = cache_argument(model.plain_model, cache)
            model.plain_model(ids, position_ids=before, use_cache=True, **found)
        embeddings = model.plain_model.get_input_embeddings()(token_ids)
        off = contextlib.nullcontext() if adapted else adapters_off(model.peft_model)
        with model.stack.in_mode(Mode.PLAIN), off:
            embeddings = embeddings + model.memory_embeddings if adapted else embeddings
            model.plain_model(inputs_embeds=embeddings, position_ids=positions, use_cache=True, **found)
        return torch.stack([torch.stack([layer.keys, layer.values])[..., fresh:, :] for layer in cache.layers])

    return read(adapted=True) - read(adapted=False)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", *ABSOLUTE])
@torch.no_grad()
def test_changes_are_those_of_anchors_by_hand(family):
    """One segment; keys only where nothing rotates them, because they are kept without positions."""
    model, ids = network(family=family), ids_of(LENGTH)
    mine, its = model.compress(ids), network("matched", family).compress(ids)
    fresh = LENGTH - OVERLAP
    places = places_of(mine, fresh)
    anchors = most_kept(places, SLOTS)
    expected = changes_by_hand(model, ids[:, :fresh], anchors)
    nearest = (places[..., None] - torch.tensor(anchors)).abs().argmin(-1)
    parts = (0, 1) if family in ABSOLUTE else (1,)
    for part in parts:
        change = mine.states[:, part] - its.states[:, part]
        index = nearest[..., None].expand_as(change)
        assert (change - expected[:, part].gather(3, index)).abs().max() < 1e-4 * expected.abs().max()
    assert expected[:, 1].abs().max() > 0.1


@pytest.mark.parametrize("share", [1e-3, 6.0, 100.0])
@torch.no_grad()
def test_no_change_is_longer_than_a_share_of_what_it_changes(share):
    """Longer ones keep their direction, and shorter ones stay what they are, to the bit."""
    ids = ids_of(LENGTH)
    plain, free = network("matched").compress(ids), network().compress(ids).states
    limited = network(longest_change=share).compress(ids).states
    # With a slot for each token, a matched memory without overlap holds the segment's keys and values as they are.
    every = network("matched", num_memory_tokens=LENGTH - OVERLAP, memory_budget=LENGTH).compress(ids).states
    longest = share * every.norm(dim=-1).mean(-1)[..., None, None]
    before, after = free - plain.states, limited - plain.states
    lengths = before.norm(dim=-1, keepdim=True)
    assert torch.equal(
        limited[lengths.expand_as(limited) < 0.999 * longest], free[lengths.expand_as(free) < 0.999 * longest]
    )
    expected = before * (longest / lengths.clamp_min(1e-9)).clamp_max(1)
    assert (after - expected).abs().max() < 1e-4 * free.abs().max()
    shortened = (lengths > longest).float().mean().item()
    assert {1e-3: shortened > 0.9, 6.0: 0 < shortened < 1, 100.0: shortened == 0}[share], shortened


@given(
    st.integers(1, 40),
    st.integers(17, 40),
    st.integers(0, 3),
    st.sampled_from(["forget", "rematch"]),
    st.sampled_from([None, 1.0]),
)
@settings(max_examples=16, deadline=None)
def test_rows_of_several_lengths_are_as_each_alone(short, long, pinned, beyond, longest):
    model = network(beyond_budget=beyond, longest_change=longest)
    width = max(short, long)
    ids, mask = ids_of(width, rows=2), torch.ones(2, width, dtype=torch.int64)
    mask[0, : width - short], mask[1, : width - long] = 0, 0
    both = model.compress(ids, mask, finish=True, pinned=pinned)
    for row, length in enumerate((short, long)):
        alone = model.compress(ids[row : row + 1, width - length :], finish=True, pinned=pinned)
        here = both.rows([row])
        count = int(alone.slots[0])
        assert int(here.slots[0]) == count
        if count:
            mine, its = here.states[..., -count:, :], alone.states[..., -count:, :]
            assert (mine - its).abs().max() <= 1e-3 * its.abs().max().clamp_min(1)


def test_slots_of_earlier_segments_and_pinned_ones_stay():
    model, matched = network(memory_budget=4 * SLOTS), network("matched", memory_budget=4 * SLOTS)
    ids = ids_of(2 * LENGTH)
    first = model.compress(ids[:, :LENGTH], pinned=3)
    both = model.compress(ids[:, LENGTH:], memory=first)
    count = int(first.slots[0])
    assert torch.equal(both.states[..., :count, :], first.states) and int(both.slots[0]) > count
    held = matched.compress(ids[:, :LENGTH], pinned=3).states
    assert torch.equal(first.states[..., :3, :], held[..., :3, :])
    assert not torch.equal(first.states[..., 3:, :], held[..., 3:, :])


def loss_of(model, ids):
    labels = ids.clone()
    labels[:, :LENGTH] = -100
    return history_loss(model, model.new_memory(len(ids), None), Rows(ids, None, labels), None)[0]


@pytest.mark.parametrize("longest", [None, 1.0])
def test_gradients_are_finite_differences(longest):
    """As the base model reads, along a random direction; behind one segment alone, as what is kept of a second one is
    a choice, which no gradient knows of."""
    model, ids = network(longest_change=longest), ids_of(2 * LENGTH, rows=2)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(2)
    along = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in learned]
    loss_of(model, ids).backward()
    slope = sum((p.grad * a).sum().item() for p, a in zip(learned, along, strict=True) if p.grad is not None)
    assert model.memory_embeddings.grad.abs().sum() > 0
    values, step = [], 1e-3
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(learned, along, strict=True):
                parameter += sign * step * direction
            values.append(loss_of(model, ids).item())
            for parameter, direction in zip(learned, along, strict=True):
                parameter -= sign * step * direction
    assert abs(slope) > 0.03  # twenty times what may be wrong
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), abs=1.5e-3)


@pytest.mark.parametrize("adapted", ["memory", "all"])
@pytest.mark.parametrize("kept", ["none", "host"])
def test_what_is_kept_of_segments_changes_no_gradient(kept, adapted):
    """Also where segments run again in the backward pass, in the network that the base model is."""
    model, ids = network(kept_segments=kept, adapter_rows=adapted).train(), ids_of(3 * LENGTH, rows=2)
    loss_of(model, ids).backward()
    stored = network(kept_segments="device", adapter_rows=adapted).train()
    loss_of(stored, ids).backward()
    found, wanted = gradients(model), gradients(stored)
    assert_same_gradients(found, wanted, 1e-5)
    assert max(gradient.abs().max() for gradient in found.values()) > 1e-4


def test_training_reads_as_the_base_model_does():
    """The loss in training is that of inference; a coupled network would have another one: the control."""
    model, ids = network(kept_segments="device"), ids_of(3 * LENGTH, rows=2)
    with torch.no_grad():
        wanted = loss_of(model, ids)
    assert torch.equal(loss_of(model.train(), ids), wanted)
    with temporarily(model, behind_memory=contextlib.nullcontext):
        assert not torch.equal(loss_of(model, ids), wanted)


def test_adapters_are_not_evaluated_where_they_act_on_no_token():
    """Neither in a reading pass nor in its backward pass; and nothing is kept of a first segment."""
    model, ids, tokens = network(kept_segments="device").train(), ids_of(3 * LENGTH, rows=2), []
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(lambda module, given, output: tokens.append(output.shape[-2]))
    loss_of(model, ids).backward()
    assert set(tokens) == {SLOTS}, "of anchors alone"
    tokens.clear()
    with torch.no_grad():
        model(ids[:, :LENGTH], memory=model.compress(ids[:, :LENGTH]))
    assert set(tokens) == {SLOTS}
    before = model.empty_memory(rows=2)
    segment, *_ = cut_segments(before, list(ids), finish=True, writes_all=True)
    hidden, after = writer_of(model, model.layout).read(segment, before)
    assert not hidden.requires_grad and after.states.requires_grad


def test_the_base_model_reads_and_writes_without_adapters():
    model, base, ids, text = network(), network("matched"), ids_of(40), ids_of(6, seed=1)
    assert torch.equal(model(text).logits, base(text).logits)
    memory = model.compress(ids)
    with model.disable_adapters():
        assert torch.equal(model.compress(ids).states, base.compress(ids).states)
        cache = memory.to_cache(model)
        assert cache.prefix_length == int(memory.slots[0])
    with pytest.raises(ValueError, match=r"within `with model.behind_memory\(\):`"):
        memory.to_cache(model)
    prefix = memory.to_prefix(model)
    assert len(prefix) == int(memory.slots[0])


def test_one_adapter_for_memories_of_any_size(tmp_path):
    model, ids, text = network(), ids_of(70), ids_of(6, seed=1)
    small = model.compress(ids, memory_tokens=2)
    assert torch.equal(small.states, model.compress(ids, memory=model.empty_memory(memory_tokens=2)).states)
    assert small.slots.tolist() == [4] and model.compress(ids).slots.tolist() == [8]
    assert model.compress(ids, memory_tokens=3, memory_budget=7).slots.tolist() == [7]
    assert model.compress(ids, memory_budget=16).slots.tolist() == [16]
    small.save(tmp_path / "small.safetensors")
    loaded = Memory.load(tmp_path / "small.safetensors", model)
    assert torch.equal(model(text, memory=loaded).logits, model(text, memory=small).logits)
    with pytest.raises(ValueError, match=r"memory_tokens=17 must lie in 1..16"):
        model.empty_memory(memory_tokens=17)
    for sizes in ({"memory_tokens": 2.5}, {"memory_tokens": 2, "memory_budget": 4.0}, {"memory_tokens": True}):
        with pytest.raises(TypeError, match="must be an int"):
            model.compress(ids, **sizes)
    with pytest.raises(ValueError, match=r"memory_budget=2 must lie in 4..\d+"):
        model.compress(ids, memory_budget=2)
    with pytest.raises(ValueError, match="leave them out where a memory goes on"):
        model.compress(ids, memory=small, memory_tokens=2)
    other = network(learned=0.2)
    with pytest.raises(ValueError, match="made with other adapters or settings"):
        other(text, memory=loaded)
    matched = network("matched")
    few = matched.compress(ids, memory_tokens=2)
    assert few.slots.tolist() == [4] and matched(text, memory=few).logits.shape == (1, 6, 96)


class TestAdaptersThatRead:
    """`adapter_rows="all"`: what is read is adapted, too, in the network without the coupling."""

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
    @torch.no_grad()
    def test_before_training_it_is_the_base_model(self, family):
        model, matched = network(family=family, learned=0, adapter_rows="all"), network("matched", family)
        ids, text = ids_of(70, rows=2), ids_of(5, rows=2, seed=1)
        mine, its = model.compress(ids), matched.compress(ids)
        assert torch.equal(mine.states, its.states) and torch.equal(mine.ages, its.ages)
        assert torch.equal(model(text).logits, matched(text).logits)
        found, wanted = (m(text, memory=of).logits for m, of in ((model, mine), (matched, its)))
        assert torch.equal(found, wanted)
        written = [m.generate(text, memory=of, max_new_tokens=6) for m, of in ((model, mine), (matched, its))]
        assert torch.equal(*written)
        assert torch.equal(model.generate(text, max_new_tokens=6), matched.generate(text, max_new_tokens=6))

    @torch.no_grad()
    def test_it_is_a_match_in_the_merged_model_but_for_the_embedding(self):
        """PEFT's own merged model is another base model, whose matched memories are those without the embedding.

        Every token has a slot, so that rounding changes no choice."""
        sizes = {"num_memory_tokens": LENGTH, "memory_budget": 3 * LENGTH}
        model = network(adapter_rows="all", learned=0.03, **sizes)
        ids, text = ids_of(40, rows=2), ids_of(6, rows=2, seed=1)
        learned = model.compress(ids).states
        with model.merged_adapters():
            assert (model.compress(ids).states - learned).abs().max() < 1e-5 * learned.abs().max()
        model.memory_embeddings.zero_()
        memory = model.compress(ids)
        assert (memory.states - learned).abs().max() > 1e-2
        logits = model(text).logits, model(text, memory=memory).logits
        of_base = {"memory_writer": "matched", "adapter_rows": "memory", **sizes}
        config = R3MemConfig(segment_length=LENGTH, segment_overlap=OVERLAP, **of_base)
        merged = R3MemModel(model.merge_and_unload(), config).eval()
        its = merged.compress(ids)
        assert (its.states - memory.states).abs().max() < 1e-5 * memory.states.abs().max()
        assert torch.allclose(merged(text).logits, logits[0], atol=1e-5)
        assert torch.allclose(merged(text, memory=its).logits, logits[1], atol=1e-5)

    def test_queries_are_learned_as_they_are_read(self):
        """The term of a query behind its context's memory: in the network that `generate` reads with."""
        for rows in ("memory", "all"):
            model, context, query = network(adapter_rows=rows, segment_overlap=0), ids_of(20), ids_of(5, seed=1)
            output = model(**collate_ids([(context[0].tolist(), query[0].tolist())]), terms=["compress"])
            memory, first = model.compress(context, finish=True), torch.full((1, 2), model.start_token_id)
            with torch.no_grad():
                logits = model(torch.cat([first, query], 1), memory=memory).logits[:, 1:]
            targets = torch.cat([query[0], torch.tensor([model.end_token_id])])
            wanted = torch.nn.functional.cross_entropy(logits[0], targets)
            assert torch.isclose(output.compress_loss, wanted, atol=1e-5)
            output.loss.backward()
            assert model.memory_embeddings.grad.abs().sum() > 0

    @pytest.mark.parametrize("kept", ["none", "device"])
    def test_rows_that_read_each_others_memories(self, kept):
        """The last segment is read behind the other row's memory, and taught by the base model without one."""
        settings = {"adapter_rows": "all", "distillation_weight": 1.0, "kept_segments": kept}
        model, ids = network(**settings).train(), ids_of(2 * LENGTH, rows=2)
        model.foreign_share = 1.0
        loss = loss_of(model, ids)
        loss.backward()
        assert model.memory_embeddings.grad.abs().sum() > 0
        model.eval()
        read = ids[:, LENGTH - OVERLAP :]
        with torch.no_grad(), model.behind_memory():
            memory = model.compress(ids[:, :LENGTH])
            others = model.reading_cache(Memory.cat([memory[1], memory[0]]))
            # The last token of the first segment predicts the first one of the second.
            found = model.peft_model(read, past_key_values=others).logits[:, OVERLAP:-1]
            found = torch.cat([model.peft_model(ids[:, :LENGTH]).logits[:, -1:], found], 1).log_softmax(-1)
            with model.disable_adapters():
                wanted = model.peft_model(read).logits[:, OVERLAP:-1]
                wanted = torch.cat([model.peft_model(ids[:, :LENGTH]).logits[:, -1:], wanted], 1).log_softmax(-1)
        expected = (wanted.exp() * (wanted - found)).sum() / wanted[..., 0].numel()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
        model.foreign_share = 0.0
        with torch.no_grad():
            assert loss_of(model.train(), ids).item() != pytest.approx(loss.item(), rel=1e-3)

    def test_dropout_changes_nothing_where_nothing_was_learned(self):
        """Both readings of the anchors drop out the same."""
        model, ids = network(adapter_rows="all", lora_dropout=0.5), ids_of(LENGTH)
        with torch.no_grad():
            model.memory_embeddings.zero_()
        states = []
        for longest in (None, 1e-9):  # with and without what is changed
            model.r3mem_config = dataclasses.replace(model.r3mem_config, longest_change=longest)
            torch.manual_seed(3)
            segment, *_ = cut_segments(model.empty_memory(), list(ids), finish=True, writes_all=True)
            with model.train().behind_memory():
                states.append(writer_of(model, model.layout).read(segment, model.empty_memory())[1].states)
        assert torch.allclose(*states, atol=1e-6)

    @torch.no_grad()
    def test_sizes_caches_and_files(self, tmp_path):
        model, ids, text = network(adapter_rows="all"), ids_of(70), ids_of(6, seed=1)
        model.compress(ids, memory_tokens=2).save(tmp_path / "small.safetensors")
        small = Memory.load(tmp_path / "small.safetensors", model)
        wanted = model(text, memory=small).logits
        assert small.slots.tolist() == [4] and not torch.equal(wanted, model(text, memory=model.compress(ids)).logits)
        with model.behind_memory():
            cache = small.to_cache(model)
            recent = torch.cat([small.recent[0], *small.unfinished])[None]
            found = model.peft_model(torch.cat([recent, text], 1), past_key_values=cache).logits
        assert torch.allclose(found[:, -6:], wanted, atol=1e-4)
        with pytest.raises(ValueError, match=r"within `with model.behind_memory\(\):`"):
            small.to_cache(model)
        with pytest.raises(ValueError, match="only a memory that the base model reads"):
            small.to_prefix(model)
        with model.disable_adapters():
            assert torch.equal(model.compress(ids).states, network("matched").compress(ids).states)
        with pytest.raises(ValueError, match="made with other adapters or settings"):
            network()(text, memory=small)


def test_it_is_saved_and_loaded(tmp_path):
    model, ids = network(), ids_of(40)
    model.save_pretrained(tmp_path)
    base = build("llama", scale=2.0)
    again = R3MemModel.from_pretrained(tmp_path, base).eval()
    assert again.is_anchored and torch.equal(again.compress(ids).states, model.compress(ids).states)


@pytest.mark.parametrize("adapted", ["memory", "all"])
def test_training_improves_on_the_match(tmp_path, adapted):
    """On a text that it sees again and again; and a run that was interrupted would go on (`tests/training`)."""
    sizes = {"num_memory_tokens": 2, "memory_budget": 2, "segment_overlap": 0, "adapter_rows": adapted}
    model = network(learned=0, distillation_weight=1.0, **sizes)
    ids = ids_of(2 * LENGTH)

    def divergence():
        model.train()
        with torch.no_grad():
            return loss_of(model.eval(), ids).item()

    before = divergence()
    report = train(
        model,
        [ids[0].tolist()],
        TrainSettings(steps=40, segments=2, learning_rate=1e-2, warmup_steps=2, drawn_memory_tokens=(2, 3)),
        folder=tmp_path,
        progress=False,
    )
    assert report.losses[-1][1] < 0.7 * report.losses[0][1]
    assert divergence() < before and not model.drawn_sizes
    with pytest.raises(ValueError, match="drawn_memory_tokens is for anchored memories"):
        train(
            network("tokens", adapter_rows="all", memory_budget=None),
            [ids[0].tolist()],
            TrainSettings(steps=1, segments=2, drawn_memory_tokens=(2,)),
            folder=tmp_path / "other",
            progress=False,
        )


def test_what_it_cannot_go_with():
    with pytest.raises(ValueError, match=r"memory_dropout=0\.5 is for memory tokens, not for anchored memories"):
        network(memory_dropout=0.5)
    with pytest.raises(ValueError, match="is for memory tokens, not for anchored memories"):
        network(memory_placement="input")
    with pytest.raises(ValueError, match=r"longest_change=0\.1 is for anchored memories"):
        network("matched", longest_change=0.1)
    with pytest.raises(ValueError, match=r"longest_change=0\.1 is for anchored memories"):
        R3MemConfig(num_memory_tokens=2, longest_change=0.1)
    with pytest.raises(ValueError, match="longest_change must be a number above 0"):
        network(longest_change=0.0)
    with pytest.raises(ValueError, match="drawn_memory_tokens must be positive integers"):
        TrainSettings(drawn_memory_tokens=())
