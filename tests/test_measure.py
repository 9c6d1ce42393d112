import gc
import subprocess
import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from r3mem_fast.measure import StorageRecorder, forward_memory


def live_bytes(recorder):
    return sum(storage.nbytes for storage in recorder.live())


def test_saved_tensors_of_a_graph_counted_by_hand():
    inputs, weight = torch.randn(16, 8), torch.randn(8, 4, requires_grad=True)
    with StorageRecorder() as recorder:
        # The product saves its inputs, which were there before; exp saves its result, sum nothing.
        loss = (inputs @ weight).exp().sum()
    assert live_bytes(recorder) == 16 * 4 * 4 + 4
    loss.backward()
    assert live_bytes(recorder) == 4, "only the loss itself; the gradient came later"


def closure_over(tensor):
    return lambda: tensor


def test_a_storage_counts_once_however_it_is_held_and_as_long_as_it_lives():
    class Holder:
        pass

    holder = Holder()
    with StorageRecorder() as recorder:
        holder.view = torch.ones(10, 10).t()
        holder.other = holder.view[2:4]
        function = closure_over(torch.ones(7))
        torch.ones(1000)
    assert live_bytes(recorder) == 400 + 28
    assert [storage.origin for storage in recorder.live()] == ["aten.ones.default"] * 2
    del function, holder.view
    assert live_bytes(recorder) == 400, "another view holds it"
    del holder
    assert live_bytes(recorder) == 0, "the recorder keeps nothing alive"


def test_what_existed_before_does_not_count():
    before = torch.zeros(10, requires_grad=True)
    with StorageRecorder() as recorder:
        views = [before.view(2, 5), before.detach().add_(1), before[3:]]
    assert live_bytes(recorder) == 0
    assert len(views) == 3


def test_tensors_made_without_the_dispatcher_count():
    array = numpy.zeros(6, dtype=numpy.float32)
    with StorageRecorder() as recorder:
        random_state = torch.get_rng_state()
        from_array = torch.from_numpy(array)
        used = torch.get_rng_state()
        copy = used.clone()
    del copy
    assert live_bytes(recorder) == 2 * random_state.nbytes + from_array.nbytes
    assert all(storage.origin is None for storage in recorder.live())


@settings(max_examples=20)  # each walks through all of Python's objects
@given(st.lists(st.tuples(st.integers(1, 64), st.booleans()), max_size=30))
def test_freed_memory_that_is_used_again_is_not_mistaken(allocations):
    kept = []
    with StorageRecorder() as recorder:
        for size, keep in allocations:
            tensor = torch.zeros(size)
            if keep:
                kept.append(tensor)
            del tensor
    assert live_bytes(recorder) == sum(tensor.nbytes for tensor in kept)


def test_a_resized_storage_counts_with_its_size_now():
    with StorageRecorder() as recorder:
        tensor = torch.zeros(8)
        tensor.untyped_storage().resize_(400)
    assert live_bytes(recorder) == 400


class Tower(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.checkpointed = checkpointed

    def forward(self, hidden):
        for layer in self.layers:
            if self.checkpointed:
                hidden = checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(hidden)
        return hidden.exp().sum()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_and_head_are_told_apart(checkpointed):
    model, inputs = Tower(checkpointed), torch.randn(5, 8)
    loss, memory = forward_memory(lambda: model(inputs), model.layers[-1])
    # Two hidden states in either case: tanh saves its output, and a checkpoint its input. The last layer's output
    # is the head's, and only the plain network holds it, for its own tanh.
    assert memory.layers == 2 * 5 * 8 * 4
    assert memory.total == memory.layers + (1 if checkpointed else 2) * 5 * 8 * 4 + 4
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_collector_is_left_as_it_was():
    model = Tower(False)
    forward_memory(lambda: model(torch.randn(5, 8)), model.layers[-1])
    assert gc.isenabled()


def test_a_last_layer_that_does_not_run_is_refused():
    model = Tower(False)
    with pytest.raises(RuntimeError, match="did not run the layer given, a Linear"):
        forward_memory(lambda: model(torch.randn(5, 8)), nn.Linear(1, 1))


_PEAKS = """
import torch
from r3mem_fast.measure import peak_rss, reset_peak_rss
if reset_peak_rss():
    before = peak_rss()
    block = torch.ones(1 << 26)
    during = peak_rss()
    del block
    after = peak_rss()
    reset_peak_rss()
    print(before, during, after, peak_rss())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_peak_rss_follows_use_and_can_be_reset():
    """In a fresh process: one that has run other tests gives memory back when it likes."""
    command = [sys.executable, "-c", _PEAKS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if not printed:
        pytest.skip("the kernel does not let a process reset its peak")
    before, during, after, reset = map(int, printed)
    size = 4 << 26
    assert during - before >= 0.9 * size
    # The kernel counts a process's pages in batches.
    assert after == pytest.approx(during, rel=0.01)
    assert during - reset >= 0.8 * size
