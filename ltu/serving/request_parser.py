"""Parses bodies of chat completion requests into requests for the engine.

A body is accepted only if each of its top-level fields is supported or changes no answer.
Everything else raises an error in OpenAI's form, in the terms of JSON. A clip comes as base64 in
the body; nothing that a body names is opened.
"""

import argparse
import asyncio
import base64
import random
import re
import reprlib
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue, ValidationError
from starlette.exceptions import HTTPException

from ltu.data.audio import OnBlock, decode_audio
from ltu.inference.generation_flags import read_decoding_flags
from ltu.inference.requests import Answer, Request
from ltu.inference.sampling import check_decoding
from ltu.models.prompt_template import read_conversation
from ltu.serving.protocol import (
    AudioPart,
    ChatCompletionRequest,
    ChatMessage,
    ErrorDetail,
    MessagePart,
    RefusalPart,
    TextPart,
    UnsupportedFields,
)

SAMPLING_FIELDS = ("temperature", "top_p", "top_k")
DECODING_FIELDS = (*SAMPLING_FIELDS, "repetition_penalty")
DEFAULT_MAX_TOKENS = 400
MAX_CHARACTERS = 200  # of a name or a value of a request that an error quotes
MESSAGE_FORMAT = (
    'A message is {"role": system, developer, user or assistant, "content"}, where content is a '
    'text or a list of parts {"type": "text", "text"} and {"type": "input_audio", "input_audio": '
    '{"data": base64, "format": wav, mp3, flac or ogg}}.'
)
# A URL that contains its data; RFC 2397. The type of the data is not used: the file says it.
DATA_URL = re.compile(r"\s*data:[^,]{0,200};\s*base64\s*,", re.IGNORECASE)
ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]{0,20}:", re.IGNORECASE)
WHITE_SPACE = b" \t\r\n\f\v"
# The alphabet of URLs and file names (RFC 4648, section 5) to the standard one.
STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
# The characters of base64 and the white space that clients escape in URLs.
ESCAPES = {b"%%%02X" % code: bytes([code]) for code in b"+/=-_ \t\r\n"}
# What separates or contains values in JSON, and how many of them a body may have in addition to
# those in its texts.
SEPARATORS = b",[{"
MAX_SEPARATORS = 10_000
# Reasons for an error of pydantic's, by its type, where pydantic's own words are those of Python.
# The fields in braces are those of its `ctx`.
REASONS = {
    "missing": "it is missing",
    "union_tag_not_found": "it has no type",
    "string_too_short": "it must not be empty",
    "too_long": "it may have at most {max_length}",
    "too_short": "it must have at least {min_length}",
    "literal_error": "it must be {expected}",
    "value_error": "{error}",
}


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
        encoded_clip: the file of the request's clip, until it is decoded.
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
    encoded_clip: bytes | None = None
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
        # A request that is retried or continues begins with less text than was shown.
        if len(text) < len(self.shown):
            return False
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
        """Parse the body of a request, whose clip `decode` decodes. Too slow for an event loop.

        Raises:
            ApiError, ValueError, RecursionError: the body is refused.
        """
        self._check_separators(data)
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
        pending = PendingRequest(request, body.stop, body.stream, body.stream_options.include_usage)
        clips = [message["audio"] for message in messages if message.get("audio") is not None]
        if clips:
            pending.encoded_clip = clips[0]
        return pending

    def decode(self, pending: PendingRequest, on_block: OnBlock | None = None) -> None:
        """Decode the clip of a request, so that a bad clip does not wait for the engine.

        Args:
            pending: the request; without a clip nothing happens.
            on_block: called after each block; what it raises ends decoding.

        Raises:
            AudioError: the clip cannot be decoded, or is longer than --max_seconds.
        """
        if pending.encoded_clip is None:
            return
        clip = pending.encoded_clip
        pending.request.audio = decode_audio(
            clip, self.args.max_seconds, on_block, self.processor.front_end.downmix
        )
        pending.encoded_clip = None

    def _check_separators(self, data: bytearray) -> None:
        """Refuse a body with more values than a conversation has, before it is parsed.

        Millions of values take gigabytes, and seconds in which nothing else runs. Base64 has no
        separators, and texts have at most one for each of their characters.
        """
        limit = self.args.max_characters + MAX_SEPARATORS
        num_separators = sum(data.count(separator) for separator in SEPARATORS)
        if num_separators > limit:
            raise ApiError(
                400,
                f"The body has {num_separators:,} commas, lists and objects. At most {limit:,} are "
                "possible here.",
                None,
                "invalid_value",
            )

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
    location = [str(key)[:MAX_CHARACTERS] for key in details["loc"]]
    if not location:
        return ApiError(
            400, f"The body is not the JSON object of a request: {describe_reason(details)}."
        )
    param = location[0]
    if param == "messages":
        # The type of a part, in ("messages", 0, "content", 0, type, ...), is no key.
        del location[4:5]
    path = ".".join(location)
    is_unsupported = param in UnsupportedFields.model_fields

    if kind == "extra_forbidden":
        message = f"{path!r} is not supported here."
    elif kind == "missing":
        message = f"{path} is missing."
    elif is_unsupported:
        possible = UnsupportedFields().model_dump_json(include={param})
        message = f"{path} is {show(details['input'])}. Only {possible} is supported here."
    elif details.get("ctx", {}).get("max_length") == 0:
        message = f"{path} is not supported here."
    else:
        message = f"{path} is {show(details['input'])}: {describe_reason(details)}."

    if is_unsupported or len(location) == 1 and kind == "extra_forbidden":
        code = "unsupported_parameter"
    elif param == "messages" and len(location) > 1:
        code = "invalid_message"
        message = f"{message} {MESSAGE_FORMAT}"
    elif kind.endswith("_type"):
        code = "invalid_type"
    else:
        code = "invalid_value"
    return ApiError(400, message, param, code)


