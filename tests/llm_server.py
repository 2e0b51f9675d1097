"""Runs an OpenAI-compatible server on 127.0.0.1 that fails on demand.

It counts what a client would pay for.
"""

import asyncio
import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import TypeVar

S = TypeVar("S", bound="LocalServer")

# Faults that nobody pays for. The next try succeeds.
QUICK_FAULTS = (
    "429", "429 seconds", "500", "503", "503 seconds", "drop", "half a body", "not JSON", "HTML",
    "no choices", "error in a 200",
)  # fmt: skip
# A date has whole seconds, so the client waits for up to a second.
FAULTS = (*QUICK_FAULTS, "429 date")
# "time-out" lasts until the client gives up. A test of it needs a client with a short time-out. On
# a busy machine such a client may give up on good replies too, so the test cannot count them.


def completion(text: str, finish_reason: str = "stop") -> dict:
    """Return the body of a chat completion."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish_reason,
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m-0301",
        "choices": [choice],
        "usage": usage,
    }


class LocalServer:
    """A context manager; `serve` answers each connection, in a thread of the server's own."""

    def __enter__(self: S) -> S:
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.server.close()
        self.loop.run_until_complete(self.end())
        self.loop.close()

    async def end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class FakeLlm(LocalServer):
    """A server of chat completions.

    Args:
        answer: Maps the body of a request to the body of its reply.
        fault_fraction: Fraction of tries that fail, at most twice in a row for one request.
        seed: Seed of the faults.
        faults: The faults to choose from.
        delay: Seconds before a reply.
        hold_after: Number of replies that are sent at once. Further ones wait for `release`; `held`
            counts them.
    """

    def __init__(
        self,
        answer: Callable[[dict], dict],
        fault_fraction: float = 0.0,
        seed: int = 0,
        faults: Sequence[str] = QUICK_FAULTS,
        delay: float = 0.0,
        hold_after: int | None = None,
    ):
        self.answer = answer
        self.fault_fraction = fault_fraction
        self.rng = random.Random(seed)
        self.kinds = faults
        self.delay = delay
        self.hold_after = hold_after
        self.begun = 0  # replies that were begun
        self.held = 0  # replies that wait for `release`
        self.released = asyncio.Event()
        self.paid: Counter = Counter()  # key of a request -> whole replies that were sent
        self.faults: Counter = Counter()
        self.failed: Counter = Counter()
        self.times: list[float] = []
        self.script: list[str] = []  # faults of the first requests
        self.headers: list[str] = []
        self.at_once = 0  # requests in progress
        self.most_at_once = 0

    def release(self) -> None:
        """Send the replies that wait, and let no further one wait."""
        self.loop.call_soon_threadsafe(self.released.set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                size = next(
                    line
                    for line in head.lower().split("\r\n")
                    if line.startswith("content-length:")
                )
                body = json.loads(await reader.readexactly(int(size.split(":")[1])))
                self.headers.append(head)
                self.times.append(time.monotonic())
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    is_kept_alive = await self.reply(body, reader, writer)
                finally:
                    self.at_once -= 1
                if not is_kept_alive:
                    return writer.close()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
        except asyncio.CancelledError:  # `end` cancels it. asyncio would log that as an error.
            writer.close()

    async def reply(
        self, body: dict, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        fault = self.script.pop(0) if self.script else ""
        if not fault and self.rng.random() < self.fault_fraction and self.failed[key] < 2:
            fault = self.rng.choice(self.kinds)
        if fault:
            self.failed[key] += 1
            self.faults[fault] += 1
            if fault == "time-out":
                await reader.read(1)  # Until the client closes the connection.
                return False
            return await self.fail(fault, writer)
        self.failed[key] = 0
        await asyncio.sleep(self.delay)
        self.begun += 1
        if self.hold_after is not None and self.begun > self.hold_after:
            self.held += 1
            await self.released.wait()
        self.paid[key] += 1
        return await self.send(writer, 200, json.dumps(self.answer(body)))

    async def fail(self, fault: str, writer: asyncio.StreamWriter) -> bool:
        if fault == "drop":
            return False
        if fault == "half a body":
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n"
                + b'{"cho'
            )
            await writer.drain()
            return False
        if fault in ("HTML", "not JSON", "no choices", "error in a 200"):
            text = {
                "HTML": "<html>busy",
                "not JSON": '{"choices": [{"mess',
                "no choices": '{"choices": []}',
            }
            kind = "text/html" if fault == "HTML" else "application/json"
            return await self.send(
                writer, 200, text.get(fault, '{"error": {"message": "overloaded"}}'), kind
            )
        status, _, form = fault.partition(" ")
        codes = {
            "quota": (429, "insufficient_quota"),
            "401": (401, "invalid_api_key"),
            "400": (400, "bad"),
        }
        number, code = codes.get(status) or (int(status), "busy")
        wait = {"seconds": "0.05", "date": formatdate(time.time() + 1, usegmt=True)}.get(form, form)
        # Repeat the key in the message, as some endpoints do.
        lines = self.headers[-1].split("\r\n")
        key = "".join(line for line in lines if line.lower().startswith("authorization"))
        error = json.dumps({"error": {"message": f"no: {key}", "code": code}})
        return await self.send(
            writer, number, error, extra=f"retry-after: {wait}\r\n" if wait else ""
        )

    async def send(
        self,
        writer: asyncio.StreamWriter,
        status: int,
        text: str,
        kind: str = "application/json",
        extra: str = "",
    ) -> bool:
        body = text.encode()
        headers = f"content-type: {kind}\r\n{extra}content-length: {len(body)}\r\n"
        head = f"HTTP/1.1 {status} X\r\n{headers}\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return True
