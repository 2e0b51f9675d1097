"""The server that answers as OpenAI's chat completions do."""

import argparse
import asyncio
import hmac
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

try:
    import uvicorn
    from fastapi import Depends, FastAPI
    from fastapi import Request as HttpRequest
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise SystemExit(f"error: {error}. The server's packages: pip install -e '.[serve]'") from error

from ltu.data.audio import AudioError
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Answer
from ltu.serving.batch_scheduler import BatchScheduler, Metrics, log
from ltu.serving.request_parser import ApiError, PendingRequest, RequestParser

FLAGS = {  # name -> default and help
    "host": ("127.0.0.1", "address to listen at; set LTU_API_KEY before others can reach it"),
    "port": (8000, "0: any that is free"),
    "name": ("", "of the model, to clients; else that of its folder"),
    "max_batch": (8, "requests that are answered together"),
    "max_wait_ms": (20.0, "that a request waits for others"),
    "max_queue": (64, "requests at once; more get a 429"),
    "max_body_mb": (25.0, "of a request"),
    "max_characters": (100_000, "of a prompt"),
    "max_seconds": (300.0, "of a clip"),
    "max_tokens": (1024, "that a request may ask for"),
    "timeout": (300.0, "seconds for a request"),
    "shutdown_seconds": (30, "that requests get to end after SIGTERM"),
}
BODY_SECONDS = 30  # for a body to arrive
FROM_ANSWER = "status seconds_heard seconds_total num_chunks transcript sampling_rate channels checkpoint".split()


class Service:
    """What the routes share: the queue in front of the model, and its limits."""

    def __init__(self, engine: LtuEngine, args: argparse.Namespace):
        self.args, self.name = args, args.name or Path(args.model).resolve().name
        self.key = os.environ.get("LTU_API_KEY", "")
        self.parser, self.metrics = RequestParser(engine.processor, args, self.name), Metrics()
        self.scheduler = BatchScheduler(
            engine, self.metrics, args.max_batch, args.max_wait_ms / 1000
        )
        self.threads = ThreadPoolExecutor(2, "readers")
        self.reading, self.pending_requests = 0, {}

    async def check_key(self, http: HttpRequest) -> None:
        given = http.headers.get("authorization", "").encode("latin-1")
        if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise ApiError(
                401, "Wrong API key.", None, "invalid_api_key", www_authenticate="Bearer"
            )

    async def chat(self, http: HttpRequest) -> Response:
        if self.reading + len(self.pending_requests) >= self.args.max_queue:
            raise ApiError(
                429,
                f"{self.args.max_queue} requests are on their way.",
                None,
                "busy",
                retry_after="1",
            )
        loop = asyncio.get_running_loop()
        self.reading += 1
        try:
            data = await asyncio.wait_for(self.receive(http), min(self.args.timeout, BODY_SECONDS))
            pending = await loop.run_in_executor(self.threads, self.parser.read, data)
            del data  # The clip is decoded; both would stay until the answer is there.
        except AudioError as error:
            self.metrics.answers.labels(error.reason).inc()
            raise ApiError(400, str(error), "messages", error.reason) from error
        except (ValueError, RecursionError) as error:
            raise ApiError(400, str(error)) from error
        finally:
            self.reading -= 1
        pending.loop = loop
        self.pending_requests[pending] = loop.create_task(self.watch(pending, http))
        self.scheduler.pending_requests.put(pending)
        event = await next_event(pending)
        self.metrics.requests.labels(200).inc()
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.name,
        }
        if pending.streams:
            return StreamingResponse(stream(pending, event, head), media_type="text/event-stream")
        message = {"role": "assistant", "content": event.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": event.finish_reason,
        }
        return JSONResponse(
            head | {"object": "chat.completion", "choices": [choice]} | extras(pending, event)
        )

    async def receive(self, http: HttpRequest) -> bytearray:
        """The body, as far as it is of a size that is taken."""

        def check(size: int) -> None:
            if size > self.args.max_body_mb * 2**20:
                raise ApiError(
                    413, f"The body has over {self.args.max_body_mb:g} MiB.", None, "body_too_large"
                )

        if (
            http.headers.get("content-type", "").partition(";")[0].strip().lower()
            != "application/json"
        ):
            raise ApiError(
                415, "The body must be application/json."
            )  # A web page could send others unasked.
        check(int(http.headers.get("content-length", 0)))
        data = bytearray()
        async for part in http.stream():
            data += part
            check(len(data))
        return data

    async def watch(self, pending: PendingRequest, http: HttpRequest) -> None:
        """Until the response or the connection has ended: then nobody waits for the job."""
        start, late = (
            time.monotonic(),
            ApiError(504, "This took too long.", None, "timeout", x_should_retry="false"),
        )
        timer = pending.loop.call_later(self.args.timeout, pending.fail, late)
        while (await http.receive())["type"] != "http.disconnect":
            pass
        timer.cancel()
        pending.fail(ApiError(499, "The client is gone."))
        del self.pending_requests[pending]
        self.metrics.latency.observe(time.monotonic() - start)


