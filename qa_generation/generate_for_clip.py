"""Generates the examples of one clip from its facts and the replies of a language model.

The same code sends requests, reads stored replies and estimates costs. Metadata rows about one clip
are processed one after the other: which pair is a duplicate, and so which request may be repeated,
must not depend on which reply arrives first.
"""

import asyncio
import json
import random
import string
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qa_generation.filters import make_filter
from qa_generation.llm import Llm, LlmSettings, Message, Reply, RequestFailed, estimate_tokens
from qa_generation.metadata import Clips
from qa_generation.metadata_prompts import Row, Source, message
from qa_generation.qa_json import Pair, Reject, parse_pairs

PROMPTS = Path(__file__).parent / "prompts"
TASK = "open-ended question"
SUMMARY_TASK = "joint audio and speech summarization"
TOKENS_PER_PAIR = 60  # estimated length of a pair in a reply
INFERENCE_WORDS = 8  # minimum length of a paragraph; the prompt asks for about 30 words
Read = tuple[list[Pair], list[Reject]]  # pairs of a reply, and what was dropped


class Generator:
    """A source with its prompts.

    `earlier` may be set to the marks (`filters.marks`) of pairs that clips already have, by
    audio_id.

    Args:
        source: The source, with the count and min_words that the user set.
        models: Names of models, of which each clip uses one.
        prompt: File to use instead of the prompt of the source.
        drops: Enabled filters, of `filters.FILTERS`.
        max_attempts: Maximum number of requests until a reply has a pair.
        seed: Seed of what is sampled for a clip.
    """

    def __init__(
        self,
        source: Source,
        models: list[str],
        prompt: Path | None,
        drops: tuple[str, ...],
        max_attempts: int,
        seed: int,
    ):
        self.source = source
        self.models = models
        self.drops = drops
        self.max_attempts = max_attempts
        self.seed = seed
        self.earlier: dict[str, set[str]] = {}
        files = {
            "questions": prompt or PROMPTS / f"{source.prompt}.txt",
            "format": PROMPTS / "format.txt",
        }
        if source.infers:
            files["inference"] = PROMPTS / "joint_inference.txt"
            files["summaries"] = PROMPTS / "joint_questions.txt"
        self.prompts = {}
        for name, file in files.items():
            self.prompts[name] = file.read_text(encoding="utf-8").strip()
        # Fill in "format" first, because "questions" contains it.
        for name in ("format", "questions"):
            values = {"count": source.count, "format": self.prompts["format"]}
            self.prompts[name] = string.Template(self.prompts[name]).safe_substitute(values)

    async def generate_clip(
        self, llm: "Llm | Estimate", rows: list[Row]
    ) -> tuple[list[Row], list[Reject], int]:
        """Generate the examples of a clip from all metadata rows about it.

        Returns:
            The examples, what was dropped, and the number of metadata rows without a reply.

        Raises:
            GenerationStopped: Not all replies are there, and no further request is sent.
        """
        examples = []
        rejects = []
        failed = 0
        seen = self.earlier.get(rows[0]["audio_id"], set())
        for row in rows:
            own_seen = set(seen)
            try:
                own_examples, own_rejects = await self.generate_row(llm, row, own_seen)
            except RequestFailed:
                # llm counts the failure. A row without examples has no pairs to duplicate.
                failed += 1
                continue
            examples = examples + own_examples
            rejects = rejects + own_rejects
            seen = own_seen
        return examples, rejects, failed

    async def generate_row(
        self, llm: "Llm | Estimate", row: Row, seen: set[str]
    ) -> tuple[list[Row], list[Reject]]:
        """Return the examples from one metadata row, and what was dropped.

        The replies and `seen` decide them. The marks of new pairs are added to `seen`.

        Raises:
            RequestFailed, GenerationStopped: Not all replies are there.
        """
        facts = message(self.source, row)
        rejects: list[Reject] = []
        examples = []
        if self.source.infers:

            def read_paragraph(reply: Reply) -> Read:
                return self._paragraph(reply, row)

            found = await self._generate(llm, row, "inference", facts, read_paragraph, rejects)
            if not found:
                return [], rejects
            summary = found[0]
            names = tuple(name for name in self.drops if name == "duplicate")
            reason = make_filter("", 0, names, seen)(summary)
            if reason:
                rejects.append(_reject(reason, summary))
            else:
                examples.append(_example(row, *summary, SUMMARY_TASK))
            facts = f"{facts}; Inference: {summary.answer}"
        is_good = make_filter(row.get("text") or "", self.source.min_words, self.drops, seen)

        def read_pairs(reply: Reply) -> Read:
            return _pairs(reply, is_good)

        found = await self._generate(llm, row, "questions", facts, read_pairs, rejects)
        examples += [_example(row, *pair, TASK) for pair in found]
        return examples, rejects

    def has_any_reply(self, offline: Llm, clips: Clips) -> bool:
        """Return whether the store answers any metadata row in full.

        The replies read until then are counted in `offline.counts`.
        """

        async def search() -> bool:
            for rows in clips.values():
                _, _, failed = await self.generate_clip(offline, rows)
                if failed < len(rows):
                    return True
            return False

        return asyncio.run(search())

    async def _generate(
        self,
        llm: "Llm | Estimate",
        row: Row,
        prompt: str,
        facts: str,
        read: Callable[[Reply], Read],
        rejects: list,
    ) -> list[Pair]:
        """Send requests until a reply has a pair, and append what was dropped to `rejects`."""
        messages = [
            {"role": "system", "content": self.prompts[prompt]},
            {"role": "user", "content": facts},
        ]
        model = self._sample(row, self.models)
        for attempt in range(self.max_attempts):
            # With this name, clips with equal facts get replies of their own.
            reply = await llm.complete(messages, model, f"{row['audio_id']} {attempt}")
            found, dropped = read(reply)
            rejects += dropped
            if found:
                return found
        return []

    def _sample(self, row: Row, options: list[str]) -> str:
        return random.Random(f"{self.seed} {row['audio_id']}").choice(options)

    def _paragraph(self, reply: Reply, row: Row) -> Read:
        """Return the pair of a sampled question and the paragraph of a reply."""
        words = reply.text.split()
        if reply.is_cut or len(words) < INFERENCE_WORDS:
            return [], [Reject("no paragraph", reply.text)]
        question = self._sample(row, self.prompts["summaries"].splitlines())
        return [Pair(question, " ".join(words))], []


