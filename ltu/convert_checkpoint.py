"""Released files and small parts -> one of our checkpoint folders, every key accounted for; and back.

    python -m ltu.convert_checkpoint --llm DIR_OR_ID --checkpoint FILE_OR_DIR --output_dir DIR
    python -m ltu.convert_checkpoint --init --llm DIR_OR_ID --audio_encoder FILE_OR_DIR --output_dir DIR
    python -m ltu.convert_checkpoint --model DIR --to_original FILE.bin
    python -m ltu.convert_checkpoint --model DIR --merge --output_dir DIR

The first opens an original file, trainable parameters alone or a whole model (then `--llm` gives config and tokenizer,
and the new folder holds the language model). The second writes what stage 1 starts from, the third a file as the
original's Trainer would have, the fourth a folder that needs no other.

Notable:
- Each key of a file is placed, renamed, or dropped by a rule with a reason; one left over or missing is an error.
- Pickles are opened with `weights_only=True` alone. Of a language model that is not copied, only the embeddings are
  read, for `--init`.
- A file without an ear gives a random one, and says so loudly.
"""

import argparse
from pathlib import Path

from safetensors import SafetensorError

from ltu.checkpoints.convert import LtuKind, convert
from ltu.files import run_command


def parse_args(argv: list[str] | None, kind: LtuKind) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--llm", help="folder or hub id of the language model that the checkpoint was trained with"
    )
    parser.add_argument(
        "--checkpoint", help="an original file (.bin), or a folder with all of a model's"
    )
    parser.add_argument(
        "--init", action="store_true", help="write the folder that stage 1 starts from"
    )
    parser.add_argument(
        "--audio_encoder",
        help="with --init: a .pth, a folder with an ear of ours, or a released vicuna folder; none: random",
    )
    parser.add_argument("--model", help="a checkpoint folder of ours, for --to_original or --merge")
    parser.add_argument(
        "--to_original", metavar="FILE", help="write it as the original's trainable-only file"
    )
    parser.add_argument(
        "--merge", action="store_true", help="write it with its language model, LoRA merged in"
    )
    parser.add_argument("--lora_alpha", type=int, default=16, help="not stored in original files")
    parser.add_argument(
        "--lora_dropout", type=float, default=0.05, help="not stored in original files"
    )
    parser.add_argument(
        "--llm_dtype", choices=("float32", "float16", "bfloat16"), help="of an LLM that is written"
    )
    parser.add_argument(
        "--prompt_template", default="alpaca_short", help="of --init: that, a JSON file, or chat"
    )
    parser.add_argument("--seed", type=int, default=42, help="of random parts")
    parser.add_argument("--output_dir")
    kind.add_flags(parser)
    args = parser.parse_args(argv)
    commands = [bool(flag) for flag in (args.checkpoint, args.init, args.to_original, args.merge)]
    out, in_folder = any(commands[2:]), args.checkpoint or args.merge
    fits = (
        bool(args.model) == out
        and (out or args.llm)
        and bool(args.output_dir) != bool(args.to_original)
    )
    is_new = args.audio_encoder or args.prompt_template != "alpaca_short"
    if (
        sum(commands) != 1
        or not fits
        or (is_new and not args.init)
        or (args.llm_dtype and not in_folder)
    ):
        parser.error(
            "give --llm and --output_dir with --checkpoint or --init (and its --audio_encoder, --prompt_template); --model "
            "with --to_original; or --model and --output_dir with --merge. --llm_dtype is for --checkpoint and --merge"
        )
    for source in (args.llm, args.checkpoint, args.audio_encoder, args.model):
        if source and args.output_dir and Path(source).resolve() == Path(args.output_dir).resolve():
            parser.error(f"--output_dir {args.output_dir} is what is read. Name another folder.")
    return args


def main(argv: list[str] | None = None, kind: LtuKind | None = None) -> None:
    kind = kind or LtuKind()
    convert(parse_args(argv, kind), kind)


if __name__ == "__main__":
    run_command(main, KeyError, SafetensorError)
