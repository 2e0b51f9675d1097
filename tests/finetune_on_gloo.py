"""Runs `ltu.finetune` with FSDP2 on CPUs, as a module in the ranks that a test starts.

The command refuses `--fsdp` without GPUs, because accelerate uses FSDP only for a distributed state
of GPUs. Two patches change that here. Everything else is what a user runs: the flags, the Trainer,
accelerate's preparation of the model and of the optimizer, and the files.

Each rank writes how its parameters were sharded as the file `sharding.RANK.json`.
"""

import json
import os
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ltu.files import run_command
from ltu.finetune import main
from ltu.training import sharding
from ltu.training.trainer import LtuTrainer

stock_init = AcceleratorState.__init__
stock_train = LtuTrainer.train


def init_state(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """Turn FSDP on, as the stock `__init__` does for GPUs."""
    stock_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is None:
        return
    self.distributed_type = DistributedType.FSDP
    if self.mixed_precision != "no":
        fsdp_plugin.set_mixed_precision(self.mixed_precision)
    self.fsdp_plugin = fsdp_plugin


class SaveSharding(TrainerCallback):
    """Writes how the parameters are sharded."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        parameters = {}
        for name, parameter in model.named_parameters():
            is_sharded = isinstance(parameter, DTensor)
            local = parameter.to_local() if is_sharded else parameter
            parameters[name] = {
                "is_sharded": is_sharded,
                "is_trained": parameter.requires_grad,
                "dtype": str(parameter.dtype),
                "num_elements": parameter.numel(),
                "num_local": local.numel(),
            }
        units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        report = {"parameters": parameters, "units": units}
        path = Path(args.output_dir, f"sharding.{os.environ['RANK']}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report))


def train(self: LtuTrainer, *args: Any, **kwargs: Any) -> Any:
    self.add_callback(SaveSharding())
    return stock_train(self, *args, **kwargs)


if __name__ == "__main__":
    AcceleratorState.__init__ = init_state
    sharding.check_devices = lambda args: None
    LtuTrainer.train = train
    run_command(main)
