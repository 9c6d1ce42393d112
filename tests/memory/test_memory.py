"""`Memory`: rows put together and taken apart, names, and a file that is whole or refused."""

import dataclasses
import json
import random
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from r3mem_fast import Memory
from r3mem_fast.choices import PLACEMENTS
from r3mem_fast.memory.layout import MemoryLayout, Origin
from r3mem_fast.memory.states import appended, empty_states

ORIGIN = Origin("base", "adapter", "tokenizer")


def layout(placement="every_layer", **settings):
    return MemoryLayout(**{"num_memory_tokens": 2, "segment_length": 8, "readable_segments": 3, "keeps_all": False,
                           "placement": placement, **settings})  # fmt: skip


def made(segments=(1, 3, 0), placement="every_layer", dtype=torch.float32, seed=0):
    """A memory of rows with so many segments, and as many unfinished tokens as the row's index."""
    generator = torch.Generator().manual_seed(seed)
    slots = 2 * max(min(n, 3) for n in segments)
    shape = (len(segments), slots, 5) if placement == "input" else (4, 2, len(segments), 2, slots, 3)
    states = torch.randn(shape, generator=generator).to(dtype)
    rest = tuple(torch.randint(0, 90, (index,), generator=generator) for index in range(len(segments)))
    memory = Memory(
        states,
        torch.tensor(segments),
        torch.tensor([8 * n + len(ids) for n, ids in zip(segments, rest, strict=True)]),
        rest,
        (torch.zeros(0, dtype=torch.int64),) * len(segments),
        tuple(("document", f"d{index}") for index in range(len(segments))),
        layout(placement),
        ORIGIN,
    )
    hidden = ~memory.visible()
    if placement == "input":
        states[hidden] = 0
    else:
        for row in range(len(segments)):
            states[:, :, row, :, hidden[row]] = 0
    return memory


