"""Parses bodies of chat completion requests into requests for the engine.

A body is accepted only if each of its fields is supported or changes no answer. Everything else
raises an error in OpenAI's form. A clip comes as base64 in the body; nothing that a body names is
opened.
"""

import argparse
import asyncio
import base64
import json
import random
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from ltu.data.audio import decode_audio
from ltu.inference.generation_flags import read_decoding_flags
from ltu.inference.requests import MODES, Answer, Request
from ltu.inference.sampling import check_decoding
from ltu.models.prompt_template import read_conversation

NUMBER = (int, float)
# Supported fields and their types.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "messages": list,
    "stream": bool,
    "stream_options": dict,
    "max_tokens": int,
    "max_completion_tokens": int,
    "seed": int,
    "stop": (str, list),
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": int,
    "repetition_penalty": NUMBER,
    "transcript": str,
    "mode": str,
    "num_chunks": (int, str),
}
# Fields of OpenAI's API that change no answer, whatever their value.
IGNORED_FIELDS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "verbosity",
    "prediction",
}
# Fields of OpenAI's API that change no answer if they have this value.
NEUTRAL_VALUES = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "modalities": ["text"],
    "response_format": {"type": "text"},
}
SAMPLING_FIELDS = ("temperature", "top_p", "top_k")
DECODING_FIELDS = (*SAMPLING_FIELDS, "repetition_penalty")
AUDIO_FORMATS = ("wav", "mp3", "flac")
ROLES = ("system", "user", "assistant")
MAX_STOP_SEQUENCES = 4
DEFAULT_MAX_TOKENS = 400
MESSAGE_FORMAT = (
    'A message is {"role": system, user or assistant, "content"}, where content is a text or a '
    'list of parts {"type": "text", "text"} and {"type": "input_audio", "input_audio": '
    '{"data": base64, "format": wav, mp3 or flac}}'
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
        detail = {"message": message, "type": kind, "param": param, "code": code}
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
            ApiError.
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

    def push(self, event: str | Answer | ApiError) -> None:
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
        """Parse the body of a request and decode its clip. This takes too long for an event loop.

        Raises:
            ApiError, AudioError, ValueError, RecursionError: the body or its clip is refused.
        """
        fields = parse_fields(data)
        if fields["model"] != self.name:
            raise model_not_found(self.name)
        messages = self._parse_conversation(fields)
        *history, question = messages
        mode, num_chunks = self._parse_audio_settings(fields)
        stop = parse_stop_sequences(fields)
        request = Request(
            question["content"],
            transcript=fields.get("transcript"),
            mode=mode,
            num_chunks=num_chunks,
            history=history,
            decoding=self._parse_decoding(fields),
            seed=fields.get("seed", self.seeds.getrandbits(31)),
        )
        # Decode the clip here, so that a clip that cannot be decoded does not wait for the engine.
        clips = [message["audio"] for message in messages if message.get("audio") is not None]
        if clips:
            request.audio = decode_audio(clips[0], max_seconds=self.args.max_seconds)
        includes_usage = fields.get("stream_options", {}).get("include_usage") is True
        return PendingRequest(request, stop, fields.get("stream", False), includes_usage)

    def _parse_conversation(self, fields: dict[str, Any]) -> list[dict]:
        """Return the messages, the user's question last, with the transcript in that one."""
        messages = read_conversation(
            parse_messages(fields["messages"]), self.processor.prompt_template
        )
        messages[-1]["transcript"] = fields.get("transcript")
        prompt = self.processor.render(messages).prompt
        if len(prompt.encode()) > self.args.max_characters:
            raise ApiError(400, "The messages are too long.", "messages", "context_length_exceeded")
        return messages

    def _parse_audio_settings(self, fields: dict[str, Any]) -> tuple[str, int]:
        """Return the mode and the number of chunks, 0 for the whole clip."""
        mode = fields.get("mode", self.args.mode)
        num_chunks = fields.get("num_chunks", self.args.num_chunks)
        if num_chunks == "all":
            num_chunks = 0
        if mode not in MODES or not isinstance(num_chunks, int) or num_chunks < 0:
            raise ValueError(
                f"mode is one of {', '.join(MODES)}; num_chunks is a whole number, or 'all'."
            )
        return mode, num_chunks

    def _parse_decoding(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the decoding settings: those of the flags, overridden by those of the request.

        Raises:
            ValueError: a value is impossible or above a limit of the server.
        """
        limit = self.args.max_tokens
        settings = {"max_new_tokens": min(DEFAULT_MAX_TOKENS, limit)} | self.decoding
        settings |= {name: fields[name] for name in DECODING_FIELDS if name in fields}
        for name in ("max_tokens", "max_completion_tokens"):
            settings["max_new_tokens"] = fields.get(name, settings["max_new_tokens"])
        if settings["max_new_tokens"] > limit:
            raise ValueError(
                f"At most {limit} tokens can be generated here, not {settings['max_new_tokens']}."
            )
        settings["do_sample"] = settings.get("temperature", 0) != 0
        if not settings["do_sample"]:
            for name in SAMPLING_FIELDS:
                settings.pop(name, None)
        return check_decoding(settings)


def parse_fields(data: bytearray) -> dict[str, Any]:
    """Parse a body as JSON and return its supported fields, which have the right types.

    Fields that change no answer and fields that are null are left out. "model" and "messages" are
    always there.

    Raises:
        ValueError: the body is not a JSON object.
        ApiError: a field is not supported or has the wrong type.
    """
    body = json.loads(data.decode("utf-8"))
    if not isinstance(body, dict):
        raise ValueError("The body is not a JSON object.")
    fields: dict[str, Any] = {"model": "", "messages": []}
    for name, value in body.items():
        is_neutral = name in NEUTRAL_VALUES and value == NEUTRAL_VALUES[name]
        if value is None or name in IGNORED_FIELDS or is_neutral:
            continue
        if name not in FIELDS:
            shown = name[:80]
            raise ApiError(400, f"{shown!r} is not supported here.", shown, "unsupported_parameter")
        # In Python a bool is an int, but in JSON it is not a number.
        is_wrong_bool = isinstance(value, bool) and FIELDS[name] is not bool
        if is_wrong_bool or not isinstance(value, FIELDS[name]):
            raise ApiError(400, f"The type of {name} is wrong.", name, "invalid_type")
        fields[name] = value
    return fields


def parse_stop_sequences(fields: dict[str, Any]) -> list[str]:
    """Return the stop sequences of a request. Raises ValueError."""
    stop = fields.get("stop", [])
    if isinstance(stop, str):
        stop = [stop]
    are_texts = all(isinstance(sequence, str) and sequence for sequence in stop)
    if len(stop) > MAX_STOP_SEQUENCES or not are_texts:
        raise ValueError(f"stop is a text, or a list of at most {MAX_STOP_SEQUENCES} texts.")
    return stop


def parse_messages(messages: list) -> list[dict]:
    """Convert messages from OpenAI's form into the form that `read_conversation` takes.

    Raises:
        ApiError: a message has another form.
    """
    converted = []
    try:
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if message["role"] not in ROLES or message.get("tool_calls"):
                raise ValueError("another role, or calls of tools")
            converted_parts = [convert_part(**part) for part in parts]
            converted.append({"role": message["role"], "content": converted_parts})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error)[:99]
        text = f"{MESSAGE_FORMAT}; this is not one ({reason})."
        raise ApiError(400, text, "messages", "invalid_message") from error
    return converted


def convert_part(type: str, text: str = "", input_audio: dict | None = None) -> dict[str, Any]:
    """Convert a part of a message; the parameters are the keys that a part can have."""
    if type == "text" and isinstance(text, str):
        return {"type": "text", "text": text}
    if type != "input_audio" or input_audio["format"] not in AUDIO_FORMATS:
        raise ValueError("another type, or format")
    return {"type": "audio", "audio": base64.b64decode(input_audio["data"], validate=True)}
