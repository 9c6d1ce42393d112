"""Compile every kernel for real GPUs, with none at hand, and read from the machine code what it will do there.

    python -m bench.compile_gate --json

One record a kernel, target, dtype and number of side bits or head_dim, through the same `specialise` as a launch:

    registers      of a thread
    spills         bytes of local memory of a thread: what did not fit into registers
    shared_bytes   of a program; limits: 163 KiB on cuda:80, 227 KiB on cuda:90 and cuda:100, 64 KiB on gfx942; by name
                   only, cuda:89 with 99 KiB, as compute capability 8.6, 8.9 and 12.x have
    vector_bytes   the widest access to global memory
    fused          of the coupling: fused multiply-adds, which would make the inverse inexact
    matrix         of attention and matching: the instructions of matrix products: `wgmma` (cuda:90), `tcgen05`
                   (cuda:100), `mma`, `mfma` (gfx942); null: none, as for float32, whose products are exact
    loop           of the same, but on gfx942: instructions of the shortest loop with such products; null: none has any
    warps          of the specialised attention: all warps of a program; `warps_asked`: of these the launch asks for
    setmaxnreg     of the same: instructions by which its groups of warps pass registers to each other
    tma            of the same: instructions that copy a tile by its tensor descriptor

Exit status 1 if a kernel fails to compile, spills (but for those in `_SPILLS` and, by Triton 3.6, `_SPILLS_3_6`),
exceeds its shared memory, has no 16-byte access, if a coupling kernel fuses, or if attention in bfloat16 or float16
does without matrix instructions: wgmma on cuda:90, but for decoding, whose few queries are too small a matrix for it.
Also if the specialised attention is none: no more warps than asked for, registers that stay where they are, or no tile
that is copied whole.
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

from .attention_cases import SPECIALISED, attention_cases
from .coupling_cases import DTYPES, cases
from .matching_cases import matching_cases
from .records import add_output_option, write_records

_SHARED_LIMIT = {"cuda:80": 163, "cuda:89": 99, "cuda:90": 227, "cuda:100": 227, "hip:gfx942": 64}  # KiB
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
_MATRIX = {
    "cuda:80": ("mma",),
    "cuda:89": ("mma",),
    "cuda:90": ("wgmma",),
    "cuda:100": ("tcgen05",),
    "hip:gfx942": ("mfma",),
}
# Bytes a thread that are known and left: kernel, target, dtype (bfloat16 stands for float16 too) and head_dim.
_SPILLS = {
    ("attention_key/plain", "cuda:80", "float32", 64): 24,
    ("attention_key/plain", "cuda:80", "float32", 128): 16,
    ("attention_key/all", "cuda:80", "float32", 128): 16,
    ("attention_key/packed", "cuda:80", "float32", 128): 16,
    ("attention_memory/plain", "cuda:80", "float32", 64): 16,
    ("attention_memory/plain", "cuda:80", "float32", 80): 8,
    ("attention_memory/plain", "cuda:80", "float32", 96): 8,
    ("attention_memory/plain", "cuda:80", "float32", 128): 16,
    ("attention_memory/packed", "cuda:80", "float32", 128): 16,
    ("attention_decode/many", "cuda:80", "float32", 80): 128,
    ("attention_decode/many", "cuda:80", "float32", 96): 128,
    ("attention_decode/many", "cuda:80", "float32", 128): 96,
    ("attention_decode/many", "cuda:80", "float32", 256): 1560,
    ("attention_key/plain", "cuda:90", "bfloat16", 256): 536,
    ("attention_key/all", "cuda:90", "bfloat16", 128): 24,
    ("attention_key/packed", "cuda:90", "bfloat16", 128): 16,
    ("attention_memory/plain", "cuda:90", "bfloat16", 256): 152,
    ("attention_decode/many", "cuda:90", "float32", 80): 432,
    ("attention_decode/many", "cuda:90", "float32", 96): 432,
    ("attention_decode/many", "cuda:90", "float32", 128): 424,
    ("attention_decode/many", "cuda:90", "float32", 256): 8696,
    ("attention_key/plain", "cuda:100", "bfloat16", 256): 128,
    ("attention_decode/many", "cuda:100", "float32", 80): 1184,
    ("attention_decode/many", "cuda:100", "float32", 96): 1184,
    ("attention_decode/many", "cuda:100", "float32", 128): 1200,
    ("attention_decode/many", "cuda:100", "float32", 256): 13376,
    ("matching_cross/plain", "cuda:80", "float32", 256): 128,
    ("matching_cross/plain", "cuda:90", "float32", 256): 152,
    ("matching_cross/plain", "cuda:100", "float32", 256): 176,
}
# What Triton 3.6 spills in place of these, or besides.
_SPILLS_3_6 = {
    ("momentum_forward/first", "cuda:80", "float32", None): 8,
    ("attention_key/plain", "cuda:80", "float32", 80): 16,
    ("attention_key/plain", "cuda:80", "float32", 96): 16,
    ("attention_memory/all", "cuda:80", "float32", 128): 24,
    ("attention_key/plain", "cuda:90", "bfloat16", 64): 8,
    ("attention_key/plain", "cuda:90", "bfloat16", 80): 80,
    ("attention_key/plain", "cuda:90", "bfloat16", 96): 80,
    ("attention_key/plain", "cuda:90", "bfloat16", 128): 80,
    ("attention_key/all", "cuda:90", "bfloat16", 128): 80,
    ("attention_key/packed", "cuda:90", "bfloat16", 128): 80,
    ("attention_key/plain", "cuda:90", "float32", 64): 24,
    ("attention_key/plain", "cuda:90", "float32", 256): 40,
    ("attention_memory/plain", "cuda:90", "float32", 64): 32,
    ("attention_memory/plain", "cuda:90", "float32", 256): 48,
    ("attention_decode/many", "cuda:90", "float32", 128): 432,
    ("attention_query/packed", "cuda:100", "bfloat16", 128): 8,
    ("attention_key/plain", "cuda:100", "bfloat16", 64): 152,
    ("attention_decode/many", "cuda:100", "bfloat16", 256): 8,
    ("attention_query/alone", "cuda:100", "float32", 128): 8,
    ("attention_memory/plain", "cuda:100", "float32", 64): 8,
    ("attention_decode/many", "cuda:100", "float32", 80): 1264,
    ("attention_decode/many", "cuda:100", "float32", 96): 1264,
    ("attention_decode/many", "cuda:100", "float32", 128): 1264,
    ("attention_decode/many", "cuda:100", "float32", 256): 13680,
}


def compile_case(case, target) -> dict:
    """Compile one case for one target; its record, with `error` where the compiler raised."""
    # Here: a process of the pool is told by its parent's environment whether to interpret, before it imports these.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from r3mem_fast.kernels.common.launch import specialise

    backend, architecture = target.split(":")
    warp = 64 if backend == "hip" else 32
    gpu = GPUTarget(backend, int(architecture) if backend == "cuda" else architecture, warp)
    launch = case.launch(target)
    variant = specialise(launch, warp)
    record = {**case.fields, "target": target}
    try:
        source = ASTSource(launch.kernel, variant.signature, variant.constexprs, variant.attrs)
        compiled = triton.compile(source, target=gpu, options=variant.options)
    except Exception as error:  # the compiler's own, of many types; reported, and the gate fails
        return {**record, "error": f"{type(error).__name__}: {error}"}
    record["shared_bytes"] = compiled.metadata.shared
    record |= _read_cubin(compiled) if backend == "cuda" else _read_amdgcn(compiled)
    if _is_specialised(record):
        record |= _read_sharing(compiled, variant.options["num_warps"])
    for name in ("matrix", "loop") if "bits" in record else ("fused",):
        record.pop(name, None)
    return record


def problems(record) -> list[str]:
    """What is wrong with a record, in words."""
    if "error" in record:
        return [record["error"]]
    found = []
    if record["spills"] > _known_spills(record):
        found.append(f"{record['spills']} bytes of spills")
    if record["vector_bytes"] < 16:
        found.append(f"widest access {record['vector_bytes']} bytes, not 16")
    if record.get("fused"):
        found.append(f"{record['fused']} fused multiply-adds")
    if "matrix" in record and (wanted := _matrix_wanted(record)) and record["matrix"] not in wanted:
        found.append(f"matrix products by {record['matrix']}, not {' or '.join(wanted)}")
    if _is_specialised(record):
        if record["warps"] <= record["warps_asked"] or not record["setmaxnreg"]:
            found.append("its warps do not share out the work")
        if not record["tma"]:
            found.append("no copy by a tensor descriptor")
    if record["shared_bytes"] > _SHARED_LIMIT[record["target"]] * 1024:
        found.append(f"{record['shared_bytes']} bytes of shared memory")
    return found


def _known_spills(record):
    import triton

    dtype = "float32" if record["dtype"] == "float32" else "bfloat16"
    place = (record["kernel"], record["target"], dtype, record.get("head_dim"))
    if triton.__version__.startswith("3.6."):
        return max(_SPILLS.get(place, 0), _SPILLS_3_6.get(place, 0))
    return _SPILLS.get(place, 0)


def _is_specialised(record):
    return record["kernel"].startswith(f"attention_{SPECIALISED}/")


def _matrix_wanted(record):
    kernel = record["kernel"].split("/")[0]
    if record["dtype"] == "float32" or kernel in ("attention_delta", "attention_combine"):
        return ()
    if kernel == "attention_decode":
        return ("mma", "mfma", "wgmma", "tcgen05")  # by how many queries there are
    return _MATRIX[record["target"]]


def _read_cubin(compiled):
    import triton

    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output([tools.cuobjdump.path, "--dump-resource-usage", file.name])
        code = _output([tools.nvdisasm.path, "--print-code", file.name])
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    widths = [int(bits or 32) for bits in re.findall(r"\b(?:LDG|STG|LDGSTS)\b[A-Z0-9.]*?(?:\.(64|128))?\s", code)]
    ptx = compiled.asm["ptx"]
    matrix = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    return {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "vector_bytes": max(widths) // 8,
        "fused": len(re.findall(r"\bFFMA\b", code)),
        "loop": _main_loop(code),
        "matrix": next((name for name, instruction in matrix.items() if instruction in ptx), None),
    }


def _read_sharing(compiled, warps_asked):
    """How a kernel's warps share out its work: read from the assembly that ptxas is given."""
    ptx = compiled.asm["ptx"]
    return {
        "warps_asked": warps_asked,
        "warps": int(re.search(r"\.reqntid (\d+)", ptx)[1]) // 32,
        "setmaxnreg": len(re.findall(r"\bsetmaxnreg\.", ptx)),
        "tma": len(re.findall(r"\bcp\.async\.bulk\.tensor\.", ptx)),
    }


