"""From the file names of the usual data sets to clips, and from clips to `audio_id`s.

Notable:
- The same rule reads a file's name, a cell of the data set's own table and the `audio_id` of a row, so all three meet.
- A YouTube id has 11 characters and may itself begin with Y, -, or _; what stands around it (the letter Y in front,
  the start and end of the clip behind) is no part of it.
"""

import csv
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ltu.data.dataset_files import stream_rows

DECODED = ".wav .wave .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64"
NOT_DECODED = ".m4a .mp4 .aac .webm .mkv .wma .mka .mov .avi .3gp .amr .ape .ac3 .m4b .ra"  # They go into the ledger.
SUFFIXES = {*DECODED.split(), *NOT_DECODED.split()}
YOUTUBE = re.compile(r"Y?([A-Za-z0-9_-]{11})(?:_([0-9]+\.?[0-9]*)(?:[_-]([0-9]+\.?[0-9]*))?)?")
ID_COLUMNS = "audio_id ytid youtube_id segment_id video_id file_name filename fname file id".split()
NO_AUDIO = (None, "", "empty")  # of ltu.data.examples, which imports torch
TABLES = (".csv", ".tsv", ".txt")


def stem(name: str) -> str:
    """The last part of a path, without the ending of a sound file (other dots stay: Clotho's names have them)."""
    last = unicodedata.normalize("NFC", name.replace("\\", "/").rsplit("/", 1)[-1])
    end = last.rfind(".")
    return last[:end] if end > 0 and last[end:].lower() in SUFFIXES else last


def youtube(name: str) -> str | None:
    found = YOUTUBE.fullmatch(stem(name))
    return found and found[1]


def segment(name: str) -> tuple[frozenset[float], float | None] | None:
    """Which part of its video a clip is: start (every reading of it) and seconds from start to end, or None.

    AudioCaps writes `Y<id>_30.000_40.000`, VGGSound `<id>_000030`, both in seconds, AudioSet-strong `<id>_30000` in
    milliseconds. A whole number of four digits or more without a zero in front may be either, and so may 0.
    """
    found = YOUTUBE.fullmatch(stem(name))
    if not found or not found[2]:
        return None
    start, length = float(found[2]), float(found[3]) - float(found[2]) if found[3] else None
    starts, is_either = {start}, re.fullmatch("0|[1-9][0-9]{3,}", found[2]) is not None
    if is_either and (length is None or length >= 1000):
        starts = {start / 1000} if length else {start, start / 1000}
        length = length and length / 1000
    return frozenset(round(second, 3) for second in starts), length and round(length, 3)


def is_same_segment(one: str, other: str) -> bool:
    """Whether two clips of a video begin, and as far as both say it end, at the same times."""
    first, second = segment(one), segment(other)
    if first is None or second is None:
        return first is second
    return bool(first[0] & second[0]) and (None in (first[1], second[1]) or first[1] == second[1])


def fsd50k(name: str) -> str | None:
    return stem(name) if stem(name).isdecimal() else None


def esc50(name: str) -> str | None:
    return stem(name) if re.fullmatch(r"[1-5]-\d+-[A-Z]-\d+", stem(name)) else None


def clotho(name: str) -> str | None:
    """Clotho's names are sentences, which tools write with underscores or in other case."""
    return re.sub(r"[\s_]+", " ", stem(name)).strip().casefold() or None


def stem_of(name: str) -> str:
    """The whole path, without the ending of a sound file."""
    return str(PurePosixPath(name).with_name(stem(name))) if stem(name) else name


RULES = {
    "audioset": youtube,
    "vggsound": youtube,
    "audiocaps": youtube,
    "fsd50k": fsd50k,
    "clotho": clotho,
}
RULES |= {"esc50": esc50}


def _spelled(name: str) -> str:
    """Bytes of a file's name that are no UTF-8, as %E9: no row could hold them."""
    return re.sub("[\udc80-\udcff]", lambda found: f"%{ord(found[0]) & 0xFF:02X}", name)


