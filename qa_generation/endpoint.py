"""One try of one request at an OpenAI-compatible endpoint, and the words that `qa_generation.llm` speaks in.

Notable:
- The `openai` package carries the request; its own retries are off, and the reply is read from the body as it came:
  of a chat completion only what counts must be right.
- The key is written nowhere, and cut out of messages that repeat it.
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
AGAIN = {408, 409, 425, 429}  # and all from 500 on
STOP = {401, 402, 404, 405}  # key, account, model or address: no further request would fare better
GATEWAY = {
    408,
    502,
    504,
    520,
    524,
}  # Something in between gave up; the model behind it may be at work, and bill it.
CUT = {"length", "max_tokens", "content_filter"}  # finish reasons
# Errors before a request is sent; by name, as versions of `openai` come with one or another httpx.
UNSENT = {
    "ConnectError",
    "ConnectTimeout",
    "PoolTimeout",
    "UnsupportedProtocol",
    "LocalProtocolError",
}
LENGTHS = ("max_tokens", "max_completion_tokens")
OWN = (
    "model",
    "messages",
    "stream",
    "n",
    "best_of",
)  # fields that the client sets, or could not account for
PIECE = re.compile(r"[A-Za-z]{1,5}|\s(?=\d)|[^\sA-Za-z]")


class RequestFailed(Exception):
    """This request has no reply; others may have. Nothing is stored, so the next run asks it again."""


class Refused(RequestFailed):
    """The endpoint does not answer this request, however often it is asked; others it may."""


class Forbidden(Refused):
    """403: of this request, or, where none was answered yet, of all."""


class StopAsking(Exception):
    """No further request is to be made; those on their way are waited for."""


class TryAgain(Exception):
    """A try failed in a way that passes.

    Args:
        wait: the endpoint's wish in seconds, 0 if it has none.
        is_lost: it was sent and may be billed.
        is_odd: it was answered, with something that is no reply.
    """

    def __init__(self, reason: str, wait: float = 0.0, is_lost: bool = False, is_odd: bool = False):
        super().__init__(reason)
        self.wait, self.is_lost, self.is_odd = wait, is_lost, is_odd


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

    Raises:
        ValueError: `extra` has what the client sets itself, or a budget cannot be kept.
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
        for name, value in ({"max_tokens": self.max_tokens} | self.extra).items():
            if name in OWN:
                raise ValueError(
                    f"extra: {name} is not to be set; one reply is asked for, in one piece."
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
        """Tokens, as the request says them; None if it names no bound."""
        if self.is_local:
            return self.extra.get("max_new_tokens") or self.max_tokens
        asked = {"max_tokens": self.max_tokens} | self.extra
        return max((asked[name] for name in LENGTHS if asked.get(name) is not None), default=None)

    def reserved(self, messages: list[Message]) -> int:
        """Tokens that one try may cost: the prompt, estimated, and the longest reply."""
        return estimate_tokens(messages) + (self.longest_reply or self.max_tokens)

    @property
    def url(self) -> str:
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL

    def record(self) -> dict[str, Any]:
        """What belongs beside a result: model, temperature and where it was asked, without anything secret."""
        parts = urlsplit(self.url)
        url = f"{parts.scheme}://{parts.netloc.rpartition('@')[-1]}{parts.path}"
        place = {"is_local": True} if self.is_local else {"base_url": url}
        asked = {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        return asked | {"extra": self.extra} | place


@dataclass(frozen=True)
class Reply:
    """text: "" if the model said nothing. finish_reason: mostly "stop"; "length" if it was cut off at max_tokens."""

    text: str
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def is_cut(self) -> bool:
        return self.finish_reason in CUT


def estimate_tokens(messages: list[Message]) -> int:
    """Tokens of a prompt, before its model counts them, rather too many: up to five letters each, every digit and
    sign, half of each byte that other scripts take beyond one, and what frames a message."""
    texts = [message["content"] for message in messages]
    return sum(
        len(PIECE.findall(text)) + (len(text.encode()) - len(text)) // 2 + 8 for text in texts
    )


class OpenAiEndpoint:
    """One try of one request over the `openai` package. ValueError: OpenAI's own endpoint without a key."""

    def __init__(self, settings: LlmSettings):
        try:
            import openai
        except ImportError as error:
            raise ValueError(f"{error}: pip install openai, or ask a --local model") from None
        self.key = os.environ.get(settings.key_from, "").strip()
        if not self.key and urlsplit(settings.url).hostname == urlsplit(OPENAI_URL).hostname:
            raise ValueError(
                f"No key for {OPENAI_URL}: set {settings.key_from}, or name another --base_url."
            )
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(
                f"The key in {settings.key_from} has a line break or a letter that no header takes."
            )
        self.openai, self.settings = openai, settings
        self.client: Any = None

    async def send(self, request: dict[str, Any], key: str) -> dict[str, Any]:
        """The reply as it is stored. TryAgain, RequestFailed, StopAsking: there is none."""
        if self.client is None:  # Within the loop that will use it.
            given = {
                "base_url": self.settings.url,
                "api_key": self.key or "none",
                "timeout": self.settings.timeout,
            }
            self.client = self.openai.AsyncOpenAI(max_retries=0, **given)
        asking = self.client.chat.completions.with_raw_response.create(
            model=request["model"],
            messages=request["messages"],
            extra_body=request,
            extra_headers={"Idempotency-Key": key},
        )
        try:  # The client's own limit is between two bytes: a trickle would never end.
            raw = await asyncio.wait_for(asking, self.settings.timeout)
        except asyncio.TimeoutError:
            raise TryAgain("time-out", is_lost=True) from None
        except self.openai.APIConnectionError as error:
            is_sent = type(error.__cause__).__name__ not in UNSENT
            is_late = isinstance(error, self.openai.APITimeoutError)
            reason = (
                "time-out" if is_late else f"connection: {self._clean(error.__cause__ or error)}"
            )
            raise TryAgain(reason, is_lost=is_sent) from None
        except self.openai.APIStatusError as error:
            raise self._judge(error) from None
        return self._read(raw.http_response.text, request)

    def _judge(self, error: Any) -> Exception:
        status, reason = error.status_code, f"{error.status_code}: {self._clean(error)}"
        if status in STOP or getattr(error, "code", None) == "insufficient_quota":
            return StopAsking(reason)
        if status in AGAIN or status >= 500:
            return TryAgain(
                str(status), _retry_after(error.response.headers), is_lost=status in GATEWAY
            )
        return (Forbidden if status == 403 else Refused)(reason)

    def _clean(self, error: Any) -> str:
        text = str(getattr(error, "message", error)) or type(error).__name__
        return (text.replace(self.key, "[key]") if self.key else text).replace("\n", " ")[:300]

    def _read(self, body: str, request: dict[str, Any]) -> dict[str, Any]:
        """The parts of a chat completion that count, whatever else an endpoint adds or leaves out."""
        try:
            data = json.loads(body)
            if isinstance(data, dict) and data.get("error") and not data.get("choices"):
                raise TryAgain(f"an error in a 200: {self._clean(json.dumps(data['error']))}")
            choice = data["choices"][0]
            text = _text(choice["message"].get("content"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            said = self._clean(body[:80])
            raise TryAgain(
                f"a body that is no chat completion: {said!r}", is_lost=True, is_odd=True
            ) from None
        # What was paid for is kept, however odd all else is.
        told, model, reason = data.get("usage"), data.get("model"), choice.get("finish_reason")
        told = told if isinstance(told, dict) else {}
        said = [{"content": text}]
        usage = {
            "prompt_tokens": estimate_tokens(request["messages"]),
            "completion_tokens": estimate_tokens(said),
        }
        usage |= {
            name: told[name] for name in usage if type(told.get(name)) is int and told[name] > 0
        }
        model = model if isinstance(model, str) and model else request["model"]
        reason = reason if isinstance(reason, str) and reason else "stop"
        return {"text": text, "finish_reason": reason, "model": model, "usage": usage}

    async def close(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            await client.close()


def _text(content: Any) -> str:
    """Of a message: a text, nothing, or a list of parts with texts. TypeError: none of these."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str | None):
        raise TypeError
    return (
        (content or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )  # No file takes half an emoji.


def _retry_after(headers: Any) -> float:
    """Seconds, from `Retry-After` in seconds or as a date; 0 if there is none, or its time is over."""
    text = headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(text))  # In this order NaN is 0 too.
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0
