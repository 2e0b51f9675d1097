"""Derives clip ids from the file names of the usual datasets, and `audio_id`s from clip ids.

The same rule reads a file name, a cell of the dataset's own table and the `audio_id` of an example,
so that all three give the same clip id.

A YouTube id has 11 characters and may itself begin with Y, - or _. The letter Y that some datasets
put in front of it, and the start and end of the clip behind it, are not part of the id.
"""

import csv
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ltu.data.check_examples import NO_AUDIO
from ltu.data.dataset_io import stream_examples

DECODED = ".wav .wave .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64"
# Formats that libsndfile does not decode. They are found all the same, so that the manifest of
# data.prepare_audio reports them.
NOT_DECODED = ".m4a .mp4 .aac .webm .mkv .wma .mka .mov .avi .3gp .amr .ape .ac3 .m4b .ra"
SUFFIXES = {*DECODED.split(), *NOT_DECODED.split()}
# Optional Y, id, optional start, optional end.
YOUTUBE = re.compile(r"Y?([A-Za-z0-9_-]{11})(?:_([0-9]+\.?[0-9]*)(?:[_-]([0-9]+\.?[0-9]*))?)?")
# Usual names of the column that contains the clip id, the most certain first.
ID_COLUMNS = "audio_id ytid youtube_id segment_id video_id file_name filename fname file id".split()
TABLES = (".csv", ".tsv", ".txt")
MILLISECONDS = 1000.0  # Times of this size or larger may be in milliseconds.


class Segment(NamedTuple):
    """The part of a video that a clip covers.

    Attributes:
        starts: every possible start in seconds; the unit of some names is ambiguous.
        length: in seconds, or None if the name has no end.
    """

    starts: frozenset[float]
    length: float | None


def stem(name: str) -> str:
    """Return the last part of a path without its audio suffix.

    Other dots stay: names of Clotho contain dots.
    """
    last = unicodedata.normalize("NFC", name.replace("\\", "/").rsplit("/", 1)[-1])
    dot = last.rfind(".")
    has_suffix = dot > 0 and last[dot:].lower() in SUFFIXES
    return last[:dot] if has_suffix else last


def youtube(name: str) -> str | None:
    """Return the YouTube id in a file name, or None."""
    match = YOUTUBE.fullmatch(stem(name))
    return match[1] if match else None


def segment(name: str) -> Segment | None:
    """Return the part of its video that a clip covers, or None if its name has no times.

    AudioCaps writes `Y<id>_30.000_40.000` and VGGSound `<id>_000030`, both in seconds;
    AudioSet-strong writes `<id>_30000`, in milliseconds. A whole number of four digits or more
    without a leading zero may be either, and so may 0.
    """
    match = YOUTUBE.fullmatch(stem(name))
    if not match or not match[2]:
        return None
    start = float(match[2])
    length = float(match[3]) - start if match[3] else None
    starts = {start}
    is_ambiguous = re.fullmatch("0|[1-9][0-9]{3,}", match[2]) is not None
    if is_ambiguous and length is None:
        starts = {start, start / 1000}
    elif is_ambiguous and length >= MILLISECONDS:
        starts = {start / 1000}
        length = length / 1000
    if length is not None:
        length = round(length, 3)
    return Segment(frozenset(round(second, 3) for second in starts), length)


def is_same_segment(one: str, other: str) -> bool:
    """Return whether two clips of a video begin and end at the same times.

    An end that only one of the two names has is ignored.
    """
    first = segment(one)
    second = segment(other)
    if first is None or second is None:
        return first is second
    if not first.starts & second.starts:
        return False
    return None in (first.length, second.length) or first.length == second.length


def fsd50k(name: str) -> str | None:
    """Return the number of a clip of FSD50K, or None."""
    return stem(name) if stem(name).isdecimal() else None


def esc50(name: str) -> str | None:
    """Return the name of a clip of ESC-50, or None."""
    return stem(name) if re.fullmatch(r"[1-5]-\d+-[A-Z]-\d+", stem(name)) else None


def clotho(name: str) -> str | None:
    """Return the name of a clip of Clotho, or None.

    The names are sentences, which some tools write with underscores or in another case.
    """
    return re.sub(r"[\s_]+", " ", stem(name)).strip().casefold() or None


def stem_of(name: str) -> str:
    """Return the whole path without its audio suffix."""
    return str(PurePosixPath(name).with_name(stem(name))) if stem(name) else name


# Naming rule -> function that returns the clip id of a file name, or None.
RULES = {
    "audioset": youtube,
    "vggsound": youtube,
    "audiocaps": youtube,
    "fsd50k": fsd50k,
    "clotho": clotho,
    "esc50": esc50,
}


def _escaped(name: str) -> str:
    """Return a file name whose bytes that are not UTF-8 are written like %E9, as JSON needs it."""
    return re.sub("[\udc80-\udcff]", lambda match: f"%{ord(match[0]) & 0xFF:02X}", name)


def key_of(name: str, rule: str | None) -> str | None:
    """Return the clip id of a file name, or None if the name does not follow the rule."""
    return RULES[rule](name) if rule else stem_of(_escaped(name))


