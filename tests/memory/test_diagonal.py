"""Histories that are read by diagonals: what is kept of them is the same to the last bit."""

import pytest
import torch

from r3mem_fast.integrations import graphs
from r3mem_fast.memory.writers import graphed
from r3mem_fast.memory.writers.diagonal import DiagonalReader
from r3mem_fast.reading import compress_rows
from tests import tape
from tests.memory.test_matched import ABSOLUTE, LENGTH, ROTARY, WINDOWED, ids_of, network

TOKENS = 16 * 14 + 5  # of which eleven segments are alike


@pytest.fixture
def runs(monkeypatch):
    """Numbers of segments that were read by diagonals."""
    found, real = [], DiagonalReader.read

    def read(self, segments, *others):
        found.append(len(segments))
        return real(self, segments, *others)

    monkeypatch.setattr(DiagonalReader, "read", read)
    return found


def both_ways(monkeypatch, model, ids, **settings):
    monkeypatch.delenv(graphs.VARIABLE, raising=False)
    expected = model.compress(ids, **settings)
    monkeypatch.setenv(graphs.VARIABLE, "diagonal")
    found = model.compress(ids, **settings)
    assert torch.equal(found.states, expected.states) and torch.equal(found.ages, expected.ages)
    for name in ("slots", "num_segments", "tokens_seen"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    return found


@pytest.mark.parametrize("family, implementation", [*((f, "sdpa") for f in (*ROTARY, *ABSOLUTE)), *WINDOWED])
def test_families(monkeypatch, runs, family, implementation):
    model = network(family, of_base={"attn_implementation": implementation})
    both_ways(monkeypatch, model, ids_of(min(TOKENS, 200), 2), finish=True)
    assert runs and runs[0] > 4


@pytest.mark.parametrize(
    "changes",
    [
        {"beyond_budget": "rematch"},
        {"segment_overlap": 0},
        {"of_base": {"attn_implementation": "r3mem"}},
        {"of_base": {"attn_implementation": "eager"}},
        {"of_base": {"dtype": torch.bfloat16}},
    ],
)
def test_settings(monkeypatch, runs, changes):
    both_ways(monkeypatch, network(**changes), ids_of(TOKENS), finish=True)
    assert len(runs) == 1


def test_kept_tokens_and_histories_that_go_on(monkeypatch, runs):
    model = network()
    memory = both_ways(monkeypatch, model, ids_of(TOKENS), pinned=20)
    both_ways(monkeypatch, model, ids_of(TOKENS, seed=1), memory=memory)
    assert len(runs) == 2


def test_tokens_are_told_when_all_layers_have_read_them(monkeypatch, runs):
    model, told = network(), []
    monkeypatch.setenv(graphs.VARIABLE, "diagonal")
    compress_rows(model, [ids_of(TOKENS)[0]], model.empty_memory(), finish=True, on_tokens=told.append)
    assert runs and told == [LENGTH] * 14 + [5]


@pytest.mark.parametrize("changes", [{"memory_queries": "own+reread"}, {"adapter_rows": "all"}])
def test_what_needs_a_whole_pass_is_read_segment_by_segment(monkeypatch, runs, changes):
    both_ways(monkeypatch, network(**changes), ids_of(TOKENS))
    assert not runs


def test_few_segments_are_read_one_by_one(monkeypatch, runs):
    both_ways(monkeypatch, network(), ids_of(16 * 6))
    assert not runs


def test_layers_that_are_given_tokens_are_read_one_by_one(monkeypatch, runs):
    """As some models do, which give each layer an embedding of its own."""
    model, real = network(), type(network()._reader).entering

    def entering(self, ids):
        hidden, arguments = real(self, ids)
        return hidden, {**arguments, "per_layer_input": ids.float()}

    monkeypatch.setattr(type(model._reader), "entering", entering)
    both_ways(monkeypatch, model, ids_of(TOKENS))
    assert not runs


def test_full_diagonals_are_one_graph_each(monkeypatch, runs):
    """A tape stands in for the graph, see tests/memory/test_graphed.py."""
    made, real = [], graphed.Repeated.__init__

    def noted(self, *args):
        real(self, *args)
        made.append(self)

    monkeypatch.setattr(graphed.Repeated, "__init__", noted)
    monkeypatch.setattr(graphs, "are_wanted", lambda device: True)
    monkeypatch.setattr(graphs, "captured", tape.captured)
    model = network()
    monkeypatch.setattr(graphs, "are_diagonal", lambda: False)
    monkeypatch.setattr(graphs, "are_wanted", lambda device: False)
    expected = model.compress(ids_of(TOKENS))
    monkeypatch.setattr(graphs, "are_diagonal", lambda: True)
    monkeypatch.setattr(graphs, "are_wanted", lambda device: True)
    found = model.compress(ids_of(TOKENS))
    assert torch.equal(found.states, expected.states) and torch.equal(found.ages, expected.ages)
    # The run's first segment is read as always, and so are the first two of the full diagonals.
    assert runs and made[-1].replays == runs[0] - 1 - len(model.layers) + 1 - 2 > 0
