"""Take a few clips with all their questions: a toy set of a large one.

    python -m data.sample --data_path A.json --output_path toy/rows.json --clips 500 --seed 1
    python -m data.sample --data_path A.json --output_path toy/rows.json --clips 50 --by_dataset --copy_audio

Notable:
- Whether a clip is taken depends on its audio_id and the seed, not on the order of the rows: two files of the same
  clips give the same clips. Every clip is equally likely, however many questions it has.
- --copy_audio puts the clips into audio/ beside the output, and the rows then name them relative to it.
"""

import filecmp
import hashlib
import os
import shutil
from collections import defaultdict
from pathlib import Path

from data.audio_ids import NO_AUDIO
from data.command_line import command_parser
from data.provenance import audio_root_of, write_provenance, write_rows
from ltu.data.dataset_files import stream_rows
from ltu.files import run_command


def choose_clips(path: Path, clips: int, seed: int, by_dataset: bool) -> set[str]:
    """`audio_id`s: those with the lowest hashes, of all or of each dataset."""
    chosen: dict[str, dict[str, bytes]] = defaultdict(dict)
    highest: dict[str, bytes] = {}
    for row in stream_rows(path):
        audio_id = row.get("audio_id")
        if audio_id in NO_AUDIO:
            continue
        group = str(row.get("dataset")) if by_dataset else ""
        digest = hashlib.blake2b(
            f"{seed}/{audio_id}".encode("utf-8", "surrogatepass"), digest_size=16
        ).digest()
        if digest > highest.get(group, b"\xff" * 16):
            continue
        chosen[group][audio_id] = digest
        if len(chosen[group]) >= 2 * clips:
            kept = sorted(chosen[group].items(), key=lambda pair: pair[1])[:clips]
            chosen[group], highest[group] = dict(kept), kept[-1][1]
    return {
        name for group in chosen.values() for name in sorted(group, key=group.__getitem__)[:clips]
    }


def copy_clips(names: set[str], root: Path, folder: Path) -> dict[str, str]:
    """Copy clips into folder/audio -> their new `audio_id`s.

    Where another clip has its name, whose ever it is, one gets a part of a hash in front.
    """
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(names):
        target, hashed = folder / "audio" / Path(name).name, name.encode()
        while target.name in taken or (
            target.exists() and not filecmp.cmp(root / name, target, shallow=False)
        ):
            target = target.with_name(
                f"{hashlib.blake2b(hashed, digest_size=4).hexdigest()}_{Path(name).name}"
            )
            hashed += b"/"
        taken.add(target.name)
        places[name] = f"audio/{target.name}"
        if not target.exists():
            unfinished = target.with_name(f"{target.name}.tmp")
            shutil.copyfile(root / name, unfinished)
            os.replace(unfinished, target)
    return places


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--clips", type=int, required=True)
    parser.add_argument("--by_dataset", action="store_true", help="so many of each dataset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--audio_root",
        type=Path,
        help="folder of relative audio_ids (default: that of the data file)",
    )
    parser.add_argument("--copy_audio", action="store_true")
    args = parser.parse_args(argv)
    if args.clips < 1:
        parser.error("--clips must be 1 or more")
    chosen = choose_clips(args.data_path, args.clips, args.seed, args.by_dataset)
    root = args.audio_root or args.data_path.parent
    places = copy_clips(chosen, root, args.output_path.parent) if args.copy_audio else {}
    with write_rows(args.output_path, [args.data_path]) as output:
        for row in stream_rows(args.data_path):
            if row.get("audio_id") in chosen:
                output.write(row | {"audio_id": places.get(row["audio_id"], row["audio_id"])})
    settings = {
        "clips": len(chosen),
        "seed": args.seed,
        "by_dataset": args.by_dataset,
        "copied": args.copy_audio,
    }
    if not args.copy_audio:
        settings |= audio_root_of(args.output_path, [args.data_path], args.audio_root)
    write_provenance(args.output_path, "sample", [args.data_path], rows=output.count, **settings)
    print(f"{args.output_path}: {output.count:,} rows on {len(chosen):,} clips")
    return 0


if __name__ == "__main__":
    run_command(main)
