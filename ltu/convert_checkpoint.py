"""Converts original files and pretrained components into a checkpoint folder, and back.

    python -m ltu.convert_checkpoint --llm DIR_OR_ID --checkpoint FILE_OR_DIR --output_dir DIR
    python -m ltu.convert_checkpoint --init --llm DIR_OR_ID --audio_encoder FILE --output_dir DIR
    python -m ltu.convert_checkpoint --model DIR --to_original FILE.bin
    python -m ltu.convert_checkpoint --model DIR --merge --output_dir DIR
    python -m ltu.convert_checkpoint --model DIR --merged_llm_dir DIR

1. Opens an original file, with the trainable parameters alone or a whole model. For a whole model,
   `--llm` gives config and tokenizer, and the new folder contains the language model.
2. Writes the initial checkpoint, from which stage 1 starts. Without `--audio_encoder` the audio
   encoder is random, with a warning.
3. Writes a file as the original's Trainer would.
4. Writes a self-contained folder: the language model with LoRA merged in.
5. Writes that language model alone, as a stock folder for other programs such as vLLM.

Each key of a file is placed, renamed, or dropped by a rule with a reason; a key that is left over
or missing is an error. Pickles are opened only with `weights_only=True`. Of a language model that
is not copied, only the embeddings are read, for `--init`.
"""

import argparse
from dataclasses import Field, fields
from pathlib import Path

import torch

from ltu.checkpoints.convert import EncoderSettings, LtuConverter
from ltu.checkpoints.wrap_audio_encoder import DEFAULT_CHUNK_SECONDS, DEFAULT_NUM_AUDIO_TOKENS
from ltu.files import run_command

PROMPT_TEMPLATE = "alpaca_short"
USAGE = (
    "give --llm and --output_dir with --checkpoint or --init (and its --audio_encoder, "
    "--num_audio_tokens, --chunk_seconds, --encoder_layers, --prompt_template); --model with "
    "--to_original or --merged_llm_dir; or --model and --output_dir with --merge. --llm_dtype is "
    "for --checkpoint, --merge and --merged_llm_dir, --lora_alpha and --lora_dropout for "
    "--checkpoint"
)


def settings_of(converter_class: type[LtuConverter]) -> list[Field]:
    """Return the fields that flags set."""
    return [field for field in fields(converter_class) if field.init]


