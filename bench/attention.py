"""Memory-token attention against its peers: time of a forward pass, of both passes, and of decoding.

    python -m bench.attention --json              # on a GPU: T 512 to 32k, M 0 to 1024, D 64 and 128, GQA 1 and 4
    python -m bench.attention --json --few        # eleven cases, and the peers that need no compiler: minutes
    pytest bench --benchmark-only -k attention    # the same cases

One record a case and arm, with `milliseconds` (median, quartiles beside it) and `ratio`: the arm's time over that of
`r3mem`, the dispatched operation, in paired rounds. Arms:

    r3mem          `memory_attention` (decoding: `memory_decode`), by the implementation that the dispatcher chooses
    reference      the specification in PyTorch (up to 2048 tokens: it makes the whole matrix)
    vendor         the vendor's attention merged with a pass over the memory, where it can run; `kernel` is which it is
    specialised    on a GPU: our forward pass whose warps share out the work, where it can run; backward as `r3mem`
    sdpa           PyTorch's attention over memory and segment concatenated, the copy included, by the backend that it
                   chooses for a mask
    sdpa-flash, sdpa-cudnn, sdpa-efficient    on a GPU, each backend alone; flash by a causal mask at the lower right
    copy           the concatenation alone
    flex           on a GPU: FlexAttention, compiled for each shape, over the concatenation, with the block mask of
                   memory and diagonal; of some shapes, as each takes seconds to compile
    flash-attn     on a GPU, if the package is installed

float32 on the CPU, bfloat16 on a GPU, where decoding is timed in a CUDA graph: the device's time alone. Keys and
values of memory and segment are at their positions already.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import os
import statistics
import time
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention

from r3mem_fast.kernels.attention import dispatch, memory_attention, memory_decode, vendor
from r3mem_fast.kernels.attention.arguments import AttentionInputs, AttentionSettings

from .records import add_output_option, add_record

PASSES = ("forward", "both", "decode")
_MOST_OF_REFERENCE = 2048
_TOKENS_OF_FLEX, _MEMORIES_OF_FLEX = (4096, 32768), (0, 128)


@dataclasses.dataclass(frozen=True)
class TimedCase:
    """passed: of `PASSES`; tokens: of the segment, or in the cache."""

    passed: str
    tokens: int
    memory: int
    head_dim: int
    group: int
    key_heads: int
    rows: int = 1

    @property
    def name(self):
        """Name of the case, for tables."""
        rows = f" rows={self.rows}" if self.passed == "decode" else ""
        return f"{self.passed} T={self.tokens} M={self.memory} D={self.head_dim} GQA={self.group}{rows}"

    def tensors(self, device):
        """Make the tensors of the case on a device."""
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        generator = torch.Generator(device).manual_seed(0)

        def values(heads, tokens):
            shape = (self.rows, heads, tokens, self.head_dim)
            found = torch.randn(shape, generator=generator, device=device).to(dtype)
            return found.requires_grad_(self.passed == "both")

        queries = 1 if self.passed == "decode" else self.tokens
        query = values(self.group * self.key_heads, queries)
        return query, *(values(self.key_heads, n) for n in (self.tokens, self.tokens, self.memory, self.memory))

    def arms(self, given):
        """By name: the implementation that is to be forced (or None), and a function that makes the output."""
        query, key, value, memory_key, memory_value = given
        device = query.device.type
        decodes = self.passed == "decode"
        operation = memory_decode if decodes else memory_attention

        def joined():
            return torch.cat([memory_key, key], 2), torch.cat([memory_value, value], 2)

        repeated = False
        mask = None
        if not decodes and self.memory:
            mask = torch.ones(self.tokens, self.memory + self.tokens, dtype=torch.bool, device=device)
            mask = mask.tril(self.memory)
            repeated = device != "cpu"  # where no fast backend takes a mask with grouped heads

        def sdpa(mask=mask, backend=None, repeated=repeated):
            keys, values = joined() if self.memory else (key, value)
            if repeated:
                keys, values = (tensor.repeat_interleave(self.group, 1) for tensor in (keys, values))
            settings = {"attn_mask": mask, "is_causal": mask is None and not decodes, "enable_gqa": self.group > 1}
            if backend is None:
                return scaled_dot_product_attention(query, keys, values, **settings)
            with torch.nn.attention.sdpa_kernel(backend):
                return scaled_dot_product_attention(query, keys, values, **settings)

        def ours():
            return operation(*given)

        found = {"r3mem": (None, ours)}
        if self.tokens <= _MOST_OF_REFERENCE:
            found["reference"] = ("reference", ours)
        if not decodes:
            found["vendor"] = ("vendor", ours)
            if device != "cpu":
                found["specialised"] = ("specialised", ours)
        others = {"sdpa": sdpa, "copy": lambda: joined()[0]}
        if device != "cpu":
            others |= self._arms_of_gpus(query, joined, sdpa, decodes)
        return found | {name: (None, arm) for name, arm in others.items()}

    def _arms_of_gpus(self, query, joined, sdpa, decodes):
        from torch.nn.attention import SDPBackend
        from torch.nn.attention.bias import causal_lower_right
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        keys = self.memory + self.tokens
        flash_mask = None if decodes or not self.memory else causal_lower_right(self.tokens, keys)
        found = {
            "sdpa-flash": lambda: sdpa(flash_mask, SDPBackend.FLASH_ATTENTION, repeated=False),
            "sdpa-cudnn": lambda: sdpa(backend=SDPBackend.CUDNN_ATTENTION),
            "sdpa-efficient": lambda: sdpa(backend=SDPBackend.EFFICIENT_ATTENTION),
        }
        if importlib.util.find_spec("flash_attn") is not None:
            from flash_attn import flash_attn_func

            def flash_attn():
                turned = (tensor.transpose(1, 2) for tensor in (query, *joined()))
                return flash_attn_func(*turned, causal=True).transpose(1, 2)

            found["flash-attn"] = flash_attn
        if self.tokens not in _TOKENS_OF_FLEX or self.memory not in _MEMORIES_OF_FLEX:
            return found
        memory, queries = self.memory, query.shape[2]

        def seen(row, head, query_index, key_index):
            return key_index <= query_index + memory + (keys - memory - queries)

        block_mask = create_block_mask(seen, None, None, queries, keys, device=query.device)
        torch._dynamo.reset()  # it compiles a few shapes of a function, and runs others uncompiled
        compiled = torch.compile(flex_attention, dynamic=False)
        found["flex"] = lambda: compiled(query, *joined(), block_mask=block_mask, enable_gqa=self.group > 1)
        return found


def timed_cases(device, few=False):
    """Cases that are timed: all of them on a GPU, or a few of them; others on a CPU."""
    if few and device != "cpu":
        segments = [
            TimedCase(passed, tokens, 128, dim, 4, 8)
            for passed, tokens, dim in itertools.product(("forward", "both"), (4096, 16384), (64, 128))
        ]
        # Keys and values larger than a cache of 50 MB, so that no replay of a graph finds them in it.
        sizes = ((32768, 1), (4096, 17), (32768, 17))
        return segments + [TimedCase("decode", tokens, 128, 128, 4, 8, rows) for tokens, rows in sizes]
    if device == "cpu":
        sizes = [(272, 16), (1024, 64), (2048, 128)]
        found = [TimedCase(passed, t, m, 64, 3, 3) for passed in PASSES for t, m in sizes]
        return [*found, TimedCase("forward", 1024, 0, 64, 3, 3)]
    found = []
    for passed in PASSES:
        for tokens, memory, dim, group in itertools.product(
            (512, 2048, 4096, 8192, 32768), (0, 16, 128, 1024), (64, 128), (1, 4)
        ):
            found.append(TimedCase(passed, tokens, memory, dim, group, 32 // group, rows=max(1, 8192 // tokens)))
    return found


def forced(implementation):
    """Force an implementation of ours in the block, if one is named: a context manager."""
    variables = {} if implementation is None else {dispatch.VARIABLE: implementation}
    if implementation == "specialised":
        variables = {dispatch.VARIABLE: "triton", dispatch.FORWARD_VARIABLE: implementation}
    return mock.patch.dict(os.environ, variables)


def step_of(case, arm, tensors):
    """What is timed of an arm: the pass, or both, with the gradients of all tensors of the case."""
    if case.passed != "both":
        return arm
    grad_output = torch.ones_like(arm())
    leaves = [tensor for tensor in tensors if tensor.numel()]

    def step():
        torch.autograd.grad(arm(), leaves, grad_output)

    return step


def records_of(case, device, rounds, few=False):
    """One record an arm; those that cannot run say why."""
    steps, refused = {}, {}
    tensors = case.tensors(device)
    for name, (implementation, arm) in case.arms(tensors).items():
        if (name == "copy" and case.passed == "both") or (few and name in ("reference", "flex")):
            continue
        try:
            with forced(implementation):
                step = step_of(case, arm, tensors)
                step()
                time_of(step, device, graph=case.passed == "decode")  # which not every arm can be captured for
        except RuntimeError as error:  # of a backend that does not take the case; said in its record
            refused[name] = str(error).splitlines()[0]
            continue
        steps[name] = (implementation, step)
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (implementation, step) in steps.items():
            with forced(implementation):
                times[name].append(time_of(step, device, graph=case.passed == "decode"))
    common = dataclasses.asdict(case)
    inputs, settings = AttentionInputs(*tensors), AttentionSettings(case.head_dim**-0.5)
    choose = dispatch.choose_for_decoding if case.passed == "decode" else dispatch.choose
    runs = {name: name for name in steps} | {"r3mem": choose(inputs, settings).implementation}
    if "specialised" in steps:  # which leaves to the other kernel what it does not take
        with forced("specialised"):
            runs["specialised"] = dispatch.choose_forward(inputs, settings).implementation
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, times["r3mem"], strict=True)]
        low, _, high = statistics.quantiles(found, n=4)
        yield {
            **common,
            "arm": name,
            "runs": runs[name],
            **({"kernel": vendor.choose_kernel(*tensors[:3])} if name == "vendor" else {}),
            "milliseconds": round(statistics.median(found), 4),
            "milliseconds_quartiles": [round(low, 4), round(high, 4)],
            "ratio": round(statistics.median(ratios), 3),
        }
    for name, why in refused.items():
        yield {**common, "arm": name, "refused": why}


def time_of(step, device, *, graph=False):
    """Time a step once on the CPU, or several times on a GPU with a cold L2 cache: the median.

    With `graph` it is captured as a CUDA graph, whose time does not depend on the host; in the cache is then what the
    last step left there.
    """
    if device == "cpu":
        started = time.perf_counter()
        step()
        return (time.perf_counter() - started) * 1e3
    from triton.testing import do_bench, do_bench_cudagraph

    if graph:
        return do_bench_cudagraph(step, rep=20, return_mode="median")
    return do_bench(step, warmup=5, rep=20, return_mode="median")


def main(arguments=None):
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, choices=range(2, 1000), metavar="N", help="(CPU: 15; GPU: 2)")
    parser.add_argument("--few", action="store_true", help="a few cases, and no arm that takes long to compile")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    records = []
    rounds = options.rounds or (15 if options.device == "cpu" else 2)
    for case in timed_cases(options.device, options.few):
        if options.only in case.name:
            for record in records_of(case, options.device, rounds, options.few):
                add_record(record, records, options)
    if not records:
        parser.error(f"no case's name contains {options.only!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
