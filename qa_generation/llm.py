"""Messages -> the text of a language model: any OpenAI-compatible endpoint, or a local Hugging Face model.

    with ReplyStore("replies.jsonl") as store:
        llm = Llm(LlmSettings("gpt-4o-mini", token_budget=1_000_000), store)
        replies = llm.complete_all([[{"role": "user", "content": "Is a dog an animal? yes or no"}], ...])

The project's only client of such an endpoint; questions are generated and answers are judged through it.

Notable:
- A reply is on the disk before anything else is done with it, under all that its request says: model, messages,
  temperature and further settings, but not the endpoint. Run again after kill -9, and only what was on its way then
  (at most `concurrency` requests) is asked again; `Idempotency-Key` tells it to an endpoint that heeds it.
- 408, 409, 425, 429, 5xx, time-outs, lost connections and bodies without a reply are tried again, after `Retry-After`
  or a growing, jittered wait; a `Retry-After` holds all requests. A refused key or an empty account stops the run, a
  403 only where nothing was answered yet.
- The token budget covers what the store has cost so far, and in full what each try may have cost that was sent and
  brought no reply (time-out, lost connection, gateway, odd body, kill -9): somebody may bill it. A try starts only if
  its longest reply still fits. Tokens of prompts are estimated until an endpoint counts them.
- An odd body, as of a page in the place of an endpoint, is asked for three times at most: each may be paid.
"""

import asyncio
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from qa_generation.endpoint import (
    Forbidden,
    LlmSettings,
    Message,
    OpenAiEndpoint,
    Refused,
    Reply,
    RequestFailed,
    StopAsking,
    TryAgain,
    estimate_tokens,
)
from qa_generation.reply_store import ReplyStore

__all__ = [
    "Llm",
    "LlmSettings",
    "Message",
    "Reply",
    "ReplyStore",
    "RequestFailed",
    "StopAsking",
    "estimate_tokens",
]
FAILURES_IN_ROW = (
    20  # requests that were given up one after the other: the endpoint is gone, so stop
)
ODD_BODIES = 3  # of one request, before it is given up
LONGEST_WAIT = 60.0  # seconds between two tries without Retry-After
MOMENT = 0.1  # seconds; how soon a waiting request sees that asking has stopped


