r"""Converts a folder of audio files into a folder of mono 16 kHz FLAC, and lists the clips.

    python -m data.prepare_audio --input DIR --output_dir OUT --workers 8
    python -m data.prepare_audio --input DIR --output_dir OUT --naming audioset \
        --clip_list balanced_train_segments.csv
    python -m data.prepare_audio --input DIR --output_dir OUT --table file_and_audio_id.csv

OUT/manifest.jsonl has a line for every source file: its `audio_id` (the path of its FLAC in OUT),
seconds, sampling rate and channels, or why it failed. OUT/audio_ids.csv has the `audio_id` of each
clip, next to its `id` as --clip_list spells it. With --clip_list, OUT/audio_ids.csv.provenance.json
contains the coverage: how many of the listed clips exist, and which are missing.

A clip is what `ltu.data.audio` decodes from a file at 16 kHz, or an error. It is the first channel,
or with `--downmix mean` the mean of all: LTU takes the former, LTU-AS the latter. A file that ends
before the length that its header promises is converted, named and counted. The level is not
changed. The FLAC has 16 bit, or 24 for clips so quiet that 16 would be coarse; samples beyond full
scale are clipped and counted.

A run can be killed at any time and started again. A FLAC is whole or does not exist, and what the
manifest lists as done from the same source (by size and time) is not repeated. What failed is tried
again. A file that kills its worker is recorded as such, and the other files are still converted.

--naming selects how the files are named: AudioSet, VGGSound and AudioCaps (YouTube id, with or
without Y in front and times behind), FSD50K, Clotho or ESC-50. Clips are then named by their ids.
--table has two columns, source file and audio_id, for any other folder. Without either, OUT has the
same folders and names as DIR.

The exit code is 1 if more than `--max_bad` files failed.
"""

import argparse
import csv
import errno
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import soundfile
from tqdm import tqdm

from data.audio_ids import RULES, SUFFIXES, audio_id_of, key_of, read_table, read_wanted, stem_of
from data.audio_manifest import AudioManifest, ManifestEntry
from data.command_line import add_workers, command_parser
from data.provenance import provenance_path, write_provenance
from data.worker_pool import decoding_pool
from ltu.data.audio import MAX_SECONDS, SAMPLING_RATE, AudioError, Downmix, decode_audio
from ltu.files import replace_file, run_command, sync_and_rename

# Peak of a clip (-48 dB of full scale) below which 16 bit would leave fewer than 8.
QUIET = 2.0**-8
# Largest peak that is accepted. Resampling exceeds full scale by less; a louder file is not scaled
# to a full scale of 1.
MAX_PEAK = 2.0
IDS = "audio_ids.csv"
JOBS_A_WORKER = 8  # Jobs in the queue, so that no worker idles.
SHOWN = 20  # Jobs or errors that are printed.

Job = tuple[str, str]  # Source file, relative to --input, and its audio_id.


def find_sources(folder: Path, leave_out: Path, other: Counter) -> Iterator[str]:
    """Yield the audio files below a folder, as paths relative to it.

    Args:
        folder: the folder.
        leave_out: a folder that is not searched: that of the output.
        other: counts the files that are not audio, by suffix.
    """
    visited = set()
    for root, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        root_stat = os.stat(root)
        identity = (root_stat.st_dev, root_stat.st_ino)
        # Links may make a loop.
        if identity in visited or Path(root).resolve() == leave_out:
            folders.clear()
            continue
        visited.add(identity)
        folders.sort()
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            # macOS writes files like ._clip.wav, which contain no audio.
            if suffix in SUFFIXES and not name.startswith("._"):
                yield Path(os.path.relpath(os.path.join(root, name), folder)).as_posix()
            else:
                other[suffix or name] += 1


def _raise(error: OSError) -> None:
    raise error


def _printable(text: str) -> str:
    """Escape what is not UTF-8 in the names of files, so that the text can be printed."""
    return text.encode("utf-8", "backslashreplace").decode()


