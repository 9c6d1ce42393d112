"""Memories in a user's turn: the template's tokens stay, a text is compressed, a question follows in the same turn."""

import pytest
import torch

from r3mem_fast import Memory, R3MemPipeline
from r3mem_fast.cli import main
from r3mem_fast.questions import SegmentQuestions

TEMPLATE = "S:be brief.{% for m in messages %}U:{{ m.content }}.{% endfor %}A:"
TEXT = "Anna took the blue key to the mill. " * 3


@pytest.fixture
def pipeline(folder):
    found = R3MemPipeline(str(folder))
    found.tokenizer.chat_template = TEMPLATE
    return found


def test_a_memory_with_all_slots_is_the_turn(pipeline):
    """The control for what is pinned, where the question stands and what follows it: the rendered template itself."""
    pipeline.model.layout = pipeline.model.reader.layout = long_segments(pipeline)
    text = "Anna took the key."
    memory = pipeline.compress(text, chat=True, finish=True, progress=False)
    turn = [{"role": "user", "content": f"{text}\n\nWho?"}]
    whole = pipeline.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert whole == f"S:be brief.U:{text}\n\nWho?.A:"
    prompt = torch.tensor(pipeline.codec.prompts(["Who?"], chat=None, pinned=memory.pinned.tolist()))
    behind = pipeline.model(prompt, memory=memory).logits[0]
    ids = torch.tensor([pipeline.codec.ids(whole)])
    settings = {"max_new_tokens": 8, "do_sample": False}
    asked, raw = (pipeline.generate("Who?", memory=memory, chat=chat, **settings) for chat in (None, False))
    with torch.no_grad(), pipeline.model.disable_adapters():  # the base model, which reads these memories
        logits = pipeline.model.plain_model(ids).logits[0, -len(behind) :]
        assert (behind - logits).abs().max() < 2e-2 * logits.abs().max()
        assert asked == pipeline.generate(whole, **settings) != raw
        assert raw == pipeline.generate(f"S:be brief.U:{text}Who?", **settings)
        alone = pipeline.generate("Who?", chat=True, **settings)
        assert alone == pipeline.generate("S:be brief.U:Who?.A:", **settings)


def test_memories_in_a_turn_and_others_go_apart(pipeline):
    plain, chat = (pipeline.compress(TEXT, chat=chat, progress=False) for chat in (False, True))
    both = Memory.cat([plain, chat])
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert pipeline.generate("Who?", memory=both[0], **settings) == pipeline.generate("Who?", memory=plain, **settings)
    assert pipeline.generate("Who?", memory=both[1], **settings) == pipeline.generate("Who?", memory=chat, **settings)
    with pytest.raises(ValueError, match="stands in no user's turn"):
        pipeline.generate(["Who?", "What?"], memory=both, **settings)
    one = pipeline.model.compress(torch.tensor([[5, 6, 7]]), pinned=1)  # a first token that is no template
    assert pipeline.generate("Who?", memory=one, **settings) == pipeline.generate(
        "Who?", memory=one, chat=False, **settings
    )
    pipeline.tokenizer.chat_template = None  # of a model that does not chat
    pipeline.codec.__dict__.pop("turn", None)
    assert pipeline.generate("Who?", memory=one, **settings) == pipeline.generate(
        "Who?", memory=one, chat=False, **settings
    )


def long_segments(pipeline):
    from r3mem_fast import R3MemConfig

    config = R3MemConfig(memory_writer="matched", num_memory_tokens=48, memory_budget=48, segment_length=48)
    return config.memory_layout(pipeline.model.max_tokens)


def test_the_template_is_pinned_in_streams_and_files(pipeline, tmp_path):
    before = len(pipeline.codec.turn[0])
    memory = pipeline.compress(TEXT, chat=True, progress=False)
    assert memory.pinned.tolist() == [before] and memory.tokens_seen.tolist() == [before + len(TEXT)]
    pieces = pipeline.compress(TEXT[:7], chat=True, progress=False)
    pieces.save(tmp_path / "m")
    pieces = pipeline.compress(TEXT[7:], memory=tmp_path / "m", progress=False)
    assert torch.equal(pieces.states, memory.states) and pieces.pinned.tolist() == [before]
    both = pipeline.compress([TEXT, TEXT[:50]], chat=True, progress=False)
    answers = pipeline.generate(["Who?", "What?"], memory=both, max_new_tokens=5)
    assert answers[0] == pipeline.generate("Who?", memory=memory, max_new_tokens=5)
    assert Memory.load(tmp_path / "m").pinned.tolist() == [before]
    with pytest.raises(ValueError, match="leave them out where a memory goes on"):
        pipeline.compress(TEXT, memory=memory, chat=True, progress=False)


def test_bad_input(pipeline):
    plain = pipeline.compress(TEXT, progress=False)
    with pytest.raises(ValueError, match="stands in no user's turn"):
        pipeline.generate("Who?", memory=plain, chat=True)
    with pytest.raises(ValueError, match="the prompt is empty"):
        pipeline.generate("", chat=True)
    pipeline.tokenizer.chat_template = "nothing of the words"
    pipeline.codec.__dict__.pop("turn", None)
    with pytest.raises(ValueError, match="does not hold a user's words as they are"):
        pipeline.compress(TEXT, chat=True, progress=False)
    pipeline.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        pipeline.generate("Who?", chat=True)


def test_the_commands(folder, tmp_path, capsys):
    import shutil

    from transformers import AutoTokenizer

    chats = tmp_path / "model"
    shutil.copytree(folder, chats)
    tokenizer = AutoTokenizer.from_pretrained(chats)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chats)
    text, memory = tmp_path / "text.txt", str(tmp_path / "m")
    text.write_text(TEXT)
    run = ["--device", "cpu", "--model", str(chats)]
    assert main(["compress", str(text), "-o", memory, "--chat", *run]) == 0
    assert main(["generate", "Who?", "--memory", memory, "--max-new-tokens", "4", *run]) in (0, 1)
    capsys.readouterr()
    assert main(["inspect", memory]) == 0
    shown = capsys.readouterr().out
    assert "8 slots a segment of 32 and the 4 before it, 32 at most, beyond which: forget" in shown
    assert f"slots, {len('S:be brief.U:')} pinned" in shown
    assert main(["generate", "Who?", "--chat", "--max-new-tokens", "4", *run]) in (0, 1)
    sizes = ["--memory-tokens", "3", "--memory-budget", "5", "--segment-length", "16", "--segment-overlap", "2"]
    assert main(["compress", str(text), "-o", memory, *sizes, "--memory-queries", "own+pairs", *run]) == 0
    assert Memory.load(memory).slots.tolist() == [5] and Memory.load(memory).layout.queries == "own+pairs"
    assert main(["generate", "Who?", "--memory", memory, "--max-new-tokens", "4", *run]) in (0, 1)
    capsys.readouterr()
    assert main(["compress", str(text), "-o", memory, "--chat", "--device", "cpu", "--model", str(folder)]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_questions_of_segments(pipeline):
    """Queries of the pairs that the hierarchy makes of a segment; a pipeline lets its model ask them."""
    assert isinstance(pipeline.model.questions_of, SegmentQuestions)
    ids = torch.tensor(pipeline.codec.ids("Anna met Boris at the mill.\n\nThey spoke of Clara."))
    questions = [pipeline.codec.text(question) for question in pipeline.model.questions_of(ids)]
    assert questions and len(set(questions)) == len(questions)
    assert all(len(question) < len(ids) for question in questions)
    assert pipeline.model.questions_of(torch.tensor(pipeline.codec.ids(" \n"))) == []
