"""Tests what clients of endpoints do with replies that are endless, huge, slow, or echo the key."""

import asyncio
import base64
import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import pytest
from llm_server import FakeLlm, LocalServer, completion

import qa_generation.endpoint
from eval.scorer_interface import EvaluationError
from eval.text_embeddings import open_embedder
from qa_generation.endpoint import MAX_BODY
from qa_generation.generate import main
from qa_generation.llm import Llm, LlmSettings, Reply, ReplyStore, RequestFailed
from qa_generation.redaction import Redactor, is_placeholder
from tests.qa_runs import HELLO, arguments, good, quick_client  # noqa: F401

KEY = "sk-proj-4bX/9'q\"z\\7Yw"
BOMB_SIZE = 200 * 2**20
MOST_MEMORY = 64 * 2**20
BLOCK = b" " * 2**16
ENDLESS = repeat(BLOCK)


class RawServer(LocalServer):
    """A server that replies to each request with given bytes, however many.

    Args:
        head: status line and headers, without the empty line after them.
        blocks: returns the blocks of the body.
        seconds: time between two blocks.
    """

    def __init__(self, head: str, blocks: Callable[[], Iterator[bytes]], seconds: float = 0.0):
        self.head = head.replace("\n", "\r\n").encode()
        self.blocks = blocks
        self.seconds = seconds
        self.requests: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.requests.append(head)
            size = head.lower().partition("content-length: ")[2].partition("\r\n")[0]
            await reader.readexactly(int(size))
            writer.write(self.head + b"\r\n")
            for block in self.blocks():
                writer.write(block)
                await writer.drain()
                await asyncio.sleep(self.seconds)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


def plain(status: str, *headers: str) -> str:
    lines = [f"HTTP/1.1 {status}", "content-type: application/json", *headers]
    return "\n".join([*lines, "connection: close", ""])


