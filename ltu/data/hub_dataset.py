"""Finds the Parquet files of a dataset on the Hugging Face hub, and downloads them once.

A dataset is named OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME:CONFIG:SPLIT, each also with
@REVISION after NAME; OWNER/NAME::SPLIT is a split of the default config.

Most datasets are Parquet in their main branch. Which file belongs to which config and split is said
by the header of README.md (`configs`) or by the names of the files, as in the library `datasets`.
The hub converts others to Parquet, in the branch refs/convert/parquet (CONFIG/SPLIT/0000.parquet).
No code of a repository is run.

The files are in the cache of huggingface_hub, so that other programs find them too. Without a
network, what is in the cache is used, if it is whole.
"""

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import constants, metadata_load, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm.auto import tqdm

NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?"
    r"(?::(?P<config>[^:]*))?(?::(?P<split>[^:]+))?"
)
# A path with such an ending is that of a file, even if there is none.
FILE_ENDINGS = re.compile(
    r"\.(?:json|jsonl|ndjson|parquet|arrow|csv|tsv|txt|gz|zst)$", re.IGNORECASE
)
CONVERTED = "refs/convert/parquet"  # The branch with the hub's own conversion.
README = "README.md"
DEFAULT = "default"  # Name of the config of a dataset that has only one.
SHARDED = re.compile(r"data/(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
COUNT_OF_FILES = re.compile(r"-\d+-of-(\d+)[^/]*$")
# Split -> words in the name of a folder or file, as in `datasets`.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
BETWEEN_WORDS = r"[-._ 0-9/]"


class _NoProgressBar(tqdm):
    """Shows nothing while files are listed; their download has a bar."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **(kwargs | {"disable": True}))


Layout = dict[str, dict[str, list[str]]]  # Config -> split -> files, in order.


@dataclass(frozen=True)
class HubDataset:
    """The name of a split of a dataset on the hub.

    Attributes:
        repo: OWNER/NAME.
        config: None for the default config.
        split: None for the only split.
        revision: a branch, tag or commit; None for the main branch.
    """

    repo: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str | os.PathLike) -> "HubDataset | None":
        """Return the dataset that a text names, or None if it is, or looks like, a path."""
        match = NAME.fullmatch(os.fspath(text))
        if match is None or os.path.lexists(text):
            return None
        repo = match["repo"]
        is_folder = repo.startswith(".") or "/." in repo
        if is_folder or FILE_ENDINGS.search(repo):
            return None
        return cls(repo, match["config"] or None, match["split"], match["revision"])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        names = [self.config or "", self.split or ""]
        return f"{self.repo}{revision}:{':'.join(names)}".rstrip(":")


@dataclass
class RepoFiles:
    """The README.md and the Parquet files of a revision of a dataset.

    Attributes:
        commit: hash of the revision.
        names: of the files within the repository, sorted.
        is_online: whether the hub listed them; if not, they are those in the cache.
    """

    commit: str
    names: list[str]
    is_online: bool


def find_hub_dataset(
    name: str | os.PathLike | HubDataset,
    split: str | None = None,
    config: str | None = None,
) -> list[Path]:
    """Return the Parquet files of a split of a dataset on the hub; download them if need be.

    Args:
        name: the dataset, as the docstring of the module says.
        split: its split, if the name has none; None for the only split.
        config: its config, if the name has none; None for the default config, or the only one.

    Returns:
        the files in the cache of the hub, in the order of the examples.

    Raises:
        ValueError: the text is no name of a dataset; there is no such config or split, or several
            and none is named; or files of the split are missing.
        OSError: the dataset does not exist, or may not be read, or is neither cached nor can be
            downloaded.
    """
    dataset = name if isinstance(name, HubDataset) else HubDataset.parse(name)
    if dataset is None:
        raise ValueError(f"{name} is not the name of a dataset on the hub: give OWNER/NAME.")
    dataset = HubDataset(
        dataset.repo, dataset.config or config, dataset.split or split, dataset.revision
    )
    # Find the files in the main branch, or in the hub's own conversion.
    found = _list_files(dataset, dataset.revision)
    layout = _layout_of(found, dataset.repo)
    if not layout and dataset.revision is None:
        found = _list_files(dataset, CONVERTED)
        layout = _layout_of_conversion(found.names)
    if not layout:
        raise ValueError(
            f"{dataset.repo} has no Parquet files that can be read. Open it with the library "
            "datasets, and give the folder that save_to_disk writes."
        )
    names = _choose(layout, dataset)
    _check_count(names, dataset)
    folder = _download(names, dataset, found)
    return [folder / name for name in names]


def _list_files(dataset: HubDataset, revision: str | None) -> RepoFiles:
    """List the files of a revision: those on the hub, or without a network those in the cache."""
    try:
        files = snapshot_download(
            dataset.repo,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[README, "*.parquet"],
            dry_run=True,
            tqdm_class=_NoProgressBar,
        )
    except DryRunError as error:
        return _list_cached_files(dataset, revision, error.__cause__)
    except HFValidationError as error:
        raise ValueError(f"{dataset.repo} is not the name of a dataset on the hub.") from error
    except HfHubHTTPError as error:
        raise _explain(dataset, revision, error) from error
    names = sorted(file.filename for file in files)
    commit = files[0].commit_hash if files else ""
    return RepoFiles(commit, names, is_online=True)


def _list_cached_files(
    dataset: HubDataset, revision: str | None, reason: BaseException | None
) -> RepoFiles:
    """List the files of a revision that are in the cache.

    Args:
        dataset: the dataset.
        revision: its revision; None for the main branch.
        reason: why the hub did not list the files.
    """
    try:
        # Whether the chosen files are all there is checked later, by `_download`.
        folder = Path(
            snapshot_download(
                dataset.repo,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[README],
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        # Without its main branch in the cache, the conversion may be there.
        if revision is None and dataset.revision is None and _is_offline(reason):
            return RepoFiles("", [], is_online=False)
        raise _explain(dataset, revision, reason) from reason
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]
    if (folder / README).is_file():
        names.append(README)
    return RepoFiles(folder.name, sorted(names), is_online=False)


def _is_offline(reason: BaseException | None) -> bool:
    return not isinstance(reason, HfHubHTTPError)


def _explain(dataset: HubDataset, revision: str | None, reason: BaseException | None) -> OSError:
    """Return the error, in one line, for a dataset that the hub does not give."""
    repo = dataset.repo
    page = f"{constants.ENDPOINT}/datasets/{repo}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(reason, GatedRepoError):
        return OSError(f"The dataset {repo} is gated: accept its terms at {page}, and {log_in}.")
    if isinstance(reason, RepositoryNotFoundError):
        return OSError(
            f"{repo} is neither a file or folder here nor a public dataset on the hub ({page}). "
            f"Check the name; if it is private, {log_in}."
        )
    if isinstance(reason, RevisionNotFoundError) and revision == CONVERTED:
        return OSError(
            f"{repo} has no Parquet files, and the hub has not converted it. Open it with the "
            "library datasets, and give the folder that save_to_disk writes."
        )
    if isinstance(reason, RevisionNotFoundError):
        return OSError(f"{repo} has no revision {revision!r}; {page} lists its branches and tags.")
    why = "the hub cannot be reached"
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE=1 forbids downloads"
    elif isinstance(reason, HfHubHTTPError):
        why = f"the hub refuses it ({' '.join(str(reason).split())[:200]})"
    return OSError(
        f"{repo} is neither a file or folder here nor in the cache of the hub "
        f"({constants.HF_HUB_CACHE}), and {why}. Where there is a network: "
        f"hf download {repo} --repo-type dataset"
    )


def _layout_of(found: RepoFiles, repo: str) -> Layout:
    """Return configs, splits and files of a revision, by README.md or else by names."""
    parquet = [name for name in found.names if name.endswith(".parquet")]
    if not parquet:
        return {}
    layout: Layout = {}
    for config in _configs_of(found, repo):
        splits = _splits_of_config(config, parquet)
        if splits:
            name = str(config.get("config_name", DEFAULT))
            layout[name] = splits
            if config.get("default"):
                layout = {DEFAULT: splits, **layout}
    return layout or {DEFAULT: _splits_by_name(parquet)}


def _configs_of(found: RepoFiles, repo: str) -> list[dict]:
    """Return the entries of `configs` in the header of README.md."""
    if README not in found.names:
        return []
    path = Path(
        snapshot_download(
            repo,
            repo_type="dataset",
            revision=found.commit,
            allow_patterns=[README],
            local_files_only=not found.is_online,
        ),
        README,
    )
    header = metadata_load(path) or {}
    configs = header.get("configs")
    if not isinstance(configs, list):
        return []
    return [config for config in configs if isinstance(config, dict)]


def _splits_of_config(config: dict, names: list[str]) -> dict[str, list[str]]:
    """Return split -> files of an entry of `configs`, without splits that have no Parquet file.

    Its `data_files` is a pattern, a list of patterns, or a list of {"split", "path"}.
    """
    folder = str(config.get("data_dir") or "").strip("./")
    prefix = f"{folder}/" if folder else ""
    given = config.get("data_files")
    if given is None:
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        splits = _splits_by_name(inside)
        return {split: [prefix + name for name in files] for split, files in splits.items()}
    if isinstance(given, dict):
        entries = list(given.items())
    elif isinstance(given, list) and given and isinstance(given[0], dict):
        entries = [(entry.get("split", "train"), entry.get("path", [])) for entry in given]
    else:
        entries = [("train", given)]
    splits = {}
    for split, patterns in entries:
        if isinstance(patterns, str):
            patterns = [patterns]
        files = _matching(names, [prefix + str(pattern) for pattern in patterns])
        if files:
            splits[str(split)] = files
    return splits


def _matching(names: list[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that match patterns, in the order of the patterns, each once."""
    found: dict[str, None] = {}  # An ordered set.
    for pattern in patterns:
        parts = pattern.removeprefix("./").split("/")
        found.update((name, None) for name in names if _is_match(name.split("/"), parts))
    return list(found)


def _is_match(name: list[str], pattern: list[str]) -> bool:
    """Return whether a path matches a pattern, part by part; `**` is any number of parts."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        # At the end it stands for all files, at any depth.
        if len(pattern) == 1:
            return bool(name)
        return any(_is_match(name[start:], pattern[1:]) for start in range(len(name)))
    if not name or not fnmatchcase(name[0], pattern[0]):
        return False
    return _is_match(name[1:], pattern[1:])


def _splits_by_name(names: list[str]) -> dict[str, list[str]]:
    """Return split -> files, by the names of the files; the rules are those of `datasets`.

    data/SPLIT-00000-of-00001.parquet comes first, then words in the names of folders, then words in
    the names of files. Otherwise all files are the split `train`.
    """
    sharded: dict[str, list[str]] = {}
    for name in names:
        match = SHARDED.fullmatch(name)
        if match:
            sharded.setdefault(match["split"], []).append(name)
    if sharded:
        return sharded
    for part in (0, 2):  # Of `name.rpartition("/")`: the folders, or the name of the file.
        splits = {}
        for split, words in SPLIT_WORDS.items():
            word = re.compile(rf"(?:^|{BETWEEN_WORDS})(?:{'|'.join(words)})(?:{BETWEEN_WORDS}|$)")
            files = [name for name in names if word.search(name.rpartition("/")[part])]
            if files:
                splits[split] = files
        if splits:
            return splits
    return {"train": names} if names else {}


def _layout_of_conversion(names: list[str]) -> Layout:
    """Return configs, splits and files of CONFIG/SPLIT/0000.parquet."""
    layout: Layout = {}
    for name in names:
        parts = name.split("/")
        if len(parts) == 3 and name.endswith(".parquet"):
            config, split, _ = parts
            layout.setdefault(config, {}).setdefault(split, []).append(name)
    return layout


def _choose(layout: Layout, dataset: HubDataset) -> list[str]:
    """Return the files of the config and split that are named, or of the only ones.

    Raises:
        ValueError: there are none, or several; the message lists the choices.
    """
    config = dataset.config
    if config is None:
        config = next(iter(layout)) if len(layout) == 1 else DEFAULT
    if config not in layout:
        asked = f"no config {dataset.config!r}" if dataset.config else "several configs"
        raise ValueError(
            f"{dataset.repo} has {asked}. Choose one, as in {dataset.repo}:CONFIG: "
            f"{_listed(layout)}."
        )
    splits = layout[config]
    split = dataset.split
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split in splits:
        return splits[split]
    asked = f"no split {split!r}" if split else "several splits"
    partial = f"partial-{split}"
    hint = ""
    if partial in splits:
        hint = f" (the hub converted only the first part of it: {partial})"
    name = HubDataset(dataset.repo, config, "SPLIT", dataset.revision)
    raise ValueError(
        f"{dataset.repo}, config {config}, has {asked}{hint}. Choose one, as in {name}: "
        f"{_listed(splits)}."
    )


def _listed(names: Iterable[str], most: int = 30) -> str:
    """Return names as one line, the first of them if they are many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_count(names: list[str], dataset: HubDataset) -> None:
    """Check names like NAME-00000-of-00005.parquet: there must be as many as they say.

    Raises:
        ValueError: files are missing.
    """
    expected: dict[str, int] = {}  # Name without its number -> how many there are.
    count: dict[str, int] = {}
    for name in names:
        match = COUNT_OF_FILES.search(name)
        if match:
            key = f"{name[: match.start()]}-of-{match[1]}"
            expected[key] = int(match[1])
            count[key] = count.get(key, 0) + 1
    for key, number in expected.items():
        if count[key] != number:
            raise ValueError(
                f"{dataset}: {count[key]} of the {number} files {key} are there. Download the rest "
                f"where there is a network: hf download {dataset.repo} --repo-type dataset"
            )


def _download(names: list[str], dataset: HubDataset, found: RepoFiles) -> Path:
    """Download files, or check that they are cached, and return the folder of the snapshot.

    Raises:
        OSError: files are missing and cannot be downloaded.
    """
    patterns = [glob.escape(name) for name in names]
    if not found.is_online:
        # Files that differ in a number belong together: the library knows if one is missing.
        for name in names:
            folder, slash, file = name.rpartition("/")
            similar = re.sub(r"\d", "[0-9]", glob.escape(file))
            patterns.append(f"{glob.escape(folder)}{slash}{similar}")
    try:
        folder = snapshot_download(
            dataset.repo,
            repo_type="dataset",
            revision=found.commit,
            allow_patterns=sorted(set(patterns)),
            local_files_only=not found.is_online,
        )
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{dataset}: files are missing in the cache of the hub ({constants.HF_HUB_CACHE}), and "
            "the hub cannot be reached. Where there is a network: "
            f"hf download {dataset.repo} --repo-type dataset"
        ) from error
    except HfHubHTTPError as error:
        raise _explain(dataset, dataset.revision, error) from error
    missing = [name for name in names if not Path(folder, name).is_file()]
    if missing:
        raise OSError(f"{dataset}: {missing[0]} was not downloaded to {folder}. Run it again.")
    return Path(folder)
