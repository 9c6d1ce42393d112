import functools
import json
import multiprocessing
import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import context, models, training, training_arms
from bench.records import environment
from r3mem_fast import compile_layers
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
        assert live["checkpoint-offload"] == live["checkpoint"] - arms["checkpoint"].host_bytes
        assert "no accelerator" in arms["checkpoint-offload"].note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_waits_in_host_memory_is_counted_apart(dtype):
    """A hidden state a layer, or a layer's side bits; the device keeps the rest of what the arm without offload does.
    Loss and gradients are that arm's."""
    elements = 2 * TOKENS * HIDDEN
    hidden, side = LAYERS * elements * dtype.itemsize, (LAYERS - 1) * elements
    expected = {
        "plain": 0, "checkpoint": 0, "reversible-b4": 0, "checkpoint-hidden-offload": hidden,
        "reversible-b4-offload": side // 2, "reversible-b2-offload": side // 4,
    }  # fmt: skip
    task, found = training.Task(dtype=str(dtype).removeprefix("torch.")), {}
    for name in (*expected, "checkpoint-offload"):
        arm = arm_of(name, dtype)
        found[name] = training._record(arm, name, 0.0, arm.live(), None)
        arm.forward().backward()
        found[name]["gradients"] = [p.grad for p in arm.model.parameters() if p.grad is not None]
    assert task.device == "cpu"
    assert {name: found[name]["live_host_bytes"] for name in expected} == expected
    # Its hooks see what checkpointing saves beside them: scalars.
    assert hidden <= found["checkpoint-offload"]["live_host_bytes"] <= hidden + 64 * LAYERS
    for name, without in (
        ("checkpoint-offload", "checkpoint"), ("checkpoint-hidden-offload", "checkpoint"),
        ("reversible-b4-offload", "reversible-b4"),
    ):  # fmt: skip
        assert found[name]["live_bytes"] <= found[without]["live_bytes"] - min(hidden, side // 2)
        for own, other in zip(found[name]["gradients"], found[without]["gradients"], strict=True):
            assert torch.equal(own, other)


def test_bytes_alone(monkeypatch):
    """One process for all arms, no times; each arm's bytes are those of a model of its own."""
    monkeypatch.setattr(training, "_Worker", ThreadWorker)
    monkeypatch.setitem(models.SHAPES["smollm2-135m-shape"], "num_hidden_layers", 3)
    arms = ["plain", "checkpoint", "checkpoint-hidden-offload", "checkpoint-offload", "reversible-b4-offload"]
    task = training.Task(model="smollm2-135m-shape", tokens=8)
    found = training.measure(task, arms, runs=0)
    assert [record["arm"] for record in found] == arms
    for record in found:
        assert not {"step_seconds", "peak_rss", "max_memory_bytes"} & record.keys()
        if not record["arm"].endswith("-offload"):
            continue
        alone = training.load_arm(task, record["arm"])
        alone.live()
        expected = training._record(alone, record["arm"], 0.0, alone.live(), None)
        for name in ("live_bytes", "live_bytes_total", "live_host_bytes"):
            assert record[name] == expected[name], (record["arm"], name)
    assert found[4]["live_host_bytes"] == 2 * 8 * 576 // 2
    assert "host MB" in training.table(found)


def test_compiled_arms_are_set_up_and_undone(monkeypatch):
    """They train as their namesakes do; what is timed after them runs uncompiled."""
    monkeypatch.setattr(training_arms, "compile_layers", functools.partial(compile_layers, backend="aot_eager"))
    quick = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    arm = arm_of("plain")
    layer, losses = arm.layers[0], {}
    for name in training_arms.COMPILED_ARMS:
        base = arm.model.get_base_model()
        training.set_up(base, name)
        compiled = layer._compiled_call_impl is not None
        losses[name] = arm.forward().item()
        training_arms.tear_down(base, name)
        assert compiled != name.startswith("reversible") and layer._compiled_call_impl is None
        assert bool(arm.bytes_per_layer(name)) == name.startswith("reversible")
        training.set_up(base, name.removesuffix("-compiled"))
        assert arm.forward().item() == pytest.approx(losses[name], rel=1e-4)
        training_arms.tear_down(base, name.removesuffix("-compiled"))


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
    arguments = ["--model", str(model_folder), "--tokens", "24", "--runs", "3", "--device", "cpu"]
    arguments += ["--arms", "checkpoint,reversible-b4"]
    training.main([*arguments, "--json", "--output", str(output)])
    captured = capsys.readouterr()
    checkpoint, reversible = lines = [json.loads(line) for line in captured.out.splitlines()]
    assert (checkpoint["arm"], reversible["arm"]) == ("checkpoint", "reversible-b4")
    assert (
        reversible["live_bytes"]
        == 8 * 24 * HIDDEN + (LAYERS - 1) * 24 * HIDDEN // 2 + 12 + 4 * LAYERS + 8 + 2 * 24 * 8 * 2 + 24 * 8
    )
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
        arguments = ["--model", str(model_folder), "--device", "cpu", "--tokens", "8", "--arms", "checkpoint"]
        training.main([*arguments, "--depth", "9"])


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


def test_the_fused_loss_is_the_models_own():
    """Loss and gradients, over more than one chunk of tokens."""
    found = []
    for loss in ("model", "fused"):
        ids = torch.arange(2 * TOKENS).view(2, TOKENS) % VOCABULARY
        arm = training.TrainingArm("reversible-b4", tiny_llama(torch.float32), ids, lora_rank=2, loss=loss)
        value = arm.forward()
        value.backward()
        found.append([value.detach(), *(p.grad for p in arm.model.parameters() if p.requires_grad)])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


def test_random_weights_of_a_shape(monkeypatch):
    monkeypatch.setitem(models.SHAPES["smollm2-135m-shape"], "num_hidden_layers", 2)
    task = training.Task(model="smollm2-135m-shape", tokens=8, loss="fused")
    arm = training.load_arm(task, "checkpoint")
    assert arm.input_ids.shape == (1, 8) and arm.model.dtype == torch.bfloat16
    assert len(arm.layers) == 2 and 9 < arm.step() < 13  # log(49152) = 10.8
    with pytest.raises(training.Unavailable, match="needs the package liger-kernel and a GPU"):
        training.load_arm(task, "checkpoint-liger")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_asked_for_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        training.main(["--device", "cuda"])
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="PyTorch sees no GPU here"):
        context.main([])


