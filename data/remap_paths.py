"""Point the audio_ids of a file at local clips.

    python -m data.remap_paths --data_path A.json --output_path B.json --folder audioset=/disk/as --folder vggsound=/disk/v
    python -m data.remap_paths --data_path A.json --output_path B.json --prefix /data/sls/audioset=/disk/audioset
    python -m data.remap_paths --data_path A.json --output_path B.json --table OUT/audio_ids.csv

Notable:
- Tried in this order: a table (its first column is an id or path, its second a path, relative to the table's folder;
  `data.prepare_audio` writes one), a prefix, a folder. In folders, clips are found by name: without folder and ending,
  a YouTube id with or without the letter Y in front.
- Of several files of that name, those count that share most of their last folders with the id, then the one of just
  its name. A file that ids in different folders ask for is that of those who share most folders with it, at least one.
- Where id and file both have times (`Y<id>_30.000_40.000`, `<id>_000030`), these must agree. A file without times
  serves one segment of its video: if the rows ask for several, none of them gets it.
- `--folder NAME=DIR` has clips of the datasets that NAME begins or matches as a pattern ("audioset": also as_2m,
  as_20k, as_strong). Those look there first, and take from another named folder what has their times, nothing else.
  So do datasets that no folder is named after.
- A row that several files or none for certain fits is ambiguous: left out, counted and named; the exit is then 1, but
  not with --drop_missing.
- A clip counts only if its file is there. Rows without a clip are left out with --drop_missing, else it is an error.
- Memory grows with the number of local files (some 400 bytes each), not with the rows, which are read twice.
  `--relative` writes paths relative to the output.
"""

import argparse
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from data.audio_ids import NO_AUDIO, SUFFIXES, is_same_segment, read_cells, segment, stem, youtube
from data.command_line import command_parser
from data.provenance import write_provenance, write_rows
from ltu.data.dataset_files import stream_rows
from ltu.files import run_command

HEADERS = {("id", "audio_id"), ("audio_id", "path"), ("audio_id", "file")}
SHOWN = 5


class Found(NamedTuple):
    """The files that a clip may be, or two of them.

    `is_exact`: their names have its times (or both have none). `is_told`: a table or prefix says so. `is_foreign`: only
    folders of other datasets have them.
    """

    paths: list[str]
    is_exact: bool = True
    is_told: bool = False
    is_foreign: bool = False


def is_of(dataset: str, label: str) -> bool:
    """Whether a folder of that name has the clips of a dataset."""
    dataset, label = dataset.lower(), label.lower()
    return dataset.startswith((label, "as_") if label == "audioset" else label) or fnmatchcase(
        dataset, label
    )


def backwards(path: str) -> str:
    """The folders of a path from the last on, a/b/c.wav -> b/a/: those with the same last folders sort together."""
    return "".join(f"{folder}/" for folder in path.replace("\\", "/").split("/")[-2::-1] if folder)


def common_start(one: str, other: str) -> str:
    """What two of `backwards` have in common."""
    common = os.path.commonprefix([one, other])
    return common[: common.rfind("/") + 1]


def shared_folders(audio_id: str, path: str) -> int:
    """How many last folders two paths share."""
    return common_start(backwards(audio_id), backwards(path)).count("/")


def two_of(paths: Iterable[str]) -> list[str]:
    """The first path, and the first one of another file."""
    found: dict[str, str] = {}
    for path in paths:
        found.setdefault(os.path.realpath(path), path)
        if len(found) == 2:
            break
    return list(found.values())


