"""Tests of the demo: its page in a real browser, `/predict` by its client, and its security."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import torch
from fastapi import FastAPI
from gradio_client import Client, handle_file
from transformers import AutoModelForCausalLM

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.checkpoints import released_files
from ltu.inference.engine import LtuEngine
from ltu.inference.generation_flags import open_engine
from ltu.inference.requests import Request
from ltu.inference_gradio import parse_args
from ltu.serving import gradio_security
from ltu.serving.gradio_page import DEFAULT_QUESTION, TOY_SET, Demo
from ltu_as.convert_checkpoint import main as convert_as
from tests import tiny
from tests.golden.rule_init import rule
from tests.machine import PATIENCE, wait_until
from tests.released import narrow, read, write_llm
from tests.whisper_tiny import save_whisper

ROOT = Path(__file__).parent.parent
TOKENS = 60
CHUNK_SECONDS = {"ltu": 0.64, "ltu_as": 10.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write checkpoints `ltu` and `ltu_as`, and clips.

    good.wav, other.wav, long.wav (two channels), silent.wav, and two files that are no audio.
    """
    root = tmp_path_factory.mktemp("demo")
    llm = tiny.write_llm(root / "llm")
    model = AutoModelForCausalLM.from_pretrained(llm)
    # Never generate control and byte tokens: the bytes of a random model are not UTF-8.
    model.lm_head.weight.data[:259] = 0
    model.save_pretrained(llm)
    tiny.write_checkpoint(root / "ltu", llm, tiny.LORA)
    save_whisper(root / "whisper.pt")
    flags = (
        f"--init --llm {llm} --whisper {root}/whisper.pt --feature_precision fp32 "
        f"--num_layer_heads 2 --output_dir {root}/ltu_as"
    )
    convert_as(flags.split())
    soundfile.write(root / "good.wav", tiny.clip(1, 0.5), 16_000)
    soundfile.write(root / "other.wav", tiny.clip(2, 0.4), 16_000)
    soundfile.write(root / "long.wav", np.stack([tiny.clip(3, 12), tiny.clip(4, 12)], 1), 8_000)
    soundfile.write(root / "silent.wav", np.zeros(8000), 16_000)
    (root / "text.wav").write_text("no sound, but words")
    (root / "<b>text.wav").write_text("no sound, but words")
    return root


@pytest.fixture(scope="module")
def served(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], SimpleNamespace]]:
    """Return `served(kind)`, which starts a demo once.

    It returns the demo's `url`, `page`, `demo`, `engine` and `client`; `uploads` is the folder of
    all uploads.
    """
    running: dict[str, SimpleNamespace] = {}
    uploads = tmp_path_factory.mktemp("uploads")

    def open_once(kind: str) -> SimpleNamespace:
        if kind not in running:
            flags = f"--model {folder}/{kind} --device cpu --max_new_tokens {TOKENS}"
            args = parse_args(f"{flags} --max_seconds 50 --max_mb 1".split())
            demo = Demo(open_engine(args), args)
            page = demo.launch()
            running[kind] = SimpleNamespace(
                url=page.local_url,
                page=page,
                demo=demo,
                engine=demo.engine,
                uploads=uploads,
                client=Client(page.local_url, verbose=False),
            )
        return running[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        # Gradio summarizes its statistics after that many events, by deprecated calls of pandas.
        patch.setenv("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000")
        yield open_once
        assert [path for path in uploads.rglob("*") if path.is_file()]
        for here in running.values():
            here.page.close(verbose=False)
        assert not [path for path in uploads.rglob("*") if path.is_file()]


def expected(engine: LtuEngine, question: str, clip: Path, **settings) -> str:
    """Return the engine's answer, which the demo must give, too."""
    settings = {"max_new_tokens": TOKENS, "repetition_penalty": 1.0} | settings
    answer = engine([Request(question, str(clip), settings.pop("transcript", None))], **settings)[0]
    assert answer.answered and answer.text
    return answer.text


# --- the client


def test_predict_of_ltu(served, folder: Path) -> None:
    """Call it as the README of the original does."""
    here = served("ltu")
    client = here.client
    result = client.predict(handle_file(folder / "good.wav"), DEFAULT_QUESTION, api_name="/predict")
    assert result == expected(here.engine, DEFAULT_QUESTION, folder / "good.wav")
    endpoints = client.view_api(return_format="dict")
    assert list(endpoints["named_endpoints"]) == ["/predict"] and not endpoints["unnamed_endpoints"]
    names = [p["parameter_name"] for p in endpoints["named_endpoints"]["/predict"]["parameters"]]
    assert names == ["audio", "question"]


def test_predict_of_ltu_as(served, folder: Path) -> None:
    """With "" Whisper writes the transcript. "7B (Default)" is a value of the original's demo."""
    here = served("ltu_as")
    clip = folder / "good.wav"
    client = here.client

    def predict(transcript: str) -> str:
        return client.predict(
            handle_file(clip), transcript, DEFAULT_QUESTION, "7B (Default)", api_name="/predict"
        )

    answer = predict("")
    assert answer == expected(here.engine, DEFAULT_QUESTION, clip, transcript=None)
    assert answer != expected(here.engine, DEFAULT_QUESTION, clip, transcript="")
    given = expected(here.engine, DEFAULT_QUESTION, clip, transcript="a dog")
    assert predict("a dog") == given
    endpoints = client.view_api(return_format="dict")
    assert list(endpoints["named_endpoints"]) == ["/predict"] and not endpoints["unnamed_endpoints"]
    names = [p["parameter_name"] for p in endpoints["named_endpoints"]["/predict"]["parameters"]]
    assert names == ["audio", "transcript", "question", "llm_size"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("text.wav", "unreadable"), ("silent.wav", "silent"), ("<b>text.wav", "unreadable")],
)
def test_the_error_for_a_bad_clip_has_its_reason(
    name: str, reason: str, served, folder: Path
) -> None:
    here = served("ltu")
    with pytest.raises(Exception, match=reason) as error:
        here.client.predict(handle_file(folder / name), DEFAULT_QUESTION, api_name="/predict")
    assert str(here.uploads) not in str(error.value) and "<b>" not in str(error.value)


