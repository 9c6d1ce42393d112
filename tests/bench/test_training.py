import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import training
from bench.records import environment
from r3mem_fast.kernels import coupling
from r3mem_fast.reversible.convert import find_decoder_layers

LAYERS, HIDDEN, HEAD_DIM, TOKENS, VOCABULARY = 5, 32, 8, 16, 64


def tiny_llama(dtype=torch.bfloat16):
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD_DIM,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config).to(dtype)


def arm_of(name, dtype=torch.bfloat16, depth=None):
    model = tiny_llama(dtype)
    training.truncate(model, depth)
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % VOCABULARY
    return training.TrainingArm(name, model, ids, lora_rank=2)


def tables(dtype):
    """Rotary cosines and sines, and the position ids, which every arm holds."""
    return 2 * TOKENS * HEAD_DIM * dtype.itemsize + TOKENS * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_reversible_arm_holds_its_streams_and_side_bits_and_nothing_else(bits, dtype):
    elements = 2 * TOKENS * HIDDEN
    arm = arm_of(f"reversible-b{bits}", dtype)
    flags, tiles = 12, -(-elements // coupling.TILE)
    side = (LAYERS - 1) * elements * bits // 8
    checksums = LAYERS * 4 * tiles + 8 * tiles  # of every branch, and of the streams where they start
    assert arm.live().layers == 8 * elements + side + flags + checksums + tables(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_checkpointing_arm_holds_one_hidden_state_a_layer(dtype):
    memory = arm_of("checkpoint", dtype).live()
    hidden_states = [s for s in memory.storages if s.shape == (2, TOKENS, HIDDEN) and s.phase == "layers"]
    assert len(hidden_states) == LAYERS
    # Beside them a random state a layer, and scalars.
    random_states = LAYERS * torch.get_rng_state().nbytes
    scalars = sum(s.nbytes for s in memory.storages if s.shape == () and s.phase == "layers")
    assert memory.layers == sum(s.nbytes for s in hidden_states) + tables(dtype) + random_states + scalars
    assert scalars <= 8 * 7 * LAYERS


@pytest.mark.parametrize("bits", [2, 4])
def test_a_layer_more_costs_its_side_bits_and_checksums_alone(bits):
    """4 bytes of checksums for every 4096 elements."""
    live = [arm_of(f"reversible-b{bits}", depth=depth).live().layers for depth in (2, 3, LAYERS)]
    elements = 2 * TOKENS * HIDDEN
    slope = elements * bits // 8 + 4 * -(-elements // 4096)
    assert [live[1] - live[0], live[2] - live[1]] == [slope, (LAYERS - 3) * slope]


def test_arms_without_reversibility_train_alike_and_hold_less_the_more_they_checkpoint():
    arms = {name: arm_of(name) for name in training.ARMS if not name.startswith("reversible")}
    losses = {name: [arm.step(), arm.step()] for name, arm in arms.items()}
    assert len(set(map(tuple, losses.values()))) == 1, losses
    assert losses["plain"][1] < losses["plain"][0]
    live = {name: arm.live().layers for name, arm in arms.items()}
    assert live["checkpoint"] < live["checkpoint-every-4"] < live["plain"]
    if not torch.accelerator.is_available():
        assert live["checkpoint-offload"] == live["checkpoint"]
        assert "no accelerator" in arms["checkpoint-offload"].note


def test_measuring_the_live_bytes_leaves_the_arm_as_it_was():
    untouched, measured = arm_of("reversible-b4"), arm_of("reversible-b4")
    assert measured.live() == measured.live()
    assert untouched.step() == measured.step()
    assert untouched.step() == measured.step()


def test_an_arm_that_this_transformers_cannot_run_says_so(monkeypatch):
    monkeypatch.delattr("transformers.PreTrainedModel.activation_checkpointing_enable", raising=False)
    monkeypatch.setattr(
        "transformers.PreTrainedModel.gradient_checkpointing_enable",
        lambda self, gradient_checkpointing_kwargs=None: self._set_gradient_checkpointing(enable=True),
    )
    assert training.set_up(tiny_llama(), "checkpoint") is None
    with pytest.raises(training.Unavailable, match="no every_n_layers"):
        training.set_up(tiny_llama(), "checkpoint-every-4")


def test_truncation():
    model = tiny_llama()
    training.truncate(model, 2)
    assert len(find_decoder_layers(model)[1]) == model.config.num_hidden_layers == 2
    assert torch.isfinite(model(torch.arange(4)[None]).logits).all()
    with pytest.raises(ValueError, match=r"1\.\.2, got 3"):
        training.truncate(model, 3)


def record(arm, layers, live, **more):
    return {"arm": arm, "layers": layers, "live_bytes": live, **more}


def test_slopes():
    records = [
        record("checkpoint", 8, 1000),
        record("reversible-b4", 8, 500, side_bytes_per_layer=8, checksum_bytes_per_layer=2),
        {"arm": "checkpoint-offload", "note": "not here"},
        record("checkpoint", 16, 1804),
        record("reversible-b4", 16, 580, side_bytes_per_layer=8, checksum_bytes_per_layer=2),
        record("checkpoint", 30, 3204),
        record("reversible-b4", 30, 720, side_bytes_per_layer=8, checksum_bytes_per_layer=2),
    ]
    assert training.slopes(records) == [
        {"arm": "checkpoint", "depths": [8, 16, 30], "bytes_per_layer": [100.5, 100]},
        {
            "arm": "reversible-b4",
            "depths": [8, 16, 30],
            "bytes_per_layer": [10, 10],
            "side_bytes_per_layer": 8,
            "checksum_bytes_per_layer": 2,
        },
    ]
    assert "10, 10 bytes a layer (side bits 8, checksums 2)" in training.slope_table(training.slopes(records))


@pytest.fixture
def model_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "the", "a", "of", "is", "and", ".", ","]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tiny"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_command(model_folder, capsys):
    output = model_folder.parent / "result.jsonl"
    arguments = ["--model", str(model_folder), "--tokens", "24", "--runs", "3", "--arms", "checkpoint,reversible-b4"]
    training.main([*arguments, "--json", "--output", str(output)])
    captured = capsys.readouterr()
    checkpoint, reversible = lines = [json.loads(line) for line in captured.out.splitlines()]
    assert (checkpoint["arm"], reversible["arm"]) == ("checkpoint", "reversible-b4")
    assert reversible["live_bytes"] == 8 * 24 * HIDDEN + (LAYERS - 1) * 24 * HIDDEN // 2 + 20 + 2 * 24 * 8 * 2 + 24 * 8
    assert reversible["live_ratio"] == reversible["live_bytes"] / checkpoint["live_bytes"]
    assert checkpoint["live_ratio"] == checkpoint["step_ratio"] == 1
    low, high = reversible["step_ratio_quartiles"]
    assert 0 < low <= reversible["step_ratio"] <= high
    assert all(line["peak_rss"] > 1e8 and line["step_seconds"] > 0 and line["loss"] > 0 for line in lines)
    header, *written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == lines
    assert header["environment"]["torch"] == torch.__version__
    assert str(model_folder.parent) not in output.read_text()
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_failing_arm_is_named(model_folder, capsys):
    with pytest.raises(SystemExit, match=r"arm checkpoint: ValueError: depth must lie in 1\.\.5, got 9"):
        training.main(["--model", str(model_folder), "--tokens", "8", "--arms", "checkpoint", "--depth", "9"])


def test_wrong_arguments_are_refused_before_measuring(capsys, tmp_path):
    for arguments, message in [
        (["--arms", "checkpoint,reversible-b3"], "unknown arm 'reversible-b3'"),
        (["--output", str(tmp_path / "none" / "file")], "there is no folder"),
        (["--runs", "0"], "at least 1"),
    ]:
        with pytest.raises(SystemExit):
            training.main(arguments)
        assert message in capsys.readouterr().err


def test_the_environment_is_json_and_names_what_was_measured_on():
    found = json.loads(json.dumps(environment()))
    assert found["torch"] == torch.__version__
    assert found["threads"] >= 1
    assert found["date"].endswith("+00:00")


def test_the_table_shows_ratios_and_notes():
    measured = record(
        "checkpoint",
        2,
        1e6,
        live_bytes_total=2e6,
        peak_rss=None,
        step_seconds=0.5,
        live_ratio=1.0,
        step_ratio=1.0,
        step_ratio_quartiles=[0.9, 1.1],
        loss=3.0,
    )
    text = training.table([measured, {"arm": "checkpoint-offload", "note": "not here"}])
    assert "0.900–1.100" in text
    assert text.splitlines()[-1] == "checkpoint-offload: not here"
