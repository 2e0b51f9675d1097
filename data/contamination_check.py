r"""Finds clips of evaluation sets in training data, by id and by content.

    python -m data.contamination_check --data_path train.json \
        --eval_files esc50.json vocalsound.json
    python -m data.contamination_check --data_path train.json --audio_root DIR \
        --eval_files esc50.json --eval_root DIR2 --content

Ids are file names without folder and suffix; of the name of a YouTube clip, only the YouTube id
counts. Any other name that several clips of one evaluation file have is not an id (VoxCeleb numbers
the clips of each video): such clips are compared with --content only.

--content compares the sha256 of the mono 16 kHz waveform in 16 bit, so that another name, container
or lossless format hides nothing. Every clip is decoded once. Clips that cannot be decoded are
counted.

The memory grows with the evaluation sets and the number of clips that are found, not with the
number of training examples. --clean_path writes the examples without those on clips that were
found.

The exit code is 1 if a clip was found, cannot be decoded or, without --content, was not compared
because its name is not unique.
"""

import argparse
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from data.audio_ids import stem, youtube
from data.command_line import add_audio_root, add_workers, command_parser, source_of
from data.duplicate_detection import DuplicateDetector, first_clips
from data.embedded_clips import add_embed_flags, make_embedder, reader_of, resolve_ids
from data.provenance import clip_facts, write_examples, write_provenance
from data.worker_pool import decoding_pool
from ltu.data.audio import AudioError, load_audio
from ltu.data.check_examples import NO_AUDIO
from ltu.data.columns import ColumnFlags, read_column_flags
from ltu.data.dataset_io import typed_examples
from ltu.data.dataset_source import DatasetSource, find_dataset
from ltu.data.table_clip import TableClip
from ltu.files import run_command

CLIPS_AT_ONCE = 4096  # Clips that are given to the workers at once.
SHOWN = 10  # Clips that are listed.


def id_of(audio_id: str) -> str | None:
    """Return the clip id that clips are compared by; None for a clip of a table, which has none."""
    if TableClip.parse(audio_id) is not None:
        return None
    return youtube(audio_id) or stem(audio_id)


def hash_content(path: str) -> str | None:
    """Return the sha256 of the waveform as 16-bit samples, or None if it cannot be decoded."""
    try:
        waveform = load_audio(path)  # (samples,)
    except AudioError:
        return None
    samples = np.round(waveform * 32768).clip(-32768, 32767).astype("<i2")  # (samples,)
    return hashlib.sha256(samples.tobytes()).hexdigest()


def hash_clips(names: Iterable[str], root: Path, workers: int) -> Iterator[tuple[str, str | None]]:
    """Yield (audio_id, hash) of clips, in several processes."""
    names = iter(names)
    with decoding_pool(workers) as pool:
        while block := list(islice(names, CLIPS_AT_ONCE)):
            paths = [str(root / name) for name in block]
            yield from zip(block, pool.map(hash_content, paths, chunksize=16), strict=True)


def clips_of(source: DatasetSource, columns: ColumnFlags) -> Iterator[str]:
    """Return every `audio_id` of a dataset once, in constant memory."""
    with tempfile.TemporaryDirectory() as folder:
        clips = DuplicateDetector(folder)
        for number, example in enumerate(typed_examples(source, columns)):
            if example.get("audio_id") not in NO_AUDIO:
                clips.add(example["audio_id"], number)
        firsts = clips.firsts()
    return (audio_id for audio_id, _ in first_clips(source, firsts, columns))


@dataclass
class EvalClips:
    """The clips of the evaluation files, by what they are compared by.

    Attributes:
        by_id: clip id -> description of the clip.
        by_content: hash of the waveform -> description of the clip.
        num_not_compared: number of clips that have no unique name and were not decoded.
    """

    by_id: dict[str, str] = field(default_factory=dict)
    by_content: dict[str, str] = field(default_factory=dict)
    num_not_compared: int = 0


