r"""Replaces the audio_ids of a dataset file by the paths of local clips.

    python -m data.remap_paths --data_path A.json --output_path B.json \
        --folder audioset=/disk/as --folder vggsound=/disk/v
    python -m data.remap_paths --data_path A.json --output_path B.json \
        --prefix /data/sls/audioset=/disk/audioset
    python -m data.remap_paths --data_path A.json --output_path B.json --table OUT/audio_ids.csv

A clip is looked up in tables first, then by prefixes, then in folders. A table has two columns, an
id or path and a path relative to the folder of the table; `data.prepare_audio` writes one. In
folders, clips are found by their name without folder and suffix, and a YouTube id with or without
the letter Y in front.

If several files have the name, the candidates are those that share the most last folders with the
audio_id; among these, a file with exactly the name of the audio_id is preferred. If audio_ids in
different folders match the same file, it belongs to those that share the most folders with it, and
at least one.

If audio_id and file both have times (`Y<id>_30.000_40.000`, `<id>_000030`), these must agree. A
file without times can be only one segment of its video: if the examples name several segments, none
of them gets the file.

`--folder NAME=DIR` is the folder of the datasets that NAME begins or matches as a pattern
("audioset" also matches as_2m, as_20k and as_strong). Clips of these datasets are looked up there
first. In the named folders of other datasets only files with the times of the audio_id are used.
The same is true for datasets without a named folder.

An example whose clip is uncertain, because several files match or a single one may be another clip,
is ambiguous: it is left out, counted and listed. The exit code is then 1, but 0 with
--drop_missing. Examples whose clip was not found are left out with --drop_missing; otherwise they
are an error. A clip is found only if its file exists.

The memory grows with the number of local files (some 400 bytes each), not with the number of
examples, which are read twice. `--relative` writes paths relative to the output.

A clip in a table (TABLE_FILE#COLUMN[ROW]) is found by --prefix, if the table is there:
--prefix =DIR/ puts a folder in front of every audio_id.
"""

import argparse
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from data.audio_ids import SUFFIXES, is_same_segment, read_cells, segment, stem, youtube
from data.command_line import command_parser, source_of
from data.provenance import write_examples, write_provenance
from ltu.data.check_examples import NO_AUDIO
from ltu.data.columns import read_column_flags
from ltu.data.dataset_io import typed_examples
from ltu.data.table_clip import TableClip
from ltu.files import run_command

HEADERS = {("id", "audio_id"), ("audio_id", "path"), ("audio_id", "file")}
SHOWN = 5  # Missing or ambiguous examples that are listed.
LAST_CHARACTER = "\U0010ffff"  # Sorts after any other.


class Candidates(NamedTuple):
    """The files that may be a clip.

    Attributes:
        paths: none, one, or two of several.
        is_exact: whether the names of the files have the times of the clip (or both have none).
        is_explicit: whether a table or prefix names the file.
        is_foreign: whether the files were found only in folders of other datasets.
    """

    paths: list[str]
    is_exact: bool = True
    is_explicit: bool = False
    is_foreign: bool = False


class NamedFiles(NamedTuple):
    """Files with the same name.

    Attributes:
        name: the name.
        files: (reversed folders, path) of each, sorted.
    """

    name: str
    files: list[tuple[str, str]]


@dataclass
class ClipFolder:
    """A folder of clips.

    Attributes:
        label: name of its datasets, or "" if it may have clips of any.
        files: key of a file -> (folder, name) of every file with the key; see `file_keys`.
    """

    label: str
    files: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def is_of(dataset: str, label: str) -> bool:
    """Return whether a folder with this label has the clips of a dataset."""
    dataset = dataset.lower()
    label = label.lower()
    prefixes = (label, "as_") if label == "audioset" else label
    return dataset.startswith(prefixes) or fnmatchcase(dataset, label)


def reversed_folders(path: str) -> str:
    """Return the folders of a path from the last one on, such as b/a/ for a/b/c.wav.

    Paths that share their last folders are neighbours when they are sorted by this.
    """
    folders = path.replace("\\", "/").split("/")[-2::-1]
    return "".join(f"{folder}/" for folder in folders if folder)


def common_start(one: str, other: str) -> str:
    """Return the whole folders that two results of `reversed_folders` begin with."""
    common = os.path.commonprefix([one, other])
    return common[: common.rfind("/") + 1]


def shared_folders(audio_id: str, path: str) -> int:
    """Return how many last folders two paths share."""
    return common_start(reversed_folders(audio_id), reversed_folders(path)).count("/")


