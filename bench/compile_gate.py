"""Compile every kernel for real GPUs, with none at hand, and read from the machine code what it will do there.

    python -m bench.compile_gate --json

One record a kernel, target, dtype and number of side bits, through the same `specialise` as a launch:

    registers      of a thread
    spills         bytes of local memory of a thread: what did not fit into registers
    shared_bytes   of a program; limits: 163 KiB on cuda:80, 227 KiB on cuda:90 and cuda:100, 64 KiB on gfx942
    vector_bytes   the widest access to global memory
    fused          fused multiply-adds, which would make the inverse inexact

Exit status 1 if a kernel fails to compile, spills, exceeds its shared memory, has no 16-byte access or fuses.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

from .coupling_cases import DTYPES, cases
from .records import add_output_option, write_records

# Elements of the arguments: divisible by 16, as every model's are.
_NUMEL = 1 << 24
_SHARED_LIMIT = {"cuda:80": 163, "cuda:90": 227, "cuda:100": 227, "hip:gfx942": 64}  # KiB
TARGETS = tuple(_SHARED_LIMIT)


def compile_case(case, target) -> dict:
    """Compile one case for one target; its record, with `error` where the compiler raised."""
    # Here: a process of the pool is told by its parent's environment whether to interpret, before it imports these.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from r3mem_fast.kernels.common.launch import specialise
    from r3mem_fast.kernels.coupling import triton as implementation

    backend, architecture = target.split(":")
    warp = 64 if backend == "hip" else 32
    gpu = GPUTarget(backend, int(architecture) if backend == "cuda" else architecture, warp)
    tensors, settings = case.inputs(_NUMEL, "meta")
    launch, _ = getattr(implementation, f"plan_{case.operation}")(*tensors.values(), **settings)
    variant = specialise(launch, warp)
    record = {
        "kernel": case.name,
        "target": target,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bits": case.bits,
    }
    try:
        source = ASTSource(launch.kernel, variant.signature, variant.constexprs, variant.attrs)
        compiled = triton.compile(source, target=gpu, options=variant.options)
    except Exception as error:  # the compiler's own, of many types; reported, and the gate fails
        return {**record, "error": f"{type(error).__name__}: {error}"}
    record["shared_bytes"] = compiled.metadata.shared
    return {**record, **(_read_cubin(compiled) if backend == "cuda" else _read_amdgcn(compiled))}


def problems(record) -> list[str]:
    """What is wrong with a record, in words."""
    if "error" in record:
        return [record["error"]]
    found = []
    if record["spills"]:
        found.append(f"{record['spills']} bytes of spills")
    if record["vector_bytes"] < 16:
        found.append(f"widest access {record['vector_bytes']} bytes, not 16")
    if record["fused"]:
        found.append(f"{record['fused']} fused multiply-adds")
    if record["shared_bytes"] > _SHARED_LIMIT[record["target"]] * 1024:
        found.append(f"{record['shared_bytes']} bytes of shared memory")
    return found


def _read_cubin(compiled):
    import triton

    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output([tools.cuobjdump.path, "--dump-resource-usage", file.name])
        code = _output([tools.nvdisasm.path, "--print-code", file.name])
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    widths = [int(bits or 32) for bits in re.findall(r"\b(?:LDG|STG)\b[A-Z0-9.]*?(?:\.(64|128))?\s", code)]
    return {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "vector_bytes": max(widths) // 8,
        "fused": len(re.findall(r"\bFFMA\b", code)),
    }


def _read_amdgcn(compiled):
    code = compiled.asm["amdgcn"]
    used = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", code))
    widths = re.findall(r"\b(?:global|buffer|flat)_(?:load|store)_dword(?:x(\d))?\b", code)
    return {
        "registers": int(used["vgpr_count"]),
        "spills": int(used["private_segment_fixed_size"]),
        "vector_bytes": max(4 * int(width or 1) for width in widths),
        "fused": len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f32\b", code)),
    }


def _output(command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(records) -> str:
    lines = [
        f"{'kernel':28} {'target':11} {'dtype':9} {'bits':>4} {'regs':>5} {'spills':>6} {'shared':>7} {'vector':>6}"
    ]
    for record in records:
        bits = "-" if record["bits"] is None else record["bits"]
        line = f"{record['kernel']:28} {record['target']:11} {record['dtype']:9} {bits:>4} "
        if "error" not in record:
            line += f"{record['registers']:>5} {record['spills']:>6} {record['shared_bytes']:>7} "
            line += f"{record['vector_bytes']:>6}"
        lines.append(line + "".join(f"  {problem}" for problem in problems(record)))
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.compile_gate", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=lambda text: text.split(","), default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=list(DTYPES), help=", ".join(DTYPES))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="print one JSON line a record")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    for name, given, known in (("target", options.targets, TARGETS), ("dtype", options.dtypes, DTYPES)):
        if unknown := [value for value in given if value not in known]:
            parser.error(f"unknown {name} {unknown[0]!r}; there are {', '.join(known)}")
    wanted = [case for case in cases([DTYPES[name] for name in options.dtypes]) if options.kernel in case.name]
    if not wanted:
        parser.error(f"no kernel's name contains {options.kernel!r}")
    jobs = [(case, target) for target in options.targets for case in wanted]
    # The workers compile, whatever this process was told.
    os.environ.pop("TRITON_INTERPRET", None)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(os.cpu_count() or 1, 8), mp_context=context) as pool:
        records = list(pool.map(compile_case, *zip(*jobs, strict=True), chunksize=4))
    if options.json:
        print("\n".join(json.dumps(record) for record in records))
    else:
        print(table(records))
    failed = [record for record in records if problems(record)]
    for record in failed:
        what = f"{record['kernel']} {record['dtype']} bits={record['bits']} on {record['target']}"
        print(f"{what}: {'; '.join(problems(record))}", file=sys.stderr)
    if options.output:
        write_records(options.output, records)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
