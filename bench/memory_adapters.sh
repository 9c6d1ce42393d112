#!/usr/bin/env bash
# The adapters of the README's "What a memory is worth": trained, then measured by bench.memory_ppl. Hours on a CPU.
#
#   bench/memory_adapters.sh FOLDER TEXT [TEXT...]
#
# Leaves adapters and JSON lines in FOLDER; the last tenth of each text is held out. What is there already is kept, and
# an interrupted training goes on when the same command is given again. PYTHON names another interpreter.
set -euo pipefail
if (($# < 2)); then
    echo "usage: bench/memory_adapters.sh FOLDER TEXT [TEXT...]" >&2
    exit 2
fi
folder=$(realpath -m "$1")
texts=("${@:2}")
for index in "${!texts[@]}"; do texts[index]=$(realpath -e "${texts[index]}"); done
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

train() {
    [[ -e $folder/$1/r3mem.json ]] ||
        "$python" -m r3mem_fast.cli train "${texts[@]}" -o "$folder/$1" --hold-out 0.1 "${@:2}"
}
measure() {
    [[ -e $folder/$1.jsonl ]] || "$python" -m bench.memory_ppl --adapter "$folder/$1" --plain "$folder/$2" \
        --segments 200 --chains 48 --batch 4 --text "${texts[@]}" --output "$folder/$1.jsonl"
}

# Taught by the base model that reads everything; replay keeps each segment's last streams.
taught=(--distillation 1 --kept-segments device)
new=(--segment-overlap 32 --memory-dropout)
train memory-500 --memory-tokens 64 "${new[@]}" 0.2 "${taught[@]}" --steps 500 --adapter-dtype bfloat16
train memory --model "$folder/memory-500" --memory-dropout 0.5 "${taught[@]}" --steps 300 --learning-rate 5e-4 --seed 1
train memory-16 --memory-tokens 16 "${new[@]}" 0.5 "${taught[@]}" --steps 800
# Then by the text as well.
both=(--distillation 0.5 --kept-segments device --steps 200)
train memory-1000 --model "$folder/memory" --memory-dropout 0.5 "${both[@]}" --seed 2
train memory-1200 --model "$folder/memory-1000" --memory-dropout 0.25 "${both[@]}" --seed 3
# Without memory.
train plain --memory-tokens 0 --steps 500
train plain-all-layers --memory-tokens 0 --first-adapted-layer 0 --steps 500

measure memory-500 plain
measure memory plain
measure memory-1200 plain-all-layers
measure memory-16 plain-all-layers
