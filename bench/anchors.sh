#!/usr/bin/env bash
# The adapter of anchors of docs/memory.md: trained, and measured beside the closed form. Hours on a CPU.
#
#   bench/anchors.sh FOLDER DATA
#
# DATA is the folder of the data sets (bench/texts.py). Leaves the adapter and JSON lines in FOLDER; the second half of
# each text is held out, and dialogue and meetings are wholly. What is there already is kept, and an interrupted training
# or measurement goes on when the same command is given again. PYTHON names another interpreter.
set -euo pipefail
source "$(dirname "$0")/folder_and_data.sh"

[[ -e $folder/mixed.jsonl ]] ||
    "$python" -m bench.mixed_texts novels wikipedia code help --data "$data" --hold-out 0.5 -o "$folder/mixed.jsonl"
[[ -e $folder/asked.jsonl ]] ||
    "$python" -m bench.self_study novels wikipedia help --data "$data" --passages 240 -o "$folder/asked.jsonl"
train() { # FOLDER STEPS ARGUMENTS...
    local output=$folder/$1
    [[ -e $output/r3mem.json ]] || "$python" -m r3mem_fast.cli train -o "$output" --steps "$2" --distillation 1 \
        --kept-segments device --segments 2 --batch-size 2 --learning-rate 5e-4 --checkpoint-steps 20 "${@:3}"
}
# First where every head has as many slots, then where heads share them, and with what asks for a text.
train uniform 280 "$folder/mixed.jsonl" --memory-writer anchored --adapter-rows memory --memory-tokens 64 \
    --memory-budget 64 --segment-overlap 32 --drawn-memory-tokens 64,32,16,8
[[ -e $folder/begun/r3mem.json ]] ||
    "$python" -m bench.anchored "$folder/uniform" "$folder/begun" --memory-allocation adaptive
asked=$folder/asked.jsonl
train anchors 600 "$folder/mixed.jsonl" "$asked" "$asked" "$asked" --model "$folder/begun" \
    --drawn-memory-tokens 64,32,16,16,8
measure() { # ADAPTER NAME MODULE ARGUMENTS...
    local output=$folder/$2_smollm2.jsonl
    [[ -e $output ]] && return
    "$python" -m "bench.$3" --adapter "$folder/$1" --data "$data" --output "$output.part" "${@:4}"
    mv "$output.part" "$output"
}
sizes=(--slots 64 16 8 --foreign 16 --rivals --presses)
measure uniform anchored_novels matched --kind novels --segments 200 --chains 0 "${sizes[@]}"
measure uniform answers_anchored_xquad memory_answers --kind xquad --ratios 4 --questions 160 --presses
both=(--chains 0 --slots 64 16 8 --rivals --presses --adaptive)
measure anchors anchored_adaptive_novels matched --kind novels --segments 100 "${both[@]}" --foreign
measure anchors anchored_adaptive_wikipedia matched --kind wikipedia --segments 24 "${both[@]}" --foreign 16
for kind in code help; do
    measure anchors anchored_adaptive_$kind matched --kind $kind --segments 16 "${both[@]}" --foreign
done
measure anchors anchored_adaptive_chains matched --kind novels --segments 0 --chains 48 --chain-slots 21 \
    --slots 64 --foreign --rivals --presses --adaptive
# The same adapter, rounded to half of its bytes.
round_to() { # ADAPTER NAME
    [[ -e $folder/$2/r3mem.json ]] ||
        "$python" -m bench.anchored "$folder/$1" "$folder/$2" --memory-budget 256 --beyond-budget rematch_once \
            --adapter-dtype bfloat16
}
round_to anchors rounded
rounded=(--chains 0 --slots 64 16 --rivals --presses --adaptive --foreign 16)
measure rounded rounded_code matched --kind code --segments 64 "${rounded[@]}"
measure rounded rounded_dialogue matched --kind dialogue --segments 32 "${rounded[@]}"
# It does harm to one segment of code, which it changes too much: trained on with shorter changes, and on more code. This
# is the adapter that comes with the package.
[[ -e $folder/limited/r3mem.json ]] ||
    "$python" -m bench.anchored "$folder/anchors" "$folder/limited" --longest-change 0.08
[[ -e $folder/library.jsonl ]] ||
    "$python" -m bench.mixed_texts novels wikipedia code library help --data "$data" --hold-out 0.5 \
        -o "$folder/library.jsonl"
train final 360 "$folder/library.jsonl" "$asked" "$asked" "$asked" --model "$folder/limited" \
    --drawn-memory-tokens 64,32,16,16,8
round_to final packaged
measure packaged packaged_novels matched --kind novels --segments 200 --chains 0 --slots 64 16 8 --foreign 16 \
    --rivals --presses --adaptive
measure packaged packaged_code matched --kind code --segments 64 "${rounded[@]}"
measure packaged packaged_dialogue matched --kind dialogue --segments 32 "${rounded[@]}"
for kind in wikipedia help; do
    measure packaged packaged_$kind matched --kind $kind --segments 24 "${rounded[@]}"
done
measure packaged packaged_chains matched --kind novels --segments 0 --chains 24 --chain-slots 64 --slots 64 \
    --beyond rematch --foreign --rivals --presses --adaptive
measure packaged packaged_chains_once matched --kind novels --segments 0 --chains 24 --chain-slots 128 --slots 64 \
    --beyond rematch_once --foreign 64 --rivals --presses --adaptive
measure packaged packaged_answers memory_answers --kind xquad --ratios 4 8 16 --questions 80 --presses --adaptive \
    --new-tokens 1
measure packaged packaged_pairs memory_answers --kind pairs --pairs 2 4 8 --characters 8 --questions 40 --ratios 4 \
    --presses --adaptive --new-tokens 24
