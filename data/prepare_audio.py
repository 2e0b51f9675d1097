"""A folder of sound files -> a folder of mono 16 kHz FLAC, and a list of which clip lies where.

    python -m data.prepare_audio --input DIR --output_dir OUT --workers 8
    python -m data.prepare_audio --input DIR --output_dir OUT --map audioset --against balanced_train_segments.csv
    python -m data.prepare_audio --input DIR --output_dir OUT --table file_and_audio_id.csv

OUT/manifest.jsonl has a line for every source: its `audio_id` (the path of its FLAC in OUT), seconds, rate, channels, or
why it failed. OUT/audio_ids.csv says for each clip (`id`, spelled as --against spells it) which `audio_id` it has;
with --against, OUT/audio_ids.csv.provenance.json says how much of it there is and lists what is missing.

Notable:
- A clip is what `ltu.data.audio` decodes of a file: channel 0 at 16 kHz, or an error. Its level is kept:
  16 bit, or 24 for clips so quiet that 16 would be coarse; samples beyond full scale are clipped and counted.
- Kill it at any time and run it again: a FLAC is there whole or not at all, and what the ledger has as done from the
  same source (size and time) is left alone. What failed is tried again.
- A file that kills its worker is found, entered as such, and stops nobody else.
- --map knows the file names of AudioSet, VGGSound and AudioCaps (YouTube id, with or without Y in front and times
  behind), FSD50K, Clotho and ESC-50, and names a clip by its id; --table has two columns, source file and audio_id, for
  any other folder; without either, OUT mirrors DIR.

Exits with 1 when more than `--max_bad` files failed.
"""

import argparse
import csv
import errno
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from data.audio_ids import RULES, SUFFIXES, audio_id_of, key_of, read_table, read_wanted, stem_of
from data.audio_manifest import Ledger
from data.provenance import provenance_path, write_provenance
from ltu.data.audio import MAX_SECONDS, SAMPLING_RATE, AudioError, decode_audio
from ltu.files import run_command, sync_and_rename

QUIET = 2.0**-8  # peak (-48 dB) below which 16 bit would leave less than 8
BEYOND = 2.0  # Resampling overshoots full scale by less; a file that is louder is not scaled as sound is.
IDS = "audio_ids.csv"
JOBS_A_WORKER = 8  # that wait, so that no worker idles

Job = tuple[str, str]  # source file, relative to --input, and its audio_id


def find_sources(folder: Path, leave_out: Path, other: Counter) -> Iterator[str]:
    """Sound files below a folder, by path relative to it; files that are none are counted by their ending."""
    seen = set()
    for root, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        found = os.stat(root)
        if (found.st_dev, found.st_ino) in seen or Path(
            root
        ).resolve() == leave_out:  # A loop of links; the output.
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders.sort()
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES and not name.startswith("._"):  # macOS's notes beside a file
                yield Path(os.path.relpath(os.path.join(root, name), folder)).as_posix()
            else:
                other[suffix or name] += 1


def _raise(error: OSError) -> None:
    raise error


def _shown(text: str) -> str:
    """Names that are not UTF-8 cannot be printed as they are."""
    return text.encode("utf-8", "backslashreplace").decode()


def make_plan(
    sources: Iterator[str], rule: str | None, table: dict[str, str] | None
) -> tuple[list[Job], list[dict]]:
    """Which file becomes which clip, and entries of those that become none: no id in their name, or another's clip."""
    jobs: dict[str, str] = {}
    refused = []
    for source in sources:
        if table is not None:
            audio_id = table.get(source) or table.get(source.rsplit("/", 1)[-1])
            detail = "is not in --table"
        else:
            audio_id = audio_id_of(source, rule)
            detail = f"is no name of {rule}; give --table, or leave --map out"
        if audio_id is None:
            refused.append(
                {"audio_id": None, "file": source, "status": "name", "error": f"{source} {detail}."}
            )
        elif audio_id in jobs:
            error = f"{source} would become {audio_id}, as {jobs[audio_id]} does. Remove one, or give --table."
            refused.append({"audio_id": None, "file": source, "status": "clash", "error": error})
        else:
            jobs[audio_id] = source
    return [(source, audio_id) for audio_id, source in jobs.items()], refused


