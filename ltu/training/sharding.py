"""Trains with FSDP2: each GPU holds a part of every tensor.

`--fsdp` shards parameters, gradients and optimizer states over all ranks. accelerate wraps each
layer of the language model and each block of the audio encoder, so that a GPU holds one or two
whole layers at a time. What the stock Trainer does not do for a model of which a checkpoint holds
only a part is here:

- Saving gathers what a checkpoint folder holds, one tensor at a time, never the frozen language
  model. The optimizer states stay sharded: each rank writes its own.
- Computation is in autocast, as without FSDP, and gradients are averaged in fp32. If the language
  model is trained in bf16, its layers are gathered in bf16. Otherwise a layer keeps its dtypes:
  LoRA is fp32 next to bf16.
- The ranks communicate in each block. So a rank whose micro-batch has no audio encodes one clip of
  zeros, of which nothing is used: its gradient is zero.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from ltu.models.locate_checkpoint import weight_files
from ltu.models.modeling_ltu import LtuForConditionalGeneration

OPTIMIZER_FOLDER = "optimizer_sharded"
SCHEDULER_FILE = "scheduler.pt"
METADATA_FILE = ".metadata"  # Of a folder that torch.distributed.checkpoint writes.

# The names that its pickle of metadata refers to, besides dtypes of torch.
METADATA_NAMES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
}


def check_devices(args: TrainingArguments) -> None:
    """Check that `--fsdp` has GPUs to shard over, each with a process of its own.

    On CPUs, accelerate would silently use DDP.

    Raises:
        ValueError: it has none.
    """
    if args.device.type == "cpu":
        raise ValueError(
            "--fsdp: this machine has no GPU, or --use_cpu is given. FSDP needs GPUs; on CPUs "
            "accelerate would use DDP instead. Leave the flag out."
        )
    if args.world_size == 1:
        raise ValueError(
            "--fsdp: there is only one process, so that there is nothing to shard over. Start one "
            "for each GPU: torchrun --nproc_per_node NUM_GPUS -m ltu.finetune ..., or leave the "
            "flag out."
        )


def check_settings(model: LtuForConditionalGeneration, args: TrainingArguments) -> None:
    """Check that FSDP works with the other flags.

    Raises:
        ValueError: it does not.
    """
    plugin = args.fsdp_plugin_args
    if plugin is None:
        raise ValueError(f"--fsdp_config {args.fsdp_config}: FSDP of torch_xla is not supported.")
    if plugin["fsdp_version"] != 2:
        raise ValueError(
            f"--fsdp_config: version is {plugin['fsdp_version']}, but only FSDP2 shards fp32 LoRA "
            "next to a bf16 language model. Use train_scripts/configs/fsdp.json."
        )
    if plugin["cpu_ram_efficient_loading"]:
        raise ValueError(
            "--fsdp_config: cpu_ram_efficient_loading opens the language model on rank 0 only, and "
            "fails with the buffers of the audio encoder. Set it to false."
        )
    if args.torch_compile:
        raise ValueError("--fsdp does not work with --torch_compile. Leave one of them out.")
    if hasattr(model, "hf_device_map"):
        raise ValueError(
            "--fsdp places the model itself. Leave --device_map and --quantization out."
        )


def find_layer_classes(model: LtuForConditionalGeneration) -> list[str]:
    """Return the names of the classes of layers that are sharded one by one.

    They are those that language model and audio encoder declare as not to be split.

    Raises:
        ValueError: one of the two declares none.
    """
    found: set[str] = set()
    for part in (model.audio_tower, model.language_model):
        declared = set(getattr(part, "_no_split_modules", None) or ())
        classes = {type(module).__name__ for module in part.modules()} & declared
        if not classes:
            repeated = set()
            for module in part.modules():
                if isinstance(module, nn.ModuleList) and len(module) > 1:
                    repeated |= {type(layer).__name__ for layer in module}
            raise ValueError(
                f"--fsdp: {type(part).__name__} does not declare its layers (_no_split_modules). "
                "Name the classes of the layers of both models as transformer_layer_cls_to_wrap in "
                f"--fsdp_config; repeated ones are {', '.join(sorted(repeated))}."
            )
        found |= classes
    return sorted(found)


def choose_precision(model: LtuForConditionalGeneration, bf16: bool) -> MixedPrecisionPolicy:
    """Return in which dtypes parameters are gathered and gradients averaged.

    accelerate's own choice would average gradients in bf16 and round the loss to bf16.

    If the language model is trained, its weights are fp32. Autocast would keep a bf16 copy of each
    layer until the backward pass, on every GPU, so they are gathered in bf16 instead.

    Args:
        model: with the parameters that are trained.
        bf16: whether training computes in bf16.
    """
    trains_language_model = any(
        parameter.requires_grad
        for name, parameter in model.language_model.named_parameters()
        if ".lora_" not in name
    )
    param_dtype = torch.bfloat16 if bf16 and trains_language_model else None
    return MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def gather_weights(model: LtuForConditionalGeneration, keep: bool) -> dict[str, Tensor]:
    """Gather the weights that a checkpoint folder holds, on the CPU.

    Every rank must call this.

    Args:
        model: sharded or not.
        keep: whether this rank gets them; a rank that does not holds one at a time.

    Returns:
        The whole tensors by their keys, of which tied ones are one object; nothing without `keep`.
    """
    weights = {}
    whole: dict[int, Tensor] = {}  # By the identity of the sharded tensor, which tied keys share.
    for key, value in model.state_dict(keep_vars=True).items():
        if not model.is_own(key):
            continue
        if id(value) not in whole:
            tensor = value.detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            whole[id(value)] = tensor.cpu() if keep else tensor.new_empty(0)
        if keep:
            weights[key] = whole[id(value)]
    return weights


def load_weights(model: LtuForConditionalGeneration, folder: Path) -> None:
    """Load the weights that a checkpoint folder holds into a sharded model.

    Each rank reads the files and keeps its part.

    Raises:
        FileNotFoundError: the folder holds no weights.
        ValueError: a key is missing.
    """
    own = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if model.is_own(key):
            own[key] = value
    loaded = set()
    for path in weight_files(folder, formats=("safetensors",)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                _load_tensor(own[key], file.get_tensor(key))
                loaded.add(id(own[key]))
    missing = [key for key, value in own.items() if id(value) not in loaded]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights of the model: {missing[:3]}.")


@torch.no_grad()
def _load_tensor(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a tensor of the model, or this rank's part of it."""
    if isinstance(target, DTensor):
        whole = whole.to(target.device_mesh.device_type)
        # Without a source rank, each rank takes its part of its own copy.
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)


