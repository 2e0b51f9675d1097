"""Checks every example of a dataset file, and every clip once.

    python -m data.validate --data_path A.json --audio_root DIR [--output_path report.json]
    python -m data.validate --data_path A.json --no_audio

An example must be valid for training (`ltu.data.check_examples`) and must not be repeated. Keys
that examples lack are counted.

A clip must exist, and its header must say that it is 25 ms to an hour long. Sampling rates other
than 16 kHz are only counted, since clips are resampled when they are loaded. --decode decodes every
clip as training does; --downmix is then that of the model.

A file that ends before the length that its header promises is used as it is, and is no error. Such
clips are counted and named. Without --decode this is known of wav, aiff, w64 and au only.

A clip counts as one of the dataset of its first example. The dataset file is read twice, in
constant memory.

The exit code is 1 if more than `--max_bad` examples or clips are wrong, or if the file contains no
examples.
"""

import io
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import soundfile

from data.command_line import add_audio_root, command_parser, source_of
from data.duplicate_detection import DuplicateDetector, first_clips
from ltu.data.audio import (
    MAX_SECONDS,
    MIN_SAMPLES,
    SAMPLING_RATE,
    AudioError,
    Downmix,
    decode_audio,
    describe_cut,
    read_expected_seconds,
)
from ltu.data.check_examples import (
    NO_AUDIO,
    add_ignored_keys,
    parse_ignored_keys,
    what_is_wrong,
)
from ltu.data.columns import ColumnFlags, read_column_flags
from ltu.data.dataset_io import stream_examples
from ltu.data.dataset_source import DatasetSource
from ltu.data.table_clip import TableClip, TableClipError, find_content
from ltu.files import run_command, write_json

SHOWN = 10  # Errors of each kind that are listed.
CLIPS_AT_ONCE = 4096
# Consecutive clips of a Parquet file are in the same row group, which a thread reads once.
CLIPS_OF_A_THREAD = 64
# Keys that an example may lack.
OPTIONAL_KEYS = ("input", "dataset", "task")


