"""A script for `accelerate launch`, as people write them: trains a memory network, writes losses and gradients.

    accelerate launch -m tests.training.integration.accelerated OUTPUT

Its rows come in batches of two, of which three make a step. OUTPUT is what `torch.save` writes: the losses of each
step, summed over its batches, and the gradients of the first.
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch.utils.data import DataLoader

from r3mem_fast.training.history import collate_windows
from tests.reversible.tiny import gradients
from tests.training.integration.training import Rows, memory_network

ROWS, ACCUMULATED, STEPS, LEARNING_RATE = 2, 3, 3, 0.1


def main(output):
    # A step's batches are fetched together, so the end of the data says nothing about the batch in hand.
    accumulation = GradientAccumulationPlugin(num_steps=ACCUMULATED, sync_with_dataloader=False)
    accelerator = Accelerator(gradient_accumulation_plugin=accumulation, cpu=True)
    model = memory_network()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    loader = DataLoader(Rows(ROWS * ACCUMULATED * STEPS), batch_size=ROWS, collate_fn=collate_windows)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, first = [], None
    batches = iter(loader)
    for _ in range(STEPS):
        window = [next(batches) for _ in range(ACCUMULATED)]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        losses.append(0.0)
        for batch in window:
            with accelerator.accumulate(model):
                loss = model(**batch, num_items_in_batch=items).loss
                # Accelerator divides by the number of batches.
                accelerator.backward(loss * ACCUMULATED)
                losses[-1] += loss.item()
                if accelerator.sync_gradients and first is None:
                    first = gradients(accelerator.unwrap_model(model))
                optimizer.step()
                optimizer.zero_grad()
    torch.save({"losses": losses, "gradients": first}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
