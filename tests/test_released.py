"""Tests the table of released files, and downloads from a server with every fault."""

import dataclasses
import hashlib
import io
import json
import os
import re
import stat
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import ltu.checkpoints.download as transport
from ltu.checkpoints.download import DownloadError, unpack
from ltu.checkpoints.released_files import PREP, TABLE, Released, download, find, remap_toy_paths
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.released import main
from tests.golden.rule_init import rule
from tests.released import narrow, read, write_llm
from tests.test_scripts import run_script

ROOT = Path(__file__).parent.parent
DATA = bytes(range(256)) * 2000  # 512,000 bytes
HTML = b"<!DOCTYPE html><html><body>This link has died.</body></html>"


class Site:
    """The files of the server, and its faults."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None, int]] = []  # name, Range, status
        self.drops: list[int] = []  # bytes after which the next requests break off
        self.errors: list[int] = []  # HTTP statuses of the next requests
        self.headers = ("ETag", "Last-Modified")  # those of the two that it sends
        self.change_before: dict[int, tuple[str, bytes]] = {}  # number of a request -> new content
        self.has_range = True
        self.has_length = True
        self.is_weak = False  # its tags do not promise equal bytes, so If-Range cannot use them
        self.ignores_if_range = False
        self.omits_version_of_rest = False
        self.content_type = "application/octet-stream"
        self.pause = 0.0  # seconds between pieces
        self.is_silent = False  # it reads requests and answers none, until `is_over`
        self.is_over = threading.Event()
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, **headers: str | None) -> None:
        self.site.requests.append((self.path.lstrip("/"), self.headers.get("Range"), status))
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self) -> None:
        site = self.site
        name = self.path.lstrip("/")
        if len(site.requests) in site.change_before:
            changed, content = site.change_before[len(site.requests)]
            site.files[changed] = content
        if site.errors or name not in site.files:
            self.answer(site.errors.pop(0) if site.errors else 404, Content_Length="0")
            return
        if site.is_silent:
            site.is_over.wait()
            self.close_connection = True
            return
        data = site.files[name]
        tag = ("W/" if site.is_weak else "") + f'"{hashlib.md5(data).hexdigest()}"'
        date = f"Mon, 01 Jan 2024 00:00:{len(data) % 60:02} GMT"
        versions = {"ETag": tag, "Last-Modified": date}
        sent = {key.replace("-", "_"): versions[key] for key in site.headers}
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        wanted = self.headers.get("If-Range")
        same = (
            wanted in (None, date) or (wanted == tag and not site.is_weak) or site.ignores_if_range
        )
        start = int(span[1]) if span and site.has_range and same else 0
        if start >= len(data):
            self.answer(416, Content_Length="0")
            return
        body = data[start:]
        length = (
            {"Content_Length": str(len(body))}
            if site.has_length
            else {"Transfer_Encoding": "chunked"}
        )
        where = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if start and site.omits_version_of_rest:
            sent = {}
        self.answer(
            206 if start else 200, Content_Type=site.content_type, **sent, **length, **where
        )
        end = min(site.drops.pop(0), len(body)) if site.drops else None
        for position in range(0, len(body) if end is None else end, 100_000):
            piece = body[position : min(position + 100_000, end or len(body))]
            self.wfile.write(piece if site.has_length else b"%x\r\n%s\r\n" % (len(piece), piece))
            time.sleep(site.pause)
        if end is not None:
            self.wfile.flush()
            self.close_connection = True
        elif not site.has_length:
            self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(transport, "WAIT", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"site": site}))
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    ).start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    yield site
    site.is_over.set()
    server.shutdown()
    server.server_close()


def a_row(site: Site, file: str = "clip.wav", data: bytes = DATA, **fields) -> Released:
    site.files[file] = data
    return Released(file.split(".")[0], f"{site.url}/{file}", "data", **fields)


def zip_of(members: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # The same bytes at any time.
    return memory.getvalue()


def check_failure(row: Released, folder: Path, *texts: str, **kwargs) -> None:
    """Check that a download fails with these texts, and leaves nothing under a final name."""
    with pytest.raises(DownloadError) as error:
        download(row, folder, **kwargs)
    for text in (row.name, *texts):
        assert text in str(error.value)
    assert not (folder / row.file).exists()
    assert not (folder / row.name).is_dir()
    assert not list(folder.glob("*.received.json"))


# --- the table


def test_every_link_of_the_original_readme() -> None:
    """The table has each link of the original's README and scripts.

    The ids are the parts of Dropbox's links that name a file or folder.
    """
    text = " ".join(row.url for row in TABLE)
    ids = """
        3g2b9dzeklunqwjs4ae05 jdlkm9ggj3ascp2g8oehk 4k64am7ha8gy2ojl1t29e iip9zxdt693esl8db3vkq
        juh1dk9ltvhghuj0l1sag 63szdwo0mv519o4nmgvd3 ko9qykuwbe4nodtsx8vl4 nsnjivql7vb1i7vcf37d1
        nvn2k1wrmgjz4wglcs9zy o91k6cnwqft84tgmuotwg ir69ci3bhf4cthxnnnl76 m9ypar9aydlec5i635zl2
        34y1p8bfuwlcdepwd2e1o co2m4ljyxym7f3w3dl6u4 ryoqai0ayt45k07ib71yt iq1fwkgkzueugqioge83g
        dqe01g38sfl1oo8mqpjs7 fujzoplziworiw29nleji pik0pubn1qg7q0rorkn3b mldw9tuwhx8kv010zahax
        mjn5wdnc1j67kkhbu0j9d wzw72e9e88x6nfd94zwi7 254wkiknythx5vlenic3j
    """
    assert [name for name in ids.split() if text.count(name) != 1] == []
    assert len({row.name for row in TABLE}) == len({row.file for row in TABLE}) == len(TABLE)
    for row in TABLE:
        assert row.url.startswith("https://")
        assert row.url.endswith("&dl=1") or "dropbox" not in row.url
        assert row.file.endswith((".bin", ".zip", ".json", ".pt"))
        assert row.precision in (None, "fp16", "fp32")


def test_find_names_similar_rows() -> None:
    assert find("ltu_ori_paper").steps == 20_000
    with pytest.raises(DownloadError, match="'ltu_paper'.*ltu_ori_paper"):
        find("ltu_paper")


def test_markdown(capsys: pytest.CaptureFixture) -> None:
    main(["--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TABLE) + 2 and len({line.count("|") for line in lines}) == 1
    assert "about 370M" in lines[2]
    main([])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        row.name for row in TABLE
    ]


# --- downloads


def test_second_call_transfers_nothing(site: Site, tmp_path: Path) -> None:
    row = a_row(site, size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
    assert download(row, tmp_path).read_bytes() == DATA
    receipt = json.loads((tmp_path / "clip.wav.received.json").read_text())
    assert receipt == {"url": row.url, "bytes": len(DATA), "sha256": row.sha256}
    download(row, tmp_path)
    assert len(site.requests) == 1 and not list(tmp_path.glob("*.part*"))


def test_a_file_put_there_by_hand_is_checked_and_used(site: Site, tmp_path: Path) -> None:
    row = a_row(site, size=len(DATA))
    (tmp_path / "clip.wav").write_bytes(DATA)
    download(row, tmp_path)
    assert not site.requests
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "clip.wav").write_bytes(b"short")
    with pytest.raises(DownloadError, match="5 bytes instead of 512,000"):
        download(row, tmp_path / "wrong")


@pytest.mark.parametrize("headers", [("ETag",), ("Last-Modified",)])
def test_dropped_again_and_again(site: Site, tmp_path: Path, headers: tuple[str, ...]) -> None:
    """More drops than tries, each of them after some bytes: the transfer is resumed."""
    site.headers, site.drops = headers, [50_000] * (transport.RETRIES + 2)
    assert download(a_row(site), tmp_path).read_bytes() == DATA
    assert site.requests[1] == ("clip.wav", "bytes=50000-", 206)
    assert len(site.requests) == transport.RETRIES + 3


def test_goes_on_in_a_later_call(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "RETRIES", 1)
    site.drops = [200_000, 0, 0]
    check_failure(a_row(site), tmp_path, "200,000 bytes are stored", "run it again")
    assert download(a_row(site), tmp_path).read_bytes() == DATA
    assert site.requests[-1] == ("clip.wav", "bytes=200000-", 206)


@pytest.mark.parametrize("way", ["no range", "no version", "weak tag", "chunked"])
def test_begins_again_only_where_it_cannot_go_on(site: Site, tmp_path: Path, way: str) -> None:
    site.drops = [300_000, 100_000]
    site.has_range = way != "no range"
    site.has_length = way != "chunked"
    site.is_weak = way == "weak tag"
    if way in ("no version", "chunked"):
        site.headers = ()
    assert download(a_row(site), tmp_path).read_bytes() == DATA
    expected = [200, 206, 206] if way == "weak tag" else [200, 200, 200]
    assert [status for *_, status in site.requests] == expected


@pytest.mark.parametrize("fault", ["none", "ignores_if_range", "omits_version_of_rest"])
@pytest.mark.parametrize(
    "new", [DATA[::-1], DATA[::-1] * 2, DATA[:1000]], ids=["same size", "longer", "shorter"]
)
def test_file_changed_between_tries(site: Site, tmp_path: Path, fault: str, new: bytes) -> None:
    """Never a mixture of two versions, even from a server that ignores If-Range."""
    site.drops = [200_000]
    row = a_row(site)
    setattr(site, fault, True)
    site.change_before = {1: ("clip.wav", new)}
    assert download(row, tmp_path).read_bytes() == new


def test_slow_and_busy(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole transfer takes longer than a time-out, each of its six pieces much less."""
    monkeypatch.setattr(transport, "TIMEOUT", 1.0)
    site.pause = 0.25
    site.errors = [503, 429]
    assert download(a_row(site), tmp_path).read_bytes() == DATA
    assert [status for *_, status in site.requests] == [503, 429, 200]


