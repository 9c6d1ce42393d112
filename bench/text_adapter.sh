#!/usr/bin/env bash
# The adapter of docs/memory.md that has learned how its texts are written, and matched memories behind it. Half an hour on a CPU.
#
#   bench/text_adapter.sh FOLDER DATA
#
# DATA is the folder of the data sets (bench/texts.py). Leaves the adapter, the model with it merged in, and JSON lines in
# FOLDER; the second half of each novel is held out. What is there already is kept, and an interrupted training or
# measurement goes on when the same command is given again. PYTHON names another interpreter.
set -euo pipefail
source "$(dirname "$0")/folder_and_data.sh"

[[ -e $folder/novels.jsonl ]] ||
    "$python" -m bench.mixed_texts novels --data "$data" --hold-out 0.5 -o "$folder/novels.jsonl"
[[ -e $folder/adapter/r3mem.json ]] ||
    "$python" -m r3mem_fast.cli train "$folder/novels.jsonl" -o "$folder/adapter" --memory-tokens 0 \
        --first-adapted-layer 0 --steps 250
[[ -e $folder/merged/config.json ]] || "$python" - "$folder" <<'PYTHON'
import os
import sys

from r3mem_fast import R3MemPipeline

folder = sys.argv[1]
pipeline = R3MemPipeline(f"{folder}/adapter")
pipeline.model.merge_and_unload().save_pretrained(f"{folder}/merging")
pipeline.tokenizer.save_pretrained(f"{folder}/merging")
os.replace(f"{folder}/merging", f"{folder}/merged")
PYTHON
output=$folder/text_adapter_novels_smollm2.jsonl
if [[ ! -e $output ]]; then
    "$python" -m bench.matched --model "$folder/merged" --kind novels --data "$data" --segments 64 --chains 0 \
        --slots 64 16 --rivals raw attended --foreign 64 --presses --adaptive --output "$output.part"
    mv "$output.part" "$output"
fi