def test_limits(served, folder: Path, tmp_path: Path) -> None:
    """Exceed the length of a clip, the size of a file and the length of a question."""
    client = served("ltu").client
    soundfile.write(tmp_path / "slow.wav", tiny.clip(5, 30), 8_000, subtype="PCM_U8")
    soundfile.write(tmp_path / "big.wav", tiny.clip(6, 40), 16_000)
    assert (tmp_path / "big.wav").stat().st_size > 2**20 > (tmp_path / "slow.wav").stat().st_size
    with pytest.raises(Exception, match="too_long"):
        client.predict(handle_file(tmp_path / "slow.wav"), DEFAULT_QUESTION, api_name="/predict")
    with pytest.raises(Exception, match="413|too large|exceed"):
        client.predict(handle_file(tmp_path / "big.wav"), DEFAULT_QUESTION, api_name="/predict")
    with pytest.raises(Exception, match="characters"):
        client.predict(handle_file(folder / "good.wav"), "why? " * 2000, api_name="/predict")


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=PATIENCE) as client:
        yield client


def post(http: httpx.Client, url: str, data: list, name: str = "predict") -> str:
    """Call an endpoint as any program can; return the text of its events."""
    event = http.post(f"{url}gradio_api/call/{name}", json={"data": data}).json()
    return http.get(f"{url}gradio_api/call/{name}/{event['event_id']}").text


def file_data(path: str, **more: Any) -> dict[str, Any]:
    """Return the JSON by which a request of Gradio's names a file."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}} | more


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the paths that are decoded and the addresses that are fetched, instead of that."""
    opened: list[str] = []
    decode = "ltu.serving.gradio_page.decode_audio"
    download = "gradio.processing_utils.async_ssrf_protected_download"
    monkeypatch.setattr(decode, lambda path, *_, **__: opened.append(path))
    monkeypatch.setattr(download, lambda url, **_: opened.append(url))
    return opened


def routes_of(data: list) -> list[tuple[str, dict]]:
    """Return all endpoints that take the two inputs of `/predict`, and their bodies."""
    return [
        ("call/predict", {"data": data}),
        ("call/v2/predict", {"audio": data[0], "question": data[1]}),
        ("run/predict", {"data": data}),
        ("api/predict", {"data": data}),
        ("queue/join", {"data": data, "fn_index": 0, "session_hash": "session"}),
    ]


def check_is_refused(http: httpx.Client, url: str, value: Any, reason: str) -> None:
    """Assert that no endpoint takes a value, wherever it is in the body.

    Gradio looks for files in all values, also in that of a text box.
    """
    for data in ([value, DEFAULT_QUESTION], [None, value], [None, [{"x": value}]]):
        for route, body in routes_of(data):
            reply = http.post(f"{url}gradio_api/{route}", json=body)
            if reply.status_code == 405 and route == "call/v2/predict":
                continue  # Gradio 6.0 has no such route to post to.
            assert reply.status_code == 403, (route, body, reply.text)
            assert reason in reply.json()["detail"]


