"""Write an Arrow index of a dataset file, which training maps into memory.

python -m ltu.index_dataset all.json --base_model DIR        writes all.json.arrow, which training then opens
"""

import argparse
from pathlib import Path

from transformers import AutoProcessor

from ltu.files import run_command
from ltu.models.checkpoint_folder import CHECKPOINT_FILES, find_checkpoint
from ltu.models.processing_ltu import WHISPER_FLAGS
from ltu.training.dataset_index import IndexedRows, build_index


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data_path", type=Path, help="rows: JSON list, JSON lines or Parquet")
    parser.add_argument(
        "--base_model", required=True, help="checkpoint folder that is to be trained: its tokenizer"
    )
    parser.add_argument(
        "--output_path", type=Path, help="default: FILE.arrow, where training looks for it"
    )
    parser.add_argument(
        "--audio_root", help="folder of relative audio_ids (default: that of the data file)"
    )
    for name in WHISPER_FLAGS:
        parser.add_argument(f"--{name}", help="LTU-AS: as in training")
    args = parser.parse_args(argv)
    processor = AutoProcessor.from_pretrained(find_checkpoint(args.base_model, CHECKPOINT_FILES))
    processor.use(**{name: getattr(args, name) for name in WHISPER_FLAGS})
    rows = IndexedRows(build_index(args.data_path, processor, args.output_path, args.audio_root))
    ids = rows.num_tokens.float()
    print(
        f"{rows.path}: {len(rows)} rows, {ids.mean():.1f} text ids on average, {int(ids.max())} at most"
    )


if __name__ == "__main__":
    run_command(main)
