"""Serves a model through the chat completions API of OpenAI.

The event loop receives bodies and sends replies. Some threads parse bodies, others decode clips,
and the thread of the scheduler runs the model. A client that disconnects cancels its request, also
while its clip is decoded, and so does the timeout, which begins when the request is complete. An
error is logged without its message, which may quote a request.
"""

import argparse
import asyncio
import hmac
import json
import logging
import os
import socket
import time
import traceback
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ltu.data.audio import AudioError
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import BUSY, FAILED, Answer
from ltu.serving.batch_scheduler import BatchScheduler, BatchSettings, Metrics, log_without_message
from ltu.serving.clip_decoder import ClipDecoder, RequestIsOver
from ltu.serving.concurrent_scheduler import ConcurrentScheduler
from ltu.serving.connection_limits import (
    KEEP_ALIVE_SECONDS,
    ConnectionLimits,
    LimitedConnection,
    OpenConnections,
)
from ltu.serving.listener import BACKLOG, format_address
from ltu.serving.protocol import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ChunkChoice,
    Delta,
    ErrorReply,
    LtuFields,
    ModelCard,
    ModelList,
    Usage,
)
from ltu.serving.request_parser import ApiError, PendingRequest, RequestParser, model_not_found

PARSER_THREADS = 2
SCHEDULER_SECONDS = 10  # seconds that the scheduler gets to end when the server stops
KEY_VARIABLE = "LTU_API_KEY"  # the environment variable of the API key


