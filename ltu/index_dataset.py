"""Writes an Arrow index of a dataset file, which training maps into memory.

python -m ltu.index_dataset all.json --base_model DIR        writes all.json.arrow
python -m ltu.index_dataset esc50 --split train --base_model DIR     writes esc50/train.arrow
"""

import argparse
from pathlib import Path

from transformers import AutoProcessor

from ltu.data.check_examples import add_ignored_keys, parse_ignored_keys
from ltu.data.columns import add_column_flags, read_column_flags
from ltu.files import run_command
from ltu.models.audio_front_end import add_front_end_flags, read_front_end_flags
from ltu.models.locate_checkpoint import CHECKPOINT_FILES, find_checkpoint
from ltu.training.dataset_index import IndexedExamples, build_index


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "data_path",
        type=Path,
        help="The dataset: a JSON list, JSON lines, Parquet, a folder of datasets' save_to_disk, a "
        "folder of Parquet files, or a data set of the hub (owner/name).",
    )
    parser.add_argument(
        "--base_model",
        required=True,
        help="The checkpoint folder that is to be trained, which has the tokenizer.",
    )
    parser.add_argument(
        "--output_path",
        type=Path,
        help="The index. The default is FILE.arrow, where training looks for it.",
    )
    parser.add_argument(
        "--audio_root",
        help="The folder to which audio_ids are relative. The default is the folder of the "
        "dataset file.",
    )
    parser.add_argument(
        "--max_bad",
        type=int,
        default=0,
        help="The number of clips that may fail to be transcribed, for models with transcripts.",
    )
    add_ignored_keys(parser)
    add_column_flags(parser)
    add_front_end_flags(parser)
    args = parser.parse_args(argv)

    ignored_keys = parse_ignored_keys(args.ignored_keys)
    columns = read_column_flags(args)
    processor = AutoProcessor.from_pretrained(find_checkpoint(args.base_model, CHECKPOINT_FILES))
    processor.front_end.configure(**read_front_end_flags(args))
    index = build_index(
        args.data_path,
        processor,
        args.output_path,
        args.audio_root,
        args.max_bad,
        ignored_keys,
        columns,
    )
    examples = IndexedExamples(index)
    for line in examples.about["described"]:
        print(line)
    num_tokens = examples.num_tokens.float()  # (examples,)
    print(
        f"{index}: {len(examples)} examples, {num_tokens.mean():.1f} text tokens on average, "
        f"{int(num_tokens.max())} at most"
    )


if __name__ == "__main__":
    run_command(main)