def test_no_path_of_a_request_is_opened(
    served, http: httpx.Client, folder: Path, opened: list[str]
) -> None:
    """Name what is outside the uploads, and what is inside but no regular file.

    None of them is registered as a file that Gradio may remove.
    """
    here = served("ltu")
    outside = here.uploads.parent / "outside.wav"
    shutil.copy(folder / "good.wav", outside)
    inside = here.uploads / "entries"
    inside.mkdir()
    shutil.copy(folder / "good.wav", inside / "good.wav")
    (inside / "link.wav").symlink_to(outside)
    (inside / "link_inside.wav").symlink_to(inside / "good.wav")
    (inside / "linked").symlink_to(here.uploads.parent)
    (inside / "dangling.wav").symlink_to("nowhere")
    os.mkfifo(inside / "pipe.wav")
    paths = (
        "/etc/passwd",
        "/dev/zero",
        str(outside),
        str(here.uploads / ".." / "outside.wav"),
        "outside.wav",
        "../../etc/passwd",
        f"/gradio_api/file={outside}",
        f"/gradio_api/file={inside}/good.wav",
        str(here.uploads),
        f"{here.uploads}/",
        str(inside),
        *(str(entry) for entry in inside.iterdir() if entry.name != "good.wav"),
        str(inside / "linked" / "outside.wav"),
        str(inside / "missing.wav"),
        f"{inside}/good.wav\0.wav",
        f"{inside}/{'x' * 300}",
        "",
    )
    registered = [set(files) for files in here.page.temp_file_sets]
    for path in paths:
        as_stream = file_data(path, is_stream=True, url=path, orig_name="good.wav")
        for value in (file_data(path), as_stream, {"path": path}):
            check_is_refused(http, here.url, value, "not an uploaded file")
        if path.isprintable() and not path.endswith(("/good.wav", "/link_inside.wav", "/pipe.wav")):
            check_is_not_served(http, here.url, path)
    for path in ([str(inside / "good.wav")], {"path": str(outside)}, None, 5):
        check_is_refused(http, here.url, {"path": path}, "Upload the clip")
    assert not opened
    assert registered == here.page.temp_file_sets
    # A url next to the path of an upload changes nothing.
    value = file_data(str(inside / "good.wav"), url="http://127.0.0.1:9/a.wav")
    post(http, here.url, [value, DEFAULT_QUESTION])
    assert opened and set(opened) == {str(inside / "good.wav")}
    shutil.rmtree(inside)


def test_no_address_of_a_request_is_fetched(served, http: httpx.Client, opened: list[str]) -> None:
    """Name addresses of this machine and of another, as the clip and as the question."""
    here = served("ltu")
    addresses = (
        f"{here.url}config",
        "http://127.0.0.1:9/a.wav",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a.wav",
        "https://example.com/a.wav",
        f"{here.url}gradio_api/file={here.uploads.parent / 'outside.wav'}",
    )
    for address in addresses:
        as_stream = file_data(address, is_stream=True, url=address, orig_name="good.wav")
        for value in (file_data(address), as_stream):
            check_is_refused(http, here.url, value, "addresses are not fetched")
        check_is_not_served(http, here.url, address)
    assert not opened


def check_is_not_served(http: httpx.Client, url: str, path: str) -> None:
    """Assert that the demo does not serve the content of a path or an address."""
    # 302: Gradio 6.0 redirects the client to the address.
    assert http.get(f"{url}gradio_api/file={path}").status_code in (302, 403, 404), path


def test_an_upload_by_hand_is_answered(served, http: httpx.Client, folder: Path) -> None:
    """Make the same call with the path that the demo returned for an upload."""
    here = served("ltu")
    files = {"files": ("good.wav", (folder / "good.wav").read_bytes())}
    path = http.post(f"{here.url}gradio_api/upload", files=files).json()[0]
    text = post(http, here.url, [file_data(path), DEFAULT_QUESTION])
    assert json.loads(text.split("data: ")[-1]) == [
        expected(here.engine, DEFAULT_QUESTION, folder / "good.wav")
    ]


def test_endpoints_that_the_page_does_not_need_are_closed(served, http: httpx.Client) -> None:
    """Some of Gradio's start other programs, write files elsewhere or use a visitor's account."""
    url = served("ltu").url
    for route in (
        "process_recording",
        "stream/x",
        "component_server",
        "vibe-edit",
        "run-history/connect",
        "profiling/clear",
        "../login",
    ):
        assert http.post(f"{url}gradio_api/{route}", json={}).status_code == 404, route


# --- old uploads


def write_entries(root: Path) -> Path:
    """Write entries of all kinds into a folder; return a file next to it that links point to."""
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "file.wav").write_text("of another")
    for name in ("a", "b/c", "z"):
        (root / name).mkdir(parents=True)
        (root / name / "upload.wav").write_text("x")
    (root / "b" / "link.wav").symlink_to(outside / "file.wav")
    (root / "b" / "linked").symlink_to(outside)
    (root / "b" / "dangling").symlink_to("nowhere")
    os.mkfifo(root / "b" / "pipe")
    (root / "upload_that_broke_off").write_text("x")
    (root / "locked").mkdir()
    (root / "locked" / "upload.wav").write_text("x")
    (root / "locked").chmod(0)  # Root may remove it nevertheless.
    return outside / "file.wav"


def unlock(root: Path) -> None:
    """Let pytest remove what only root could."""
    if (root / "locked").exists():
        (root / "locked").chmod(0o700)


def test_old_entries_of_any_kind_are_removed(tmp_path: Path) -> None:
    root = tmp_path / "uploads"
    outside = write_entries(root)
    gradio_security.remove_entries(root, before=1)  # Nothing is that old.
    assert len(list(root.rglob("*"))) >= 11
    gradio_security.remove_entries(root, time.time() + 60, frozenset([root / "z/upload.wav"]))
    unlock(root)
    shutil.rmtree(root / "locked", ignore_errors=True)
    assert sorted(root.rglob("*")) == [root / "z", root / "z/upload.wav"]
    assert outside.read_text() == "of another"
    shutil.rmtree(root)
    gradio_security.remove_entries(root, time.time() + 60)  # The folder has vanished.


