"""Tests that the server gives the engine's answers to OpenAI's unmodified client over loopback."""

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
import tracemalloc
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
from ltu.inference.requests import Answer, Request
from ltu.models.prompt_template import load_prompt_template
from ltu.serve import read_flags
from ltu.serving.batch_scheduler import BatchScheduler
from ltu.serving.connection_limits import limits_of_flags
from ltu.serving.listener import open_listeners
from ltu.serving.openai_server import make_server
from ltu.serving.protocol import ChatCompletionRequest
from ltu.serving.request_parser import ApiError, PendingRequest, RequestParser
from ltu_as.convert_checkpoint import main as convert
from tests import tiny
from tests.machine import PATIENCE, wait_until
from tests.test_any_llm import byte_tokenizer
from tests.whisper_tiny import save_whisper

TOY = sorted((Path(__file__).parents[1] / "data" / "toy" / "audio").glob("*.flac"))[:3]
SPEECH = sorted((Path(__file__).parents[1] / "data" / "toy" / "speech").glob("*.flac"))[:1]
QUESTION = "What can be inferred from the audio?"
# The beginning of a request that a test writes to a socket.
REQUEST_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
)


class Served:
    """A server in a thread of this process, its engine and a client."""

    def __init__(self, engine: LtuEngine, port: int):
        self.engine = engine
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE
        )

    def ask(self, *parts: dict, **settings):
        """Send the parts of a message by the client; return the reply or the stream."""
        defaults = {
            "messages": user(list(parts)),
            "model": "tiny",
            "max_tokens": 12,
        }
        return self.client.chat.completions.create(**(defaults | settings))

    def answer_alone(self, question: str, audio=None, **settings) -> str:
        """Return the text of the engine's answer, without the server."""
        decoding = {"max_new_tokens": 12} | settings.pop("decoding", {})
        return self.engine([Request(question, audio, decoding=decoding, **settings)])[0].text

    def metric(self, name: str) -> float:
        """Return the value of a metric, 0 if it was never set."""
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            found = re.search(rf"^{re.escape(name)} (\S+)$", reply.read().decode(), re.M)
        return float(found[1]) if found else 0.0

    def send(
        self, body: bytes, length: int | None = -1, **headers: str
    ) -> http.client.HTTPConnection:
        """Send a request without the client.

        Args:
            body: its body.
            length: the Content-Length; -1 for the real one, None for a chunked transfer.
            headers: further headers; an underscore in a name stands for a hyphen.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        headers = {"Content-Type": "application/json"} | given
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
    """Run a server with flags; at the end its thread must end."""
    args = read_flags(["--model", "tiny", "--port", "0", *flags])
    server = make_server(engine, args, limits_of_flags(args))
    listeners = open_listeners(args.host, args.port)
    thread = threading.Thread(target=server.run, args=(listeners,))
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
    return write_served_model(tmp_path_factory.mktemp("serve"))


def write_served_model(root: Path) -> Path:
    """Write a tiny checkpoint whose name for clients is "tiny"."""
    llm = tiny.write_llm(
        root / "llm", tokenizer=byte_tokenizer(), bos_token_id=None, eos_token_id=0
    )
    return tiny.write_checkpoint(root / "tiny", llm, tiny.LORA)


@pytest.fixture(scope="module")
def engine(folder: Path) -> LtuEngine:
    return LtuEngine.from_pretrained(folder)


@pytest.fixture(scope="module")
def served(engine: LtuEngine) -> Iterator[Served]:
    with serve(
        engine, "--max_seconds", "20", "--max_tokens", "600", "--max_body_mb", "2"
    ) as running:
        yield running


@pytest.fixture
def gate(engine: LtuEngine) -> Iterator[tiny.Gate]:
    """Close a gate in the engine, that of `served` and of every other server of `engine`."""
    with tiny.closed_gate(engine) as gate:
        yield gate


def user(content: str | list[dict] | None) -> list[dict]:
    """Return the messages of a request that has only one, the user's."""
    return [{"role": "user", "content": content}]


def text_part(text: str = QUESTION) -> dict:
    """Return a part of a message that is text."""
    return {"type": "text", "text": text}


def audio_part(data: bytes, kind: str | int = "wav") -> dict:
    """Return a part of a message that is a clip, the bytes of a file."""
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": kind},
    }


def encode_clip(waveform: np.ndarray, kind: str = "wav", rate: int = 16_000) -> bytes:
    """Return the bytes of an audio file."""
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format=kind)
    return file.getvalue()


# --- requests that are answered


