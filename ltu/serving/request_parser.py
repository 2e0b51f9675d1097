"""Parses bodies of chat completion requests into requests for the engine.

A body is accepted only if each of its top-level fields is supported or changes no answer.
Everything else raises an error in OpenAI's form. A clip comes as base64 in the body; nothing that a
body names is opened.
"""

import argparse
import asyncio
import base64
import random
import reprlib
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ltu.inference.generation_flags import read_decoding_flags
from ltu.inference.requests import Answer, Request
from ltu.inference.sampling import check_decoding
from ltu.models.prompt_template import read_conversation
from ltu.serving.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    ErrorDetail,
    TextPart,
    UnsupportedFields,
)

SAMPLING_FIELDS = ("temperature", "top_p", "top_k")
DECODING_FIELDS = (*SAMPLING_FIELDS, "repetition_penalty")
DEFAULT_MAX_TOKENS = 400
MAX_CHARACTERS = 200  # of a name or a value of a request that an error quotes
MESSAGE_FORMAT = (
    'A message is {"role": system, user or assistant, "content"}, where content is a text or a '
    'list of parts {"type": "text", "text"} and {"type": "input_audio", "input_audio": '
    '{"data": base64, "format": wav, mp3 or flac}}.'
)


class ApiError(HTTPException):
    """An error reply in OpenAI's form.

    Args:
        status: HTTP status code.
        message: text for the client.
        param: the field of the request that caused the error.
        code: the error's code for programs.
        headers: HTTP headers of the reply; an underscore in a name stands for a hyphen.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        **headers: str,
    ):
        if status >= 500:
            kind = "server_error"
        elif status == 429:
            kind = "rate_limit_error"
        else:
            kind = "invalid_request_error"
        detail = ErrorDetail(message=message, type=kind, param=param, code=code).model_dump()
        http_headers = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(status, detail, http_headers)


def model_not_found(name: str) -> ApiError:
    """Return the error for a model other than the one that is served, `name`."""
    return ApiError(404, f"There is one model here: {name!r}.", "model", "model_not_found")


@dataclass(eq=False)
class PendingRequest:
    """A request whose answer is not complete.

    Attributes:
        request: the request for the engine.
        stop: sequences that end the answer.
        streams: the client receives the answer piece by piece.
        includes_usage: a stream ends with a chunk that has the numbers of tokens.
        loop: the event loop of the server, which owns `events`.
        events: receives pieces of the text if the request streams, and at last the answer or an
            error.
        shown: the text so far, up to a stop sequence.
        is_over: no client waits for the answer any more.
    """

    request: Request
    stop: list[str]
    streams: bool
    includes_usage: bool
    loop: asyncio.AbstractEventLoop | None = None
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    shown: str = ""
    is_over: bool = False

    def push(self, event: str | Answer | Exception) -> None:
        """Add an event to `events`. Can be called from any thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def fail(self, error: ApiError) -> None:
        """Cancel the request, whether it waits or runs."""
        self.is_over = True
        self.push(error)

    def show(self, text: str, is_whole: bool = False) -> bool:
        """Push what a text adds to `shown`, up to the first stop sequence.

        Until the text is whole, its end is held back, because it may be the beginning of a stop
        sequence.

        Args:
            text: the answer so far.
            is_whole: the answer is complete.

        Returns:
            whether the text contains a stop sequence.
        """
        stop_positions = [text.find(sequence) for sequence in self.stop if sequence in text]
        if stop_positions:
            end = min(stop_positions)
        elif is_whole:
            end = max(len(self.shown), len(text))
        else:
            num_held_back = max(map(len, self.stop), default=1) - 1
            end = max(len(self.shown), len(text) - num_held_back)
        text = text[:end]
        if self.streams and len(text) > len(self.shown):
            self.push(text[len(self.shown) :])
        self.shown = text
        return bool(stop_positions)