def convert(source: Path, target: Path, max_seconds: float = MAX_SECONDS) -> dict:
    """Write what is heard of a file, at its own level; what the ledger says of it.

    Raises:
        AudioError: it cannot be heard, or is louder than sound is.
    """
    sound = decode_audio(source, max_seconds)
    peak = float(np.abs(sound.waveform).max())
    if peak > BEYOND:
        raise AudioError(
            str(source), "unreadable", f"holds values up to {peak:.3g}, where full scale is 1"
        )
    bits = 24 if peak < QUIET else 16
    # soundfile takes the upper bits of an int32; scaled here, 16 bit in are the same 16 bit out.
    steps = np.rint(sound.waveform.astype(np.float64) * 2 ** (bits - 1))  # (samples,)
    clipped = int((steps > 2 ** (bits - 1) - 1).sum() + (steps < -(2 ** (bits - 1))).sum())
    steps = steps.clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int32) << (32 - bits)
    flac = io.BytesIO()  # Of a disk that is full, libsndfile would not say so.
    soundfile.write(flac, steps, SAMPLING_RATE, subtype=f"PCM_{bits}", format="FLAC")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".tmp")
    part.write_bytes(flac.getvalue())
    sync_and_rename(part, target)
    about = {"seconds": round(len(steps) / SAMPLING_RATE, 3), "sampling_rate": sound.sampling_rate}
    return about | {
        "channels": sound.channels,
        "bits": bits,
        "clipped": clipped,
        "bytes": len(flac.getvalue()),
    }


