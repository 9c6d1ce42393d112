"""Learned memories of models whose layers are in part recurrent: they carry the states, and gradients pass through."""

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from r3mem_fast import Memory, R3MemConfig, R3MemModel, check_integrity, load_model, reading
from r3mem_fast.batching import Rows, nothing
from r3mem_fast.integrations import compat
from r3mem_fast.memory import file as memory_file
from r3mem_fast.memory.segments import cut_segments
from r3mem_fast.memory.writers.tokens import TokenWriter
from r3mem_fast.objective import continuation_logits
from r3mem_fast.training.remember import remember
from tests.memory.test_recurrent import build, difference, ids_of, padded, without_states
from tests.reversible.tiny import assert_same_gradients, gradients
from tests.training.test_remember import PAIRS, SETTINGS

LENGTH, COUNT = 16, 3
KINDS = ("qwen3_next", "qwen3_5_text", "lfm2", "falcon_h1", "bamba")
of_each_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning"),
    pytest.mark.skipif(not hasattr(DynamicCache, "get_conv_state"), reason="layers change the cache of this version"),
]


def network(kind="qwen3_5_text", **changes):
    """A network whose adapters do something, and whose memory tokens are tokens of its own."""
    settings = {"num_memory_tokens": COUNT, "segment_length": LENGTH, "core": (1, 3)}
    model = R3MemModel(build(kind), R3MemConfig(**settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(
                    0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                )
    return model


class ByHand:
    """Reads segments with a cache of transformers, whose layers drop what is not to be read again.

    Attention knows distances alone: behind the memory of one segment, the text of it need not have been there.
    """

    def __init__(self, model):
        self.model, self.cache, self.place = model, DynamicCache(config=model.config), 0

    def read(self, **tokens):
        rows, count = next(iter(tokens.values())).shape[:2]
        places = (self.place + torch.arange(count)).expand(rows, -1)
        self.place += count
        given = {"past_key_values": self.cache, "position_ids": places, "use_cache": True}
        return self.model.peft_model(**tokens, **given).logits

    def write(self, rows):
        """Read memory tokens, of which keys and values stay, and nothing else."""
        layers = self.cache.layers
        states = {
            index: {name: state.clone() for name, state in compat.recurrent_states(layers[index]).items()}
            for index in compat.recurrent_layers(self.cache)
        }
        scale = getattr(self.model.config, "embedding_multiplier", 1.0)
        self.read(inputs_embeds=scale * self.model.memory_embeddings.expand(rows, -1, -1))
        for index, own in states.items():
            compat.set_recurrent_states(layers[index], own)
        for index in compat.layers_with_keys(self.cache):
            layers[index].keys = layers[index].keys[..., -COUNT:, :]
            layers[index].values = layers[index].values[..., -COUNT:, :]

    def read_in_segments(self, ids):
        """Logits of three segments, and of a text behind them."""
        *segments, text = ids.split(LENGTH, 1)
        found = []
        for segment in segments:
            found.append(self.read(input_ids=segment))
            self.write(len(ids))
        return torch.cat([*found, self.read(input_ids=text)], 1)


@pytest.mark.parametrize("adapters", [True, False])
@of_each_kind
def test_it_is_the_whole_model_by_hand(kind, adapters):
    """Forward, and as a reversible network or the base model; without the states it is another text: the control."""
    # A fine grid: on a coarse one a rounding of the last bit, which differs between CPUs, becomes a step of it.
    model, ids = network(kind, fraction_bits=24), ids_of(57, rows=2)
    text = ids[:, 3 * LENGTH :]
    with torch.no_grad(), contextlib.nullcontext() if adapters else model.disable_adapters():
        expected = ByHand(model).read_in_segments(ids)[:, 3 * LENGTH :]
        memory = model.compress(ids[:, : 3 * LENGTH])
        behind = model(text, memory=memory).logits
        without = model(text, memory=without_states(memory)).logits
    assert difference(behind, expected) < 1e-5 and difference(without, expected) > 5e-3


@of_each_kind
def test_gradients_are_those_of_back_propagation_by_hand(kind):
    """Through three segments and a text, by replay; a state that is a constant gives others: the control."""
    model, ids = network(kind).train(), ids_of(57, rows=2)
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    logits = ByHand(model.eval()).read_in_segments(ids)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-4
    assert_same_gradients(found, gradients(model), 1e-2)
    model.zero_grad(set_to_none=True)
    with pytest.MonkeyPatch.context() as patch:
        detached = lambda cache: {name: state.detach() for name, state in states_after(cache).items()}  # noqa: E731
        states_after = reading.PrefixCache.states_after
        patch.setattr(reading.PrefixCache, "states_after", detached)
        model.train()(ids, labels=ids).loss.backward()
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients(model), found, 1e-2)


CHANGES = ({"bptt_segments": 2}, {"segment_overlap": 4}, {"adapter_rows": "memory"})


@pytest.mark.parametrize(("kind", "changes"), [*((kind, {}) for kind in KINDS), *(("lfm2", c) for c in CHANGES)])
def test_replay_is_back_propagation_through_time(kind, changes):
    """Rows have several lengths, the last piece of one is a single token; so it is whatever is kept of segments."""
    ids, mask = padded((49, 40, 33, 7))
    labels, found = ids.masked_fill(mask == 0, -100), []
    for kept in ("none", "device"):
        model = network(kind, kept_segments=kept, max_memory_segments=2, **changes).train()
        loss = model(ids, mask, labels=labels).loss
        loss.backward()
        check_integrity(model)
        found.append((loss.item(), gradients(model)))
    assert abs(found[0][0] - found[1][0]) < 1e-6
    assert any("memory_embeddings" in name for name in found[0][1])
    assert_same_gradients(found[0][1], found[1][1], 1e-4)
    with torch.no_grad():
        assert abs(model.eval()(ids, mask, labels=labels).loss.item() - found[0][0]) < 1e-4


@of_each_kind
def test_one_memory_token(kind):
    """One token alone is read by other kernels, some of which change states in place: none is, with gradients."""
    ids, found = ids_of(33, rows=2), []
    for kept in ("none", "device"):
        model = network(kind, num_memory_tokens=1, kept_segments=kept).train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        check_integrity(model)
        found.append(gradients(model))
    assert_same_gradients(*found, 1e-4)
    with torch.no_grad():  # where such kernels are used
        assert abs(model.eval()(ids, labels=ids).loss.item() - loss.item()) < 1e-4


@of_each_kind
def test_rows_of_several_lengths(kind):
    """Each row is as if it were alone: compressed, read, continued, with beams, too, and read backward."""
    model, lengths = network(kind), (41, 30, 7, 1)
    ids, mask = padded(lengths)
    together = model.compress(ids, mask, finish=True)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        logits = model(ids, mask, memory=together).logits
    written, recalled = (
        model.generate(ids, mask, memory=together, **options),
        model.expand(together, ids, mask, max_new_tokens=4),
    )
    searched = model.generate(ids, mask, memory=together, num_beams=2, **options)
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, 41 - length :]
        alone = model.compress(own, finish=True)
        assert all(difference(together[row].carried[name], state) < 1e-4 for name, state in alone.carried.items())
        assert torch.equal(together[row].visible(), alone.visible())
        with torch.no_grad():
            assert difference(logits[row : row + 1, 41 - length :], model(own, memory=alone).logits) < 1e-3
        assert torch.equal(written[row, 41:], model.generate(own, memory=alone, **options)[0, length:])
        assert torch.equal(searched[row, 41:], model.generate(own, memory=alone, num_beams=2, **options)[0, length:])
        assert torch.equal(recalled[row], model.expand(alone, own, max_new_tokens=4)[0])


