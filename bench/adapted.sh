#!/usr/bin/env bash
# Anchors that the base model reads, beside anchors whose adapters read, too: trained alike, and measured. An hour and a
# half of a core.
#
#   bench/adapted.sh FOLDER DATA
#
# DATA is the folder of the data sets (bench/texts.py). Leaves the adapters and JSON lines in FOLDER; the second half of
# each text is held out. What is there already is kept, and an interrupted training or measurement goes on when the same
# command is given again. PYTHON names another interpreter.
set -euo pipefail
source "$(dirname "$0")/folder_and_data.sh"

[[ -e $folder/library.jsonl ]] ||
    "$python" -m bench.mixed_texts novels wikipedia code library help --data "$data" --hold-out 0.5 \
        -o "$folder/library.jsonl"
train() { # FOLDER ROWS ARGUMENTS...
    [[ -e $folder/$1/r3mem.json ]] || "$python" -m r3mem_fast.cli train -o "$folder/$1" --steps 100 --distillation 1 \
        --kept-segments device --segments 2 --batch-size 2 --learning-rate 5e-4 --checkpoint-steps 20 \
        "$folder/library.jsonl" --memory-writer anchored --memory-tokens 64 --memory-budget 64 --segment-overlap 32 \
        --drawn-memory-tokens 64,32,16,8 --adapter-rows "$2" "${@:3}"
}
measure() { # FOLDER NAME
    local output=$folder/$2_novels_smollm2.jsonl
    [[ -e $output ]] && return
    "$python" -m bench.adapted "$folder/anchored" "$folder/$1" --data "$data" --output "$output.part"
    mv "$output.part" "$output"
}
train anchored memory
train adapted all
measure adapted adapted
# Taught, too, that memories of another text are to equal none.
train foreign all --foreign-memories 0.25
measure foreign adapted_foreign