def run_job(job: Job, folder: str, output: str, max_seconds: float) -> dict:
    """One line of the ledger; what is wrong with the disk, and not with the file, is raised."""
    source, audio_id = Path(folder) / job[0], job[1]
    entry = {"audio_id": audio_id, "file": job[0], "status": "ok"}
    try:
        found = source.stat()
    except OSError as error:
        return entry | {
            "status": "missing",
            "error": f"{source}: {error.strerror}. Mend the link, or its folder.",
        }
    entry |= {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
    try:
        return entry | convert(source, Path(output) / audio_id, max_seconds)
    except AudioError as error:
        return entry | {"status": error.reason, "error": str(error)}
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return entry | {
            "status": "name",
            "error": f"{source}: the name is too long for {audio_id}.tmp. Shorten it.",
        }


def run(jobs: list[Job], workers: int, *settings) -> Iterator[dict]:
    """The entries of all jobs, in the order in which they are ready; `settings` as of `run_job`."""
    waiting = iter(jobs)
    taken: dict[str, Job] = {}  # audio_id -> a job that is with a worker
    while True:
        try:
            with _pool(workers) as pool:
                running: dict[Future, str] = {}
                while True:
                    for job in islice(waiting, workers * JOBS_A_WORKER - len(running)):
                        taken[job[1]] = job
                        running[pool.submit(run_job, job, *settings)] = job[1]
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        entry = future.result()
                        del taken[running.pop(future)]
                        yield entry
        except BrokenProcessPool:
            for audio_id in list(taken):  # One of them killed its worker; alone, it shows.
                yield _run_alone(taken.pop(audio_id), *settings)


def _run_alone(job: Job, *settings) -> dict:
    try:
        with _pool(1) as pool:
            return pool.submit(run_job, job, *settings).result()
    except BrokenProcessPool:
        error = f"{job[0]} kills the process that reads it (memory, or a bug of libsndfile). Leave it out."
        return {"audio_id": job[1], "file": job[0], "status": "crash", "error": error}


def _pool(workers: int) -> ProcessPoolExecutor:
    # A process that was forked from one with threads can hang; the server is forked from before it has any.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ltu.data.audio"])  # It imports torch, once for all workers.
    return ProcessPoolExecutor(workers, context, _start_worker)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent tells its workers to stop.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """After kill -9 of the parent a worker would wait for its next job for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def write_ids(
    path: Path, ledger: Ledger, rule: str | None, wanted: dict[str, list[str]] | None
) -> None:
    """CSV of the clips there are, as `data.remap_paths` takes it: each spelling of --against, and its audio_id."""
    part = path.with_name(f"{path.name}.tmp")
    with open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "audio_id"])
        for audio_id, entry in sorted(ledger.entries.items()):
            names = (wanted or {}).get(key_of(audio_id, rule), [stem_of(audio_id)])
            for name in names if entry["status"] == "ok" else ():
                writer.writerow([name, audio_id])
    provenance_path(path).unlink(missing_ok=True)  # It is that of the older ids.
    sync_and_rename(part, path)


def measure_coverage(wanted: dict[str, list[str]], ledger: Ledger, rule: str | None) -> dict:
    """How many of the clips that are asked for there are, and the others by name."""
    status = {key_of(audio_id, rule): entry["status"] for audio_id, entry in ledger.entries.items()}
    found = {key: status.get(key, "absent") for key in wanted}
    lost = {key: state for key, state in found.items() if state != "ok"}
    names = {
        state: sorted(wanted[key][0] for key in lost if lost[key] == state)
        for state in sorted({*lost.values()})
    }
    return {"asked_for": len(wanted), "prepared": len(wanted) - len(lost), "missing": names}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument(
        "--input", required=True, type=Path, metavar="DIR", help="folder of sound files"
    )
    parser.add_argument("--output_dir", required=True, type=Path, metavar="OUT")
    parser.add_argument("--map", choices=sorted(RULES), help="how the files of DIR are named")
    parser.add_argument(
        "--table", type=Path, help="source file and audio_id, CSV or TSV; other files are left out"
    )
    parser.add_argument(
        "--against", type=Path, help="metadata (CSV, TSV) or rows (JSON): what should be there"
    )
    parser.add_argument("--id_column", help="of --against, if it has no usual name")
    parser.add_argument(
        "--only_asked", action="store_true", help="leave out files that --against does not ask for"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--max_seconds", type=float, default=MAX_SECONDS, help="longer clips are refused"
    )
    parser.add_argument(
        "--max_bad", type=int, default=0, help="files that may fail without a non-zero exit"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="show what would be done, and write nothing"
    )
    args = parser.parse_args(argv)
    if args.map and args.table:
        parser.error("--map and --table both name the clips; give one of them")
    if args.only_asked and not args.against:
        parser.error("--only_asked needs --against")
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if not args.input.is_dir():
        parser.error(f"--input {args.input} is not a folder")
    if args.input.resolve() == args.output_dir.resolve():
        parser.error("--output_dir is --input itself; name another folder")
    return args


def main(argv: list[str] | None = None) -> int:
    args, other = parse_args(argv), Counter()
    wanted = read_wanted(args.against, args.id_column, args.map) if args.against else None
    sources = find_sources(args.input, args.output_dir.resolve(), other)
    jobs, refused = make_plan(sources, args.map, read_table(args.table) if args.table else None)
    if args.only_asked:
        jobs = [job for job in jobs if key_of(job[1], args.map) in wanted]
    ignored = ", ".join(f"{count} {suffix}" for suffix, count in other.most_common(5))
    print(
        f"{args.input}: {len(jobs)} clips, {len(refused)} without a name of their own; no sound: {ignored or 'none'}"
    )
    if args.dry_run:
        print(_shown("\n".join(f"{source} -> {audio_id}" for source, audio_id in jobs[:20])))
        return 0
    with Ledger(args.output_dir) as ledger:
        todo = [job for job in jobs if not ledger.is_done(job, args.input)]
        settings = (str(args.input), str(args.output_dir), args.max_seconds)
        entries = run(todo, args.workers, *settings)
        for entry in tqdm(entries, "preparing", len(todo), unit="clip", disable=not todo):
            ledger.append(entry)
        ledger.write(refused)
        facts = {"input": str(args.input), "map": args.map, "coverage": None}
        facts["libsndfile"] = soundfile.__libsndfile_version__
        if wanted is not None:
            facts["coverage"] = measure_coverage(wanted, ledger, args.map)
            prepared = facts["coverage"]["prepared"]
            print(f"coverage: {prepared} of the {len(wanted)} clips of {args.against}")
        write_ids(args.output_dir / IDS, ledger, args.map, wanted)
        read = [path for path in (args.table, args.against) if path]
        write_provenance(args.output_dir / IDS, "prepare_audio", read, **facts)
        return int(report(jobs, len(todo), refused, ledger) > args.max_bad)


def report(jobs: list[Job], tried: int, refused: list[dict], ledger: Ledger) -> int:
    """Print what became of the files; how many failed."""
    entries = [ledger.entries[audio_id] for _, audio_id in jobs] + refused
    failed = [entry for entry in entries if entry["status"] != "ok"]
    made = [entry for entry in entries if entry["status"] == "ok"]
    hours, clipped = (
        sum(entry["seconds"] for entry in made) / 3600,
        sum(entry["clipped"] > 0 for entry in made),
    )
    print(
        f"{ledger.folder}: {len(made)} clips, {hours:.2f} h; {len(jobs) - tried} were there; {clipped} clipped"
    )
    if failed:
        reasons = Counter(entry["status"] for entry in failed).most_common()
        print(
            f"failed: {', '.join(f'{reason} {count}' for reason, count in reasons)}; see {ledger.path}"
        )
        print(_shown("\n".join(f"  {entry['error']}" for entry in failed[:20])), file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    run_command(main)