class RequestParser:
    """Parses bodies of requests, within the limits of the server.

    Args:
        processor: of the model.
        args: the flags of `ltu.serve`.
        name: the model's name, which each request must give.
    """

    def __init__(self, processor: Any, args: argparse.Namespace, name: str):
        self.processor = processor
        self.args = args
        self.name = name
        self.decoding = read_decoding_flags(args)
        self.seeds = random.Random(args.seed)

    def parse(self, data: bytearray) -> PendingRequest:
        """Parse the body of a request. This takes too long for an event loop.

        Returns:
            a request whose clip is not decoded: the bytes of a file, or None.

        Raises:
            ApiError, ValueError, RecursionError: the body is refused.
        """
        try:
            body = ChatCompletionRequest.model_validate_json(data)
        except ValidationError as error:
            raise describe_validation_error(error) from error
        if body.model != self.name:
            raise model_not_found(self.name)
        messages = self._parse_conversation(body)
        *history, question = messages
        settings = {
            "mode": self.args.mode,
            "num_chunks": self.args.num_chunks,
            "seed": self.seeds.getrandbits(31),
        }
        settings |= body.model_dump(include=set(settings), exclude_none=True)
        request = Request(
            question["content"],
            transcript=body.transcript,
            history=history,
            decoding=self._parse_decoding(body),
            **settings,
        )
        clips = [message["audio"] for message in messages if message.get("audio") is not None]
        if clips:
            request.audio = clips[0]
        return PendingRequest(request, body.stop, body.stream, body.stream_options.include_usage)

    def _parse_conversation(self, body: ChatCompletionRequest) -> list[dict]:
        """Return the messages, the user's question last, with the transcript in that one."""
        template = self.processor.prompt_template
        messages = read_conversation(convert_messages(body.messages), template)
        messages[-1]["transcript"] = body.transcript
        prompt = self.processor.render(messages).prompt
        if len(prompt) > self.args.max_characters:
            raise ApiError(400, "The messages are too long.", "messages", "context_length_exceeded")
        return messages

    def _parse_decoding(self, body: ChatCompletionRequest) -> dict[str, Any]:
        """Return the decoding settings: those of the flags, overridden by those of the request.

        Raises:
            ValueError: a value is impossible or above a limit of the server.
        """
        limit = self.args.max_tokens
        settings = {"max_new_tokens": min(DEFAULT_MAX_TOKENS, limit)} | self.decoding
        settings |= body.model_dump(include=set(DECODING_FIELDS), exclude_none=True)
        demanded = body.max_completion_tokens or body.max_tokens
        if demanded is not None:
            settings["max_new_tokens"] = demanded
        if settings["max_new_tokens"] > limit:
            raise ValueError(
                f"At most {limit} tokens can be generated here, not {settings['max_new_tokens']}."
            )
        settings["do_sample"] = settings.get("temperature", 0) != 0
        if not settings["do_sample"]:
            for name in SAMPLING_FIELDS:
                settings.pop(name, None)
        return check_decoding(settings)


def describe_validation_error(error: ValidationError) -> ApiError:
    """Return an error about the first field that is wrong."""
    details = error.errors(include_url=False)[0]
    kind = details["type"]
    reason = details["msg"][:MAX_CHARACTERS]
    location = [str(key)[:MAX_CHARACTERS] for key in details["loc"]]
    if not location:
        return ApiError(400, f"The body is not the JSON object of a request: {reason}.")
    param = location[0]
    path = ".".join(location)

    if kind == "missing":
        message = f"{path} is missing."
    elif kind == "extra_forbidden":
        message = f"{path!r} is not supported here."
    else:
        message = f"{path} is {reprlib.repr(details['input'])}: {reason}."

    if len(location) == 1 and kind == "extra_forbidden" or param in UnsupportedFields.model_fields:
        code = "unsupported_parameter"
    elif param == "messages" and len(location) > 1:
        code = "invalid_message"
        message = f"{message} {MESSAGE_FORMAT}"
    elif kind.endswith("_type"):
        code = "invalid_type"
    else:
        code = "invalid_value"
    return ApiError(400, message, param, code)


def convert_messages(messages: list[ChatMessage]) -> list[dict]:
    """Convert messages into the form that `read_conversation` takes.

    Raises:
        ApiError: a clip is not in base64.
    """
    converted = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message.content:
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
            else:
                parts.append({"type": "audio", "audio": decode_base64(part.input_audio.data)})
        converted.append({"role": message.role, "content": parts})
    return converted


def decode_base64(data: str) -> bytes:
    """Return the bytes of a clip. Raises ApiError if they are not in base64."""
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        text = f"The data of input_audio is not in base64: {error}."
        raise ApiError(400, text, "messages", "invalid_message") from error
