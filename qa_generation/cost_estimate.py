"""Estimates what a run would send and cost, without sending anything."""

import asyncio
import json
from contextlib import suppress

from qa_generation.generate_for_clip import Generator
from qa_generation.llm import Llm, LlmSettings, Message, Reply, RequestFailed, estimate_tokens
from qa_generation.metadata import Clips

TOKENS_PER_PAIR = 60  # estimated length of a pair in a reply
MIN_ANSWER_WORDS = 30  # long enough for a paragraph


class CostEstimate:
    """Replaces `Llm` in a dry run: counts the requests, and replies itself.

    Args:
        stored: Replies from the store alone; None if there is no store yet.
    """

    def __init__(self, generator: Generator, settings: LlmSettings, stored: Llm | None):
        self.generator = generator
        self.settings = settings
        self.stored = stored
        self.requests = 0
        self.prompt_tokens = 0
        self.reply_tokens = 0
        self.max_tokens = 0  # of prompts and replies, if every reply has its maximum length

    async def complete(self, messages: list[Message], model: str, sample: str) -> Reply:
        """Return the stored reply or, after counting the request, a reply with one pair."""
        if self.stored:
            with suppress(RequestFailed):
                return await self.stored.complete(messages, model, sample)
        num_pairs = self.generator.source.count
        if messages[0]["content"] == self.generator.prompts.inference:
            num_pairs = 1
        prompt_tokens = estimate_tokens(messages)
        max_tokens = self.settings.reserved(messages)
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.reply_tokens += min(TOKENS_PER_PAIR * num_pairs, max_tokens - prompt_tokens)
        self.max_tokens += max_tokens
        # The number makes the pair unique: a duplicate would cause another request.
        num_words = max(self.generator.source.min_words, MIN_ANSWER_WORDS)
        answer = "word " * num_words + str(self.requests)
        pair = {"q": f"What is noted here, {self.requests}?", "a": answer}
        return Reply(json.dumps(pair), "stop", "", 0, 0)

    def report(self, clips: Clips, price: list[float] | None) -> None:
        """Print the requests and tokens of a run.

        Args:
            price: Dollars per million tokens of prompts, and of replies.
        """

        async def count_all() -> None:
            for rows in clips.values():
                await self.generator.generate_clip(self, rows)

        asyncio.run(count_all())
        num_stored = 0
        if self.stored:
            num_stored = self.stored.counts["stored"]
        print(
            f"{len(clips)} clips: {self.requests} requests to send, "
            f"{num_stored} replies already stored"
        )
        print(
            f"about {self.prompt_tokens} tokens of prompts, {self.reply_tokens} of replies; "
            f"at most {self.max_tokens}, each tried once"
        )
        if price:
            prompt_price, reply_price = price
            dollars = (self.prompt_tokens * prompt_price + self.reply_tokens * reply_price) / 1e6
            print(f"about {dollars:.2f} dollars")
