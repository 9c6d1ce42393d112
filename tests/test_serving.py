"""Many requests at a time: each gets what it would get alone, whatever joins and leaves beside it."""

import dataclasses
import functools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3mem_fast import Memory, R3MemConfig, R3MemModel, serving
from r3mem_fast.memory.shared import SharedMemories
from r3mem_fast.serving import Scheduler
from tests.memory.test_matched import ids_of, network
from tests.reversible.tiny import build

MODEL = network()
HISTORIES = (1, 9, 20, 33, 50, 64)


@functools.cache
def memory_of(tokens):
    return MODEL.compress(ids_of(tokens, seed=tokens), finish=tokens % 2 == 0)


@functools.cache
def alone(tokens, prompt, count, seed):
    """What a request gets by itself: from `generate`, or drawn with its seed."""
    ids = ids_of(prompt, seed=prompt)
    if seed is None:
        found = MODEL.generate(ids, memory=memory_of(tokens), max_new_tokens=count, do_sample=False)[
            0, prompt:
        ].tolist()
        return found[: found.index(MODEL.end_token_id)] if MODEL.end_token_id in found else found
    scheduler = Scheduler(MODEL, max_rows=1)
    request = scheduler.submit(ids[0], memory_of(tokens), max_new_tokens=count, do_sample=True, top_k=9, seed=seed)
    scheduler.run()
    return request.tokens


REQUESTS = st.tuples(
    st.sampled_from(HISTORIES),
    st.integers(1, 6),
    st.integers(1, 7),
    st.sampled_from((None, None, 1, 2)),
    st.integers(0, 4),
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=6), st.integers(1, 4))
def test_each_gets_its_own_tokens(requests, max_rows):
    """200 random mixes of memories, prompts, lengths and seeds, that come at other times."""
    check_mix(requests, max_rows)


def test_a_mix():
    check_mix([(33, 2, 7, None, 0), (1, 6, 3, 1, 0), (64, 1, 5, None, 2), (20, 3, 6, 2, 3), (50, 4, 1, None, 3)], 3)


def check_mix(requests, max_rows):
    scheduler = Scheduler(MODEL, max_rows=max_rows)
    waiting, submitted, streamed, step = sorted(requests, key=lambda request: request[-1]), [], {}, 0
    while waiting or len(scheduler):
        while waiting and waiting[0][-1] <= step:
            tokens, prompt, count, seed, _ = settings = waiting.pop(0)
            drawn = {} if seed is None else {"do_sample": True, "top_k": 9, "seed": seed}
            ids = ids_of(prompt, seed=prompt)[0]
            request = scheduler.submit(ids, memory_of(tokens), max_new_tokens=count, **drawn)
            submitted.append((settings, request))
        for request, token in scheduler.step():
            streamed.setdefault(request, []).append(token)
        step += 1
    for (tokens, prompt, count, seed, _), request in submitted:
        assert request.finished and request.tokens == alone(tokens, prompt, count, seed)
        assert streamed.get(request, []) == request.tokens