@dataclass
class Unreadable:
    """Number of clips that cannot be decoded, and the first few by name."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < SHOWN:
            self.names.append(name)


def read_eval_clips(
    sources: list[DatasetSource],
    root: Path | None,
    has_content: bool,
    workers: int,
    unreadable: Unreadable,
) -> EvalClips:
    """Read the clips of the evaluation sets.

    Args:
        sources: the evaluation sets.
        root: folder of their clips (None: the folder of each file).
        has_content: whether to decode the clips, so that they can be compared by content.
        workers: number of processes that decode.
        unreadable: clips that cannot be decoded are added to it.
    """
    eval_clips = EvalClips()
    for source in sources:
        name = source.path.name
        clips: dict[str, None] = {}  # An ordered set.
        for example in typed_examples(source):
            if example.get("audio_id") not in NO_AUDIO:
                clips[example["audio_id"]] = None

        # A name that several clips of a file have is not an id, unless it is a YouTube id.
        times = Counter(id_of(clip) for clip in clips if not youtube(clip))
        ambiguous = []
        for clip in clips:
            if id_of(clip) is None or times[id_of(clip)] > 1:
                ambiguous.append(clip)
            else:
                eval_clips.by_id[id_of(clip)] = f"{name}: {clip}"
        if ambiguous and not has_content:
            eval_clips.num_not_compared += len(ambiguous)
            print(
                f"{source.name}: {len(ambiguous):,} clips were not compared, because they have no "
                f"unique name, such as {ambiguous[0]}. Use --content."
            )

        if has_content:
            for clip, digest in hash_clips(clips, root or source.root, workers):
                if digest is None:
                    unreadable.add(f"{name}: {clip}")
                else:
                    eval_clips.by_content[digest] = f"{name}: {clip}"
    return eval_clips


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, output_path=None)
    parser.add_argument(
        "--eval_files",
        required=True,
        nargs="+",
        type=Path,
        help="The evaluation sets to compare with, each as --data_path; only their clips are read.",
    )
    add_audio_root(parser)
    parser.add_argument(
        "--eval_root",
        type=Path,
        help="Folder of the evaluation clips (default: the folder of each evaluation file).",
    )
    parser.add_argument(
        "--content", action="store_true", help="Also decode the clips and compare their content."
    )
    parser.add_argument(
        "--clean_path",
        type=Path,
        help="A dataset file for the training examples without the clips that were found.",
    )
    add_workers(parser)
    add_embed_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    columns = read_column_flags(args)
    source = source_of(args)
    eval_sources = [find_dataset(path) for path in args.eval_files]
    embedder = make_embedder(args, [source])
    unreadable = Unreadable()
    eval_clips = read_eval_clips(
        eval_sources, args.eval_root, args.content, args.workers, unreadable
    )

    # Compare by content: decode every training clip once.
    copies: dict[str, str] = {}  # Training clip -> description of the evaluation clip.
    if args.content:
        root = args.audio_root or source.root
        for clip, digest in hash_clips(clips_of(source, columns), root, args.workers):
            if digest is None:
                unreadable.add(clip)
            elif digest in eval_clips.by_content:
                copies[clip] = eval_clips.by_content[digest]

    # Count the examples on clips that were found by content or by id.
    found: dict[str, str] = {}
    num_examples = 0
    num_contaminated = 0
    not_compared: set[str] = set()  # Clips of tables, if they are not decoded.
    for example in typed_examples(source, columns):
        num_examples += 1
        clip = example.get("audio_id")
        if clip in NO_AUDIO:
            continue
        if clip in copies:
            found[clip] = f"content of {copies[clip]}"
        elif id_of(clip) is None:
            if not args.content:
                not_compared.add(clip)
            continue
        elif id_of(clip) in eval_clips.by_id:
            found[clip] = f"id of {eval_clips.by_id[id_of(clip)]}"
        else:
            continue
        num_contaminated += 1
    print(
        f"{source.name}: {num_contaminated:,} of {num_examples:,} examples are on "
        f"{len(found):,} clips of the evaluation sets"
    )
    for clip in sorted(found)[:SHOWN]:
        print(f"  {clip}: {found[clip]}")
    if not_compared:
        print(
            f"  {len(not_compared):,} clips were not compared, because clips of a table have no "
            "names. Use --content."
        )
    if unreadable.count:
        print(f"  {unreadable.count:,} clips cannot be decoded: {', '.join(unreadable.names)}")

    if args.clean_path:
        inputs = [source, *eval_sources]
        with write_examples(args.clean_path, inputs, reader_of(embedder)) as output:
            examples = typed_examples(source, columns)
            clean = (example for example in examples if example.get("audio_id") not in found)
            for example in resolve_ids(embedder, clean, source):
                output.write(example)
        facts = {"content": args.content, "num_examples": output.count, "removed": num_contaminated}
        facts |= clip_facts(args, args.clean_path, [source], columns)
        write_provenance(args.clean_path, "contamination_check", inputs, **facts)
    num_not_compared = eval_clips.num_not_compared + len(not_compared)
    return int(bool(found or unreadable.count or num_not_compared))


if __name__ == "__main__":
    run_command(main)
