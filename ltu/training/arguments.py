"""Defines the flags of `ltu.finetune`: those of the original, by name, and ours.

A checkpoint folder already stores its audio encoder, its LoRA settings and its prompt template, so
that no flag repeats them. The LoRA flags are None unless a fresh LoRA needs them.
`--add_eos_token` exists for its name only: it has no effect in the original either.

@FILE stands for the flags in a file, for example train_scripts/curriculum.args.
"""

import math
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, IntervalStrategy, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ltu.checkpoints.open_checkpoint import QUANTIZATIONS
from ltu.data.check_examples import IGNORED_KEYS_HELP
from ltu.data.columns import ColumnFlags
from ltu.files import read_json_object
from ltu.models.audio_front_end import add_front_end_flags, read_front_end_flags
from ltu.models.device_check import device_has_bf16
from ltu.models.modeling_ltu import TRAINABLE_PLANS
from ltu.training import sharding

DESCRIPTION = (
    "Trains one stage. The checkpoint folder determines the audio encoder, the LoRA settings and "
    "the prompt template; a flag that contradicts the folder is an error. @FILE stands for the "
    "flags in a file."
)


# The smallest values of flags that are numbers.
SMALLEST = {
    "batch_size": 1,
    "micro_batch_size": 1,
    "num_epochs": 1,
    "cutoff_len": 2,
    "val_set_size": 0,
    "max_bad": 0,
    "warmup_steps": 0,
    "max_steps": -1,
    "learning_rate": 0,
    "projector_learning_rate": 0,
    "encoder_learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "eval_delay": 0,
}
MAX_SEED = 2**32 - 1  # Of numpy's generator.


@dataclass
class ModelArguments:
    """Flags of the model that is trained."""

    base_model: str = field(metadata={"help": "The checkpoint folder to start from."})
    trainable_params: str = field(
        default="all",
        metadata={
            "help": "proj trains the projection only; all trains the audio encoder, the projection "
            "and LoRA; full trains the audio encoder, the projection and the whole language model, "
            "in fp32 and without LoRA. LoRA of the checkpoint is merged first."
        },
    )
    freeze_audio_tower: bool = field(
        default=False,
        metadata={"help": "Freeze the audio encoder, which helps when there are few clips."},
    )
    lora_r: int | None = field(
        default=None,
        metadata={
            "help": "The rank of a fresh LoRA (8). A checkpoint that has LoRA keeps its own rank."
        },
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "The scale of a fresh LoRA (16)."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "The dropout of a fresh LoRA (0.05)."}
    )
    lora_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "The modules that get LoRA, for example '[q_proj,v_proj]'. By default they are "
            "found in the language model; '[\"dummy\"]' adds no LoRA."
        },
    )
    encoder_lora_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "The modules of the audio encoder that get LoRA, for example "
            "'[q_proj,v_proj]'. Its other weights are frozen then. Rank, scale and dropout are "
            "those of --lora_*."
        },
    )
    prompt_template_name: str | None = field(
        default=None,
        metadata={
            "help": "The expected name of the prompt template. It is only checked, because the "
            "checkpoint folder holds its template."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "The attention implementation of the language model: eager, sdpa or "
            "flash_attention_2. By default transformers chooses."
        },
    )
    llm: str | None = field(
        default=None,
        metadata={"help": "Another path of the language model that the checkpoint refers to."},
    )
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "auto trains in one process and spreads the layers of the language model over "
            "all visible GPUs."
        },
    )
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "4bit or 8bit: quantize the frozen language model during training. LoRA stays "
            "fp32. Needs pip install -e '.[4bit]'."
        },
    )

    @property
    def trains_audio_tower(self) -> bool:
        """Whether the audio encoder is trained."""
        return "audio_tower." in TRAINABLE_PLANS[self.trainable_params] and not (
            self.freeze_audio_tower
        )

    def find_contradiction(self) -> str | None:
        """Return why these flags cannot be used together, or None if they can."""
        if self.quantization not in (None, *QUANTIZATIONS):
            choices = ", ".join(QUANTIZATIONS)
            return f"--quantization {self.quantization}: choose from {choices}"
        if self.encoder_lora_target_modules is not None:
            if self.freeze_audio_tower:
                return "--encoder_lora_target_modules with --freeze_audio_tower: leave one out"
            if self.trainable_params != "all":
                return (
                    "--encoder_lora_target_modules with --trainable_params "
                    f"{self.trainable_params}, which trains no LoRA: use --trainable_params all"
                )
        if self.trainable_params != "full":
            return None
        lora_flags = {
            "lora_r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
        }
        if self.lora_target_modules is not None:
            targets = parse_list(self.lora_target_modules)
            lora_flags["lora_target_modules"] = None if targets == ["dummy"] else targets
        given = [f"--{name}" for name, value in lora_flags.items() if value is not None]
        if given:
            return (
                f"{', '.join(given)} with --trainable_params full, which trains the language model "
                "itself and has no LoRA: leave the flag out, or say --lora_target_modules "
                "'[\"dummy\"]'"
            )
        if self.quantization is not None:
            return (
                f"--quantization {self.quantization} with --trainable_params full: quantized "
                "weights cannot be trained. Train LoRA: --trainable_params all"
            )
        return None


