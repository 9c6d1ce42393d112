"""One process of a gloo group on the CPU, started by test_distributed.py: reads cases, answers with measurements.

    python -m tests.reversible.distributed_worker RANK WORLD_SIZE STORE_FILE

Each line of standard input is a JSON object: the name of a case, a function here, and its arguments. Each line of
standard output is its result, or `{"error": traceback}`, after which the process ends, because the group may be out of
step.
"""

import contextlib
import datetime
import json
import os
import sys
import traceback

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from r3mem_fast import MomentumCoupling, check_gradients, check_inverse, make_reversible
from r3mem_fast.reversible.convert import find_decoder_layers
from tests.reversible.tiny import build, token_ids
from tests.test_model_memory import made

STEPS = 2
ROWS = 2  # of one microbatch
LAYERS = 3
SEGMENT_TOKENS = 37  # five segments of 8, the last a shorter one

# As fine as float32 at the size of these hidden states. On a coarser grid a last-bit difference between a product of 2
# rows and one of 8 would at times become a whole grid step, which says nothing about the distribution.
COUPLING = MomentumCoupling(bits=4, fraction_bits=24)


def training(wrapper, first, tuning, microbatches=1, synchronise="last", **options):
    """Train `STEPS` steps on every rank's share of the rows, and in one process on all of them.

    wrapper: "ddp" or "fsdp2". first: what is called before the other, "make_reversible" or "wrap". tuning: "full",
    "lora" or "lora_upper". synchronise: gradients are reduced after the "last" microbatch only, or "always". options:
    of DDP.
    Returns the largest relative differences and how often each layer's branch was evaluated, a value a step.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, reference = tuned_model(tuning), make_reversible(tuned_model(tuning), COUPLING)
    wrapped = reversible_and_wrapped(model, wrapper, first, options)
    evaluations = count_evaluations(model)
    optimizers = [torch.optim.SGD(trainable(m).values(), lr=0.05) for m in (model, reference)]
    result = {"gradients": [], "parameters": [], "evaluations": []}
    for step in range(STEPS):
        ids = token_ids(batch=ROWS * microbatches * world_size, seed=step)
        mine = ids.chunk(world_size)[rank].chunk(microbatches)
        for index, rows in enumerate(mine):
            with unsynchronised(wrapped, synchronise == "last" and index < microbatches - 1):
                (wrapped(input_ids=rows, labels=rows).loss / microbatches).backward()
        reference(input_ids=ids, labels=ids).loss.backward()
        result["gradients"].append(largest_difference(model, reference, lambda p: p.grad))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        result["parameters"].append(largest_difference(model, reference, lambda p: p.detach()))
        # Else a last-bit difference now would be ten of them in the next step's gradients, by the network's own doing.
        copy_parameters(model, reference)
        result["evaluations"].append(evaluations.copy())
        evaluations[:] = [0] * LAYERS
    return result


def memory_network(wrapper, kept="none", placement="every_layer", microbatches=1, tokens=None, ends=False, **options):
    """Train an R3MemModel for `STEPS` steps on rows of up to five segments, as in `training`.

    kept: its `kept_segments`. placement: its `memory_placement`. tokens: of a row, by rank. ends: whether FSDP2 has
    the embeddings in a unit of their own, and norm and head in another, as accelerate does it. Returns the largest
    relative differences of gradients, a value a step, and how many layers were gathered at once, when one of them ran.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = tokens or [SEGMENT_TOKENS] * world_size
    settings = {"kept_segments": kept, "memory_placement": placement, "fraction_bits": COUPLING.fraction_bits}
    model, reference = (made(base=tuned_model("full"), **settings).train() for _ in range(2))
    if ends:
        mesh, base = init_device_mesh("cpu", (world_size,)), model.peft_model.get_base_model()
        fully_shard(base.model.embed_tokens, mesh=mesh)
        fully_shard([base.model.norm, base.lm_head], mesh=mesh, reshard_after_forward=False)
    wrapped = DistributedDataParallel(model, **options) if wrapper == "ddp" else sharded(model)
    optimizers = [torch.optim.SGD(trainable(m).values(), lr=0.05) for m in (model, reference)]
    gathered = count_gathered(model)
    result = {"gradients": []}
    for step in range(STEPS):
        ids = token_ids(batch=ROWS * microbatches * world_size, tokens=max(tokens), seed=step).chunk(world_size)
        of_ranks = [rows[:, :count] for rows, count in zip(ids, tokens, strict=True)]
        for index, rows in enumerate(of_ranks[rank].chunk(microbatches)):
            with unsynchronised(wrapped, index < microbatches - 1):
                (wrapped(rows, labels=rows).loss / microbatches).backward()
        for rows in of_ranks:
            (reference(rows, labels=rows).loss / world_size).backward()
        result["gradients"].append(largest_difference(model, reference, lambda p: p.grad))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        copy_parameters(model, reference)
    return {**result, "gathered": max(gathered)}


def unequal_histories():
    """The error of compressing other numbers of segments in each process under FSDP2."""
    model = sharded(made(base=tuned_model("full")))
    queries = token_ids(tokens=4)
    contexts = token_ids(tokens=SEGMENT_TOKENS - 16 * dist.get_rank())
    return error_of(lambda: model(contexts, labels=contexts, query_input_ids=queries))


