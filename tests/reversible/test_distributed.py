"""Reversible models under DDP and FSDP2: two real processes, a gloo group, the CPU, float32."""

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE = 2
# Longer than the 60 seconds after which a process gives up its group, so that its own traceback arrives.
SECONDS = 90
LAYERS, STEPS = 3, 2


class Workers:
    """A pair of worker processes, kept from test to test: starting them takes longer than a test does."""

    def __init__(self, folder):
        self.folder, self.processes, self.logs = folder, [], []

    def run(self, case, **arguments):
        """Every process's answer to a case of distributed_worker. A failure in one fails the test, and ends both."""
        if not self.processes:
            self.start()
        for process in self.processes:
            process.stdin.write(json.dumps({"case": case, **arguments}) + "\n")
            process.stdin.flush()
        try:
            return self.answers()
        except BaseException:
            self.stop()
            raise

    def answers(self):
        answers = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < WORLD_SIZE:
                ready = selector.select(SECONDS)
                if not ready:
                    pytest.fail(f"no answer in {SECONDS} seconds\n{self.logged()}")
                # Whichever comes first: after a failure the other process waits for its peer in vain.
                for key, _ in ready:
                    line = key.fileobj.readline()
                    answers[key.data] = answer = json.loads(line or '{"error": "the process ended"}')
                    if "error" in answer:
                        pytest.fail(f"rank {key.data}: {answer['error']}\n{self.logged()}")
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(WORLD_SIZE)]

    def start(self):
        attempt = len(list(self.folder.iterdir()))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if sys.platform == "linux":
            # Without it gloo looks the host's name up, which a container may not know.
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        for rank in range(WORLD_SIZE):
            log = open(self.folder / f"{attempt}.rank{rank}", "w+")  # noqa: SIM115 - the process writes to it
            self.logs.append(log)
            arguments = [str(rank), str(WORLD_SIZE), str(self.folder / f"{attempt}.store")]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.reversible.distributed_worker", *arguments],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )

    def logged(self):
        return "\n".join(Path(log.name).read_text()[-2000:] for log in self.logs)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        for log in self.logs:
            log.close()
        self.processes, self.logs = [], []


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    workers = Workers(tmp_path_factory.mktemp("distributed"))
    yield workers
    workers.stop()


def assert_trains_as_one_process(workers, microbatches=1, evaluations=None, **arguments):
    for answer in workers.run("training", microbatches=microbatches, **arguments):
        assert max(answer["gradients"]) < 1e-6
        assert max(answer["parameters"]) < 1e-6
        per_step = evaluations or [2 * microbatches] * LAYERS
        assert answer["evaluations"] == [per_step] * STEPS


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("first", ["make_reversible", "wrap"])
def test_ddp_trains_as_one_process(workers, first, tuning):
    """Under DDP, in both orders of wrapping and converting: over two steps every gradient, and every parameter after
    the step, is that of one process on all rows; each branch is evaluated twice a step."""
    assert_trains_as_one_process(workers, wrapper="ddp", first=first, tuning=tuning)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("first", ["make_reversible", "wrap"])
def test_fsdp2_trains_as_one_process(workers, first, tuning):
    """Under FSDP2, layers and root sharded, in both orders: as for DDP. The second step's parameters are gathered
    anew, after the first has resharded and changed them."""
    assert_trains_as_one_process(workers, wrapper="fsdp2", first=first, tuning=tuning)


