"""Point the audio_ids of a file at local clips.

    python -m data.relocate --data_path A.json --output_path B.json --folder audioset=/disk/as --folder vggsound=/disk/v
    python -m data.relocate --data_path A.json --output_path B.json --prefix /data/sls/audioset=/disk/audioset
    python -m data.relocate --data_path A.json --output_path B.json --table OUT/audio_ids.csv

Notable:
- Tried in this order: a table (its first column is an id or path, its second a path, relative to the table's folder;
  `data.prepare_audio` writes one), a prefix, a folder. In folders, clips are found by name: without folder and ending,
  a YouTube id with or without the letter Y in front.
- Where id and file both have times (`Y<id>_30.000_40.000`, `<id>_000030`), these must agree. A file without times
  serves one segment of its video: if the rows ask for several, none of them gets it.
- `--folder NAME=DIR` has clips of the datasets that NAME begins or matches as a pattern ("audioset": also as_2m,
  as_20k, as_strong). Those look there first, and take from another named folder what has their times, nothing else.
- A row that several files or none for certain fits is ambiguous: left out, counted and named; the exit is then 1, but
  not with --drop_missing.
- A clip counts only if its file is there. Rows without a clip are left out with --drop_missing, else it is an error.
- Memory grows with the number of local files (some 400 bytes each), not with the rows, which are read twice.
  `--relative` writes paths relative to the output.
"""

import argparse
import os
from collections import Counter
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from data.audio_names import NO_AUDIO, SUFFIXES, is_same_segment, read_cells, segment, stem, youtube
from data.command import command_parser, run
from data.recipe import write_recipe, write_rows
from ltu.row_files import stream_rows

HEADERS = {("id", "audio_id"), ("audio_id", "path"), ("audio_id", "file")}
SHOWN = 5


class Found(NamedTuple):
    """The files that a clip may be, and whether their names have its times (or both have none)."""

    paths: list[str]
    is_exact: bool = True


def is_of(dataset: str, label: str) -> bool:
    """Whether a folder of that name has the clips of a dataset."""
    dataset, label = dataset.lower(), label.lower()
    return dataset.startswith((label, "as_") if label == "audioset" else label) or fnmatchcase(dataset, label)


class Places:
    """Where clips lie here; `labels[n]` is the name of the nth folder, or ""."""

    def __init__(self, tables: list[Path], prefixes: list[tuple[str, str]], folders: list[tuple[str, Path]]):
        self.prefixes, self.labels = prefixes, [label for label, _ in folders]
        self.table: dict[str, str] = {}
        self.files: dict[str, list[tuple[int, str]]] = {}
        self.claims: dict[str, str] = {}
        self.shared: set[str] = set()
        for path in tables:
            self._read_table(path)
        for number, (_, folder) in enumerate(folders):
            if not folder.is_dir():
                raise ValueError(f"--folder {folder} is no folder.")
            for place, _, names in os.walk(folder, followlinks=True):
                for name in sorted(names):
                    if os.path.splitext(name)[1].lower() in SUFFIXES:
                        self.files.setdefault(youtube(name) or stem(name), []).append((number, f"{place}/{name}"))
        self.look_up = lru_cache(maxsize=2**17)(self._look_up)

    def _read_table(self, path: Path) -> None:
        for number, cells in read_cells(path):
            if len(cells) != 2:
                raise ValueError(f"{path}, line {number}: {len(cells)} cells, not an id and its path: {cells}")
            if number > 1 or tuple(cells) not in HEADERS:
                self.table[cells[0]] = str(path.parent / cells[1])

    def _look_up(self, audio_id: str, dataset: str) -> Found:
        name, video = stem(audio_id), youtube(audio_id)
        given = [self.table.get(audio_id), self.table.get(name)]
        of_video = self.table.get(video) if video else None
        given += [of_video] if segment(audio_id) is None else []
        given += [new + audio_id[len(old) :] for old, new in self.prefixes if audio_id.startswith(old)]
        for path in given:
            if path and os.path.isfile(path):
                return Found([path])
        if of_video and os.path.isfile(of_video):
            return Found([of_video], False)
        return self._in_folders(audio_id, dataset, video or name)

    def _in_folders(self, audio_id: str, dataset: str, key: str) -> Found:
        own = {number for number, label in enumerate(self.labels) if label and is_of(dataset, label)}
        same, other = [], []
        for number, path in self.files.get(key, []):
            if is_same_segment(audio_id, path):
                same.append((number, path))
            elif None in (segment(audio_id), segment(path)):
                other.append((number, path))
        foreign = {number for number, label in enumerate(self.labels) if label and number not in own} if own else set()
        if segment(audio_id) is None:  # Another dataset has another part of the video.
            same = [(number, path) for number, path in same if number not in foreign]
        other = [(number, path) for number, path in other if number not in foreign]
        for is_own in (True, False):
            for found in (same, other):
                paths = {os.path.realpath(path): path for number, path in found if (number in own) == is_own}
                if paths:
                    return Found(list(paths.values()), found is same)
        return Found([])

    def claim(self, audio_id: str, dataset: str) -> None:
        """Take note of who asks for a file without times: the whole video, or one or more of its segments."""
        paths, is_exact = self.look_up(audio_id, dataset)
        if len(paths) == 1 and youtube(audio_id) and is_exact == (segment(audio_id) is None):
            if not is_same_segment(self.claims.setdefault(paths[0], audio_id), audio_id):
                self.shared.add(paths[0])

    def find(self, audio_id: str, dataset: str) -> tuple[str | None, str]:
        """The file of a clip; or None and, unless there is none at all, why it is not certain. `claim` all before."""
        paths, is_exact = self.look_up(audio_id, dataset)
        if len(paths) > 1:
            return None, f"{paths[0]} or {paths[1]}"
        if paths and not is_exact and segment(audio_id) and paths[0] in self.shared:
            return None, f"{paths[0]}, which has no times, or another segment"
        return (paths[0] if paths else None), ""