def make_plan(
    sources: Iterator[str], rule: str | None, table: dict[str, str] | None
) -> tuple[list[Job], list[ManifestEntry]]:
    """Decide which file becomes which clip.

    Args:
        sources: audio files, relative to --input.
        rule: naming rule of the files, or None.
        table: source file -> audio_id, or None.

    Returns:
        jobs, and manifest entries of the refused files: their name has no id, or another file has
        the same id.
    """
    jobs: dict[str, str] = {}  # audio_id -> source
    refused = []
    for source in sources:
        if table is not None:
            audio_id = table.get(source) or table.get(source.rsplit("/", 1)[-1])
            detail = "is not in --table"
        else:
            audio_id = audio_id_of(source, rule)
            detail = f"is not a name of {rule}; give --table, or leave --naming out"
        if audio_id is None:
            refused.append(ManifestEntry(None, source, "name", error=f"{source} {detail}."))
        elif audio_id in jobs:
            error = (
                f"{source} would become {audio_id}, as {jobs[audio_id]} does. Remove one, or give "
                "--table."
            )
            refused.append(ManifestEntry(None, source, "clash", error=error))
        else:
            jobs[audio_id] = source
    return [(source, audio_id) for audio_id, source in jobs.items()], refused


@dataclass
class ConvertedClip:
    """What the manifest says about a clip; the attributes are those of `ManifestEntry`."""

    seconds: float
    sampling_rate: int
    channels: int
    bits: int
    clipped: int
    bytes: int
    downmix: Downmix
    warning: str | None


def convert(
    source: Path, target: Path, max_seconds: float = MAX_SECONDS, downmix: Downmix = "first"
) -> ConvertedClip:
    """Decode a file and write it as FLAC at its own level.

    Raises:
        AudioError: the file cannot be decoded, or its peak is above `MAX_PEAK`.
    """
    clip = decode_audio(source, max_seconds, downmix=downmix)
    peak = float(np.abs(clip.waveform).max())
    if peak > MAX_PEAK:
        raise AudioError(
            str(source), "unreadable", f"has values up to {peak:.3g}, where full scale is 1"
        )
    bits = 24 if peak < QUIET else 16
    lowest = -(2 ** (bits - 1))
    highest = 2 ** (bits - 1) - 1
    # Scale to integers here, so that 16-bit input gives the same 16 bit. soundfile writes the upper
    # bits of an int32.
    steps = np.rint(clip.waveform.astype(np.float64) * 2 ** (bits - 1))  # (samples,)
    num_clipped = int((steps > highest).sum() + (steps < lowest).sum())
    steps = steps.clip(lowest, highest).astype(np.int32) << (32 - bits)
    # Encode in memory first, because libsndfile does not report a full disk.
    flac = io.BytesIO()
    soundfile.write(flac, steps, SAMPLING_RATE, subtype=f"PCM_{bits}", format="FLAC")
    replace_file(target, flac.getvalue(), is_synced=True)
    return ConvertedClip(
        seconds=round(len(steps) / SAMPLING_RATE, 3),
        sampling_rate=clip.sampling_rate,
        channels=clip.channels,
        bits=bits,
        clipped=num_clipped,
        bytes=len(flac.getvalue()),
        downmix=downmix,
        warning=" ".join(clip.warnings) or None,
    )


def run_job(
    job: Job, folder: str, output: str, max_seconds: float, downmix: Downmix
) -> ManifestEntry:
    """Convert one file and return its manifest entry.

    Args:
        job: source file and audio_id.
        folder: of the source files.
        output: folder of the clips.
        max_seconds: longer clips are refused.
        downmix: how several channels become one.

    Raises:
        OSError: something is wrong with the disk rather than with the file.
    """
    name, audio_id = job
    source = Path(folder) / name
    entry = ManifestEntry(audio_id, name)
    try:
        source_stat = source.stat()
    except OSError as error:
        message = f"{source}: {error.strerror}. Fix the link, or its folder."
        return replace(entry, status="missing", error=message)
    entry.size = source_stat.st_size
    entry.mtime_ns = source_stat.st_mtime_ns
    try:
        clip = convert(source, Path(output) / audio_id, max_seconds, downmix)
    except AudioError as error:
        return replace(entry, status=error.reason, error=str(error))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        message = f"{source}: the name is too long for {audio_id}.tmp. Shorten it."
        return replace(entry, status="name", error=message)
    return replace(entry, **vars(clip))


