"""Refined memories: the values of one memory tuned to its own text, everything else as it was."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3mem_fast import Memory, R3MemConfig, R3MemModel, R3MemPipeline, RefineSettings
from r3mem_fast.cli.main import main
from r3mem_fast.memory.file import read_header
from r3mem_fast.training import refine as refining
from r3mem_fast.training.refine import refine
from tests.reversible.tiny import build

SLOTS, LENGTH = 4, 16
QUICK = RefineSettings(steps=30, asked_tokens=16, learning_rate=0.1, continued_share=0.0)
TEXT = "A fog came in from the sea, and the bell rang all night."


def network(writer="matched", family="llama", learned=0.0, **changes):
    given = {"num_memory_tokens": SLOTS, "memory_budget": 2 * SLOTS, "segment_length": LENGTH, "segment_overlap": 0}
    torch.manual_seed(0)
    config = R3MemConfig(memory_writer=writer, adapter_rows="memory", core=(1, 3), **{**given, **changes})
    model = R3MemModel(build(family, scale=2.0), config).eval()
    if learned:
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_B" in name:
                    parameter.normal_(std=learned)
    return model


def ids_of(tokens, seed=0):
    return torch.randint(3, 96, (tokens,), generator=torch.Generator().manual_seed(seed))


def itself(piece):
    """The piece is what asks for it."""
    return [piece]


def divergence(model, memory, text, asked):
    """Divergence behind a memory from behind its text, in nats a token, by `generate`'s own reading."""
    with torch.no_grad():
        found = model(asked[None], memory=memory).logits[0].log_softmax(-1)
        with model.disable_adapters():
            full = model.plain_model(torch.cat([text, asked])[None]).logits[0, len(text) :].log_softmax(-1)
    return (full.exp() * (full - found)).sum(-1).mean().item()


@pytest.mark.parametrize(("writer", "family"), [("matched", "llama"), ("anchored", "llama"), ("matched", "gpt2")])
def test_behind_a_refined_memory_the_model_goes_on_more_as_behind_the_text(writer, family):
    model, text = network(writer, family, learned=0.1 * (writer == "anchored")), ids_of(40)
    memory = model.compress(text[None], finish=True)
    report = refine(model, memory, [text], itself, QUICK, progress=False)
    before, after = (
        sum(divergence(model, some, text, text[start : start + LENGTH]) for start in range(0, 32, LENGTH))
        for some in (memory, report.memory)
    )
    assert after < 0.8 * before
    assert len(report.losses[0]) == report.steps == 30 and "30 steps each" in str(report)
    # The first loss is that of the memory as it was.
    losses = [divergence(model, memory, text, text[start : start + LENGTH]) for start in (0, 16, 32)]
    assert any(report.losses[0][0] == pytest.approx(loss, rel=1e-3) for loss in losses)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("writer", "family"), [("matched", "llama"), ("anchored", "llama"), ("matched", "gpt2")])
