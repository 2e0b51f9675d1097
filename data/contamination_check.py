"""Find clips of an evaluation set in training data: by id, and by content.

    python -m data.contamination_check --data_path train.json --against esc50.json vocalsound.json
    python -m data.contamination_check --data_path train.json --audio_root DIR --against esc50.json --eval_root DIR2 --content

Notable:
- Ids are the names of files without folders and endings; a YouTube id counts with or without what stands around it.
  Any other name that several clips of one evaluation file have is no id (VoxCeleb numbers the clips of each video):
  those are counted, and compared by --content only.
- --content compares what is heard: sha256 of the mono 16 kHz waveform in 16 bit, so another name, container or lossless
  format hides nothing. Every clip is decoded once. Clips that cannot be read are counted, not guessed.
- Memory grows with the evaluation sets and what is found, not with the training rows. --clean_path writes those rows
  without what was found.

Exits with 1 when anything was found, or a clip could not be read.
"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from data.audio_ids import NO_AUDIO, stem, youtube
from data.command_line import command_parser
from data.duplicate_detection import Distinct
from data.provenance import audio_root_of, write_provenance, write_rows
from data.validate import CLIPS_AT_ONCE, SHOWN, first_clips
from ltu.data.dataset_files import stream_rows
from ltu.files import run_command


def id_of(audio_id: str) -> str:
    """What clips are compared by."""
    return youtube(audio_id) or stem(audio_id)


def hash_content(path: str) -> str | None:
    """sha256 of the waveform as 16-bit samples; None if it cannot be heard."""
    import numpy as np

    from ltu.data.audio import AudioError, load_audio

    try:
        waveform = load_audio(path)  # (samples,)
    except AudioError:
        return None
    return hashlib.sha256(
        np.round(waveform * 32768).clip(-32768, 32767).astype("<i2").tobytes()
    ).hexdigest()


def hash_clips(names: Iterable[str], root: Path, workers: int) -> Iterator[tuple[str, str | None]]:
    """(audio_id, hash) of clips."""
    names = iter(names)
    with ProcessPoolExecutor(workers) as pool:
        while block := list(islice(names, CLIPS_AT_ONCE)):
            paths = [str(root / name) for name in block]
            yield from zip(block, pool.map(hash_content, paths, chunksize=16), strict=True)


def clips_of(path: Path) -> Iterator[str]:
    """Every `audio_id` of a file once."""
    with tempfile.TemporaryDirectory() as folder:
        clips = Distinct(folder)
        for number, row in enumerate(stream_rows(path)):
            if row.get("audio_id") not in NO_AUDIO:
                clips.add(row["audio_id"], number)
        firsts = clips.firsts()
    return (audio_id for audio_id, _ in first_clips(path, firsts))


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__, None)
    parser.add_argument(
        "--against", required=True, nargs="+", type=Path, help="files of evaluation questions"
    )
    parser.add_argument(
        "--audio_root",
        type=Path,
        help="folder of the training clips (default: that of the data file)",
    )
    parser.add_argument(
        "--eval_root", type=Path, help="folder of the evaluation clips (default: that of each file)"
    )
    parser.add_argument("--content", action="store_true", help="decode and compare the clips too")
    parser.add_argument(
        "--clean_path", type=Path, help="training rows without the clips that were found"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    names, contents, unread, not_read = (
        {},
        {},
        0,
        [],
    )  # Of clips that cannot be heard, the first few by name.
    for path in args.against:
        clips = list(
            dict.fromkeys(
                row["audio_id"] for row in stream_rows(path) if row.get("audio_id") not in NO_AUDIO
            )
        )
        times = Counter(id_of(clip) for clip in clips if not youtube(clip))
        names |= {id_of(clip): f"{path.name}: {clip}" for clip in clips if times[id_of(clip)] <= 1}
        if shared := [clip for clip in clips if times[id_of(clip)] > 1]:
            print(
                f"{path}: {len(shared):,} clips have no name of their own, such as {shared[0]}; use --content"
            )
        for clip, digest in (
            hash_clips(clips, args.eval_root or path.parent, args.workers) if args.content else ()
        ):
            contents[digest] = f"{path.name}: {clip}"
            if digest is None:
                unread, not_read = unread + 1, [*not_read, f"{path.name}: {clip}"][:SHOWN]
    contents.pop(None, None)
    copies: dict[str, str] = {}
    if args.content:
        root = args.audio_root or args.data_path.parent
        for clip, digest in hash_clips(clips_of(args.data_path), root, args.workers):
            if digest is None:
                unread, not_read = unread + 1, [*not_read, clip][:SHOWN]
            elif digest in contents:
                copies[clip] = contents[digest]
    found, rows, leaked = {}, 0, 0
    for row in stream_rows(args.data_path):
        rows, clip = rows + 1, row.get("audio_id")
        if clip not in NO_AUDIO and (clip in copies or id_of(clip) in names):
            leaked += 1
            found[clip] = (
                f"content of {copies[clip]}" if clip in copies else f"id of {names[id_of(clip)]}"
            )
    print(
        f"{args.data_path}: {leaked:,} of {rows:,} rows are on {len(found):,} clips of the evaluation sets"
    )
    for clip in sorted(found)[:SHOWN]:
        print(f"  {clip}: {found[clip]}")
    if unread:
        print(f"  {unread:,} clips cannot be heard: {', '.join(not_read)}")
    if args.clean_path:
        with write_rows(args.clean_path, [args.data_path, *args.against]) as output:
            for row in stream_rows(args.data_path):
                if row.get("audio_id") not in found:
                    output.write(row)
        facts = {"content": args.content, "rows": output.count, "removed": leaked}
        facts |= audio_root_of(args.clean_path, [args.data_path], args.audio_root)
        write_provenance(args.clean_path, "leak_check", [args.data_path, *args.against], **facts)
    return int(bool(found or unread))


if __name__ == "__main__":
    run_command(main)