def two_of(paths: Iterable[str]) -> list[str]:
    """Return the first path, and the first one that is another file."""
    found: dict[str, str] = {}
    for path in paths:
        found.setdefault(os.path.realpath(path), path)
        if len(found) == 2:
            break
    return list(found.values())


def file_keys(name: str) -> list[str]:
    """Return the keys that a file is found by.

    Without times the key is the YouTube id or the name. With times the keys are `id/start` for
    every possible start, and `id/` for any part of the video.
    """
    key = youtube(name) or stem(name)
    times = segment(name)
    if times is None:
        return [key]
    return [f"{key}/{start}" for start in times.starts] + [f"{key}/"]


def is_clip(path: str) -> bool:
    """Return whether a path is that of a file, or the name of a clip in a table that is there."""
    clip = TableClip.parse(path)
    return os.path.isfile(path if clip is None else clip.file)


class ClipLocator:
    """Finds local clips.

    Args:
        tables: files with an id and a path in each line.
        prefixes: (old, new) starts of paths.
        folders: (label, path) of folders, which are searched with their subfolders.

    Raises:
        ValueError: a table is malformed or contradicts another, or a folder does not exist.
    """

    def __init__(
        self, tables: list[Path], prefixes: list[tuple[str, str]], folders: list[tuple[str, Path]]
    ):
        self.prefixes = prefixes
        self.table: dict[str, str] = {}  # id -> path
        for path in tables:
            self._read_table(path)
        self.folders = [self._scan(label, folder) for label, folder in folders]
        # File that ids in several folders, or of several segments, match.
        self.shared: set[str] = set()
        # File -> the id that shares the most folders with it.
        self.claims: dict[str, str] = {}
        self.look_up = lru_cache(maxsize=2**17)(self._look_up)
        self.files_by_name = lru_cache(maxsize=2**14)(self._files_by_name)

    @staticmethod
    def _scan(label: str, folder: Path) -> ClipFolder:
        if not folder.is_dir():
            raise ValueError(f"--folder {folder} is not a folder.")
        scanned = ClipFolder(label)
        for subfolder, _, names in os.walk(folder, followlinks=True):
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() not in SUFFIXES:
                    continue
                for key in file_keys(name):
                    scanned.files.setdefault(key, []).append((subfolder, name))
        return scanned

    def _read_table(self, path: Path) -> None:
        for number, cells in read_cells(path):
            if len(cells) != 2:
                raise ValueError(
                    f"{path}, line {number}: {len(cells)} cells instead of an id and its path: "
                    f"{cells}"
                )
            if number == 1 and tuple(cells) in HEADERS:
                continue
            audio_id, name = cells
            file = str(path.parent / name)
            known = self.table.setdefault(audio_id, file)
            if known != file:
                raise ValueError(
                    f"{path}, line {number}: {audio_id!r} is {known} already. Remap each dataset "
                    "with its own table."
                )

    def _look_up(self, audio_id: str, dataset: str) -> Candidates:
        name = stem(audio_id)
        video = youtube(audio_id)
        # Table entries that name the clip, its name, or its video.
        by_id = self.table.get(audio_id)
        by_name = self.table.get(name)
        by_video = self.table.get(video) if video else None
        by_prefix = []
        for old, new in self.prefixes:
            if audio_id.startswith(old):
                by_prefix.append(new + audio_id[len(old) :])

        explicit = [by_id, *by_prefix]
        paths = [by_id, by_name]
        if segment(audio_id) is None:
            paths.append(by_video)
        for path in [*paths, *by_prefix]:
            if path and is_clip(path):
                return Candidates([path], is_explicit=path in explicit)
        # A table entry for the video says nothing about the segment.
        if by_video and os.path.isfile(by_video):
            return Candidates([by_video], is_exact=False)
        return self._in_folders(audio_id, dataset, video or name)

    def _in_folders(self, audio_id: str, dataset: str, key: str) -> Candidates:
        own = []
        unnamed = []
        foreign = []
        for number, folder in enumerate(self.folders):
            if not folder.label:
                unnamed.append(number)
            elif is_of(dataset, folder.label):
                own.append(number)
            else:
                foreign.append(number)

        times = segment(audio_id)
        if times is None:
            exact_keys = [key]
            other_keys = [f"{key}/"]
            # Without times, another dataset has another part of the video, or another clip with
            # the same name.
            others = unnamed
        else:
            exact_keys = [f"{key}/{start}" for start in times.starts]
            other_keys = [key]
            others = unnamed + foreign
        searches = [
            (own, exact_keys, True),
            (own, other_keys, False),
            (others, exact_keys, True),
            (unnamed, other_keys, False),
        ]
        for folders, keys, is_exact in searches:
            paths = self._nearest(audio_id, folders, keys, is_exact)
            if paths:
                return Candidates(paths, is_exact)
        paths = []
        if not own:
            paths = self._nearest(audio_id, foreign, [*exact_keys, *other_keys], False)
        return Candidates(paths, is_foreign=True)

    def _files_by_name(self, number: int, key: str) -> list[NamedFiles]:
        """Return the files of a folder, by its number, that have a key."""
        files = []
        for subfolder, name in self.folders[number].files.get(key, ()):
            files.append((name, reversed_folders(f"{subfolder}/"), subfolder))
        files.sort()
        groups = []
        for name, group in groupby(files, key=lambda file: file[0]):
            paths = [(order, f"{subfolder}/{name}") for _, order, subfolder in group]
            groups.append(NamedFiles(name, paths))
        return groups

    def _nearest(
        self, audio_id: str, folders: list[int], keys: list[str], is_exact: bool
    ) -> list[str]:
        """Return the file that shares the most last folders with an id, or two of several.

        A binary search in the sorted files bounds the time when many have the same name.

        Args:
            audio_id: the id.
            folders: numbers of the folders to search.
            keys: keys of the files.
            is_exact: whether the times of the file must be those of the id.
        """
        own_name = audio_id.replace("\\", "/").rsplit("/", 1)[-1]
        is_video = youtube(audio_id) is not None
        # Without times, the name of a video does not say which part of it a file is.
        can_prefer_name = not (is_video and segment(audio_id) is None)
        # The folders of a video do not matter.
        order = "" if is_video else reversed_folders(audio_id)
        # Collect the files with these keys, grouped by their names.
        groups = []
        for number in folders:
            for key in keys:
                groups += self.files_by_name(number, key)

        best = (-1, False)
        found: list[str] = []
        for name, files in groups:
            if is_exact and not is_same_segment(audio_id, name):
                continue
            # One of the two neighbours shares the most folders with the id.
            index = bisect_left(files, (order,))
            neighbours = files[max(0, index - 1) : index + 1]
            starts = [common_start(order, neighbour) for neighbour, _ in neighbours]
            shared = max(starts, key=len)
            rank = (shared.count("/"), can_prefer_name and name == own_name)
            if rank < best:
                continue
            # All files that share these folders are neighbours: take one of them, or two.
            begin = bisect_left(files, (shared,))
            end = bisect_left(files, (shared + LAST_CHARACTER,))
            nearest = two_of(files[index][1] for index in range(begin, end))
            found = two_of([*found, *nearest] if rank == best else nearest)
            best = rank
        return found

    def claim(self, audio_id: str, dataset: str) -> None:
        """Record which file an id matches, to find out whether different clips share it."""
        candidates = self.look_up(audio_id, dataset)
        if len(candidates.paths) != 1 or candidates.is_foreign:
            return
        path = candidates.paths[0]
        is_video = youtube(audio_id) is not None
        # A file with times is one segment: no other one can share it.
        has_file_times = candidates.is_exact != (segment(audio_id) is None)
        if is_video and has_file_times:
            return
        first = self.claims.setdefault(path, audio_id)
        if is_video:
            is_same = is_same_segment(first, audio_id)
        else:
            first_name = reversed_folders(first) + stem(first)
            is_same = first_name == reversed_folders(audio_id) + stem(audio_id)
        if not is_same:
            self.shared.add(path)
            nearest = max(first, audio_id, key=lambda name: shared_folders(name, path))
            self.claims[path] = nearest

    def find(self, audio_id: str, dataset: str) -> tuple[str | None, str]:
        """Return the file of a clip, after `claim` was called for all clips.

        Returns:
            path and ""; None and the reason why the file is not certain; or None and "" if there
            is no file.
        """
        candidates = self.look_up(audio_id, dataset)
        if not candidates.paths:
            return None, ""
        path = candidates.paths[0]
        if len(candidates.paths) > 1:
            return None, f"{path} or {candidates.paths[1]}"
        if candidates.is_foreign:
            return None, f"{path}, in the folder of another dataset"
        if path not in self.shared or candidates.is_explicit:
            return path, ""
        if youtube(audio_id):
            if not candidates.is_exact and segment(audio_id):
                return None, f"{path}, which has no times, or another segment"
            return path, ""
        other = self.claims[path]
        if shared_folders(audio_id, path) < max(1, shared_folders(other, path)):
            return None, f"{path}, which {other} may be too"
        return path, ""


