"""TRL's SFTTrainer on a reversible model: nothing changes but `make_reversible`.

pip install trl datasets
python examples/trl_sft.py book.txt --steps 10
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from r3mem_fast import load_model, make_reversible
from r3mem_fast.data.text import read_text


def main(arguments=None):
    """Train on the paragraphs of a text; returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a UTF-8 text file; its paragraphs are the examples")
    parser.add_argument("--model", default="smollm2-135m", help="a folder or hub id (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of training (%(default)s)")
    parser.add_argument("--output", default="sft", help="of the trainer (%(default)s)")
    options = parser.parse_args(arguments)

    model, tokenizer = load_model(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.unk_token
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    make_reversible(model)
    paragraphs = [paragraph for paragraph in read_text(options.text).split("\n\n") if paragraph.strip()]
    settings = SFTConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=2e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.accelerator.is_available(),
    )
    data = Dataset.from_dict({"text": paragraphs})
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
    return losses


if __name__ == "__main__":
    main()
