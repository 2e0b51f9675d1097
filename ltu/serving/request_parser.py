"""Bodies of requests, as OpenAI's clients send them -> jobs for the engine, or an error in OpenAI's form."""

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
FIELDS = {
    "model": str, "messages": list, "stream": bool, "stream_options": dict, "max_tokens": int, "seed": int,
    "max_completion_tokens": int, "stop": (str, list), "temperature": NUMBER, "top_p": NUMBER, "top_k": int,
    "repetition_penalty": NUMBER, "transcript": str, "mode": str, "num_chunks": (int, str),
}  # fmt: skip
# Fields of OpenAI's that change no answer, and those that do not with this value.
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
           "prompt_cache_retention", "reasoning_effort", "verbosity", "prediction"}  # fmt: skip
NEUTRAL = {
    "n": 1, "logprobs": False, "top_logprobs": 0, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {},
    "tools": [], "tool_choice": "none", "modalities": ["text"], "response_format": {"type": "text"},
}  # fmt: skip
SAMPLING = ("temperature", "top_p", "top_k")
MESSAGE = (
    'A message is {"role": system, user or assistant, "content"}, a text, or parts {"type": "text", "text"} and '
    '{"type": "input_audio", "input_audio": {"data": base64, "format": wav, mp3 or flac}}'
)


class ApiError(HTTPException):
    """A request without an answer, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        **headers: str,
    ):
        kind = (
            "server_error"
            if status >= 500
            else "rate_limit_error"
            if status == 429
            else "invalid_request_error"
        )
        error = {"message": message, "type": kind, "param": param, "code": code}
        super().__init__(
            status, error, {name.replace("_", "-"): value for name, value in headers.items()}
        )


@dataclass(eq=False)
class PendingRequest:
    """A request on its way. `events` gets pieces of its text if it streams, and at last its answer or an ApiError."""

    request: Request
    stop: list[str]
    streams: bool
    includes_usage: bool
    loop: asyncio.AbstractEventLoop | None = None
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    shown: str = ""
    is_over: bool = False  # Nobody waits for it any more.

    def push(self, event: str | Answer | ApiError) -> None:
        """From any thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def fail(self, error: ApiError) -> None:
        """Cancel it, whether it waits or runs."""
        self.is_over = True
        self.push(error)

    def show(self, text: str, is_whole: bool = False) -> bool:
        """Push what is new of a text, up to the first stop sequence; whether there is one. What may be the beginning of
        one is held back until the text is whole."""
        places = [text.find(sequence) for sequence in self.stop if sequence in text]
        held = 0 if is_whole else max(map(len, self.stop), default=1) - 1
        text = text[: min(places, default=max(len(self.shown), len(text) - held))]
        if self.streams and len(text) > len(self.shown):
            self.push(text[len(self.shown) :])
        self.shown = text
        return bool(places)


class RequestParser:
    """Makes jobs, within the limits that the flags `args` set for the model `name`."""

    def __init__(self, processor: Any, args: argparse.Namespace, name: str):
        self.processor, self.args, self.name = processor, args, name
        self.decoding, self.seeds = read_decoding_flags(args), random.Random(args.seed)

    def read(self, data: bytearray) -> PendingRequest:
        """Takes time: base64, a sound. Raises ApiError, AudioError, ValueError, RecursionError."""
        fields = read_fields(data)
        if fields["model"] != self.name:
            raise ApiError(
                404, f"There is one model here: {self.name!r}.", "model", "model_not_found"
            )
        messages = read_conversation(
            read_messages(fields["messages"]), self.processor.prompt_template
        )
        messages[-1]["transcript"] = fields.get("transcript")
        if len(self.processor.render(messages).prompt.encode()) > self.args.max_characters:
            raise ApiError(400, "The messages are too long.", "messages", "context_length_exceeded")
        mode = fields.get("mode", self.args.mode)
        num_chunks = (
            0
            if fields.get("num_chunks") == "all"
            else fields.get("num_chunks", self.args.num_chunks)
        )
        if mode not in MODES or not isinstance(num_chunks, int) or num_chunks < 0:
            raise ValueError(
                f"mode is one of {', '.join(MODES)}; num_chunks is a whole number, or 'all'."
            )
        stop = [fields["stop"]] if isinstance(fields.get("stop"), str) else fields.get("stop", [])
        if len(stop) > 4 or not all(text and isinstance(text, str) for text in stop):
            raise ValueError("stop is a text, or at most four.")
        *history, last = messages
        request = Request(
            last["content"], transcript=fields.get("transcript"), mode=mode, num_chunks=num_chunks
        )
        request.history, request.decoding = history, self.decode_as(fields)
        request.seed = fields.get("seed", self.seeds.getrandbits(31))
        request.audio = next(
            (message["audio"] for message in messages if message.get("audio") is not None), None
        )
        if request.audio is not None:  # What cannot be heard need not wait for the engine.
            request.audio = decode_audio(request.audio, max_seconds=self.args.max_seconds)
        usage = fields.get("stream_options", {}).get("include_usage") is True
        return PendingRequest(request, stop, fields.get("stream", False), usage)

    def decode_as(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Settings of the engine: those of the flags, changed by the request's. Raises ValueError."""
        most = self.args.max_tokens
        settings = {"max_new_tokens": min(400, most)} | self.decoding
        settings |= {
            name: fields[name] for name in (*SAMPLING, "repetition_penalty") if name in fields
        }
        for name in ("max_tokens", "max_completion_tokens"):
            settings["max_new_tokens"] = fields.get(name, settings["max_new_tokens"])
        if settings["max_new_tokens"] > most:
            raise ValueError(
                f"At most {most} tokens are given here, not {settings['max_new_tokens']}."
            )
        settings["do_sample"] = settings.get("temperature", 0) != 0
        used = {
            name: value
            for name, value in settings.items()
            if settings["do_sample"] or name not in SAMPLING
        }
        return check_decoding(used)


def read_fields(data: bytearray) -> dict[str, Any]:
    """What is given in a body, of the right types. Raises ValueError."""
    given = json.loads(data.decode("utf-8"))
    if not isinstance(given, dict):
        raise ValueError("The body is not a JSON object.")
    fields: dict[str, Any] = {"model": "", "messages": []}
    for name, value in given.items():
        if value is None or name in IGNORED or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name not in FIELDS:
            raise ApiError(
                400, f"{name[:80]!r} is not supported here.", name[:80], "unsupported_parameter"
            )
        if not isinstance(value, FIELDS[name]) or (
            isinstance(value, bool) and FIELDS[name] is not bool
        ):
            raise ApiError(400, f"{name} has another type than that.", name, "invalid_type")
        fields[name] = value
    return fields


def read_messages(messages: list) -> list[dict]:
    """As `read_conversation` takes them. Raises ApiError."""
    read = []
    try:
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if message["role"] not in ("system", "user", "assistant") or message.get("tool_calls"):
                raise ValueError("another role, or calls of tools")
            read.append({"role": message["role"], "content": [read_part(**part) for part in parts]})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ApiError(
            400, f"{MESSAGE}; this is not ({str(error)[:99]}).", "messages", "invalid_message"
        ) from error
    return read


def read_part(type: str, text: str = "", input_audio: dict | None = None) -> dict[str, Any]:
    if type == "text" and isinstance(text, str):
        return {"type": "text", "text": text}
    if type != "input_audio" or input_audio["format"] not in ("wav", "mp3", "flac"):
        raise ValueError("another type, or format")
    return {"type": "audio", "audio": base64.b64decode(input_audio["data"], validate=True)}