def parse_args(argv: list[str] | None, converter_class: type[LtuConverter]) -> argparse.Namespace:
    """Return the flags; contradictory ones end the program, as in argparse."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--llm",
        help="Folder or hub id of the language model that the checkpoint was trained with.",
    )
    parser.add_argument(
        "--checkpoint",
        help="An original file (.bin), or a folder with all files of a model.",
    )
    parser.add_argument(
        "--init", action="store_true", help="Write the initial checkpoint of stage 1."
    )
    parser.add_argument(
        "--audio_encoder",
        help="With --init: a .pth file, a file of ltu_as.pretrain_tltr, one of our folders of an "
        "audio encoder, a released vicuna folder, or the folder or hub id of any audio model of "
        "transformers (Whisper, AST, wav2vec2, CLAP, ...). Without it the audio encoder is random.",
    )
    parser.add_argument(
        "--num_audio_tokens",
        type=int,
        help=f"Audio tokens of a chunk ({DEFAULT_NUM_AUDIO_TOKENS}), of CAV-MAE, YAMNet or an "
        "audio encoder of transformers.",
    )
    parser.add_argument(
        "--chunk_seconds",
        type=float,
        help="Length of a chunk, for an audio encoder of transformers "
        f"({DEFAULT_CHUNK_SECONDS:g}).",
    )
    parser.add_argument(
        "--encoder_layers",
        metavar="last|mean|N",
        help="The hidden states of an audio encoder of transformers that are used: its output "
        "(last), the mean of all layers, or layer N.",
    )
    parser.add_argument(
        "--model",
        help="A checkpoint folder of ours, for --to_original, --merge or --merged_llm_dir.",
    )
    parser.add_argument(
        "--to_original",
        metavar="FILE",
        help="Write the model as a file of the original, with the trainable parameters only.",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="Write the model with its language model, LoRA merged in.",
    )
    parser.add_argument(
        "--merged_llm_dir",
        metavar="DIR",
        help="Write the language model alone, LoRA merged in, as a stock folder with tokenizer.",
    )
    parser.add_argument(
        "--lora_alpha", type=int, help="Alpha of LoRA, which original files lack (16)."
    )
    parser.add_argument(
        "--lora_dropout",
        type=float,
        help="Dropout of LoRA, which original files lack (0.05).",
    )
    parser.add_argument(
        "--llm_dtype",
        choices=("float32", "float16", "bfloat16"),
        help="Dtype of a language model that is written.",
    )
    parser.add_argument(
        "--prompt_template",
        default=PROMPT_TEMPLATE,
        help=f"With --init: {PROMPT_TEMPLATE}, a JSON file, or chat.",
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="Seed of the weights that are initialized at random."
    )
    parser.add_argument("--output_dir", help="The checkpoint folder to write.")
    converter_class.add_flags(parser)
    args = parser.parse_args(argv)
    if not _is_consistent(args):
        parser.error(USAGE)
    if args.model:
        for field in settings_of(converter_class):
            if getattr(args, field.name) != field.default:
                parser.error(
                    f"--{field.name} is for --checkpoint and --init; {args.model} has its own."
                )
    flag = "merged_llm_dir" if args.merged_llm_dir else "output_dir"
    output = getattr(args, flag)
    for source in (args.llm, args.checkpoint, args.audio_encoder, args.model):
        if source and output and Path(source).resolve() == Path(output).resolve():
            parser.error(f"--{flag} {output} is also an input. Name another folder.")
    return args


def _is_consistent(args: argparse.Namespace) -> bool:
    """Return whether the flags name exactly one conversion, with the paths that it needs."""
    commands = [args.checkpoint, args.init, args.to_original, args.merge, args.merged_llm_dir]
    if sum(bool(command) for command in commands) != 1:
        return False
    # A model of ours is an input of three conversions; the other two need a language model.
    reads_our_model = bool(args.to_original or args.merge or args.merged_llm_dir)
    if bool(args.model) != reads_our_model or not (reads_our_model or args.llm):
        return False
    names_output = bool(args.to_original or args.merged_llm_dir)
    if bool(args.output_dir) == names_output or (args.llm and args.to_original):
        return False
    has_init_flags = args.audio_encoder or args.prompt_template != PROMPT_TEMPLATE
    has_init_flags = has_init_flags or bool(_encoder_settings(args).given())
    if has_init_flags and not args.init:
        return False
    if args.llm_dtype and not (args.checkpoint or args.merge or args.merged_llm_dir):
        return False
    has_lora_flags = args.lora_alpha is not None or args.lora_dropout is not None
    return not has_lora_flags or bool(args.checkpoint)


def _encoder_settings(args: argparse.Namespace) -> EncoderSettings:
    return EncoderSettings(args.num_audio_tokens, args.chunk_seconds, args.encoder_layers)


def main(argv: list[str] | None = None, converter_class: type[LtuConverter] = LtuConverter) -> None:
    args = parse_args(argv, converter_class)
    settings = {field.name: getattr(args, field.name) for field in settings_of(converter_class)}
    converter = converter_class(**settings)
    torch.manual_seed(args.seed)
    if args.to_original:
        converter.export_original(args.model, args.to_original)
    elif args.merge:
        converter.merge(args.model, args.output_dir, args.llm, args.llm_dtype)
    elif args.merged_llm_dir:
        converter.merge_llm(args.model, args.merged_llm_dir, args.llm, args.llm_dtype)
    elif args.init:
        converter.make_initial_checkpoint(
            args.llm,
            args.output_dir,
            args.audio_encoder,
            args.prompt_template,
            _encoder_settings(args),
        )
    else:
        lora = {"lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
        lora = {name: value for name, value in lora.items() if value is not None}
        converter.convert_original(
            args.checkpoint, args.llm, args.output_dir, llm_dtype=args.llm_dtype, **lora
        )


if __name__ == "__main__":
    run_command(main)
