"""Finds the files of a data set: what a user means by `--data_path` and `--split`.

    all.json, all.jsonl.gz, all.parquet        a dataset file
    esc50                                      a folder of datasets' save_to_disk: one split
    esc50 --split train                        the same with several splits (a DatasetDict)
    downloads --split train                    a folder of Parquet files, as they lie on the hub
    'downloads/train-*.parquet'                Parquet files by a pattern
    owner/name --split train                   a data set on the hub, whose files are downloaded;
                                               also owner/name:CONFIG (`ltu.data.hub_dataset`)

Several files of one split are one data set, in the order of their names (of a `datasets` folder, in
the order that it states). Nothing is converted or copied.
"""

import glob
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ltu.data.dataset_parser import DatasetError
from ltu.data.hub_dataset import HubDataset, find_hub_dataset
from ltu.data.table_clip import is_parquet
from ltu.files import read_json_object

INDEX_ENDING = ".arrow"
STATE = "state.json"  # Of a split that `datasets` has saved.
SPLITS = "dataset_dict.json"  # Of a folder of several splits.
# How the names of the files of one split end on the hub.
SHARD_ENDING = re.compile(r"[-_]\d+-of-\d+(-\w+)?$")
NOT_THERE = (
    "{path} is not there. Give a JSON list, JSON lines or Parquet file (also .gz, .zst), a folder "
    "that `datasets` has saved, or Parquet files; for a data set of the hub: owner/name --split "
    "NAME."
)


@dataclass(frozen=True)
class DatasetSource:
    """The files of a data set.

    Attributes:
        path: as the user gives it; of a split of a `datasets` folder, the folder of the split.
        files: of the data set, in their order.
        kind: "json", "parquet" or "arrow" (the shards of a `datasets` folder).
        root: folder to which clips are relative; absolute where `path` is no path (the hub).
        name: for messages.
        is_local: whether an index can lie next to it.
    """

    path: Path
    files: tuple[Path, ...]
    kind: str
    root: Path
    name: str
    is_local: bool = True

    @property
    def short_name(self) -> str:
        """The name without the folder of a file."""
        root = str(self.root).rstrip(os.sep)
        return self.name.removeprefix(f"{root}{os.sep}") if self.is_local else self.name

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(status.st_size for status in self._stat())

    @property
    def mtime_ns(self) -> int:
        """The time of the last change of a file, in nanoseconds."""
        return max(status.st_mtime_ns for status in self._stat())

    def _stat(self) -> list[os.stat_result]:
        try:
            return [file.stat() for file in self.files]
        except OSError as error:
            raise DatasetError(f"{error.filename} is not there, but {self.name} has it.") from error


def index_path_of(path: str | Path, split: str | None = None) -> Path:
    """Return where the index of a data set lies: next to its file, or to the folder of its split.

    The data set need not be there.
    """
    path = Path(path)
    if split is not None and path.is_dir():
        path = path / split
    return path.with_name(f"{path.name}{INDEX_ENDING}")


def find_dataset(path: "str | Path | DatasetSource", split: str | None = None) -> DatasetSource:
    """Find the files of a data set. One that was found is returned as it is.

    Raises:
        DatasetError: they are not there, or the split is not clear. The message lists the splits.
    """
    if isinstance(path, DatasetSource):
        return path
    path = Path(path)
    if path.is_dir():
        return _find_in_folder(path, split)
    if path.is_file():
        if split is not None:
            raise DatasetError(f"--split {split}: {path} is a file, which has no splits.")
        if path.suffix == INDEX_ENDING:
            raise DatasetError(
                f"{path} is an index or one shard. Give the dataset file, or the folder that "
                "`datasets` has saved."
            )
        kind = "parquet" if is_parquet(path) else "json"
        return DatasetSource(path, (path,), kind, path.parent, str(path))
    if glob.has_magic(str(path)):
        files = [Path(found) for found in sorted(glob.glob(str(path)))]
        files = _files_of_split(path, files, split)
        return _parquet_source(path, files, _label(path, split), is_local=False)
    hub_dataset = HubDataset.parse(path)
    if hub_dataset is not None:
        files = list(_find_on_hub(hub_dataset, split))
        return _parquet_source(path, files, _label(path, split), is_local=False)
    raise DatasetError(NOT_THERE.format(path=path))


@cache
def _find_on_hub(dataset: HubDataset, split: str | None) -> tuple[Path, ...]:
    """Return the files of a data set of the hub; a process asks the hub once."""
    return tuple(find_hub_dataset(dataset, split))


