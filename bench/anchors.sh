#!/usr/bin/env bash
# The adapter of anchors of docs/memory.md: trained, and measured beside the closed form. Hours on a CPU.
#
#   bench/anchors.sh FOLDER DATA
#
# DATA is the folder of the data sets (bench/texts.py). Leaves the adapter and JSON lines in FOLDER; the second half of
# each text is held out, and dialogue and meetings are wholly. What is there already is kept, and an interrupted training
# or measurement goes on when the same command is given again. PYTHON names another interpreter.
set -euo pipefail
if (($# != 2)); then
    echo "usage: bench/anchors.sh FOLDER DATA" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(realpath "$1") data=$(realpath -e "$2")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

[[ -e $folder/mixed.jsonl ]] ||
    "$python" -m bench.mixed_texts novels wikipedia code help --data "$data" -o "$folder/mixed.jsonl"
[[ -e $folder/anchors/r3mem.json ]] || "$python" -m r3mem_fast.cli train "$folder/mixed.jsonl" -o "$folder/anchors" \
    --memory-writer anchored --adapter-rows memory --memory-tokens 64 --memory-budget 64 --segment-overlap 32 \
    --drawn-memory-tokens 64,32,16,8 --distillation 1 --kept-segments device --segments 2 --hold-out 0.5 \
    --batch-size 2 --steps 280 --learning-rate 5e-4 --checkpoint-steps 20
measure() { # NAME MODULE ARGUMENTS...
    local output=$folder/$1_smollm2.jsonl
    [[ -e $output ]] && return
    "$python" -m "bench.$2" --adapter "$folder/anchors" --data "$data" --output "$output.part" "${@:3}"
    mv "$output.part" "$output"
}
sizes=(--slots 64 16 8 --foreign 16 --rivals --presses)
measure anchored_novels matched --kind novels --segments 200 --chains 0 "${sizes[@]}"
measure anchored_chains matched --kind novels --segments 0 --chains 48 --chain-slots 21 "${sizes[@]}"
for kind in wikipedia code help dialogue meetings; do
    measure anchored_$kind matched --kind $kind --segments 100 --chains 0 "${sizes[@]}"
done
measure answers_anchored_xquad memory_answers --kind xquad --ratios 4 --questions 160 --presses
