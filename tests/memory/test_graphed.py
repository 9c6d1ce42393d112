"""Segments that are one graph each, with a tape that stands in for the GPU's."""

import contextlib

import pytest
import torch

from r3mem_fast.integrations import graphs
from r3mem_fast.memory.segments import cut_segments
from r3mem_fast.memory.states import Constants, uploaded
from r3mem_fast.memory.writers import matching
from r3mem_fast.memory.writers.graphed import GraphedWriter
from r3mem_fast.reading import read_segments
from tests import tape
from tests.memory.test_matched import ids_of, network


@pytest.fixture
def made(monkeypatch):
    """The writers that were made, which play tapes."""
    writers = []

    real = GraphedWriter.__init__

    def noted(self, *args):
        real(self, *args)
        writers.append(self)

    monkeypatch.setattr(graphs, "are_wanted", lambda device: True)
    monkeypatch.setattr(graphs, "captured", tape.captured)
    monkeypatch.setattr(GraphedWriter, "__init__", noted)
    return writers


@contextlib.contextmanager
def without_graphs(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "are_wanted", lambda device: False)
        yield


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beyond_budget": "rematch"},
        {"segment_overlap": 0},
        {"memory_queries": "own+reread"},
        {"of_base": {"attn_implementation": "r3mem"}},
        {"of_base": {"attn_implementation": "eager"}},
    ],
)
def test_replayed_segments_are_the_same_to_the_last_bit(made, monkeypatch, rows, changes):
    model = network(**changes)
    ids = ids_of(16 * 9 + 5, rows)
    with without_graphs(monkeypatch):
        expected = model.compress(ids, finish=True)
    found = model.compress(ids, finish=True)
    assert torch.equal(found.states, expected.states) and torch.equal(found.ages, expected.ages)
    assert found.slots.tolist() == expected.slots.tolist() and found.tokens_seen.tolist() == [149] * rows
    # Two of ten segments fill the memory, one is the first of its kind, one is noted, and the last is shorter.
    assert made[-1].repeated.replays == 5


def test_the_last_segment_of_a_text_is_of_another_kind(made, monkeypatch):
    """Where what is held is matched again when a text has ended, as full as the segments before."""
    model = network(beyond_budget="rematch_once")
    ids = ids_of(16 * 12)
    with without_graphs(monkeypatch):
        expected = model.compress(ids, finish=True)
    found = model.compress(ids, finish=True)
    assert torch.equal(found.states, expected.states) and torch.equal(found.ages, expected.ages)
    assert int(found.slots) == model.layout.budget < model.layout.most_slots and made[-1].repeated.replays > 0


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "gpt2", "mistral"])
def test_other_families(made, monkeypatch, family):
    model = network(family)
    ids = ids_of(120, 2)
    with without_graphs(monkeypatch):
        expected = model.compress(ids)
    found = model.compress(ids)
    assert torch.equal(found.states, expected.states) and made[-1].repeated.replays > 0


def test_kept_tokens_end_in_a_kind_of_their_own(made, monkeypatch):
    """Pinned tokens make segments of other kinds, until all have been read."""
    model = network()
    ids = ids_of(160)
    with without_graphs(monkeypatch):
        expected = model.compress(ids, pinned=20)
    found = model.compress(ids, pinned=20)
    assert torch.equal(found.states, expected.states) and made[-1].repeated.replays > 0


def test_ragged_rows_are_read_as_always(made, monkeypatch):
    """Rows that end in different segments: as many as are alike are replayed."""
    model = network()
    rows = [ids_of(130)[0], ids_of(90, seed=1)[0]]
    mask = torch.zeros(2, 130, dtype=torch.int64)
    ids = torch.zeros_like(mask)
    for index, row in enumerate(rows):
        ids[index, 130 - len(row) :], mask[index, 130 - len(row) :] = row, 1
    with without_graphs(monkeypatch):
        expected = model.compress(ids, attention_mask=mask)
    found = model.compress(ids, attention_mask=mask)
    assert torch.equal(found.states, expected.states) and made[-1].repeated.replays > 0


def test_frequencies_that_the_host_chooses_are_not_captured(made):
    """Dynamic scaling asks for the largest position of a pass."""
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    network(of_base={"rope_parameters": dynamic}).compress(ids_of(120))
    assert made[-1].repeated.replays == 0


def test_hidden_states_come_along(made, monkeypatch):
    """Each segment's own, whatever is replayed after it."""
    model = network()

    @torch.no_grad()
    def read():
        memory = model.empty_memory()
        segments = cut_segments(memory, [ids_of(150)[0]], finish=True, writes_all=True)
        return read_segments(model, segments, memory, lambda segment, hidden: hidden)[0]

    with without_graphs(monkeypatch):
        expected = read()
    found = read()
    assert made[-1].repeated.replays > 2
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine, its)


def test_what_could_not_be_matched_is_said(made, monkeypatch):
    """By replayed segments, too."""
    model = network()
    real = matching.value_system
    monkeypatch.setattr(
        matching, "value_system", lambda *given, **settings: [part * torch.inf for part in real(*given, **settings)]
    )
    with pytest.warns(UserWarning, match="could not be matched"):
        model.compress(ids_of(150))
    assert made[-1].repeated.replays > 0


def test_uploads_are_noted_once():
    constants, far = Constants(), torch.device("meta")
    with constants.noted():
        first = [uploaded(torch.arange(3), far), uploaded(torch.ones(2), far)]
    with constants.used():
        assert uploaded(torch.arange(3), far) is first[0] and uploaded(torch.ones(2), far) is first[1]
        with pytest.raises(RuntimeError, match="other tensors than it did before"):
            uploaded(torch.ones(2), far)
    with constants.used(), pytest.raises(RuntimeError, match="other tensors"):
        uploaded(torch.arange(4), far)
    assert uploaded(torch.arange(3), far) is not first[0]


def test_graphs_are_asked_for(monkeypatch):
    cpu, far = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv(graphs.VARIABLE, raising=False)
    assert not graphs.are_wanted(far)
    monkeypatch.setenv(graphs.VARIABLE, "1")
    assert graphs.are_wanted(far) and not graphs.are_wanted(cpu)
    monkeypatch.setenv(graphs.VARIABLE, "yes")
    with pytest.raises(ValueError, match='R3MEM_GRAPHS must be 0, 1 or "diagonal"'):
        graphs.are_wanted(far)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("value", ["1", "diagonal"])
@pytest.mark.parametrize("attention", ["sdpa", "r3mem"])
def test_graphs_of_a_gpu(monkeypatch, value, attention):
    """Captured and replayed, they keep what is kept without them."""
    model = network(of_base={"attn_implementation": attention}).to("cuda")
    ids = ids_of(16 * 14 + 5, 2)
    monkeypatch.delenv(graphs.VARIABLE, raising=False)
    expected = model.compress(ids, finish=True)
    monkeypatch.setenv(graphs.VARIABLE, value)
    found = model.compress(ids, finish=True)
    torch.testing.assert_close(found.states, expected.states)
    assert torch.equal(found.ages, expected.ages)
