"""Sends one request to an OpenAI-compatible endpoint, and defines the types of `qa_generation.llm`.

The `openai` package carries the request, with its own retries off. The reply is parsed from the
body, and only the parts of a chat completion that are used must be valid.

The key is written nowhere, and is removed from messages that repeat it.
"""

import asyncio
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

Message = dict[str, str]
OPENAI_URL = "https://api.openai.com/v1"
# Statuses of errors that pass; so do all from 500 on.
AGAIN = {408, 409, 425, 429}
# Statuses that concern key, account, model or address: every further request would fail too.
STOP = {401, 402, 404, 405}
# Statuses of something in between that gave up. The model behind it may still generate and bill.
GATEWAY = {408, 502, 504, 520, 524}
# Finish reasons of a truncated reply.
CUT = {"length", "max_tokens", "content_filter"}
# Errors before a request is sent. They are compared by name, because versions of `openai` use
# different versions of httpx.
UNSENT = {
    "ConnectError",
    "ConnectTimeout",
    "PoolTimeout",
    "UnsupportedProtocol",
    "LocalProtocolError",
}
LENGTHS = ("max_tokens", "max_completion_tokens")
# Fields that the client sets, or could not account for.
OWN = ("model", "messages", "stream", "n", "best_of")
# A piece of text that counts as one token in estimates.
PIECE = re.compile(r"[A-Za-z]{1,5}|\s(?=\d)|[^\sA-Za-z]")


class RequestFailed(Exception):
    """This request has no reply; others may have one.

    Nothing is stored, so the next run sends it again.
    """


class Refused(RequestFailed):
    """The endpoint always refuses this request; it may accept others."""


class Forbidden(Refused):
    """Status 403. It concerns this request or, if none was answered yet, all requests."""


class GenerationStopped(Exception):
    """No further request is sent. Requests in flight are completed."""


class TryAgain(Exception):
    """A try failed for a reason that passes.

    Args:
        wait: The wait that the endpoint asks for in seconds, 0 if it asks for none.
        is_lost: The request was sent and may be billed.
        is_odd: The response is no valid reply.
    """

    def __init__(self, reason: str, wait: float = 0.0, is_lost: bool = False, is_odd: bool = False):
        super().__init__(reason)
        self.wait = wait
        self.is_lost = is_lost
        self.is_odd = is_odd


@dataclass(frozen=True)
class LlmSettings:
    """The settings of generation. `model` to `extra` decide a reply and are part of its key.

    Args:
        model: Name at the endpoint; with `is_local` a folder or hub id.
        temperature: Sampling temperature.
        max_tokens: Maximum length of a reply.
        extra: Further fields of the request; None removes one, as in {"max_tokens": None,
            "max_completion_tokens": 1024}.
        is_local: The model runs on this machine.
        base_url: URL of the endpoint; else $OPENAI_BASE_URL, else OpenAI's.
        key_from: Environment variable with the key; needed only for OpenAI's own endpoint.
        concurrency: Number of requests at the same time; batch size with `is_local`.
        tries: Maximum number of tries of a request.
        timeout: Seconds for a whole try.
        max_wait: Seconds; after a longer Retry-After the request fails.
        token_budget: Tokens of prompts and replies together, over all runs with one store; None
            means no limit.

    Raises:
        ValueError: `extra` has a field that the client sets itself, or the budget cannot be kept.
    """

    model: str
    temperature: float = 1.0
    max_tokens: int = 1024
    extra: dict[str, Any] = field(default_factory=dict)
    is_local: bool = False
    base_url: str | None = None
    key_from: str = "OPENAI_API_KEY"
    concurrency: int = 16
    tries: int = 8
    timeout: float = 180.0
    max_wait: float = 300.0
    token_budget: int | None = None

    def __post_init__(self) -> None:
        fields = {"max_tokens": self.max_tokens} | self.extra
        for name, value in fields.items():
            if name in OWN:
                raise ValueError(
                    f"extra: {name} cannot be set; a request has one reply, in one piece."
                )
            is_length = name in (*LENGTHS, "max_new_tokens") and value is not None
            if is_length and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: {value!r} is not a number of tokens, 1 or more.")
        if self.token_budget is not None and self.longest_reply is None:
            raise ValueError(
                "A token budget needs a longest reply: give max_tokens or max_completion_tokens."
            )

    @property
    def longest_reply(self) -> int | None:
        """The maximum length of a reply in tokens, None if the request sets none."""
        if self.is_local:
            return self.extra.get("max_new_tokens") or self.max_tokens
        fields = {"max_tokens": self.max_tokens} | self.extra
        lengths = [fields[name] for name in LENGTHS if fields.get(name) is not None]
        return max(lengths, default=None)

    def reserved(self, messages: list[Message]) -> int:
        """Return the tokens that one try may cost: the estimated prompt and the longest reply."""
        return estimate_tokens(messages) + (self.longest_reply or self.max_tokens)

    @property
    def url(self) -> str:
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL

    def record(self) -> dict[str, Any]:
        """Return the provenance of a reply: model, settings and endpoint, without any secret."""
        found = {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "extra": self.extra,
        }
        if self.is_local:
            return found | {"is_local": True}
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[-1]
        return found | {"base_url": f"{parts.scheme}://{host}{parts.path}"}


@dataclass(frozen=True)
class Reply:
    """A reply of a language model.

    Args:
        text: "" if the reply is empty.
        finish_reason: Usually "stop"; "length" if the reply was truncated at max_tokens.
        model: Name of the model as the endpoint reports it.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens of the reply.
    """

    text: str
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def is_cut(self) -> bool:
        return self.finish_reason in CUT