def describe_reason(details: dict[str, Any]) -> str:
    """Return why pydantic refused a value, without names of our classes."""
    context = details.get("ctx", {})
    if details["type"] == "union_tag_invalid":
        reason = f"its type is {show(details['input']['type'])}, not {context['expected_tags']}"
    elif details["type"] in REASONS:
        reason = REASONS[details["type"]].format(**context)
    else:
        reason = details["msg"]
    return reason[:MAX_CHARACTERS]


def show(value: JsonValue) -> str:
    """Return a value of a body as an error quotes it, in at most a line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return reprlib.repr(value)


def convert_messages(messages: list[ChatMessage]) -> list[dict]:
    """Convert messages into the form that `read_conversation` takes.

    Raises:
        ApiError: a clip is not in base64.
    """
    converted = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        parts = [convert_part(part) for part in message.content]
        converted.append({"role": role, "content": parts})
    return converted


def convert_part(part: MessagePart) -> dict[str, str | bytes]:
    """Convert a part of a message. Raises ApiError if it is a clip that is not in base64."""
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, RefusalPart):
        return {"type": "text", "text": part.refusal}
    if isinstance(part, AudioPart):
        clip = read_clip(part.input_audio.data, "input_audio.data")
    else:
        url = part.audio_url.url
        if not DATA_URL.match(url):
            raise refuse_clip("audio_url", "is no data: URL in base64, and nothing is fetched")
        clip = read_clip(url, "audio_url")
    return {"type": "audio", "audio": clip}


def read_clip(text: str, field_name: str) -> bytes:
    """Return the bytes of a clip.

    Args:
        text: base64 or a `data:` URL in base64. Both alphabets of RFC 4648 are possible, there may
            be white space, and the padding at the end may be missing.
        field_name: the field of the request, for errors.

    Raises:
        ApiError: it is something else.
    """
    data_url = DATA_URL.match(text)
    if data_url:
        text = text[data_url.end() :]
    elif ADDRESS.match(text):
        raise refuse_clip(field_name, "is an address, and nothing is fetched")
    characters = text.encode("ascii", "replace")
    if data_url and b"%" in characters:
        # `urllib.parse.unquote` would make an object of each escape.
        for escape, character in ESCAPES.items():
            characters = characters.replace(escape, character)
            characters = characters.replace(escape.lower(), character)
    characters = characters.translate(STANDARD_ALPHABET, WHITE_SPACE)
    characters = characters.rstrip(b"=")
    characters += b"=" * (-len(characters) % 4)
    try:
        return base64.b64decode(characters, validate=True)
    except ValueError as error:
        raise refuse_clip(field_name, "is not in base64") from error


def refuse_clip(field_name: str, reason: str) -> ApiError:
    """Return the error for a clip that is not in the body."""
    message = f"{field_name} {reason}. Send the bytes of the file in base64."
    return ApiError(400, message, "messages", "invalid_message")