@dataclass(kw_only=True)
class DataArguments(ColumnFlags):
    """Flags of the dataset."""

    data_path: str = field(
        metadata={
            "help": "The dataset: a JSON list, JSON lines, Parquet, a folder of datasets' "
            "save_to_disk, a folder of Parquet files, a data set of the hub (owner/name), or the "
            "index of one of them (ltu.index_dataset)."
        }
    )
    audio_root: str | None = field(
        default=None,
        metadata={
            "help": "The folder to which audio_ids are relative. The default is the folder of the "
            "dataset file."
        },
    )
    cutoff_len: int = field(
        default=108,
        metadata={
            "help": "The maximum number of text tokens of an example. Audio tokens do not count."
        },
    )
    val_set_size: int = field(
        default=0,
        metadata={
            "help": "The number of examples held out. Their loss is logged with each saved "
            "checkpoint."
        },
    )
    train_on_inputs: bool = field(
        default=True,
        metadata={"help": "Whether the question carries loss too, as in the papers."},
    )
    add_eos_token: bool = field(
        default=False,
        metadata={
            "help": "No effect, as in the original: an answer that is not truncated always gets "
            "the end token."
        },
    )
    check_audio: bool = field(
        default=False,
        metadata={
            "help": "Load every clip before training. A clip that cannot be decoded is an error."
        },
    )
    max_bad: int = field(
        default=0,
        metadata={
            "help": "The number of examples that each process may skip because their clip cannot "
            "be decoded or no answer is left within --cutoff_len."
        },
    )
    ignored_keys: str = field(default="", metadata={"help": IGNORED_KEYS_HELP})
    encoder_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder for the outputs of an audio encoder that is not trained: each clip "
            "is encoded once, before the first step, and no audio is decoded then. Runs and stages "
            "with the same encoder share it. --plan prints its size."
        },
    )
    text_only: bool = field(
        default=False,
        metadata={
            "help": "Train on a dataset in which no example has audio, which is an error without "
            "this flag."
        },
    )
    original_positions: bool = field(
        default=False,
        metadata={
            "help": "Count padding in positions and train on the <s> that follows it, as the "
            "original does."
        },
    )
    show_batch: bool = field(
        default=False, metadata={"help": "Print a batch as the model gets it, and stop."}
    )
    plan: bool = field(
        default=False,
        metadata={"help": "Print steps, sizes and the number of trainable parameters, and stop."},
    )
    gpu_memory: float | None = field(
        default=None,
        metadata={
            "help": "With --plan: print whether the run fits into a GPU of so many GiB, and which "
            "flags make it fit. The weights are not opened."
        },
    )
    # Values of the flags that the audio front ends add, by name.
    front_end: dict[str, str | None] = field(init=False, default_factory=dict)