def loss_below_the_last_layer():
    """Two steps under FSDP2 of a loss on the output of layer 0: those above get no gradient, but are run backward."""
    model, reference = sharded(make_reversible(tuned_model("full"), COUPLING)), tuned_model("full")
    make_reversible(reference, COUPLING)
    ids = token_ids(batch=ROWS * dist.get_world_size())
    result = []
    for _ in range(STEPS):
        for network, rows in ((model, ids.chunk(dist.get_world_size())[dist.get_rank()]), (reference, ids)):
            network.zero_grad()
            network(input_ids=rows, output_hidden_states=True).hidden_states[1].pow(2).mean().backward()
        reached = {name for name, p in trainable(reference).items() if p.grad is not None}
        assert {name for name, p in trainable(model).items() if p.grad is not None} == reached
        result.append(largest_difference(model, reference, lambda p: p.grad, reached))
    return {"gradients": result}


def update_between_passes(first):
    """The error of a backward pass under FSDP2 after the parameters of a decoder layer were updated."""
    model = reversible_and_wrapped(tuned_model("full"), "fsdp2", first, {})
    ids = token_ids(seed=dist.get_rank())
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter.mul_(1.01)
    return error_of(loss.backward)


def sharding_within_layers(first):
    """The error of a forward pass whose layers' MLPs are FSDP2 units of their own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = tuned_model("full")
    if first == "make_reversible":
        make_reversible(model, COUPLING)
    for layer in model.model.layers:
        fully_shard(layer.mlp, mesh=mesh)
    sharded(model)
    if first == "wrap":
        make_reversible(model, COUPLING)
    return error_of(lambda: model(input_ids=token_ids()))


def checks(first):
    """check_inverse's verdict on a sharded model, and check_gradients' error."""
    model = reversible_and_wrapped(tuned_model("full"), "fsdp2", first, {})
    ids = token_ids(seed=dist.get_rank())
    return {"exact": check_inverse(model, ids).exact, **error_of(lambda: check_gradients(model, ids))}


def error_of(function):
    try:
        function()
    except Exception as error:
        return {"raised": type(error).__name__, "message": str(error)}
    return {"raised": None}


def tuned_model(tuning):
    # Larger matrices than at initialisation: attention must not be uniform, or its gradients would be rounding errors.
    model = build(hidden_size=64, intermediate_size=96, head_dim=16, num_hidden_layers=LAYERS, scale=4.0)
    if tuning == "full":
        return model
    upper = {"layers_to_transform": list(range(1, LAYERS))} if tuning == "lora_upper" else {}
    # init_lora_weights=False: B is not zero, so A has a gradient in the first step too.
    config = LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"], init_lora_weights=False, **upper
    )
    return get_peft_model(model, config)


def reversible_and_wrapped(model, wrapper, first, options):
    if first == "make_reversible":
        make_reversible(model, COUPLING)
    wrapped = DistributedDataParallel(model, **options) if wrapper == "ddp" else sharded(model)
    if first == "wrap":
        make_reversible(model, COUPLING)
    return wrapped


def sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in find_decoder_layers(model)[1]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def unsynchronised(wrapped, wanted):
    """Keep gradients local in this microbatch, if wanted."""
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync() if wanted else contextlib.nullcontext():
            yield
    else:
        wrapped.set_requires_gradient_sync(not wanted)
        yield


def count_evaluations(model):
    counts = [0] * LAYERS

    def counter(index):
        def count(module, arguments):
            counts[index] += 1

        return count

    for index, layer in enumerate(find_decoder_layers(model)[1]):
        layer.self_attn.register_forward_pre_hook(counter(index))
    return counts


def count_gathered(model):
    """A list that tells, each time that a layer starts, how many layers' parameters are whole."""
    counts, layers = [], find_decoder_layers(model)[1]

    def count(module, arguments):
        counts.append(sum(not hasattr(next(layer.parameters()), "full_tensor") for layer in layers))

    for layer in layers:
        layer.register_forward_pre_hook(count)
    return counts


@torch.no_grad()
def copy_parameters(source, target):
    values = trainable(source)
    for name, parameter in trainable(target).items():
        parameter.copy_(whole(values[name]))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(model, reference, value, names=None):
    """The largest relative 2-norm difference of a trainable parameter's `value`. All ranks call it together."""
    actual, expected = trainable(model), trainable(reference)
    assert actual.keys() == expected.keys()
    return max(relative_difference(whole(value(actual[n])), value(expected[n])) for n in sorted(names or expected))


def relative_difference(actual, expected):
    norm = expected.norm().item()
    return (actual - expected).norm().item() / norm if norm else float("inf")


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


CASES = {
    case.__name__: case
    for case in (
        training,
        memory_network,
        unequal_histories,
        loss_below_the_last_layer,
        update_between_passes,
        sharding_within_layers,
        checks,
    )
}


def main(rank, world_size, store_file):
    # Answers have standard output to themselves; whatever else is printed goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store_file}",
        rank=int(rank),
        world_size=int(world_size),
        timeout=datetime.timedelta(seconds=60),
    )
    for line in sys.stdin:
        try:
            arguments = json.loads(line)
            answer = CASES[arguments.pop("case")](**arguments)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer:
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