def test_a_share_of_the_steps_reads_on_behind_the_text(writer, family, share, monkeypatch):
    """As the base model itself goes on behind its end: sampled once, and not where nobody asks for it."""
    model, text, asked, sampled = network(writer, family, learned=0.1 * (writer == "anchored")), ids_of(40), [], []
    memory = model.compress(text[None], finish=True)
    sample = refining.sampled

    def noted(*given):
        sampled.append(given[1])
        return sample(*given)

    monkeypatch.setattr(refining, "sampled", noted)
    random_state = torch.get_rng_state()
    chosen = dataclasses.replace(QUICK, steps=40, continued_share=share, context_tokens=30)
    report = refine(model, memory, [text], lambda piece: asked.append(piece) or [piece], chosen, progress=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(report.losses[0]) == 40 and report.continued[0].count(False) == len(asked)
    assert [name in str(report) for name in ("what asks for them", "what follows them")] == [share < 1, share > 0]
    assert (0 < len(asked) < 40) if share == 0.5 else (len(asked) == 40 * (share == 0))
    assert len(sampled) == (share > 0) and all(torch.equal(row, text[-30:]) for ids in sampled for row in ids)
    if share == 1:
        with model.disable_adapters():  # others than were learned from
            others = sample(model, text[-30:].expand(8, -1), 16, 1)[:, 30:]
        before, after = (
            sum(divergence(model, some, text[-30:], other) for other in others) for some in (memory, report.memory)
        )
        assert after < before


@settings(max_examples=12)
@given(st.integers(20, 60), st.integers(0, 3), st.sampled_from(["rematch", "forget"]), st.booleans())
def test_only_values_of_slots_that_are_not_pinned_change(tokens, pinned, beyond, finish):
    model, text = network(beyond_budget=beyond), ids_of(tokens, seed=tokens)
    memory = model.compress(text[None], finish=finish, pinned=pinned)
    refined = refine(model, memory, [text], itself, RefineSettings(steps=2, asked_tokens=8), progress=False).memory
    assert refined.refined.tolist() == [2] and torch.equal(refined.states[:, 0], memory.states[:, 0])
    for field in dataclasses.fields(Memory):
        if field.name not in ("states", "refined"):
            mine, its = getattr(refined, field.name), getattr(memory, field.name)
            assert torch.equal(mine, its) if isinstance(mine, torch.Tensor) else str(mine) == str(its), field.name
    slots = memory.states.shape[4] - int(memory.slots[0])
    changed = (refined.states[:, 1] != memory.states[:, 1]).any(-1)[:, 0]
    assert not changed[:, :, : slots + min(pinned, int(memory.slots[0]))].any()
    assert changed[:, :, slots + pinned :].all()


def test_the_model_stays_as_it_is_and_rows_do_not_depend_on_each_other():
    model, texts = network(), [ids_of(40), ids_of(33, seed=1)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory = Memory.cat([model.compress(text[None], finish=True) for text in texts])
    both = refine(model, memory, texts, itself, QUICK, progress=False).memory
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    alone = refine(model, memory[0], texts[:1], itself, QUICK, progress=False).memory
    assert torch.equal(alone.states, both[0].states)
    other = refine(model, memory, texts, itself, dataclasses.replace(QUICK, seed=1), progress=False).memory
    assert not torch.equal(other.states, both.states)


def test_an_interrupted_run_goes_on_to_the_same_memory(tmp_path, monkeypatch):
    model, texts = network(), [ids_of(40), ids_of(33, seed=1)]
    memory = Memory.cat([model.compress(text[None], finish=True) for text in texts])
    every = dataclasses.replace(QUICK, steps=6, checkpoint_seconds=0.0, continued_share=0.5)
    draw = refining._Run._drawn
    whole = refine(model, memory, texts, itself, every, progress=False)

    class StopError(Exception):
        """Takes the place of Ctrl-C."""

    for stop in (1, 4, 6, 9):
        calls = []

        def stopping(run, drawn, calls=calls, stop=stop):
            calls.append(run)
            if len(calls) > stop:
                raise StopError
            return draw(run, drawn)

        path = tmp_path / f"{stop}.part"
        with monkeypatch.context() as patched, pytest.raises(StopError):
            patched.setattr(refining._Run, "_drawn", stopping)
            refine(model, memory, texts, itself, every, checkpoint=path, progress=False)
        report = refine(model, memory, texts, itself, every, checkpoint=path, progress=False)
        assert torch.equal(report.memory.states, whole.memory.states) and report.losses == whole.losses
        assert report.continued == whole.continued
    with pytest.raises(ValueError, match="another memory, text or settings"):
        refine(model, memory, texts, itself, QUICK, checkpoint=path, progress=False)
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="is damaged; delete it"):
        refine(model, memory, texts, itself, every, checkpoint=path, progress=False)


def test_what_cannot_be_refined_is_refused():
    model, text = network(), ids_of(40)
    memory = model.compress(text[None])
    with pytest.raises(ValueError, match="has 39 tokens, and the memory was made of 40"):
        refine(model, memory, [text[:39]], itself, QUICK, progress=False)
    with pytest.raises(ValueError, match="2 rows of tokens and 1 of memory"):
        refine(model, memory, [text, text], itself, QUICK, progress=False)
    short = ids_of(LENGTH - 1)
    for pinned in (0, 2):
        with pytest.raises(ValueError, match="row 0 has no slots that could be refined"):
            refine(model, model.compress(short[None], pinned=pinned), [short], itself, QUICK, progress=False)
    learned = network("tokens", memory_budget=None)
    with pytest.raises(ValueError, match="not those that adapters write or read"):
        refine(learned, learned.compress(text[None]), [text], itself, QUICK, progress=False)
    with pytest.raises(ValueError, match="learning_rate must be a number above 0"):
        RefineSettings(learning_rate=0.0)


def test_a_file_says_that_its_memory_was_refined(tmp_path):
    model, text = network(), ids_of(40)
    memory = model.compress(text[None])
    refined = refine(model, memory, [text], itself, QUICK, progress=False).memory
    joined = Memory.cat([memory, refined])
    assert joined.refined.tolist() == [0, 30] and joined.rows([1, 0]).refined.tolist() == [30, 0]
    joined.save(tmp_path / "joined.safetensors")
    again = Memory.load(tmp_path / "joined.safetensors", model)
    assert again.refined.tolist() == [0, 30] and torch.equal(again.states, joined.states)
    assert [row["refined"] for row in read_header(tmp_path / "joined.safetensors").rows] == [0, 30]
    assert memory.refined is None and "refined" not in memory.tensors()
    twice = refine(model, refined, [text], itself, QUICK, progress=False).memory
    assert twice.refined.tolist() == [60]


@pytest.mark.parametrize("chat", [False, True])
def test_a_pipeline_refines_by_the_text_and_its_queries(folder, chat):
    config = R3MemConfig(
        memory_writer="matched", adapter_rows="memory", num_memory_tokens=SLOTS, memory_budget=2 * SLOTS,
        segment_length=LENGTH, segment_overlap=0,
    )  # fmt: skip
    pipeline = R3MemPipeline(str(folder), config=config)
    pipeline.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}="
    memory = pipeline.compress({"fog": TEXT, "sea": TEXT[:30]}, chat=chat, progress=False)
    report = pipeline.refine(memory, {"sea": TEXT[:30], "fog": TEXT}, QUICK, progress=False)
    assert report.memory.labels == memory.labels and report.memory.refined.tolist() == [30, 30]
    assert all(sum(losses[-8:]) < sum(losses[:8]) for losses in report.losses)
    with pytest.raises(ValueError, match="give the very text"):
        pipeline.refine(memory, [TEXT, TEXT], QUICK, progress=False)