def _main_loop(code):
    """Count the instructions of the shortest loop that multiplies matrices; None where no loop does."""
    starts: dict[str, int] = {}
    found, products, count = [], [0], 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            starts[label[1]] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            count += 1
            products.append(products[-1] + bool(re.search(r"\b(?:[HQ]G?MMA|UTC[HQ]MMA)", instruction[1])))
            target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
            start = starts.get(target[1]) if target else None
            if start is not None and products[count] > products[start]:
                found.append(count - start)
    return min(found, default=None)


def _read_amdgcn(compiled):
    code = compiled.asm["amdgcn"]
    used = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", code))
    widths = re.findall(r"\b(?:global|buffer|flat)_(?:load|store)_dword(?:x(\d))?\b", code)
    return {
        "registers": int(used["vgpr_count"]),
        "spills": int(used["private_segment_fixed_size"]),
        "vector_bytes": max(4 * int(width or 1) for width in widths),
        "fused": len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_f32\b", code)),
        "matrix": "mfma" if "v_mfma" in code else None,
    }


def _output(command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(records) -> str:
    """Return the records as lines of text."""
    heads = f"{'regs':>5} {'spills':>6} {'shared':>7} {'vector':>6} matrix"
    lines = [f"{'kernel':28} {'target':11} {'dtype':9} {'bits/dim':>8} {heads}"]
    for record in records:
        size = record.get("head_dim", record.get("bits"))
        line = f"{record['kernel']:28} {record['target']:11} {record['dtype']:9} {size or '-':>8} "
        if "error" not in record:
            line += f"{record['registers']:>5} {record['spills']:>6} {record['shared_bytes']:>7} "
            line += f"{record['vector_bytes']:>6} {record.get('matrix') or ''}"
        lines.append(line + "".join(f"  {problem}" for problem in problems(record)))
    return "\n".join(lines)


def _integers(text):
    return [int(part) for part in text.split(",")]


def main(arguments=None):
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_gate", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--targets", type=lambda text: text.split(","), default=list(TARGETS), help=", ".join(_SHARED_LIMIT)
    )
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=list(DTYPES), help=", ".join(DTYPES))
    names = "only kernels whose name contains this, or one of these"
    parser.add_argument("--kernel", type=lambda text: text.split(","), default=[""], help=names)
    parser.add_argument("--head-dims", type=_integers, help="only attention, with these")
    parser.add_argument("--json", action="store_true", help="print one JSON line a record")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    for name, given, known in (("target", options.targets, _SHARED_LIMIT), ("dtype", options.dtypes, DTYPES)):
        if unknown := [value for value in given if value not in known]:
            parser.error(f"unknown {name} {unknown[0]!r}; there are {', '.join(known)}")
    dtypes = [DTYPES[name] for name in options.dtypes]
    everything = [*cases(dtypes), *attention_cases(dtypes), *matching_cases(dtypes)]
    wanted = [case for case in everything if any(part in case.name for part in options.kernel)]
    if options.head_dims:
        wanted = [case for case in wanted if getattr(case, "head_dim", None) in options.head_dims]
    if not wanted:
        parser.error(f"no kernel's name contains {' or '.join(options.kernel)!r}, with that head_dim")
    jobs = [
        (case, target)
        for target in options.targets
        for case in wanted
        if target in (getattr(case, "targets", None) or options.targets)
    ]
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
        size = f"head_dim={record['head_dim']}" if "head_dim" in record else f"bits={record['bits']}"
        what = f"{record['kernel']} {record['dtype']} {size} on {record['target']}"
        print(f"{what}: {'; '.join(problems(record))}", file=sys.stderr)
    if options.output:
        write_records(options.output, records)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