def test_prompts_of_several_lengths_and_windows(monkeypatch):
    """Behind a window, a layer no longer has what shorter rows would be joined by."""
    model, (ids, mask) = network(), padded((9, 5))
    memory = model.compress(ids_of(20, rows=2), finish=True)
    monkeypatch.setattr("transformers.cache_utils.DynamicLayer.is_sliding", True)
    with pytest.raises(ValueError, match="give rows of one length"):
        model.generate(ids, mask, memory=memory, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1", "bamba"])
def test_reading_backward(kind):
    """A layer goes on from its own state, wherever it stands then: by hand, in a cache of transformers."""
    model, ids = network(kind), ids_of(2 * LENGTH)
    memory, context, hand = model.compress(ids), ids_of(7, seed=2), ByHand(model)
    with torch.no_grad():
        for segment in ids.split(LENGTH, 1):
            hand.read(input_ids=segment)
            hand.write(1)
        with model.reading_backward():
            found, _ = continuation_logits(model, nothing(1, model.device), Rows(context), memory)
            start = torch.full((1, 2), model.start_token_id)
            expected = hand.read(input_ids=torch.cat([start, context], 1))[:, 1:]
    assert difference(found, expected) < 2e-4


def test_pairs_of_several_lengths():
    """The terms of the objective of pairs are means over the tokens of rows, each of which is as if it were alone."""
    model, lengths = network().train(), (41, 30, 7)
    ids, mask = padded(lengths)
    queries = {"query_input_ids": ids[:, -9:], "query_attention_mask": mask[:, -9:]}
    together = model(ids, mask, labels=ids, **queries)
    together.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    alone = [
        model(ids[row : row + 1, 41 - n :], query_input_ids=ids[row : row + 1, -min(n, 9) :])
        for row, n in enumerate(lengths)
    ]
    for term, counts in (("compress", [10, 10, 8]), ("cycle", [n + 1 for n in lengths])):
        losses = [getattr(one, f"{term}_loss").item() * count for one, count in zip(alone, counts, strict=True)]
        assert abs(getattr(together, f"{term}_loss").item() - sum(losses) / sum(counts)) < 1e-4


@settings(max_examples=6)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.sampled_from([0, 4]))
def test_a_history_in_pieces(lengths, overlap):
    """What is left over waits in the memory, and the states are those of before it."""
    model, ids = network(segment_overlap=overlap), ids_of(sum(lengths))
    memory, start = None, 0
    for length in lengths:
        memory = model.compress(ids[:, start : start + length], memory=memory)
        start += length
    whole = model.compress(ids)
    assert torch.equal(memory.states, whole.states)
    assert all(torch.equal(state, whole.carried[name]) for name, state in memory.carried.items())