class Places:
    """Where clips lie here; `labels[n]` is the name of the nth folder, or ""."""

    def __init__(
        self, tables: list[Path], prefixes: list[tuple[str, str]], folders: list[tuple[str, Path]]
    ):
        self.prefixes, self.labels = prefixes, [label for label, _ in folders]
        self.table: dict[str, str] = {}
        self.files: list[dict[str, list[tuple[str, str]]]] = [
            {} for _ in folders
        ]  # of each: key -> (folder, name)
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
                        for key in self._keys(name):
                            self.files[number].setdefault(key, []).append((place, name))
        self.look_up = lru_cache(maxsize=2**17)(self._look_up)
        self.named = lru_cache(maxsize=2**14)(self._named)

    @staticmethod
    def _keys(name: str) -> list[str]:
        """What a file is found by: its name; with times, its video and each reading of the start, or any part of it."""
        times, key = segment(name), youtube(name) or stem(name)
        return [f"{key}/{start}" for start in times[0]] + [f"{key}/"] if times else [key]

    def _read_table(self, path: Path) -> None:
        for number, cells in read_cells(path):
            if len(cells) != 2:
                raise ValueError(
                    f"{path}, line {number}: {len(cells)} cells, not an id and its path: {cells}"
                )
            if number > 1 or tuple(cells) not in HEADERS:
                file = str(path.parent / cells[1])
                if self.table.setdefault(cells[0], file) != file:
                    known = f"{cells[0]!r} is {self.table[cells[0]]} already. Relocate each dataset by its own table."
                    raise ValueError(f"{path}, line {number}: {known}")

    def _look_up(self, audio_id: str, dataset: str) -> Found:
        name, video = stem(audio_id), youtube(audio_id)
        of_video = self.table.get(video) if video else None
        told = [self.table.get(audio_id)]
        told += [
            new + audio_id[len(old) :] for old, new in self.prefixes if audio_id.startswith(old)
        ]
        likely = [self.table.get(name), of_video if segment(audio_id) is None else None]
        for path in [*told[:1], *likely, *told[1:]]:
            if path and os.path.isfile(path):
                return Found([path], is_told=path in told)
        if of_video and os.path.isfile(of_video):
            return Found([of_video], False)
        return self._in_folders(audio_id, dataset, video or name)

    def _in_folders(self, audio_id: str, dataset: str, key: str) -> Found:
        labels = dict(enumerate(self.labels))
        own = [number for number, label in labels.items() if label and is_of(dataset, label)]
        unnamed = [number for number, label in labels.items() if not label]
        foreign = [number for number in labels if number not in (*own, *unnamed)]
        times = segment(audio_id)
        same = [f"{key}/{start}" for start in times[0]] if times else [key]
        other = [key] if times else [f"{key}/"]
        # Without times, another dataset has another part of the video, or another clip of the name.
        for folders, keys in (
            (own, same),
            (own, other),
            (unnamed + foreign * bool(times), same),
            (unnamed, other),
        ):
            if paths := self._nearest(audio_id, folders, keys, keys is same):
                return Found(paths, keys is same)
        return Found(
            [] if own else self._nearest(audio_id, foreign, [*same, *other], False), is_foreign=True
        )

    def _named(self, number: int, key: str) -> list[tuple[str, list[tuple[str, str]]]]:
        """The files of a key: those of each name, as (backwards, path) in order."""
        files = sorted(
            (name, backwards(f"{place}/"), place) for place, name in self.files[number].get(key, ())
        )
        groups = groupby(files, key=lambda file: file[0])
        return [
            (name, [(order, f"{place}/{name}") for _, order, place in group])
            for name, group in groups
        ]

    def _nearest(
        self, audio_id: str, folders: list[int], keys: list[str], is_timed: bool
    ) -> list[str]:
        """The file of these keys that shares most folders with an id, or two of them, in the time of a search."""
        own_name, is_video = (
            audio_id.replace("\\", "/").rsplit("/", 1)[-1],
            youtube(audio_id) is not None,
        )
        order, best, found = "" if is_video else backwards(audio_id), (-1, False), []
        for name, files in (
            group for number in folders for key in keys for group in self.named(number, key)
        ):
            if is_timed and not is_same_segment(audio_id, name):
                continue
            at = bisect_left(files, (order,))
            shared = max(
                (common_start(order, near) for near, _ in files[max(0, at - 1) : at + 1]), key=len
            )
            # Without times, the name of a video does not say which part of it a file is.
            rank = (
                shared.count("/"),
                name == own_name and not (is_video and segment(audio_id) is None),
            )
            if rank >= best:
                span = range(
                    bisect_left(files, (shared,)), bisect_left(files, (shared + "\U0010ffff",))
                )
                found = two_of(
                    [*(found if rank == best else []), *two_of(files[n][1] for n in span)]
                )
                best = rank
        return found

    def claim(self, audio_id: str, dataset: str) -> None:
        """Take note of who asks for a file by another name: its folders, the whole video or one or more segments."""
        paths, is_exact, _, is_foreign = self.look_up(audio_id, dataset)
        is_video = youtube(audio_id) is not None
        if len(paths) != 1 or is_foreign or (is_video and is_exact != (segment(audio_id) is None)):
            return
        first = self.claims.setdefault(paths[0], audio_id)
        one, other = (backwards(name) + stem(name) for name in (first, audio_id))
        if not is_same_segment(first, audio_id) if is_video else one != other:
            self.shared.add(paths[0])
            self.claims[paths[0]] = max(
                first, audio_id, key=lambda name: shared_folders(name, paths[0])
            )

    def find(self, audio_id: str, dataset: str) -> tuple[str | None, str]:
        """The file of a clip; or None and, unless there is none at all, why it is not certain. `claim` all before."""
        paths, is_exact, is_told, is_foreign = self.look_up(audio_id, dataset)
        if len(paths) > 1:
            return None, f"{paths[0]} or {paths[1]}"
        if paths and is_foreign:
            return None, f"{paths[0]}, in the folder of another data set"
        if paths and paths[0] in self.shared and not is_told:
            if youtube(audio_id):
                if not is_exact and segment(audio_id):
                    return None, f"{paths[0]}, which has no times, or another segment"
            elif shared_folders(audio_id, paths[0]) < max(
                1, shared_folders(self.claims[paths[0]], paths[0])
            ):
                return None, f"{paths[0]}, which {self.claims[paths[0]]} may be too"
        return (paths[0] if paths else None), ""