def test_removal_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that were odd, or the folder itself missing, do not end it; examples remain."""
    root = tmp_path / "uploads"
    root.mkdir()
    (root / "example.wav").write_text("x")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(root))
    monkeypatch.setattr(gradio_security, "SEARCH_SECONDS", 0.01)
    monkeypatch.setattr(gradio_security, "UPLOAD_SECONDS", 0)

    def others() -> set[str]:
        # Unlike rglob, os.walk does not mind a folder that is removed meanwhile.
        names: set[str] = set()
        for _, folders, files in os.walk(root):
            names.update(folders, files)
        return names - {"example.wav", "locked"}

    async def check() -> None:
        async with gradio_security.remove_uploads(FastAPI()):
            outside = write_entries(root)
            await asyncio.to_thread(wait_until, lambda: not others())
            assert (root / "example.wav").is_file()
            assert outside.read_text() == "of another"
            root.rename(tmp_path / "moved")
            await asyncio.sleep(0.05)
            (tmp_path / "moved").rename(root)
            (root / "later.wav").write_text("x")
            await asyncio.to_thread(wait_until, lambda: not others())
            assert (root / "example.wav").is_file()
        assert not (root / "example.wav").exists()

    asyncio.run(check())
    unlock(root)


def test_an_upload_that_fails_is_removed(served, http: httpx.Client, tmp_path: Path) -> None:
    """What an upload that is too large or breaks off has written is an old entry in an hour."""
    here = served("ltu")
    before = set(here.uploads.rglob("*"))
    files = {"files": ("big.wav", bytes(2**20 + 1))}
    assert http.post(f"{here.url}gradio_api/upload", files=files).status_code == 413
    head = (
        b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        b'Content-Disposition: form-data; name="files"; filename="half.wav"\r\n\r\n'
    )
    address = ("127.0.0.1", here.page.server_port)
    with socket.create_connection(address) as connection:
        connection.sendall(head + bytes(50_000))
        # Not all versions of Gradio store what has arrived so far. A whole upload is stored by all.
        files = {"files": ("whole.wav", bytes(1000))}
        assert http.post(f"{here.url}gradio_api/upload", files=files).status_code == 200
    left = set(here.uploads.rglob("*")) - before
    gradio_security.remove_entries(here.uploads, time.time() + 60, frozenset(before))
    assert left and not any(path.exists() for path in left)


# --- what is printed

MARKER = "a visitor's secret"


def odd_requests() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield method, path and settings of requests with `MARKER` that Gradio cannot handle."""
    routes = ("call/predict", "call/v2/predict", "run/predict", "api/predict", "queue/join")
    body = {"session_hash": MARKER, "event_data": MARKER, "fn_index": 5}
    # Too few and too many inputs, and inputs of other types.
    for data in (
        *([], [MARKER], [MARKER, MARKER], [None, MARKER], [None, None, MARKER, MARKER], MARKER),
        *([[MARKER], {MARKER: 1}], [file_data(f"/{MARKER}.wav"), MARKER], {MARKER: 1}),
        *([{"path": [MARKER]}, MARKER], [{"meta": MARKER}, MARKER], [True, {"a": MARKER}]),
        [{"url": MARKER, "meta": {"_type": "gradio.FileData"}}, MARKER],
    ):
        for route in routes:
            yield "POST", f"gradio_api/{route}", {"json": body | {"data": data, "audio": data}}
    for number in (0, 10**6, -1, MARKER, None, [MARKER]):
        for route in ("run/predict", "queue/join"):
            given = body | {"data": [MARKER], "fn_index": number}
            yield "POST", f"gradio_api/{route}", {"json": given}

    # Bodies that are no JSON, or that say so.
    for content in (f'{{"data": ["{MARKER}"', MARKER, f'["{MARKER}"]', "[" * 9999):
        for route in ("run/predict", "queue/join", "reset", "cancel", "upload"):
            for kind in ("application/json", "multipart/form-data; boundary=x"):
                settings = {"content": content, "headers": {"content-type": kind}}
                yield "POST", f"gradio_api/{route}", settings
    files = {"files": (f"{MARKER}.wav", MARKER.encode()), MARKER: MARKER.encode()}
    yield "POST", "gradio_api/upload", {"files": files}
    yield "POST", "gradio_api/upload", {"data": {"files": MARKER}}

    # Other endpoints.
    for route in (f"call/{MARKER}", f"run/{MARKER}", MARKER, f"stream/{MARKER}", "login"):
        yield "POST", f"gradio_api/{route}", {"json": {"data": [MARKER], "event_id": MARKER}}
    for route in (
        *(f"file={MARKER}", f"file=/{MARKER}/../x", f"proxy={MARKER}", f"call/predict/{MARKER}"),
        *(f"proxy=http://{MARKER}/x", f"deep_link?session_hash={MARKER}", MARKER),
        *(f"stream/{MARKER}/1/2/playlist.m3u8", f"custom_component/{MARKER}/a/b/c"),
    ):
        yield "GET", f"gradio_api/{route}", {"headers": {"cookie": f"a={MARKER}"}}


