"""Sends one request to an OpenAI-compatible endpoint.

The `openai` package carries the request, with its own retries off. The reply is parsed from the
body, and only the parts of a chat completion that are used must be valid. A body has at most
`MAX_BODY` bytes, before and after decompression, and a whole try ends after `timeout` seconds.

The key is written nowhere: it is cut out of all that an endpoint sends, replies and errors.
"""

import asyncio
import base64
import json
import os
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import unquote, urlsplit

from qa_generation.llm_types import (
    OPENAI_URL,
    Forbidden,
    GenerationStopped,
    LlmSettings,
    Message,
    Refused,
    Reply,
    TryAgain,
    estimate_tokens,
)
from qa_generation.redaction import Redactor, is_placeholder
from qa_generation.reply_body import REQUEST_HEADERS, BodyLimit, UnreadableReply

# Bytes of the body of a reply. 100,000 tokens without log-probabilities have about half of it.
MAX_BODY = 4 * 2**20
# Statuses of transient errors; all from 500 on are transient too.
TRANSIENT = {408, 409, 425, 429}
# Statuses that concern key, account, model or address: every further request would fail too.
FATAL = {401, 402, 404, 405}
# Statuses of something in between that gave up. The model behind it may still generate and bill.
GATEWAY = {408, 502, 504, 520, 524}
# Errors before a request is sent. They are compared by name, because versions of `openai` use
# different versions of httpx.
UNSENT = {
    "ConnectError",
    "ConnectTimeout",
    "PoolTimeout",
    "UnsupportedProtocol",
    "LocalProtocolError",
}


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
            raise ValueError(f"{error}: pip install openai, or use a local model.") from None
        self.key = os.environ.get(settings.key_from, "").strip()
        if not self.key and urlsplit(settings.url).hostname == urlsplit(OPENAI_URL).hostname:
            raise ValueError(
                f"No key for {OPENAI_URL}: set {settings.key_from}, or OPENAI_BASE_URL for another "
                "endpoint."
            )
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError(
                f"The key in {settings.key_from} has a line break or a letter "
                "that is not allowed in a header."
            )
        self.openai = openai
        self.settings = settings
        secrets = _secrets_of(self.key, settings.url)
        self._clean_message = Redactor(secrets)
        self._clean_reply = Redactor(text for text in secrets if not is_placeholder(text))
        self.client: Any = None

    def open_sync_client(self, max_bytes: int) -> Any:
        """Return a synchronous client of the endpoint that retries by itself, a context manager.

        Args:
            max_bytes: limit of the body of a reply.
        """
        limit = BodyLimit(max_bytes, self.settings.timeout)
        return self.openai.OpenAI(
            max_retries=self.settings.tries - 1,
            http_client=self.openai.DefaultHttpxClient(
                event_hooks={"response": [limit.apply]}, cookies=_no_cookies()
            ),
            **self._client_settings(),
        )

    def _open_client(self) -> Any:
        # `send` limits the time.
        limit = BodyLimit(MAX_BODY)
        return self.openai.AsyncOpenAI(
            max_retries=0,
            http_client=self.openai.DefaultAsyncHttpxClient(
                event_hooks={"response": [limit.apply_async]}, cookies=_no_cookies()
            ),
            **self._client_settings(),
        )

    def _client_settings(self) -> dict[str, Any]:
        return {
            "base_url": self.settings.url,
            "api_key": self.key or "none",
            "timeout": self.settings.timeout,
            "default_headers": REQUEST_HEADERS,
        }

    async def send(self, request: dict[str, Any], key: str) -> Reply:
        """Send a request once and return its reply.

        Args:
            request: The body of the request.
            key: Identifies the request, for an endpoint that supports `Idempotency-Key`.

        Raises:
            TryAgain, RequestFailed, GenerationStopped: There is no reply.
        """
        if self.client is None:  # It is created within the loop that uses it.
            self.client = self._open_client()
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
            raise TryAgain("time-out", is_billable=True) from None
        except UnreadableReply as error:
            raise self._refuse(error) from None
        except self.openai.APIConnectionError as error:
            if isinstance(error.__cause__, UnreadableReply):  # openai 2 wraps it.
                raise self._refuse(error.__cause__) from None
            is_sent = type(error.__cause__).__name__ not in UNSENT
            if isinstance(error, self.openai.APITimeoutError):
                reason = "time-out"
            else:
                reason = f"connection: {self.clean(error.__cause__ or error)}"
            raise TryAgain(reason, is_billable=is_sent) from None
        except self.openai.APIStatusError as error:
            raise self._classify(error) from None
        return self._parse_completion(raw.http_response.text, request)

    def _classify(self, error: Any) -> Exception:
        """Return the exception for an error status."""
        status = error.status_code
        reason = f"{status}: {self.clean(error)}"
        if status in FATAL or getattr(error, "code", None) == "insufficient_quota":
            return GenerationStopped(reason)
        if status in TRANSIENT or status >= 500:
            wait = _retry_after(error.response.headers)
            return TryAgain(str(status), wait, is_billable=status in GATEWAY)
        if status == 403:
            return Forbidden(reason)
        return Refused(reason)

    def _refuse(self, error: UnreadableReply) -> TryAgain:
        """Return the exception for an unreadable reply, which may be billed."""
        return TryAgain(self.explain(error), is_billable=True, is_malformed=True)

    def explain(self, error: Any) -> str:
        """Return the message of an error of a client in one line and without the key."""
        if isinstance(error.__cause__, UnreadableReply):
            error = error.__cause__
        if isinstance(error, UnreadableReply):
            url = self.settings.record()["base_url"]
            return f"an unreadable reply: {self.clean(error)}, from {url}"
        return self.clean(error)

    def clean(self, error: Any) -> str:
        """Return a text, or the message of an error, in one line and without the key."""
        text = str(getattr(error, "message", error)) or type(error).__name__
        # Clean it before it is cut: half a key would not be found.
        return self._clean_message(text).replace("\n", " ")[:300]

    def _parse_completion(self, body: str, request: dict[str, Any]) -> Reply:
        """Return the reply in a chat completion, whatever else an endpoint adds or omits."""
        try:
            data = json.loads(body)
            if isinstance(data, dict) and data.get("error") and not data.get("choices"):
                raise TryAgain(f"an error in a 200: {self.clean(json.dumps(data['error']))}")
            choice = data["choices"][0]
            text = self._clean_reply(_text(choice["message"].get("content")))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            beginning = self.clean(body)[:80]
            reason = f"a body that is no chat completion: {beginning!r}"
            raise TryAgain(reason, is_billable=True, is_malformed=True) from None
        # The reply may be billed, so it is used even if other fields are not valid.
        model = data.get("model")
        if not (isinstance(model, str) and model):
            model = request["model"]
        finish_reason = choice.get("finish_reason")
        if not (isinstance(finish_reason, str) and finish_reason):
            finish_reason = "stop"
        usage = data.get("usage")
        reply_message = {"role": "assistant", "content": text}
        return Reply(
            text=text,
            finish_reason=self._clean_reply(_text(finish_reason)),
            model=self._clean_reply(_text(model)),
            prompt_tokens=_count_tokens(usage, "prompt_tokens", request["messages"]),
            completion_tokens=_count_tokens(usage, "completion_tokens", [reply_message]),
        )

    async def close(self) -> None:
        client = self.client
        self.client = None
        if client is not None:
            await client.close()


def _secrets_of(key: str, url: str) -> list[str]:
    """Return what a request says to identify its sender: a key, or the password in the URL."""
    parts = urlsplit(url)
    if not parts.password:
        return [key]
    password = unquote(parts.password)
    credentials = f"{unquote(parts.username or '')}:{password}"
    header = base64.b64encode(credentials.encode()).decode()
    return [key, password, header]


def _no_cookies() -> CookieJar:
    """Return a jar that takes no cookies, of which an endpoint could send ever more."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


def _count_tokens(usage: Any, name: str, messages: list[Message]) -> int:
    """Return the reported number of tokens, or an estimate if no valid one is reported."""
    if isinstance(usage, dict):
        tokens = usage.get(name)
        if type(tokens) is int and tokens > 0:
            return tokens
    return estimate_tokens(messages)


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