@dataclass
class Findings:
    """Counts of errors by kind, and the first few of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, message: str) -> None:
        """Count an error and list it if it is one of the first."""
        self.counts[kind] += 1
        if len(self.first[kind]) < SHOWN:
            self.first[kind].append(message)


def check_examples(
    source: DatasetSource,
    folder: str,
    findings: Findings,
    columns: ColumnFlags,
    ignored_keys: Collection[str] = (),
) -> tuple[int, Counter[str], np.ndarray]:
    """Check every example of a dataset.

    Args:
        source: the dataset.
        folder: for the temporary files.
        findings: the errors are added to them.
        columns: of the dataset.
        ignored_keys: further keys that examples may have.

    Returns:
        the number of examples; the number of examples that lack each key; and the number of the
        first example of each clip, from 0, (clips,) in ascending order.
    """
    # Check each example, and collect what must be compared with all others.
    clips = DuplicateDetector(folder, "clips")
    contents = DuplicateDetector(folder, "examples")
    missing_keys: Counter[str] = Counter()
    count = 0
    for number, example in enumerate(stream_examples(source, columns)):
        count += 1
        reason = what_is_wrong(example, True, ignored_keys)
        if reason:
            findings.add("example", f"example {number + 1}: {reason}")
        missing_keys.update(key for key in OPTIONAL_KEYS if key not in example)
        audio_id = example.get("audio_id")
        content = (
            example.get("instruction"),
            example.get("input"),
            audio_id,
            example.get("output"),
        )
        contents.add(str(content), number)
        if isinstance(audio_id, str) and audio_id not in NO_AUDIO:
            clips.add(audio_id, number)
    # Find examples with the same texts and clip.
    for _, repeated in contents.parts():
        for number in repeated.tolist():
            findings.add("duplicate", f"example {number + 1}: the same as an earlier one")
    return count, missing_keys, clips.firsts()


@dataclass
class ClipFacts:
    """What is known about a clip that can be used.

    Attributes:
        rate: sampling rate in Hz.
        seconds: its length.
        expected_seconds: length that its header promises; None if it does not say.
    """

    rate: int
    seconds: float
    expected_seconds: float | None = None


def read_header(path: Path) -> ClipFacts:
    """Return what the header of a clip says.

    Raises:
        AudioError: the clip does not exist, or training would refuse it.
    """
    content: bytes | Path = path
    if TableClip.parse(path) is not None:
        try:
            content = find_content(path)
        except TableClipError as error:
            raise AudioError(str(path), error.reason, str(error)) from error
    is_stored = isinstance(content, bytes)
    if not is_stored and not content.is_file():
        raise AudioError(str(path), "missing", "no such file")
    try:
        header = soundfile.info(io.BytesIO(content) if is_stored else str(content))
    except soundfile.SoundFileError as error:
        raise AudioError(str(path), "unreadable", "libsndfile cannot open it") from error
    if not MIN_SAMPLES / SAMPLING_RATE <= header.duration <= MAX_SECONDS:
        reason = "too_long" if header.duration > MAX_SECONDS else "too_short"
        raise AudioError(str(path), reason, f"{header.duration:.3f} s long")
    expected_seconds = read_expected_seconds(content, header.duration)
    return ClipFacts(header.samplerate, header.duration, expected_seconds)


def decode_clip(path: Path, downmix: Downmix = "first") -> ClipFacts:
    """Return what is known about a clip after decoding all of it.

    Raises:
        AudioError: training would refuse the clip.
    """
    clip = decode_audio(path, downmix=downmix)
    return ClipFacts(clip.sampling_rate, clip.seconds, clip.expected_seconds)


def check_clips(
    clips: Iterator[tuple[str, str]],
    root: Path,
    check: Callable[[Path], ClipFacts],
    findings: Findings,
) -> dict[str, Any]:
    """Check clips in several threads.

    Args:
        clips: (audio_id, dataset) of each.
        root: folder of relative `audio_id`s.
        check: path -> facts; raises `AudioError`.
        findings: the errors are added to them.

    Returns:
        coverage by dataset, number of clips by sampling rate, hours of audio, and the number of
        clips that are cut short, with the first of them.
    """

    def check_clip(clip: tuple[str, str]) -> ClipFacts | AudioError:
        audio_id, _ = clip
        try:
            return check(root / audio_id)
        except AudioError as error:
            return error

    def check_part(part: list[tuple[str, str]]) -> list[ClipFacts | AudioError]:
        return [check_clip(clip) for clip in part]

    total: Counter[str] = Counter()
    usable: Counter[str] = Counter()
    rates: Counter[str] = Counter()
    seconds = 0.0
    num_cut = 0
    first_cut = []
    with ThreadPoolExecutor() as pool:
        while block := list(islice(clips, CLIPS_AT_ONCE)):
            starts = range(0, len(block), CLIPS_OF_A_THREAD)
            parts = [block[start : start + CLIPS_OF_A_THREAD] for start in starts]
            results = chain.from_iterable(pool.map(check_part, parts))
            for (audio_id, dataset), result in zip(block, results, strict=True):
                total[dataset] += 1
                if isinstance(result, AudioError):
                    findings.add(f"clip {result.reason}", str(result))
                    continue
                usable[dataset] += 1
                rates[f"{result.rate} Hz"] += 1
                seconds += result.seconds
                cut = describe_cut(result.seconds, result.expected_seconds)
                if cut is not None:
                    num_cut += 1
                    if len(first_cut) < SHOWN:
                        first_cut.append(f"{audio_id} {cut}")
    coverage = {}
    for dataset, number in total.most_common():
        coverage[dataset] = {"clips": number, "usable": usable[dataset]}
    return {
        "coverage": coverage,
        "sampling_rates": dict(rates),
        "hours": round(seconds / 3600, 2),
        "cut_short": num_cut,
        "first_cut_short": first_cut,
    }


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__, output_path=None)
    parser.add_argument("--output_path", type=Path, help="The report to write, as JSON.")
    add_audio_root(parser)
    parser.add_argument("--no_audio", action="store_true", help="Check the examples only.")
    parser.add_argument(
        "--allow_duplicates",
        action="store_true",
        help="Accept repeated examples; recipes repeat some datasets on purpose.",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="Decode every clip as training does (default: read its header).",
    )
    parser.add_argument(
        "--downmix",
        choices=get_args(Downmix),
        default="first",
        help="How --decode makes one channel of several: the first, as LTU, or the mean of all, as "
        "LTU-AS (default: first).",
    )
    parser.add_argument(
        "--max_bad", type=int, default=0, help="The number of examples and clips that may be wrong."
    )
    add_ignored_keys(parser)
    args = parser.parse_args(argv)
    ignored_keys = parse_ignored_keys(args.ignored_keys)
    columns = read_column_flags(args)
    source = source_of(args)
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        count, missing_keys, firsts = check_examples(
            source, folder, findings, columns, ignored_keys
        )
    if not count:
        raise ValueError(f"{source.name} contains no examples. Training refuses such a file.")
    report: dict[str, Any] = {
        "num_examples": count,
        "clips": len(firsts),
        "missing_keys": dict(missing_keys),
    }
    if not args.no_audio:
        root = args.audio_root or source.root
        check = partial(decode_clip, downmix=args.downmix) if args.decode else read_header
        report |= check_clips(first_clips(source, firsts, columns), root, check, findings)
    report |= {"wrong": dict(findings.counts), "first_errors": dict(findings.first)}
    print(json.dumps(report, indent=1))
    if args.output_path:
        write_json(report, args.output_path)
    num_allowed = findings.counts["duplicate"] if args.allow_duplicates else 0
    return int(findings.counts.total() - num_allowed > args.max_bad)


if __name__ == "__main__":
    run_command(main)