# Flags of the Trainer that are refused, because another flag has their meaning here or because they
# would change the loss or the order of examples of the original; each with what to do.
REFUSED = {
    "per_device_train_batch_size": "the name of this flag is --micro_batch_size",
    "num_train_epochs": "the name of this flag is --num_epochs",
    "dataloader_num_workers": "the name of this flag is --num_workers",
    "gradient_accumulation_steps": "it follows from --batch_size, --micro_batch_size and the "
    "number of processes",
    "train_sampling_strategy": "the order of examples is the original's; --group_by_length "
    "batches examples of similar length",
    "length_column_name": "--group_by_length counts the tokens itself",
    "dataloader_drop_last": "the micro-batches are the original's",
    "dataloader_in_order": "the order of examples is the original's",
    "accelerator_config": "the micro-batches of a process are the original's",
    "auto_find_batch_size": "it would change the micro-batches; --rows_per_pass auto finds what "
    "fits",
    "ignore_data_skip": "a resumed run would use the same examples again",
    "remove_unused_columns": "examples are checked when they are read",
    "label_names": "the labels are the answers",
    "average_tokens_across_devices": "the loss is the original's: the mean of the means of "
    "micro-batches",
    "label_smoothing_factor": "the loss is the original's",
    "fp16": "its loss scaling skips steps without an error; use bf16, or fp32 on devices without",
    "logging_nan_inf_filter": "training ends at the first loss that is not finite",
    "enable_jit_checkpoint": "SIGTERM always writes a checkpoint",
    "local_rank": "torchrun sets it",
    "do_train": "this command always trains",
    "do_eval": "--val_set_size holds out examples and evaluates them",
    "do_predict": "python -m ltu.inference_batch answers questions",
    "use_cache": "training needs no cache",
    "hub_strategy": "the model is uploaded when it is trained, with its record and its card",
}


