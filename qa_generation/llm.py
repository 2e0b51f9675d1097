"""Generates text with any OpenAI-compatible endpoint, or a local Hugging Face model.

    with ReplyStore("replies.jsonl") as store:
        llm = Llm(LlmSettings("gpt-4o-mini", token_budget=1_000_000), store)
        prompts = [[{"role": "user", "content": "Is a dog an animal? yes or no"}], ...]
        replies = llm.complete_all(prompts)

It is the project's only client of such an endpoint: questions are generated and answers are judged
with it.

A reply is on the disk before anything else is done with it, under everything that its request says:
model, messages, temperature and further settings, but not the endpoint. After kill -9, the next run
sends only the requests that were in flight (at most `concurrency`); `Idempotency-Key` identifies
them for an endpoint that supports it.

408, 409, 425, 429, 5xx, time-outs, lost connections and bodies without a reply are retried, after
`Retry-After` or an exponential wait with jitter; a `Retry-After` delays all requests. A refused key
or an empty account stops the run, a 403 only if nothing was answered yet.

The token budget covers the cost of the store so far, and the maximum cost of each try that was sent
and has no reply (time-out, lost connection, gateway, malformed response, kill -9), because it may
be billed. A try starts only if its longest reply still fits. Tokens of prompts are estimated until
an endpoint counts them.

A request whose response is malformed, such as a web page, or longer than `endpoint.MAX_BODY`, is
sent three times at most, because each response may be billed.
"""

import asyncio
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from qa_generation.endpoint import OpenAiEndpoint
from qa_generation.llm_types import (
    Endpoint,
    Forbidden,
    GenerationStopped,
    LlmSettings,
    Message,
    Refused,
    Reply,
    RequestFailed,
    TryAgain,
    estimate_tokens,
)
from qa_generation.reply_body import UnreadableReply
from qa_generation.reply_store import ReplyStore

__all__ = [
    "GenerationStopped",
    "Llm",
    "LlmSettings",
    "Message",
    "OpenAiEndpoint",
    "Reply",
    "ReplyStore",
    "RequestFailed",
    "UnreadableReply",
    "estimate_tokens",
]
# Failed requests in a row after which the endpoint counts as gone and the run stops.
FAILURES_IN_ROW = 20
MAX_MALFORMED = 3  # malformed responses to one request, before it fails
LONGEST_WAIT = 60.0  # seconds between two tries without Retry-After
MOMENT = 0.1  # seconds after which a waiting request checks whether generation has stopped