def parse_folder(text: str) -> tuple[str, Path]:
    label, sign, folder = text.partition("=")
    return (label, Path(folder)) if sign and not os.path.isdir(text) else ("", Path(text))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--table", action="append", default=[], type=Path, help="CSV or TSV of two columns")
    parser.add_argument("--prefix", action="append", default=[], metavar="OLD=NEW")
    text = "of clips, searched with its folders"
    parser.add_argument("--folder", action="append", default=[], type=parse_folder, metavar="[NAME=]DIR", help=text)
    parser.add_argument("--drop_missing", action="store_true", help="leave out rows whose clip is not here")
    parser.add_argument("--relative", action="store_true", help="paths relative to the output")
    args = parser.parse_args(argv)
    if not (args.table or args.prefix or args.folder) or any("=" not in prefix for prefix in args.prefix):
        parser.error("give --folder DIR, --prefix OLD=NEW or --table FILE")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    prefixes = [(old, new) for old, _, new in (prefix.partition("=") for prefix in args.prefix)]
    places = Places(args.table, prefixes, args.folder)
    for row in stream_rows(args.data_path):
        if row.get("audio_id") not in NO_AUDIO:
            places.claim(str(row["audio_id"]), str(row.get("dataset")))
    asked, here, first_missing, ambiguous = Counter(), Counter(), [], []
    base, doubted = args.output_path.parent.absolute(), 0
    with write_rows(args.output_path, [args.data_path]) as output:
        for number, row in enumerate(stream_rows(args.data_path), start=1):
            audio_id, dataset = row.get("audio_id"), str(row.get("dataset"))
            if audio_id not in NO_AUDIO:
                asked[dataset] += 1
                path, doubt = places.find(str(audio_id), dataset)
                if path is None:
                    named = f"row {number}: {audio_id}" + (f" ({doubt})" if doubt else "")
                    shown = ambiguous if doubt else first_missing
                    shown += [named] if len(shown) < SHOWN else []
                    doubted += bool(doubt)
                    continue
                here[dataset] += 1
                path = os.path.abspath(path)
                row["audio_id"] = os.path.relpath(path, base) if args.relative else path
            output.write(row)
        missing = asked.total() - here.total() - doubted
        if missing and not args.drop_missing:
            raise ValueError(
                f"{missing:,} of {asked.total():,} rows have a clip that is not here ({'; '.join(first_missing)}). "
                "Give more folders, or leave them out with --drop_missing."
            )
    coverage = {name: {"rows": number, "found": here[name]} for name, number in asked.most_common()}
    sources = {"folders": [f"{name}={path}" if name else str(path) for name, path in args.folder]}
    facts = {"rows": output.count, "coverage": coverage, "missing": missing, "ambiguous": doubted, **sources}
    write_recipe(args.output_path, "relocate", [args.data_path, *args.table], **facts, prefixes=args.prefix)
    for name, numbers in coverage.items():
        print(f"  {name}: {numbers['found']:,} of {numbers['rows']:,} rows")
    if doubted:
        print(
            f"  ambiguous: {doubted:,} rows ({'; '.join(ambiguous)}). Say which file by --folder NAME=DIR or --table."
        )
    print(f"{args.output_path}: {output.count:,} rows; {missing + doubted:,} left out")
    return int(doubted > 0 and not args.drop_missing)


if __name__ == "__main__":
    run(main)