@pytest.mark.parametrize("overlap", [0, 4])
def test_states_are_those_of_the_text(overlap):
    """With adapters on memory tokens alone, the first layer has read the text as the base model does, and no more."""
    model, ids = network(adapter_rows="memory", segment_overlap=overlap), ids_of(3 * LENGTH)
    memory, cache = model.compress(ids), DynamicCache(config=model.config)
    with torch.no_grad(), model.disable_adapters():
        model.plain_model(ids[:, : 3 * LENGTH - overlap], past_key_values=cache, use_cache=True)
    first = compat.recurrent_states(cache.layers[0])
    # The streams' grid is all that is between them.
    assert first and all(difference(memory.carried[f"0.{name}"], state) < 3e-3 for name, state in first.items())
    assert difference(model.compress(ids[:, :-1], finish=True).carried["0.recurrent.0"], first["recurrent.0"]) > 3e-2


def test_rows_that_do_not_see_their_memory():
    """With memory_dropout, nothing of what came before reaches such a row, neither by slots nor by states."""
    model, ids = network(), ids_of(2 * LENGTH, rows=2)
    memory, nothing_known = model.compress(ids), model.empty_memory(2)
    (segment,) = cut_segments(nothing_known, list(ids[:, :LENGTH]), finish=True, writes_all=True)
    blind = TokenWriter(model.reader, model.memory_embeddings, dropout=1.0)
    seeing = TokenWriter(model.reader, model.memory_embeddings)
    with torch.no_grad():
        hidden, after = blind.read(segment, memory)
        expected, expected_after = seeing.read(segment, nothing_known)
        assert difference(hidden, expected) < 1e-4
        assert all(difference(after.carried[n], s) < 1e-4 for n, s in expected_after.carried.items())
        assert difference(seeing.read(segment, memory)[0], expected) > 1e-2