def run(jobs: list[Job], workers: int, *settings) -> Iterator[ManifestEntry]:
    """Yield the manifest entries of all jobs, in the order in which they are finished.

    Args:
        jobs: source file and audio_id of each.
        workers: number of processes.
        settings: further arguments of `run_job`.
    """
    waiting = iter(jobs)
    unfinished: dict[str, Job] = {}  # audio_id -> a job that was given to the workers
    while True:
        try:
            with decoding_pool(workers) as pool:
                running: dict[Future, str] = {}
                while True:
                    for job in islice(waiting, workers * JOBS_A_WORKER - len(running)):
                        _, audio_id = job
                        unfinished[audio_id] = job
                        running[pool.submit(run_job, job, *settings)] = audio_id
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        entry = future.result()
                        del unfinished[running.pop(future)]
                        yield entry
        except BrokenProcessPool:
            # One of the unfinished jobs killed its worker. Run each alone to find it.
            for audio_id in list(unfinished):
                yield _run_alone(unfinished.pop(audio_id), *settings)


def _run_alone(job: Job, *settings) -> ManifestEntry:
    """Run a job in a process of its own and return its entry, also if it kills the process."""
    name, audio_id = job
    try:
        with decoding_pool(1) as pool:
            return pool.submit(run_job, job, *settings).result()
    except BrokenProcessPool:
        error = (
            f"{name} kills the process that reads it (memory, or a bug of libsndfile). "
            "Leave it out."
        )
        return ManifestEntry(audio_id, name, "crash", error=error)


def write_ids(
    path: Path, manifest: AudioManifest, rule: str | None, wanted: dict[str, list[str]] | None
) -> None:
    """Write audio_ids.csv, as `data.remap_paths` reads it, with a line for each id.

    Args:
        path: the file.
        manifest: has the clips.
        rule: naming rule of the files, or None.
        wanted: clip id -> its spellings in --clip_list, each of which gets a line. If it is None, a
            clip is listed under its `audio_id` without suffix.
    """
    part = path.with_name(f"{path.name}.tmp")
    with open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "audio_id"])
        for audio_id, entry in sorted(manifest.entries.items()):
            if entry.status != "ok":
                continue
            for name in (wanted or {}).get(key_of(audio_id, rule), [stem_of(audio_id)]):
                writer.writerow([name, audio_id])
    provenance_path(path).unlink(missing_ok=True)  # That of the older file.
    sync_and_rename(part, path)