def is_dataset_folder(path: Path) -> bool:
    """Return whether a folder is a data set, not one of dataset files."""
    return any((path / name).is_file() for name in (STATE, SPLITS)) or any(path.glob("*.parquet"))


def is_dataset_name(path: Path) -> bool:
    """Return whether a path is no file or folder, but a pattern or the name of a hub data set."""
    return not path.exists() and (glob.has_magic(str(path)) or HubDataset.parse(path) is not None)


def _find_in_folder(path: Path, split: str | None) -> DatasetSource:
    if (path / SPLITS).is_file():
        splits = _read_names(path / SPLITS, "splits")
        if split not in splits:
            given = f"--split {split} is none of them" if split else "choose one with --split"
            raise DatasetError(f"{path} has the splits {', '.join(splits)}; {given}.")
        return _find_saved(path / split, path.parent)
    if (path / STATE).is_file():
        if split is not None:
            own = read_json_object(path / STATE).get("_split")
            if split != own:
                raise DatasetError(
                    f"--split {split}: {path} has one split only ({own or 'without a name'}). "
                    "Leave the flag out."
                )
        return _find_saved(path, path.parent)
    files = sorted(path.glob("*.parquet"))
    if split is not None and not files:  # The hub's own conversion: CONFIG/SPLIT/0000.parquet.
        files = sorted(path.glob(f"{glob.escape(split)}/*.parquet"))
        if files:
            return _parquet_source(path, files, _label(path, split), is_local=True)
    if not files:
        raise DatasetError(
            f"{path} is a folder, but none that save_to_disk of `datasets` has written (it has "
            f"neither {STATE} nor {SPLITS}), and it has no .parquet files."
        )
    files = _files_of_split(path, files, split)
    return _parquet_source(path, files, _label(path, split), is_local=True)


def _find_saved(folder: Path, root: Path) -> DatasetSource:
    """Return the shards of one split that `datasets` has saved."""
    if not (folder / STATE).is_file():
        raise DatasetError(f"{folder} has no {STATE}. Copy the folder again, or save it again.")
    state = read_json_object(folder / STATE)
    if state.get("_data_files") == []:
        raise DatasetError(f"{folder} contains no examples.")
    if "_indices_data_files" in state:
        raise DatasetError(
            f"{folder} was saved by an old version of `datasets`, with a list of indices. Load it "
            "with a newer one and save it again."
        )
    files = []
    for name in _read_names(folder / STATE, "_data_files"):
        file = folder / name
        if not file.is_file():
            raise DatasetError(f"{file} is not there, but {STATE} names it. Copy it again.")
        files.append(file)
    return DatasetSource(folder, tuple(files), "arrow", root, str(folder))


def _read_names(path: Path, key: str) -> list[str]:
    """Return the names of splits or files in a JSON file of `datasets`."""
    value = read_json_object(path).get(key)
    names = []
    for item in value if isinstance(value, list) else []:
        if isinstance(item, dict):
            item = item.get("filename")
        # A name is that of a file in the folder; anything else would lead out of it.
        if not isinstance(item, str) or Path(item).name != item:
            raise DatasetError(f"{path}: {key!r} has {item!r}, which is no name. Save it again.")
        names.append(item)
    if not names:
        raise DatasetError(f"{path} is damaged: it has no {key!r}. Save it again.")
    return names


def _files_of_split(path: Path, files: list[Path], split: str | None) -> list[Path]:
    """Return the Parquet files of one split, by their names: train-00000-of-00002.parquet.

    Raises:
        DatasetError: there is no such split, or there are several and none is chosen.
    """
    files_of_split: dict[str, list[Path]] = {}
    for file in files:
        name = SHARD_ENDING.sub("", file.stem)
        files_of_split.setdefault("" if name.isdecimal() else name, []).append(file)
    if not files_of_split:
        raise DatasetError(NOT_THERE.format(path=path))
    if split is None and len(files_of_split) == 1:
        return files
    if split not in files_of_split:
        given = f"--split {split} is none of them" if split else "choose one with --split"
        raise DatasetError(f"{path} has the splits {', '.join(files_of_split)}; {given}.")
    return files_of_split[split]


def _parquet_source(path: Path, files: list[Path], name: str, is_local: bool) -> DatasetSource:
    for file in files:
        if not is_parquet(file):
            raise DatasetError(f"{file} is not a Parquet file. Download or write it again.")
    root = path.parent
    if not is_local:
        root = Path(os.path.commonpath([file.parent.absolute() for file in files]))
    return DatasetSource(path, tuple(files), "parquet", root, name, is_local)


def _label(path: Path, split: str | None) -> str:
    return f"{path} [{split}]" if split else str(path)