def test_a_server_that_stops_answering(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TIMEOUT", 0.1)
    monkeypatch.setattr(transport, "RETRIES", 1)
    site.is_silent = True
    check_failure(a_row(site), tmp_path, "timed out", "2 times", "--mirror")


def test_two_processes_transfer_once(site: Site, tmp_path: Path) -> None:
    site.pause = 0.02
    row = a_row(site)
    threads = [threading.Thread(target=download, args=(row, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(site.requests) == 1 and (tmp_path / "clip.wav").read_bytes() == DATA


def test_stopped_before_the_check(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args) -> None:
        raise KeyboardInterrupt

    row = a_row(site)
    with monkeypatch.context() as context:
        context.setattr(transport, "check", stop)
        with pytest.raises(KeyboardInterrupt):
            download(row, tmp_path)
    assert not (tmp_path / "clip.wav").exists()
    assert download(row, tmp_path).read_bytes() == DATA
    assert len(site.requests) == 1


@pytest.mark.parametrize(
    ("file", "data", "fields", "message"),
    [
        ("clip.wav", DATA, {"sha256": "0" * 64}, "sha256"),
        ("clip.wav", DATA, {"size": 7}, "512,000 bytes instead of 7"),
        ("clip.wav", HTML, {}, "web page"),
        ("rows.json", b'[{"instruction": ', {}, "not JSON"),
        ("model.bin", DATA, {}, "torch.save"),
        ("model.bin", zip_of({"a": b"b"}), {}, "data.pkl"),
        ("set.zip", zip_of({"a": DATA})[:-30], {}, "not a complete zip"),
        ("set.zip", zip_of({"a": b"x" * 999}).replace(b"x" * 999, b"y" * 999), {}, "CRC"),
    ],
)
def test_wrong_content(
    site: Site, tmp_path: Path, file: str, data: bytes, fields: dict, message: str
) -> None:
    check_failure(a_row(site, file, data, **fields), tmp_path, message)
    assert not list(tmp_path.glob("*.part"))


def test_a_body_without_a_length_ends_at_the_known_size(site: Site, tmp_path: Path) -> None:
    """Such a body may have no end."""
    site.has_length = False
    row = a_row(site, data=DATA * 20, size=len(DATA))
    check_failure(row, tmp_path, "more than the 512,000 bytes", "--mirror")
    assert not list(tmp_path.glob("*.part"))
    assert len(site.requests) == 1
    site.files["clip.wav"] = DATA
    assert download(row, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize(
    "record", ["{", "[]", "{}", '{"url": 5, "bytes": "many", "sha256": 5}', "[" * 100_000]
)
def test_damaged_records_are_written_again(site: Site, tmp_path: Path, record: str) -> None:
    (tmp_path / "clip.wav.part").write_bytes(DATA[:1000])
    (tmp_path / "clip.wav.part.json").write_text(record)
    row = a_row(site)
    assert download(row, tmp_path).read_bytes() == DATA
    assert site.requests[0] == ("clip.wav", None, 200)
    (tmp_path / "clip.wav.received.json").write_text(record)
    assert download(row, tmp_path).read_bytes() == DATA
    assert len(site.requests) == 1
    receipt = json.loads((tmp_path / "clip.wav.received.json").read_text())
    assert receipt["sha256"] == hashlib.sha256(DATA).hexdigest()


def test_a_large_json_file_is_checked_at_its_ends(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "SMALL_JSON", 10)
    check_failure(a_row(site, "rows.json", b'[{"a": 1}, {"b": 2}, {"c"'), tmp_path, "cut off")
    download(a_row(site, "rows.json", b'[{"a": 1}, {"b": 2}]\n'), tmp_path)


def test_a_page_instead_of_the_file(site: Site, tmp_path: Path) -> None:
    site.content_type = "text/html; charset=utf-8"
    row = a_row(site, data=b"<!-- moved --><p>This link has died.</p>")
    check_failure(row, tmp_path, "web page", "--mirror")
    assert not list(tmp_path.glob("*.part"))


def test_not_there(site: Site, tmp_path: Path) -> None:
    row = a_row(site)
    site.files.clear()
    check_failure(row, tmp_path, "404", row.url, "--mirror")
    assert len(site.requests) == 1
    check_failure(row, tmp_path, "is not there", mirror=str(tmp_path / "nowhere"))


# --- zips


def test_zip_is_unpacked_once(site: Site, tmp_path: Path) -> None:
    """Dropbox's zips come in pieces without a length, and have a member "/"."""
    site.has_length = False
    site.headers = ()
    row = a_row(site, "set.zip", zip_of({"/": b"", "audio/a.wav": DATA, "rows.json": b"[]"}))
    assert download(row, tmp_path) == tmp_path / "set"
    assert (tmp_path / "set" / "audio" / "a.wav").read_bytes() == DATA
    download(row, tmp_path)
    assert len(site.requests) == 1 and not (tmp_path / "set.zip").exists()


def symlink_zip() -> bytes:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr(info, "/etc")
    return memory.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        zip_of({"good": b"", "../out.txt": b"x"}),
        zip_of({"/out.txt": b"x"}),
        zip_of({"a\\..\\..\\b": b""}),
        symlink_zip(),
    ],
    ids=["parent", "absolute", "backslashes", "link"],
)
def test_zip_that_leads_out(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "evil.zip").write_bytes(data)
    with pytest.raises(DownloadError, match="leads out"):
        unpack(tmp_path / "evil.zip", tmp_path / "in" / "evil")
    assert [path.name for path in tmp_path.rglob("*")] == ["evil.zip"]


# --- the toy set, and the scripts


def test_clips_are_found_by_name_and_their_features_too(tmp_path: Path) -> None:
    from ltu_as.feature_store import original_name

    ids = [
        "/data/sls/audioset/dave/audio/a.flac",
        "../../../openaqa/data/sample_audio/audio/b.wav",
        "empty",
        None,
        "/x/c.wav",
    ]
    (tmp_path / "meta.json").write_text(json.dumps([{"audio_id": audio_id} for audio_id in ids]))
    (tmp_path / "zip" / "audio").mkdir(parents=True)
    for name in ("a.flac", "b.wav"):
        (tmp_path / "zip" / "audio" / name).write_text(name)
    remap_toy_paths(tmp_path / "meta.json", tmp_path / "zip", tmp_path / "out" / "rows.json")
    found = [row["audio_id"] for row in json.loads((tmp_path / "out" / "rows.json").read_text())]
    assert found[2:] == ids[2:]
    for audio_id, old in zip(found[:2], ids[:2], strict=True):
        assert (tmp_path / "out" / audio_id).read_text() == Path(old).name
        assert original_name(audio_id) == original_name(old)
    (tmp_path / "meta.json").write_text('[{"audio_id": "/x/c.wav"}]')
    with pytest.raises(DownloadError, match="no clip of its 1 examples"):
        remap_toy_paths(tmp_path / "meta.json", tmp_path / "zip", tmp_path / "out" / "rows.json")


def test_clips_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(
        json.dumps([{"audio_id": f"/data/{s}/audio/1.wav"} for s in ("clotho", "fsd")])
    )
    for name in ("clotho", "fsd"):
        (tmp_path / "zip" / name).mkdir(parents=True)
        (tmp_path / "zip" / name / "1.wav").write_text(name)
    remap_toy_paths(tmp_path / "meta.json", tmp_path / "zip", tmp_path / "out" / "rows.json")
    found = [row["audio_id"] for row in json.loads((tmp_path / "out" / "rows.json").read_text())]
    assert [(tmp_path / "out" / audio_id).read_text() for audio_id in found] == ["clotho", "fsd"]


def test_a_damaged_zip_is_downloaded_again(site: Site, tmp_path: Path) -> None:
    members = {f"{n}.json": os.urandom(300).hex().encode() for n in range(20)}
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    good = memory.getvalue()
    bad = bytearray(good)
    bad[60:200] = bytes(140)
    row = a_row(site, "set.zip", bytes(bad))
    check_failure(row, tmp_path, "damaged")
    site.files["set.zip"] = good
    assert len(list(download(row, tmp_path).iterdir())) == 20


@pytest.mark.parametrize("kind", sorted(PREP))
def test_dry_run_writes_nothing(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--full", "--eval", "--dry_run", "--root", str(tmp_path / "here"), "--llm", "my_llm"]
    main(["prep", "--kind", kind, *flags])
    text = capsys.readouterr().out
    needed = PREP[kind]
    name = needed.data
    for part in (
        f"{name}_toy",
        f"{name}_toy_audio",
        needed.checkpoint,
        needed.full_set,
        f"{name}_subsets",
        f"{kind}_eval",
    ):
        assert find(part).url in text
    assert f"-m {kind}.convert_checkpoint --llm my_llm --checkpoint" in text
    assert "about 4.6GB" in text or kind == "ltu"
    assert ("--feature_precision fp16" in text) == (kind == "ltu_as")
    assert not (tmp_path / "here").exists()


def modification_times(root: Path) -> dict[Path, int]:
    paths = [path for path in root.rglob("*") if path.suffix != ".lock"]
    return {path: path.stat().st_mtime_ns for path in paths}


def test_prep_train_script(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Toy set, conversion and stages from a mirror with small files; a second call does nothing."""
    ids = ["/data/sls/audioset/dave/audio/a.flac", "/data/sls/audioset/dave/audio/b.flac"]
    rows = json.dumps(
        [{"instruction": "?", "input": "", "audio_id": audio_id, "output": "!"} for audio_id in ids]
    )
    shapes = narrow(read("layout_ltu")["tiny.lora_all"]["saved_by_trainer"])
    state = {key: torch.from_numpy(rule(key, tuple(shape))) for key, shape in shapes.items()}
    torch.save(state, tmp_path / "state.bin")
    site.files = {
        "openaqa_toy.json": rows.encode(),
        "openaqa_toy_audio.zip": zip_of({"/": b"", "audio/a.flac": b"a", "audio/b.flac": b"b"}),
        "ltu_ori_paper.bin": (tmp_path / "state.bin").read_bytes(),
        "openaqa_5.6M.json": rows.encode(),
        "openaqa_subsets.zip": zip_of(
            {"closed/combine_cla.json": b"[1]", "closed/all_closed_qa.json": b"[3]"}
        ),
    }
    site.drops = [10]
    llm, root = write_llm(tmp_path / "llm"), tmp_path / "root"
    flags = ["--full", "--mirror", site.url, "--root", str(root)]
    status, arguments = run_script("prep_train", tmp_path, *flags, LLM=str(llm))
    assert status == 0
    assert arguments[:3] == ["-m", "ltu.released", "prep"]
    main(arguments[2:])
    assert "2 examples, 2 clips matched, 0 not" in capsys.readouterr().out
    model = LtuForConditionalGeneration.from_pretrained(root / "pretrained_mdls" / "ltu_ori_paper")
    weight = state["base_model.model.model.audio_proj.1.weight"]
    assert torch.equal(model.multi_modal_projector.linear.weight, weight)
    toy = root / "data" / "openaqa_toy"
    for row in json.loads((toy / "openaqa_toy.json").read_text()):
        assert (toy / row["audio_id"]).read_text() == Path(row["audio_id"]).stem
    found = [
        json.loads((root / "data" / "openaqa" / f"stage{n}.json").read_text()) for n in (1, 2, 3, 4)
    ]
    assert found == [[1], [1], [3], json.loads(rows)]
    assert len(site.requests) == 6  # One of the five files took two requests.
    before = modification_times(root)
    main(["prep", "--kind", "ltu", *flags, "--llm", str(llm)])
    assert modification_times(root) == before
    assert len(site.requests) == 6


def test_prep_from_a_folder_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"openaqa_toy\.json is not there"):
        main(["prep", "--kind", "ltu", "--mirror", str(tmp_path), "--root", str(tmp_path / "root")])
    assert dataclasses.asdict(find("vicuna"))["size"] is None


def test_the_table_in_the_readme_is_current(capsys: pytest.CaptureFixture) -> None:
    main(["--markdown"])
    page = ROOT / "docs" / "checkpoints.md"
    assert capsys.readouterr().out in page.read_text(encoding="utf-8")