def measure_coverage(
    wanted: dict[str, list[str]], manifest: AudioManifest, rule: str | None
) -> dict:
    """Count the requested clips that exist, and list the others by status.

    Args:
        wanted: clip id -> its spellings in --clip_list.
        manifest: has the clips.
        rule: naming rule of the files, or None.
    """
    status_of = {}
    for audio_id, entry in manifest.entries.items():
        status_of[key_of(audio_id, rule)] = entry.status
    missing: dict[str, list[str]] = {}
    for key, spellings in wanted.items():
        status = status_of.get(key, "absent")
        if status != "ok":
            missing.setdefault(status, []).append(spellings[0])
    num_missing = 0
    sorted_missing = {}
    for status in sorted(missing):
        num_missing += len(missing[status])
        sorted_missing[status] = sorted(missing[status])
    return {
        "requested": len(wanted),
        "prepared": len(wanted) - num_missing,
        "missing": sorted_missing,
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--input", required=True, type=Path, metavar="DIR", help="The folder of audio files."
    )
    parser.add_argument(
        "--output_dir", required=True, type=Path, metavar="OUT", help="The folder of the clips."
    )
    parser.add_argument("--naming", choices=sorted(RULES), help="How the files of DIR are named.")
    parser.add_argument(
        "--table",
        type=Path,
        help="A CSV or TSV file: source file and audio_id. Other files are left out.",
    )
    parser.add_argument(
        "--clip_list",
        type=Path,
        help="Metadata (CSV, TSV) or a dataset file (JSON) that lists the clips to look for.",
    )
    parser.add_argument(
        "--id_column",
        help="The column of --clip_list with the ids, if its name is not a usual one.",
    )
    parser.add_argument(
        "--only_listed", action="store_true", help="Leave out files that --clip_list does not list."
    )
    add_workers(parser)
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=MAX_SECONDS,
        help=f"The longest clip that is accepted (default: {MAX_SECONDS:g}).",
    )
    parser.add_argument(
        "--downmix",
        choices=get_args(Downmix),
        default="first",
        help="How several channels become one: the first of them, as LTU takes it, or the mean of "
        "all, as LTU-AS does (default: first).",
    )
    parser.add_argument(
        "--max_bad",
        type=int,
        default=0,
        help="The number of files that may fail with an exit code of 0 (default: 0).",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="Print what would be done, and write nothing."
    )
    args = parser.parse_args(argv)
    if args.naming and args.table:
        parser.error("--naming and --table both name the clips; give one of them")
    if args.only_listed and not args.clip_list:
        parser.error("--only_listed needs --clip_list")
    if not args.input.is_dir():
        parser.error(f"--input {args.input} is not a folder")
    if args.input.resolve() == args.output_dir.resolve():
        parser.error("--output_dir is the same folder as --input; name another one")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # Decide which file becomes which clip.
    wanted = None
    if args.clip_list:
        wanted = read_wanted(args.clip_list, args.id_column, args.naming)
    table = read_table(args.table) if args.table else None
    not_audio: Counter[str] = Counter()
    sources = find_sources(args.input, args.output_dir.resolve(), not_audio)
    jobs, refused = make_plan(sources, args.naming, table)
    if args.only_listed:
        jobs = [job for job in jobs if key_of(job[1], args.naming) in wanted]
    ignored = ", ".join(f"{count} {suffix}" for suffix, count in not_audio.most_common(5))
    print(
        f"{args.input}: {len(jobs)} clips, {len(refused)} without a name of their own; "
        f"not audio: {ignored or 'none'}"
    )
    if args.dry_run:
        for source, audio_id in jobs[:SHOWN]:
            print(_printable(f"{source} -> {audio_id}"))
        return 0
    if not jobs and not refused:
        raise ValueError(
            f"{args.input} has no audio file to convert. Check --input and, with --only_listed, "
            "--clip_list and --naming."
        )

    with AudioManifest(args.output_dir) as manifest:
        # Convert what no earlier run has converted.
        todo = [job for job in jobs if not manifest.is_done(job, args.input, args.downmix)]
        settings = (str(args.input), str(args.output_dir), args.max_seconds, args.downmix)
        entries = run(todo, args.workers, *settings)
        for entry in tqdm(entries, "preparing", len(todo), unit="clip", disable=not todo):
            manifest.append(entry)
        manifest.write(refused)

        # Write the list of clips with its provenance and coverage.
        facts = {
            "input": str(args.input),
            "naming": args.naming,
            "downmix": args.downmix,
            "coverage": None,
            "libsndfile": soundfile.__libsndfile_version__,
        }
        if wanted is not None:
            facts["coverage"] = measure_coverage(wanted, manifest, args.naming)
            prepared = facts["coverage"]["prepared"]
            print(f"coverage: {prepared} of the {len(wanted)} clips of {args.clip_list}")
        write_ids(args.output_dir / IDS, manifest, args.naming, wanted)
        inputs = list(filter(None, [args.table, args.clip_list]))
        write_provenance(args.output_dir / IDS, "prepare_audio", inputs, **facts)
        return int(report(jobs, len(todo), refused, manifest) > args.max_bad)


def report(
    jobs: list[Job], tried: int, refused: list[ManifestEntry], manifest: AudioManifest
) -> int:
    """Print the result of a run and return the number of files that failed.

    Args:
        jobs: all jobs.
        tried: how many of them this run has done.
        refused: entries of files without a job.
        manifest: has the entries of the jobs.
    """
    entries = [manifest.entries[audio_id] for _, audio_id in jobs] + refused
    statuses: Counter[str] = Counter()
    errors = []
    warnings = []
    seconds = 0.0
    num_clipped = 0
    for entry in entries:
        statuses[entry.status] += 1
        if entry.status == "ok":
            seconds += entry.seconds
            num_clipped += entry.clipped > 0
            if entry.warning:
                warnings.append(f"{entry.file}: {entry.warning}")
        else:
            errors.append(entry.error)
    print(
        f"{manifest.folder}: {statuses.pop('ok', 0)} clips, {seconds / 3600:.2f} h; "
        f"{len(jobs) - tried} were done before; {num_clipped} clipped"
    )
    if warnings:
        print(f"with a warning: {len(warnings)}; see {manifest.path}")
        for warning in warnings[:SHOWN]:
            print(_printable(f"  {warning}"), file=sys.stderr)
    if errors:
        reasons = ", ".join(f"{reason} {count}" for reason, count in statuses.most_common())
        print(f"failed: {reasons}; see {manifest.path}")
        for error in errors[:SHOWN]:
            print(_printable(f"  {error}"), file=sys.stderr)
    return len(errors)


if __name__ == "__main__":
    run_command(main)
