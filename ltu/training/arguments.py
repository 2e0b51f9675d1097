"""The flags of `ltu.finetune`: the original's by name, and ours.

Notable:
- What a checkpoint folder says (ear, LoRA, prompt template) is not typed again; such flags are None unless a fresh LoRA
  needs them.
- `--add_eos_token` is kept for its name: it has no effect in the original either.
"""

import os
from dataclasses import dataclass, field

from transformers import HfArgumentParser, TrainingArguments

from ltu.models.modeling_ltu import TRAINABLE_PLANS


@dataclass
class ModelArguments:
    base_model: str = field(metadata={"help": "checkpoint folder to start from"})
    trainable_params: str = field(
        default="all", metadata={"help": "proj: the projection; all: ear, projection and LoRA"}
    )
    freeze_audio_tower: bool = field(
        default=False, metadata={"help": "the ear stays as it is (for few clips)"}
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "rank of a fresh LoRA (8); a folder that has LoRA keeps its own"},
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "scale of a fresh LoRA (16)"})
    lora_dropout: float | None = field(default=None, metadata={"help": "of a fresh LoRA (0.05)"})
    lora_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "'[q_proj,v_proj]' (found in the language model); '[\"dummy\"]' adds no LoRA"
        },
    )
    prompt_template_name: str | None = field(
        default=None, metadata={"help": "only checked: the folder holds its template"}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "of the language model: eager, sdpa, flash_attention_2 (its own default)"
        },
    )
    llm: str | None = field(
        default=None, metadata={"help": "another place of the folder's language model"}
    )
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "auto: one process, layers of the language model spread over all visible GPUs"
        },
    )


@dataclass
class DataArguments:
    data_path: str = field(
        metadata={
            "help": "rows: JSON list, JSON lines, Parquet, or their index (ltu.index_dataset)"
        }
    )
    audio_root: str | None = field(
        default=None,
        metadata={"help": "folder of relative audio_ids (default: that of the data file)"},
    )
    feature_root: str | None = field(
        default=None,
        metadata={
            "help": "LTU-AS: folder of ltu_as.extract_whisper_feature, or of the original's .npz"
        },
    )
    feature_precision: str | None = field(
        default=None,
        metadata={"help": "LTU-AS: fp16 or fp32, of Whisper's encoder (default: the folder's own)"},
    )
    whisper: str | None = field(
        default=None, metadata={"help": "LTU-AS: another place of its Whisper"}
    )
    transcription_model: str | None = field(
        default=None, metadata={"help": "LTU-AS: another Whisper for the words"}
    )
    cutoff_len: int = field(
        default=108, metadata={"help": "text ids of a row; audio does not count"}
    )
    val_set_size: int = field(
        default=0, metadata={"help": "rows held out; their loss is logged at each save"}
    )
    train_on_inputs: bool = field(
        default=True, metadata={"help": "whether the question carries loss too, as in the papers"}
    )
    add_eos_token: bool = field(
        default=False,
        metadata={"help": "no effect, here as in the original: a full answer always ends"},
    )
    check_audio: bool = field(
        default=False,
        metadata={"help": "load every clip before training; one that cannot be heard is an error"},
    )
    max_bad: int = field(
        default=0,
        metadata={"help": "rows that each process may skip because their clip cannot be heard"},
    )
    original_positions: bool = field(
        default=False, metadata={"help": "positions and labels of pads as the original trains"}
    )
    show_batch: bool = field(
        default=False, metadata={"help": "print a batch as the model gets it, and stop"}
    )
    plan: bool = field(
        default=False, metadata={"help": "print steps, sizes and what is trained, and stop"}
    )


@dataclass
class RunArguments:
    output_dir: str = field(metadata={"help": "folder of the run; afterwards a checkpoint folder"})
    batch_size: int = field(
        default=256, metadata={"help": "rows in one optimizer step, over all ranks"}
    )
    micro_batch_size: int = field(
        default=8, metadata={"help": "rows in one forward pass of one rank"}
    )
    num_epochs: int = 1
    max_steps: int = field(
        default=-1, metadata={"help": "optimizer steps, instead of those of the epochs"}
    )
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    group_by_length: bool = False
    gradient_checkpointing: bool = False
    bf16: str = field(
        default="auto", metadata={"help": "auto: where the device computes in it; True; False"}
    )
    seed: int = 42
    num_workers: int = field(default=2, metadata={"help": "processes that load audio"})
    logging_steps: int = 10
    save_steps: int = 200
    save_total_limit: int = 2
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "folder checkpoint-N of this run, or 'last'"}
    )
    wandb_project: str = ""
    wandb_run_name: str = ""
    wandb_watch: str = field(default="", metadata={"help": "false | gradients | all"})
    wandb_log_model: str = field(default="", metadata={"help": "false | true"})
    tensorboard: bool = False


class OneGpuArguments(TrainingArguments):
    """Stock arguments of a process that trains on one GPU, however many are visible.

    With more than one the Trainer would use DataParallel, which splits a batch by its first
    dimension: clips and rows would part.
    """

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def parse_args(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """The three groups of flags. A flag that does not exist, or is abbreviated, stops the run."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, RunArguments), description=__doc__, allow_abbrev=False
    )
    model_args, data_args, run_args = parser.parse_args_into_dataclasses(argv)
    if model_args.trainable_params not in TRAINABLE_PLANS:
        parser.error(
            f"--trainable_params {model_args.trainable_params}: choose from {', '.join(TRAINABLE_PLANS)}"
        )
    if run_args.bf16 not in ("auto", "True", "False"):
        parser.error(f"--bf16 {run_args.bf16}: choose from auto, True, False")
    for name in ("batch_size", "micro_batch_size", "num_epochs", "logging_steps", "save_steps"):
        if getattr(run_args, name) < 1:
            parser.error(f"--{name} {getattr(run_args, name)}: it must be at least 1")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if run_args.batch_size // run_args.micro_batch_size // world_size < 1:
        parser.error(
            f"--batch_size {run_args.batch_size} is less than --micro_batch_size {run_args.micro_batch_size} x "
            f"{world_size} processes. "
            "Raise the one or lower the other."
        )
    return model_args, data_args, run_args


def parse_list(text: str) -> list[str]:
    """`[q_proj,v_proj]`, `["q_proj", "v_proj"]` or `q_proj,v_proj`."""
    return [
        item.strip().strip("\"'") for item in text.strip().strip("[]").split(",") if item.strip()
    ]