class Llm:
    """A language model with retries, a store of replies and a token budget.

    Args:
        settings: How to generate.
        store: Where replies are stored.
        is_offline: Use only the store; a request without a stored reply fails.
    """

    def __init__(self, settings: LlmSettings, store: ReplyStore, is_offline: bool = False):
        self.settings = settings
        self.store = store
        self.is_offline = is_offline
        self.endpoint: Endpoint | None = None
        if not is_offline:
            self.endpoint = _open_endpoint(settings)
        self.in_flight: dict[str, asyncio.Task] = {}
        self.counts: Counter = Counter()  # "answered", "stored", "failed", each reason of a retry
        self.used_prompt_tokens = 0  # of the returned replies
        self.used_completion_tokens = 0  # of the returned replies
        self.sent = 0  # tries in flight
        self.failures_in_row = 0
        self.not_before = 0.0  # time before which no try may start
        self.stopped: str | None = None

    def stop(self, reason: str) -> None:
        """Start no further request. Requests in flight are completed."""
        self.stopped = self.stopped or reason

    def request(self, messages: list[Message], model: str | None = None) -> dict[str, Any]:
        """Return the body of a request."""
        settings = self.settings
        body = {
            "model": model or settings.model,
            "messages": messages,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        body |= settings.extra
        return {name: value for name, value in body.items() if value is not None}

    async def complete(
        self, messages: list[Message], model: str | None = None, sample: str = ""
    ) -> Reply:
        """Return the reply to these messages, from the store if it is there.

        Args:
            model: Used instead of that of the settings, where several models are used.
            sample: Another name gives another reply to the same messages.

        Raises:
            RequestFailed: This request has no reply.
            GenerationStopped: No further request has one (budget, key, endpoint, or `stop`).
        """
        request = self.request(messages, model)
        key = hashlib.sha256(json.dumps([request, sample], sort_keys=True).encode()).hexdigest()
        reply = self.store.get(key)
        if reply is not None:
            self.counts["stored"] += 1
        elif self.is_offline:
            raise RequestFailed("not in the store")
        else:
            if key not in self.in_flight:  # Equal requests at the same time are sent once.
                self.in_flight[key] = asyncio.ensure_future(self._complete(request, key))
                self.in_flight[key].add_done_callback(lambda _: self.in_flight.pop(key))
            reply = await asyncio.shield(self.in_flight[key])
        self.used_prompt_tokens += reply.prompt_tokens
        self.used_completion_tokens += reply.completion_tokens
        return reply

    async def _complete(self, request: dict[str, Any], key: str) -> Reply:
        """Send a request with retries, and stop the run on errors that concern all requests."""
        try:
            reply = await self._retry(request, key)
        except RequestFailed as error:
            self.counts["failed"] += 1
            # If other requests were answered, a refused one is at fault itself, in every run.
            is_own_fault = isinstance(error, Refused) and self.store.offsets
            if not is_own_fault:
                self.failures_in_row += 1
                if isinstance(error, Forbidden):
                    self.stop(str(error))
            if self.failures_in_row >= FAILURES_IN_ROW:
                self.stop(
                    f"{self.failures_in_row} requests failed one after the other, "
                    f"the last with {error}"
                )
            raise
        except GenerationStopped as error:
            self.stop(str(error))
            raise
        except OSError as error:
            # The store failed. A full disk stores no reply, so none may be paid for.
            self.stop(f"{error.filename}: {error.strerror}")
            raise GenerationStopped(self.stopped) from None
        self.counts["answered"] += 1
        self.failures_in_row = 0
        return reply

    async def _retry(self, request: dict[str, Any], key: str) -> Reply:
        """Send a request until it has a reply or no try is left."""
        not_before = 0.0
        num_malformed = 0
        reason = ""
        tokens = self.settings.reserved(request["messages"])
        for attempt in range(self.settings.tries):
            await self._wait_for_start(tokens, not_before)
            try:
                return await self._send(request, key, tokens)
            except TryAgain as error:
                reason = str(error)
                wait = error.wait
                num_malformed += error.is_malformed
            self.counts[reason.partition(":")[0]] += 1
            if num_malformed == MAX_MALFORMED:
                break
            if not wait:
                wait = min(2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
                not_before = time.monotonic() + wait
            elif wait > self.settings.max_wait:
                raise RequestFailed(f"{reason}, to be tried again in {wait:.0f} s")
            else:
                self.not_before = max(self.not_before, time.monotonic() + wait)
        raise RequestFailed(f"{reason} ({attempt + 1} tries)")

    async def _wait_for_start(self, tokens: int, not_before: float) -> None:
        """Wait until a try may start: its time has come and it fits the budget.

        Raises:
            GenerationStopped: No try may start any more.
        """
        while not self.stopped:
            wait = max(not_before, self.not_before) - time.monotonic()
            if wait > 0:
                await asyncio.sleep(min(wait, MOMENT))
            elif self._fits(tokens):
                return
            else:
                await asyncio.sleep(MOMENT)
        raise GenerationStopped(self.stopped)

    def _fits(self, tokens: int) -> bool:
        """Return whether a try certainly fits the budget.

        If not, it may fit when the tries in flight are completed, because most replies are shorter
        than their maximum. Without tries in flight, the run stops.
        """
        budget = self.settings.token_budget
        store = self.store
        if budget is None or store.tokens + store.unanswered_tokens + tokens <= budget:
            return True
        if not self.sent:
            self.stop(
                f"token budget: {store.tokens} of {budget} spent, "
                f"{store.unanswered_tokens} reserved for tries without a reply; "
                f"the next request may take {tokens}"
            )
        return False

    async def _send(self, request: dict[str, Any], key: str, tokens: int) -> Reply:
        """Send a request once. The store records its cost before it is sent and afterwards."""
        self.store.reserve(key, tokens)
        self.sent += 1
        try:
            reply = await self.endpoint.send(request, key)
            # Store the reply before anything else can happen: nothing is awaited in between.
            self.store.put(key, reply, tokens)
            return reply
        except (TryAgain, RequestFailed, GenerationStopped) as error:
            if not getattr(error, "is_billable", False):
                self.store.reserve(key, -tokens)
            raise
        finally:
            self.sent -= 1

    async def run(self, jobs: Iterable[Callable[[], Awaitable[None]]]) -> None:
        """Run `jobs`, `concurrency` of them at a time.

        Raises:
            GenerationStopped: Some jobs were not started. Those that had started are completed.
        """
        waiting = iter(jobs)

        async def work() -> None:
            for job in waiting:
                if self.stopped:
                    return
                with ExitStack() as on_failure:
                    # If the job fails, for any reason, no other job is started.
                    on_failure.callback(self.stop, "a job failed")
                    await job()
                    on_failure.pop_all()

        try:
            workers = [work() for _ in range(self.settings.concurrency)]
            results = await asyncio.gather(*workers, return_exceptions=True)
        finally:
            await self.endpoint.close()
        for error in results:
            if isinstance(error, BaseException) and not isinstance(error, GenerationStopped):
                raise error
        if self.stopped:
            raise GenerationStopped(self.stopped)

    def complete_all(
        self,
        messages: list[list[Message]],
        on_reply: Callable[[int, Reply | RequestFailed], None] = lambda *_: None,
    ) -> list[Reply | RequestFailed]:
        """Return the replies in the order of `messages`, for callers without an event loop.

        The entry of a request that failed is its error.

        Args:
            on_reply: Called with the index and the reply or error as soon as it is there.

        Raises:
            GenerationStopped: Not all requests were sent. The replies so far are in the store.
        """
        replies: dict[int, Reply | RequestFailed] = {}

        async def complete_one(index: int) -> None:
            try:
                replies[index] = await self.complete(messages[index])
            except RequestFailed as error:
                replies[index] = error
            on_reply(index, replies[index])

        asyncio.run(self.run(partial(complete_one, index) for index in range(len(messages))))
        return [replies[index] for index in range(len(messages))]


def _open_endpoint(settings: LlmSettings) -> Endpoint:
    if not settings.is_local:
        return OpenAiEndpoint(settings)
    from qa_generation.local_model import LocalModel

    return LocalModel(settings)