def bomb() -> bytes:
    """Return a body of 0.2 MB that decompresses to 200 MB."""
    compressor = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)
    blocks = [compressor.compress(BLOCK) for _ in range(BOMB_SIZE // len(BLOCK))]
    return b"".join([*blocks, compressor.flush()])


def ask(url: str, folder: Path, **settings: object) -> Reply | RequestFailed:
    with ReplyStore(folder / "s") as store:
        return Llm(LlmSettings("m", base_url=url, **settings), store).complete_all([HELLO])[0]


@pytest.mark.parametrize(
    "status", ["200 OK", "400 Bad Request", "500 Error", "307 Moved\nlocation: /v1/elsewhere"]
)
def test_an_endless_body_is_not_read_to_its_end(tmp_path, status):
    """Bodies of errors and redirections are read too."""
    with RawServer(plain(status), lambda: ENDLESS) as server:
        reply = ask(server.url, tmp_path)
        assert f"more than {MAX_BODY} bytes, from {server.url} (3 tries)" in str(reply)
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request", "500 Error"])
def test_a_body_is_not_decompressed_to_its_end(tmp_path, status):
    body = bomb()
    with RawServer(plain(status, "content-encoding: gzip"), lambda: iter([body])) as server:
        tracemalloc.start()
        reply = ask(server.url, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert f"more than {MAX_BODY} bytes" in str(reply)
        assert "accept-encoding: identity" in server.requests[0].lower()
    assert peak < MOST_MEMORY


@pytest.mark.parametrize(
    "encoding, problem",
    [
        ("br", "only gzip is supported"),
        ("gzip, gzip", "only gzip is supported"),
        ("gzip", "cannot be decompressed"),
    ],
)
def test_other_compressions_are_refused(tmp_path, encoding, problem):
    head = plain("200 OK", f"content-encoding: {encoding}")
    with RawServer(head, lambda: iter([b"no gzip"])) as server:
        assert problem in str(ask(server.url, tmp_path)) and len(server.requests) == 3


def test_a_charset_does_not_decompress(tmp_path):
    """Python has codecs such as zlib_codec, and a client decodes with the charset of a reply."""
    body = zlib.compress(b" " * BOMB_SIZE)
    head = "HTTP/1.1 400 Bad\ncontent-type: text/plain; charset=zlib_codec\nconnection: close\n"
    with RawServer(head, lambda: iter([body])) as server:
        tracemalloc.start()
        assert isinstance(ask(server.url, tmp_path), RequestFailed)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_MEMORY


@pytest.mark.parametrize("name", ["gzip", "x-gzip", "deflate"])
def test_a_compressed_reply_is_used(tmp_path, name):
    """An endpoint may compress, though the request asks it not to."""
    body = json.dumps(completion("A dog barks.")).encode()
    body = zlib.compress(body) if name == "deflate" else gzip.compress(body)
    blocks = [body[start : start + 7] for start in range(0, len(body), 7)]
    with RawServer(plain("200 OK", f"content-encoding: {name}"), lambda: iter(blocks)) as server:
        assert ask(server.url, tmp_path).text == "A dog barks."


def test_the_longest_body_is_read(tmp_path, monkeypatch):
    body = json.dumps(completion("A dog barks.")).encode()
    with RawServer(plain("200 OK"), lambda: iter([body])) as server:
        monkeypatch.setattr(qa_generation.endpoint, "MAX_BODY", len(body))
        assert ask(server.url, tmp_path / "whole").text == "A dog barks."
        monkeypatch.setattr(qa_generation.endpoint, "MAX_BODY", len(body) - 1)
        assert isinstance(ask(server.url, tmp_path / "longer"), RequestFailed)


@pytest.mark.parametrize(
    "head",
    ["HTTP/1.1 200 OK\n" + "x-filler: " + "y" * 1000 + "\n", "HTTP/1.1 103 Early Hints\n\n"],
    ids=["headers", "early hints"],
)
def test_endless_headers_end(tmp_path, head):
    lines = head.replace("\n", "\r\n").encode()
    with RawServer(head, lambda: repeat(lines)) as server:
        reply = ask(server.url, tmp_path, timeout=1, tries=2)
        assert isinstance(reply, RequestFailed)
        assert 1 <= len(server.requests) <= 2  # A busy machine may not connect within a second.


def test_a_trickle_ends_with_the_time_out(tmp_path):
    """The time-out is that of the whole try; a byte in time does not prolong it."""
    with RawServer(plain("200 OK"), lambda: repeat(b" "), seconds=0.05) as server:
        assert str(ask(server.url, tmp_path, timeout=0.5, tries=2)) == "time-out (2 tries)"


def test_cookies_of_an_endpoint_are_not_stored(tmp_path):
    body = json.dumps(completion("A dog barks.")).encode()
    head = plain("200 OK", "set-cookie: filler=" + "y" * 1000)
    prompts = [[{"role": "user", "content": str(i)}] for i in range(2)]
    with RawServer(head, lambda: iter([body])) as server, ReplyStore(tmp_path / "s") as store:
        Llm(LlmSettings("m", base_url=server.url, concurrency=1), store).complete_all(prompts)
        assert len(server.requests) == 2 and "filler" not in "".join(server.requests)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.mark.parametrize("head, body", [
    (plain("200 OK"), None),
    (plain("400 Bad Request"), None),
    (plain("200 OK", "content-encoding: gzip"), bomb()),
], ids=["200", "400", "bomb"])  # fmt: skip
def test_embeddings_are_limited_too(tmp_path, monkeypatch, quick_retries, head, body):
    blocks = (lambda: ENDLESS) if body is None else (lambda: iter([body]))
    with RawServer(head, blocks) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        embedder = open_embedder("openai:m", tmp_path)
        with pytest.raises(EvaluationError, match="an unreadable reply: it has more than"):
            embedder(["a text"])
        assert 1 <= len(server.requests) <= 8  # openai 3 does not send it again.


def test_a_trickle_of_embeddings_ends(tmp_path, monkeypatch):
    with RawServer(plain("200 OK"), lambda: repeat(b" "), seconds=0.05) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        api = open_embedder("openai:m", tmp_path).encode
        object.__setattr__(api.settings, "timeout", 0.3)
        object.__setattr__(api.settings, "tries", 1)
        with pytest.raises(EvaluationError, match="not complete after 0.3 seconds"):
            list(api(["a text"]))


# ---- the key -------------------------------------------------------------------------------------


def json_escape(text: str) -> str:
    """Escape every letter as JSON allows."""
    return "".join(f"\\u{ord(letter):04x}" for letter in text)


ECHOES = {
    "as it is": KEY,
    "in JSON": json.dumps(KEY),
    "in JSON twice": json.dumps(json.dumps(KEY)),
    "all escaped": json_escape(KEY),
    "half escaped": json_escape(KEY[:9]) + KEY[9:],
    "slash escaped": KEY.replace("/", "\\/"),
    "in Python": repr(KEY),
    "in a URL": "".join(f"%{ord(letter):02X}" for letter in KEY),
    "in HTML": "".join(f"&#x{ord(letter):X};" for letter in KEY),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
def test_a_key_is_found_however_it_is_escaped(echo):
    cleaned = Redactor([KEY])(f"before {echo} after")
    assert cleaned.strip("\"\\'").startswith("before ") and cleaned.endswith(" after")
    assert cleaned.count("[key]") == 1
    assert cleaned.translate(str.maketrans("", "", "\"'\\")) == "before [key] after"


def test_other_texts_are_as_they_were():
    text = "\\" * 100_000 + json_escape("no key") + KEY[:-1] + KEY[1:] + "%73%6b &#115;"
    assert Redactor([KEY])(text) == text
    assert Redactor(["", ""])(text) == text


@pytest.mark.parametrize("key", ["EMPTY", "none", "anything", "whatever", "ollama", "a1b2c3d"])
def test_a_placeholder_is_no_secret(key):
    assert is_placeholder(key)


@pytest.mark.parametrize("key", ["sk-secret-123", "0123456789abcdef", KEY, "Ab" * 20])
def test_a_key_is_a_secret(key):
    assert not is_placeholder(key)


def test_a_word_as_key_does_not_change_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "anything")
    with FakeLlm(lambda _: completion("I cannot hear anything.")) as server:
        assert ask(server.url, tmp_path).text == "I cannot hear anything."


def echo_reply(is_escaped: bool) -> dict:
    """Return a reply that repeats the key in two parts of its text and in every other field."""
    pair = {
        "q": f"What is {KEY} in this sound?",
        "a": f"It is {KEY}, which rises quickly and then falls again, as it does near a road.",
    }
    text = json.dumps(pair)
    if is_escaped:
        text = text.replace("sk-", json_escape("sk-"))
    middle = text.rindex("proj")  # In the middle of the key.
    reply = completion("", f"stop {KEY}")
    reply["choices"][0]["message"]["content"] = [{"text": text[:middle]}, {"text": text[middle:]}]
    return reply | {"model": f"m {KEY}"}


@pytest.mark.parametrize("is_escaped", [False, True])
def test_an_echoed_key_is_written_nowhere(tmp_path, monkeypatch, capsys, is_escaped):
    """It is in no file: not among replies, examples, rejects and provenance, nor printed."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeLlm(lambda _: echo_reply(is_escaped)) as server:
        main(arguments(tmp_path, server.url, count=2))
        assert f"Bearer {KEY}" in server.headers[0]
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) >= 4
    texts = [path.read_text(encoding="utf-8") for path in files] + list(capsys.readouterr())
    assert any("[key]" in text for text in texts)
    for text in texts:
        decoded = text.encode().decode("unicode_escape").replace("\\", "")
        assert "4bX" not in decoded


def test_the_beginning_of_a_body_shows_no_part_of_the_key(tmp_path, monkeypatch):
    """An error shows 80 letters of a body, which may end within the key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    body = ("x" * 70 + KEY).encode()
    with RawServer(plain("200 OK"), lambda: iter([body])) as server:
        reply = str(ask(server.url, tmp_path))
        assert "no chat completion" in reply and "sk-" not in reply


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
def test_a_password_in_the_address_is_a_secret(tmp_path, status):
    header = base64.b64encode(b"me:hunter2-of-mine").decode()
    body = json.dumps({"error": {"message": f"hunter2-of-mine and Basic {header}"}}).encode()
    with RawServer(plain(status), lambda: iter([body])) as server:
        error = str(ask(server.url.replace("//", "//me:hunter2-of-mine@"), tmp_path, tries=1))
        assert f"Basic {header}" in server.requests[0]
    assert "[key] and Basic [key]" in error
    assert "hunter2" not in error and header not in error


def test_an_error_about_embeddings_has_no_key(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    body = json.dumps({"data": [{"index": 0, "embedding": [KEY]}]}).encode()
    with RawServer(plain("200 OK"), lambda: iter([body])) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with pytest.raises(EvaluationError) as caught:
            open_embedder("openai:m", tmp_path)(["a text"])
    assert "4bX" not in str(caught.value)