def test_the_end_token_ends_a_request():
    model = network()
    memory, ids = model.compress(ids_of(50)), ids_of(3, seed=1)
    written = model.generate(ids, memory=memory, max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    for ends in (written[3], [95, written[3]]):
        model.plain_model.generation_config.eos_token_id = ends
        scheduler = Scheduler(model)
        request = scheduler.submit(ids[0], memory, max_new_tokens=6)
        scheduler.run()
        assert request.tokens == written[: written.index(written[3])] and request.finished and len(scheduler) == 0
        assert scheduler.step() == []


def test_memories_of_other_sizes_and_dtypes_go_together(tmp_path):
    model, other = network(), network(num_memory_tokens=4, memory_budget=4, segment_overlap=2)
    model.compress(ids_of(40)).save(tmp_path / "memory.safetensors")
    memories = [
        other.compress(ids_of(50)), Memory.load(tmp_path / "memory.safetensors"),
        dataclasses.replace(model.compress(ids_of(30)), origin=dataclasses.replace(model.origin(), tokenizer="some")),
        model.compress(ids_of(20)).to(torch.float64),
    ]  # fmt: skip
    ids = ids_of(3, seed=1)
    with Scheduler(model) as scheduler:
        requests = [scheduler.submit(ids[0], memory, max_new_tokens=3) for memory in memories]
        scheduler.run()
    for request, memory in zip(requests, memories, strict=True):
        expected = model.generate(ids, memory=memory, max_new_tokens=3, do_sample=False)[0, 3:].tolist()
        assert request.tokens == expected[: len(request.tokens)]


@pytest.mark.parametrize("where", ["followed_by", "cat"])
def test_rows_that_cannot_be_joined_change_nothing(monkeypatch, where):
    """Memory runs out after all have been read."""
    model = network()
    model.plain_model.generation_config.eos_token_id = 96  # which no text has
    memory, ids = model.compress(ids_of(50)), ids_of(3, seed=1)
    scheduler = Scheduler(model)
    first = scheduler.submit(ids[0], memory, max_new_tokens=5)
    scheduler.step()
    second = scheduler.submit(ids[0].flip(0), model.compress(ids_of(33)), max_new_tokens=4)
    owner = SharedMemories if where == "followed_by" else torch.Tensor
    with monkeypatch.context() as patch:
        if where == "followed_by":
            patch.setattr(owner, where, mock.Mock(side_effect=RuntimeError("out of memory")))
        else:
            patch.setattr(
                "r3mem_fast.serving.right_aligned", mock.Mock(side_effect=[*3 * [torch.ones(1, 2, 9, 8)], None])
            )
        with pytest.raises((RuntimeError, TypeError)):
            scheduler.step()
    assert len(first.tokens) == 1 and not second.tokens and len(scheduler) == 2
    scheduler.run()
    for request, prompt in ((first, ids), (second, ids.flip(1))):
        expected = model.generate(
            prompt, memory=request.memory, max_new_tokens=request.max_new_tokens, do_sample=False
        )
        assert request.tokens == expected[0, 3:].tolist()


@pytest.mark.parametrize("when", ["joining", "going on"])
def test_a_step_that_fails_changes_nothing(when):
    model = network()
    model.plain_model.generation_config.eos_token_id = 96  # which no text has
    memory, ids = model.compress(ids_of(50)), ids_of(3, seed=1)
    scheduler = Scheduler(model)
    first = scheduler.submit(ids[0], memory, max_new_tokens=5)
    scheduler.step()
    second = scheduler.submit(ids[0].flip(0), memory, max_new_tokens=4)
    calls, real = [], type(model.plain_model.model.layers[0].mlp).forward

    def failing(self, hidden):
        calls.append(hidden.shape[1])
        if len(calls) == (2 if when == "joining" else 6):  # in the second layer
            raise RuntimeError("out of memory")
        return real(self, hidden)

    failure = pytest.raises(RuntimeError, match="out of memory")
    with mock.patch.object(type(model.plain_model.model.layers[0].mlp), "forward", failing), failure:
        scheduler.step()
    assert (calls[-1] == 1) == (when == "going on") and len(first.tokens) == 1 and not second.tokens
    scheduler.run()
    for request, prompt in ((first, ids), (second, ids.flip(1))):
        expected = model.generate(prompt, memory=memory, max_new_tokens=request.max_new_tokens, do_sample=False)
        assert request.tokens == expected[0, 3:].tolist()


def test_a_draw_that_fails_changes_nothing():
    """Neither rows that have a token already, nor what they would draw next."""
    model = network()
    model.plain_model.generation_config.eos_token_id = 96  # which no text has
    memory, ids = model.compress(ids_of(50)), ids_of(3, seed=1)[0]
    drawn = {"max_new_tokens": 4, "do_sample": True}
    expected = []
    for seed in (1, 2):
        scheduler = Scheduler(model)
        expected.append(scheduler.submit(ids, memory, seed=seed, **drawn))
        scheduler.run()
    scheduler = Scheduler(model)
    requests = [scheduler.submit(ids, memory, seed=seed, **drawn) for seed in (1, 2)]
    scheduler.step()
    real = serving._Sampler.__call__

    def failing(sampler, scores):
        if sampler is requests[1].choose:
            raise RuntimeError("probability tensor contains nan")
        return real(sampler, scores)

    with mock.patch.object(serving._Sampler, "__call__", failing), pytest.raises(RuntimeError, match="nan"):
        scheduler.step()
    assert [len(request.tokens) for request in requests] == [1, 1]
    scheduler.run()
    assert [request.tokens for request in requests] == [request.tokens for request in expected]


def test_rows_take_their_columns_along_when_they_leave():
    model = network()
    model.plain_model.generation_config.eos_token_id = 96  # which no text has
    scheduler = Scheduler(model)
    long = scheduler.submit(ids_of(6)[0], model.compress(ids_of(64)), max_new_tokens=2)
    short = scheduler.submit(ids_of(1)[0], model.compress(ids_of(1)), max_new_tokens=9)
    scheduler.step()
    memories, keys = scheduler._memories.keys[0], scheduler._cache.layers[0].keys
    assert memories.shape[0] == 2 and memories.shape[2] > 5 and keys.shape[2] > 5
    scheduler.step()
    assert long.finished and not short.finished and scheduler._starts == [0]
    memories, keys = scheduler._memories.keys[0], scheduler._cache.layers[0].keys
    # One token of the history and one of the prompt, and what was written; a memory of no slot at all.
    assert memories.shape[0] == 1 and memories.shape[2] == 0 and keys.shape[:1] == (1,) and keys.shape[2] == 3


def test_a_memory_that_several_requests_share_is_kept_once():
    model = network()
    model.plain_model.generation_config.eos_token_id = 96  # which no text has
    shared, other, small = (model.compress(ids_of(*size)) for size in ((64, 1, 3), (50,), (17,)))
    scheduler, asked = Scheduler(model, max_rows=5), []

    def submit(memory, prompt, count):
        ids = ids_of(prompt, seed=prompt)
        asked.append((scheduler.submit(ids[0], memory, max_new_tokens=count), memory, ids))

    def kept():
        return scheduler._memories.keys[0].shape[0], len(scheduler._memories.of_rows)

    submit(shared, 2, 4), submit(other, 5, 2), submit(shared, 3, 6)
    scheduler.step()
    assert kept() == (2, 3)
    submit(small, 1, 3), submit(shared, 4, 2)  # which joins a memory that is there
    submit(shared, 2, 9)  # and waits for a row
    scheduler.step()
    assert kept() == (2, 4)  # the other memory has left with its request
    scheduler.run()
    for request, memory, ids in asked:
        expected = model.generate(ids, memory=memory, max_new_tokens=request.max_new_tokens, do_sample=False)
        assert request.tokens == expected[0, ids.shape[1] :].tolist()


def test_what_depends_on_the_prompt_is_not_shared():
    """Frequencies that are chosen by the largest position of a pass."""
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = network(of_base={"rope_parameters": dynamic})
    memory, scheduler = model.compress(ids_of(50)), Scheduler(model)
    for prompt in (2, 3):
        scheduler.submit(ids_of(prompt)[0], memory, max_new_tokens=2)
    scheduler.step()
    assert scheduler._memories.keys[0].shape[0] == 2


def test_draws_follow_the_distribution():
    """A token is drawn as often as its probability says."""
    scheduler = Scheduler(MODEL, max_rows=64)
    ids = ids_of(4, seed=4)
    drawn = [
        scheduler.submit(
            ids[0], memory_of(50), max_new_tokens=1, do_sample=True, temperature=0.7, top_p=0.9, seed=seed
        )
        for seed in range(600)
    ]
    scheduler.run()
    with torch.no_grad():
        scores = MODEL(ids, memory=memory_of(50)).logits[0, -1] / 0.7
    weights, order = scores.softmax(-1).sort(descending=True)
    weights = weights * (weights.cumsum(0) - weights < 0.9)
    wanted = torch.zeros(96).scatter(0, order, weights / weights.sum())
    counts = torch.bincount(torch.tensor([request.tokens[0] for request in drawn if request.tokens]), minlength=96)
    assert not counts[wanted == 0].any()
    assert (counts / len(drawn) - wanted).abs().max() < 4 * (wanted.max() * (1 - wanted.max()) / 600) ** 0.5


def test_requests_that_cannot_be_served():
    scheduler, memory, ids = Scheduler(MODEL), memory_of(50), ids_of(3)[0]
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        Scheduler(MODEL, max_rows=0)
    with pytest.raises(ValueError, match="one prompt"):
        scheduler.submit(ids_of(3), memory)
    with pytest.raises(ValueError, match="1 rows of tokens and 2 of memory"):
        scheduler.submit(ids, memory.rows([0, 0]))
    with pytest.raises(ValueError, match="neither a prompt nor unfinished tokens"):
        scheduler.submit([], MODEL.empty_memory())
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        scheduler.submit(ids, memory, max_new_tokens=0)
    with pytest.raises(ValueError, match="positions"):
        scheduler.submit(ids, memory, max_new_tokens=200)
    with pytest.raises(ValueError, match="temperature"):
        scheduler.submit(ids, memory, do_sample=True, temperature=0.0)
    for model in (
        network("mistral"),
        network(memory_allocation="adaptive"),
        R3MemModel(build(), R3MemConfig(num_memory_tokens=2, segment_length=16, core=(1, 3))).eval(),
    ):
        with pytest.raises(ValueError, match="for others use"):
            Scheduler(model).submit(ids, model.compress(ids_of(50)))
    # The base model reads memories of any settings that were made of it: each head has other slots here.
    shared = network(memory_allocation="adaptive").compress(ids_of(50))
    with pytest.raises(ValueError, match='memory_allocation="uniform"'):
        scheduler.submit(ids, shared)
    assert len(scheduler) == 0


def test_under_autocast():
    """In autocast's dtype, as transformers' own attention computes."""
    model = network()
    model.plain_model.generation_config.eos_token_id = 96  # which no text has
    memories = [model.compress(ids_of(50)), model.compress(ids_of(33))]
    with torch.autocast("cpu", torch.bfloat16):
        scheduler = Scheduler(model)
        requests = [scheduler.submit(ids_of(3)[0], memory, max_new_tokens=3) for memory in (memories[0], *memories)]
        scheduler.run()
    assert [len(request.tokens) for request in requests] == [3, 3, 3] and requests[0].tokens == requests[1].tokens


@pytest.mark.parametrize("rows", [1, 2])
def test_a_head_is_given_tokens_without_the_strides_of_the_rest(rows):
    """For those of a longer tensor PyTorch would copy the head's weight."""
    model, strides = network(), []
    model.plain_model.generation_config.eos_token_id = 96  # which no text has
    head = model.plain_model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: strides.append(inputs[0].stride()))
    memory, ids = model.compress(ids_of(50, rows)), ids_of(5, rows, seed=1)
    model.generate(ids, memory=memory, max_new_tokens=2, do_sample=False)
    scheduler = Scheduler(model)
    for row in range(rows):
        scheduler.submit(ids[row], memory[row], max_new_tokens=2)
    scheduler.run()
    width = head.in_features
    assert strides == 4 * [(width, width, 1)] and not head._forward_pre_hooks
