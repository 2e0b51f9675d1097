"""Datasets on the hub: which files a config and a split have, and what is said if they have none.

The server is `tests.fake_hub`; the client is the real huggingface_hub.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ltu.data import hub_dataset
from ltu.data.hub_dataset import HubDataset
from tests.fake_hub import FakeHub, open_fake_hub

# Finds datasets, and prints for each its files or the error. The module is loaded by its path:
# importing the package would import transformers, which takes most of the time.
FIND = """
import importlib.util
import json
import sys
spec = importlib.util.spec_from_file_location("hub_dataset", {module!r})
hub_dataset = importlib.util.module_from_spec(spec)
sys.modules["hub_dataset"] = hub_dataset
spec.loader.exec_module(hub_dataset)
found = []
for name in {names!r}:
    try:
        paths = hub_dataset.find_hub_dataset(name)
    except (OSError, ValueError) as error:
        found.append(str(error))
    else:
        assert all(path.read_bytes()[:4] == b"PAR1" for path in paths)
        found.append([str(path).split("/snapshots/")[1].split("/", 1)[1] for path in paths])
print(json.dumps(found))
"""


def parquet(number: int = 0) -> bytes:
    """Return a Parquet file of one row."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"number": [number]}), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with open_fake_hub() as hub:
        yield hub


def put(hub: FakeHub, repo: str, *names: str, revision: str = "main", readme: str = "") -> None:
    """Put Parquet files, and a README.md if there is text for it, into a dataset."""
    for number, name in enumerate(names):
        hub.dataset_files[repo, revision, name] = parquet(number)
    if readme:
        hub.dataset_files[repo, revision, "README.md"] = f"---\n{readme}\n---\n".encode()


