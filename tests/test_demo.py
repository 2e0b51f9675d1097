"""The demo: its page in a real browser, `/predict` by the real client, and what neither may do."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import torch
from gradio_client import Client, handle_file
from transformers import AutoModelForCausalLM

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.checkpoints import released_files
from ltu.inference.engine import LtuEngine
from ltu.inference.generation_flags import open_engine
from ltu.inference.requests import Request
from ltu.inference_gradio import parse_args
from ltu.serving.gradio_page import FIRST, TOY_SET, Demo
from ltu_as.convert_checkpoint import main as convert_as
from tests import tiny
from tests.golden.rule_init import rule
from tests.machine import PATIENCE, wait_until
from tests.released import narrow, read, write_llm
from tests.whisper_tiny import save_whisper

ROOT = Path(__file__).parent.parent
TOKENS = 60
WINDOW = {"ltu": 0.64, "ltu_as": 10.0}  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `ltu` and `ltu_as`, and clips: good.wav, other.wav, long.wav (two channels), bad and silent ones."""
    root = tmp_path_factory.mktemp("demo")
    llm = tiny.write_llm(root / "llm")
    model = AutoModelForCausalLM.from_pretrained(llm)
    model.lm_head.weight.data[:259] = (
        0  # Control and byte tokens: a random model's bytes are no UTF-8.
    )
    model.save_pretrained(llm)
    tiny.write_checkpoint(root / "ltu", llm, tiny.LORA)
    save_whisper(root / "whisper.pt")
    flags = f"--init --llm {llm} --whisper {root}/whisper.pt --feature_precision fp32 --num_layer_heads 2"
    convert_as(f"{flags} --output_dir {root}/ltu_as".split())
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
    """`served(kind)`: a running demo, opened once.

    Its `url`, `page`, `demo`, `engine` and a `client`; `uploads` is the folder of all uploads.
    """
    running: dict[str, SimpleNamespace] = {}
    uploads = tmp_path_factory.mktemp("uploads")

    def open_once(kind: str) -> SimpleNamespace:
        if kind not in running:
            flags = f"--model {folder}/{kind} --device cpu --max_new_tokens {TOKENS} --max_seconds 50 --max_mb 1"
            demo = Demo(open_engine(args := parse_args(flags.split())), args)
            page = demo.launch(prevent_thread_lock=True, quiet=True)
            given = {"page": page, "demo": demo, "engine": demo.engine, "uploads": uploads}
            given["client"] = Client(page.local_url, verbose=False)
            running[kind] = SimpleNamespace(url=page.local_url, **given)
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
    settings = {"max_new_tokens": TOKENS, "repetition_penalty": 1.0} | settings
    answer = engine([Request(question, str(clip), settings.pop("transcript", None))], **settings)[0]
    assert answer.answered and answer.text
    return answer.text


# --- the client


def test_predict_of_ltu(served, folder: Path) -> None:
    """As the original's README calls it."""
    here = served("ltu")
    client = here.client
    result = client.predict(handle_file(folder / "good.wav"), FIRST, api_name="/predict")
    assert result == expected(here.engine, FIRST, folder / "good.wav")
    endpoints = client.view_api(return_format="dict")
    assert list(endpoints["named_endpoints"]) == ["/predict"] and not endpoints["unnamed_endpoints"]
    names = [p["parameter_name"] for p in endpoints["named_endpoints"]["/predict"]["parameters"]]
    assert names == ["audio", "question"]


