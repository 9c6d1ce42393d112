"""`R3MemModel` with memory tokens: compress, read, expand, generate; rows of any padding and any memory."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import GenerationConfig

from r3mem_fast import Memory, R3MemConfig, R3MemModel, load_model, reading_backward
from r3mem_fast.choices import PLACEMENTS
from r3mem_fast.tiny_models import tiny_model
from r3mem_fast.training.collate import collate_ids, padded
from tests.reversible.tiny import (
    EXACT_FAMILIES,
    GENERIC_FAMILIES,
    assert_same_gradients,
    build,
    gradients,
    stored_activations,
    token_ids,
)

FAMILIES = [*EXACT_FAMILIES, *GENERIC_FAMILIES]
pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")
SETTINGS = {"core": (1, 3), "fraction_bits": 20, "num_memory_tokens": 3, "segment_length": 8, "max_memory_segments": 3}


def made(family="llama", base=None, **settings):
    base = build(family, scale=2.0) if base is None else base
    base.config.bos_token_id, base.config.eos_token_id = 1, 2
    torch.manual_seed(1)
    model = R3MemModel(base, R3MemConfig(**{**SETTINGS, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def ids_of(tokens, seed=0):
    return token_ids(batch=1, tokens=tokens, seed=seed)


def left_padded(rows):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = torch.tensor(row), 1
    return ids, mask


# Of 8 rows: tokens that their memories are of (no segment, some, more than are kept; with a rest and without), and
# tokens that are read behind them.
HISTORIES = [0, 5, 8, 16, 19, 24, 40, 3]
PROMPTS = [1, 4, 9, 2, 12, 6, 3, 5]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_is_its_rows(family, placement):
    """8 rows with 8 different memories: each row's logits are those of a batch of one, whatever stands beside it."""
    model = made(family, memory_placement=placement)
    histories = [ids_of(n, seed)[0].tolist() if n else [] for seed, n in enumerate(HISTORIES)]
    prompts = [ids_of(n, 50 + seed)[0].tolist() for seed, n in enumerate(PROMPTS)]
    with torch.no_grad():
        together = model.compress(*padded(histories))
        alone = [model.compress(*padded([row])) for row in histories]
        assert together.num_segments.tolist() == [n // 8 for n in HISTORIES]
        for index, memory in enumerate(alone):
            seen = memory.visible().sum()
            assert together[index].visible().sum() == seen
            if seen:  # rounding adds up over the segments
                expected = _kept(memory, seen)
                assert (_kept(together[index], seen) - expected).abs().max() <= 1e-4 * expected.abs().max()
        for ids, mask in (padded(prompts), left_padded(prompts)):
            logits = model(ids, mask, memory=Memory.cat(alone)).logits
            for index, memory in enumerate(alone):
                expected = model(torch.tensor([prompts[index]]), memory=memory).logits[0]
                assert (logits[index, mask[index].bool()] - expected).abs().max() <= 1e-5, index


def _kept(memory, count):
    return memory.states[..., -count:, :]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_changes_what_follows_and_nothing_else_does(family, placement):
    """The logits depend on the memory's visible states, and on nothing in the places that a row does not have."""
    model = made(family, memory_placement=placement)
    with torch.no_grad():
        memory = model.compress(*padded([ids_of(24)[0].tolist(), ids_of(8, 3)[0].tolist()]))
        logits = model(token_ids(), memory=memory).logits
        hidden = ~memory.visible()[1]
        assert hidden.any()
        states = memory.states.clone()
        if placement == "input":
            states[1, hidden] = 5.0
        else:
            states[:, :, 1, :, hidden] = 5.0
        assert torch.equal(model(token_ids(), memory=dataclasses.replace(memory, states=states)).logits, logits)
        zeroed = dataclasses.replace(memory, states=torch.zeros_like(memory.states))
        assert (model(token_ids(), memory=zeroed).logits - logits).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_is_one_shot(family, placement):
    model = made(family, memory_placement=placement)
    ids = ids_of(45)
    whole = model.compress(ids)
    memory = None
    for piece in ids.split([1, 7, 9, 11, 17], dim=1):
        memory = model.compress(piece, memory=memory)
    assert_same(memory, whole)
    assert whole.tokens_seen.tolist() == [45] and whole.num_segments.tolist() == [5]
    assert whole.unfinished[0].tolist() == ids[0, 40:].tolist()


def assert_same(found, expected):
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name
    assert (found.layout, found.origin, found.labels) == (expected.layout, expected.origin, expected.labels)


@given(st.data())
def test_any_batch_is_its_rows(data):
    """Lengths, paddings and pieces of any kind: the same memories as row by row, and streaming is one shot."""
    model = _CACHE.setdefault("model", made())
    lists = st.lists(st.integers(3, 95), max_size=30)
    rows = data.draw(st.lists(lists.filter(bool), min_size=1, max_size=3))
    ids, mask = padded(rows)
    left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    ids = torch.nn.functional.pad(ids, (left, right), value=7)
    mask = torch.nn.functional.pad(mask, (left, right))
    together = model.compress(ids, mask)
    cut = data.draw(st.integers(0, ids.shape[1]))
    streamed = together if cut in (0, ids.shape[1]) else model.compress(ids[:, :cut], mask[:, :cut])
    if streamed is not together:
        streamed = model.compress(ids[:, cut:], mask[:, cut:], memory=streamed)
    for index, row in enumerate(rows):
        expected = model.compress(torch.tensor([row]))
        for found in (together[index], streamed[index]):
            assert found.num_segments == expected.num_segments == len(row) // 8
            assert found.tokens_seen == expected.tokens_seen == len(row)
            assert torch.equal(found.unfinished[0], expected.unfinished[0])
            seen = expected.visible().sum()
            if seen:
                assert (_kept(found, seen) - _kept(expected, seen)).abs().max() <= 1e-4


_CACHE = {}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_is_what_the_tokens_would_have_left(family, placement):
    """The states are those of the memory tokens in one pass of the base model over segment and memory tokens."""
    model = made(family, memory_placement=placement)
    ids = ids_of(8)
    with torch.no_grad():
        memory = model.compress(ids)
        embeddings = torch.cat(
            [model.peft_model.get_input_embeddings()(ids), model.memory_embeddings[None].to(model.peft_model.dtype)], 1
        )
        positions = torch.arange(11)[None] + model.layout.first_position
        output = model.peft_model(
            inputs_embeds=embeddings, position_ids=positions, use_cache=True, output_hidden_states=True
        )
        if placement == "input":
            assert (memory.states - output.hidden_states[-1][:, -3:]).abs().max() <= 1e-4
            return
        for (keys, values), layer in zip(memory.states, output.past_key_values.layers, strict=True):
            assert (values - layer.values[:, :, -3:]).abs().max() <= 1e-4
            # A rotation leaves lengths as they are; tests/reversible/test_rotary.py has the rest.
            assert (keys.norm(dim=-1) - layer.keys[:, :, -3:].norm(dim=-1)).abs().max() <= 1e-4


@pytest.mark.parametrize("form", ["reversed", "inverse"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_is_what_the_logits_say(family, placement, form):
    """Greedy expansion with caches gives what one pass over the result predicts, for each row of a ragged batch."""
    model = made(family, memory_placement=placement, backward=form)
    rows = [([5, 6, 7, 8, 9, 10, 20, 21, 22], [11, 12]), ([20, 21], [13, 14, 15])]
    batch = collate_ids(rows)
    memory = model.compress(batch["input_ids"], batch["attention_mask"])
    alone = model.expand(memory, max_new_tokens=6)
    asked = model.expand(memory, batch["query_input_ids"], batch["query_attention_mask"], max_new_tokens=6)
    for index, (context, query) in enumerate(rows):
        single = model.compress(torch.tensor([context]))
        assert torch.equal(model.expand(single, max_new_tokens=6)[0], alone[index])
        assert torch.equal(model.expand(single, torch.tensor([query]), max_new_tokens=6)[0], asked[index])
    with torch.no_grad():
        # The objective's third term reads the same memory.
        first = model(**batch, terms=["cycle"]).cycle_logits[:, 0].argmax(-1).tolist()
        assert first == [ids[0].item() if len(ids) else 2 for ids in alone]
        if placement == "input":  # whose cache is made in the direction that it is for
            return
        finished = model.compress(*padded([row for row, _ in rows]), finish=True)
        for memory, ids in zip(finished.split(), alone, strict=True):
            cache = memory.to_cache(model)
            with reading_backward(model.peft_model, (1, 3), form=form):
                said = model.peft_model(input_ids=torch.tensor([[1, 1, *ids]]), past_key_values=cache).logits
            assert said[0, 1:].argmax(-1).tolist()[: len(ids)] == ids.tolist()


def test_the_terms_are_what_they_say():
    """compress: the query behind the context's memory, forward; cycle: the context behind it, backward."""
    model = made()
    context, query = [5, 6, 7, 8, 9, 10, 20, 21, 22, 23], [11, 12]
    memory = model.compress(torch.tensor([context]), finish=True)
    assert memory.num_segments == 2 and memory.unfinished[0].tolist() == []

    caches = [memory.to_cache(model) for _ in range(2)]

    def loss(tokens):
        ids = torch.tensor([[1, 1, *tokens, 2]])
        labels = ids.clone()
        labels[:, :2] = -100
        return model.peft_model(input_ids=ids, labels=labels, past_key_values=caches.pop()).loss

    batch = collate_ids([(context, query)])
    with torch.no_grad():
        output = model(**batch)
        assert torch.isclose(output.compress_loss, loss(query), atol=1e-6)
        with reading_backward(model.peft_model, (1, 3)):
            assert torch.isclose(output.cycle_loss, loss(context), atol=1e-6)
        parts = output.compress_loss + output.expand_loss + output.cycle_loss
        assert torch.isclose(output.loss, parts)
        weighed = dataclasses.replace(model.r3mem_config, compress_weight=0.5, expand_weight=0.0, cycle_weight=2.0)
        model.r3mem_config = weighed
        weighed_output = model(**batch)
        assert weighed_output.expand_loss is None
        assert torch.isclose(weighed_output.loss, 0.5 * output.compress_loss + 2.0 * output.cycle_loss)
        # A row without a context has no memory that anything could be read from.
        nothing = model(**collate_ids([([], query)]))
        assert nothing.compress_loss == 0 and nothing.cycle_loss == 0


@pytest.mark.parametrize("rows", ["all", "memory"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_memories(family, placement, rows):
    """Over three segments: as with stored activations, bit for bit; the memory tokens and every adapter get one."""
    model = made(family, memory_placement=placement, adapter_rows=rows).train()
    batch = collate_ids([(ids_of(20)[0].tolist(), [11, 12]), ([5, 6], [13])])

    def step():
        loss = model(**batch).loss
        loss.backward()
        found = loss.item(), gradients(model)
        model.zero_grad(set_to_none=True)
        return found

    loss, found = step()
    with stored_activations(model.peft_model):
        loss_stored, expected = step()
    assert loss == loss_stored
    assert_same_gradients(found, expected, 1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "memory_embeddings" in trained and found.keys() == trained


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_memory_rows_leave_the_base_model_as_it_is(family, placement):
    """Without a memory the logits are the base model's, bit for bit; behind one, only it makes a difference."""
    base = build(family, scale=2.0).eval()
    with torch.no_grad():
        before = base(input_ids=token_ids()).logits
        model = made(family, base=base, memory_placement=placement, adapter_rows="memory")
        assert torch.equal(model(token_ids()).logits, before)
        written = model.compress(ids_of(8))
        with model.peft_model.disable_adapter():
            plain = model(ids_of(5, 9), memory=written).logits
        behind = model(ids_of(5, 9), memory=written).logits
        if placement == "every_layer":
            assert torch.equal(behind, plain)
        with model.peft_model.disable_adapter():
            unadapted = model.compress(ids_of(8))
        assert not torch.equal(unadapted.states, written.states)


def test_adapters_off_is_the_base_model_with_memory_tokens_too():
    base = build(scale=2.0).eval()
    with torch.no_grad():
        before = base(input_ids=token_ids()).logits
        model = made(base=base)
        with model.disable_adapters():
            assert torch.equal(model(token_ids()).logits, before)


# transformers itself has no other implementation of these than eager.
@pytest.mark.parametrize(
    "family, implementation",
    [
        (family, kind)
        for family in FAMILIES
        for kind in ("eager", "sdpa", "r3mem")
        if (family, kind) != ("gemma2", "sdpa")
    ],
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_generated_is_what_the_logits_say(family, placement, implementation):
    """Greedy generation with its cache, for rows of different memories and prompts, past any sliding window."""
    model = made(base=build(family, scale=2.0, attn_implementation=implementation), memory_placement=placement)
    rows, prompts = [ids_of(20)[0].tolist(), ids_of(3, 4)[0].tolist()], [[30, 31, 32, 33], [40]]
    memory = model.compress(*padded(rows))
    ids, mask = left_padded(prompts)
    found = model.generate(ids, mask, memory=memory, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(found[:, :4], ids)
    for index, prompt in enumerate(prompts):
        whole = torch.tensor([[*prompt, *found[index, 4:]]])
        with torch.no_grad():
            said = model(whole, memory=memory[index]).logits[0].argmax(-1)
        assert said[len(prompt) - 1 : -1].tolist() == found[index, 4:].tolist()
        alone = model.generate(torch.tensor([prompt]), memory=memory[index], max_new_tokens=12, eos_token_id=None)
        assert torch.equal(alone[0, len(prompt) :], found[index, 4:])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_attention_reads_what_eager_attention_reads(family, placement):
    """Written, read forward and backward, generated from and trained through, for 4 left-padded rows of any memory."""
    model = made(base=build(family, scale=2.0, attn_implementation="eager"), memory_placement=placement)
    histories = [ids_of(n, seed)[0].tolist() if n else [] for seed, n in enumerate((19, 0, 24, 8))]
    rows = [ids_of(n, 50 + seed)[0].tolist() for seed, n in enumerate((9, 12, 1, 4))]
    ids, mask = left_padded(rows)
    batch = collate_ids([(history or [5], row) for history, row in zip(histories, rows, strict=True)])

    def results():
        memory = model.compress(*padded(histories))
        with torch.no_grad():
            logits = model(ids, mask, memory=memory).logits
            for index, row in enumerate(rows):
                alone = model(torch.tensor([row]), memory=memory[index]).logits[0]
                assert (logits[index, mask[index].bool()] - alone).abs().max() <= 1e-4 * alone.abs().max()
        said = model.generate(ids, mask, memory=memory, max_new_tokens=8, num_beams=2, eos_token_id=None)
        expanded = model.expand(memory, ids, mask, max_new_tokens=4)
        recalled = model.recall(ids, mask, max_new_tokens=4)
        loss = model(**batch).loss  # through the memories of up to three segments
        loss.backward()
        found = gradients(model)
        model.zero_grad(set_to_none=True)
        numbers = (memory.states, logits[mask.bool()], loss.detach())
        return memory, numbers, (said, *expanded, *recalled), found

    memory, *expected = results()
    model.peft_model.set_attn_implementation("r3mem")
    again, *found = results()
    assert again.origin == memory.origin
    for ours, eager in zip(found[0], expected[0], strict=True):
        assert (ours - eager).abs().max() <= 1e-4 * eager.abs().max()
    assert all(torch.equal(ours, eager) for ours, eager in zip(found[1], expected[1], strict=True))
    assert_same_gradients(found[2], expected[2], 1e-3)
    assert "memory_embeddings" in found[2]
    with model.disable_adapters(), torch.no_grad():
        off = model.compress(*padded(histories))
        assert model(ids, mask, memory=off).logits.isfinite().all()


def test_generate_as_transformers_has_it():
    """Sampling, beams, several sequences, a streamer, an output of its own, right-padded prompts; no memory."""
    model = made()
    memory = model.compress(*padded([ids_of(20)[0].tolist(), ids_of(9, 4)[0].tolist()]))
    ids, mask = left_padded([[30, 31, 32], [40]])
    greedy = model.generate(ids, mask, memory=memory, max_new_tokens=6, eos_token_id=None)
    beams = model.generate(ids, mask, memory=memory, max_new_tokens=6, num_beams=3, num_return_sequences=2)
    assert beams.shape[0] == 4 and torch.equal(beams[::2, :3], ids) and torch.equal(beams[1::2, :3], ids)
    single = model.generate(ids[:1], memory=memory[0], max_new_tokens=6, num_beams=3)
    assert torch.equal(single[0], beams[0])
    # A beam is at least as likely as the greedy continuation.
    assert score(model, memory[0], beams[0]) >= score(model, memory[0], greedy[0]) - 1e-4
    torch.manual_seed(0)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "num_return_sequences": 3}
    sampled = model.generate(ids, mask, memory=memory, **settings)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, mask, memory=memory, **settings), sampled)
    assert sampled.shape[0] == 6 and len({tuple(row.tolist()) for row in sampled}) > 2
    right, right_mask = padded([[30, 31, 32], [40]])
    again = model.generate(right, right_mask, memory=memory, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(again[:, 3:], greedy[:, 3:])
    output = model.generate(
        ids, mask, memory=memory, max_new_tokens=6, eos_token_id=None, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(output.sequences, greedy) and len(output.scores) == 6
    assert model.generate(ids, mask, memory=memory, max_length=5, eos_token_id=None).shape[1] == 5
    seen = []

    class Streamer:
        def put(self, value):
            seen.append(value.tolist())

        def end(self):
            seen.append("end")

    model.generate(ids[:1], memory=memory[0], max_new_tokens=6, eos_token_id=None, streamer=Streamer())
    assert seen[0] == ids[:1].tolist()  # without what the memory has not compressed yet
    assert [token for value in seen[1:-1] for token in value] == greedy[0, 3:].tolist() and seen[-1] == "end"
    plain = model.generate(ids[:1], max_new_tokens=3)
    assert torch.equal(plain, model.peft_model.generate(input_ids=ids[:1], max_new_tokens=3))


def test_how_much_is_generated():
    """As transformers decides it; unfinished tokens of a memory do not count, and positions end it with an error."""
    model = made()
    memory, ids = model.compress(ids_of(20)), ids_of(5)  # four are unfinished
    base = model.peft_model.get_base_model()
    base.generation_config.eos_token_id = None

    def tokens(**settings):
        return model.generate(ids, memory=memory, **settings).shape[1] - 5

    assert tokens() == 20
    assert tokens(max_new_tokens=3, max_length=30) == 3
    assert tokens(max_length=11) == 6 == tokens(generation_config=GenerationConfig(max_length=11))
    assert tokens(generation_config=GenerationConfig(max_new_tokens=7)) == 7
    assert tokens(max_new_tokens=110 - 4 + 1) == 107  # 128 positions: 9 of memory, 9 read, the last one is not
    for settings in ({"max_new_tokens": 112}, {"generation_config": GenerationConfig(max_new_tokens=112)}):
        with pytest.raises(ValueError, match="behind a memory of 9, the model has 128 positions"):
            tokens(**settings)
    with pytest.raises(ValueError, match="leaves no token"):
        tokens(max_length=5)
    base.generation_config.max_new_tokens = 4
    assert tokens() == 4 and tokens(max_length=8) == 3
    base.generation_config.eos_token_id = model.generate(ids, memory=memory)[0, 5].item()
    assert tokens(max_new_tokens=9) == 1
    assert tokens(max_new_tokens=9, min_length=8) >= 3 and tokens(max_new_tokens=9, min_new_tokens=5) >= 5


def test_settings_of_generate_that_a_memory_takes_over():
    model = made()
    memory, ids = model.compress(ids_of(20)), ids_of(5)
    settings = {"memory": memory, "max_new_tokens": 8, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), expected)
    base = model.peft_model.get_base_model()
    base.generation_config.use_cache = False
    base.generation_config.cache_implementation = "static"
    assert torch.equal(model.generate(ids, **settings), expected)
    assert base.generation_config.cache_implementation == "static"
    for name, value in (("past_key_values", memory.to_cache(model)), ("cache_implementation", "offloaded")):
        with pytest.raises(ValueError, match=f"{name}.* cannot go with a memory"):
            model.generate(ids, **{name: value}, **settings)
    with pytest.raises(ValueError, match="neither a prompt nor unfinished tokens"):
        model.generate(ids, torch.zeros_like(ids), memory=model.compress(ids_of(16)))
    # Unfinished tokens alone can be continued.
    model.generate(ids, torch.zeros_like(ids), **settings)


@pytest.mark.parametrize("name", ["logits_to_keep", "position_ids", "past_key_values", "output_hidden_states"])
def test_arguments_that_forward_does_not_take_behind_a_memory(name):
    model = made()
    with pytest.raises(ValueError, match=f"behind a memory, forward takes no \\['{name}'\\]"):
        model(ids_of(5), memory=model.compress(ids_of(20)), **{name: 1})


def test_a_copy_chooses_rows_as_the_original_does():
    model = made(adapter_rows="memory")
    again = copy.deepcopy(model)
    memory = model.compress(ids_of(20))
    assert torch.equal(again.compress(ids_of(20)).states, memory.states)
    with torch.no_grad():
        assert torch.equal(again(ids_of(5), memory=memory).logits, model(ids_of(5), memory=memory).logits)


def test_adapters_that_cannot_choose_rows():
    for config in (
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    ):
        base = get_peft_model(build(), config)
        with pytest.raises(ValueError, match='adapter_rows="memory" needs one adapter, LoRA on linear modules'):
            R3MemModel(base, R3MemConfig(**SETTINGS, adapter_rows="memory"))
        R3MemModel(base, R3MemConfig(**SETTINGS))
    model = made(adapter_rows="memory")
    model.peft_model.merge_adapter()
    with pytest.raises(ValueError, match="not merged"):
        model.compress(ids_of(20))
    prompt = get_peft_model(build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="the PeftModel learns a prompt"):
        R3MemModel(prompt, R3MemConfig(**SETTINGS))


def test_whose_memory_it_is():
    """What changes the states that a model writes changes the origin; what does not, does not."""
    model = made()
    memory = model.compress(ids_of(20))
    mine = memory.origin
    with model.disable_adapters():
        off = model.compress(ids_of(20))
        model(ids_of(5), memory=memory), model(ids_of(5), memory=off)
    assert off.origin.base == mine.base and off.origin != mine and model.origin() == mine
    with pytest.raises(ValueError, match="other adapters or settings"):
        model(ids_of(5), memory=off)
    with model.peft_model.disable_adapter():
        assert model.compress(ids_of(20)).origin == off.origin
    with reading_backward(model.peft_model, (1, 3)), pytest.raises(RuntimeError, match="before the model is read"):
        model.compress(ids_of(20))
    assert made().to(torch.bfloat16).to(torch.float32).origin() != mine  # rounded
    half = made().to(torch.bfloat16)
    assert half.origin() == half.to(torch.float32).origin()
    layer = next(m for m in model.peft_model.modules() if hasattr(m, "lora_A"))
    layer.scaling["default"] *= 2
    assert model.origin() != mine
    layer.scaling["default"] /= 2
    assert model.origin() == mine
    with torch.no_grad():
        model.peft_model.get_base_model().lm_head.weight.add_(1.0)
    assert model.origin().base != mine.base


def test_memories_under_autocast():
    model = made()
    expected = model.compress(ids_of(20))
    model = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.compress(ids_of(20))
        assert model(**collate_ids([([5, 6, 7], [8])])).loss.isfinite()
    assert (found.states - expected.states).abs().max() < 0.2 * expected.states.abs().max()


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = made()
        memory = model.compress(ids_of(20))
        assert model(ids_of(5), memory=memory).logits.isfinite().all()


def score(model, memory, sequence):
    """Log-probability of what follows the first three tokens."""
    with torch.no_grad():
        said = model(sequence[None], memory=memory).logits[0].log_softmax(-1)
    return said[2:-1].gather(1, sequence[3:, None]).sum()


def test_what_a_memory_cannot_go_with_is_refused():
    model = made()
    memory = model.compress(ids_of(20))
    ids = ids_of(5)
    other = made(num_memory_tokens=4)
    without = made(num_memory_tokens=0)
    with pytest.raises(ValueError, match="other adapters or settings"):
        without(ids, memory=memory)
    with pytest.raises(ValueError, match="other adapters or settings"):
        model(ids, memory=without.compress(ids))
    small = R3MemModel(build(max_position_embeddings=32), R3MemConfig(core=(1, 3)))
    with pytest.raises(ValueError, match="a model of 32 positions is too small for memories"):
        small.compress(ids)
    with pytest.raises(ValueError, match="other adapters or settings"):
        other(ids, memory=memory)
    with pytest.raises(ValueError, match="2 rows of tokens and 1 of memory"):
        model(torch.cat([ids, ids]), memory=memory)
    with pytest.raises(ValueError, match="2 rows of tokens and 1 of memory"):
        model.generate(torch.cat([ids, ids]), memory=memory)
    with pytest.raises(ValueError, match="2 rows of tokens and 1 of memory"):
        model.compress(torch.cat([ids, ids]), memory=memory)
    with pytest.raises(ValueError, match="2 rows of tokens and 1 of memory"):
        model.expand(memory, torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="nothing to compress"):
        model.compress(None)
    with pytest.raises(ValueError, match=r"must be int64 \[batch, tokens\]"):
        model.compress(torch.ones(2, 3))
    with pytest.raises(ValueError, match="behind a memory of 9, the model has 128 positions"):
        model(ids_of(126), memory=memory)
    with pytest.raises(ValueError, match="behind a memory of 9, the model has 128 positions"):
        model.generate(ids, memory=memory, max_new_tokens=120)
    with torch.no_grad():
        model.memory_embeddings.add_(1.0)
    with pytest.raises(ValueError, match="other adapters or settings"):
        model(ids, memory=memory)
    foreign = made(base=build(scale=2.0, seed=5))
    with pytest.raises(ValueError, match="another base model"):
        foreign(ids, memory=memory)


def test_a_memory_is_never_dropped_in_silence():
    """An attention implementation that cannot read it, and a model that does not know of it, raise."""
    model = made()
    memory = model.compress(ids_of(20))
    config = model.peft_model.get_base_model().config
    before = config._attn_implementation
    for implementation in ("flash_attention_2", "flex_attention"):
        config._attn_implementation = implementation
        with pytest.raises(ValueError, match=f"attn_implementation='{implementation}' cannot read a memory"):
            model(ids_of(5), memory=memory)
        with pytest.raises(ValueError, match="cannot read a memory"):
            model.compress(ids_of(20))
    config._attn_implementation = before
    with pytest.raises(RuntimeError, match="does not know how to read it"):
        build()(ids_of(5), past_key_values=memory.to_cache(model))
    with pytest.raises(ValueError, match="the cache is of another model's memory"):
        made().peft_model(input_ids=ids_of(5), past_key_values=memory.to_cache(model))


def test_memories_that_are_kept():
    """max_memory_segments: the last n; None: all, and one more than fit is an error, before anything is lost."""
    model = made(max_memory_segments=2)
    memory = model.compress(ids_of(40))
    assert memory.num_segments.tolist() == [5] and memory.states.shape[4] == 6
    # The last of them was written by this model behind the one before it.
    before = model.compress(ids_of(32))
    assert torch.equal(memory.states[..., :3, :], before.states[..., 3:, :])
    model = made(max_memory_segments=None)
    limit = model.layout.readable_segments
    assert limit * 3 + 8 + 3 <= 128
    kept = model.compress(torch.full((1, limit * 8), 7))
    assert kept.num_segments.tolist() == [limit]
    with pytest.raises(ValueError, match=f"keeps {limit} segments"):
        model.compress(torch.full((1, 8), 7), memory=kept)
    model.compress(torch.full((1, 7), 7), memory=kept)
    with pytest.raises(ValueError, match="do not fit into the model's 128 positions"):
        made(segment_length=120)


@pytest.mark.parametrize("segments", [1, 3, None])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_positions_never_grow(placement, segments):
    """However long the history: every segment at one place, and none beyond the model's positions."""
    model = made(memory_placement=placement, max_memory_segments=segments)
    first = model.layout.first_position
    tokens = 8 * min(40, model.layout.readable_segments if segments is None else 40)
    seen = []
    decoder = model.peft_model.get_base_model().model
    hook = decoder.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args + tuple(kwargs.values()))[1]), with_kwargs=True
    )
    memory = model.compress(torch.full((1, tokens), 7))
    model.generate(ids_of(3), memory=memory, max_new_tokens=4)
    hook.remove()
    whole = [positions for positions in seen if positions.shape[-1] == 11]
    assert len(whole) >= tokens // 8 and max(p.max() for p in seen) < 128
    assert all(positions[0].tolist() == list(range(first, first + 11)) for positions in whole)


def test_compressing_computes_no_logits_and_says_how_far_it_is(capsys):
    model = made()
    calls = []
    model.peft_model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    model.compress(ids_of(40), progress=True)
    assert not calls
    shown = capsys.readouterr().err
    assert "100%" in shown and "tok/s" in shown


def test_modes_and_inputs_are_left_as_they_were():
    model = made().train()
    memory = model.compress(ids_of(20))
    tensors = {name: tensor.clone() for name, tensor in memory.tensors().items()}
    model.expand(memory, max_new_tokens=3)
    model.generate(ids_of(5), memory=memory, max_new_tokens=3)
    model.compress(ids_of(20), memory=memory)
    assert model.training
    assert all(torch.equal(tensor, memory.tensors()[name]) for name, tensor in tensors.items())


def test_saved_with_its_memory_tokens(tmp_path, folder):
    """A memory serves the model that is loaded again, and no other."""
    base, _ = load_model(str(folder))
    model = made(base=base)
    memory = model.compress(ids_of(20))
    memory.save(tmp_path / "memory.safetensors")
    model.save_pretrained(tmp_path / "model")
    again = R3MemModel.from_pretrained(tmp_path / "model")
    found = Memory.load(tmp_path / "memory.safetensors", model=again)
    assert_same(again.compress(ids_of(7), memory=found), model.compress(ids_of(7), memory=memory))
    with torch.no_grad():
        assert torch.equal(again(ids_of(5), memory=found).logits, model(ids_of(5), memory=memory).logits)
    (tmp_path / "model" / "memory_tokens.safetensors").unlink()
    with pytest.raises(OSError, match="is incomplete: memory_tokens"):
        R3MemModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_overlap_is_carried_by_the_memory(placement, tmp_path):
    """In pieces, through a file, in rows: the tokens before a segment are read with it, by whatever reads it."""
    model = made(memory_placement=placement, segment_overlap=3)
    ids = ids_of(45)
    whole = model.compress(ids)
    memory = None
    for piece in ids.split([1, 7, 9, 11, 17], dim=1):
        memory = model.compress(piece, memory=memory)
        memory.save(tmp_path / "memory")
        memory = Memory.load(tmp_path / "memory", model=model)
    assert_same(memory, whole)
    assert whole.recent[0].tolist() == ids[0, 37:40].tolist() and whole.unfinished[0].tolist() == ids[0, 40:].tolist()
    both = Memory.cat([whole, model.compress(ids_of(11, 3))])
    assert [len(row) for row in both.recent] == [3, 3]
    assert both.rows([1, 0]).recent[1].tolist() == whole.recent[0].tolist()
    # Behind the memory stand the overlap, what is unfinished, and the prompt.
    prompt = ids_of(4, 9)
    with torch.no_grad():
        logits = model(prompt, memory=whole).logits
        longer = dataclasses.replace(whole, recent=(ids[0, :0],), unfinished=(ids[0, 37:],))
        assert torch.equal(logits, model(prompt, memory=longer).logits)
    generated = model.generate(prompt, memory=whole, max_new_tokens=3, do_sample=False)
    assert generated[0, 4] == logits[0, -1].argmax() and generated[0, :4].tolist() == prompt[0].tolist()
    for broken in ({"recent": (ids[0, :4],)}, {"recent": ()}):
        dataclasses.replace(whole, **broken).save(tmp_path / "broken")
        with pytest.raises(ValueError, match="its recent tokens are not what it says"):
            Memory.load(tmp_path / "broken")
    with pytest.raises(ValueError, match="layout is"):
        made(memory_placement=placement, segment_overlap=2).check_memory(
            dataclasses.replace(whole, origin=made(memory_placement=placement, segment_overlap=2).origin())
        )


def test_memories_of_before_there_was_an_overlap():
    """Files of them name none, and have the tensors that they had."""
    memory = made().compress(ids_of(20))
    assert set(memory.tensors()) == {"states", "num_segments", "tokens_seen", "unfinished", "unfinished_lengths"}
    layout = dataclasses.asdict(memory.layout)
    del layout["segment_overlap"]
    assert type(memory.layout)(**layout) == memory.layout


@pytest.mark.parametrize("settings", [{}, {"memory_placement": "input"}, {"memory_writer": "matched"}])
def test_bases_that_have_no_memories(settings):
    """They are refused before anything is changed; what needs no memory is not."""
    config = R3MemConfig(num_memory_tokens=4, segment_length=8, core=(1, 3), **settings)
    mllama, xlstm = tiny_model("mllama"), tiny_model("xlstm")
    with pytest.raises(ValueError, match=r"layers \[3, .* read an image, and do not run without one"):
        R3MemModel(mllama, config)
    with pytest.raises(ValueError, match="type xlstm return their states beside the hidden state"):
        R3MemModel(xlstm, config)
    assert not any(hasattr(module, "reversible") for model in (mllama, xlstm) for module in model.modules())
    model = R3MemModel(mllama, R3MemConfig(core=(1, 3))).eval()
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    with pytest.raises(ValueError, match="do not run without one, so that they can neither write a memory"):
        model.compress(torch.tensor([[5, 6, 7]]))


def test_llama_4_learns_memories():
    model = R3MemModel(tiny_model("llama4_text"), R3MemConfig(num_memory_tokens=4, segment_length=8, core=(1, 3)))
    ids = torch.arange(3, 23)[None]
    model.train()(ids, labels=ids).loss.backward()
    assert model.memory_embeddings.grad.isfinite().all() and model.memory_embeddings.grad.any()
