"""Sends prompt embeddings to vLLM servers and reads the tokens that they generate.

The request is that of the completions API with vLLM's input `prompt_embeds`; the reply is a stream
of server-sent events with `token_ids`. Several servers take turns. One that is busy or fails is
left out for a while, and its request goes to the next one.

Replies are bounded: an event has at most `MAX_EVENT` bytes and an answer at most the tokens that
were asked for. A server has failed if it sends nothing for `idle_seconds`, or no token for these
and `connect_seconds`. The API key is taken out of everything that a server sends before it is
quoted.
"""

import base64
import http.client
import io
import json
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit

import torch
from torch import Tensor

MAX_EVENT = 2**20  # Bytes of an event of a stream.
MAX_BODY = 2**22  # Bytes of a reply that is no stream.
MAX_MESSAGE = 300  # Characters of an error that are quoted.
BUSY = (429, 503)  # The server takes the request later.
TRANSIENT = (408, 425)  # Of the statuses below 500, those that concern this try only.
TRIES_PER_HOST = 4
# Seconds for which a server that failed is left out: after its first failure, twice as long after
# each further one up to the third, and what it asks for (Retry-After) up to a limit.
FIRST_PAUSE = 0.5
MAX_DOUBLINGS = 3
MAX_WAIT = 30.0
POLL_SECONDS = 0.1  # How often a waiting request finds out that nobody waits for it.


class ServerFailure(Exception):
    """A server did not answer a request.

    Attributes:
        is_busy: it said that it takes the request later.
        is_final: it refused the request, and others would do so too.
        wait: seconds after which it may be asked again; None if it named none.
    """

    def __init__(
        self, message: str, is_busy: bool = False, is_final: bool = False, wait: float | None = None
    ):
        super().__init__(message)
        self.is_busy = is_busy
        self.is_final = is_final
        self.wait = wait


class Receiver(Protocol):
    """Takes the tokens of an answer while they arrive."""

    def add(self, tokens: list[int]) -> None:
        """Take the next tokens."""

    def is_wanted(self) -> bool:
        """Return whether somebody still waits for the answer."""

    def restart(self) -> bool:
        """Forget the tokens; False if that is impossible, because text of them was shown."""


@dataclass
class VllmHost:
    """One server.

    Attributes:
        url: its address, that of `/completions` without this.
        model: the name of its model; "" until the server was checked.
        max_length: the tokens of prompt and answer that it takes together.
        not_before: time at which it may be asked again.
        failures: how often it failed in a row.
    """

    url: str
    model: str = ""
    max_length: int = 0
    not_before: float = 0.0
    failures: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def pause(self, wait: float | None) -> None:
        """Leave the server out for a while, after it failed."""
        now = time.monotonic()
        with self.lock:
            if now < self.not_before:  # Another request has found out.
                return
            if wait is None:
                wait = FIRST_PAUSE * 2 ** min(self.failures, MAX_DOUBLINGS)
            self.failures += 1
            self.not_before = now + min(wait, MAX_WAIT)

    def note_success(self) -> None:
        with self.lock:
            self.failures = 0
            self.not_before = 0.0


def parse_url(url: str) -> SplitResult:
    """Split the address of a server.

    Raises:
        ValueError: it is no address of a server, or has a password.
    """
    parts = urlsplit(url)
    try:
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # The port is no number.
        is_valid = False
    if not is_valid or parts.query or parts.fragment:
        raise ValueError(f"--engine_url {url!r}: an address is http://HOST:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"--engine_url http://...@{parts.hostname}: a password belongs into the environment "
            "variable VLLM_API_KEY, and not into the address."
        )
    return parts