class Service:
    """The state that the routes share: the parser, the queue in front of the model, its limits.

    Args:
        engine: generates the answers.
        args: the flags of `ltu.serve`.
    """

    def __init__(self, engine: LtuEngine, args: argparse.Namespace):
        self.args = args
        self.engine = engine
        self.name = args.name or Path(args.model).resolve().name
        self.key = api_key()
        self.parser = RequestParser(engine.processor, args, self.name)
        self.metrics = Metrics()
        settings = BatchSettings(
            max_batch=args.max_batch,
            max_wait=args.max_wait_ms / 1000,
            tokens_per_turn=args.tokens_per_turn,
            max_paused_bytes=int(args.paused_cache_mb * 2**20),
        )
        scheduler_class = ConcurrentScheduler if engine.is_concurrent else BatchScheduler
        self.scheduler = scheduler_class(engine, self.metrics, settings, self.count_arriving)
        # Behind a reverse proxy, which the second flag is for, all clients are one.
        is_fair = args.max_connections_per_client > 0
        self.decoder = ClipDecoder(self.parser, args.max_seconds, is_fair)
        self.parser_threads = ThreadPoolExecutor(PARSER_THREADS, "parsers")
        self.num_parsing = 0  # requests that are parsed; their bodies have arrived
        self.num_decoding = 0  # requests whose clips are decoded
        # Each request whose clip is decoded, or which is in the queue or on the model, with the
        # task that watches its connection.
        self.pending_requests: dict[PendingRequest, asyncio.Task] = {}

    async def check_key(self, http: HttpRequest) -> None:
        """Raise an ApiError unless the request has the API key, if there is one."""
        given = http.headers.get("authorization", "").encode("latin-1")
        if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise ApiError(
                401, "Wrong API key.", None, "invalid_api_key", www_authenticate="Bearer"
            )

    async def chat(self, http: HttpRequest) -> ChatCompletion | StreamingResponse:
        """Answer a chat completion request."""
        self._check_queue()
        data = await self._receive_in_time(http)
        # Only requests that have arrived count: slow clients keep nobody out.
        self._check_queue()
        loop = asyncio.get_running_loop()
        start = loop.time()
        pending = await self._parse(data)
        pending.loop = loop
        decoding = loop.create_task(self.decoder.decode(pending, http.scope["state"]["client"]))
        self.num_decoding += 1
        decoding.add_done_callback(partial(self._put_in_queue, pending))
        watch = loop.create_task(self._watch(pending, http, decoding, start))
        self.pending_requests[pending] = watch
        # The first event decides about the status code, also of a stream.
        try:
            event = await next_event(pending)
        except AudioError as error:
            self.metrics.answers.labels(error.reason).inc()
            raise ApiError(400, str(error), "messages", error.reason) from error
        self.metrics.requests.labels(200).inc()
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.name,
        }
        if pending.streams:
            events = stream_events(pending, event, head)
            return StreamingResponse(events, media_type="text/event-stream")
        return completion(pending, event, head)

    def _check_queue(self) -> None:
        """Raise an ApiError if as many requests are in progress as there may be."""
        if self.num_parsing + len(self.pending_requests) >= self.args.max_queue:
            message = f"{self.args.max_queue} requests are already in progress."
            raise ApiError(429, message, None, "busy", retry_after="1")

    async def _receive_in_time(self, http: HttpRequest) -> bytearray:
        """Receive a body before the deadline of its connection. Raises ApiError."""
        seconds_left = http.scope["state"]["receive_deadline"] - asyncio.get_running_loop().time()
        try:
            return await asyncio.wait_for(self._receive(http), seconds_left)
        except (asyncio.TimeoutError, ClientDisconnect) as error:
            raise ApiError(408, "The body did not arrive.") from error

    async def _parse(self, data: bytearray) -> PendingRequest:
        """Parse a body in another thread. Raises ApiError."""
        loop = asyncio.get_running_loop()
        self.num_parsing += 1
        try:
            parsing = loop.run_in_executor(self.parser_threads, self._parse_supported, data)
            return await asyncio.wait_for(parsing, self.args.timeout)
        except asyncio.TimeoutError as error:
            raise too_late() from error
        except (ValueError, RecursionError) as error:
            raise ApiError(400, str(error)) from error
        finally:
            self.num_parsing -= 1

    def _parse_supported(self, data: bytearray) -> PendingRequest:
        """Parse a body; a setting that the engine does not have is refused like a wrong one."""
        pending = self.parser.parse(data)
        self.engine.check_supported(pending.request.decoding)
        return pending

    def _put_in_queue(self, pending: PendingRequest, decoding: asyncio.Task) -> None:
        """Put a request into the queue of the model when its clip is decoded, or push the error."""
        if is_cancelled(decoding):
            self.metrics.answers.labels("cancelled").inc()
        elif decoding.exception() is not None:
            pending.push(decoding.exception())
        else:
            self.scheduler.pending_requests.put(pending)
        self.num_decoding -= 1

    def count_arriving(self) -> int:
        """Return the number of requests that have arrived and are not in the queue yet."""
        return self.num_parsing + self.num_decoding

    async def _receive(self, http: HttpRequest) -> bytearray:
        """Receive a body. Raises ApiError as soon as it is larger than the limit."""
        content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Without a permission, a web page can send bodies of some other types, but not JSON.
        if content_type != "application/json":
            raise ApiError(415, "The body must be application/json.")
        self._check_body_size(int(http.headers.get("content-length", 0)))
        data = bytearray()
        async for part in http.stream():
            data += part
            self._check_body_size(len(data))
        return data

    def _check_body_size(self, size: int) -> None:
        if size > self.args.max_body_mb * 2**20:
            message = f"The body has over {self.args.max_body_mb:g} MiB."
            raise ApiError(413, message, None, "body_too_large")

    async def _watch(
        self, pending: PendingRequest, http: HttpRequest, decoding: asyncio.Task, start: float
    ) -> None:
        """Cancel a request at its timeout, and when its response or its connection has ended.

        Args:
            pending: the request.
            http: its HTTP request.
            decoding: decodes its clip.
            start: time of the event loop at which it was complete.
        """
        deadline = start + self.args.timeout
        timer = pending.loop.call_at(deadline, pending.fail, too_late())
        while (await http.receive())["type"] != "http.disconnect":
            pass
        timer.cancel()
        pending.fail(ApiError(499, "The client disconnected."))
        del self.pending_requests[pending]
        was_in_queue = decoding.done() and not decoding.cancelled() and not decoding.exception()
        if was_in_queue:
            self.metrics.latency.observe(pending.loop.time() - start)
        # A clip that waits for its turn does so no longer.
        decoding.cancel()


def api_key() -> str:
    """Return the API key of the environment; "" if there is none."""
    return os.environ.get(KEY_VARIABLE, "")


def too_late() -> ApiError:
    """Return the error of a request that takes longer than the timeout."""
    return ApiError(504, "This took too long.", None, "timeout", x_should_retry="false")