def test_a_memory_is_a_value(tmp_path):
    """Rows, batches, forks and files have the states with them; nothing changes them in place."""
    model, text = network(), ids_of(5, seed=3)
    memory = model.compress(ids_of(40, rows=2), finish=True)
    before = {name: state.clone() for name, state in memory.carried.items()}
    one, other = memory.split()
    joined = Memory.cat([other, one])
    assert torch.equal(joined.carried["0.recurrent.0"], before["0.recurrent.0"].flip(0))
    forks = [model.compress(ids_of(17, seed=seed), memory=one, finish=True) for seed in (7, 8)]
    assert not torch.equal(forks[0].carried["0.recurrent.0"], forks[1].carried["0.recurrent.0"])
    half = memory.to(torch.bfloat16)
    assert half.states.dtype == torch.bfloat16 and half.carried["0.recurrent.0"].dtype == torch.float32
    memory.save(tmp_path / "memory.safetensors")
    assert memory_file.read_header(tmp_path / "memory.safetensors").metadata["format_version"] == 3
    loaded = Memory.load(tmp_path / "memory.safetensors", model)
    with torch.no_grad():
        assert torch.equal(model(text, memory=loaded[0]).logits, model(text, memory=one).logits)
        again = model.peft_model(text, past_key_values=one.to_cache(model)).logits
        assert difference(again, model(text, memory=one).logits) < 1e-4
    assert all(torch.equal(state, before[name]) for name, state in memory.carried.items())
    assert all(torch.equal(state, before[name]) for name, state in loaded.carried.items())
    with pytest.raises(ValueError, match="the memory carries states"):
        model.check_memory(dataclasses.replace(memory, carried={"0.recurrent.0": before["0.recurrent.0"]}))


def test_what_is_refused(monkeypatch):
    base = build("qwen3_next")
    with pytest.raises(ValueError, match='use memory_placement="every_layer"'):
        R3MemModel(base, R3MemConfig(num_memory_tokens=4, segment_length=LENGTH, memory_placement="input"))
    assert not hasattr(base.model.layers[0], "reversible")  # said before anything is changed
    with pytest.raises(ValueError, match="do not go on from their states as they would in one pass"):
        network("jamba").compress(ids_of(20))
    monkeypatch.delattr("r3mem_fast.reversible.past.PastKeysValues.get_conv_state")
    with pytest.raises(ValueError, match="do not go on from their states with gradients"):
        network().compress(ids_of(20))


def test_processes_that_would_read_by_other_lengths(monkeypatch):
    """They gather a sharded model's layers together, and would wait for each other forever."""
    model, (ids, mask) = network().train(), padded((40, 33))
    monkeypatch.setattr(reading, "largest_of_ranks", lambda network, count: 1 if count == -2 else count)
    with pytest.raises(ValueError, match="give all processes rows of as many lengths"):
        model(ids, mask, labels=ids)


def test_documents_are_learned(folder):
    """Pairs of contexts and queries of several lengths: every term of the objective falls in a few steps."""
    tokenizer = load_model(str(folder))[1]
    model = R3MemModel(
        build("lfm2", vocab_size=len(tokenizer)), R3MemConfig(num_memory_tokens=4, segment_length=LENGTH)
    )
    reports = [
        remember(model, tokenizer, PAIRS, dataclasses.replace(SETTINGS, max_steps=count), progress=False)
        for count in (1, 12)
    ]
    for term in ("compress_loss", "expand_loss"):
        assert getattr(reports[1], term) < getattr(reports[0], term)