@pytest.mark.parametrize("kind", ["flac", "wav", "mp3"])
def test_answers_are_the_engines(served: Served, kind: str) -> None:
    for path in TOY:
        data = path.read_bytes() if kind == "flac" else encode_clip(load_audio(path), kind)
        reply = served.ask(text_part(), audio_part(data, kind))
        answer = served.engine([Request(QUESTION, data)], max_new_tokens=12)[0]
        assert answer.text
        assert reply.choices[0].message.content == answer.text
        assert reply.choices[0].finish_reason == answer.finish_reason
        assert reply.usage.prompt_tokens == answer.prompt_tokens
        assert reply.usage.completion_tokens == answer.new_tokens
        extras = reply.model_extra["ltu"]
        for name, value in extras.items():
            assert name == "seed" or value == getattr(answer, name), name
        assert extras["status"] == "truncated"
        assert extras["sampling_rate"] == 16_000


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.5, "seed": 3}, {"stop": ["a", "qx"]}], ids=str
)
def test_a_stream_is_the_answer_piece_by_piece(served: Served, settings: dict) -> None:
    data = TOY[0].read_bytes()
    whole = served.ask(text_part(), audio_part(data, "flac"), max_tokens=60, **settings)
    stream = served.ask(
        text_part(),
        audio_part(data, "flac"),
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
        **settings,
    )
    *parts, last = list(stream)
    choices = [part.choices[0] for part in parts]
    texts = [choice.delta.content for choice in choices if choice.delta.content]
    assert len(texts) > 1
    assert "".join(texts) == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage and not last.choices
    extras = last.model_extra["ltu"]
    assert extras == parts[-1].model_extra["ltu"]
    assert extras["seconds_heard"] == whole.model_extra["ltu"]["seconds_heard"]
    assert {part.id for part in parts} == {last.id}
    if "stop" not in settings:
        sampling = {"do_sample": True, "temperature": 1.5} if settings else {}
        expected = served.answer_alone(
            QUESTION, data, decoding=sampling | {"max_new_tokens": 60}, seed=settings.get("seed")
        )
        assert expected == whole.choices[0].message.content