def is_cancelled(decoding: asyncio.Task) -> bool:
    """Return whether a clip was not decoded because its request is over."""
    return decoding.cancelled() or isinstance(decoding.exception(), RequestIsOver)


async def next_event(pending: PendingRequest) -> str | Answer:
    """Wait for the next piece of text or the answer.

    Raises:
        Exception: that of `pending`; an ApiError if there is no answer.
    """
    event = await pending.events.get()
    if isinstance(event, Exception):
        raise event
    if isinstance(event, Answer) and not event.answered:
        raise refuse_answer(event)
    return event


def refuse_answer(answer: Answer) -> ApiError:
    """Return the error for a request without an answer: its clip's, or that of what generates.

    The reason of the latter has the address of another server, so it is in the log only.
    """
    if answer.status not in (BUSY, FAILED):
        return ApiError(400, answer.error, "messages", answer.status)
    logging.getLogger(__name__).error("%s", answer.error)
    if answer.status == BUSY:
        message = "The model's server is busy."
        return ApiError(503, message, None, answer.status, retry_after="1")
    message = "The model's server failed; the log of this one has the reason."
    return ApiError(502, message, None, answer.status)


async def stream_events(
    pending: PendingRequest, event: str | Answer, head: dict
) -> AsyncIterator[str]:
    """Yield the reply as server-sent events.

    Args:
        pending: the request.
        event: its first event.
        head: the keys that all chunks of the reply share.
    """

    def chunk(delta: dict[str, str], finish_reason: str | None = None, **extras: Any) -> str:
        choice = ChunkChoice(
            index=0, delta=Delta(**delta), logprobs=None, finish_reason=finish_reason
        )
        return server_event(ChatCompletionChunk(**head, choices=[choice], **extras))

    head = head | {"object": "chat.completion.chunk"}
    yield chunk({"role": "assistant", "content": ""})
    try:
        while isinstance(event, str):
            yield chunk({"content": event})
            event = await next_event(pending)
    except ApiError as error:
        drop_locals(error)
        # The status code was sent long ago.
        yield server_event(ErrorReply(error=error.detail))
        return
    ltu = ltu_fields(pending, event)
    yield chunk({}, event.finish_reason, ltu=ltu)
    if pending.includes_usage:
        usage = count_tokens(event)
        yield server_event(ChatCompletionChunk(**head, choices=[], usage=usage, ltu=ltu))
    yield "data: [DONE]\n\n"


def drop_locals(error: BaseException | None) -> None:
    """Clear the local variables of the functions that an error went through.

    Some of them refer to the error itself. Then the body and the clip of a request that failed
    would stay in memory until Python looks for such circles, which it does seldom.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def server_event(content: ChatCompletionChunk | ErrorReply) -> str:
    """Return a server-sent event; fields that were not set are left out."""
    return f"data: {content.model_dump_json(exclude_unset=True)}\n\n"


def completion(pending: PendingRequest, answer: Answer, head: dict) -> ChatCompletion:
    """Return the body of a reply that is not streamed; `head` is the beginning of each reply."""
    message = AnswerMessage(content=answer.text)
    choice = Choice(message=message, finish_reason=answer.finish_reason)
    ltu = ltu_fields(pending, answer)
    return ChatCompletion(**head, choices=[choice], usage=count_tokens(answer), ltu=ltu)


def count_tokens(answer: Answer) -> Usage:
    """Return the numbers of tokens of a prompt and its answer."""
    return Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.new_tokens,
        total_tokens=answer.prompt_tokens + answer.new_tokens,
    )


def ltu_fields(pending: PendingRequest, answer: Answer) -> LtuFields:
    """Return the fields of a reply that OpenAI's API does not have."""
    return LtuFields(**asdict(answer), seed=pending.request.seed)