def test_nothing_of_a_request_is_printed(folder: Path, tmp_path: Path) -> None:
    """Send the command what Gradio cannot handle; its output is types and places of errors.

    Gradio prints a traceback for most of it, uvicorn for some.
    """
    log = tmp_path / "log"
    flags = ["--model", str(folder / "ltu"), "--device", "cpu"]
    process = tiny.start_command("ltu.inference_gradio", flags, log, TMPDIR=str(tmp_path))
    # The server may close a connection after an error, so each request gets a new one.
    http = httpx.Client(timeout=PATIENCE, limits=httpx.Limits(max_keepalive_connections=0))
    try:
        wait_until(lambda: log.is_file() and "Running on" in log.read_text())
        url = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())[0] + "/"
        before = log.read_text()
        statuses = []
        for method, path, settings in odd_requests():
            reply = http.request(method, url + path, **settings)
            statuses.append(reply.status_code)
            if "event_id" in reply.text and path.startswith("gradio_api/call/"):
                event = reply.json()["event_id"]
                # Gradio 6.0 closes the connection instead.
                with suppress(httpx.RemoteProtocolError):
                    events = http.get(f"{url}gradio_api/call/predict/{event}").text
                    assert "event: error" in events, (path, settings)
        assert {200, 403, 404, 422, 500} <= set(statuses)
        # Events of a failed call have a message for the visitor.
        with pytest.raises(httpx.HTTPStatusError) as error:
            body = {"data": [MARKER]}
            http.post(f"{url}gradio_api/run/predict", json=body).raise_for_status()
        assert "cannot answer this call" in error.value.response.json()["error"]
        # The demo still answers.
        client = Client(url, verbose=False)
        clip = handle_file(folder / "good.wav")
        assert client.predict(clip, DEFAULT_QUESTION, api_name="/predict")
    finally:
        http.close()
        process.terminate()
        process.join(PATIENCE)
    output = log.read_text()
    assert process.exitcode == 0
    assert output.startswith(before)
    *errors, last = output.removeprefix(before).splitlines()
    assert re.fullmatch(r"Questions: .*\b1 ok\b.*", last), last
    # Each kind of error is printed once.
    assert "An event failed: ValueError in blocks.py, line" in errors[0]
    assert len(set(errors)) == len(errors)
    for line in errors:
        assert re.fullmatch(r"An event failed: \w+ in \w+\.py, line \d+", line), line
    assert "ValueError in blocks.py, line" in last
    assert "secret" not in output


# --- the command


