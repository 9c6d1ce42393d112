"""One of two processes in which test_trainer.py has Trainer train a memory network: `... -m ... FOLDER`."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from tests.training.integration.training import losses_of, memory_network, trainer_of

SETTINGS = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2}


def main(folder):
    model = memory_network()
    losses = losses_of(trainer_of(folder, model, **SETTINGS, per_device_train_batch_size=2, ddp_backend="gloo"))
    if dist.get_rank() == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