def find(hub: FakeHub, home: Path, *names: str, **variables: str) -> list[list[str] | str]:
    """Return the files of each dataset, or its error, from a process of its own."""
    found = hub.run(
        FIND.format(module=hub_dataset.__file__, names=names), HF_HOME=str(home), **variables
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize(
    "text, dataset",
    [
        ("owner/name", HubDataset("owner/name")),
        ("owner/name:clean", HubDataset("owner/name", "clean")),
        ("owner/name:clean:train.100", HubDataset("owner/name", "clean", "train.100")),
        ("owner/name::test", HubDataset("owner/name", None, "test")),
        ("owner/name@v1:clean", HubDataset("owner/name", "clean", None, "v1")),
        ("owner/name@refs/pr/1", HubDataset("owner/name", revision="refs/pr/1")),
        ("data/train.json", None),
        ("data/train.jsonl.gz", None),
        ("./owner/name", None),
        ("../owner/name", None),
        ("/owner/name", None),
        ("name", None),
    ],
)
def test_a_name_of_the_hub_is_told_from_a_path(text, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert HubDataset.parse(text) == dataset
    if dataset is not None:
        assert HubDataset.parse(str(dataset)) == dataset


def test_a_folder_of_that_name_is_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert HubDataset.parse("owner/name") is None


def test_splits_by_the_names_of_files(hub, tmp_path):
    """The three rules of `datasets`, in their order: shards in data/, folders, files."""
    shards = [f"data/train-0000{number}-of-00002.parquet" for number in (1, 0)]
    put(hub, "o/shards", *shards, "data/test-00000-of-00001.parquet", "other.parquet")
    put(hub, "o/folders", "en/train/b.parquet", "en/train/a.parquet", "dev/train-x.parquet")
    put(hub, "o/files", "my-train-1.parquet", "my_test.parquet", "pretrained/x.parquet")
    put(hub, "o/all", "b.parquet", "a.parquet")

    expected = {
        "o/shards::train": sorted(shards),
        "o/folders::train": ["en/train/a.parquet", "en/train/b.parquet"],
        "o/folders::validation": ["dev/train-x.parquet"],
        "o/files::train": ["my-train-1.parquet"],
        "o/all": ["a.parquet", "b.parquet"],
    }
    assert find(hub, tmp_path, *expected) == list(expected.values())


def test_configs_of_the_readme(hub, tmp_path):
    readme = """configs:
- config_name: clean
  data_files:
  - split: train.100
    path: clean/train.100/*.parquet
  - split: test
    path: [clean/test/1.parquet, clean/test/0.parquet]
- config_name: other
  default: true
  data_files: "other/**"
- config_name: raw
  data_files: raw.csv"""
    names = ["clean/train.100/0.parquet", "clean/test/0.parquet", "clean/test/1.parquet"]
    put(hub, "o/readme", *names, "other/deep/x.parquet", "clean/train.100/sub/0.parquet")
    put(hub, "o/readme", readme=readme)

    clean, test, other, error = find(
        hub, tmp_path, "o/readme:clean:train.100", "o/readme:clean:test", "o/readme", "o/readme:raw"
    )
    assert clean == ["clean/train.100/0.parquet"]
    assert test == ["clean/test/1.parquet", "clean/test/0.parquet"]
    assert other == ["other/deep/x.parquet"]
    assert "no config 'raw'" in error and "clean, other" in error


def test_the_conversion_of_the_hub(hub, tmp_path):
    hub.dataset_files["o/wav", "main", "train/a.wav"] = b"RIFF"
    names = ["default/train/0001.parquet", "default/train/0000.parquet"]
    put(hub, "o/wav", *names, "default/partial-test/0000.parquet", revision="refs/convert/parquet")
    train, error, part = find(hub, tmp_path, "o/wav::train", "o/wav::test", "o/wav::partial-test")
    assert train == sorted(names)
    assert "no split 'test' (the hub converted only the first part of it: partial-test)" in error
    assert part == ["default/partial-test/0000.parquet"]


def test_what_cannot_be_chosen_is_one_line_with_the_choices(hub, tmp_path):
    readme = """configs:
- {config_name: en, data_dir: en}
- {config_name: de, data_dir: de}"""
    put(hub, "o/two", "en/train/0.parquet", "de/train/0.parquet", "de/test/0.parquet")
    put(hub, "o/two", readme=readme)
    put(hub, "o/cut", "data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet")
    put(hub, "o/gated", "train.parquet")
    hub.gated.add("o/gated")
    hub.dataset_files["o/script", "main", "script.py"] = b""

    expected = {
        "o/two": "several configs. Choose one, as in o/two:CONFIG: en, de.",
        "o/two:fr": "no config 'fr'. Choose one, as in o/two:CONFIG: en, de.",
        "o/two:de": "has several splits. Choose one, as in o/two:de:SPLIT: train, test.",
        "o/two:de:dev": "has no split 'dev'. Choose one, as in o/two:de:SPLIT: train, test.",
        "o/cut": "2 of the 3 files data/train-of-00003 are there",
        "o/gated": "is gated: accept its terms at",
        "o/unknown": "nor a public dataset on the hub",
        "o/script": "has no Parquet files, and the hub has not converted it",
        "o/two@v9:de": "has no revision 'v9'",
    }
    errors = find(hub, tmp_path, *expected)
    for (name, part), error in zip(expected.items(), errors, strict=True):
        assert isinstance(error, str) and part in error, (name, error)
        assert "\n" not in error


def test_it_is_downloaded_once_and_then_works_offline(hub, tmp_path):
    shards = [f"data/train-0000{number}-of-00002.parquet" for number in (0, 1)]
    put(hub, "o/once", *shards, "data/test-00000-of-00001.parquet", readme="license: mit")
    hub.downloads.clear()
    name = "o/once::train"
    assert find(hub, tmp_path, name, name) == [shards, shards]
    assert sorted(hub.downloads) == sorted([*shards, "README.md"])  # And not the other split.
    hub.downloads.clear()
    assert find(hub, tmp_path, name, HF_HUB_OFFLINE="1") == [shards]
    assert find(hub, tmp_path, name, HF_ENDPOINT="http://127.0.0.1:9") == [shards]
    assert hub.downloads == []


def test_offline_without_all_files_it_is_an_error(hub, tmp_path):
    names = [f"default/train/000{number}.parquet" for number in range(3)]
    hub.dataset_files["o/part", "main", "a.wav"] = b"RIFF"
    put(hub, "o/part", *names, revision="refs/convert/parquet")
    offline = {"HF_HUB_OFFLINE": "1"}
    [error] = find(hub, tmp_path, "o/part", **offline)
    assert "nor in the cache of the hub" in error and "HF_HUB_OFFLINE=1" in error
    assert find(hub, tmp_path, "o/part") == [names]
    assert find(hub, tmp_path, "o/part", **offline) == [names]
    folder = next(tmp_path.glob("hub/datasets--o--part/snapshots/*/default/train"))
    (folder / "0002.parquet").unlink()
    [error] = find(hub, tmp_path, "o/part", **offline)
    assert "files are missing in the cache of the hub" in error