@pytest.mark.parametrize("synchronise", ["last", "always"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_accumulated_gradients_are_those_of_one_process(workers, wrapper, tuning, synchronise):
    """Two microbatches a step, reduced once (no_sync, set_requires_gradient_sync) or each time, give the gradients of
    one process on all rows at once, at two evaluations a branch and microbatch."""
    assert_trains_as_one_process(
        workers, wrapper=wrapper, first="make_reversible", tuning=tuning, microbatches=2, synchronise=synchronise
    )


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_layers_below_the_adapters_are_evaluated_once(workers, wrapper):
    """With LoRA on the upper layers only, the streams start at the first of them: the layer below, whose input wants
    no gradient, is neither recomputed nor waited for, and the others' gradients are right."""
    assert_trains_as_one_process(
        workers, wrapper=wrapper, first="make_reversible", tuning="lora_upper", evaluations=[1, 2, 2]
    )


@pytest.mark.parametrize(
    "options", [{"find_unused_parameters": True}, {"static_graph": True}], ids=lambda o: next(iter(o))
)
def test_ddp_options(workers, options):
    """DDP finds the parameters of reversible layers in the graph: find_unused_parameters (which transformers' Trainer
    sets) and static_graph give the same gradients, with parameters below the adapters frozen."""
    assert_trains_as_one_process(
        workers, wrapper="ddp", first="make_reversible", tuning="lora_upper", evaluations=[1, 2, 2], **options
    )


def test_fsdp2_gathers_layers_above_the_loss(workers):
    """A loss on a lower layer's output: FSDP2 sees no backward pass of the layers above it and gathers nothing, yet
    the streams have to come down through them. Two steps, the gradients of one process."""
    for answer in workers.run("loss_below_the_last_layer"):
        assert max(answer["gradients"]) < 1e-6


@pytest.mark.parametrize("first", ["make_reversible", "wrap"])
def test_fsdp2_update_between_the_passes_is_noticed(workers, first):
    """FSDP2 keeps the version of the parameters it gathers, so that only the checksum can tell an update between the
    forward and the backward pass; every process raises."""
    for answer in workers.run("update_between_passes", first=first):
        assert answer["raised"] == "IntegrityError"


@pytest.mark.parametrize("first", ["make_reversible", "wrap"])
def test_fsdp2_units_within_a_layer_are_refused(workers, first):
    """Their gradients would stay unreduced in silence, other ones on each process."""
    for answer in workers.run("sharding_within_layers", first=first):
        assert answer["raised"] == "ValueError" and "fully_shard" in answer["message"]


@pytest.mark.parametrize("first", ["make_reversible", "wrap"])
def test_checks_of_a_sharded_model(workers, first):
    """check_inverse gathers each layer and is exact; check_gradients, which would find no gradient at all on the
    sharded parameters and so no difference, says that it cannot."""
    for answer in workers.run("checks", first=first):
        assert answer["exact"]
        assert answer["raised"] == "ValueError" and "fully_shard" in answer["message"]


@pytest.mark.parametrize("placement", ["every_layer", "input"])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_memory_network_trains_as_one_process(workers, wrapper, microbatches, placement):
    """An R3MemModel on rows of five segments, each replayed in the backward pass: the gradients of one process. FSDP2
    gathers one layer at a time, in the backward pass too."""
    for answer in workers.run("memory_network", wrapper=wrapper, microbatches=microbatches, placement=placement):
        assert max(answer["gradients"]) < (1e-6 if wrapper == "ddp" else 1e-5)
        assert wrapper == "ddp" or answer["gathered"] == 1


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_memory_network_with_kept_segments(workers, wrapper):
    """The same with each segment kept until the backward pass."""
    for answer in workers.run("memory_network", wrapper=wrapper, kept="device"):
        assert max(answer["gradients"]) < (1e-6 if wrapper == "ddp" else 1e-5)


def test_memory_network_in_the_units_of_accelerate(workers):
    """Embeddings sharded apart from the layers, norm and head together: the same gradients."""
    for answer in workers.run("memory_network", wrapper="fsdp2", ends=True):
        assert max(answer["gradients"]) < 1e-5


@pytest.mark.parametrize("tokens", [[37, 20], [37, 6]], ids=["three segments", "one segment"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_processes_with_other_numbers_of_segments(workers, wrapper, tokens):
    """Where one process has five segments and another three, or one and no memory, neither waits for the other in
    vain, and the gradients are those of one process."""
    for answer in workers.run("memory_network", wrapper=wrapper, tokens=tokens):
        assert max(answer["gradients"]) < (1e-6 if wrapper == "ddp" else 1e-5)


def test_histories_of_other_numbers_of_segments_are_refused(workers):
    """What is compressed cannot be made longer; each process says so, where otherwise all would wait for ever."""
    for rank, answer in enumerate(workers.run("unequal_histories")):
        assert answer["raised"] == "ValueError" and f"here are {5 - 2 * rank}" in answer["message"]
