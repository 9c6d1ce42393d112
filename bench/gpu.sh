#!/usr/bin/env bash
# Everything that needs a GPU: kernels against the reference in every dtype, then speed and memory. Under 9 minutes.
#
#   bench/gpu.sh [FOLDER [STAGE...]]
#
# Leaves JSON lines in FOLDER (bench/results). Stages: kernels coupling smollm2 llama-8k llama-32k context, all of them
# by default; besides, by name only, attention, context-48 and context-80, which take longer. PYTHON names another interpreter.
# A stage that fails or exceeds its time does not keep the others from running; then the exit status is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-bench/results}
stages=("${@:2}")
((${#stages[@]})) || stages=(kernels coupling smollm2 llama-8k llama-32k context)
seconds_in_all=530
# What a stage may take in a run of all; what one leaves over, the next may use.
declare -A share=([kernels]=85 [coupling]=95 [smollm2]=65 [llama-8k]=100 [llama-32k]=105 [context]=80)

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh: PYTHON=$python sees no GPU, so nothing was measured" >&2
    exit 2
fi
mkdir -p "$folder"
unset R3MEM_KERNELS TRITON_INTERPRET
gpu=$("$python" -c 'import re, torch; print(re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower())')
training() { "$python" -m bench.training --device cuda --json "$@"; }
context() { "$python" -m bench.context --json --granularity 2048 "$@"; }

run_stage() {
    case $1 in
    kernels) "$python" -m pytest -q -x tests/kernels tests/reversible/test_kernels.py -k "not attention_triton" ;;
    coupling)
        "$python" -m pytest -q bench/test_coupling.py --benchmark-only --benchmark-json "$folder/.coupling.json" --benchmark-columns median
        local status=$?
        "$python" -m bench.report "$folder/.coupling.json" --output "$folder/coupling_$gpu.jsonl" || status=$?
        rm -f "$folder/.coupling.json"
        return $status
        ;;
    attention) # compiles each variant that it tests, for minutes
        "$python" -m pytest -q tests/kernels/test_attention_triton.py
        local status=$?
        "$python" -m bench.attention --json --output "$folder/attention_$gpu.jsonl" || status=$?
        "$python" -m bench.logits --json --device cuda --output "$folder/logits_smollm2_$gpu.jsonl" || status=$?
        return $status
        ;;
    smollm2)
        training --model smollm2-135m-shape --tokens 8192 --runs 5 --output "$folder/training_smollm2_8k_$gpu.jsonl"
        ;;
    llama-8k)
        training --model llama-3.1-8b-shape --tokens 8192 --runs 2 --output "$folder/training_llama8b_8k_$gpu.jsonl" \
            --arms checkpoint,checkpoint-offload,reversible-b4,reversible-b2,checkpoint-liger,reversible-b4-liger
        ;;
    llama-32k)
        training --model llama-3.1-8b-shape --tokens 32768 --runs 1 --output "$folder/training_llama8b_32k_$gpu.jsonl" \
            --arms checkpoint,checkpoint-offload,reversible-b4
        ;;
    context) context --limits 24 --arms checkpoint,reversible-b4 --output "$folder/context_24gb_$gpu.jsonl" ;;
    context-48 | context-80) context --limits "${1#context-}" --output "$folder/${1/-/_}gb_$gpu.jsonl" ;;
    *)
        echo "bench/gpu.sh: unknown stage $1" >&2
        return 2
        ;;
    esac
}

export -f run_stage training context
export python folder gpu
failed=()
granted=0
for stage in "${stages[@]}"; do
    left=$((seconds_in_all - SECONDS))
    if ((left <= 0)); then
        failed+=("$stage (no time left)")
        continue
    fi
    echo "== $stage"
    began=$SECONDS
    granted=$((granted + ${share[$stage]:-seconds_in_all}))
    limit=$((granted - SECONDS < left ? granted - SECONDS : left))
    ((${#stages[@]} > 1)) || limit=$left
    ((limit > 0)) || limit=1 # timeout takes 0 for no limit
    timeout "$limit" bash -c 'run_stage "$1"' bash "$stage" || failed+=("$stage (status $?)")
    echo "== $stage: $((SECONDS - began)) s"
done
echo "== all: $SECONDS s"
if ((${#failed[@]})); then
    printf 'bench/gpu.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