def parse_folder(text: str) -> tuple[str, Path]:
    label, sign, folder = text.partition("=")
    return (label, Path(folder)) if sign and not os.path.isdir(text) else ("", Path(text))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--table", action="append", default=[], type=Path, help="CSV or TSV of two columns"
    )
    parser.add_argument("--prefix", action="append", default=[], metavar="OLD=NEW")
    text = "of clips, searched with its folders"
    parser.add_argument(
        "--folder", action="append", default=[], type=parse_folder, metavar="[NAME=]DIR", help=text
    )
    parser.add_argument(
        "--drop_missing", action="store_true", help="leave out rows whose clip is not here"
    )
    parser.add_argument("--relative", action="store_true", help="paths relative to the output")
    args = parser.parse_args(argv)
    if not (args.table or args.prefix or args.folder) or any(
        "=" not in prefix for prefix in args.prefix
    ):
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
    facts = {
        "rows": output.count,
        "coverage": coverage,
        "missing": missing,
        "ambiguous": doubted,
        **sources,
    }
    write_provenance(
        args.output_path, "relocate", [args.data_path, *args.table], **facts, prefixes=args.prefix
    )
    for name, numbers in coverage.items():
        print(f"  {name}: {numbers['found']:,} of {numbers['rows']:,} rows")
    if doubted:
        print(
            f"  ambiguous: {doubted:,} rows ({'; '.join(ambiguous)}). Say which file by --folder NAME=DIR or --table."
        )
    print(f"{args.output_path}: {output.count:,} rows; {missing + doubted:,} left out")
    return int(doubted > 0 and not args.drop_missing)


if __name__ == "__main__":
    run_command(main)
