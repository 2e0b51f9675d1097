"""One try of one request at an OpenAI-compatible endpoint, and the words that `qa_generation.llm` speaks in.

Notable:
- The `openai` package carries the request; its own retries are off, and the reply is read from the body as it came:
  of a chat completion only what counts must be right.
- The key is written nowhere, and cut out of messages that repeat it.
"""

import asyncio
import json
import os
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

Message = dict[str, str]
OPENAI_URL = "https://api.openai.com/v1"
AGAIN = {408, 409, 425, 429}  # and all from 500 on
STOP = {401, 402, 403, 404}  # key, account, right or model: no further request would fare better


class RequestFailed(Exception):
    """This request has no reply; others may have. Nothing is stored, so the next run asks it again."""


class Refused(RequestFailed):
    """The endpoint does not answer this request, however often it is asked; others it may."""


class StopAsking(Exception):
    """No further request is to be made; those on their way are waited for."""


class TryAgain(Exception):
    """A try failed in a way that passes. `wait` is the endpoint's wish in seconds, None if it has none."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class LlmSettings:
    """How to ask. `model` to `extra` decide a reply and are part of a request's key.

    Args:
        model: name at the endpoint; with `is_local` a folder or hub id.
        max_tokens: longest reply.
        extra: further fields of the request; None takes one out, as in {"max_tokens": None,
            "max_completion_tokens": 1024}.
        base_url: of the endpoint; else $OPENAI_BASE_URL, else OpenAI's.
        key_from: environment variable with the key; needed for OpenAI's own endpoint only.
        concurrency: requests at once; rows of a batch with `is_local`.
        tries: of one request.
        timeout: seconds for a whole try.
        max_wait: seconds; a longer Retry-After gives the request up.
        token_budget: prompts and replies together, over all runs with one store; None: no bound.
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

    @property
    def url(self) -> str:
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL

    def record(self) -> dict[str, Any]:
        """What belongs beside a result: model, temperature and where it was asked, without anything secret."""
        parts = urlsplit(self.url)
        url = f"{parts.scheme}://{parts.netloc.rpartition('@')[-1]}{parts.path}"
        place = {"is_local": True} if self.is_local else {"base_url": url}
        asked = {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}
        return asked | {"extra": self.extra} | place


@dataclass(frozen=True)
class Reply:
    """text: "" if the model said nothing. finish_reason: "length" if it was cut off at max_tokens, mostly "stop"."""

    text: str
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int


def estimate_tokens(messages: list[Message]) -> int:
    """Tokens of a prompt, before its model counts them: 3.5 bytes of English each, and what frames a message."""
    return sum(len(message["content"].encode()) * 2 // 7 + 8 for message in messages)


class OpenAiEndpoint:
    """One try of one request over the `openai` package. ValueError: OpenAI's own endpoint without a key."""

    def __init__(self, settings: LlmSettings):
        try:
            import openai
        except ImportError as error:
            raise ValueError(f"{error}: pip install openai, or ask a --local model") from None
        self.key = os.environ.get(settings.key_from, "").strip()
        if not self.key and urlsplit(settings.url).hostname == urlsplit(OPENAI_URL).hostname:
            raise ValueError(f"No key for {OPENAI_URL}: set {settings.key_from}, or name another --base_url.")
        self.openai, self.settings = openai, settings
        self.client: Any = None

    async def send(self, request: dict[str, Any], key: str) -> dict[str, Any]:
        """The reply as it is stored. TryAgain, RequestFailed, StopAsking: there is none."""
        if self.client is None:  # Within the loop that will use it.
            given = {"base_url": self.settings.url, "api_key": self.key or "none", "timeout": self.settings.timeout}
            self.client = self.openai.AsyncOpenAI(max_retries=0, **given)
        asking = self.client.chat.completions.with_raw_response.create(
            **{name: request[name] for name in ("model", "messages")},
            extra_body={name: request[name] for name in request if name not in ("model", "messages")},
            extra_headers={"Idempotency-Key": key},
        )
        try:  # The client's own limit is between two bytes: a trickle would never end.
            raw = await asyncio.wait_for(asking, self.settings.timeout)
        except (asyncio.TimeoutError, self.openai.APITimeoutError):
            raise TryAgain("time-out") from None
        except self.openai.APIConnectionError as error:
            raise TryAgain(f"connection: {self._clean(error.__cause__ or error)}") from None
        except self.openai.APIStatusError as error:
            raise self._judge(error) from None
        return self._read(raw.http_response.text, request)

    def _judge(self, error: Any) -> Exception:
        status, reason = error.status_code, f"{error.status_code}: {self._clean(error)}"
        if status in STOP or getattr(error, "code", None) == "insufficient_quota":
            return StopAsking(reason)
        if status in AGAIN or status >= 500:
            return TryAgain(str(status), _retry_after(error.response.headers))
        return Refused(reason)

    def _clean(self, error: Any) -> str:
        text = str(getattr(error, "message", error)) or type(error).__name__
        return (text.replace(self.key, "[key]") if self.key else text).replace("\n", " ")[:300]

    def _read(self, body: str, request: dict[str, Any]) -> dict[str, Any]:
        """The parts of a chat completion that count, whatever else an endpoint adds or leaves out."""
        try:
            data = json.loads(body)
            choice = data["choices"][0]
            text, model = choice["message"].get("content") or "", data.get("model") or request["model"]
            told, reason = data.get("usage") or {}, choice.get("finish_reason") or "stop"
            usage = {"prompt_tokens": estimate_tokens(request["messages"]), "completion_tokens": len(text) // 4}
            usage |= {name: told[name] for name in usage if isinstance(told.get(name), int)}
            if not all(isinstance(value, str) for value in (text, model, reason)):
                raise TypeError
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # No file takes half an emoji.
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise TryAgain("a body that is no chat completion") from None
        return {"text": text, "finish_reason": reason, "model": model, "usage": usage}

    async def close(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            await client.close()


def _retry_after(headers: Any) -> float | None:
    """Seconds, from `retry-after-ms` or from `Retry-After` in seconds or as a date."""
    for name, scale in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            wait = float(headers.get(name, ""))
        except ValueError:
            continue
        return max(wait, 0.0) / scale if wait == wait else None
    try:
        return max(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None