def encode_embeds(embeds: Tensor) -> str:
    """Return a prompt's embeddings (tokens, hidden) as vLLM takes them: torch.save in base64."""
    buffer = io.BytesIO()
    # Cloned, because a view would be saved with the whole tensor behind it.
    torch.save(embeds.detach().cpu().contiguous().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class VllmConnection:
    """A connection for one request, which another thread may close.

    Args:
        host: the server.
        key: its API key, "" if it needs none.
        connect_seconds: until the connection must stand.
        idle_seconds: in which a byte must arrive.
    """

    def __init__(self, host: VllmHost, key: str, connect_seconds: float, idle_seconds: float):
        parts = parse_url(host.url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        connection_class = kinds[parts.scheme]
        self.host = host
        self.key = key
        self.path = parts.path.rstrip("/")
        self.idle_seconds = idle_seconds
        self.connection = connection_class(parts.hostname, parts.port, timeout=connect_seconds)
        self.socket: socket.socket | None = None
        self.response: http.client.HTTPResponse | None = None
        self.is_closed = False

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        """Send a request and receive the head of its reply.

        Raises:
            ServerFailure: there is none, or its status is an error.
        """
        headers = {"Accept-Encoding": "identity", "Connection": "close"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            self.connection.connect()
            # The connection forgets its socket when it has the head of the reply.
            self.socket = self.connection.sock
            self.socket.settimeout(self.idle_seconds)
            if self.is_closed:
                self.abort()
            self.connection.request(method, f"{self.path}{path}", data, headers)
            self.response = self.connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self.fail(describe(error)) from None
        if self.response.status != 200:
            raise self._classify(self.response)

    def _classify(self, response: http.client.HTTPResponse) -> ServerFailure:
        """Return the failure of an error status."""
        status = response.status
        try:
            text = response.read(MAX_BODY).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        message = f"status {status}: {find_message(text)}"
        if status in BUSY:
            wait = response.headers.get("Retry-After", "")
            seconds = float(wait) if wait.isdecimal() else None
            return self.fail(message, is_busy=True, wait=seconds)
        return self.fail(message, is_final=status < 500 and status not in TRANSIENT)

    def read_json(self) -> Any:
        """Return the JSON of a reply that is no stream. Raises ServerFailure."""
        try:
            data = self.response.read(MAX_BODY + 1)
            if len(data) > MAX_BODY:
                raise self.fail(f"a reply of over {MAX_BODY} bytes")
            return json.loads(data)
        except (OSError, http.client.HTTPException) as error:
            raise self.fail(describe(error)) from None
        except (ValueError, RecursionError):
            raise self.fail("the reply is no JSON") from None

    def read_events(self) -> Iterator[dict[str, Any]]:
        """Yield the content of each event of a stream, up to its end.

        Raises:
            ServerFailure: an event is too long, or no JSON object, or an error.
        """
        while True:
            try:
                line = self.response.readline(MAX_EVENT + 1)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self.fail(describe(error)) from None
            if not line:
                raise self.fail("the stream was cut off")
            if len(line) > MAX_EVENT:
                raise self.fail(f"an event of over {MAX_EVENT} bytes")
            name, _, content = line.partition(b":")
            if name != b"data":  # An empty line, a comment, or another field.
                continue
            if content.strip() == b"[DONE]":
                return
            yield self._parse_event(content)

    def _parse_event(self, content: bytes) -> dict[str, Any]:
        text = content.decode("utf-8", "replace")
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            raise self.fail(f"an event is no JSON object: {text}")
        if event.get("error") or event.get("object") == "error":
            raise self.fail(f"an error in the stream: {find_message(text)}")
        return event

    def fail(self, reason: str, **settings: Any) -> ServerFailure:
        """Return a failure whose message has the address and the reason in one line."""
        return ServerFailure(f"{self.host.url}: {quote(reason, self.key)}", **settings)

    def abort(self) -> None:
        """End the request from any thread; the server then stops generating."""
        self.is_closed = True
        if self.socket is not None:
            with suppress(OSError):  # It has been closed already.
                self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the connection, from the thread that uses it."""
        if self.response is not None:
            self.response.close()
        self.connection.close()


def quote(text: str, key: str) -> str:
    """Return the beginning of what a server has sent, in one line and without the key."""
    # The key is taken out before the text is cut, since half a key would not be found.
    if key:
        text = text.replace(key, "***")
    text = " ".join(text.split())[:MAX_MESSAGE]
    # A terminal would obey control characters.
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def describe(error: Exception) -> str:
    """Return the reason of an error of a connection."""
    if isinstance(error, TimeoutError):
        return "time-out"
    if isinstance(error, http.client.IncompleteRead):
        return "the reply was cut off"
    return str(error) or type(error).__name__


def find_message(text: str) -> str:
    """Return the message in the body of an error, or the beginning of the body."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(content, dict) and content.get(name):
            content = content[name]
    return content if isinstance(content, str) else json.dumps(content)


class VllmHosts:
    """The servers of one model, asked in turn.

    Args:
        urls: their addresses.
        check: called with a server before its first completion; sets `model` and `max_length`.
            A ValueError says that its model is another one.
        key: their API key, "" if they need none.
        connect_seconds, idle_seconds: as of `VllmConnection`.
    """

    def __init__(
        self,
        urls: list[str],
        check: Callable[[VllmHost], None],
        key: str = "",
        connect_seconds: float = 10.0,
        idle_seconds: float = 300.0,
    ):
        for url in urls:
            parse_url(url)
        if not (key.isascii() and key.isprintable()):
            raise ValueError("VLLM_API_KEY has a letter that is not allowed in a header.")
        self.hosts = [VllmHost(url.rstrip("/")) for url in urls]
        self.check = check
        self.key = key
        self.connect_seconds = connect_seconds
        self.idle_seconds = idle_seconds
        self.turn = 0
        self.lock = threading.Lock()

    def connect(self, host: VllmHost) -> VllmConnection:
        """Return a connection, which is opened by its first request."""
        return VllmConnection(host, self.key, self.connect_seconds, self.idle_seconds)

    def check_all(self) -> None:
        """Check each server, before the first question.

        Raises:
            ValueError: a server has another model or refuses requests.
            ConnectionError: none can be reached.
        """
        failures = []
        for host in self.hosts:
            try:
                self.check(host)
            except ServerFailure as failure:
                if failure.is_final:
                    raise ValueError(str(failure)) from None
                failures.append(failure)
        if len(failures) == len(self.hosts):
            raise ConnectionError(f"No server of --engine_url answers. {failures[0]}")
        for failure in failures:
            print(f"warning: {failure}; it is tried again later.", file=sys.stderr)

    def complete(self, body: dict[str, Any], receiver: Receiver) -> str:
        """Let the next server that can generate an answer.

        Args:
            body: of the request, without the name of the model.
            receiver: takes the tokens.

        Returns:
            "stop", "length", or "cancelled" if nobody waits for the answer any more.

        Raises:
            ServerFailure: no server answered; that of the last one.
        """
        failure = ServerFailure("no server was asked")
        for _ in range(TRIES_PER_HOST * len(self.hosts)):
            host = self._next_host()
            while time.monotonic() < host.not_before:
                if not receiver.is_wanted():
                    return "cancelled"
                time.sleep(POLL_SECONDS)
            try:
                if not host.model:
                    self.check(host)
                finish_reason = self.stream(host, body, receiver)
                host.note_success()
                return finish_reason
            except ServerFailure as error:
                failure = error
            except ValueError as error:  # Of the check: it began to run with another model.
                failure = ServerFailure(str(error), wait=MAX_WAIT)
            if failure.is_final:
                break
            host.pause(failure.wait)
            if not receiver.restart():
                break
        raise failure

    def _next_host(self) -> VllmHost:
        """Return the next server in turn that is not left out, or the one that is back first."""
        with self.lock:
            order = self.hosts[self.turn :] + self.hosts[: self.turn]
            now = time.monotonic()
            ready = [host for host in order if host.not_before <= now]
            host = ready[0] if ready else min(order, key=lambda host: host.not_before)
            self.turn = (self.hosts.index(host) + 1) % len(self.hosts)
        return host

    def stream(self, host: VllmHost, body: dict[str, Any], receiver: Receiver) -> str:
        """Let a server generate an answer.

        One thread reads the stream, so that this one notices when nobody waits any more, and when
        the server sends other things than tokens.

        Args, Returns: as of `complete`.

        Raises:
            ServerFailure: the server did not answer, or its reply is incomplete.
        """
        connection = self.connect(host)
        chunks: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()

        def read() -> str:
            try:
                connection.request("POST", "/completions", body | {"model": host.model})
                return read_tokens(connection, body["max_tokens"], chunks.put)
            finally:
                connection.close()
                chunks.put(None)

        with ThreadPoolExecutor(1, "vllm") as pool:
            reading = pool.submit(read)
            is_read = False
            patience = self.connect_seconds + self.idle_seconds
            deadline = time.monotonic() + patience
            while not is_read:
                try:
                    tokens = chunks.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    tokens = []
                if tokens:
                    receiver.add(tokens)
                    deadline = time.monotonic() + patience
                is_read = tokens is None
                if not is_read and time.monotonic() > deadline:
                    connection.abort()
                    raise connection.fail(f"no token for {patience:g} s")
                if not is_read and not receiver.is_wanted():
                    connection.abort()
                    return "cancelled"
            return reading.result()


def read_tokens(
    connection: VllmConnection, max_tokens: int, on_tokens: Callable[[list[int]], None]
) -> str:
    """Read the tokens of a streamed completion.

    Returns:
        "stop" or "length".

    Raises:
        ServerFailure: the stream is no complete completion.
    """
    finish_reason = None
    num_tokens = 0
    for event in connection.read_events():
        choices = event.get("choices")
        if choices == []:  # An event with the usage only.
            continue
        try:
            choice = choices[0]
            tokens = choice["token_ids"]
            finish_reason = choice.get("finish_reason") or finish_reason
            is_valid = all(type(token) is int and token >= 0 for token in tokens)
        except (TypeError, LookupError, AttributeError):
            is_valid = False
        if not is_valid:
            raise connection.fail(
                "an event has no token_ids; vLLM has sent them since version 0.10.2"
            )
        num_tokens += len(tokens)
        if num_tokens > max_tokens:
            raise connection.fail(f"over {max_tokens} tokens, which were the limit")
        on_tokens(tokens)
    if finish_reason not in ("stop", "length"):
        raise connection.fail(f"generation ended with {finish_reason!r}")
    return finish_reason