def estimate_tokens(messages: list[Message]) -> int:
    """Estimate the tokens of a prompt before its model counts them, rather too many than too few.

    A token has at most five letters. Every digit and sign is one, and so is half of each byte that
    other scripts need beyond one. Each message adds a constant for its frame.
    """
    total = 0
    for message in messages:
        text = message["content"]
        total += len(PIECE.findall(text)) + (len(text.encode()) - len(text)) // 2 + 8
    return total


class OpenAiEndpoint:
    """An OpenAI-compatible endpoint, accessed with the `openai` package.

    Raises:
        ValueError: It is OpenAI's own endpoint and there is no key, the key is invalid, or the
            package is not installed.
    """

    def __init__(self, settings: LlmSettings):
        try:
            import openai
        except ImportError as error:
            raise ValueError(f"{error}: pip install openai, or use a --local model") from None
        self.key = os.environ.get(settings.key_from, "").strip()
        if not self.key and urlsplit(settings.url).hostname == urlsplit(OPENAI_URL).hostname:
            raise ValueError(
                f"No key for {OPENAI_URL}: set {settings.key_from}, or name another --base_url."
            )
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(
                f"The key in {settings.key_from} has a line break or a letter "
                "that is not allowed in a header."
            )
        self.openai = openai
        self.settings = settings
        self.client: Any = None

    async def send(self, request: dict[str, Any], key: str) -> dict[str, Any]:
        """Send a request once and return the reply in the form in which it is stored.

        Raises:
            TryAgain, RequestFailed, GenerationStopped: There is no reply.
        """
        if self.client is None:  # Create it within the loop that uses it.
            self.client = self.openai.AsyncOpenAI(
                max_retries=0,
                base_url=self.settings.url,
                api_key=self.key or "none",
                timeout=self.settings.timeout,
            )
        response = self.client.chat.completions.with_raw_response.create(
            model=request["model"],
            messages=request["messages"],
            extra_body=request,
            extra_headers={"Idempotency-Key": key},
        )
        try:
            # The client limits only the time between two bytes, so a trickle would never end.
            raw = await asyncio.wait_for(response, self.settings.timeout)
        except asyncio.TimeoutError:
            raise TryAgain("time-out", is_lost=True) from None
        except self.openai.APIConnectionError as error:
            is_sent = type(error.__cause__).__name__ not in UNSENT
            if isinstance(error, self.openai.APITimeoutError):
                reason = "time-out"
            else:
                reason = f"connection: {self._clean(error.__cause__ or error)}"
            raise TryAgain(reason, is_lost=is_sent) from None
        except self.openai.APIStatusError as error:
            raise self._classify(error) from None
        return self._read(raw.http_response.text, request)

    def _classify(self, error: Any) -> Exception:
        """Return the exception for an error status."""
        status = error.status_code
        reason = f"{status}: {self._clean(error)}"
        if status in STOP or getattr(error, "code", None) == "insufficient_quota":
            return GenerationStopped(reason)
        if status in AGAIN or status >= 500:
            wait = _retry_after(error.response.headers)
            return TryAgain(str(status), wait, is_lost=status in GATEWAY)
        return Forbidden(reason) if status == 403 else Refused(reason)

    def _clean(self, error: Any) -> str:
        """Return the message of an error in one line and without the key."""
        text = str(getattr(error, "message", error)) or type(error).__name__
        if self.key:
            text = text.replace(self.key, "[key]")
        return text.replace("\n", " ")[:300]

    def _read(self, body: str, request: dict[str, Any]) -> dict[str, Any]:
        """Return the used parts of a chat completion, whatever else an endpoint adds or omits."""
        try:
            data = json.loads(body)
            if isinstance(data, dict) and data.get("error") and not data.get("choices"):
                raise TryAgain(f"an error in a 200: {self._clean(json.dumps(data['error']))}")
            choice = data["choices"][0]
            text = _text(choice["message"].get("content"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            beginning = self._clean(body[:80])
            reason = f"a body that is no chat completion: {beginning!r}"
            raise TryAgain(reason, is_lost=True, is_odd=True) from None
        # Store what was paid for, however odd all else is.
        model = data.get("model")
        if not (isinstance(model, str) and model):
            model = request["model"]
        finish_reason = choice.get("finish_reason")
        if not (isinstance(finish_reason, str) and finish_reason):
            finish_reason = "stop"
        usage = _usage(data.get("usage"), request["messages"], text)
        return {"text": text, "finish_reason": finish_reason, "model": model, "usage": usage}

    async def close(self) -> None:
        client = self.client
        self.client = None
        if client is not None:
            await client.close()


def _usage(reported: Any, messages: list[Message], text: str) -> dict[str, int]:
    """Return the reported tokens of prompt and reply, estimated where they are not valid."""
    usage = {
        "prompt_tokens": estimate_tokens(messages),
        "completion_tokens": estimate_tokens([{"content": text}]),
    }
    if isinstance(reported, dict):
        for name in usage:
            if type(reported.get(name)) is int and reported[name] > 0:
                usage[name] = reported[name]
    return usage


def _text(content: Any) -> str:
    """Return the text of a message whose content is a text, null, or a list of parts with texts.

    Raises:
        TypeError: The content is none of these.
    """
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str | None):
        raise TypeError
    # Replace half an emoji, which cannot be written to a file.
    return (content or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _retry_after(headers: Any) -> float:
    """Return the seconds of `Retry-After`, a number or a date; 0 if there is none or it is over."""
    text = headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(text))  # In this order NaN is 0 too.
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0