@pytest.mark.parametrize("truth", [1, 5, 1000, 1024, 7777, 40000])
@pytest.mark.parametrize("guess", [0, 900, 8000, 50000])
def test_the_longest_context_is_bounded_by_trials_alone(truth, guess):
    tried = {}

    def fits(length):
        assert length not in tried, "tried twice"
        tried[length] = length <= truth
        return tried[length]

    low, high = context.longest(fits, guess=guess, granularity=16)
    assert low == 0 or tried[low]
    assert not tried[high] and low <= truth < high
    assert high - low <= max(16, 0.03 * low) and low % 16 == high % 16 == 0
    assert len(tried) < 20


class ThreadWorker(training._Worker):
    """The process of an arm, as a thread of this one, so that it can be told that there is a GPU."""

    def __init__(self, task, arm):
        self._arm = arm
        self._connection, theirs = multiprocessing.Pipe()
        self._process = threading.Thread(target=training._work, args=(task, arm, theirs))
        self._process.start()


def test_measuring_on_a_gpu(monkeypatch):
    """The flow, with PyTorch's CUDA counters stood in for: one loading for all arms; what does not fit is noted."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    monkeypatch.setattr(training, "_Worker", ThreadWorker)
    monkeypatch.setitem(models.SHAPES["smollm2-135m-shape"], "num_hidden_layers", 3)
    measure_as = training.TrainingArm.measure_as

    def without_memory_for_plain(self, arm):
        if arm == "plain":
            raise torch.OutOfMemoryError("no")
        return measure_as(self, arm)

    monkeypatch.setattr(training.TrainingArm, "measure_as", without_memory_for_plain)
    monkeypatch.setattr(training, "load", lambda name, **options: models.load(name, **{**options, "device": "cpu"}))
    task = training.Task(model="smollm2-135m-shape", tokens=8, device="cuda", loss="fused")
    arms = ["plain", "checkpoint-liger", "checkpoint", "reversible-b4"]
    saved = []
    found = training.measure(task, arms, runs=2, save=lambda records: saved.append(len(records)))
    assert saved == sorted(saved) and {1, 2, 3, 4} <= set(saved)
    records = {record["arm"]: record for record in found}
    assert list(records) == arms
    assert records["plain"]["note"] == "out of memory"
    assert records["checkpoint-liger"]["note"] == "needs the package liger-kernel and a GPU"
    assert records["reversible-b4"]["step_ratio"] > 0 and records["reversible-b4"]["runs"] == 2
    assert "step_seconds" not in records["plain"] and records["checkpoint"]["step_ratio"] == 1
    assert records["checkpoint"]["max_memory_bytes"] == 12345
    elements = 8 * 576
    assert records["reversible-b4"]["side_bytes_per_layer"] == elements // 2
    assert records["reversible-b4"]["checksum_bytes_per_layer"] == 8
    assert records["reversible-b4"]["live_bytes"] < records["checkpoint"]["live_bytes"] * 2
    assert "plain: out of memory" in training.table(found)
