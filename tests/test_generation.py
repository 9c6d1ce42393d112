"""Writing: prompts of several lengths; and reading backward by graphs, the same step on the same tensors each time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r3mem_fast import Memory, R3MemConfig, R3MemModel
from r3mem_fast.batching import Rows
from r3mem_fast.integrations import graphs
from r3mem_fast.reversible.integrity import Integrity
from r3mem_fast.reversible.stack import ReversibleStack
from tests.memory.test_matched import ids_of, network
from tests.reversible.tiny import LAYERED, build
from tests.tape import ASKING

from .test_model import FAMILIES, ROWS, collate_ids, made

WINDOWED = ("mistral", "gemma2", "gemma3_text")


class NobodyAsks(TorchDispatchMode):
    """Raises where the host would wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not function.name().removeprefix("aten::").startswith(ASKING), f"the host asks: {function}"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def captures(monkeypatch):
    """Captured steps: they run as they are, and must not ask for anything, but for flags, which a CPU has at once."""
    found = []
    real, report = ReversibleStack._leave, Integrity.report_if_known

    def leave(stack, streams, hidden):
        return hidden if found else real(stack, streams, hidden)

    def report_if_known(*given):
        return None if found else report(*given)

    def captured_in_place(step, device):
        assert device == torch.device("cpu")  # the model's
        found.append(step)

        def run():
            with NobodyAsks():
                step()

        return run

    monkeypatch.setattr(ReversibleStack, "_leave", leave)
    monkeypatch.setattr(Integrity, "report_if_known", report_if_known)
    monkeypatch.setattr(graphs, "captured_in_place", captured_in_place)
    return found


def by_graphs(monkeypatch, captures, run):
    """What is written one way and the other."""
    expected = run()
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "are_wanted", lambda device: True)
        found = run()
    assert len(captures) == 1
    return found, expected