def test_the_command_refines_a_file_and_says_so(folder, tmp_path, capsys, monkeypatch):
    text, memory, output = (str(tmp_path / name) for name in ("fog.txt", "m.safetensors", "r.safetensors"))
    (tmp_path / "fog.txt").write_text(f"{TEXT}\n")
    sizes = ["--memory-tokens", "4", "--memory-budget", "8", "--segment-length", "16", "--segment-overlap", "0"]
    model = ["--model", str(folder), "--dtype", "float32"]
    assert main(["compress", text, *model, "-o", memory, *sizes]) == 0
    monkeypatch.setenv("R3MEM_MAX_STEPS", "3")
    assert main(["refine", text, "--memory", memory, *model, "-o", output, "--steps", "9", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["steps"] == 3 and len(told["losses"][0]) == 3
    assert not (tmp_path / "r.safetensors.part").exists()
    assert main(["inspect", output]) == 0
    assert "refined in 3 steps" in capsys.readouterr().out
    assert main(["generate", "A fog", "--memory", output, *model, "--max-new-tokens", "3"]) in (0, 1)
    (tmp_path / "fog.txt").write_text(TEXT * 2)
    assert main(["refine", text, "--memory", memory, *model, "-o", output]) == 2
    assert "give the very text" in capsys.readouterr().err