def assert_same(found, expected):
    assert found.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        other = found.tensors()[name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
    assert (found.layout, found.origin, found.labels) == (expected.layout, expected.origin, expected.labels)
    assert len(found.unfinished) == len(expected.unfinished)
    assert all(map(torch.equal, found.unfinished, expected.unfinished))


@pytest.mark.parametrize("placement", PLACEMENTS)
@given(segments=st.lists(st.integers(0, 5), min_size=1, max_size=5), data=st.data())
def test_put_together_is_what_was_taken_apart(placement, segments, data):
    memory = made(segments, placement)
    assert_same(Memory.cat(memory.split()), memory)
    order = data.draw(st.permutations(range(len(segments))))
    there = memory.rows(order)
    assert_same(there.rows([order.index(row) for row in range(len(order))]), memory)
    assert there.labels == tuple(memory.labels[row] for row in order)
    cut = data.draw(st.integers(1, len(segments)))
    parts = [part for part in (memory[:cut], memory[cut:]) if len(part)]
    assert_same(Memory.cat(parts), memory)
    assert memory.visible().sum(1).tolist() == [2 * min(n, 3) for n in segments]


def test_batches_of_different_widths():
    """What has fewer segments gets zeros before it, that it does not see."""
    joined = Memory.cat([made([1]), dataclasses.replace(made([3], seed=1), labels=(None,))])
    assert joined.states.shape[4] == 6 and not joined.states[:, :, 0, :, :4].any()
    assert joined.visible().tolist() == [[False] * 4 + [True] * 2, [True] * 6]
    assert torch.equal(joined[0].states[..., 4:, :], made([1]).states)


def test_what_does_not_go_together():
    memory = made()
    for other, what in (
        (dataclasses.replace(memory, layout=layout(segment_length=9)), "layout"),
        (dataclasses.replace(memory, origin=Origin("base", "other")), "model or tokenizer"),
        (memory.to(torch.bfloat16), "dtype"),
        (memory.to("meta"), "device"),
    ):
        with pytest.raises(ValueError, match=f"must have the same {what}"):
            Memory.cat([memory, other])
    with pytest.raises(ValueError, match="no memory to put together"):
        Memory.cat([])


def test_names():
    memory = made().labelled([("document", "a"), ("paragraph", "a, paragraph 1"), ("paragraph", "b")])
    assert memory["document", "a"].tokens_seen.tolist() == memory[0].tokens_seen.tolist()
    assert memory.select("paragraph").labels == (("paragraph", "a, paragraph 1"), ("paragraph", "b"))
    assert memory.select(name="b").num_segments.tolist() == [0]
    assert memory[-1].labels == (("paragraph", "b"),) and len(memory[1:]) == 2
    with pytest.raises(KeyError, match="no memory with level='entity'"):
        memory.select("entity")
    with pytest.raises(IndexError):
        memory[3]
    assert made().labelled([None] * 3).labels == (None,) * 3
    assert len(made().labelled([("document", "a")] * 3).select(name="a")) == 3
    for labels in ([None], [("a", "b", "c")] * 3, ["ab"] * 3, [5, 6, 7], [("a", 1)] * 3):
        with pytest.raises(ValueError, match="3 rows need as many labels, each"):
            made().labelled(labels)


def test_what_it_says_of_itself():
    memory = made()
    assert memory.nbytes == 4 * memory.states.numel() + 8 * (3 + 3 + 3 + 3)
    assert memory.to(torch.float16).states.dtype == torch.float16 and memory.states.dtype == torch.float32
    assert "segments=[1, 3, 0]" in repr(memory) and "every_layer, float32" in repr(memory)
    grown = dataclasses.replace(memory, states=memory.states.clone().requires_grad_())
    assert not grown.detach().states.requires_grad


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_oldest_falls_out(placement):
    shape = layout(placement)
    sizes = (5,) if placement == "input" else (4, 2, 3)
    states = empty_states(shape, 2, sizes, dtype=torch.float32, device="cpu")
    dim = 1 if placement == "input" else 4

    def written(value, rows):
        size = list(states.shape)
        size[dim], size[0 if placement == "input" else 2] = 2, rows
        return torch.full(size, float(value))

    for value in range(1, 5):
        states = appended(states, written(value, 2), [0, 1], shape)
    states = appended(states, written(9, 1), [1], shape)
    first, second = states.unbind(0 if placement == "input" else 2)
    values = [row.movedim(dim - 1, 0).flatten(1)[:, 0].tolist() for row in (first, second)]
    assert values == [[2, 2, 3, 3, 4, 4], [3, 3, 4, 4, 9, 9]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_saved_and_loaded(tmp_path, placement, dtype):
    memory = made(placement=placement, dtype=dtype)
    path = tmp_path / "below" / "memory.safetensors"
    memory.save(path)
    assert_same(Memory.load(path), memory)
    with safe_open(path, "pt") as file:  # any reader of safetensors can look into it
        assert set(file.keys()) == set(memory.tensors())
        assert json.loads(file.metadata()["r3mem"])["origin"]["base"] == "base"
    first = path.read_bytes()
    memory.save(path)  # over what is there, and the same
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == [path.name]
    script = "import sys; from r3mem_fast import Memory; print(Memory.load(sys.argv[1]).states.double().sum().item())"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) == memory.states.double().sum().item()


def test_names_that_look_like_a_checksum(tmp_path):
    digest = "0" * 64
    labels = [("document", f'digest": "{digest}"'), ("digest", digest), ("é\n", f'\\digest\\": \\"{digest}\\"')]
    memory = made().labelled(labels)
    memory.save(tmp_path / "m")
    assert Memory.load(tmp_path / "m").labels == memory.labels


def test_an_empty_memory_is_saved_too(tmp_path):
    memory = made([0])
    memory.save(tmp_path / "m")
    assert_same(Memory.load(tmp_path / "m"), memory)


def test_several_writers(tmp_path):
    """Whoever reads meanwhile finds one of the files, whole."""
    path, memories = tmp_path / "m", [made(seed=seed) for seed in range(4)]
    memories[0].save(path)
    sums = {memory.states.sum().item() for memory in memories}
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(memory.save, path) for memory in memories * 20]
        found = {Memory.load(path).states.sum().item() for _ in range(50)}
        [write.result() for write in writes]
    assert found <= sums and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m"
    made().save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        made(seed=1).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_thousand_corruptions(tmp_path):
    """Flipped bits, truncations, swapped headers, pieces of other files: each is one ValueError or OSError."""
    memory = made([3, 2, 5], dtype=torch.bfloat16)
    memory.save(tmp_path / "good")
    made([1, 3, 0], seed=1, dtype=torch.bfloat16).save(tmp_path / "other")
    good, other = ((tmp_path / name).read_bytes() for name in ("good", "other"))
    header, other_header = (8 + struct.unpack("<Q", data[:8])[0] for data in (good, other))
    draw = random.Random(0)

    def flipped():
        data = bytearray(good)
        # Half of them in the header, which is less than half of the file.
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(header if draw.random() < 0.5 else len(data))] ^= 1 << draw.randrange(8)
        return bytes(data)

    kinds = {
        "flipped bits": flipped,
        "truncated": lambda: good[: draw.randrange(len(good))],
        "longer": lambda: good + draw.randbytes(draw.randrange(1, 100)),
        "another's header": lambda: other[:other_header] + good[header:],
        "another's data": lambda: good[:header] + other[other_header:],
        "overwritten": lambda: _overwritten(good, draw),
        "bytes moved": lambda: _moved(good, draw),
        "noise": lambda: draw.randbytes(draw.randrange(2000)),
    }
    path, refused = tmp_path / "bad", 0
    for _ in range(125):
        for kind, corrupt in kinds.items():
            data = corrupt()
            if data == good:
                continue
            path.write_bytes(data)
            with pytest.raises((ValueError, OSError)) as caught:
                Memory.load(path)
            assert str(path) in str(caught.value), (kind, caught.value)
            refused += 1
    assert refused >= 990
    assert_same(Memory.load(tmp_path / "good"), memory)