def test_stop_sequences_end_an_answer(served: Served) -> None:
    whole = served.answer_alone(QUESTION, decoding={"max_new_tokens": 60})
    stop = whole[len(whole) // 2 :][:3]
    until_stop = whole.split(stop)[0]
    reply = served.ask(text_part(), max_tokens=60, stop=stop)
    assert reply.choices[0].message.content == until_stop
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 60
    # A stream holds back the text that may become the stop sequence.
    parts = served.ask(text_part(), max_tokens=60, stop=stop, stream=True)
    pieces = [part.choices[0].delta.content or "" for part in parts]
    assert "".join(pieces) == until_stop
    reply = served.ask(text_part(), max_tokens=60, stop=["\ud7ff never"])
    assert reply.choices[0].message.content == whole


def test_sampling(served: Served) -> None:
    greedy = served.answer_alone(QUESTION)
    assert served.ask(text_part()).choices[0].message.content == greedy
    assert served.ask(text_part(), temperature=0, top_p=0.5).choices[0].message.content == greedy
    replies = [served.ask(text_part(), temperature=2, extra_body={"top_k": 50}) for _ in range(3)]
    # Each request gets another seed, which its reply contains.
    assert len({reply.choices[0].message.content for reply in replies}) > 1
    sampling = {"do_sample": True, "temperature": 2.0, "top_k": 50}
    for reply in replies:
        seed = reply.model_extra["ltu"]["seed"]
        expected = served.answer_alone(QUESTION, decoding=sampling, seed=seed)
        assert reply.choices[0].message.content == expected


def test_fields_that_openai_does_not_have(served: Served) -> None:
    data = encode_clip(tiny.clip(1, 2.0))
    # Fields of a request, the same for the engine, and the number of chunks that are used.
    for fields, settings, num_chunks in (
        ({"num_chunks": 2}, {"num_chunks": 2}, 2),
        ({"num_chunks": "all"}, {"num_chunks": 0}, 4),
        ({"transcript": "good morning"}, {"transcript": "good morning"}, 1),
        ({"mode": "asr_only"}, {"mode": "asr_only"}, 0),
    ):
        reply = served.ask(text_part(), audio_part(data), extra_body=fields)
        expected = served.answer_alone(QUESTION, data, **settings)
        assert reply.choices[0].message.content == expected
        assert reply.model_extra["ltu"]["num_chunks"] == num_chunks
        assert reply.model_extra["ltu"]["transcript"] == fields.get("transcript", "")
    penalty = {"repetition_penalty": 9.0}
    length = {"max_new_tokens": 60}
    reply = served.ask(text_part(), max_tokens=60, extra_body=penalty)
    answer = reply.choices[0].message.content
    assert answer == served.answer_alone(QUESTION, decoding=length | penalty)
    assert answer != served.answer_alone(QUESTION, decoding=length)


def test_fields_that_change_nothing_are_ignored(served: Served) -> None:
    harmless = {
        "n": 1,
        "user": "u",
        "store": False,
        "metadata": {},
        "frequency_penalty": 0.0,
        "logprobs": False,
        "response_format": {"type": "text"},
        "tools": [],
        "presence_penalty": None,
        "reasoning_effort": "low",
    }
    expected = served.answer_alone(QUESTION)
    assert served.ask(text_part(), **harmless).choices[0].message.content == expected
    reply = served.client.chat.completions.create(
        model="tiny", messages=user(QUESTION), max_completion_tokens=12
    )
    assert reply.choices[0].message.content == expected
    assert reply.model_extra["ltu"]["num_chunks"] == 0


def test_models_and_health(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="one model here: 'tiny'"):
        served.client.models.retrieve("other")
    with urllib.request.urlopen(f"{served.url}/v1/models/") as reply:
        assert json.load(reply)["data"][0]["id"] == "tiny"
    with urllib.request.urlopen(f"{served.url}/health") as reply:
        assert json.load(reply)["status"] == "ok"
    with pytest.raises(openai.NotFoundError):
        served.client.embeddings.create(model="tiny", input="x")


def test_the_documentation_has_the_models(served: Served) -> None:
    with urllib.request.urlopen(f"{served.url}/openapi.json") as reply:
        document = json.load(reply)
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert references <= set(schemas) and '"$defs"' not in text
    operation = document["paths"]["/v1/chat/completions"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(ChatCompletionRequest.model_fields)
    assert body["required"] == ["model", "messages"]
    assert {"ChatCompletion", "ErrorReply", "AudioPart"} <= references
    with urllib.request.urlopen(f"{served.url}/docs") as reply:
        assert b"/openapi.json" in reply.read()


def test_turns_need_a_chat_template(served: Served, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    turns += [
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [text_part("Loud?")]},
    ]
    for messages in (turns, turns[:2], turns[1:]):
        with pytest.raises(openai.BadRequestError, match="cannot express the turns"):
            served.ask(messages=messages)
    llm = tiny.write_llm(
        tmp_path / "llm", tokenizer=byte_tokenizer(), bos_token_id=None, eos_token_id=0
    )
    folder = tiny.write_checkpoint(
        tmp_path / "c", llm, prompt_template=load_prompt_template("chat", llm)
    )
    with serve(LtuEngine.from_pretrained(folder)) as chatting:
        data = encode_clip(tiny.clip(3))
        turns[1]["content"] = [audio_part(data), text_part("What is it?")]
        history = [*turns[:1], {"role": "user", "content": "What is it?"}, turns[2]]
        expected = chatting.answer_alone("Loud?", data, history=history)
        assert chatting.ask(messages=turns).choices[0].message.content == expected
        assert expected != chatting.answer_alone("Loud?", data)
        with pytest.raises(openai.BadRequestError, match="the last must be the user's"):
            chatting.ask(messages=turns[:3])


def test_ltu_as_uses_a_transcript(tmp_path: Path) -> None:
    save_whisper(tmp_path / "whisper.pt")
    tiny.write_llm(tmp_path / "llm")
    flags = (
        f"--init --llm {tmp_path}/llm --whisper {tmp_path}/whisper.pt --feature_precision fp32 "
        f"--num_layer_heads 2 --output_dir {tmp_path}/init"
    )
    convert(flags.split())
    data = SPEECH[0].read_bytes()
    with serve(LtuEngine.from_pretrained(tmp_path / "init")) as served:
        for fields in (
            {},
            {"transcript": "good morning"},
            {"mode": "audio_only"},
            {"mode": "asr_only"},
        ):
            reply = served.ask(text_part(), audio_part(data, "flac"), extra_body=fields)
            answer = served.engine([Request(QUESTION, data, **fields)], max_new_tokens=12)[0]
            assert reply.choices[0].message.content == answer.text
            assert reply.model_extra["ltu"]["transcript"] == answer.transcript
            assert bool(answer.transcript) == (fields.get("mode") != "audio_only")


# --- requests that are refused

CLIP_PART = audio_part(encode_clip(tiny.clip(1)))
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
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": 601}, "At most 600"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"extra_body": {"mode": "loud"}}, "mode is 'loud'.*asr_only"),
    ({"extra_body": {"num_chunks": -1}}, "num_chunks is"),
    ({"extra_body": {"num_chunks": "many"}}, "num_chunks is"),
    ({"extra_body": {"transcript": ["x"]}}, "transcript"),
    ({"messages": []}, "the last must be the user's"),
    ({"messages": "What is it?"}, "messages"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": user(None)}, "A message is"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "role"),
    ({"messages": user([CLIP_PART, text_part(), CLIP_PART])}, "takes one clip"),
    ({"messages": user([{"type": "image_url", "image_url": {"url": "x"}}])}, "image_url"),
    ({"messages": user([{"type": "audio_url", "audio_url": "file:///x"}])}, "audio_url"),
    ({"messages": user([{"type": "audio", "audio": "/etc/passwd"}])}, "audio"),
    ({"messages": user([{"type": "input_audio", "input_audio": "/etc/passwd"}])}, "A message"),
    ({"messages": user([audio_part(b"x", 5)])}, "format is 5"),
    ({"messages": user("a" * 100_001)}, "too long"),
    ({"messages": user("long " * 3000)}, "tokens"),
]


@pytest.mark.parametrize("settings, message", REFUSED, ids=lambda value: str(value)[:60])
def test_refused(served: Served, settings: dict, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as error:
        served.ask(text_part(), **settings)
    assert set(error.value.body) == {"message", "type", "param", "code"}
    assert error.value.type == "invalid_request_error"
    assert len(error.value.body["message"]) < 1000


@pytest.mark.parametrize("is_streamed", [False, True])
def test_clips_that_cannot_be_decoded(served: Served, is_streamed: bool) -> None:
    clips = {
        "unreadable": b"no sound at all",
        "too_short": encode_clip(tiny.clip(1, 0.01)),
        "silent": encode_clip(np.zeros(16_000)),
        "too_long": encode_clip(tiny.clip(1, 21.0), "flac"),
    }
    for status, data in clips.items():
        metric = f'ltu_answers_total{{status="{status}"}}'
        before = served.metric(metric)
        with pytest.raises(openai.BadRequestError) as error:
            served.ask(text_part(), audio_part(data), stream=is_streamed)
        assert error.value.code == status and error.value.param == "messages"
        assert served.metric(metric) == before + 1
    not_base64 = {"data": "?not base64?", "format": "wav"}
    with pytest.raises(openai.BadRequestError, match="base64|padding"):
        served.ask({"type": "input_audio", "input_audio": not_base64})


def test_malformed_bodies(served: Served) -> None:
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
    for end, expected in (
        (b'\\ud800"}]}', 400),
        (b'x"}], "temperature": NaN}', 400),
        (b'x"}], "top_p": 1e999}', 200),  # Greedy decoding does not use it.
        (b'x"}], "temperature": 1e999}', 400),
    ):
        status, reply = served.post(start + end)
        assert status == expected, reply
    assert served.post(start + b'x"}], "\\ud800": 1}')[0] == 400
    assert served.post(start + b'x"}]}', Content_Type="text/plain")[0] == 415
    assert served.ask(text_part()).choices[0].message.content == served.answer_alone(QUESTION)


@pytest.mark.parametrize("name", [*ChatCompletionRequest.model_fields, "unknown", ""])
def test_odd_values_are_refused_or_accepted(engine: LtuEngine, name: str) -> None:
    args = read_flags(["--model", "tiny"])
    parser = RequestParser(engine.processor, args, "tiny")
    valid = {"model": "tiny", "messages": user(QUESTION), "temperature": 1}
    values = ["null", "true", "-1", "0", "0.5", "1e999", "-1e-999", "NaN", "9" * 4000, '""', '"x"']
    values += ['"\\ud800"', '"\\u0000"', "[]", "[[]]", '[""]', "{}", '{"type": 1}', "x", ""]
    values += ["[" * 150 + "]" * 150, "[" * 100_000]
    for value in values:
        body = json.dumps(valid)[:-1] + f", {json.dumps(name)}: {value}}}"
        try:
            parser.parse(bytearray(body.encode()))
        except ApiError as error:
            assert error.status_code in (400, 404), value
            assert len(error.detail["message"]) < 1000
        except ValueError as error:  # The server makes it an ApiError too.
            assert len(str(error)) < 1000


def test_a_body_with_very_many_errors(served: Served) -> None:
    """The time and memory of an error do not grow with the number of errors."""
    begin = b'{"model": "tiny", '
    for body in (
        begin + b'"messages": [' + b"0, " * 200_000 + b"0]}",
        begin + b", ".join(b'"x%d": 0' % number for number in range(100_000)) + b"}",
    ):
        tracemalloc.start()
        status, reply = served.post(body)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert status == 400 and reply["error"]["type"] == "invalid_request_error"
        assert peak < 50 * 2**20


def test_bodies_that_are_too_large(served: Served) -> None:
    large = b'{"model": "' + b"x" * 2**21 + b'"}'
    assert served.post(large)[0] == 413
    assert served.post(large, length=None)[0] == 413
    # A body whose length is in the header, and which is not sent.
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(REQUEST_HEAD + b"Content-Length: 1099511627776\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with pytest.raises(openai.APIStatusError) as error:
        served.ask(audio_part(encode_clip(tiny.clip(1, 60.0))))
    assert error.value.status_code == 413 and error.value.code == "body_too_large"


def test_timeouts(engine: LtuEngine, gate: tiny.Gate) -> None:
    """Of a stream that has begun, of a request in the queue and of a body that does not arrive."""
    flags = ["--timeout", "1", "--receive_seconds", "1"]
    with serve(engine, *flags) as served, ThreadPoolExecutor() as pool:
        stream = pool.submit(lambda: list(served.ask(text_part(), max_tokens=1000, stream=True)))
        assert gate.is_reached.wait(PATIENCE)
        answer = pool.submit(served.ask, text_part(), max_tokens=1000)
        body = pool.submit(served.post, b"{}", length=100)
        with pytest.raises(openai.APIError, match="too long") as error:
            stream.result()
        # The status of the stream was sent long before, so the error has none.
        assert not isinstance(error.value, openai.APIStatusError)
        with pytest.raises(openai.InternalServerError) as error:
            answer.result()
        assert error.value.status_code == 504
        assert error.value.response.headers["x-should-retry"] == "false"
        assert body.result()[0] == 408
        wait_until(lambda: served.metric('ltu_answers_total{status="cancelled"}') == 2)


def test_a_body_that_breaks_off(engine: LtuEngine) -> None:
    with serve(engine) as served:
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(REQUEST_HEAD + b"Content-Length: 99\r\n\r\nhalf")
        wait_until(lambda: served.metric('ltu_requests_total{code="408"}') == 1)


def test_the_key(engine: LtuEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTU_API_KEY", "käse")
    with serve(engine) as served:
        models = served.client.models
        for call in (lambda: served.ask(text_part()), models.list, lambda: models.retrieve("x")):
            with pytest.raises(openai.AuthenticationError) as error:
                call()
            assert error.value.code == "invalid_api_key"
        assert served.post(b"{}")[0] == 401
        assert served.metric('ltu_requests_total{code="401"}') == 4
        monkeypatch.setenv("LTU_API_KEY", "changed later")
        assert served.post(b"{}", Authorization="Bearer käse".encode().decode("latin-1"))[0] == 404


def test_a_full_queue(engine: LtuEngine, gate: tiny.Gate) -> None:
    with serve(engine, "--max_queue", "1") as served:
        running = served.ask(text_part(), max_tokens=1000, stream=True)
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as error:
            served.ask(text_part())
        assert error.value.response.headers["retry-after"] == "1"
        running.close()
        wait_until(lambda: served.metric('ltu_answers_total{status="cancelled"}') == 1)
        gate.is_open.set()
        retrying = served.client.with_options(max_retries=5)
        reply = retrying.chat.completions.create(
            model="tiny", messages=user(QUESTION), max_tokens=12
        )
        assert reply.choices[0].message.content == served.answer_alone(QUESTION)


def test_clients_that_disconnect(served: Served, gate: tiny.Gate) -> None:
    """During a stream, while an answer is generated, and while the request is in the queue."""
    name = 'ltu_answers_total{status="cancelled"}'
    before = served.metric(name)
    with served.ask(text_part(), max_tokens=600, stream=True) as parts:
        next(iter(parts))
    wait_until(lambda: served.metric(name) == before + 1)

    body = json.dumps({"model": "tiny", "messages": user(QUESTION)}).encode()
    gate.is_reached.clear()
    running = served.send(body)
    assert gate.is_reached.wait(PATIENCE)
    waiting = served.send(body)
    wait_until(lambda: served.metric("ltu_queue_depth") == 1)
    ended = served.metric("ltu_request_seconds_count")
    waiting.close()
    wait_until(lambda: served.metric("ltu_request_seconds_count") == ended + 1)
    running.close()
    wait_until(lambda: served.metric(name) == before + 3)
    gate.is_open.set()
    assert served.ask(text_part()).choices[0].message.content == served.answer_alone(QUESTION)


def test_an_engine_that_fails(
    engine: LtuEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = type(engine.model).get_input_embeddings

    def broken(*_):
        raise RuntimeError("sec" + "ret")

    with serve(engine) as served:
        monkeypatch.setattr(type(engine.model), "get_input_embeddings", broken)
        for is_streamed in (False, True):
            with pytest.raises(openai.InternalServerError) as error:
                served.ask(text_part(), stream=is_streamed)
            assert error.value.code == "engine_error" and "secret" not in str(error.value)
        monkeypatch.setattr(type(engine.model), "get_input_embeddings", forward)
        assert served.ask(text_part()).choices[0].message.content == served.answer_alone(QUESTION)
        monkeypatch.setattr(type(engine.processor), "render", broken)
        with pytest.raises(openai.InternalServerError) as error:
            served.ask(text_part())
        assert error.value.code == "internal_error" and "secret" not in str(error.value)
    # The log has the type of the error and where it was raised, but not its message.
    assert "RuntimeError" in caplog.text
    assert "test_serve.py" in caplog.text
    assert "secret" not in caplog.text


def test_a_bug_fails_one_request_of_a_batch(
    engine: LtuEngine,
    gate: tiny.Gate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The others are answered, nothing hangs, and the log has the traceback."""
    encode = type(engine).encode

    def encode_with_bug(engine, request, *args):
        if request.question == "fails":
            raise TypeError("a bug")
        return encode(engine, request, *args)

    monkeypatch.setattr(type(engine), "encode", encode_with_bug)
    questions = ["first", "second", "fails", "third"]
    requests = [Request(text) for text in questions if text != "fails"]
    alone = engine(requests, max_new_tokens=12)
    expected = {
        request.question: answer.text for request, answer in zip(requests, alone, strict=True)
    }
    with serve(engine) as served, ThreadPoolExecutor() as pool:
        running = pool.submit(served.ask, text_part("running"))
        assert gate.is_reached.wait(PATIENCE)
        replies = {text: pool.submit(served.ask, text_part(text)) for text in questions}
        wait_until(lambda: served.metric("ltu_queue_depth") == len(questions))
        gate.is_open.set()
        assert running.result().choices[0].message.content
        with pytest.raises(openai.InternalServerError) as error:
            replies.pop("fails").result()
        assert error.value.code == "engine_error"
        answers = {text: reply.result() for text, reply in replies.items()}
        for text, answer in answers.items():
            assert answer.choices[0].message.content == expected[text]
        # A reply is counted after it is sent.
        wait_until(lambda: served.metric('ltu_answers_total{status="ok"}') == 4)
        assert served.metric('ltu_answers_total{status="failed"}') == 1
    assert "TypeError" in caplog.text and "encode_with_bug" in caplog.text


def test_a_full_batch_does_not_wait(engine: LtuEngine) -> None:
    with serve(engine, "--max_batch", "2", "--max_wait_ms", "1e6") as served:
        with ThreadPoolExecutor() as pool:
            replies = [pool.submit(served.ask, text_part()) for _ in range(2)]
            for reply in replies:
                assert reply.result(PATIENCE).choices[0].message.content


def test_nobody_waits_for_requests_that_do_not_come(engine: LtuEngine) -> None:
    with serve(engine, "--max_batch", "2", "--max_wait_ms", "1e6") as served:
        assert served.ask(text_part()).choices[0].message.content
        assert served.metric("ltu_batch_size_count") == 1


@pytest.fixture
def delivered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the questions whose answers a server has delivered, in their order."""
    deliver = BatchScheduler._deliver
    questions = []

    def record(scheduler: BatchScheduler, pending: PendingRequest, answer: Answer) -> None:
        questions.append(pending.request.question)
        deliver(scheduler, pending, answer)

    monkeypatch.setattr(BatchScheduler, "_deliver", record)
    return questions


@pytest.mark.parametrize("tokens_per_turn, num_turns", [(4, 3), (0, 2)])
def test_a_short_answer_does_not_wait_for_a_long_one(
    engine: LtuEngine,
    gate: tiny.Gate,
    delivered: list[str],
    tokens_per_turn: int,
    num_turns: int,
) -> None:
    """The long one is paused after its turn; without turns it runs to its end."""
    flags = ["--max_batch", "1", "--tokens_per_turn", str(tokens_per_turn)]
    with serve(engine, *flags) as served, ThreadPoolExecutor() as pool:
        long = pool.submit(served.ask, text_part("long"), max_tokens=40)
        assert gate.is_reached.wait(PATIENCE)
        short = pool.submit(served.ask, text_part("short"), max_tokens=4)
        wait_until(lambda: served.metric("ltu_queue_depth") == 1)
        gate.is_open.set()
        for reply, question, length in ((long, "long", 40), (short, "short", 4)):
            expected = engine([Request(question)], max_new_tokens=length)[0]
            assert reply.result().choices[0].message.content == expected.text
            assert reply.result().usage.completion_tokens == expected.new_tokens
        assert served.metric("ltu_batch_size_count") == num_turns
    assert delivered == (["short", "long"] if tokens_per_turn else ["long", "short"])


def test_a_short_answer_with_other_settings(
    engine: LtuEngine, gate: tiny.Gate, delivered: list[str]
) -> None:
    """It is gathered with a long one, but runs after it: the long one is paused for it too."""
    flags = ["--max_batch", "2", "--tokens_per_turn", "4"]
    penalty = {"repetition_penalty": 1.5}
    with serve(engine, *flags) as served, ThreadPoolExecutor() as pool:
        first = pool.submit(served.ask, text_part("long"), max_tokens=3)
        assert gate.is_reached.wait(PATIENCE)
        long = pool.submit(served.ask, text_part(), max_tokens=40)
        wait_until(lambda: served.metric("ltu_queue_depth") == 1)
        short = pool.submit(served.ask, text_part("short"), max_tokens=3, extra_body=penalty)
        wait_until(lambda: served.metric("ltu_queue_depth") == 2)
        gate.is_open.set()
        for reply in (first, long, short):
            reply.result()
    assert delivered.index("short") < delivered.index(QUESTION)


@pytest.mark.parametrize("paused_cache_mb", ["0", "0.25", "1024"])
def test_answers_that_are_paused(
    engine: LtuEngine, gate: tiny.Gate, monkeypatch: pytest.MonkeyPatch, paused_cache_mb: str
) -> None:
    """Streams, stop sequences, sampling and usage are those of an answer in one piece."""
    caches = []
    pause = BatchScheduler._pause

    def record(scheduler: BatchScheduler, pending: PendingRequest, request: Request) -> None:
        pause(scheduler, pending, request)
        caches.append(request.paused.cache is not None)
        assert 0 <= scheduler.paused_bytes <= float(paused_cache_mb) * 2**20

    monkeypatch.setattr(BatchScheduler, "_pause", record)
    clip = TOY[0].read_bytes()
    expected, settings = [], []
    for index in range(7):
        own: dict = {"seed": index, "max_tokens": 8 + 6 * index, "stream": index % 2 == 0}
        decoding: dict = {"max_new_tokens": own["max_tokens"]}
        if index % 3 == 1:
            own["temperature"] = 1.2
            decoding |= {"do_sample": True, "temperature": 1.2}
        if index % 3 == 2:
            own["extra_body"] = {"repetition_penalty": 1.5}
            decoding["repetition_penalty"] = 1.5
        request = Request(QUESTION, clip if index % 2 else None, decoding=decoding, seed=index)
        answer = engine([request])[0]
        text, tokens = answer.text, answer.new_tokens
        if index in (5, 6):
            own["stop"] = text[len(text) // 2 :][:3]
            text, tokens = text.split(own["stop"])[0], None
        expected.append((text, tokens))
        if own["stream"]:
            own["stream_options"] = {"include_usage": True}
        settings.append(own)

    def ask(index: int) -> tuple[str, int]:
        parts = [text_part()]
        if index % 2:
            parts.append(audio_part(clip, "flac"))
        reply = served.ask(*parts, **settings[index])
        if not settings[index]["stream"]:
            return reply.choices[0].message.content, reply.usage.completion_tokens
        *chunks, last = list(reply)
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        return "".join(texts), last.usage.completion_tokens

    flags = ["--max_batch", "3", "--tokens_per_turn", "5", "--paused_cache_mb", paused_cache_mb]
    with serve(engine, *flags) as served, ThreadPoolExecutor(7) as pool:
        replies = [pool.submit(ask, index) for index in range(7)]
        wait_until(
            lambda: served.metric("ltu_queue_depth") + served.metric("ltu_batch_size_sum") == 7
        )
        gate.is_open.set()
        for reply, (text, tokens) in zip(replies, expected, strict=True):
            found_text, found_tokens = reply.result()
            assert found_text == text
            assert found_tokens == tokens or tokens is None
        assert served.metric("ltu_queue_depth") == 0
        assert served.metric("ltu_batch_size_count") > 5
    assert len(caches) > 5
    assert set(caches) == {"0": {False}, "0.25": {False, True}, "1024": {True}}[paused_cache_mb]


def test_clients_that_disconnect_while_they_are_paused(engine: LtuEngine, gate: tiny.Gate) -> None:
    name = 'ltu_answers_total{status="cancelled"}'
    flags = ["--max_batch", "1", "--tokens_per_turn", "1"]
    with serve(engine, *flags) as served, ThreadPoolExecutor() as pool:
        first = served.ask(text_part(), max_tokens=1000, stream=True)
        next(iter(first))
        waiting = pool.submit(served.ask, text_part(), max_tokens=1000, stream=True)
        wait_until(lambda: served.metric("ltu_queue_depth") == 1)
        # They take turns until the second one has a text; then one runs and the other is paused.
        wait_until(lambda: gate.step() or waiting.done())
        second = waiting.result()
        wait_until(lambda: served.metric("ltu_queue_depth") == 1)
        first.close()
        wait_until(lambda: served.metric("ltu_request_seconds_count") == 1)
        second.close()
        wait_until(lambda: served.metric(name) == 2)
        gate.is_open.set()
        assert served.ask(text_part()).choices[0].message.content == served.answer_alone(QUESTION)


def test_a_stream_that_is_retried_repeats_nothing(
    engine: LtuEngine, gate: tiny.Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch fails once, when texts of its requests were shown."""
    forward = type(engine.model).forward
    has_failed = threading.Event()

    def fail_once(model: object, *args: object, **kwargs: object) -> object:
        if len(args[0] if args else kwargs["input_ids"]) == 2 and gate.is_open.is_set():
            if not has_failed.is_set():
                has_failed.set()
                raise RuntimeError("once")
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(type(engine.model), "forward", fail_once)

    def read(question: str) -> str:
        parts = served.ask(text_part(question), stream=True)
        return "".join(part.choices[0].delta.content or "" for part in parts)

    questions = ["first", "second"]
    alone = engine([Request(question) for question in questions], max_new_tokens=12)
    with serve(engine) as served, ThreadPoolExecutor() as pool:
        running = pool.submit(read, "running")
        assert gate.is_reached.wait(PATIENCE)
        texts = [pool.submit(read, question) for question in questions]
        wait_until(lambda: served.metric("ltu_queue_depth") == 2)
        wait_until(lambda: gate.step() or running.done())
        # The two others show some texts, then their batch fails.
        gate.is_reached.clear()
        for _ in range(4):
            gate.step()
        assert gate.is_reached.wait(PATIENCE)
        gate.is_open.set()
        for text, answer in zip(texts, alone, strict=True):
            assert text.result() == answer.text
    assert has_failed.is_set()


@pytest.mark.parametrize("flag", ["--max_wait_ms=-5", "--max_queue=0", "--timeout=nan"])
def test_impossible_limits_are_refused(flag: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        read_flags(["--model", "tiny", flag])
    assert "it must be at least" in capsys.readouterr().err


# --- many requests at once, and the end of the server


def test_many_at_once(engine: LtuEngine, gate: tiny.Gate) -> None:
    """Each request has the answer that it has alone, in batches with others.

    Good and bad, plain and streamed, greedy and sampled requests are mixed. The gate opens when all
    wait for the first batch.
    """
    files = [path.read_bytes() for path in TOY]
    clips: list[bytes | None] = [files[index % 3] if index % 4 else None for index in range(16)]
    bad = {index for index in range(16) if index % 6 == 1}
    sampled = {index for index in range(16) if index % 5 == 0}
    streamed = {index for index in range(16) if index % 2 == 0}

    expected = []
    for index, clip in enumerate(clips):
        decoding = {"do_sample": True, "temperature": 0.9} if index in sampled else {}
        request = Request(f"Question {index}?", clip, decoding=decoding, seed=index)
        answer = engine([request], max_new_tokens=10)[0]
        expected.append("unreadable" if index in bad else answer.text)

    async def ask(client: openai.AsyncOpenAI, index: int) -> str:
        parts = [text_part(f"Question {index}?")]
        if index in bad:
            parts.insert(0, audio_part(b"RIFF", "flac"))
        elif clips[index] is not None:
            parts.insert(0, audio_part(clips[index], "flac"))
        settings = {"temperature": 0.9, "seed": index} if index in sampled else {}
        try:
            reply = await client.chat.completions.create(
                model="tiny",
                messages=user(parts),
                max_tokens=10,
                stream=index in streamed,
                **settings,
            )
            if index not in streamed:
                return reply.choices[0].message.content
            return "".join([part.choices[0].delta.content or "" async for part in reply])
        except openai.BadRequestError as error:
            return error.code

    async def ask_all(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(16)))

    def is_full() -> bool:
        return served.metric("ltu_queue_depth") + served.metric("ltu_batch_size_sum") == 13

    with serve(engine) as served, ThreadPoolExecutor(1) as pool:
        replies = pool.submit(asyncio.run, ask_all(served.url))
        wait_until(is_full)
        gate.is_open.set()
        assert replies.result() == expected
        assert 1 < served.metric("ltu_batch_size_count") < served.metric("ltu_batch_size_sum") == 13
        assert served.metric('ltu_requests_total{code="200"}') == 13
        assert served.metric('ltu_requests_total{code="400"}') == 3
        assert served.metric('ltu_tokens_total{kind="new"}') > 13
        assert served.metric("ltu_queue_depth") == 0
        wait_until(lambda: served.metric("ltu_request_seconds_count") == 13)
        assert served.metric("ltu_audio_seconds_total") > 0


def test_shutdown_ends_what_runs_too_long(engine: LtuEngine, gate: tiny.Gate) -> None:
    with serve(engine, "--shutdown_seconds", "0") as served:
        parts = iter(served.ask(text_part(), max_tokens=1000, stream=True))
        next(parts)
    with pytest.raises(openai.APIConnectionError):
        list(parts)


def test_sigterm_lets_answers_finish(engine: LtuEngine, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    flags = ["--model", str(folder), "--port", "0", "--max_tokens", "200"]
    process = tiny.start_command("ltu.serve", flags, output)
    try:
        while not output.is_file() or "Uvicorn running" not in output.read_text():
            process.join(0.01)
            assert process.exitcode is None, output.read_text()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", output.read_text())[1])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
        stream = client.chat.completions.create(
            model="tiny", messages=user(QUESTION), max_tokens=200, stream=True
        )
        remaining = iter(stream)
        parts = [next(remaining), next(remaining)]
        os.kill(process.pid, signal.SIGTERM)
        parts += list(remaining)
        assert parts[-1].choices[0].finish_reason in ("stop", "length")
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == engine([Request(QUESTION)], max_new_tokens=200)[0].text
        process.join(PATIENCE)
        assert process.exitcode in (0, -signal.SIGTERM)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert QUESTION not in output.read_text()
    finally:
        process.kill()