def test_newest_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest trained checkpoint of a kind is used.

    An initial checkpoint, or one inside a run, is not used even if it was written later.
    """
    monkeypatch.chdir(tmp_path)
    message = "No checkpoint of ltu is in exp or pretrained_mdls"
    with pytest.raises(FileNotFoundError, match=message):
        released_files.find_or_make("", "ltu")
    checkpoints = (
        ("exp/a/stage1", "ltu"),
        ("pretrained_mdls/b", "ltu"),
        ("exp/a/stage1/checkpoint-5", "ltu"),
        ("exp/c/init", "ltu"),
        ("exp/d", "ltu_as"),
        ("exp/unfinished", "ltu"),
    )
    for modified, (path, kind) in enumerate(checkpoints):
        shutil.copytree(folder / kind, path)
        stage = "init" if path.endswith("init") else "trained"
        state = {"stage": stage, "finished": not path.endswith("unfinished")}
        Path(path, "ltu_state.json").write_text(json.dumps(state))
        os.utime(Path(path, "ltu_state.json"), (modified, modified))
    assert released_files.find_or_make("", "ltu") == "pretrained_mdls/b"
    assert released_files.find_or_make("", "ltu_as") == "exp/d"
    assert released_files.find_or_make("exp/c/init", "ltu") == "exp/c/init"
    shutil.rmtree("pretrained_mdls")
    shutil.rmtree("exp/a")
    assert released_files.find_or_make("", "ltu") == "exp/c/init"


def test_a_released_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is downloaded from a mirror and converted, once; then it answers."""
    shapes = narrow(read("layout_ltu")["tiny.lora_all"]["saved_by_trainer"])
    (tmp_path / "mirror").mkdir()
    state = {key: torch.from_numpy(rule(key, tuple(shape))) for key, shape in shapes.items()}
    torch.save(state, tmp_path / "mirror" / "ltu_ori_paper.bin")
    llm = write_llm(tmp_path / "llm")
    monkeypatch.chdir(tmp_path)
    settings = {"kind": "ltu", "llm": str(llm), "mirror": str(tmp_path / "mirror")}
    checkpoint = released_files.find_or_make("ltu_ori_paper", **settings)
    shutil.rmtree("mirror")

    def modification_times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in Path("pretrained_mdls").rglob("*")}

    before = modification_times()
    assert released_files.find_or_make("ltu_ori_paper", **settings) == checkpoint
    assert before == modification_times()
    engine = LtuEngine.from_pretrained(checkpoint, device="cpu")
    assert engine([Request(DEFAULT_QUESTION, tiny.clip(1))], max_new_tokens=3)[0].answered
    for name, message in (
        ("ltu_as_ori_paper", "bash ltu_as/inference.sh"),
        ("ltu_13b", "not a single checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            released_files.find_or_make(name, "ltu")


def check_the_command(
    folder: Path, log: Path, is_running: Callable[[], bool], stop: Callable[[], int]
) -> None:
    """Assert that a running command answers, and that after its end it leaves no file.

    It must print the number of questions by status, and nothing about their content.

    Args:
        folder: has the clips.
        log: the file of stdout and stderr.
        is_running: returns whether the command runs.
        stop: ends the command and returns its exit status.
    """
    try:
        url = None
        while url is None:
            assert is_running(), log.read_text()
            time.sleep(0.05)
            output = log.read_text() if log.is_file() else ""
            url = re.search(r"http://127\.0\.0\.1:\d+", output)
        client = Client(url[0], verbose=False)

        def predict(clip: str, transcript: str) -> str:
            file = handle_file(folder / clip)
            return client.predict(
                file, transcript, DEFAULT_QUESTION, "7B (Default)", api_name="/predict"
            )

        assert predict("good.wav", "a dog")
        with pytest.raises(Exception, match="unreadable"):
            predict("text.wav", "")
        assert [path for path in log.parent.glob("ltu_demo_*/**/*") if path.is_file()]
    finally:
        status = stop()
    assert status == 0
    output = log.read_text()
    assert "Questions: 1 ok, 1 unreadable" in output
    assert not list(log.parent.glob("ltu_demo_*"))
    for content in (DEFAULT_QUESTION, "good.wav", "text.wav"):
        assert content not in output


def test_the_command(folder: Path, tmp_path: Path) -> None:
    flags = ["--model", str(folder / "ltu_as"), "--device", "cpu"]
    log = tmp_path / "log"
    process = tiny.start_command("ltu_as.inference_gradio", flags, log, TMPDIR=str(tmp_path))

    def stop() -> int:
        process.terminate()
        process.join(PATIENCE)
        return process.exitcode

    check_the_command(folder, log, process.is_alive, stop)


@pytest.mark.slow  # Starts an interpreter.
def test_the_script(folder: Path, tmp_path: Path) -> None:
    """The script works from another folder."""
    environment = os.environ | {
        "PYTHON": sys.executable,
        "TMPDIR": str(tmp_path),
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("GRADIO_TEMP_DIR", None)
    command = [
        "bash",
        str(ROOT / "ltu_as/inference.sh"),
        "--model",
        str(folder / "ltu_as"),
        "--device",
        "cpu",
    ]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment)

    def stop() -> int:
        process.send_signal(signal.SIGTERM)
        return process.wait(PATIENCE)

    check_the_command(folder, tmp_path / "log", lambda: process.poll() is None, stop)


# --- the page, in a browser

# Errors of Gradio's page on the console that are no errors of ours.
GRADIOS_ERRORS = (
    "Waveform load error: MediaError",  # The browser cannot decode the clip, either.
    "signal is aborted",  # Gradio 6.0
    "Loading the script 'https://cdnjs.cloudflare",  # Gradio 6.0; our header refuses it.
)
HAS_TRANSCRIPT = "document.querySelector('#transcript textarea').value != ''"
LAST_ANSWER = "[...document.querySelectorAll('#chat [data-testid=bot]')].at(-1)"
# Collects in window.seen each text that the last answer has while it grows.
COLLECT_TEXTS = """() => {
    window.seen = [];
    const look = () => {
        const answers = document.querySelectorAll('#chat [data-testid=bot]');
        const text = answers.length ? answers[answers.length - 1].textContent.trim() : '';
        if (text && text !== window.seen[window.seen.length - 1]) window.seen.push(text);
    };
    const changes = {subtree: true, childList: true, characterData: true};
    new MutationObserver(look).observe(document.body, changes);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the page is tested in chromium, which is not installed (apt install chromium)")
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def contexts(browser) -> Callable:
    """Return `contexts(**options)`, which returns a context of the browser.

    Tests with equal options share one, which has cached most of the page.
    """
    contexts: dict[str, Any] = {}

    def open_once(**options: Any) -> Any:
        key = repr(sorted(options.items()))
        if key not in contexts:
            defaults = {"viewport": {"width": 1280, "height": 900}, "permissions": ["microphone"]}
            contexts[key] = browser.new_context(**(defaults | options))
        return contexts[key]

    return open_once


@pytest.fixture
def visit(contexts, served, tmp_path: Path) -> Iterator[Callable]:
    """Return `visit(kind, **context)`, which opens the page.

    At the end there must be no error on a console and no request to another host.
    """
    pages = []
    errors = []
    requests = []

    def note_console(message) -> None:
        if message.type == "error":
            errors.append(f"{message.text} {message.location}")

    def note_failure(request) -> None:
        if request.failure == "csp":  # The browser did not send it.
            requests.remove(request.url)

    def open_page(kind: str, **context):
        page = contexts(**context).new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", note_console)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.on("requestfailed", note_failure)
        page.goto(served(kind).url)
        page.wait_for_selector("#ask")
        pages.append(page)
        return page

    yield open_page
    errors = [error for error in errors if not error.startswith(GRADIOS_ERRORS)]
    output = Path(os.environ.get("LTU_TEST_OUTPUT", tmp_path))
    output.mkdir(parents=True, exist_ok=True)
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0]
    name = re.sub(r"\W+", "_", test).strip("_")
    open_pages = [page for page in pages if not page.is_closed()]
    for number, page in enumerate(open_pages):
        page.screenshot(path=output / f"{name}_{number}.png", full_page=True)
        page.close()
    assert not errors
    own = ("http://127.0.0.1:", "data:", "blob:")
    assert not [url for url in requests if not url.startswith(own)]


def upload(page, clip: Path) -> None:
    page.set_input_files("#clip input[type=file]", clip)


def wait(page, selector: str, pattern: str) -> str:
    """Wait until the text of an element matches a pattern; return the text."""
    element = page.locator(selector)
    deadline = time.monotonic() + PATIENCE
    while not re.search(pattern, element.inner_text()):
        text = element.inner_text()
        assert time.monotonic() < deadline, f"{selector} has {text!r}, not {pattern!r}"
        page.wait_for_timeout(20)
    return element.inner_text()


def submit(page, question: str) -> None:
    """Submit a question, and wait until it is in the chat."""
    before = page.locator("#chat [data-testid=user]").count()
    page.fill("#question textarea", question)
    page.click("#ask")
    page.wait_for_function(
        f"document.querySelectorAll('#chat [data-testid=user]').length > {before}"
    )


def ask(page, question: str, end: str = "tokens") -> str:
    """Submit a question, wait until the status matches `end`, and return the last answer."""
    submit(page, question)
    wait(page, "#status", end)
    return page.locator("#chat [data-testid=bot]").last.text_content().strip()


def wait_until_cancelled(here: SimpleNamespace, gate: tiny.Gate, count: int) -> None:
    """Let the model continue, token by token, until `count` questions were cancelled."""

    def is_cancelled() -> bool:
        gate.step()
        time.sleep(0.05)
        return here.demo.counts["cancelled"] == count

    wait_until(is_cancelled)


def set_number(page, name: str, value: int) -> None:
    """Fill a field of the settings, again if it gets its old value back while they open."""
    field = page.locator(f"#{name} input[type=number]")
    deadline = time.monotonic() + PATIENCE
    while True:
        field.fill(str(value))
        field.blur()
        page.wait_for_timeout(100)
        if field.input_value() == str(value):
            return
        assert time.monotonic() < deadline, f"{name} stays {field.input_value()}"


def plain(text: str) -> str:
    """Return a text with single spaces, as a browser may show it."""
    return " ".join(text.split())


# The page of LTU has fewer components than that of LTU-AS, and later tests cover it.
@pytest.mark.parametrize("kind", [pytest.param("ltu", marks=pytest.mark.slow), "ltu_as"])
def test_upload_ask_and_ask_again(kind: str, visit, served, folder: Path) -> None:
    page = visit(kind)
    here = served(kind)
    clip = folder / "long.wav"
    page.evaluate(COLLECT_TEXTS)
    upload(page, clip)

    # The preview marks the part of the clip that is used.
    used = f"{CHUNK_SECONDS[kind]:.2f} of 24.00 s"
    assert "8,000 Hz, 2 channels" in wait(page, "#spectrogram", f"Used: {used}")
    assert "not used" in wait(page, "#spectrogram", "not")
    width = page.locator(".mel").bounding_box()["width"]
    marked_width = page.locator(".mel > div:not(.rest)").bounding_box()["width"]
    assert marked_width / width == pytest.approx(CHUNK_SECONDS[kind] / 24, abs=0.01)

    # Two answers grow on the page; each is the engine's.
    answer = None
    for question in (DEFAULT_QUESTION, "Who says what?"):
        if kind == "ltu_as":
            page.wait_for_function(HAS_TRANSCRIPT)
        page.evaluate("window.seen = []")
        before = answer
        with tiny.closed_gate(here.engine) as gate:
            submit(page, question)
            # The engine waits until the page shows a part of the answer.
            page.wait_for_function("before => window.seen.some(text => text != before)", arg=before)
            gate.is_open.set()
            wait(page, "#status", "tokens")
        answer = page.locator("#chat [data-testid=bot]").last.text_content().strip()
        assert plain(answer) == plain(expected(here.engine, question, clip))
        seen = [text for text in page.evaluate("window.seen") if text != before]
        assert len(seen) > 1
        for earlier, later in zip(seen, seen[1:], strict=False):
            assert later.startswith(earlier), seen
        assert len(seen[0]) < len(seen[-1])
        assert f"truncated: used {used}" in wait(page, "#status", "tokens")
    assert page.locator("#chat [data-testid=user]").count() == 2
    assert page.locator("#chat [data-testid=bot]").count() == 2

    # With num_chunks 0 the whole clip is used.
    page.click("#settings button")
    set_number(page, "num_chunks", 0)
    wait(page, "#spectrogram", "24.00 of 24.00")
    request = Request(DEFAULT_QUESTION, str(clip), num_chunks=0)
    whole_clip = here.engine([request], max_new_tokens=TOKENS)[0]
    assert plain(ask(page, DEFAULT_QUESTION)) == plain(whole_clip.text)

    # Without a clip the preview and the chat are empty.
    page.locator("#clip button[aria-label=Clear]").click()
    wait(page, "#spectrogram", "^$")
    assert page.locator("#chat [data-testid=bot]").count() == 0


def test_the_transcript_on_the_page_is_used(visit, served, folder: Path) -> None:
    """On a phone: as Whisper wrote it, corrected, and cleared."""
    clip = folder / "good.wav"
    here = served("ltu_as")
    page = visit(
        "ltu_as",
        viewport={"width": 390, "height": 844},
        is_mobile=True,
        has_touch=True,
        color_scheme="dark",
    )
    upload(page, clip)
    page.wait_for_function(HAS_TRANSCRIPT)
    written = page.input_value("#transcript textarea")
    assert written == here.engine.cache.encode([Request("", str(clip))])[0].transcript
    answers = set()
    for transcript in (written, "a dog barks", ""):
        page.fill("#transcript textarea", transcript)
        answer = ask(page, DEFAULT_QUESTION)
        answers.add(answer)
        engines = expected(here.engine, DEFAULT_QUESTION, clip, transcript=transcript)
        assert plain(answer) == plain(engines)
    assert len(answers) == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.body.classList.contains('dark')")


def test_a_bad_clip_shows_its_reason(visit, served, folder: Path) -> None:
    """In the preview, and again after a question; then a good clip is decoded."""
    page = visit("ltu")
    for name, reason in (("silent.wav", "silent"), ("text.wav", "unreadable")):
        upload(page, folder / name)
        preview = wait(page, "#spectrogram", f"{reason}: {name}")
        assert str(served("ltu").uploads) not in preview
        assert ask(page, DEFAULT_QUESTION, f"{reason}: {name}") == "(no answer)"
        page.locator("#clip button[aria-label=Clear]").click()
        wait(page, "#spectrogram", "^$")
    upload(page, folder / "good.wav")
    wait(page, "#spectrogram", "0.50 of 0.50 s")
    assert ask(page, DEFAULT_QUESTION)
    assert page.locator("#chat [data-testid=bot]").count() == 1


def test_stop_presets_settings_and_no_clip(visit, served, folder: Path) -> None:
    page = visit("ltu")
    here = served("ltu")
    page.click("#ask")
    wait(page, "#status", "Give a clip and a question")
    page.get_by_text("Describe the clip in one sentence.").click()
    page.wait_for_function(
        "document.querySelector('#question textarea').value.startsWith('Describe')"
    )

    # Stop cancels an answer that grows.
    upload(page, folder / "other.wav")
    wait(page, "#spectrogram", "0.40 of 0.40 s")
    page.click("#settings button")
    set_number(page, "max_new_tokens", 1000)
    cancelled = here.demo.counts["cancelled"]
    with tiny.closed_gate(here.engine) as gate:
        page.click("#ask")
        page.wait_for_function(f"{LAST_ANSWER}?.textContent")
        page.click("#stop")
        wait(page, "#status", "stopped")
        wait_until_cancelled(here, gate, cancelled + 1)

    # The settings on the page are used.
    set_number(page, "max_new_tokens", 6)
    page.check("#do_sample input")
    sampling = {
        "do_sample": True,
        "temperature": 0.1,
        "top_p": 0.95,
        "top_k": 500,
        "max_new_tokens": 6,
        "seed": 42,
    }
    answer = ask(page, DEFAULT_QUESTION, "6 tokens, cut")
    engines = expected(here.engine, DEFAULT_QUESTION, folder / "other.wav", **sampling)
    assert plain(answer) == plain(engines)

    # Closing the page cancels an answer, too.
    set_number(page, "max_new_tokens", 1000)
    with tiny.closed_gate(here.engine) as gate:
        page.click("#ask")
        wait(page, "#status", "generating")
        page.close()
        wait_until_cancelled(here, gate, cancelled + 2)


def test_the_microphone_and_examples(visit) -> None:
    page = visit("ltu")
    page.click("#clip button[aria-label='Record audio']")
    page.click("#clip .record-button")
    wait(page, "#clip .duration", "0:01")  # More than the 0.64 s of a chunk.
    page.click("#clip .stop-button")
    wait(page, "#spectrogram", r"Used: 0\.64 of \d+\.")
    assert ask(page, DEFAULT_QUESTION)
    if TOY_SET.is_dir():
        page.get_by_text("church bell").click()
        wait(page, "#spectrogram", r"Used: 0\.64 of 4\.00 s")