@dataclass
class RunArguments(TrainingArguments):
    """Flags of the training run: all flags of the Trainer but `REFUSED`, and the original's.

    The defaults are the original's: AdamW with betas 0.9 and 0.999 and epsilon 1e-8, no weight
    decay, gradients clipped at 1.0, and a linear schedule after 100 steps of warm-up.
    """

    output_dir: str = field(
        metadata={"help": "The folder of the run. It is a checkpoint folder when training is done."}
    )
    learning_rate: float = field(
        default=1e-4, metadata={"help": "The learning rate after the warm-up."}
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "The learning rate of the projection, with the same schedule; by default "
            "--learning_rate, as in the papers. A projection that starts at random may need a "
            "higher one."
        },
    )
    encoder_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "The learning rate of the audio encoder, with the same schedule; by default "
            "--learning_rate, as in the papers. A pretrained encoder may need a lower one."
        },
    )
    warmup_steps: float = field(
        default=100,
        metadata={
            "help": "The number of warm-up steps, or their fraction of all steps if below 1."
        },
    )
    optim: str = field(default="adamw_torch", metadata={"help": "The optimizer."})
    bf16: str = field(
        default="auto",
        metadata={
            "help": "Whether to train in bf16: True, False, or auto for where the device supports "
            "it.",
            "nargs": "?",
            "const": "True",
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Compute activations again in the backward pass, to save memory."},
    )
    compile_layers: str = field(
        default="auto",
        metadata={
            "help": "Whether to compile the layers of language model and audio encoder, which "
            "takes a minute or two once: True, False, or auto for long runs on CUDA. The loss is "
            "the same but for the rounding. If there is no compiler, a warning says so, and "
            "training goes on without.",
            "nargs": "?",
            "const": "True",
        },
    )
    logging_steps: float = field(
        default=10, metadata={"help": "The number of steps between two entries of the log."}
    )
    save_steps: float = field(
        default=200, metadata={"help": "The number of steps between two checkpoints."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "The number of checkpoints that are kept."}
    )
    per_device_eval_batch_size: int | None = field(
        default=None,
        metadata={"help": "Held-out examples in one forward pass; by default --micro_batch_size."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "last continues from the newest complete checkpoint of the run in "
            "--output_dir; auto does so too, or starts the run if there is none; a folder "
            "checkpoint-N continues from there."
        },
    )
    # The audio encoder has norms that are not used, and a batch may have no audio.
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Whether DDP looks for parameters without a gradient."}
    )

    batch_size: int = field(
        default=256,
        metadata={"help": "The number of examples in one optimizer step, over all ranks."},
    )
    micro_batch_size: int = field(
        default=8,
        metadata={
            "help": "The number of examples over whose tokens the loss is averaged. The loss of a "
            "step is the mean over its micro-batches."
        },
    )
    rows_per_pass: str = field(
        default="auto",
        metadata={
            "help": "The number of examples that go through the model at once, which changes speed "
            "and memory but not the loss: several micro-batches, or a part of one. auto is the "
            "largest number that fits into a GPU, and a micro-batch elsewhere."
        },
    )
    num_epochs: int = field(default=1, metadata={"help": "How often every example is used."})
    group_by_length: bool = field(
        default=False, metadata={"help": "Put examples of similar length into one batch."}
    )
    num_workers: str = field(
        default="auto",
        metadata={
            "help": "The number of processes that load audio; auto chooses it by the number of "
            "cores and the time that an example takes."
        },
    )
    skip_finished: bool = field(
        default=False,
        metadata={"help": "Do not train again if the run in --output_dir is finished."},
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Delete the run that --output_dir holds, and train from the beginning."},
    )
    wandb_project: str = field(default="", metadata={"help": "Log to this project of wandb."})
    wandb_run_name: str = field(default="", metadata={"help": "The name of the run in wandb."})
    wandb_watch: str = field(default="", metadata={"help": "false, gradients or all."})
    wandb_log_model: str = field(
        default="",
        metadata={
            "help": "Whether to upload the model to wandb: end, checkpoint or false. true, the "
            "original's value, means end."
        },
    )
    tensorboard: bool = field(default=False, metadata={"help": "Log to tensorboard."})

    # Not flags: `__post_init__` sets them, or they have the only value that is right here.
    per_device_train_batch_size: int = field(init=False, default=8)
    num_train_epochs: float = field(init=False, default=1)
    dataloader_num_workers: int = field(init=False, default=0)
    gradient_accumulation_steps: int = field(init=False, default=1)
    train_sampling_strategy: str = field(init=False, default="random")
    length_column_name: str = field(init=False, default="length")
    dataloader_drop_last: bool = field(init=False, default=False)
    dataloader_in_order: bool = field(init=False, default=True)
    accelerator_config: dict | str | None = field(init=False, default=None)
    auto_find_batch_size: bool = field(init=False, default=False)
    ignore_data_skip: bool = field(init=False, default=False)
    remove_unused_columns: bool = field(init=False, default=False)
    label_names: list[str] | None = field(init=False, default=None)
    average_tokens_across_devices: bool = field(init=False, default=False)
    label_smoothing_factor: float = field(init=False, default=0.0)
    fp16: bool = field(init=False, default=False)
    logging_nan_inf_filter: bool = field(init=False, default=False)
    enable_jit_checkpoint: bool = field(init=False, default=False)
    local_rank: int = field(init=False, default=-1)
    do_train: bool = field(init=False, default=True)
    do_eval: bool = field(init=False, default=False)
    do_predict: bool = field(init=False, default=False)
    use_cache: bool = field(init=False, default=False)
    hub_strategy: str = field(init=False, default="end")

    def __post_init__(self) -> None:
        has_accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
        self.use_cpu = self.use_cpu or not has_accelerator
        choice = self.bf16.lower()
        if choice not in ("auto", "true", "false"):
            raise ValueError(f"--bf16 {self.bf16}: choose from auto, True, False")
        self.compile_layers = self.compile_layers.lower()
        if self.compile_layers not in ("auto", "true", "false"):
            raise ValueError(f"--compile_layers {self.compile_layers}: choose auto, True, False")
        self.is_bf16_chosen = choice != "auto"  # --plan can be for another machine.
        self.bf16 = device_has_bf16() if choice == "auto" else choice == "true"
        # transformers 5.24 warns of the old name of this argument, 5.17 lacks the new one.
        if self.gradient_checkpointing and hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = True
        if not self.gradient_checkpointing or hasattr(self, "activation_checkpointing"):
            self.gradient_checkpointing = None

        # Slurm repeats the command of a job that it requeues, which must not delete its own work.
        if self.overwrite and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            self.overwrite = False
        if self.load_best_model_at_end and self.eval_strategy == "no":
            self.eval_strategy = "steps"
            self.eval_steps = self.eval_steps or self.save_steps

        self.per_device_train_batch_size = self.micro_batch_size
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.micro_batch_size
        self.num_train_epochs = self.num_epochs
        self._set_num_workers()
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.gradient_accumulation_steps = self.batch_size // self.micro_batch_size // world_size
        self._set_reports()
        self._check_fsdp_config()
        super().__post_init__()
        if self.compile_layers == "true":
            for name in ("torch_compile", "fsdp", "deepspeed"):
                if getattr(self, name):
                    raise ValueError(
                        f"--compile_layers does not work with --{name}. Leave one of them out."
                    )
        if self.fsdp:
            sharding.check_devices(self)
        for name in ("eval_strategy", "logging_strategy", "save_strategy"):
            if getattr(self, name) == "epoch":
                raise ValueError(
                    f"--{name} epoch: one loader covers all epochs here, so that this would be the "
                    "end of the run. Give a number of steps."
                )

    def _set_num_workers(self) -> None:
        """Convert `num_workers` to a number, unless it is auto.

        Raises:
            ValueError: it is neither.
        """
        # The Trainer's checks need a number. `make_trainer` replaces it.
        self.dataloader_num_workers = 1
        if self.num_workers == "auto":
            return
        try:
            self.num_workers = int(self.num_workers)
        except ValueError as error:
            raise ValueError(
                f"--num_workers {self.num_workers}: it must be a number from 0, or auto"
            ) from error
        if self.num_workers < 0:
            raise ValueError(f"--num_workers {self.num_workers}: it must be at least 0")
        self.dataloader_num_workers = self.num_workers

    def _set_reports(self) -> None:
        """Add wandb and tensorboard to `report_to`, and set the variables that wandb reads."""
        reports = self.report_to if isinstance(self.report_to, list) else [self.report_to]
        reports = [report for report in reports if report not in (None, "none")]
        if self.wandb_project:
            reports.append("wandb")
            os.environ["WANDB_PROJECT"] = self.wandb_project
            self.run_name = self.wandb_run_name or self.run_name
            if self.wandb_watch:
                os.environ["WANDB_WATCH"] = self.wandb_watch
            if self.wandb_log_model:
                # The original's "true" is of an older transformers.
                is_original = self.wandb_log_model == "true"
                os.environ["WANDB_LOG_MODEL"] = "end" if is_original else self.wandb_log_model
        if self.tensorboard:
            reports.append("tensorboard")
        self.report_to = reports or "none"

    def _check_fsdp_config(self) -> None:
        """Raise ValueError if `fsdp_config` is a file that cannot be read."""
        config = self.fsdp_config
        if not isinstance(config, str) or config.startswith("{"):
            return
        try:
            read_json_object(Path(config))
        except OSError as error:
            raise ValueError(f"--fsdp_config {config}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"--fsdp_config: {error}") from error

    @property
    def n_gpu(self) -> int:
        """The number of GPUs of this process, at most one.

        With more than one, the Trainer would use DataParallel, which splits every tensor of a batch
        by its first dimension. Clips and rows would no longer match, because rows without audio
        have no clip.
        """
        return min(1, super().n_gpu)


class FlagParser(HfArgumentParser):
    """Parses flags; `@FILE` stands for the flags in a file, where # begins a comment.

    If a flag is given twice, the last one counts.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, fromfile_prefix_chars="@", allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line, which the usage of some 150 flags would hide."""
        self.exit(2, f"error: {message} (--help lists all flags)\n")

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"{error} in this line of a file of flags: {line}")