def create_app(service: Service) -> FastAPI:
    """Return the app: chat completions and models, which need the key, /health and /metrics."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        # Cancel what still runs when the server stops, then end the thread.
        for pending in service.pending_requests:
            pending.is_over = True
        service.scheduler.pending_requests.put(None)
        service.scheduler.join(SCHEDULER_SECONDS)

    async def reply_with_error(http: HttpRequest, error: Exception) -> Response:
        if isinstance(error, ApiError):
            api_error = error
        elif isinstance(error, HTTPException):
            api_error = ApiError(error.status_code, error.detail)
        else:
            log_without_message(error)
            message = "The server failed on this request."
            api_error = ApiError(500, message, None, "internal_error")
        drop_locals(error)
        service.metrics.requests.labels(api_error.status_code).inc()
        # In ASCII, because it may quote characters that cannot be encoded as UTF-8.
        body = json.dumps({"error": api_error.detail})
        return Response(body, api_error.status_code, api_error.headers, "application/json")

    model_card = ModelCard(id=service.name, created=int(time.time()))

    async def list_models() -> ModelList:
        return ModelList(data=[model_card])

    async def get_model(name: str) -> ModelCard:
        if name != service.name:
            raise model_not_found(service.name)
        return model_card

    async def health() -> dict:
        if not service.scheduler.is_alive():
            message = "The thread that runs the model has ended; restart the server."
            raise ApiError(503, message, None, "internal_error")
        return {"status": "ok", "model": service.name}

    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    handlers = dict.fromkeys((HTTPException, Exception), reply_with_error)
    app = FastAPI(
        title="LTU",
        description="Answers questions about audio clips through OpenAI's chat completions API.",
        lifespan=lifespan,
        exception_handlers=handlers,
        responses={"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}},
    )
    # HTTPBearer only documents the key, which `check_key` checks.
    needs_key = [Depends(HTTPBearer(auto_error=False)), Depends(service.check_key)]
    app.add_api_route(
        "/v1/chat/completions",
        service.chat,
        methods=["POST"],
        response_model=ChatCompletion,
        dependencies=needs_key,
        openapi_extra={"requestBody": {"content": {"application/json": {}}, "required": True}},
    )
    app.add_api_route("/v1/models", list_models, dependencies=needs_key)
    # With a slash, as some clients send it, it would be a model without a name.
    app.add_api_route("/v1/models/", list_models, dependencies=needs_key, include_in_schema=False)
    app.add_api_route("/v1/models/{name:path}", get_model, dependencies=needs_key)
    app.add_api_route("/health", health)
    app.add_api_route("/metrics", metrics, response_class=PlainTextResponse)
    document_request(app)
    return app


def document_request(app: FastAPI) -> None:
    """Add the model of a request to the documentation.

    FastAPI does not know it, because `Service` receives and parses bodies itself, within limits of
    size and time.
    """
    schema = ChatCompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    document = app.openapi()
    document["components"]["schemas"] |= schema.pop("$defs")
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    body["content"]["application/json"]["schema"] = schema


class Server(uvicorn.Server):
    """uvicorn's server on sockets that are open already."""

    async def startup(self, sockets: list[socket.socket]) -> None:
        await super().startup(sockets=sockets)
        # asyncio uses one number for the connections that it accepts at a time and for those that
        # the system holds until then; only the former must be small.
        for listener in sockets:
            listener.listen(BACKLOG)
        address = format_address(*sockets[0].getsockname()[:2])
        message = "Uvicorn running on http://%s (Press CTRL+C to quit)"
        logging.getLogger("uvicorn.error").info(message, address)


def make_server(
    engine: LtuEngine, args: argparse.Namespace, limits: ConnectionLimits
) -> uvicorn.Server:
    """Return a server for an engine, to be run with its sockets: `run(sockets=...)`.

    Args:
        engine: generates the answers.
        args: the flags of `ltu.serve`.
        limits: of its connections.
    """
    # uvicorn logs an exception with its message, which may quote a request. `reply_with_error` has
    # logged where it was raised.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not record.exc_info)
    service = Service(engine, args)
    open_connections = OpenConnections(limits, service.metrics)
    config = uvicorn.Config(
        create_app(service),
        http=partial(LimitedConnection, open_connections=open_connections),
        # A WebSocket would be beyond the limits.
        ws="none",
        backlog=limits.accepted_at_once,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        # By default uvicorn takes the address of a client from a header if the peer is local.
        proxy_headers=False,
        access_log=False,
        timeout_graceful_shutdown=args.shutdown_seconds,
    )
    return Server(config)
