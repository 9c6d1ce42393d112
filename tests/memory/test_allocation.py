"""Adaptive allocation: heads share the slots of a matched memory, which is then other in each head."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r3mem_fast import Memory, R3MemConfig, R3MemModel, R3MemPipeline, RefineSettings
from r3mem_fast.cli.main import main
from r3mem_fast.integrations.scoped import temporarily
from r3mem_fast.memory.file import read_header
from r3mem_fast.memory.prefix import placed_prefix, with_own_slots
from r3mem_fast.memory.slots import Slots, slots_of
from r3mem_fast.memory.states import with_gaps, without_gaps
from r3mem_fast.memory.writers import allocation
from r3mem_fast.memory.writers.allocation import of_like_width, shared_places
from r3mem_fast.training.refine import refine
from tests.reversible.tiny import build

SLOTS, LENGTH = 4, 16
FAMILIES = ("llama", "qwen3", "gpt_neox", "gpt2", "mistral", "gemma2")


@pytest.fixture(autouse=True)
def small_heads(monkeypatch):
    """Heads may have one slot, as here they have few on average."""
    monkeypatch.setattr(allocation, "_LEAST_SLOTS", 1)


def network(family="llama", **changes):
    given = {"num_memory_tokens": SLOTS, "memory_budget": 3 * SLOTS, "segment_length": LENGTH, "segment_overlap": 2}
    given |= {"memory_writer": "matched", "memory_allocation": "adaptive", "adapter_rows": "memory", **changes}
    torch.manual_seed(0)
    return R3MemModel(build(family, scale=2.0), R3MemConfig(core=(1, 3), **given)).eval()


def ids_of(tokens, rows=1, seed=0):
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def of_heads(memory):
    """Slots of each head that are not pinned, int64 `[layers, B, kv_heads]`."""
    return (memory.ages > 0).sum(-1) - memory.pinned_slots()[None, :, None]


def with_noise(memory):
    """The memory with noise where a head has no slot."""
    noise = torch.randn_like(memory.states) * (memory.ages == 0)[:, None, ..., None]
    return dataclasses.replace(memory, states=memory.states + 9 * noise)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 30), st.integers(1, 30), st.integers(0))
def test_keys_that_stay_are_the_best_of_all_heads(layers, rows, heads, keys, limit, seed):
    least = min(limit, max(1 + seed % 9, limit // 4))
    with temporarily(allocation, _LEAST_SLOTS=1 + seed % 9):
        check_that_the_best_stay(layers, rows, heads, keys, limit, seed, least)


def check_that_the_best_stay(layers, rows, heads, keys, limit, seed, least):
    draw = torch.Generator().manual_seed(seed % 2**31)
    weights = torch.rand(layers, rows, heads, keys, generator=draw)
    none = torch.rand(rows, keys, generator=draw) < 0.2  # padding, the same in all heads
    weights = weights.masked_fill(none[None, :, None], -1)
    pinned = (torch.arange(keys) < 2)[None] & ~none
    weights = weights.masked_fill(pinned[None, :, None], torch.inf)
    stays = shared_places(weights, limit)
    assert not stays[(weights < 0)].any() and stays[weights == torch.inf].all()
    others = stays & (weights != torch.inf)
    exist = ((weights >= 0) & (weights != torch.inf)).sum(-1)
    counts = others.sum(-1)
    assert (counts >= torch.minimum(exist, torch.tensor(least))).all()
    assert (counts <= 4 * limit).all()
    for row in range(rows):
        room = limit * layers * heads * bool((exist[:, row] > 0).any() | (weights[:, row] == torch.inf).any())
        most = torch.minimum(exist[:, row], torch.tensor(4 * limit)).sum()
        assert counts[:, row].sum() == min(room, int(most))
        for layer in range(layers):
            for head in range(heads):  # within a head, none stays that is worth less than one that goes
                here, kept = weights[layer, row, head], others[layer, row, head]
                gone = (here >= 0) & (here != torch.inf) & ~kept
                if kept.any() and gone.any():
                    assert here[kept].min() >= here[gone].max()


@given(st.lists(st.integers(0, 300)))
def test_layers_of_like_width_are_together(widths):
    found = of_like_width(widths)
    assert sorted(place for places in found for place in places) == list(range(len(widths)))
    for places in found:
        here = [widths[place] for place in places]
        assert len(here) == 1 or max(here) < 2 * min(here)
    least = [min(widths[place] for place in places) for places in found]
    assert all(2 * small <= large for small, large in itertools.pairwise(least))


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_have_other_numbers_of_slots_and_as_many_on_average(family):
    model = network(family)
    memory = model.compress(ids_of(LENGTH, rows=2), finish=True)
    counts = of_heads(memory)
    assert counts.unique().numel() > 1 and counts.min() >= SLOTS // 4 and counts.max() <= 4 * SLOTS
    assert (counts.sum((0, 2)) == SLOTS * counts.shape[0] * counts.shape[2]).all()
    assert memory.slots.tolist() == counts.amax((0, 2)).tolist()
    uniform = network(family, memory_allocation="uniform").compress(ids_of(LENGTH, rows=2), finish=True)
    assert memory.nbytes - memory.tensors()["head_slots"].nbytes == uniform.nbytes  # the same slots, stored


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_a_head_does_not_have_it_does_not_read(family, attention):
    model = network(family)
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("sdpa caps no logits")
    model.config._attn_implementation = attention
    model.generation_config.eos_token_id = None
    memory, text = model.compress(ids_of(70, rows=2)), ids_of(9, rows=2, seed=1)
    # Windows of all layers have room for all that they see.
    assert (memory.ages == 0).any() or family == "mistral"
    logits = model(text, memory=memory).logits
    assert torch.equal(model(text, memory=with_noise(memory)).logits, logits)
    written = model.generate(text, memory=memory, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(text, memory=with_noise(memory), max_new_tokens=5, do_sample=False), written)
    # What is written is what reading says.
    again = model(written[:, :-1], memory=memory).logits[:, text.shape[1] - 1 :].argmax(-1)
    assert torch.equal(again, written[:, text.shape[1] :])


@torch.no_grad()
def test_a_layer_reads_what_some_head_of_it_has_and_no_more():
    """A memory has as many columns as the widest head of all layers; most layers read fewer."""
    model = network()
    memory, text = model.compress(ids_of(70, rows=2), finish=True), ids_of(9, rows=2, seed=1)
    used = (memory.ages > 0).any(2).any(1).sum(-1)
    assert used.unique().numel() > 1 and used.max() <= memory.states.shape[4]
    cache = model.reading_cache(memory, keep=False)
    model.reader.decode(model.reader.embeddings_of(text), torch.ones_like(text), cache, ids=text)
    assert [cache.past(layer)[0].shape[2] for layer in range(len(used))] == used.tolist()
    prefix = placed_prefix(model, memory, uneven=True)
    trimmed, own = with_own_slots(model, memory, prefix)
    widths = [len(prefix), *used[1:].tolist()]  # a cache is as long as its first layer
    assert [keys.shape[2] for keys in trimmed.keys] == [values.shape[2] for values in trimmed.values] == widths
    assert [slots.present.sum().item() for slots in own.values()] == [
        (memory.ages[layer] > 0).repeat_interleave(2, 1).sum().item() for layer in range(len(used))
    ]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_the_base_model_writes_what_the_network_writes(family, settings):
    """Behind a cache of transformers, with masks of each head, and behind a `PrefixCache` of reversible layers."""
    model = network(family)
    rows = [model.compress(ids_of(count, seed=count)) for count in (70, 20, 3)]
    memory = Memory.cat(rows)
    text, mask = ids_of(6, rows=3, seed=1), torch.ones(3, 6, dtype=torch.int64)
    mask[1, :4] = 0
    given = {"memory": memory, "max_new_tokens": 6, "do_sample": False, **settings}
    written = model.generate(text, mask, **given)
    assert torch.equal(model.generate(text, mask, prefill_chunk_size=64, **given), written)


@torch.no_grad()
def test_a_key_that_has_gone_is_as_if_it_had_never_been():
    """Where all heads have as many slots, a memory is read as a uniform one with these slots, to the bit."""
    model = network(segment_overlap=0)
    memory, text = model.compress(ids_of(LENGTH), finish=True), ids_of(3, seed=1)
    whole = model.empty_memory(memory_tokens=LENGTH, memory_budget=3 * LENGTH)
    whole = model.compress(ids_of(LENGTH), memory=whole, finish=True)
    assert (whole.ages > 0).all() and whole.slots.tolist() == [LENGTH]
    with temporarily(allocation, _LEAST=1.0, _MOST=1.0):  # all heads alike: a memory without a gap
        even = model.compress(ids_of(LENGTH), finish=True)
    assert (even.ages > 0).all()
    plain = dataclasses.replace(even, layout=dataclasses.replace(even.layout, allocation="uniform"))
    other = network(segment_overlap=0, memory_allocation="uniform")
    plain = dataclasses.replace(plain, origin=other.origin())
    assert torch.equal(other(text, memory=plain).logits, model(text, memory=even).logits)
    assert not torch.equal(model(text, memory=memory).logits, model(text, memory=even).logits)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 120), st.integers(0, 5), st.sampled_from(["forget", "rematch"]), st.booleans(), st.integers(1, 3)
)
def test_files_rows_and_pieces(tokens, pinned, beyond, finish, rows):
    model = network(beyond_budget=beyond)
    ids = ids_of(tokens, rows=rows, seed=tokens)
    memory = model.compress(ids, finish=finish, pinned=pinned)
    layers, _, _, heads, _, _ = memory.states.shape
    counts = of_heads(memory)
    # The first slot of a head stays, whatever goes.
    assert (counts.sum((0, 2)) <= (3 * SLOTS + 1) * layers * heads).all()
    # Pinned slots are those of the first tokens, in every head.
    first = memory.slots - torch.minimum(memory.slots, memory.pinned_slots())
    assert (memory.slots == 0).all() or (memory.states.shape[4] == memory.slots.max() and (first >= 0).all())
    assert Memory.cat(memory.split()).tensors().keys() == memory.tensors().keys()
    for name, tensor in Memory.cat(memory.split()).tensors().items():
        assert torch.equal(tensor, memory.tensors()[name]), name
    stored = without_gaps(memory.states, memory.ages)
    kept = torch.minimum(memory.slots, memory.pinned_slots())
    again = with_gaps(stored["states"], stored["ages"], stored["head_slots"], memory.slots, kept)
    assert torch.equal(again[0], memory.states) and torch.equal(again[1], memory.ages)
    cut = tokens // 2
    first_part = model.compress(ids[:, :cut], pinned=pinned) if cut else None
    if first_part is not None and not pinned:
        both = model.compress(ids[:, cut:], memory=first_part, finish=finish)
        assert torch.equal(both.ages, memory.ages) and torch.equal(both.states, memory.states)


def test_a_file_has_no_gaps_and_comes_back(tmp_path):
    model = network()
    memory = model.compress(ids_of(70, rows=2), pinned=3)
    memory.save(tmp_path / "memory.safetensors")
    again = Memory.load(tmp_path / "memory.safetensors", model)
    assert torch.equal(again.states, memory.states) and torch.equal(again.ages, memory.ages)
    header = read_header(tmp_path / "memory.safetensors")
    assert header.metadata["format_version"] == 4
    heads = memory.ages.shape[0] * memory.ages.shape[2]
    average = [-(-int((memory.ages[:, row] > 0).sum()) // heads) for row in range(2)]
    assert [row["slots"] for row in header.rows] == average
    uniform = network(memory_allocation="uniform").compress(ids_of(70, rows=2), pinned=3)
    assert abs(memory.nbytes - uniform.nbytes) < 0.1 * uniform.nbytes
    with pytest.raises(ValueError, match="made with other adapters or settings"):
        Memory.load(tmp_path / "memory.safetensors", network(segment_overlap=0, memory_writer="anchored"))


def test_a_head_may_have_more_slots_than_tokens_are_told_apart(tmp_path):
    """What is older than the reach has its age, and slots all the same; a file of such a memory is read."""
    model = network(memory_budget=256)
    memory = model.compress(ids_of(16 * LENGTH))
    assert int(memory.slots[0]) > memory.layout.reach
    memory.save(tmp_path / "memory.safetensors")
    again = Memory.load(tmp_path / "memory.safetensors", model)
    assert torch.equal(again.states, memory.states) and torch.equal(again.ages, memory.ages)


def test_slots_beyond_the_budget_go_by_their_age():
    draw = torch.Generator().manual_seed(0)
    ages = torch.tensor([[[[40, 30, 20, 10], [-1, -1, 35, 5]]]])
    slots = Slots(torch.randn(1, 2, 1, 2, 4, 3, generator=draw), ages, torch.ones(1, 4).bool(), torch.tensor([0]))
    assert slots.filled().tolist() == [3]
    left = slots.youngest(2)
    # Four slots of two heads: the first of each, and the youngest of the others.
    assert left.ages.tolist() == [[[[40, 10], [35, 5]]]]
    assert torch.equal(left.states[0, :, 0, 0], slots.states[0, :, 0, 0, [0, 3]])
    pinned = slots._replace(pinned=torch.tensor([1])).youngest(1)
    assert pinned.ages.tolist() == [[[[40, 10], [35, 5]]]]
    packed = slots.packed()
    assert packed.ages.tolist() == [[[[40, 30, 20, 10], [-1, -1, 35, 5]]]] and packed.counts.tolist() == [4]


def test_what_reads_all_heads_alike_refuses_them():
    model = network()
    memory, text = model.compress(ids_of(70)), ids_of(3, seed=1)
    with pytest.raises(ValueError, match="no other engine knows"):
        memory.to_prefix(model)
    with pytest.raises(ValueError, match='memory_allocation="uniform"'):
        model.generate(text, memory=memory, max_new_tokens=2, cache_implementation="static")
    apart = network()
    apart.config._attn_implementation = "r3mem"
    with pytest.raises(ValueError, match="adaptive allocation"):
        apart.compress(ids_of(70))
    with pytest.raises(ValueError, match="memory_allocation must be one of"):
        R3MemConfig(memory_allocation="some")
    strict = network(beyond_budget="error")
    with pytest.raises(ValueError, match="its budget is 12"):
        strict.compress(ids_of(90))


@torch.no_grad()
def test_a_memory_of_a_memory_goes_on_from_its_own_slots():
    model = network()
    memory = model.compress(ids_of(34))
    moved = slots_of(memory, torch.tensor([5]))
    assert torch.equal(moved.ages >= 0, memory.ages > 0)
    assert torch.equal(moved.ages[moved.ages >= 0], memory.ages.long()[memory.ages > 0] + 5)


def test_it_can_be_refined():
    model, text = network(), ids_of(40)
    memory = model.compress(text)
    quick = RefineSettings(steps=20, asked_tokens=12, learning_rate=0.1)
    report = refine(model, memory, [text[0]], lambda piece: [piece], quick, progress=False)
    assert torch.equal(report.memory.states[:, 1][memory.ages == 0], memory.states[:, 1][memory.ages == 0])
    assert sum(report.losses[0][-5:]) < sum(report.losses[0][:5])


def test_anchors_learn_with_it():
    model = network(memory_writer="anchored")
    plain = network()
    memory, its = (some.compress(ids_of(70, rows=2)) for some in (model, plain))
    assert torch.equal(memory.states, its.states) and torch.equal(memory.ages, its.ages)
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    loss = model(ids_of(3 * LENGTH), labels=ids_of(3 * LENGTH)).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_command_makes_them(folder, tmp_path, capsys):
    text, memory = str(tmp_path / "fog.txt"), str(tmp_path / "m.safetensors")
    (tmp_path / "fog.txt").write_text("A fog came in from the sea, and the bell rang all night.")
    sizes = ["--memory-tokens", "4", "--memory-budget", "8", "--segment-length", "16", "--segment-overlap", "0"]
    model = ["--model", str(folder), "--dtype", "float32"]
    assert main(["compress", text, *model, "-o", memory, *sizes, "--memory-allocation", "adaptive"]) == 0
    assert main(["inspect", memory]) == 0
    assert "adaptive allocation" in capsys.readouterr().out
    assert main(["generate", "A fog", "--memory", memory, *model, "--max-new-tokens", "3"]) in (0, 1)
    pipeline = R3MemPipeline(str(folder), dtype="float32")
    assert isinstance(pipeline.generate("A fog", memory=memory, max_new_tokens=3), str)