@pytest.mark.parametrize("backward", ["reversed", "inverse"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WINDOWED])
def test_recall(monkeypatch, captures, family, backward):
    if backward == "inverse":  # whose reference asks a CPU, and whose kernels do not ask a GPU
        monkeypatch.setattr(f"{__name__}.ASKING", ())
    model = made(family, backward=backward).eval()
    batch = collate_ids(ROWS)
    given = batch["query_input_ids"], batch["query_attention_mask"]
    found, expected = by_graphs(monkeypatch, captures, lambda: model.recall(*given, max_new_tokens=20))
    assert all(map(torch.equal, found, expected)) and max(map(len, found)) > 8


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [{}, {"memory_placement": "input"}, {"memory_writer": "matched"}])
def test_expand(monkeypatch, captures, settings, attention):
    """From memories alone, of rows of which one has none."""
    torch.manual_seed(0)
    base = build("llama", scale=2.0, attn_implementation=attention)
    model = R3MemModel(base, R3MemConfig(num_memory_tokens=4, segment_length=8, core=(1, 3), **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    ids, mask = torch.randint(3, 96, (2, 30)), torch.ones(2, 30, dtype=torch.int64)
    mask[1, :29] = 0
    memory = model.compress(ids, mask)
    found, expected = by_graphs(monkeypatch, captures, lambda: model.expand(memory, max_new_tokens=18))
    assert all(map(torch.equal, found, expected)) and max(map(len, found)) > 2


def test_it_ends_when_all_rows_have_ended(monkeypatch, captures):
    """And is asked for that once in eight tokens."""
    model = made().eval()
    ids = torch.tensor([[5, 6, 7]])
    written = model.recall(ids, max_new_tokens=60)[0].tolist()
    model.end_token_id = next(
        token for index, token in enumerate(written[:8]) if token not in written[: max(1, index)]
    )
    steps = []
    real = model.plain_model.forward
    monkeypatch.setattr(model.plain_model, "forward", lambda *args, **kw: (steps.append(1), real(*args, **kw))[1])
    monkeypatch.setattr(graphs, "are_wanted", lambda device: True)
    assert model.recall(ids, max_new_tokens=60)[0].tolist() == written[: written.index(model.end_token_id)]
    assert len(steps) == 9


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_are_read_as_always(monkeypatch, captures, family):
    monkeypatch.setattr(graphs, "are_wanted", lambda device: True)
    model = made(family).eval()
    model.recall(torch.tensor([[5, 6, 7]]), max_new_tokens=5)
    assert not captures


def test_frequencies_that_the_host_chooses_are_read_as_always(monkeypatch, captures):
    monkeypatch.setattr(graphs, "are_wanted", lambda device: True)
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = R3MemModel(build("llama", scale=2.0, rope_parameters=dynamic), R3MemConfig(core=(1, 3))).eval()
    model.recall(torch.tensor([[5, 6, 7]]), max_new_tokens=5)
    assert not captures


@pytest.mark.parametrize("family", LAYERED)
def test_layers_that_share_keys_are_read_as_always(monkeypatch, captures, family):
    monkeypatch.setattr(graphs, "are_wanted", lambda device: True)
    of_base = {"layer_types": ["full_attention"] * 4, "sliding_window": 0}
    model = R3MemModel(build(family, scale=2.0, **of_base), R3MemConfig(core=(1, 2))).eval()
    assert len(model.recall(torch.tensor([[5, 6, 7]]), max_new_tokens=5)) == 1
    assert not captures


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backward", ["reversed", "inverse"])
def test_graphs_of_a_gpu(monkeypatch, backward):
    model = made(backward=backward).eval().to("cuda")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]], device="cuda")
    monkeypatch.delenv(graphs.VARIABLE, raising=False)
    expected = model.recall(ids, max_new_tokens=30)
    monkeypatch.setenv(graphs.VARIABLE, "1")
    assert all(map(torch.equal, model.recall(ids, max_new_tokens=30), expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_several_lengths_with_nothing_before_them(family):
    """Each is continued as if it were alone, on whichever side it is padded, and stands in front as it was given."""
    model = made(family).eval()
    prompts = [[5, 6, 7, 8, 9, 10], [20, 21], [11, 30, 13]]
    greedy = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    alone = [model.generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :] for prompt in prompts]
    ids, mask = torch.zeros(2, 3, 6, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
    for given in ((ids, mask), Rows(ids, mask).left_padded()):
        found = model.generate(*given, **greedy)
        assert torch.equal(found[:, :6], given[0]) and torch.equal(found[:, 6:], torch.stack(alone))
    output = model.generate(ids, mask, num_beams=2, num_return_sequences=2, return_dict_in_generate=True, **greedy)
    assert torch.equal(output.sequences[:, :6], ids.repeat_interleave(2, 0))


def test_what_cannot_be_continued():
    model = made().eval()
    ids = torch.tensor([[5, 6], [7, 8]])
    assert model.max_tokens == 128
    with pytest.raises(ValueError, match="a row has no token"):
        model.generate(ids, torch.tensor([[1, 1], [0, 0]]))
    with pytest.raises(ValueError, match=r"a prompt of 2 tokens and 128 new ones .* positions: ask for fewer"):
        model.generate(ids, max_new_tokens=model.max_tokens)
    model.plain_model.generation_config.max_length = 10**6  # a model's own, which need not be reached
    model.plain_model.generation_config.eos_token_id = list(range(96))
    assert model.generate(ids, do_sample=False).shape == (2, 3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        model.generate(ids, max_new_tokens=0)


def test_long_prompts_beside_short_ones_that_wait_behind_a_memory():
    """Columns that are padding in all rows take no positions: two rows that fit alone fit together."""
    model = network(segment_overlap=0, beyond_budget="forget")
    memory = model.compress(torch.stack([ids_of(31)[0], ids_of(31, seed=1)[0]]), torch.ones(2, 31, dtype=torch.int64))
    short = model.compress(ids_of(17)).rows([0])
    waiting = Memory.cat([memory.rows([0]), short])
    assert [len(ids) for ids in waiting.unfinished] == [15, 1]
    room = model.max_tokens - model.reader.layout.first_position
    ids, mask = torch.zeros(2, 2, room - 4, dtype=torch.int64)
    for row, length in enumerate((2, room - 4)):
        ids[row, :length], mask[row, :length] = ids_of(length, seed=row)[0], 1
    found = model.generate(ids, mask, memory=waiting, max_new_tokens=2, do_sample=False)
    for row, length in enumerate((2, room - 4)):
        alone = model.generate(
            ids[row : row + 1, :length], memory=waiting.rows([row]), max_new_tokens=2, do_sample=False
        )
        assert torch.equal(found[row, room - 4 :], alone[0, length:])