def parse_folder(text: str) -> tuple[str, Path]:
    """Parse NAME=DIR or DIR into (label, path)."""
    label, sign, folder = text.partition("=")
    if sign and not os.path.isdir(text):
        return label, Path(folder)
    return "", Path(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--table",
        action="append",
        default=[],
        type=Path,
        help="A CSV or TSV file with an id and a path in each line.",
    )
    parser.add_argument(
        "--prefix",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="Replace the start OLD of an audio_id by NEW.",
    )
    parser.add_argument(
        "--folder",
        action="append",
        default=[],
        type=parse_folder,
        metavar="[NAME=]DIR",
        help="A folder of clips, which is searched with its subfolders.",
    )
    parser.add_argument(
        "--drop_missing", action="store_true", help="Leave out examples whose clip was not found."
    )
    parser.add_argument(
        "--relative", action="store_true", help="Write paths relative to the output."
    )
    args = parser.parse_args(argv)
    has_source = args.table or args.prefix or args.folder
    if not has_source or any("=" not in prefix for prefix in args.prefix):
        parser.error("give --folder DIR, --prefix OLD=NEW or --table FILE")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    prefixes = []
    for prefix in args.prefix:
        old, _, new = prefix.partition("=")
        prefixes.append((old, new))
    locator = ClipLocator(args.table, prefixes, args.folder)
    columns = read_column_flags(args)
    source = source_of(args)
    # Read the examples once to find out which files several clips match.
    for example in typed_examples(source, columns):
        if example.get("audio_id") not in NO_AUDIO:
            locator.claim(str(example["audio_id"]), str(example.get("dataset")))

    # Read them again and replace every audio_id by the path of its file.
    total: Counter[str] = Counter()  # Examples with audio, by dataset.
    found: Counter[str] = Counter()
    num_missing = 0
    num_ambiguous = 0
    first_missing: list[str] = []
    first_ambiguous: list[str] = []
    base = args.output_path.parent.absolute()
    with write_examples(args.output_path, [source]) as output:
        for number, example in enumerate(typed_examples(source, columns), start=1):
            audio_id = example.get("audio_id")
            if audio_id in NO_AUDIO:
                output.write(example)
                continue
            dataset = str(example.get("dataset"))
            total[dataset] += 1
            path, reason = locator.find(str(audio_id), dataset)
            if path is not None:
                found[dataset] += 1
                path = os.path.abspath(path)
                example["audio_id"] = os.path.relpath(path, base) if args.relative else path
                output.write(example)
            elif reason:
                num_ambiguous += 1
                if len(first_ambiguous) < SHOWN:
                    first_ambiguous.append(f"example {number}: {audio_id} ({reason})")
            else:
                num_missing += 1
                if len(first_missing) < SHOWN:
                    first_missing.append(f"example {number}: {audio_id}")
        if num_missing and not args.drop_missing:
            raise ValueError(
                f"{num_missing:,} of {total.total():,} examples have a clip that was not found "
                f"({'; '.join(first_missing)}). Give more folders, or leave the examples out with "
                "--drop_missing."
            )

    # Record and print the coverage.
    coverage = {}
    for dataset, number in total.most_common():
        coverage[dataset] = {"num_examples": number, "found": found[dataset]}
    facts = {
        "num_examples": output.count,
        "coverage": coverage,
        "missing": num_missing,
        "ambiguous": num_ambiguous,
        "folders": [f"{label}={path}" if label else str(path) for label, path in args.folder],
        "prefixes": args.prefix,
    }
    write_provenance(args.output_path, "remap_paths", [source, *args.table], **facts)
    for dataset, numbers in coverage.items():
        print(f"  {dataset}: {numbers['found']:,} of {numbers['num_examples']:,} examples")
    if num_ambiguous:
        print(
            f"  ambiguous: {num_ambiguous:,} examples ({'; '.join(first_ambiguous)}). Select the "
            "file with --folder NAME=DIR or --table."
        )
    num_left_out = num_missing + num_ambiguous
    print(f"{args.output_path}: {output.count:,} examples; {num_left_out:,} left out")
    return int(num_ambiguous > 0 and not args.drop_missing)


if __name__ == "__main__":
    run_command(main)
