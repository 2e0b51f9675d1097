"""Check every row of a file, and every clip once.

    python -m data.validate --data_path A.json --audio_root DIR [--output_path report.json]
    python -m data.validate --data_path A.json --no_audio

Notable:
- A row must be what training takes (`ltu.data.examples`), and be there once. What rows lack is counted.
- A clip must be there, and have 25 ms to an hour of sound according to its header; another rate than 16 kHz is counted
  only, since it is resampled when it is read. --listen decodes every clip as training does.
- Coverage is by the dataset of the first row of a clip. The rows are read twice, in constant memory.

Exits with 1 when more than `--max_bad` rows or clips are wrong.
"""

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.audio_ids import NO_AUDIO
from data.command_line import command_parser
from data.duplicate_detection import Distinct
from data.provenance import write_json
from ltu.data.dataset_files import stream_rows
from ltu.files import run_command

SHOWN = 10  # of each kind of error
CLIPS_AT_ONCE = 4096


@dataclass
class Findings:
    """Numbers of what is wrong, and the first few by name."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < SHOWN:
            self.examples[kind].append(example)


def check_rows(path: Path, folder: str, findings: Findings) -> tuple[int, Counter[str], np.ndarray]:
    """Number of rows, what they lack, and (clips,) in ascending order: the first row, from 0, of each clip."""
    from ltu.data.examples import what_is_wrong  # Imports torch.

    clips, contents = Distinct(folder, "clips"), Distinct(folder, "rows")
    lacking: Counter[str] = Counter()
    number = -1
    for number, row in enumerate(stream_rows(path)):
        if reason := what_is_wrong(row, True):
            findings.add("row", f"row {number + 1}: {reason}")
        lacking.update(key for key in ("input", "audio_id", "dataset", "task") if key not in row)
        audio_id = row.get("audio_id")
        contents.add(
            (row.get("instruction"), row.get("input"), audio_id, row.get("output")), number
        )
        if audio_id not in NO_AUDIO:
            clips.add(audio_id, number)
    for _, repeated in contents.parts():
        for row_number in repeated.tolist():
            findings.add("duplicate", f"row {row_number + 1}: the same as one before it")
    return number + 1, lacking, clips.firsts()


def first_clips(path: Path, firsts: np.ndarray) -> Iterator[tuple[str, str]]:
    """(audio_id, dataset) of these rows."""
    wanted = iter(firsts.tolist())
    at = next(wanted, None)
    for number, row in enumerate(stream_rows(path)):
        if number == at:
            yield str(row["audio_id"]), str(row.get("dataset"))
            at = next(wanted, None)


def look(path: Path) -> tuple[int, float]:
    """Sampling rate in Hz and seconds that a clip's header claims.

    Raises:
        AudioError: there is no clip, or training would refuse it.
    """
    import soundfile

    from ltu.data.audio import MAX_SECONDS, MIN_SAMPLES, SAMPLING_RATE, AudioError

    if not path.is_file():
        raise AudioError(str(path), "missing", "no such file")
    try:
        header = soundfile.info(str(path))
    except soundfile.SoundFileError as error:
        raise AudioError(str(path), "unreadable", "libsndfile cannot open it") from error
    if not MIN_SAMPLES / SAMPLING_RATE <= header.duration <= MAX_SECONDS:
        reason = "too_long" if header.duration > MAX_SECONDS else "too_short"
        raise AudioError(str(path), reason, f"{header.duration:.3f} s of sound")
    return header.samplerate, header.duration


def listen(path: Path) -> tuple[int, float]:
    """The same by decoding the whole clip."""
    from ltu.data.audio import SAMPLING_RATE, decode_audio

    sound = decode_audio(path)
    return sound.sampling_rate, len(sound.waveform) / SAMPLING_RATE


def check_clips(
    clips: Iterator[tuple[str, str]],
    root: Path,
    check: Callable[[Path], tuple[int, float]],
    findings: Findings,
) -> dict[str, Any]:
    """Coverage by dataset, rates and hours."""
    from ltu.data.audio import AudioError

    def checked(clip: tuple[str, str]) -> tuple[int, float] | AudioError:
        try:
            return check(root / clip[0])
        except AudioError as error:
            return error

    asked, usable, rates, seconds = Counter(), Counter(), Counter(), 0.0
    with ThreadPoolExecutor() as pool:
        while block := list(islice(clips, CLIPS_AT_ONCE)):
            for (_, dataset), found in zip(block, pool.map(checked, block), strict=True):
                asked[dataset] += 1
                if isinstance(found, AudioError):
                    findings.add(f"clip {found.reason}", str(found))
                    continue
                usable[dataset] += 1
                rates[f"{found[0]} Hz"] += 1
                seconds += found[1]
    coverage = {
        name: {"clips": number, "usable": usable[name]} for name, number in asked.most_common()
    }
    return {"coverage": coverage, "rates": dict(rates), "hours": round(seconds / 3600, 2)}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__, None)
    parser.add_argument("--output_path", type=Path, help="a report as JSON")
    parser.add_argument(
        "--audio_root",
        type=Path,
        help="folder of relative audio_ids (default: that of the data file)",
    )
    parser.add_argument("--no_audio", action="store_true", help="check the rows alone")
    parser.add_argument(
        "--allow_duplicates", action="store_true", help="recipes repeat some datasets on purpose"
    )
    parser.add_argument("--listen", action="store_true", help="decode every clip")
    parser.add_argument("--max_bad", type=int, default=0, help="rows and clips that may be wrong")
    args = parser.parse_args(argv)
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        rows, lacking, firsts = check_rows(args.data_path, folder, findings)
    report: dict[str, Any] = {"rows": rows, "clips": len(firsts), "rows_lacking": dict(lacking)}
    if not args.no_audio:
        root = args.audio_root or args.data_path.parent
        check = listen if args.listen else look
        report |= check_clips(first_clips(args.data_path, firsts), root, check, findings)
    report |= {"wrong": dict(findings.counts), "examples": dict(findings.examples)}
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if args.output_path:
        write_json(report, args.output_path)
    forgiven = findings.counts["duplicate"] if args.allow_duplicates else 0
    return int(findings.counts.total() - forgiven > args.max_bad)


if __name__ == "__main__":
    run_command(main)
