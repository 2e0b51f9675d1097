"""Defines the flags of `ltu.finetune`: those of the original, by name, and ours.

A checkpoint folder already stores its audio encoder, its LoRA settings and its prompt template, so
that no flag repeats them. The LoRA flags are None unless a fresh LoRA needs them.
`--add_eos_token` exists for its name only: it has no effect in the original either.

@FILE stands for the flags in a file, for example train_scripts/curriculum.args.
"""

import os
import shlex
from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from ltu.checkpoints.open_checkpoint import QUANTIZATIONS
from ltu.models.audio_front_end import add_front_end_flags, read_front_end_flags
from ltu.models.modeling_ltu import TRAINABLE_PLANS

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
    "logging_steps": 1,
    "save_steps": 1,
    "cutoff_len": 2,
    "val_set_size": 0,
    "max_bad": 0,
    "num_workers": 0,
    "warmup_steps": 0,
}


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

    def find_contradiction(self) -> str | None:
        """Return why these flags cannot be used together, or None if they can."""
        if self.quantization not in (None, *QUANTIZATIONS):
            choices = ", ".join(QUANTIZATIONS)
            return f"--quantization {self.quantization}: choose from {choices}"
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


@dataclass
class DataArguments:
    """Flags of the dataset."""

    data_path: str = field(
        metadata={
            "help": "The dataset file: a JSON list, JSON lines, Parquet, or the index of one of "
            "them (ltu.index_dataset)."
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
            "be decoded."
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
    # Values of the flags that the audio front ends add, by name.
    front_end: dict[str, str | None] = field(init=False, default_factory=dict)


@dataclass
class RunArguments:
    """Flags of the training run."""

    output_dir: str = field(
        metadata={"help": "The folder of the run. It is a checkpoint folder when training is done."}
    )
    batch_size: int = field(
        default=256,
        metadata={"help": "The number of examples in one optimizer step, over all ranks."},
    )
    micro_batch_size: int = field(
        default=8, metadata={"help": "The number of examples in one forward pass of one rank."}
    )
    skip_finished: bool = field(
        default=False,
        metadata={"help": "Do not train again if the run in --output_dir is finished."},
    )
    num_epochs: int = 1
    max_steps: int = field(
        default=-1,
        metadata={"help": "The number of optimizer steps, instead of that of the epochs."},
    )
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    group_by_length: bool = False
    gradient_checkpointing: bool = False
    bf16: str = field(
        default="auto",
        metadata={
            "help": "Whether to train in bf16: True, False, or auto for where the device supports "
            "it."
        },
    )
    seed: int = 42
    num_workers: int = field(
        default=2, metadata={"help": "The number of processes that load audio."}
    )
    logging_steps: int = 10
    save_steps: int = 200
    save_total_limit: int = 2
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A folder checkpoint-N of this run, or 'last', to resume from."},
    )
    wandb_project: str = ""
    wandb_run_name: str = ""
    wandb_watch: str = field(default="", metadata={"help": "false, gradients or all."})
    wandb_log_model: str = field(
        default="",
        metadata={
            "help": "Whether to upload the model to wandb: end, checkpoint or false. true, the "
            "original's value, means end."
        },
    )
    tensorboard: bool = False
    fsdp: str | None = field(default=None, metadata={"nargs": "?", "const": True})
    fsdp_config: str | None = None


class OneGpuArguments(TrainingArguments):
    """Training arguments of a process that uses one GPU, however many are visible.

    With more than one, the Trainer would use DataParallel, which splits every tensor of a batch by
    its first dimension. Clips and rows would no longer match, because rows without audio have no
    clip.
    """

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


class FlagParser(HfArgumentParser):
    """Parses flags; `@FILE` stands for the flags in a file, where # begins a comment.

    If a flag is given twice, the last one counts.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, fromfile_prefix_chars="@", allow_abbrev=False, **kwargs)

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
    model_args, data_args, run_args, *others, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if others:  # A namespace with the flags of the audio front ends.
        data_args.front_end = read_front_end_flags(others[0])

    plan = model_args.trainable_params
    if plan not in TRAINABLE_PLANS:
        parser.error(f"--trainable_params {plan}: choose from {', '.join(TRAINABLE_PLANS)}")
    contradiction = model_args.find_contradiction()
    if contradiction is not None:
        parser.error(contradiction)
    if run_args.bf16 not in ("auto", "True", "False"):
        parser.error(f"--bf16 {run_args.bf16}: choose from auto, True, False")
    values = vars(data_args) | vars(run_args)
    for name, smallest in SMALLEST.items():
        if values[name] < smallest:
            parser.error(f"--{name} {values[name]}: it must be at least {smallest}")
    if run_args.max_steps == 0:
        parser.error("--max_steps 0 trains nothing; -1 means all epochs")
    wandb_flags = ("wandb_run_name", "wandb_watch", "wandb_log_model")
    given = [f"--{name}" for name in wandb_flags if values[name]]
    if given and not run_args.wandb_project:
        parser.error(f"{', '.join(given)} need --wandb_project")

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if run_args.batch_size // run_args.micro_batch_size // world_size < 1:
        parser.error(
            f"--batch_size {run_args.batch_size} is less than "
            f"--micro_batch_size {run_args.micro_batch_size} x {world_size} processes. "
            "Raise the one or lower the other."
        )
    return model_args, data_args, run_args


def parse_list(text: str) -> list[str]:
    """Parse `[q_proj,v_proj]`, `["q_proj", "v_proj"]` or `q_proj,v_proj`."""
    items = text.strip().strip("[]").split(",")
    return [item.strip().strip("\"'") for item in items if item.strip()]
