#!/usr/bin/env bash
# Everything that needs a GPU, in four stages of at most eight minutes each.
#
#   bench/gpu.sh [FOLDER [STAGE...]]
#
#   correctness   all kernels against the reference: every dtype, long main loops in 16 bits, past 2^31 elements, graphs
#   kernels       coupling, attention and matching kernels against their peers, a few shapes
#   training      a step of Llama-3.1-8B's shape: checkpointing with and without offload, reversible with 4 and 2 side bits
#   inference     131k tokens compressed in segments of 256, 1024 and 4096; tokens decoded behind a memory, eager and as graphs
#
# By default all four, in this order. By name only, since they take longer: attention (all shapes), smollm2, llama-32k,
# context, context-48, context-80. Needs torch, triton, transformers, peft, pytest, hypothesis, pytest-timeout and
# pytest-benchmark; weights are random, of real shapes.
# Leaves JSON lines in FOLDER (bench/results), written as they come, and prints them as tables last. A step that fails or
# takes too long does not keep the others from running; its output stays in FOLDER/STEP.log, and the exit status is 1.
# PYTHON names another interpreter. R3MEM_REHEARSE=1 runs the same steps in small on a CPU, to see that they run: FOLDER
# must be given then.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
rehearse=${R3MEM_REHEARSE:-}
[[ $rehearse == 0 ]] && rehearse=
folder=${1:-bench/results}
stages=("${@:2}")
((${#stages[@]})) || stages=(correctness kernels training inference)
unset R3MEM_KERNELS TRITON_INTERPRET

if [[ $rehearse ]]; then
    if (($# == 0)); then
        echo "bench/gpu.sh: a rehearsal measures nothing: name a FOLDER for its results" >&2
        exit 2
    fi
    device=cpu gpu=rehearsal llama=smollm2-135m-shape
elif "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=cuda llama=llama-3.1-8b-shape
    gpu=$("$python" -c 'import re, torch; print(re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower())')
else
    echo "bench/gpu.sh: PYTHON=$python sees no GPU, so nothing was measured" >&2
    exit 2
fi
mkdir -p "$folder"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failed=()
written=()
ends=$((SECONDS + 86400)) # of the stage, in seconds

# Seconds that a step may take: what it asks for, or what is left of its stage.
allowed() { echo $((ends - SECONDS < $1 ? (ends - SECONDS > 1 ? ends - SECONDS : 1) : $1)); }

# step NAME SECONDS COMMAND...: run a command, for so long at most.
step() {
    local name=$1 limit=$2 began=$SECONDS status=0
    shift 2
    timeout "$(allowed "$limit")" "$@" >"$logs/$name" 2>&1 || status=$?
    ended "$name" $((SECONDS - began)) $status
}

# together SECONDS NAME COMMAND... [-- NAME COMMAND...]...: run commands at one time, which compile for most of it.
together() {
    local limit began=$SECONDS names=() processes=() part=()
    limit=$(allowed "$1")
    shift
    for word in "$@" --; do
        if [[ $word != -- ]]; then
            part+=("$word")
            continue
        fi
        names+=("${part[0]}")
        timeout "$limit" "${part[@]:1}" >"$logs/${part[0]}" 2>&1 &
        processes+=($!)
        part=()
    done
    for index in "${!names[@]}"; do
        local status=0
        wait "${processes[index]}" || status=$?
        ended "${names[index]}" $((SECONDS - began)) $status
    done
}

ended() { # NAME SECONDS STATUS
    echo "-- $1: $2 s, status $3"
    grep -aE '^(FAILED|ERROR)|^[0-9]+ (passed|failed)' "$logs/$1" | tail -n 8
    if (($3)); then
        failed+=("$1 (status $3)")
        tail -n 5 "$logs/$1"
        cp "$logs/$1" "$folder/$1.log"
    fi
}

# measure NAME SECONDS MODULE ARGUMENTS...: a benchmark that writes FOLDER/NAME_GPU.jsonl.
measure() {
    local name=$1 limit=$2 module=$3
    shift 3
    written+=("$folder/${name}_$gpu.jsonl")
    rm -f "$folder/${name}_$gpu.jsonl"
    step "$name" "$limit" "$python" -m "bench.$module" --json --output "$folder/${name}_$gpu.jsonl" "$@"
}

tests() { echo "$python" -m pytest -q -p no:cacheprovider "$@"; }

correctness() {
    local long=tests/kernels/test_attention_long.py triton=tests/kernels/test_attention_triton.py
    local specialised=tests/kernels/test_attention_specialised.py
    if [[ $rehearse ]]; then
        together 300 long $(tests $long -k 64) -- decode $(tests $triton -k head_dims) -- \
            specialised $(tests $specialised -k short)
        return
    fi
    together 330 \
        long-300 $(tests $long) -k "backward[300-" -- long-1000 $(tests $long) -k "backward[1000-" -- \
        long-4096 $(tests $long) -k "backward[4096-" -- long-decode $(tests $long) -k decode -- \
        random-forward $(tests $triton) -k "forward or head_dims" -- random-backward $(tests $triton) -k backward -- \
        random-others $(tests $triton) -k "not forward and not head_dims and not backward" -- \
        matching $(tests tests/kernels/test_matching_triton.py tests/kernels/test_matching.py) -- \
        coupling $(tests tests/kernels/test_coupling.py tests/kernels/test_coupling_operators.py) -- \
        vendor $(tests tests/kernels/test_attention_vendor.py) -- \
        graphs $(tests tests/memory/test_graphed.py tests/test_generation.py) -k gpu -- \
        operators $(tests tests/kernels/test_attention.py tests/kernels/test_dispatch.py)
    # It takes up to 40 GB of the GPU's memory.
    step coupling-large 140 $(tests tests/kernels/test_coupling_triton.py tests/reversible/test_kernels.py)
}

kernels() {
    local few=(--few) passes=(forward both decode) commands=()
    [[ $rehearse ]] && few=(--only T=272) passes=(decode)
    # The first runs leave compiled kernels behind; what they measure side by side is thrown away.
    for pass in "${passes[@]}"; do
        commands+=("compile-$pass" "$python" -m bench.attention --device $device --rounds 2 "${few[@]}")
        [[ $rehearse ]] || commands+=(--only "$pass ")
        commands+=(--)
    done
    together 150 "${commands[@]:0:${#commands[@]}-1}"
    measure attention_few 200 attention --device $device "${few[@]}"
    local cases=(everyday segment long)
    [[ $rehearse ]] && cases=(small)
    measure matching 60 matching --device $device --cases "${cases[@]}"
    local result=$folder/.coupling.json
    step coupling 120 "$python" -m pytest -q bench/test_coupling.py --benchmark-only --benchmark-json "$result" \
        --benchmark-columns median ${rehearse:+--benchmark-max-time=0.05}
    step coupling-report 30 "$python" -m bench.report "$result" --output "$folder/coupling_$gpu.jsonl"
    written+=("$folder/coupling_$gpu.jsonl")
    rm -f "$result"
}

training() {
    local size=(--tokens 8192 --runs 10)
    [[ $rehearse ]] && size=(--tokens 64 --runs 2 --depth 2)
    measure training_llama8b_8k 460 training --device $device --model $llama "${size[@]}" \
        --arms checkpoint,checkpoint-offload,reversible-b4,reversible-b2
}

inference() {
    local compress=(--tokens 131072 --length 4096 1024 256 --pairs 1) decode=(--tokens 64 --rounds 2)
    local eager=(--arms plain_room memory_dynamic hooks adapters merged)
    [[ $rehearse ]] && compress=(--tokens 128 --length 64 --pairs 1) decode=(--slots 16 --tokens 6 --rounds 2) eager=()
    measure decode_llama8b 150 decode --device $device --model $llama "${decode[@]}" "${eager[@]}"
    [[ $rehearse ]] || # the CPU has no graphs
        measure decode_llama8b_graphs 120 decode --device $device --model $llama --compile --tokens 200 --rounds 3 \
            --arms plain_static memory_static
    measure compress_llama8b 240 compress_speed --device $device --model $llama --dtype bfloat16 --budgets 256 --whole \
        "${compress[@]}"
}

named() { # STAGE, of those that are not in the four
    case $1 in
    attention) measure attention 1500 attention --device $device ;;
    smollm2) measure training_smollm2_8k 120 training --device $device --model smollm2-135m-shape --tokens 8192 --runs 5 ;;
    llama-32k)
        measure training_llama8b_32k 400 training --device $device --model $llama --tokens 32768 --runs 2 \
            --arms checkpoint,checkpoint-offload,reversible-b4
        ;;
    context) measure context_24gb 400 context --granularity 2048 --limits 24 --arms checkpoint,reversible-b4 ;;
    context-48 | context-80) measure "${1/-/_}gb" 900 context --granularity 2048 --limits "${1#context-}" ;;
    *) failed+=("$1 (no such stage)") ;;
    esac
}

for stage in "${stages[@]}"; do
    echo "== $stage"
    began=$SECONDS
    case $stage in
    correctness | kernels | training | inference)
        ends=$((SECONDS + 475))
        $stage
        ends=$((SECONDS + 86400))
        ;;
    *) named "$stage" ;;
    esac
    echo "== $stage: $((SECONDS - began)) s"
done
echo "== all: $SECONDS s"
if ((${#written[@]})); then
    "$python" -m bench.summary "${written[@]}" || failed+=("summary")
fi
if ((${#failed[@]})); then
    printf 'bench/gpu.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