async def next_event(pending: PendingRequest) -> str | Answer:
    event = await pending.events.get()
    if isinstance(event, ApiError):
        raise event
    if isinstance(event, Answer) and not event.answered:
        raise ApiError(400, event.error, "messages", event.status)
    return event


async def stream(pending: PendingRequest, event: str | Answer, head: dict) -> AsyncIterator[str]:
    """The answer as server-sent events."""

    def line(delta: dict, reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return f"data: {json.dumps(head | {'object': 'chat.completion.chunk', 'choices': [choice]} | more)}\n\n"

    yield line({"role": "assistant", "content": ""})
    try:
        while isinstance(event, str):
            yield line({"content": event})
            event = await next_event(pending)
    except ApiError as error:
        yield f"data: {json.dumps({'error': error.detail})}\n\n"
        return
    more = extras(pending, event)
    yield line({}, event.finish_reason, ltu=more["ltu"])
    if pending.includes_usage:
        yield line({}, choices=[], **more)
    yield "data: [DONE]\n\n"


def extras(pending: PendingRequest, answer: Answer) -> dict[str, dict]:
    usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.new_tokens}
    usage["total_tokens"] = sum(usage.values())
    return {
        "usage": usage,
        "ltu": {name: getattr(answer, name) for name in FROM_ANSWER}
        | {"seed": pending.request.seed},
    }


def create_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        for pending in service.pending_requests:
            pending.is_over = True
        service.scheduler.pending_requests.put(None)
        service.scheduler.join(10)

    async def refuse(http: HttpRequest, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect | asyncio.TimeoutError):
            error = ApiError(408, "The body did not arrive.")
        elif not isinstance(error, HTTPException):
            log(error)
            error = ApiError(500, "The server failed on this request.", None, "internal_error")
        error = error if isinstance(error, ApiError) else ApiError(error.status_code, error.detail)
        service.metrics.requests.labels(error.status_code).inc()
        said = json.dumps({"error": error.detail})  # In ASCII: it may quote what is no UTF-8.
        return Response(said, error.status_code, error.headers, "application/json")

    async def models(name: str | None = None) -> dict:
        if name not in (None, service.name):
            raise ApiError(
                404, f"There is one model here: {service.name!r}.", "model", "model_not_found"
            )
        return {"object": "list", "data": [card]} if name is None else card

    async def health() -> dict:
        if not service.scheduler.is_alive():
            raise ApiError(
                503,
                "The thread that answers has ended; start the server again.",
                None,
                "internal_error",
            )
        return {"status": "ok", "model": service.name}

    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    card = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "ltu"}
    handlers = dict.fromkeys(
        (HTTPException, ClientDisconnect, asyncio.TimeoutError, Exception), refuse
    )
    app = FastAPI(openapi_url=None, lifespan=lifespan, exception_handlers=handlers)
    guarded = [Depends(service.check_key)]
    app.add_api_route(
        "/v1/chat/completions",
        service.chat,
        methods=["POST"],
        response_model=None,
        dependencies=guarded,
    )
    app.add_api_route("/v1/models", models, dependencies=guarded)
    app.add_api_route("/v1/models/{name:path}", models, dependencies=guarded)
    app.add_api_route("/health", health)
    app.add_api_route("/metrics", metrics)
    return app


def make_server(engine: LtuEngine, args: argparse.Namespace) -> uvicorn.Server:
    # Tracebacks end with messages, which may quote a request; where it happened is logged without.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not record.exc_info)
    settings = {
        "http": "h11",
        "access_log": False,
        "timeout_graceful_shutdown": args.shutdown_seconds,
    }
    return uvicorn.Server(
        uvicorn.Config(create_app(Service(engine, args)), args.host, args.port, **settings)
    )