def save_optimizer(model: LtuForConditionalGeneration, optimizer: Optimizer, folder: Path) -> None:
    """Write the states of a sharded optimizer; each rank writes its part.

    Every rank must call this.

    Raises:
        OSError: a file cannot be written.
    """
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    try:
        dcp.save(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:  # It is no Exception, but a BaseException.
        raise OSError(f"{folder} cannot be written: {_describe(error)}") from error


def load_optimizer(model: LtuForConditionalGeneration, optimizer: Optimizer, folder: Path) -> None:
    """Load the states of a sharded optimizer, which any number of ranks may have written.

    accelerate's own function loads nothing into a new optimizer in some of its versions.
    Every rank must call this.

    Raises:
        ValueError: the folder is damaged, or of another model.
    """
    check_metadata(folder / METADATA_FILE)
    # A new optimizer has no states to load into: this makes some.
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        raise ValueError(f"{folder} is damaged, or of another model: {_describe(error)}") from error
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _describe(error: dcp.CheckpointException) -> str:
    """Return the error of the first rank that failed, in one line."""
    rank, (reason, _) = next(iter(error.failures.items()))
    lines = str(reason).splitlines() or [""]
    return f"rank {rank}: {type(reason).__name__}: {lines[0]}"


def check_metadata(path: Path) -> None:
    """Check that a pickle of metadata refers to nothing but metadata.

    torch opens it as any pickle, which could run code.

    Raises:
        ValueError: it refers to something else, or is damaged.
    """
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: the checkpoint is not complete.") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no metadata of torch: {error}") from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in METADATA_NAMES:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


class ShardedTrainer(Trainer):
    """The Trainer of transformers, for a model of which checkpoints hold a part.

    With `--fsdp`, it shards that model. Without, it differs from the stock Trainer in that it loads
    every key of a checkpoint, or ends with an error.

    Raises:
        ValueError: the model cannot be sharded, or not with the other flags.
    """

    def __init__(self, model: LtuForConditionalGeneration, args: TrainingArguments, **kwargs: Any):
        if args.fsdp:
            check_settings(model, args)
        super().__init__(model, args, **kwargs)
        if self.is_fsdp_enabled:
            self._set_up_sharding()

    def _set_up_sharding(self) -> None:
        """Set what accelerate does not derive from the model."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = find_layer_classes(self.model)
        plugin.mixed_precision_policy = choose_precision(self.model, self.args.bf16)

        # Parameters without a gradient would have no optimizer state, which loading expects.
        audio_tower = self.model.audio_tower
        for name in getattr(audio_tower, "unused_parameter_names", ()):
            audio_tower.get_parameter(name).requires_grad_(False)

        # Add gradients up in shards. Otherwise, each GPU would hold all of them between the
        # micro-batches of a step.
        self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss of a micro-batch, with FSDP in autocast and with a clip."""
        if not self.is_fsdp_enabled:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if "input_features" not in inputs:
            input_ids = inputs["input_ids"]
            shape = self.model.config.audio_config.feature_shape
            inputs = inputs | {
                "input_features": torch.zeros(1, *shape, device=input_ids.device),
                # No run of placeholders is of this clip, which comes after encoded ones.
                "audio_index": inputs.get("audio_index", input_ids.new_empty(0)),
            }
        with self.accelerator.autocast():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as a folder that `from_pretrained` opens; sharded, upload nothing."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        weights = gather_weights(self.model, keep=self.args.should_save)
        self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save what training needs besides `save_model`, which has written the weights.

        The stock method would save all weights again, with those of the frozen language model.
        """
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir, OPTIMIZER_FOLDER)
        save_optimizer(self.model, self.optimizer.optimizer, folder)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_FILE))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Load the weights of a checkpoint.

        Raises:
            ValueError: FSDP has written it and is off now, or the reverse.
        """
        folder = Path(resume_from_checkpoint)
        is_sharded = (folder / OPTIMIZER_FOLDER).is_dir()
        if is_sharded != self.is_fsdp_enabled:
            written = "with" if is_sharded else "without"
            raise ValueError(
                f"{folder} was written {written} --fsdp, and its optimizer states fit only a run "
                f"{written} it. Continue {written} --fsdp, or start a new run from these weights: "
                f"--base_model {folder}"
            )
        if self.is_fsdp_enabled:
            load_weights(self.model, folder)
        else:
            self.model.load_own(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what `_save_optimizer_and_scheduler` has written."""
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.model, self.optimizer.optimizer, Path(checkpoint, OPTIMIZER_FOLDER))
        state = torch.load(Path(checkpoint, SCHEDULER_FILE), weights_only=True)
        self.lr_scheduler.load_state_dict(state)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint."""
        folder = Path(self.state.best_model_checkpoint)
        if self.is_fsdp_enabled:
            load_weights(self.model, folder)
        else:
            self.model.load_own(folder)
