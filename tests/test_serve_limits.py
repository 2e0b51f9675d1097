"""Tests that slow, silent, heavy and many clients keep nobody out of the server.

The tests are slow or fast clients themselves, on real sockets. Where a clip must take long, its
decoding is held between two blocks, so that no test depends on the speed of the machine.
"""

import gc
import http.client
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from ltu.data.audio import OnBlock, Waveform, decode_audio
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu.serve import main, read_flags
from ltu.serving import clip_decoder, request_parser
from ltu.serving.connection_limits import client_of, limits_of_flags, raise_file_limit
from ltu.serving.listener import open_listeners
from tests import tiny
from tests.machine import PATIENCE, ROOT, wait_until
from tests.test_serve import (
    QUESTION,
    REQUEST_HEAD,
    Served,
    audio_part,
    encode_clip,
    serve,
    text_part,
    user,
    write_served_model,
)

PARTIAL_HEADERS = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "
UNFINISHED = REQUEST_HEAD + b"Content-Length: 1000\r\n\r\n{"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("limits"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> LtuEngine:
    return LtuEngine.from_pretrained(folder)


def connect(port: int, data: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    """Connect from a loopback address and send the beginning of a request."""
    connection = socket.create_connection(
        ("127.0.0.1", port), timeout=PATIENCE, source_address=(source, 0)
    )
    connection.sendall(data)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server has closed a connection, without waiting."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def get_health(port: int, source: str = "127.0.0.1") -> int:
    """Return the status of /health."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", port, timeout=PATIENCE, source_address=(source, 0)
    )
    with closing(connection):
        connection.request("GET", "/health")
        return connection.getresponse().status


def many_addresses() -> Iterator[str]:
    """Yield addresses of this machine."""
    first = ipaddress.ip_address("127.0.1.1")
    return (str(first + number) for number in range(10_000))


def closed_metric(reason: str) -> str:
    return f'ltu_closed_connections_total{{reason="{reason}"}}'


# --- connections


def test_silent_connections_and_few_open_files(folder: Path, tmp_path: Path) -> None:
    """The server raises the soft limit, and stays below the hard one."""
    raise_file_limit()  # For the 400 sockets here.
    output = tmp_path / "output"
    words = f"{sys.executable} -m ltu.serve --model {folder} --port 0"
    script = f"ulimit -Sn 100; ulimit -Hn 200; exec {words} 2> {output}"
    with ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(["bash", "-c", script], cwd=ROOT))
        stack.callback(server.kill)
        wait_until(lambda: output.is_file() and "running on" in output.read_text(), server)
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", output.read_text())[1])
        # A server that is busy meets all of them at once.
        os.kill(server.pid, signal.SIGSTOP)
        for _ in range(400):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", port))
        os.kill(server.pid, signal.SIGCONT)
        assert get_health(port) == 200
        addresses = many_addresses()
        for number in range(400):
            source = "127.0.0.1" if number % 2 else next(addresses)
            stack.enter_context(connect(port, source=source))
            if number % 50 == 0:
                assert get_health(port) == 200
        served = Served(None, port)
        reply = served.ask(text_part())
        assert reply.choices[0].message.content
        assert 0 < served.metric(closed_metric("too_many"))
        assert len(os.listdir(f"/proc/{server.pid}/fd")) <= 200
        assert "resource" not in output.read_text()


@pytest.mark.parametrize("addresses", ["one", "many"])
@pytest.mark.parametrize("data", [b"", PARTIAL_HEADERS, UNFINISHED], ids=["silent", "head", "body"])
def test_the_oldest_waiting_connection_is_closed(
    engine: LtuEngine, addresses: str, data: bytes
) -> None:
    """A request that is being answered goes on, and new ones are answered."""
    sources = many_addresses()
    flags = ["--max_queue", "4"]
    if addresses == "one":
        flags += ["--max_connections_per_client", "10"]
        limit = 10
    else:
        flags += ["--max_connections", "20"]
        limit = 20
    with (
        serve(engine, *flags) as served,
        tiny.closed_gate(engine) as gate,
        ThreadPoolExecutor() as pool,
        ExitStack() as stack,
    ):
        running = pool.submit(served.ask, text_part())
        assert gate.is_reached.wait(PATIENCE)
        connections = []
        for _ in range(2 * limit):
            source = "127.0.0.1" if addresses == "one" else next(sources)
            connections.append(stack.enter_context(connect(served.port, data, source)))
            assert get_health(served.port) == 200
        wait_until(lambda: is_closed(connections[0]))
        assert not is_closed(connections[-1])
        gate.is_open.set()
        expected = served.answer_alone(QUESTION)
        assert running.result().choices[0].message.content == expected
        assert served.ask(text_part()).choices[0].message.content == expected


def test_one_client_does_not_close_connections_of_others(engine: LtuEngine) -> None:
    with serve(engine, "--max_connections_per_client", "5") as served, ExitStack() as stack:
        own = stack.enter_context(connect(served.port, PARTIAL_HEADERS, "127.0.0.2"))
        for _ in range(20):
            stack.enter_context(connect(served.port))
        wait_until(lambda: served.metric(closed_metric("too_many")) >= 15)
        own.sendall(b"x\r\n\r\n")
        assert own.recv(100).startswith(b"HTTP/1.1 200")


def test_a_connection_waits_since_its_last_reply(engine: LtuEngine) -> None:
    """A client that sends one request after the other is not taken for a silent one."""
    with serve(engine, "--max_connections_per_client", "5") as served, ExitStack() as stack:
        used = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
        used.connect()
        # The client does not connect again.
        used.auto_open = 0
        stack.callback(used.close)
        for _ in range(10):
            stack.enter_context(connect(served.port))
            used.request("GET", "/health")
            with used.getresponse() as reply:
                assert reply.status == 200 and reply.read()


def test_connections_of_the_client_with_most_are_closed(engine: LtuEngine) -> None:
    """A few addresses that connect very often do not close those of others."""
    with serve(engine, "--max_connections", "100") as served, ExitStack() as stack:
        own = stack.enter_context(connect(served.port, PARTIAL_HEADERS, "127.0.0.2"))
        for number in range(200):
            stack.enter_context(connect(served.port, source=f"127.0.0.{3 + number % 3}"))
        wait_until(lambda: served.metric(closed_metric("too_many")) >= 100)
        own.sendall(b"x\r\n\r\n")
        assert own.recv(100).startswith(b"HTTP/1.1 200")


def test_a_client_without_a_limit(engine: LtuEngine) -> None:
    flags = ["--max_connections_per_client", "0", "--max_connections", "100"]
    with serve(engine, *flags) as served, ExitStack() as stack:
        connections = [stack.enter_context(connect(served.port)) for _ in range(90)]
        assert get_health(served.port) == 200
        assert not any(map(is_closed, connections))


# --- time


def drip(connection: socket.socket) -> None:
    """Send a byte now and then until the server closes the connection."""
    connection.setblocking(False)
    deadline = time.monotonic() + PATIENCE
    while not is_closed(connection):
        assert time.monotonic() < deadline
        try:
            connection.send(b"a")
        except ConnectionError:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("is_dripping", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        PARTIAL_HEADERS,
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
        # The second request on a connection.
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + PARTIAL_HEADERS,
    ],
    ids=["silent", "head", "answered before its body", "second"],
)
def test_a_request_that_does_not_arrive(engine: LtuEngine, data: bytes, is_dripping: bool) -> None:
    if not data and is_dripping:
        data = b"G"
    with serve(engine, "--receive_seconds", "0.3") as served:
        with connect(served.port, data) as connection:
            if is_dripping:
                drip(connection)
            else:
                wait_until(lambda: is_closed(connection))
        assert served.metric(closed_metric("not_received")) == 1


def test_a_body_that_drips(engine: LtuEngine) -> None:
    with serve(engine, "--receive_seconds", "0.3") as served:
        with connect(served.port, UNFINISHED) as connection:
            connection.setblocking(False)
            reply = b""
            deadline = time.monotonic() + PATIENCE
            while not reply:
                assert time.monotonic() < deadline
                connection.send(b" ")
                time.sleep(0.02)
                try:
                    reply = connection.recv(100)
                except BlockingIOError:
                    continue
            assert reply.startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read(engine: LtuEngine) -> None:
    """Its connection would stay open for ever, with replies in memory."""
    with serve(engine, "--receive_seconds", "0.3") as served:
        with connect(served.port) as connection:
            connection.setblocking(False)
            request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"

            def is_aborted() -> bool:
                try:
                    connection.send(100 * request)
                except BlockingIOError:
                    pass
                except ConnectionError:
                    return True
                return False

            wait_until(is_aborted)
        assert served.metric(closed_metric("not_read")) == 1


def test_slow_bodies_take_no_place_in_the_queue(engine: LtuEngine) -> None:
    with serve(engine, "--max_queue", "2") as served, ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(served.port, UNFINISHED))
        assert served.ask(text_part()).choices[0].message.content == served.answer_alone(QUESTION)


@pytest.mark.parametrize("num_sources, num_allowed", [(1, 4), (6, 8)], ids=["one", "many"])
def test_memory_of_bodies_in_arrival(engine: LtuEngine, num_sources: int, num_allowed: int) -> None:
    """Half of a queue in total, and a quarter of one client; then the oldest is closed."""
    limit = 100_000
    sent = 90_000
    beginning = REQUEST_HEAD + b"Content-Length: %d\r\n\r\n" % limit + b" " * sent
    num_closed = 3
    connections: list[socket.socket] = []

    def have_arrived() -> bool:
        num_bytes = sent * min(len(connections), num_allowed)
        return served.metric("ltu_arriving_bytes") >= num_bytes

    flags = ["--max_queue", "16", "--max_body_mb", str(limit / 2**20)]
    with serve(engine, *flags) as served, ExitStack() as stack:
        for number in range(num_allowed + num_closed):
            source = f"127.0.0.{2 + number % num_sources}"
            connections.append(stack.enter_context(connect(served.port, beginning, source)))
            wait_until(have_arrived)  # In this order, also in the server.
        wait_until(lambda: served.metric(closed_metric("too_many")) == num_closed)
        assert all(map(is_closed, connections[:num_closed]))
        assert not any(map(is_closed, connections[num_closed:]))
        for connection in connections:
            connection.close()
        wait_until(lambda: served.metric("ltu_arriving_bytes") == 0)
        assert served.ask(text_part()).choices[0].message.content


def test_a_body_that_is_thrown_away_takes_no_memory(engine: LtuEngine) -> None:
    """It would count against the bodies of the same client that are in arrival."""
    beginning = REQUEST_HEAD + b"Content-Length: 1000000\r\n\r\n"
    with serve(engine, "--max_body_mb", "0.5") as served:
        with connect(served.port, beginning) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 413")
            connection.sendall(b" " * 900_000)
            assert get_health(served.port) == 200
            assert served.metric("ltu_arriving_bytes") == 0


# --- decoding


class HeldDecoding:
    """Holds the decoding of clips of one size between blocks until it is let go or is cancelled."""

    def __init__(self, size: int):
        self.size = size
        self.num_held = 0
        self.num_ended = 0
        self.is_open = threading.Event()

    def decode(
        self, source: bytes, max_seconds: float, on_block: OnBlock, *settings: Any
    ) -> Waveform:
        if len(source) != self.size:
            return decode_audio(source, max_seconds, on_block, *settings)

        def hold() -> None:
            while not self.is_open.wait(0.01):
                on_block()
            on_block()

        self.num_held += 1
        try:
            return decode_audio(source, max_seconds, hold, *settings)
        finally:
            self.num_ended += 1


HELD_CLIP = encode_clip(tiny.clip(1, 0.6))
OTHER_CLIP = encode_clip(tiny.clip(2, 0.5))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldDecoding]:
    held = HeldDecoding(len(HELD_CLIP))
    monkeypatch.setattr(request_parser, "decode_audio", held.decode)
    # Each time that a held clip looks whether it is cancelled counts as a block.
    monkeypatch.setattr(clip_decoder, "BLOCK", 0)
    yield held
    held.is_open.set()


def clip_body(clip: bytes) -> bytes:
    messages = user([text_part(), audio_part(clip)])
    return json.dumps({"model": "tiny", "max_tokens": 12, "messages": messages}).encode()


def test_the_timeout_covers_decoding(engine: LtuEngine, held: HeldDecoding) -> None:
    """Also of the clips that wait until others are decoded."""
    cancelled = 'ltu_answers_total{status="cancelled"}'
    with serve(engine, "--timeout", "1") as served, ThreadPoolExecutor() as pool:
        replies = [pool.submit(served.post, clip_body(HELD_CLIP)) for _ in range(4)]
        for reply in replies:
            status, content = reply.result()
            assert (status, content["error"]["code"]) == (504, "timeout"), content
        wait_until(lambda: served.metric(cancelled) == 4)
        wait_until(lambda: held.num_ended == held.num_held)
        reply = served.ask(text_part(), audio_part(OTHER_CLIP))
        assert reply.choices[0].message.content == served.answer_alone(QUESTION, OTHER_CLIP)


def test_clients_that_disconnect_while_their_clip_is_decoded(
    engine: LtuEngine, held: HeldDecoding
) -> None:
    with serve(engine) as served:
        decoding = served.send(clip_body(HELD_CLIP))
        wait_until(lambda: held.num_held == 1)
        waiting = served.send(clip_body(HELD_CLIP))
        waiting.close()
        wait_until(lambda: served.metric('ltu_answers_total{status="cancelled"}') == 1)
        decoding.close()
        wait_until(lambda: held.num_ended == 1)
        wait_until(lambda: served.metric('ltu_answers_total{status="cancelled"}') == 2)
        assert held.num_held == 1


def test_clips_of_one_client_do_not_hold_others(engine: LtuEngine, held: HeldDecoding) -> None:
    """Neither clips of other clients nor requests without a clip."""

    def send_from(source: str, clip: bytes) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(
            "127.0.0.1", served.port, timeout=PATIENCE, source_address=(source, 0)
        )
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", clip_body(clip), headers)
        return connection

    with serve(engine) as served, ExitStack() as stack:
        heavy = [send_from("127.0.0.2", HELD_CLIP) for _ in range(5)]
        for connection in heavy:
            stack.callback(connection.close)
        wait_until(lambda: held.num_held == 1)
        assert served.ask(text_part()).choices[0].message.content == served.answer_alone(QUESTION)
        with closing(send_from("127.0.0.1", OTHER_CLIP)) as connection:
            answer = json.load(connection.getresponse())["choices"][0]["message"]["content"]
        assert answer == served.answer_alone(QUESTION, OTHER_CLIP)
        held.is_open.set()
        expected = served.answer_alone(QUESTION, HELD_CLIP)
        for connection in heavy:
            answer = json.load(connection.getresponse())["choices"][0]["message"]["content"]
            assert answer == expected


def test_a_clip_with_very_many_values(engine: LtuEngine) -> None:
    """A small file has 14 million values in 3.5 s of sound; stereo at 48 kHz has that in 144 s."""
    samples = np.zeros((2_300_000, 6), np.int16)
    samples[:10] = 1000
    data = encode_clip(samples, "flac", 655_350)
    assert len(data) < 100_000
    with serve(engine, "--max_seconds", "20") as served:
        with pytest.raises(openai.BadRequestError, match="more than 7680000 values") as error:
            served.ask(text_part(), audio_part(data, "flac"))
        assert error.value.code == "too_long"
        # Eight channels at 48 kHz for the whole time are decoded.
        data = encode_clip(samples[:960_000, [0, 1, 2, 3, 4, 5, 0, 1]], "flac", 48_000)
        reply = served.ask(text_part(), audio_part(data, "flac"))
        assert reply.model_extra["ltu"]["seconds_total"] == 20
        assert (
            reply.choices[0].message.content
            == engine([Request(QUESTION, data)], max_new_tokens=12)[0].text
        )


def test_long_clips_do_not_hold_short_ones(engine: LtuEngine, held: HeldDecoding) -> None:
    """Also of the same client, as all are behind a reverse proxy."""
    with serve(engine, "--max_seconds", "1e6") as served, ExitStack() as stack:
        # A held clip is short until it has looked twice.
        clip_decoder.BLOCK = clip_decoder.MAX_SHORT_VALUES
        long = [stack.enter_context(closing(served.send(clip_body(HELD_CLIP)))) for _ in range(5)]
        # Each was decoded as a short one, and the first again as a long one.
        wait_until(lambda: held.num_held == 6 and held.num_ended == 5)
        reply = served.ask(text_part(), audio_part(OTHER_CLIP))
        assert reply.choices[0].message.content == served.answer_alone(QUESTION, OTHER_CLIP)
        held.is_open.set()
        expected = served.answer_alone(QUESTION, HELD_CLIP)
        for connection in long:
            answer = json.load(connection.getresponse())["choices"][0]["message"]["content"]
            assert answer == expected


LONG_CLIP = encode_clip(np.random.default_rng(0).normal(0, 0.1, 22 * 16_000), "flac")
FAILING = {
    "unreadable": [text_part(), audio_part(bytes(1_000_000))],
    "too_long": [text_part(), audio_part(LONG_CLIP)],
    "context_length_exceeded": [text_part("a" * 1_000_000)],
}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("code", FAILING)
def test_a_request_that_failed_is_not_in_memory(
    engine: LtuEngine, code: str, is_streamed: bool
) -> None:
    """Also without the garbage collector, which may not run for a long time."""
    messages = user(FAILING[code])
    body = json.dumps({"model": "tiny", "stream": is_streamed, "messages": messages}).encode()
    with serve(engine, "--max_seconds", "20") as served:
        assert served.post(body)[1]["error"]["code"] == code
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for _ in range(10):
                served.post(body)
            wait_until(lambda: tracemalloc.get_traced_memory()[0] < 2 * len(body))
        finally:
            tracemalloc.stop()
            gc.enable()


# --- start


def start_without_model(*flags: str) -> None:
    """Run the command on a model that does not exist; so it ends when it loads the model."""
    with pytest.raises((OSError, ValueError), match="no-model"):
        main(["--model", "no-model", "--port", "0", *flags])


def test_a_port_in_use(tmp_path: Path) -> None:
    """It is found before the model is loaded, also while another server loads its model."""
    with closing(open_listeners("127.0.0.1", 0)[0]) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port} is in use .* --port"):
            main(["--model", "no-model", "--port", str(port)])
    start_without_model("--port", str(port))


def has_ipv6() -> bool:
    """Return whether this machine has an address of IPv6; Python alone knows the family."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_hosts() -> None:
    with pytest.raises(OSError, match="--host name.invalid: the name cannot be resolved"):
        open_listeners("name.invalid", 0)
    with pytest.raises(OSError, match=r"192\.0\.2\.1:0 cannot be opened .* --host"):
        open_listeners("192.0.2.1", 0)  # An address for documentation, which no machine has.
    for host in ("localhost", "::1", "", "0.0.0.0"):
        if host == "::1" and not has_ipv6():
            continue
        listeners = open_listeners(host, 0)
        ports = {listener.getsockname()[1] for listener in listeners}
        for listener in listeners:
            listener.close()
        assert len(ports) == 1 and 0 not in ports


@pytest.mark.parametrize(
    "host, key, is_open",
    [
        ("0.0.0.0", "", True),
        ("::", "", True),
        ("0.0.0.0", "secret", False),
        ("127.0.0.1", "", False),
        ("127.0.0.9", "", False),
        ("localhost", "", False),
    ],
)
def test_a_warning_if_others_can_use_the_server(
    host: str,
    key: str,
    is_open: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if host == "::" and not has_ipv6():
        pytest.skip("no IPv6 here")
    monkeypatch.setenv("LTU_API_KEY", key)
    start_without_model("--host", host)
    warnings = [record for record in caplog.records if "LTU_API_KEY" in record.getMessage()]
    assert len(warnings) == is_open
    for warning in warnings:
        assert warning.levelname == "WARNING" and "\n" not in warning.getMessage()


def test_too_few_connections_for_the_queue() -> None:
    args = read_flags(["--model", "tiny", "--max_queue", "241"])
    with pytest.raises(ValueError, match="--max_connections allows 256 .* 241 needs 257"):
        limits_of_flags(args)


@pytest.mark.parametrize(
    "address, client",
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_the_client_of_an_address(address: str, client: str) -> None:
    assert client_of(address) == client


def test_a_header_does_not_name_the_client(engine: LtuEngine) -> None:
    """Otherwise a client would get around its limit with an address in each request."""
    request = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 192.0.2.%d\r\n"
    with serve(engine, "--max_connections_per_client", "5") as served, ExitStack() as stack:
        for number in range(10):
            stack.enter_context(connect(served.port, request % number))
        with urllib.request.urlopen(f"{served.url}/metrics") as reply:
            assert reply.status == 200
        wait_until(lambda: served.metric(closed_metric("too_many")) >= 5)