def parse_args(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Parse the three groups of flags.

    A flag that is unknown or abbreviated, or a value that is not allowed, ends the process with
    exit status 2.
    """
    parser = FlagParser((ModelArguments, DataArguments, RunArguments), description=DESCRIPTION)
    add_front_end_flags(parser)
    try:
        model_args, data_args, run_args, *others, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # Flags that the Trainer does not take together.
        parser.error(str(error))
    _check_unknown(parser, unknown)
    if others:  # A namespace with the flags of the audio front ends.
        data_args.front_end = read_front_end_flags(others[0])

    plan = model_args.trainable_params
    if plan not in TRAINABLE_PLANS:
        parser.error(f"--trainable_params {plan}: choose from {', '.join(TRAINABLE_PLANS)}")
    contradiction = model_args.find_contradiction()
    if contradiction is not None:
        parser.error(contradiction)
    if run_args.compile_layers == "true" and model_args.device_map is not None:
        parser.error("--compile_layers does not work with --device_map. Leave one of them out")
    if data_args.encoder_cache:
        if model_args.trains_audio_tower:
            parser.error(
                f"--encoder_cache needs an audio encoder that is not trained, but "
                f"--trainable_params {plan} trains it. Add --freeze_audio_tower, or leave the flag "
                "out"
            )
        if run_args.deepspeed:
            parser.error(
                "--encoder_cache with --deepspeed: DeepSpeed computes the encoder in another "
                "precision than the cache. Leave one of them out"
            )
    if data_args.gpu_memory is not None:
        if not data_args.plan:
            parser.error("--gpu_memory is only for --plan")
        if not data_args.gpu_memory > 0:
            parser.error(f"--gpu_memory {data_args.gpu_memory}: it must be more than 0")
    for name in ("projector_learning_rate", "encoder_learning_rate"):
        if getattr(run_args, name) is None:
            continue
        if run_args.deepspeed:
            # With an optimizer in its config, DeepSpeed does not ask the Trainer for groups.
            parser.error(
                f"--{name} with --deepspeed, whose config may have an optimizer of its own: leave "
                "one of them out"
            )
        if "lomo" in run_args.optim:
            parser.error(
                f"--{name} with --optim {run_args.optim.value}, which has one learning rate for "
                "all weights: leave one of them out"
            )
    if run_args.encoder_learning_rate is not None and not model_args.trains_audio_tower:
        parser.error(
            "--encoder_learning_rate: the audio encoder is not trained. Leave it out, or train the "
            "encoder: --trainable_params all, without --freeze_audio_tower"
        )
    values = vars(data_args) | vars(run_args)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name} {value}: it must be a finite number")
    for name, smallest in SMALLEST.items():
        if values[name] is not None and values[name] < smallest:
            parser.error(f"--{name} {values[name]}: it must be at least {smallest}")
    rows = run_args.rows_per_pass
    if rows != "auto" and not (rows.isdecimal() and int(rows) > 0):
        parser.error(f"--rows_per_pass {rows}: choose auto, or a number of at least 1")
    if run_args.seed > MAX_SEED:
        parser.error(f"--seed {run_args.seed}: it must be at most {MAX_SEED}")
    for name in ("logging_steps", "save_steps"):
        if values[name] <= 0:
            parser.error(f"--{name} {values[name]}: it must be more than 0")
    unavailable = set(run_args.report_to) - set(get_available_reporting_integrations())
    if unavailable:
        names = " ".join(sorted(unavailable))
        parser.error(f"--report_to {names}: not installed. Install it: pip install {names}")
    if run_args.overwrite and run_args.resume_from_checkpoint not in (None, "auto"):
        parser.error(
            f"--overwrite would delete the run that --resume_from_checkpoint "
            f"{run_args.resume_from_checkpoint} is to continue: leave one of them out"
        )
    if run_args.max_steps == 0:
        parser.error("--max_steps 0 trains nothing; -1 means all epochs")
    wandb_flags = ("wandb_run_name", "wandb_watch", "wandb_log_model")
    given = [f"--{name}" for name in wandb_flags if values[name]]
    if given and not run_args.wandb_project:
        parser.error(f"{', '.join(given)} need --wandb_project")

    if run_args.gradient_accumulation_steps < 1:
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        parser.error(
            f"--batch_size {run_args.batch_size} is less than "
            f"--micro_batch_size {run_args.micro_batch_size} x {world_size} processes. "
            "Raise the one or lower the other."
        )
    evaluates = run_args.eval_strategy != IntervalStrategy.NO
    evaluates = evaluates or run_args.eval_steps is not None or run_args.eval_on_start
    if evaluates and data_args.val_set_size == 0:
        parser.error("--eval_... and --load_best_model_at_end need --val_set_size")
    # The Trainer ignores this flag with all other optimizers.
    if run_args.optim_target_modules and not run_args.optim.value.startswith(("galore", "apollo")):
        parser.error(f"--optim_target_modules has no effect with --optim {run_args.optim.value}")
    # The loss of held-out examples is logged whenever the model is saved.
    if data_args.val_set_size > 0 and run_args.eval_strategy == IntervalStrategy.NO:
        run_args.eval_strategy = IntervalStrategy.STEPS
        run_args.eval_steps = run_args.eval_steps or run_args.save_steps
        run_args.do_eval = True
    return model_args, data_args, run_args


def _check_unknown(parser: FlagParser, unknown: list[str]) -> None:
    """End the process with exit status 2 if there are unknown arguments."""
    if not unknown:
        return
    for argument in unknown:
        name = argument.removeprefix("--").partition("=")[0]
        if name in REFUSED:
            parser.error(f"--{name} is not available: {REFUSED[name]}")
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def parse_list(text: str) -> list[str]:
    """Parse `[q_proj,v_proj]`, `["q_proj", "v_proj"]` or `q_proj,v_proj`."""
    items = text.strip().strip("[]").split(",")
    return [item.strip().strip("\"'") for item in items if item.strip()]