def _pairs(reply: Reply, is_good: Callable[[Pair], str | None]) -> Read:
    """Return the pairs of a reply that no filter drops, and what was dropped."""
    pairs, rejects = parse_pairs(reply.text, reply.is_cut)
    good = []
    for pair in pairs:
        reason = is_good(pair)
        if reason:
            rejects.append(_reject(reason, pair))
        else:
            good.append(pair)
    return good, rejects


def _reject(reason: str, pair: Pair) -> Reject:
    return Reject(reason, json.dumps([*pair], ensure_ascii=False))


def _example(row: Row, question: str, answer: str, task: str) -> Row:
    transcript = row["input"] if row.get("input") is not None else row.get("text") or ""
    return {
        "instruction": question,
        "input": transcript.strip(),
        "audio_id": row["audio_id"],
        "dataset": row["dataset"],
        "task": task,
        "output": answer,
    }


class Estimate:
    """Replaces `Llm` in a dry run: counts the requests, and replies itself.

    Args:
        stored: Replies from the store alone; None if there is no store yet.
    """

    def __init__(self, generator: Generator, settings: LlmSettings, stored: Llm | None):
        self.generator = generator
        self.settings = settings
        self.stored = stored
        self.counts: Counter = Counter()
        # Long enough for a paragraph and for the answer of a pair.
        self.answer = "word " * max(generator.source.min_words, 30)

    async def complete(self, messages: list[Message], model: str, sample: str) -> Reply:
        """Return the stored reply or, after counting the request, a reply with one pair."""
        with suppress(RequestFailed):
            if self.stored:
                return await self.stored.complete(messages, model, sample)
        is_paragraph = messages[0]["content"] == self.generator.prompts.get("inference")
        expected = TOKENS_PER_PAIR * (1 if is_paragraph else self.generator.source.count)
        prompt_tokens = estimate_tokens(messages)
        at_most = self.settings.reserved(messages)
        self.counts.update(
            requests=1,
            prompt_tokens=prompt_tokens,
            reply_tokens=min(expected, at_most - prompt_tokens),
            at_most=at_most,
        )
        # The number makes the pair unique: a duplicate would cause another request.
        number = self.counts["requests"]
        pair = {"q": f"What is noted here, {number}?", "a": f"{self.answer}{number}"}
        return Reply(json.dumps(pair), "stop", "", 0, 0)

    def report(self, clips: Clips, price: list[float] | None) -> None:
        """Print the requests and tokens of a run. Nothing is sent."""

        async def count_all() -> None:
            for rows in clips.values():
                await self.generator.generate_clip(self, rows)

        asyncio.run(count_all())
        requests = self.counts["requests"]
        prompt_tokens = self.counts["prompt_tokens"]
        reply_tokens = self.counts["reply_tokens"]
        stored = self.stored.counts["stored"] if self.stored else 0
        print(f"{len(clips)} clips: {requests} requests to send, {stored} replies already stored")
        print(
            f"about {prompt_tokens} tokens of prompts, {reply_tokens} of replies; "
            f"at most {self.counts['at_most']}, each tried once"
        )
        if price:
            dollars = (prompt_tokens * price[0] + reply_tokens * price[1]) / 1e6
            print(f"about {dollars:.2f} dollars")
