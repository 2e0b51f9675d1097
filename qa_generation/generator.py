"""One clip: its facts to the model, its replies to rows. The same code asks, reads kept replies and estimates.

Notable:
- Rows of the metadata about one clip are asked about one after the other: what is a duplicate, and so perhaps is to be
  asked again, must not depend on which reply comes first.
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
from qa_generation.qa_json import Pair, Reject, parse_pairs
from qa_generation.sources import Row, Source, message

PROMPTS = Path(__file__).parent / "prompts"
TASK, SUMMARY_TASK = "open-ended question", "joint audio and speech summarization"
TOKENS_PER_PAIR = 60  # of a reply, where nothing better is known
INFERENCE_WORDS = 8  # fewer are no paragraph; about 30 are asked for
Read = tuple[list[Pair], list[Reject]]  # questions with answers, and what was dropped


class Generator:
    """A source with its prompts.

    Args:
        source: with the user's own count and min_words.
        models: take turns by clip.
        prompt: file to use instead of the source's.
        drops: names of `filters.FILTERS`.
        asks: times to ask for a clip until a reply has a pair.
        seed: of what is drawn for a clip.

    `earlier` may be set to the marks (`filters.marks`) of pairs that clips have already, by audio_id.
    """

    def __init__(
        self,
        source: Source,
        models: list[str],
        prompt: Path | None,
        drops: tuple[str, ...],
        asks: int,
        seed: int,
    ):
        self.source, self.models, self.drops, self.asks, self.seed = (
            source,
            models,
            drops,
            asks,
            seed,
        )
        self.earlier: dict[str, set[str]] = {}
        own = prompt or PROMPTS / f"{source.prompt}.txt"
        files = {"questions": own, "format": PROMPTS / "format.txt"}
        if source.infers:
            files |= {
                "inference": PROMPTS / "joint_inference.txt",
                "summaries": PROMPTS / "joint_questions.txt",
            }
        self.prompts = {
            name: file.read_text(encoding="utf-8").strip() for name, file in files.items()
        }
        for name in ("format", "questions"):  # The first is a part of the second.
            values = {"count": source.count, "format": self.prompts["format"]}
            self.prompts[name] = string.Template(self.prompts[name]).safe_substitute(values)

    async def ask_clip(
        self, llm: "Llm | Estimate", rows: list[Row]
    ) -> tuple[list[Row], list[Reject], int]:
        """Rows that are made of all metadata rows about one clip, what was dropped, and how many had no reply.

        Raises:
            StopAsking: not all replies are there, and no more are asked for.
        """
        made, rejects, failed = [], [], 0
        seen = self.earlier.get(rows[0]["audio_id"], set())
        for row in rows:
            own = set(seen)
            try:
                some, dropped = await self.ask(llm, row, own)
            except (
                RequestFailed
            ):  # Counted by llm. Without its rows it has no pairs that others could repeat.
                failed += 1
                continue
            made, rejects, seen = made + some, rejects + dropped, own
        return made, rejects, failed

    async def ask(
        self, llm: "Llm | Estimate", row: Row, seen: set[str]
    ) -> tuple[list[Row], list[Reject]]:
        """Rows about one metadata row, and what was dropped. The replies and `seen`, which grows, decide them.

        Raises:
            RequestFailed, StopAsking: not all replies are there.
        """
        facts, rejects = message(self.source, row), []
        rows = []
        if self.source.infers:
            found = await self._ask(
                llm, row, "inference", facts, lambda reply: self._paragraph(reply, row), rejects
            )
            if not found:
                return [], rejects
            repeats = make_filter(
                "", 0, tuple(name for name in self.drops if name == "duplicate"), seen
            )
            if reason := repeats(found[0]):
                rejects.append(_reject(reason, found[0]))
            else:
                rows.append(_row(row, *found[0], SUMMARY_TASK))
            facts = f"{facts}; Inference: {found[0].answer}"
        is_good = make_filter(row.get("text") or "", self.source.min_words, self.drops, seen)
        found = await self._ask(
            llm, row, "questions", facts, lambda reply: _pairs(reply, is_good), rejects
        )
        return rows + [_row(row, *pair, TASK) for pair in found], rejects

    def is_answered(self, offline: Llm, clips: Clips) -> bool:
        """Whether the store answers any metadata row in full. Replies seen until then are in `offline.counts`."""

        async def look() -> bool:
            for rows in clips.values():
                if (await self.ask_clip(offline, rows))[2] < len(rows):
                    return True
            return False

        return asyncio.run(look())

    async def _ask(
        self,
        llm: "Llm | Estimate",
        row: Row,
        prompt: str,
        facts: str,
        read: Callable[[Reply], Read],
        rejects: list,
    ) -> list[Pair]:
        messages = [
            {"role": "system", "content": self.prompts[prompt]},
            {"role": "user", "content": facts},
        ]
        model = self._draw(row, self.models)
        for number in range(self.asks):  # The name gives clips of equal facts replies of their own.
            found, dropped = read(
                await llm.complete(messages, model, f"{row['audio_id']} {number}")
            )
            rejects += dropped
            if found:
                return found
        return []

    def _draw(self, row: Row, options: list[str]) -> str:
        return random.Random(f"{self.seed} {row['audio_id']}").choice(options)

    def _paragraph(self, reply: Reply, row: Row) -> Read:
        if reply.is_cut or len(reply.text.split()) < INFERENCE_WORDS:
            return [], [Reject("no paragraph", reply.text)]
        return [
            Pair(
                self._draw(row, self.prompts["summaries"].splitlines()),
                " ".join(reply.text.split()),
            )
        ], []


def _pairs(reply: Reply, is_good: Callable) -> Read:
    pairs, rejects = parse_pairs(reply.text, reply.is_cut)
    reasons = [(pair, is_good(pair)) for pair in pairs]
    rejects += [_reject(reason, pair) for pair, reason in reasons if reason]
    return [pair for pair, reason in reasons if not reason], rejects


def _reject(reason: str, pair: Pair) -> Reject:
    return Reject(reason, json.dumps([*pair], ensure_ascii=False))


def _row(row: Row, question: str, answer: str, task: str) -> Row:
    words = row["input"] if row.get("input") is not None else row.get("text") or ""
    made = {"instruction": question, "input": words.strip(), "audio_id": row["audio_id"]}
    return made | {"dataset": row["dataset"], "task": task, "output": answer}


class Estimate:
    """Stands in for `Llm` in a dry run: counts what would be asked, and answers itself.

    Args:
        kept: answers from the store alone; None if there is no store yet.
    """

    def __init__(self, generator: Generator, settings: LlmSettings, kept: Llm | None):
        self.generator, self.settings, self.kept = generator, settings, kept
        self.counts: Counter = Counter()
        # Serves as a paragraph and as a reply with one pair.
        self.words = "word " * max(generator.source.min_words, 30)

    async def complete(self, messages: list[Message], model: str, sample: str) -> Reply:
        with suppress(RequestFailed):
            if self.kept:
                return await self.kept.complete(messages, model, sample)
        is_paragraph = messages[0]["content"] == self.generator.prompts.get("inference")
        expected = TOKENS_PER_PAIR * (1 if is_paragraph else self.generator.source.count)
        asked, at_most = estimate_tokens(messages), self.settings.reserved(messages)
        self.counts.update(
            requests=1, asked=asked, said=min(expected, at_most - asked), at_most=at_most
        )
        number = self.counts[
            "requests"
        ]  # Makes it a pair of its own: a duplicate would be asked again.
        pair = {"q": f"What is heard here, {number}?", "a": f"{self.words}{number}"}
        return Reply(json.dumps(pair), "stop", "", 0, 0)

    def report(self, clips: Clips, price: list[float] | None) -> None:
        """Print what a run would ask. Nothing is sent."""

        async def ask_all() -> None:
            for rows in clips.values():
                await self.generator.ask_clip(self, rows)

        asyncio.run(ask_all())
        asked, said, kept = (
            self.counts["asked"],
            self.counts["said"],
            self.kept.counts["kept"] if self.kept else 0,
        )
        print(
            f"{len(clips)} clips: {self.counts['requests']} requests to ask, {kept} are kept already"
        )
        print(
            f"about {asked} tokens of prompts, {said} of replies; at most {self.counts['at_most']}, each tried once"
        )
        if price:
            print(f"about {(asked * price[0] + said * price[1]) / 1e6:.2f} dollars")
