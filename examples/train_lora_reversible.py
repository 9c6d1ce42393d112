"""Fine-tune LoRA adapters on a text, reversibly: what changes in a training loop is one line.

python examples/train_lora_reversible.py book.txt --model smollm2-135m --steps 20
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model

from r3mem_fast import check_inverse, load_model, make_reversible, restore
from r3mem_fast.data.text import read_text, token_windows


def main(arguments=None):
    """Train, and print the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a UTF-8 text file")
    parser.add_argument("--model", default="smollm2-135m", help="a folder or hub id (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of AdamW (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of a window (%(default)s)")
    options = parser.parse_args(arguments)

    model, tokenizer = load_model(options.model)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    make_reversible(model)  # the one line
    windows = token_windows(tokenizer, read_text(options.text), tokens=options.tokens)
    print(check_inverse(model, windows[:1]))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    model.train()
    for step in range(options.steps):
        ids = windows[step % len(windows)][None]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")
    restore(model)  # the ordinary network, which the adapters serve as well
    with torch.no_grad():
        print(f"the ordinary network with these adapters: loss {model(input_ids=ids, labels=ids).loss.item():.4f}")


if __name__ == "__main__":
    main()
