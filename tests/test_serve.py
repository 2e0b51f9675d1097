"""The server under OpenAI's own client, unmodified, over loopback: its answers are the engine's."""

import asyncio
import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
import soundfile

from ltu.data.audio import load_audio
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu.models.prompt_template import load_prompt_template
from ltu.serve import read_flags
from ltu.serving.openai_server import make_server
from ltu_as.convert_checkpoint import main as convert
from tests import tiny
from tests.machine import PATIENCE, wait_until
from tests.test_any_llm import byte_tokenizer
from tests.whisper_tiny import save_whisper

TOY = sorted((Path(__file__).parents[1] / "data" / "toy" / "audio").glob("*.flac"))[:3]
SPEECH = sorted((Path(__file__).parents[1] / "data" / "toy" / "speech").glob("*.flac"))[:1]
QUESTION = "What can be inferred from the audio?"


class Served:
    """A server in a thread of this process, its engine, and clients of it."""

    def __init__(self, engine: LtuEngine, port: int):
        self.engine, self.port, self.url = engine, port, f"http://127.0.0.1:{port}"
        settings = {"max_retries": 0, "timeout": PATIENCE}
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", **settings)

    def ask(self, *parts: dict, **settings):
        said = {
            "messages": [{"role": "user", "content": list(parts)}],
            "model": "tiny",
            "max_tokens": 12,
        } | settings
        return self.client.chat.completions.create(**said)

    def answer_alone(self, question: str, audio=None, **settings) -> str:
        decoding = {"max_new_tokens": 12} | settings.pop("decoding", {})
        return self.engine([Request(question, audio, decoding=decoding, **settings)])[0].text

    def meter(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            found = re.search(rf"^{re.escape(name)} (\S+)$", reply.read().decode(), re.M)
        return float(found[1]) if found else 0.0

    def send(
        self, body: bytes, length: int | None = -1, **headers: str
    ) -> http.client.HTTPConnection:
        """Send a request below the client; without length it is chunked."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {"Content-Type": "application/json"} | {
            k.replace("_", "-"): v for k, v in headers.items()
        }
        if length is None:
            parts = [body[start : start + 65536] for start in range(0, len(body), 65536)]
            connection.request(
                "POST", "/v1/chat/completions", iter(parts), headers, encode_chunked=True
            )
        else:
            headers["Content-Length"] = str(len(body) if length < 0 else length)
            connection.request("POST", "/v1/chat/completions", body, headers)
        return connection

    def post(self, body: bytes, length: int | None = -1, **headers: str) -> tuple[int, dict]:
        """Send a request and read the status and content of its reply."""
        with closing(self.send(body, length, **headers)) as connection:
            with connection.getresponse() as reply:
                return reply.status, json.loads(reply.read())


@contextmanager
def serve(engine: LtuEngine, *flags: str) -> Iterator[Served]:
    args = read_flags(["--model", "tiny", "--port", "0", *flags])
    server = make_server(engine, args)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Served(engine, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    llm = tiny.write_llm(
        root / "llm", tokenizer=byte_tokenizer(), bos_token_id=None, eos_token_id=0
    )
    return tiny.write_checkpoint(root / "tiny", llm, tiny.LORA)


@pytest.fixture(scope="module")
def engine(folder: Path) -> LtuEngine:
    return LtuEngine.from_pretrained(folder)


@pytest.fixture(scope="module")
def served(engine: LtuEngine) -> Iterator[Served]:
    with serve(engine, "--max_seconds", "20", "--max_tokens", "600", "--max_body_mb", "2") as found:
        yield found


@pytest.fixture
def gate(engine: LtuEngine) -> Iterator[tiny.Gate]:
    """A closed gate in the engine of `served` and of every server of `engine`."""
    with tiny.closed_gate(engine) as gate:
        yield gate


def words(text: str = QUESTION) -> dict:
    return {"type": "text", "text": text}


def sound(data: bytes, kind: str = "wav") -> dict:
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": kind},
    }


def encoded(waveform: np.ndarray, kind: str = "wav", rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format=kind)
    return file.getvalue()


# --- answers


@pytest.mark.parametrize("kind", ["flac", "wav", "mp3"])
def test_answers_are_the_engines(served: Served, kind: str) -> None:
    for path in TOY:
        data = path.read_bytes() if kind == "flac" else encoded(load_audio(path), kind)
        reply = served.ask(words(), sound(data, kind))
        answer = served.engine([Request(QUESTION, data)], max_new_tokens=12)[0]
        assert answer.text and reply.choices[0].message.content == answer.text
        assert reply.choices[0].finish_reason == answer.finish_reason
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (
            answer.prompt_tokens,
            answer.new_tokens,
        )
        for name, value in reply.model_extra["ltu"].items():
            assert name == "seed" or value == getattr(answer, name), name
        assert (
            reply.model_extra["ltu"]["status"] == "truncated"
            and reply.model_extra["ltu"]["sampling_rate"] == 16_000
        )


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.5, "seed": 3}, {"stop": ["a", "qx"]}], ids=str
)
def test_a_stream_is_the_answer_piece_by_piece(served: Served, settings: dict) -> None:
    data = TOY[0].read_bytes()
    whole = served.ask(words(), sound(data, "flac"), max_tokens=60, **settings)
    usage = {"include_usage": True}
    parts = list(
        served.ask(
            words(),
            sound(data, "flac"),
            max_tokens=60,
            stream=True,
            stream_options=usage,
            **settings,
        )
    )
    texts = [
        part.choices[0].delta.content
        for part in parts
        if part.choices and part.choices[0].delta.content
    ]
    assert len(texts) > 1 and "".join(texts) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == whole.choices[
        0
    ].finish_reason
    assert parts[-1].usage == whole.usage and not parts[-1].choices
    extras = [part.model_extra.get("ltu") for part in parts]
    assert (
        extras[-1] == extras[-2]
        and extras[-1]["seconds_heard"] == whole.model_extra["ltu"]["seconds_heard"]
    )
    assert {part.id for part in parts} == {parts[0].id}
    if "stop" not in settings:
        sampling = {"do_sample": True, "temperature": 1.5} if settings else {}
        expected = served.answer_alone(
            QUESTION, data, decoding=sampling | {"max_new_tokens": 60}, seed=settings.get("seed")
        )
        assert expected == whole.choices[0].message.content


def test_stop_sequences_end_an_answer(served: Served) -> None:
    whole = served.answer_alone(QUESTION, decoding={"max_new_tokens": 60})
    stop = whole[len(whole) // 2 :][:3]
    reply = served.ask(words(), max_tokens=60, stop=stop)
    assert (
        reply.choices[0].message.content == whole.split(stop)[0]
        and reply.choices[0].finish_reason == "stop"
    )
    assert reply.usage.completion_tokens < 60
    parts = served.ask(words(), max_tokens=60, stop=stop, stream=True)
    pieces = [part.choices[0].delta.content or "" for part in parts]
    assert (
        "".join(pieces) == whole.split(stop)[0]
    )  # What might have become the stop sequence was held back.
    assert (
        served.ask(words(), max_tokens=60, stop=["\ud7ff never"]).choices[0].message.content
        == whole
    )


def test_sampling(served: Served) -> None:
    greedy = served.answer_alone(QUESTION)
    assert served.ask(words()).choices[0].message.content == greedy
    assert served.ask(words(), temperature=0, top_p=0.5).choices[0].message.content == greedy
    replies = [served.ask(words(), temperature=2, extra_body={"top_k": 50}) for _ in range(3)]
    assert (
        len({reply.choices[0].message.content for reply in replies}) > 1
    )  # Each draws a seed, and says which.
    for reply in replies:
        sampling = {"do_sample": True, "temperature": 2.0, "top_k": 50}
        seed = reply.model_extra["ltu"]["seed"]
        assert (
            served.answer_alone(QUESTION, decoding=sampling, seed=seed)
            == reply.choices[0].message.content
        )


def test_fields_of_ours(served: Served) -> None:
    data = encoded(tiny.clip(1, 2.0))
    for ours in (
        {"num_chunks": 2},
        {"num_chunks": "all"},
        {"transcript": "good morning"},
        {"mode": "asr_only"},
    ):
        reply = served.ask(words(), sound(data), extra_body=ours)
        theirs = {name: 0 if value == "all" else value for name, value in ours.items()}
        assert reply.choices[0].message.content == served.answer_alone(QUESTION, data, **theirs)
        assert reply.model_extra["ltu"]["num_chunks"] == {2: 2, 0: 4}.get(
            theirs.get("num_chunks"), int("mode" not in ours)
        )
        assert reply.model_extra["ltu"]["transcript"] == ours.get("transcript", "")
    penalty = {"repetition_penalty": 9.0}
    reply = served.ask(words(), max_tokens=60, extra_body=penalty).choices[0].message.content
    plain = {"max_new_tokens": 60}
    assert (
        reply
        == served.answer_alone(QUESTION, decoding=plain | penalty)
        != served.answer_alone(QUESTION, decoding=plain)
    )


def test_what_changes_nothing_is_ignored(served: Served) -> None:
    harmless = {
        "n": 1,
        "user": "u",
        "store": False,
        "metadata": {},
        "frequency_penalty": 0.0,
        "logprobs": False,
    }
    harmless |= {
        "response_format": {"type": "text"},
        "tools": [],
        "presence_penalty": None,
        "reasoning_effort": "low",
    }
    assert served.ask(words(), **harmless).choices[0].message.content == served.answer_alone(
        QUESTION
    )
    said = served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": QUESTION}], max_completion_tokens=12
    )
    assert (
        said.choices[0].message.content == served.answer_alone(QUESTION)
        and said.model_extra["ltu"]["num_chunks"] == 0
    )


def test_models_and_health(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="one model here: 'tiny'"):
        served.client.models.retrieve("other")
    with urllib.request.urlopen(f"{served.url}/health") as reply:
        assert json.load(reply)["status"] == "ok"
    with pytest.raises(openai.NotFoundError):
        served.client.embeddings.create(model="tiny", input="x")


def test_turns_need_a_chat_template(served: Served, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    turns += [
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [words("Loud?")]},
    ]
    for few in (turns, turns[:2], turns[1:]):
        with pytest.raises(openai.BadRequestError, match="cannot express the turns"):
            served.ask(messages=few)
    llm = tiny.write_llm(
        tmp_path / "llm", tokenizer=byte_tokenizer(), bos_token_id=None, eos_token_id=0
    )
    folder = tiny.write_checkpoint(
        tmp_path / "c", llm, prompt_template=load_prompt_template("chat", llm)
    )
    with serve(LtuEngine.from_pretrained(folder)) as chatting:
        data = encoded(tiny.clip(3))
        turns[1]["content"] = [sound(data), words("What is it?")]
        history = [*turns[:1], {"role": "user", "content": "What is it?"}, turns[2]]
        expected = chatting.answer_alone("Loud?", data, history=history)
        assert (
            chatting.ask(messages=turns).choices[0].message.content
            == expected
            != chatting.answer_alone("Loud?", data)
        )
        with pytest.raises(openai.BadRequestError, match="the last must be the user's"):
            chatting.ask(messages=turns[:3])


def test_ltu_as_hears_words(tmp_path: Path) -> None:
    save_whisper(tmp_path / "whisper.pt")
    tiny.write_llm(tmp_path / "llm")
    flags = f"--init --llm {tmp_path}/llm --whisper {tmp_path}/whisper.pt --feature_precision fp32 --num_layer_heads 2"
    convert(f"{flags} --output_dir {tmp_path}/init".split())
    data = SPEECH[0].read_bytes()
    with serve(LtuEngine.from_pretrained(tmp_path / "init")) as served:
        for ours in (
            {},
            {"transcript": "good morning"},
            {"mode": "audio_only"},
            {"mode": "asr_only"},
        ):
            reply = served.ask(words(), sound(data, "flac"), extra_body=ours)
            answer = served.engine([Request(QUESTION, data, **ours)], max_new_tokens=12)[0]
            assert reply.choices[0].message.content == answer.text
            assert reply.model_extra["ltu"]["transcript"] == answer.transcript
            assert bool(answer.transcript) == (ours.get("mode") != "audio_only")


# --- what gets no answer

SOUND = sound(encoded(tiny.clip(1)))
REFUSED = [
    ({"n": 2}, "n"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"logprobs": True}, "logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"extra_body": {"temprature": 1}}, "temprature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 1, "top_p": 1.5}, "top_p"),
    ({"temperature": 1, "extra_body": {"top_k": -1}}, "top_k"),
    ({"max_tokens": 0}, "max_new_tokens"),
    ({"max_tokens": 601}, "At most 600"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"extra_body": {"mode": "loud"}}, "mode is one of"),
    ({"extra_body": {"num_chunks": -1}}, "num_chunks is"),
    ({"extra_body": {"num_chunks": "many"}}, "num_chunks is"),
    ({"extra_body": {"transcript": ["x"]}}, "transcript"),
    ({"messages": []}, "the last must be the user's"),
    ({"messages": "What is it?"}, "messages"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "user", "content": None}]}, "A message is"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "role"),
    ({"messages": [{"role": "user", "content": [SOUND, words(), SOUND]}]}, "hears one clip"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": "file:///x"}]}]}, "audio_url"),
    ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "/etc/passwd"}]}]}, "audio"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": "/etc/passwd"}]}]}, "A message"),
    ({"messages": [{"role": "user", "content": [sound(b"x", "ogg")]}]}, "format"),
    ({"messages": [{"role": "user", "content": "a" * 100_001}]}, "too long"),
    ({"messages": [{"role": "user", "content": "long " * 3000}]}, "tokens"),
]  # fmt: skip


@pytest.mark.parametrize("settings, says", REFUSED, ids=lambda value: str(value)[:60])
def test_refused(served: Served, settings: dict, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as found:
        served.ask(words(), **settings)
    assert set(found.value.body) == {"message", "type", "param", "code"}
    assert found.value.type == "invalid_request_error" and len(found.value.body["message"]) < 1000


@pytest.mark.parametrize("is_streamed", [False, True])
def test_clips_that_cannot_be_heard(served: Served, is_streamed: bool) -> None:
    clips = {"unreadable": b"no sound at all", "too_short": encoded(tiny.clip(1, 0.01))}
    clips |= {"silent": encoded(np.zeros(16_000)), "too_long": encoded(tiny.clip(1, 21.0), "flac")}
    for status, data in clips.items():
        before = served.meter(f'ltu_answers_total{{status="{status}"}}')
        with pytest.raises(openai.BadRequestError) as found:
            served.ask(words(), sound(data), stream=is_streamed)
        assert found.value.code == status and found.value.param == "messages"
        assert served.meter(f'ltu_answers_total{{status="{status}"}}') == before + 1
    with pytest.raises(openai.BadRequestError, match="base64|padding"):
        served.ask(
            {"type": "input_audio", "input_audio": {"data": "?not base64?", "format": "wav"}}
        )


def test_bodies_that_are_none(served: Served) -> None:
    start = b'{"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "'
    assert served.post(start + b'What?"}]}')[0] == 200
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ):
        assert served.post(body)[0] == 400
    for end in (
        b'\\ud800"}]}',
        b'x"}], "temperature": NaN}',
        b'x"}], "top_p": 1e999}',
        b'x"}], "temperature": 1e999}',
    ):
        status, said = served.post(start + end)
        assert status == (200 if b"top_p" in end else 400), said
    assert served.post(start + b'x"}], "\\ud800": 1}')[0] == 400
    assert served.post(start + b'x"}]}', Content_Type="text/plain")[0] == 415
    assert served.ask(words()).choices[0].message.content == served.answer_alone(QUESTION)


def test_bodies_that_are_too_large(served: Served) -> None:
    large = b'{"model": "' + b"x" * 2**21 + b'"}'
    assert served.post(large)[0] == served.post(large, length=None)[0] == 413
    with socket.create_connection(
        ("127.0.0.1", served.port)
    ) as plain:  # It says that it is large, and never comes.
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        plain.sendall(f"{head}Content-Length: {2**40}\r\n\r\n".encode())
        assert plain.recv(100).startswith(b"HTTP/1.1 413")
    with pytest.raises(openai.APIStatusError) as found:
        served.ask(sound(encoded(tiny.clip(1, 60.0))))
    assert found.value.status_code == 413 and found.value.code == "body_too_large"


def test_what_takes_too_long(engine: LtuEngine, gate: tiny.Gate) -> None:
    """A stream that has begun, an answer behind it and a body that does not arrive."""
    with serve(engine, "--timeout", "1") as served, ThreadPoolExecutor() as pool:
        stream = pool.submit(lambda: list(served.ask(words(), max_tokens=1000, stream=True)))
        assert gate.is_reached.wait(PATIENCE)
        answer = pool.submit(served.ask, words(), max_tokens=1000)
        body = pool.submit(served.post, b"{}", length=100)
        with pytest.raises(openai.APIError, match="too long") as found:
            stream.result()
        assert not isinstance(
            found.value, openai.APIStatusError
        )  # The status was sent long before.
        with pytest.raises(openai.InternalServerError) as found:
            answer.result()
        assert found.value.status_code == 504
        assert found.value.response.headers["x-should-retry"] == "false"
        assert body.result()[0] == 408
        wait_until(lambda: served.meter('ltu_answers_total{status="cancelled"}') == 2)


def test_a_body_that_breaks_off(engine: LtuEngine) -> None:
    with serve(engine) as served:
        with socket.create_connection(("127.0.0.1", served.port)) as plain:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            plain.sendall(f"{head}Content-Length: 99\r\n\r\nhalf".encode())
        wait_until(lambda: served.meter('ltu_requests_total{code="408"}') == 1)


def test_the_key(engine: LtuEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTU_API_KEY", "käse")
    with serve(engine) as served:
        models = served.client.models
        for call in (lambda: served.ask(words()), models.list, lambda: models.retrieve("x")):
            with pytest.raises(openai.AuthenticationError) as found:
                call()
            assert found.value.code == "invalid_api_key"
        assert served.post(b"{}")[0] == 401
        assert served.meter('ltu_requests_total{code="401"}') == 4
        monkeypatch.setenv("LTU_API_KEY", "changed later")
        assert served.post(b"{}", Authorization="Bearer käse".encode().decode("latin-1"))[0] == 404


def test_the_queue_has_an_end(engine: LtuEngine, gate: tiny.Gate) -> None:
    with serve(engine, "--max_queue", "1") as served:
        running = served.ask(words(), max_tokens=1000, stream=True)
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as found:
            served.ask(words())
        assert found.value.response.headers["retry-after"] == "1"
        running.close()
        wait_until(lambda: served.meter('ltu_answers_total{status="cancelled"}') == 1)
        gate.is_open.set()
        patient = served.client.with_options(max_retries=5)
        assert patient.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": QUESTION}], max_tokens=12
        ).choices[0].message.content == served.answer_alone(QUESTION)  # fmt: skip


def test_clients_that_go_away(served: Served, gate: tiny.Gate) -> None:
    """From a stream, while an answer is computed, and while the request waits for its batch."""
    name = 'ltu_answers_total{status="cancelled"}'
    before = served.meter(name)
    with served.ask(words(), max_tokens=600, stream=True) as parts:
        next(iter(parts))
    wait_until(lambda: served.meter(name) == before + 1)

    messages = [{"role": "user", "content": QUESTION}]
    body = json.dumps({"model": "tiny", "messages": messages}).encode()
    gate.is_reached.clear()
    running = served.send(body)
    assert gate.is_reached.wait(PATIENCE)
    waiting = served.send(body)
    wait_until(lambda: served.meter("ltu_queue_depth") == 1)
    ended = served.meter("ltu_request_seconds_count")
    waiting.close()
    wait_until(lambda: served.meter("ltu_request_seconds_count") == ended + 1)
    running.close()
    wait_until(lambda: served.meter(name) == before + 3)
    gate.is_open.set()
    assert served.ask(words()).choices[0].message.content == served.answer_alone(QUESTION)


def test_an_engine_that_fails(
    engine: LtuEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = type(engine.model).get_input_embeddings

    def broken(*_):
        raise RuntimeError("sec" + "ret")

    with serve(engine) as served:
        monkeypatch.setattr(type(engine.model), "get_input_embeddings", broken)
        for is_streamed in (False, True):
            with pytest.raises(openai.InternalServerError) as found:
                served.ask(words(), stream=is_streamed)
            assert found.value.code == "engine_error" and "secret" not in str(found.value)
        monkeypatch.setattr(type(engine.model), "get_input_embeddings", forward)
        assert served.ask(words()).choices[0].message.content == served.answer_alone(QUESTION)
        monkeypatch.setattr(type(engine.processor), "render", broken)
        with pytest.raises(openai.InternalServerError) as found:
            served.ask(words())
        assert found.value.code == "internal_error" and "secret" not in str(found.value)
    assert (
        "RuntimeError" in caplog.text
        and "test_serve.py" in caplog.text
        and "secret" not in caplog.text
    )


# --- many at once, and the end


def test_many_at_once(engine: LtuEngine, gate: tiny.Gate) -> None:
    """Good and bad, plain and streamed, greedy and sampled: each as if alone, in shared batches.

    The gate opens when all wait for the first one.
    """
    clips = [path.read_bytes() for path in TOY]
    expected = []
    for index in range(16):
        sampling = {"do_sample": True, "temperature": 0.9} if index % 5 == 0 else {}
        request = Request(
            f"Question {index}?",
            clips[index % 3] if index % 4 else None,
            decoding=sampling,
            seed=index,
        )
        is_bad = index % 6 == 1
        expected.append("unreadable" if is_bad else engine([request], max_new_tokens=10)[0].text)

    async def ask(client: openai.AsyncOpenAI, index: int) -> str:
        clip = (
            [sound(b"RIFF" if index % 6 == 1 else clips[index % 3], "flac")]
            if index % 4 or index % 6 == 1
            else []
        )
        settings = {"temperature": 0.9, "seed": index} if index % 5 == 0 else {}
        said = [{"role": "user", "content": [*clip, words(f"Question {index}?")]}]
        try:
            reply = await client.chat.completions.create(
                model="tiny", messages=said, max_tokens=10, stream=index % 2 == 0, **settings
            )
            if index % 2:
                return reply.choices[0].message.content
            return "".join([part.choices[0].delta.content or "" async for part in reply])
        except openai.BadRequestError as error:
            return error.code

    async def ask_all(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(16)))

    def is_full() -> bool:
        return served.meter("ltu_queue_depth") + served.meter("ltu_batch_size_sum") == 13

    with serve(engine) as served, ThreadPoolExecutor(1) as pool:
        replies = pool.submit(asyncio.run, ask_all(served.url))
        wait_until(is_full)
        gate.is_open.set()
        assert replies.result() == expected
        assert 1 < served.meter("ltu_batch_size_count") < served.meter("ltu_batch_size_sum") == 13
        assert served.meter('ltu_requests_total{code="200"}') == 13
        assert served.meter('ltu_requests_total{code="400"}') == 3
        assert (
            served.meter('ltu_tokens_total{kind="new"}') > 13
            and served.meter("ltu_queue_depth") == 0
        )
        wait_until(lambda: served.meter("ltu_request_seconds_count") == 13)
        assert served.meter("ltu_heard_seconds_total") > 0


def test_what_runs_too_long_is_ended(engine: LtuEngine, gate: tiny.Gate) -> None:
    with serve(engine, "--shutdown_seconds", "0") as served:
        parts = iter(served.ask(words(), max_tokens=1000, stream=True))
        next(parts)
    with pytest.raises(openai.APIConnectionError):
        list(parts)


def test_sigterm_lets_answers_end(engine: LtuEngine, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    words = ["--model", str(folder), "--port", "0", "--max_tokens", "200"]
    process = tiny.start_command("ltu.serve", words, output)
    try:
        while not output.is_file() or "Uvicorn running" not in output.read_text():
            process.join(0.01)
            assert process.exitcode is None, output.read_text()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", output.read_text())[1])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
        parts = iter(client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": QUESTION}], max_tokens=200, stream=True
        ))  # fmt: skip
        got = [next(parts), next(parts)]
        os.kill(process.pid, signal.SIGTERM)
        got += list(parts)
        assert got[-1].choices[0].finish_reason in ("stop", "length")
        text = "".join(part.choices[0].delta.content or "" for part in got)
        assert text == engine([Request(QUESTION)], max_new_tokens=200)[0].text
        process.join(PATIENCE)
        assert process.exitcode in (0, -signal.SIGTERM)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert QUESTION not in output.read_text()
    finally:
        process.kill()
