"""Defines the requests, replies, settings and errors of the language model client.

`qa_generation.llm` exports what callers need.
"""

import os
import re
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

Message = dict[str, str]
OPENAI_URL = "https://api.openai.com/v1"
# Finish reasons of a truncated reply.
TRUNCATED = {"length", "max_tokens", "content_filter"}
LENGTH_FIELDS = ("max_tokens", "max_completion_tokens")
# Fields that the client sets, or could not account for.
RESERVED_FIELDS = ("model", "messages", "stream", "n", "best_of")
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
    """A try failed with a transient error.

    Args:
        wait: Seconds of the Retry-After of the endpoint, 0 if it has none.
        is_billable: The request was sent and may be billed.
        is_malformed: The response is no valid reply.
    """

    def __init__(
        self,
        reason: str,
        wait: float = 0.0,
        is_billable: bool = False,
        is_malformed: bool = False,
    ):
        super().__init__(reason)
        self.wait = wait
        self.is_billable = is_billable
        self.is_malformed = is_malformed


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
        ValueError: `extra` has a field that the client sets itself, or there is a token budget
            and no maximum length of a reply.
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
            if name in RESERVED_FIELDS:
                raise ValueError(
                    f"extra: {name} cannot be set; a request has one reply, in one piece."
                )
            is_length = name in (*LENGTH_FIELDS, "max_new_tokens") and value is not None
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
        lengths = [fields[name] for name in LENGTH_FIELDS if fields.get(name) is not None]
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
    def is_truncated(self) -> bool:
        return self.finish_reason in TRUNCATED


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


class Endpoint(Protocol):
    """Sends requests: `endpoint.OpenAiEndpoint` or `local_model.LocalModel`."""

    async def send(self, request: dict[str, Any], key: str) -> Reply:
        """Send a request once and return its reply."""

    async def close(self) -> None:
        """Release what the endpoint has opened."""