def audio_id_of(name: str, rule: str | None) -> str | None:
    """Return the `audio_id` of the clip that is made from a file, or None.

    It is the clip id or, without a rule, the path of the file, with the suffix `.flac`.
    """
    key = key_of(name, rule)
    if not key:
        return None
    return f"{stem(_escaped(name)) if rule == 'clotho' else key}.flac"


def read_wanted(file: Path, column: str | None, rule: str | None) -> dict[str, list[str]]:
    """Read the clips that a metadata file lists.

    Returns:
        clip id -> every spelling of it in the file.

    Raises:
        ValueError: no id in the file follows the rule.
    """
    wanted: dict[str, list[str]] = {}
    count = 0
    for name in read_ids(file, column):
        count += 1
        key = key_of(name, rule)
        if key is None:
            continue
        spellings = wanted.setdefault(key, [])
        if name not in spellings:
            spellings.append(name)
    if not wanted:
        raise ValueError(
            f"{file}: none of its {count} ids is a name of {rule or 'a file'}. "
            "Name the right column with --id_column."
        )
    return wanted


def read_table(file: Path) -> dict[str, str]:
    """Read a table of two columns, source file and `audio_id`.

    The file is CSV or TSV, without a header or with the header `file,audio_id`.

    Returns:
        source file -> `audio_id`, with the suffix `.flac`.

    Raises:
        ValueError: a line does not have two cells, a source is repeated, or an `audio_id` is
            outside of the output folder.
    """
    table: dict[str, str] = {}
    for number, cells in read_cells(file):
        if len(cells) != 2 or not all(cells):
            raise ValueError(
                f"{file}, line {number}: {len(cells)} cells instead of a source file and its "
                f"audio_id: {cells}"
            )
        source, audio_id = cells
        is_header = (source.lower(), audio_id.lower()) == ("file", "audio_id")
        if is_header and not table:
            continue
        if ".." in PurePosixPath(audio_id).parts or audio_id.startswith("/"):
            raise ValueError(
                f"{file}, line {number}: {audio_id!r} is outside of --output_dir. "
                "Give a relative path."
            )
        if source in table:
            raise ValueError(
                f"{file}, line {number}: {source!r} is listed twice. Remove one of the lines."
            )
        table[source] = str(PurePosixPath(audio_id).with_name(stem(audio_id) + ".flac"))
    return table


def read_ids(file: Path, column: str | None = None) -> Iterator[str]:
    """Yield the clip ids of a metadata file or a dataset file.

    Examples without audio are left out. Without `column`, the first of the usual columns that the
    file has is read, or the first column of a table without a header.

    Raises:
        ValueError: the column does not exist, an id is neither text nor a whole number, or the
            JSON is broken.
    """
    if file.suffix.lower() in TABLES:
        yield from _ids_of_table(file, column)
        return
    for number, example in enumerate(stream_examples(file), start=1):
        name = column
        if name is None:
            name = next((name for name in ID_COLUMNS if name in example), None)
        if name not in example:
            raise ValueError(
                f"{file}, example {number} has no {name or 'audio_id'!r}, only {sorted(example)}."
            )
        clip_id = example[name]
        # Numbers of clips, such as those of FSD50K, may be numbers in JSON.
        if type(clip_id) not in (str, int, type(None)):
            raise ValueError(
                f"{file}, example {number}: {name!r} is a {type(clip_id).__name__}, not an id. "
                "Name the right key with --id_column."
            )
        if clip_id not in NO_AUDIO:
            yield str(clip_id)


def _ids_of_table(file: Path, column: str | None) -> Iterator[str]:
    index = None  # Of the column with the ids.
    for number, cells in read_cells(file):
        if index is None:
            names = [cell.lstrip("# ").lower() for cell in cells]
            usual = [column.lower()] if column else ID_COLUMNS
            index = next((names.index(name) for name in usual if name in names), None)
            if index is None and column:
                raise ValueError(f"{file} has no column {column!r}; its first line is {cells}.")
            if index is not None:
                continue
            # The tables of AudioSet begin with two lines of comments.
            if cells[0].startswith("# "):
                continue
            index = 0
        if index >= len(cells):
            raise ValueError(
                f"{file}, line {number}: {len(cells)} cells, but the id is in cell {index + 1}."
            )
        if cells[index]:
            yield cells[index]


def read_cells(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of a CSV file, or of a TSV file if the first line has a tab.

    Empty lines are left out.

    Raises:
        ValueError: the file is not UTF-8, or a cell is longer than `csv.field_size_limit()`.
    """
    number = 0  # Of the last line that was read.
    with open(file, encoding="utf-8-sig", newline="") as lines:
        try:
            first = lines.readline()
            lines.seek(0)
            delimiter = "\t" if "\t" in first else ","
            reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
            for cells in reader:
                number = reader.line_num
                if any(cells):
                    yield number, [cell.strip() for cell in cells]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is not UTF-8, after line {number}. Save it as UTF-8."
            ) from error
        except csv.Error as error:
            raise ValueError(
                f"{file}, after line {number}: {error}. Fix the next line, or write JSON lines."
            ) from error