def test_predict_of_ltu_as(served, folder: Path) -> None:
    """With "" Whisper writes the transcript; the size of the language model is as the original's demo called it."""
    here, clip = served("ltu_as"), folder / "good.wav"
    client = here.client
    found = [
        client.predict(handle_file(clip), words, FIRST, "7B (Default)", api_name="/predict")
        for words in ("", "a dog")
    ]
    assert found == [
        expected(here.engine, FIRST, clip, transcript=words) for words in (None, "a dog")
    ]
    assert found[0] != expected(here.engine, FIRST, clip, transcript="")
    endpoints = client.view_api(return_format="dict")
    assert list(endpoints["named_endpoints"]) == ["/predict"] and not endpoints["unnamed_endpoints"]
    names = [p["parameter_name"] for p in endpoints["named_endpoints"]["/predict"]["parameters"]]
    assert names == ["audio", "transcript", "question", "llm_size"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("text.wav", "unreadable"), ("silent.wav", "silent"), ("<b>text.wav", "unreadable")],
)
def test_a_bad_clip_is_a_reason(name: str, reason: str, served, folder: Path) -> None:
    here = served("ltu")
    with pytest.raises(Exception, match=reason) as error:
        here.client.predict(handle_file(folder / name), FIRST, api_name="/predict")
    assert str(here.uploads) not in str(error.value) and "<b>" not in str(error.value)


def test_limits(served, folder: Path, tmp_path: Path) -> None:
    """Length of a clip, size of a file, length of a question."""
    client = served("ltu").client
    soundfile.write(tmp_path / "slow.wav", tiny.clip(5, 30), 8_000, subtype="PCM_U8")
    soundfile.write(tmp_path / "big.wav", tiny.clip(6, 40), 16_000)
    assert (tmp_path / "big.wav").stat().st_size > 2**20 > (tmp_path / "slow.wav").stat().st_size
    with pytest.raises(Exception, match="too_long"):
        client.predict(handle_file(tmp_path / "slow.wav"), FIRST, api_name="/predict")
    with pytest.raises(Exception, match="413|too large|exceed"):
        client.predict(handle_file(tmp_path / "big.wav"), FIRST, api_name="/predict")
    with pytest.raises(Exception, match="characters"):
        client.predict(handle_file(folder / "good.wav"), "why? " * 2000, api_name="/predict")


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=PATIENCE) as client:
        yield client


def post(http: httpx.Client, url: str, data: list, name: str = "predict") -> str:
    """Call an endpoint as any program can: the text of its last event."""
    event = http.post(f"{url}gradio_api/call/{name}", json={"data": data}).json()
    return http.get(f"{url}gradio_api/call/{name}/{event['event_id']}").text