class Llm:
    """Asks, waits, tries again, keeps, and stops at the budget.

    Args:
        settings: how to ask.
        store: where replies are kept.
        is_offline: answer from the store alone; what is not there fails.
    """

    def __init__(self, settings: LlmSettings, store: ReplyStore, is_offline: bool = False):
        self.settings, self.store, self.is_offline = settings, store, is_offline
        self.endpoint: Any = None if is_offline else _open_endpoint(settings)
        self.on_their_way: dict[str, asyncio.Task] = {}
        self.counts: Counter = Counter()  # "asked", "kept", and each reason of a new try
        self.used: Counter = Counter()  # tokens of the replies that were handed out
        self.sent = self.in_row = 0  # tries on their way; requests that failed one after the other
        self.not_before = 0.0
        self.stopped: str | None = None

    def stop(self, reason: str) -> None:
        """Start no further request; what is on its way is waited for."""
        self.stopped = self.stopped or reason

    def request(self, messages: list[Message], model: str | None = None) -> dict[str, Any]:
        """The body of a request."""
        own = self.settings
        body = {"model": model or own.model, "messages": messages, "temperature": own.temperature}
        body |= {"max_tokens": own.max_tokens} | own.extra
        return {name: value for name, value in body.items() if value is not None}

    async def complete(
        self, messages: list[Message], model: str | None = None, sample: str = ""
    ) -> Reply:
        """The reply to these messages, from the store if it is there.

        Args:
            model: instead of the settings' own, where models take turns.
            sample: another name asks for another reply to the same messages.

        Raises:
            RequestFailed: this one has no reply. StopAsking: nor will others (budget, key, endpoint, or `stop`).
        """
        request = self.request(messages, model)
        key = hashlib.sha256(json.dumps([request, sample], sort_keys=True).encode()).hexdigest()
        kept = self.store.get(key)
        if kept is not None:
            self.counts["kept"] += 1
        elif self.is_offline:
            raise RequestFailed("not asked")
        else:
            if key not in self.on_their_way:  # Equal requests at the same time are one.
                self.on_their_way[key] = asyncio.ensure_future(self._ask(request, key))
                self.on_their_way[key].add_done_callback(lambda _: self.on_their_way.pop(key))
            kept = await asyncio.shield(self.on_their_way[key])
        self.used.update(kept["usage"])
        return Reply(kept["text"], kept["finish_reason"], kept["model"], **kept["usage"])

    async def _ask(self, request: dict[str, Any], key: str) -> dict[str, Any]:
        try:
            reply = await self._try(request, key)
        except RequestFailed as error:
            self.counts["failed"] += 1
            # Where others were answered, what is refused is to blame itself, and is so again in every run.
            is_own = isinstance(error, Refused) and self.store.places
            self.in_row += not is_own
            if isinstance(error, Forbidden) and not is_own:
                self.stop(str(error))
            if self.in_row >= FAILURES_IN_ROW:
                self.stop(
                    f"{self.in_row} requests failed one after the other, the last with {error}"
                )
            raise
        except StopAsking as error:
            self.stop(str(error))
            raise
        except (
            OSError
        ) as error:  # The store's: a full disk keeps no reply, so none is to be paid for.
            self.stop(f"{error.filename}: {error.strerror}")
            raise StopAsking(self.stopped) from None
        self.counts["asked"] += 1
        self.in_row = 0
        return reply

    async def _try(self, request: dict[str, Any], key: str) -> dict[str, Any]:
        not_before, odd, last = 0.0, 0, ""
        tokens = self.settings.reserved(request["messages"])
        for attempt in range(self.settings.tries):
            await self._turn(tokens, not_before)
            try:
                return await self._send(request, key, tokens)
            except TryAgain as error:
                last, wait = str(error), error.wait
                odd += error.is_odd
            self.counts[last.partition(":")[0]] += 1
            if odd == ODD_BODIES:
                break
            if not wait:
                not_before = time.monotonic() + min(2.0**attempt, LONGEST_WAIT) * random.uniform(
                    0.5, 1.0
                )
            elif wait > self.settings.max_wait:
                raise RequestFailed(f"{last}, to be tried again in {wait:.0f} s")
            else:
                self.not_before = max(self.not_before, time.monotonic() + wait)
        raise RequestFailed(f"{last} ({attempt + 1} tries)")

    async def _turn(self, tokens: int, not_before: float) -> None:
        """Wait until a try may start: its time has come and it fits the budget. StopAsking: none may."""
        while not self.stopped:
            wait = max(not_before, self.not_before) - time.monotonic()
            if wait <= 0 and self._fits(tokens):
                return
            await asyncio.sleep(min(wait, MOMENT) if wait > 0 else MOMENT)
        raise StopAsking(self.stopped)

    def _fits(self, tokens: int) -> bool:
        """For certain; what is on its way mostly turns out shorter than it may be, so it is worth to wait for it."""
        budget, store = self.settings.token_budget, self.store
        if budget is None or store.tokens + store.lost + tokens <= budget:
            return True
        if not self.sent:
            used = (
                f"{store.tokens} of {budget} spent, {store.lost} reserved for tries without a reply"
            )
            self.stop(f"token budget: {used}; the next request may take {tokens}")
        return False

    async def _send(self, request: dict[str, Any], key: str, tokens: int) -> dict[str, Any]:
        """One try, in the store's accounts before it is sent and after."""
        self.store.reserve(key, tokens)
        self.sent += 1
        try:
            reply = await self.endpoint.send(request, key)
            self.store.put(
                key, reply, tokens
            )  # Before any other thing may happen: nothing is awaited in between.
            return reply
        except (TryAgain, RequestFailed, StopAsking) as error:
            if not getattr(error, "is_lost", False):
                self.store.reserve(key, -tokens)
            raise
        finally:
            self.sent -= 1

    async def run(self, jobs: Iterable[Callable[[], Awaitable[None]]]) -> None:
        """Work off `jobs`, `concurrency` at a time. StopAsking: not all is done, but what had begun was waited for."""
        waiting = iter(jobs)

        async def work() -> None:
            for job in waiting:
                if self.stopped:
                    return
                try:
                    await job()
                except Exception as error:
                    self.stop(f"{type(error).__name__}: {error}")
                    raise

        try:
            results = await asyncio.gather(
                *[work() for _ in range(self.settings.concurrency)], return_exceptions=True
            )
        finally:
            await self.endpoint.close()
        for error in results:
            if isinstance(error, BaseException) and not isinstance(error, StopAsking):
                raise error
        if self.stopped:
            raise StopAsking(self.stopped)

    def complete_all(
        self,
        messages: list[list[Message]],
        on_reply: Callable[[int, Reply | RequestFailed], None] = lambda *_: None,
    ) -> list[Reply | RequestFailed]:
        """For callers without a loop: replies in the order of `messages`; one that failed is the error.
        StopAsking: not all were asked, but replies so far are in the store."""
        replies: list[Any] = [None] * len(messages)

        async def job(index: int) -> None:
            try:
                replies[index] = await self.complete(messages[index])
            except RequestFailed as error:
                replies[index] = error
            on_reply(index, replies[index])

        asyncio.run(self.run((lambda index=index: job(index)) for index in range(len(messages))))
        return replies


def _open_endpoint(settings: LlmSettings) -> Any:
    if not settings.is_local:
        return OpenAiEndpoint(settings)
    from qa_generation.local_model import LocalModel

    return LocalModel(settings)