def _overwritten(data, draw):
    start = draw.randrange(len(data))
    piece = draw.choice([b"\0", b"\xff"]) * draw.randrange(1, 64)
    return data[:start] + piece[: len(data) - start] + data[start + len(piece) :]


def _moved(data, draw):
    first, second = sorted(draw.sample(range(len(data)), 2))
    return data[:first] + data[second:] + data[first:second]


@pytest.mark.parametrize(
    "change",
    [
        {"states": torch.zeros(4, 2, 2, 2, 6, 3)},
        {"states": torch.zeros(4, 2, 3, 2, 8, 3)},
        {"states": torch.zeros(4, 2, 3, 2, 4, 3)},
        {"states": torch.zeros(4, 3, 3, 2, 6, 3)},
        {"states": torch.zeros(4, 2, 3, 2, 6, 3, dtype=torch.int32)},
        {"states": torch.zeros(3, 6, 5)},
        {"num_segments": torch.tensor([1, 3])},
        {"num_segments": torch.tensor([1, 3, -1])},
        {"tokens_seen": torch.tensor([1.0, 3.0, 0.0])},
        {"unfinished": (torch.zeros(1, dtype=torch.int64),) * 2},
        {"unfinished": (torch.tensor([-1]),) * 3},
        {"labels": (None,)},
        {"labels": ("ab", "cd", "ef")},
        {"origin": Origin(5, "adapter")},
        {"layout": layout("nowhere")},
        {"layout": layout(num_memory_tokens=0)},
        {"layout": layout(num_memory_tokens="two")},
    ],
)
def test_files_that_are_whole_and_wrong(tmp_path, change):
    """Their checksum is right, and still what they hold does not fit together."""
    wrong = dataclasses.replace(made(), **change)
    wrong.save(tmp_path / "m")
    with pytest.raises(ValueError, match="no memory that this version of r3mem_fast can read"):
        Memory.load(tmp_path / "m")


def test_files_of_something_else(tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="no memory of r3mem_fast: its header names no checksum"):
        Memory.load(tmp_path / "foreign")
    with pytest.raises(OSError, match="No such file"):
        Memory.load(tmp_path / "missing")
    with pytest.raises(OSError):
        Memory.load(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("r3mem_fast.memory.file.FORMAT_VERSION", 99)
        made().save(tmp_path / "newer")
    with pytest.raises(ValueError, match="of format 99; this version reads"):
        Memory.load(tmp_path / "newer")
