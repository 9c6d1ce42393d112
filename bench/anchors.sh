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
for kind in novels wikipedia code help dialogue meetings; do
    output=$folder/anchored_${kind}_smollm2.jsonl
    chains=0 segments=100
    [[ $kind != novels ]] || chains=48 segments=200
    [[ -e $output && ! -e $output.unfinished ]] || "$python" -m bench.matched --adapter "$folder/anchors" \
        --kind "$kind" --data "$data" --segments $segments --chains $chains --chain-slots 21 --slots 64 16 8 \
        --foreign 16 --rivals --presses --output "$output"
done
output=$folder/answers_anchored_xquad_smollm2.jsonl
[[ -e $output ]] || "$python" -m bench.memory_answers --adapter "$folder/anchors" --kind xquad --data "$data" \
    --ratios 4 8 --output "$output"