def key_of(name: str, rule: str | None) -> str | None:
    """What clips are compared by; None if the name is none of the rule's."""
    return RULES[rule](name) if rule else stem_of(_spelled(name))


def audio_id_of(name: str, rule: str | None) -> str | None:
    """The `audio_id` of the clip that is made of a file: its id or, without a rule, its own path, and `.flac`."""
    key = key_of(name, rule)
    return key and f"{stem(_spelled(name)) if rule == 'clotho' else key}.flac"


def read_wanted(file: Path, column: str | None, rule: str | None) -> dict[str, list[str]]:
    """What a metadata file asks for: clip -> how the file spells it.

    Raises:
        ValueError: nothing in it has the form of the rule's ids.
    """
    wanted: dict[str, list[str]] = {}
    count = 0
    for name in read_ids(file, column):
        count += 1
        key = key_of(name, rule)
        if key is not None and name not in wanted.setdefault(key, []):
            wanted[key].append(name)
    if not wanted:
        raise ValueError(
            f"{file}: none of its {count} ids is one of {rule or 'a file'}. Name the right column: --id_column."
        )
    return wanted


def read_table(file: Path) -> dict[str, str]:
    """Two columns, source file and `audio_id`, CSV or TSV, without a header or with `file,audio_id`.

    Raises:
        ValueError: a line of another form, a source twice, or an `audio_id` that would lie outside the folder.
    """
    table: dict[str, str] = {}
    for number, cells in read_cells(file):
        if len(cells) != 2 or not all(cells):
            raise ValueError(
                f"{file}, line {number}: {len(cells)} cells, not a source file and its audio_id: {cells}"
            )
        source, audio_id = cells
        if not table and (source.lower(), audio_id.lower()) == ("file", "audio_id"):
            continue
        parts = PurePosixPath(audio_id).parts
        if ".." in parts or audio_id.startswith("/"):
            raise ValueError(
                f"{file}, line {number}: {audio_id!r} leads out of --output_dir. Give a relative path."
            )
        if source in table:
            raise ValueError(
                f"{file}, line {number}: {source!r} is there twice. Keep one line of it."
            )
        table[source] = str(PurePosixPath(audio_id).with_name(stem(audio_id) + ".flac"))
    return table


def read_ids(file: Path, column: str | None = None) -> Iterator[str]:
    """What a metadata or row file asks for: one column of it; questions without audio are left out.

    Raises:
        ValueError: no such column; broken JSON.
    """
    if file.suffix.lower() not in TABLES:
        for number, row in enumerate(stream_rows(file), start=1):
            name = column or next((name for name in ID_COLUMNS if name in row), None)
            if name not in row:
                raise ValueError(
                    f"{file}, row {number} has no {name or 'audio_id'!r}, only {sorted(row)}."
                )
            if row[name] not in NO_AUDIO:
                yield str(row[name])
        return
    at = None
    for number, cells in read_cells(file):
        names = [cell.lstrip("# ").lower() for cell in cells]
        if at is None:
            usual = [column.lower()] if column else ID_COLUMNS
            at = next((names.index(name) for name in usual if name in names), None)
            if at is None and column:
                raise ValueError(f"{file} has no column {column!r}; its first line is {cells}.")
            if at is not None:
                continue
            if cells[0].startswith(
                "# "
            ):  # AudioSet's tables begin with two lines about themselves.
                continue
            at = 0
        if at >= len(cells):
            raise ValueError(
                f"{file}, line {number}: {len(cells)} cells, but the id is in the {at + 1}th."
            )
        if cells[at]:
            yield cells[at]


def read_cells(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of CSV, or of TSV if the first line holds a tab; empty lines are left out."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        first = lines.readline()
        lines.seek(0)
        reader = csv.reader(lines, delimiter="\t" if "\t" in first else ",", skipinitialspace=True)
        try:
            for cells in reader:
                if any(cells):
                    yield reader.line_num, [cell.strip() for cell in cells]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is not UTF-8, after line {reader.line_num}. Save it as UTF-8."
            ) from error