def test_no_path_or_address_of_a_request_is_opened(
    served, http: httpx.Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/etc/passwd, a file beside the uploads, one over a link or `..`, an address on this machine or another."""
    here, opened = served("ltu"), []
    monkeypatch.setattr(
        "ltu.serving.gradio_page.decode_audio", lambda path, *_: opened.append(path)
    )
    monkeypatch.setattr(
        "gradio.processing_utils.async_ssrf_protected_download", lambda url, **_: opened.append(url)
    )
    beside, link = here.uploads.parent / "beside.wav", here.uploads / "link.wav"
    shutil.copy(folder / "good.wav", beside)
    link.symlink_to(beside)
    places = [
        "/etc/passwd",
        str(beside),
        str(here.uploads / ".." / "beside.wav"),
        "beside.wav",
        "../../etc/passwd",
    ]
    places += [
        str(link),
        f"{here.url}config",
        "http://127.0.0.1:9/a.wav",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a.wav",
    ]
    places += [
        "https://example.com/a.wav",
        f"/gradio_api/file={beside}",
        f"{here.url}gradio_api/file={beside}",
    ]
    for place in places:
        for more in ({}, {"is_stream": True, "url": place, "orig_name": "good.wav"}):
            value = {"path": place, "meta": {"_type": "gradio.FileData"}} | more
            text = post(http, here.url, [value, FIRST])
            assert "event: error" in text and "event: complete" not in text, (place, more, text)
        # 302: Gradio 6.0 sends the asker elsewhere.
        assert http.get(f"{here.url}gradio_api/file={place}").status_code in (302, 403, 404), place
    link.unlink()
    assert not opened


def test_an_upload_by_hand_is_answered(served, http: httpx.Client, folder: Path) -> None:
    """The counterpart: the same call with the place that an upload was given."""
    here = served("ltu")
    files = {"files": ("good.wav", (folder / "good.wav").read_bytes())}
    place = http.post(f"{here.url}gradio_api/upload", files=files).json()[0]
    text = post(http, here.url, [{"path": place, "meta": {"_type": "gradio.FileData"}}, FIRST])
    assert json.loads(text.split("data: ")[-1]) == [
        expected(here.engine, FIRST, folder / "good.wav")
    ]


# --- the command


def test_newest_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its kind, neither a start folder nor a checkpoint inside a run, whatever was written last."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="No checkpoint of ltu is in exp or pretrained_mdls"
    ):
        released_files.find_or_make("", "ltu")
    places = ("exp/a/stage1", "pretrained_mdls/b", "exp/a/stage1/checkpoint-5", "exp/c/init")
    for age, (place, kind) in enumerate(
        [*((place, "ltu") for place in places), ("exp/d", "ltu_as")]
    ):
        shutil.copytree(folder / kind, place)
        if not place.endswith("checkpoint-5"):
            stage = "init" if place.endswith("init") else "trained"
            Path(place, "ltu_state.json").write_text(json.dumps({"stage": stage}))
        os.utime(Path(place, "model.safetensors"), (age, age))
    assert released_files.find_or_make("", "ltu") == "pretrained_mdls/b"
    assert released_files.find_or_make("", "ltu_as") == "exp/d"
    assert released_files.find_or_make("exp/c/init", "ltu") == "exp/c/init"
    shutil.rmtree("pretrained_mdls")
    shutil.rmtree("exp/a")
    assert released_files.find_or_make("", "ltu") == "exp/c/init"


def test_a_released_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brought from a mirror and converted, once; then it can be asked."""
    shapes = narrow(read("layout_ltu")["tiny.lora_all"]["saved_by_trainer"])
    (tmp_path / "mirror").mkdir()
    state = {key: torch.from_numpy(rule(key, tuple(shape))) for key, shape in shapes.items()}
    torch.save(state, tmp_path / "mirror" / "ltu_ori_paper.bin")
    llm = write_llm(tmp_path / "llm")
    monkeypatch.chdir(tmp_path)
    given = {"kind": "ltu", "llm": str(llm), "source": str(tmp_path / "mirror")}
    place = released_files.find_or_make("ltu_ori_paper", **given)
    shutil.rmtree("mirror")
    before = {path: path.stat().st_mtime_ns for path in Path("pretrained_mdls").rglob("*")}
    assert released_files.find_or_make("ltu_ori_paper", **given) == place
    assert before == {path: path.stat().st_mtime_ns for path in Path("pretrained_mdls").rglob("*")}
    engine = LtuEngine.from_pretrained(place, device="cpu")
    assert engine([Request(FIRST, tiny.clip(1))], max_new_tokens=3)[0].answered
    for name, words in (
        ("ltu_as_ori_paper", "bash ltu_as/inference.sh"),
        ("ltu_13b", "no single checkpoint"),
    ):
        with pytest.raises(ValueError, match=words):
            released_files.find_or_make(name, "ltu")


def check_the_command(
    folder: Path, log: Path, is_running: Callable[[], bool], stop: Callable[[], int]
) -> None:
    """A page that answers; stopped, it says how many questions ended how, and leaves no file."""
    try:
        found = None
        while found is None:
            assert is_running(), log.read_text()
            time.sleep(0.05)
            said = log.read_text() if log.is_file() else ""
            found = re.search(r"http://127\.0\.0\.1:\d+", said)
        client = Client(found[0], verbose=False)
        rest = (FIRST, "7B (Default)")
        assert client.predict(handle_file(folder / "good.wav"), "a dog", *rest, api_name="/predict")
        with pytest.raises(Exception, match="unreadable"):
            client.predict(handle_file(folder / "text.wav"), "", *rest, api_name="/predict")
        assert [path for path in log.parent.glob("ltu_demo_*/**/*") if path.is_file()]
    finally:
        status = stop()
    assert status == 0
    said = log.read_text()
    assert "Questions: 1 ok, 1 unreadable" in said and not list(log.parent.glob("ltu_demo_*"))
    assert FIRST not in said and "good.wav" not in said and "text.wav" not in said


def test_the_command(folder: Path, tmp_path: Path) -> None:
    words, log = ["--model", str(folder / "ltu_as"), "--device", "cpu"], tmp_path / "log"
    process = tiny.start_command("ltu_as.inference_gradio", words, log, TMPDIR=str(tmp_path))

    def stop() -> int:
        process.terminate()
        process.join(PATIENCE)
        return process.exitcode

    check_the_command(folder, log, process.is_alive, stop)


@pytest.mark.slow  # Starts an interpreter.
def test_the_script(folder: Path, tmp_path: Path) -> None:
    """From another folder."""
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

# The player's word for a clip that the browser, too, cannot decode; then two of Gradio 6.0, the one because it may not.
GRADIOS_ERRORS = (
    "Waveform load error: MediaError",
    "signal is aborted",
    "Loading the script 'https://cdnjs.cloudflare",
)
LAST_ANSWER = "[...document.querySelectorAll('#chat [data-testid=bot]')].at(-1)"
GROWTH = """() => {
    window.seen = [];
    const look = () => {
        const answers = document.querySelectorAll('#chat [data-testid=bot]');
        const text = answers.length ? answers[answers.length - 1].textContent.trim() : '';
        if (text && text !== window.seen[window.seen.length - 1]) window.seen.push(text);
    };
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
    place = shutil.which("chromium")
    if place is None:
        pytest.skip(
            "the page is tested in chromium, which is not here (Debian: apt install chromium)"
        )
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=place, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def contexts(browser) -> Callable:
    """`contexts(**options)`: a context of the browser.

    Tests with equal options share one, which has cached most of the page.
    """
    known: dict[str, Any] = {}

    def open_once(**options: Any) -> Any:
        key = repr(sorted(options.items()))
        if key not in known:
            usual = {"viewport": {"width": 1280, "height": 900}, "permissions": ["microphone"]}
            known[key] = browser.new_context(**(usual | options))
        return known[key]

    return open_once


@pytest.fixture
def visit(contexts, served, tmp_path: Path) -> Iterator[Callable]:
    """`visit(kind, **context)` opens the page. At the end: no error on a console, no request to another host."""
    pages, errors, requests = [], [], []

    def open_page(kind: str, **context):
        page = contexts(**context).new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on(
            "console",
            lambda said: (
                errors.append(f"{said.text} {said.location}") if said.type == "error" else None
            ),
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.on(
            "requestfailed",
            lambda request: requests.remove(request.url) if request.failure == "csp" else None,
        )
        page.goto(served(kind).url)
        page.wait_for_selector("#ask")
        pages.append(page)
        return page

    yield open_page
    errors = [error for error in errors if not error.startswith(GRADIOS_ERRORS)]
    output = Path(os.environ.get("LTU_TEST_OUTPUT", tmp_path))
    output.mkdir(parents=True, exist_ok=True)
    test = re.sub(
        r"\W+", "_", os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0]
    ).strip("_")
    for number, page in enumerate(page for page in pages if not page.is_closed()):
        page.screenshot(path=output / f"{test}_{number}.png", full_page=True)
        page.close()
    assert not errors
    assert not [
        url for url in requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))
    ]


def upload(page, clip: Path) -> None:
    page.set_input_files("#clip input[type=file]", clip)


def wait(page, element: str, words: str) -> str:
    """The text of an element, once it has words in it."""
    found = page.locator(element)
    deadline = time.monotonic() + PATIENCE
    while not re.search(words, found.inner_text()):
        assert time.monotonic() < deadline, f"{element} says {found.inner_text()!r}, not {words!r}"
        page.wait_for_timeout(20)
    return found.inner_text()


def start_asking(page, question: str) -> None:
    """Ask, and wait until the question is in the chat."""
    before = page.locator("#chat [data-testid=user]").count()
    page.fill("#question textarea", question)
    page.click("#ask")
    page.wait_for_function(
        f"document.querySelectorAll('#chat [data-testid=user]').length > {before}"
    )


def ask(page, question: str, end: str = "tokens") -> str:
    """Ask, and wait for the end: the last answer in the chat."""
    start_asking(page, question)
    wait(page, "#status", end)
    return page.locator("#chat [data-testid=bot]").last.text_content().strip()


def wait_until_cancelled(here: SimpleNamespace, gate: tiny.Gate, count: int) -> None:
    """Let the model go on, token by token, until as many questions were cancelled."""

    def is_cancelled() -> bool:
        gate.step()
        time.sleep(0.05)
        return here.demo.counts["cancelled"] == count

    wait_until(is_cancelled)


def set_number(page, name: str, value: int) -> None:
    """Fill a field of the settings. While they open, it may take its old value back."""
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
    return " ".join(text.split())


# The page of LTU has less on it, and the tests below are about it.
@pytest.mark.parametrize("kind", [pytest.param("ltu", marks=pytest.mark.slow), "ltu_as"])
def test_upload_ask_and_ask_again(kind: str, visit, served, folder: Path) -> None:
    page, here = visit(kind), served(kind)
    page.evaluate(GROWTH)
    upload(page, folder / "long.wav")
    heard = f"{WINDOW[kind]:.2f} of 24.00 s"
    assert "8,000 Hz, 2 channels" in wait(page, "#picture", heard) and "not heard" in wait(
        page, "#picture", "not"
    )
    width, marked = (
        page.locator(part).bounding_box()["width"] for part in (".mel", ".mel > div:not(.rest)")
    )
    assert marked / width == pytest.approx(WINDOW[kind] / 24, abs=0.01)
    answer = None
    for question in (FIRST, "Who says what?"):
        if kind == "ltu_as":
            page.wait_for_function("document.querySelector('#words textarea').value != ''")
        page.evaluate("window.seen = []")
        before = answer
        with tiny.closed_gate(here.engine) as gate:
            start_asking(page, question)
            # The engine waits until the page shows a part of the answer.
            page.wait_for_function("before => window.seen.some(text => text != before)", arg=before)
            gate.is_open.set()
            wait(page, "#status", "tokens")
        answer = page.locator("#chat [data-testid=bot]").last.text_content().strip()
        assert plain(answer) == plain(expected(here.engine, question, folder / "long.wav"))
        seen = [text for text in page.evaluate("window.seen") if text != before]
        assert len(seen) > 1 and all(
            late.startswith(early) for early, late in zip(seen, seen[1:], strict=False)
        ), seen
        assert len(seen[0]) < len(seen[-1])
        assert f"truncated: heard {heard}" in wait(page, "#status", "tokens")
    assert (
        page.locator("#chat [data-testid=user]").count()
        == page.locator("#chat [data-testid=bot]").count()
        == 2
    )
    page.click("#settings button")
    set_number(page, "num_chunks", 0)
    wait(page, "#picture", "24.00 of 24.00")
    all_heard = here.engine(
        [Request(FIRST, str(folder / "long.wav"), num_chunks=0)], max_new_tokens=TOKENS
    )[0]
    assert plain(ask(page, FIRST)) == plain(all_heard.text)
    page.locator("#clip button[aria-label=Clear]").click()
    wait(page, "#picture", "^$")
    assert page.locator("#chat [data-testid=bot]").count() == 0


def test_the_transcript_that_stands_there_is_used(visit, served, folder: Path) -> None:
    """On a phone: as Whisper wrote it, corrected, emptied; and another clip has another one."""
    clip, here = folder / "good.wav", served("ltu_as")
    page = visit(
        "ltu_as",
        viewport={"width": 390, "height": 844},
        is_mobile=True,
        has_touch=True,
        color_scheme="dark",
    )
    upload(page, clip)
    page.wait_for_function("document.querySelector('#words textarea').value != ''")
    written = page.input_value("#words textarea")
    assert written == here.engine.cache.encode([Request("", str(clip))])[0].transcript
    found = {}
    for words in (written, "a dog barks", ""):
        page.fill("#words textarea", words)
        found[words] = ask(page, FIRST)
        assert plain(found[words]) == plain(expected(here.engine, FIRST, clip, transcript=words))
    assert len(set(found.values())) == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.body.classList.contains('dark')")


def test_a_bad_clip_shows_its_reason(visit, served, folder: Path) -> None:
    """Where the picture would be, and again where it is asked about; then a good clip is heard."""
    page = visit("ltu")
    for name, reason in (("silent.wav", "silent"), ("text.wav", "unreadable")):
        upload(page, folder / name)
        assert str(served("ltu").uploads) not in wait(page, "#picture", f"{reason}: {name}")
        assert ask(page, FIRST, f"{reason}: {name}") == "(no answer)"
        page.locator("#clip button[aria-label=Clear]").click()
        wait(page, "#picture", "^$")
    upload(page, folder / "good.wav")
    wait(page, "#picture", "0.50 of 0.50 s")
    assert ask(page, FIRST) and page.locator("#chat [data-testid=bot]").count() == 1


def test_stop_presets_settings_and_no_clip(visit, served, folder: Path) -> None:
    page, here = visit("ltu"), served("ltu")
    page.click("#ask")
    wait(page, "#status", "Give a clip and a question")
    page.get_by_text("Describe the clip in one sentence.").click()
    page.wait_for_function(
        "document.querySelector('#question textarea').value.startsWith('Describe')"
    )
    upload(page, folder / "other.wav")
    wait(page, "#picture", "0.40 of 0.40 s")
    page.click("#settings button")
    set_number(page, "max_new_tokens", 1000)
    cancelled = here.demo.counts["cancelled"]
    with tiny.closed_gate(here.engine) as gate:
        page.click("#ask")
        page.wait_for_function(f"{LAST_ANSWER}?.textContent")
        page.click("#stop")
        wait(page, "#status", "stopped")
        wait_until_cancelled(here, gate, cancelled + 1)
    set_number(page, "max_new_tokens", 6)
    page.check("#do_sample input")
    sampled = {
        "do_sample": True,
        "temperature": 0.1,
        "top_p": 0.95,
        "top_k": 500,
        "max_new_tokens": 6,
        "seed": 42,
    }
    answer = ask(page, FIRST, "6 tokens, cut")
    assert plain(answer) == plain(expected(here.engine, FIRST, folder / "other.wav", **sampled))
    set_number(page, "max_new_tokens", 1000)
    with tiny.closed_gate(here.engine) as gate:
        page.click("#ask")
        wait(page, "#status", "listening")
        page.close()
        wait_until_cancelled(here, gate, cancelled + 2)


def test_the_microphone_and_examples_are_heard(visit) -> None:
    page = visit("ltu")
    page.click("#clip button[aria-label='Record audio']")
    page.click("#clip .record-button")
    wait(page, "#clip .duration", "0:01")  # More than the 0.64 s of a window.
    page.click("#clip .stop-button")
    wait(page, "#picture", r"Heard: 0\.64 of \d+\.")
    assert ask(page, FIRST)
    if TOY_SET.is_dir():
        page.get_by_text("church bell").click()
        wait(page, "#picture", r"Heard: 0\.64 of 4\.00 s")
