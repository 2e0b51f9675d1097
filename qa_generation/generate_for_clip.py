"""Generates the examples of one clip from its facts and the replies of a language model.

The same code sends requests, reads stored replies and estimates costs. Metadata rows about one clip
are processed one after the other: which pair is a duplicate, and so which request may be repeated,
must not depend on which reply arrives first.
"""

import asyncio
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qa_generation.filters import make_filter
from qa_generation.llm import Llm, Message, Reply, RequestFailed
from qa_generation.metadata import Clips
from qa_generation.metadata_prompts import MetadataRow, Source, message
from qa_generation.qa_json import Pair, ParsedReply, Reject, parse_pairs

PROMPTS = Path(__file__).parent / "prompts"
TASK = "open-ended question"
SUMMARY_TASK = "joint audio and speech summarization"
INFERENCE_WORDS = 8  # minimum length of a paragraph; the prompt asks for about 30 words


@dataclass(frozen=True)
class Prompts:
    """The system prompts of a source.

    Args:
        questions: Requests questions and answers. It contains `format`.
        format: Describes the format of the replies.
        inference: Requests a paragraph about the clip; None if the source has none.
        summaries: The questions, one a line, that the paragraph may answer.
    """

    questions: str
    format: str
    inference: str | None = None
    summaries: str | None = None


def load_prompts(source: Source, questions: Path | None = None) -> Prompts:
    """Load the prompts of a source, and fill in $count and $format.

    Args:
        questions: A file to use instead of the source's prompt for questions.
    """
    count = str(source.count)
    format_template = string.Template(_read_prompt(PROMPTS / "format.txt"))
    format_prompt = format_template.safe_substitute(count=count)
    template = string.Template(_read_prompt(questions or PROMPTS / f"{source.prompt}.txt"))
    prompt = template.safe_substitute(count=count, format=format_prompt)
    if not source.infers:
        return Prompts(prompt, format_prompt)
    return Prompts(
        prompt,
        format_prompt,
        inference=_read_prompt(PROMPTS / "joint_inference.txt"),
        summaries=_read_prompt(PROMPTS / "joint_questions.txt"),
    )


def _read_prompt(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Example:
    """A generated example, with the fields of a dataset file in their order."""

    instruction: str
    input: str
    audio_id: str
    dataset: str
    task: str
    output: str


@dataclass
class ClipResult:
    """The examples of a clip or of a metadata row, and what was dropped.

    Args:
        num_failed: Number of metadata rows without a reply.
    """

    examples: list[Example] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    num_failed: int = 0


class CompletesPrompts(Protocol):
    """Completes prompts: `Llm` or, in a dry run, `cost_estimate.CostEstimate`."""

    async def complete(self, messages: list[Message], model: str, sample: str) -> Reply:
        """Return the reply to these messages."""


@dataclass
class Generator:
    """Generates the examples of clips.

    Args:
        source: The source, with the count and min_words that the user set.
        prompts: The prompts of the source.
        models: Names of models, of which each clip uses one.
        filters: Enabled filters, of `filters.FILTERS`.
        max_attempts: Maximum number of requests until a reply has a pair.
        seed: Seed of what is sampled for a clip.
        known_pairs: audio_id -> the keys (`filters.duplicate_keys`) of pairs that the clip already
            has in other dataset files.
    """

    source: Source
    prompts: Prompts
    models: list[str]
    filters: tuple[str, ...]
    max_attempts: int
    seed: int
    known_pairs: dict[str, set[str]] = field(default_factory=dict)

    async def generate_clip(self, llm: CompletesPrompts, rows: list[MetadataRow]) -> ClipResult:
        """Generate the examples of a clip from all metadata rows about it.

        Raises:
            GenerationStopped: Not all replies are there, and no further request is sent.
        """
        result = ClipResult()
        seen = self.known_pairs.get(rows[0]["audio_id"], set())
        for row in rows:
            seen_with_row = set(seen)
            try:
                row_result = await self.generate_row(llm, row, seen_with_row)
            except RequestFailed:
                # llm counts the failure. A row without examples has no pairs to duplicate.
                result.num_failed += 1
                continue
            result.examples += row_result.examples
            result.rejects += row_result.rejects
            seen = seen_with_row
        return result

    async def generate_row(
        self, llm: CompletesPrompts, row: MetadataRow, seen: set[str]
    ) -> ClipResult:
        """Generate the examples from one metadata row.

        The replies and `seen` decide them. The keys of new pairs are added to `seen`.

        Raises:
            RequestFailed, GenerationStopped: Not all replies are there.
        """
        result = ClipResult()
        facts = message(self.source, row)
        if self.source.infers:
            summary = await self._generate_summary(llm, row, facts, seen, result)
            if summary is None:
                return result
            facts = f"{facts}; Inference: {summary.answer}"
        drop_reason = make_filter(row.get("text") or "", self.source.min_words, self.filters, seen)

        def read_pairs(reply: Reply) -> ParsedReply:
            return _filter_pairs(reply, drop_reason)

        pairs = await self._generate_pairs(
            llm, row, self.prompts.questions, facts, read_pairs, result.rejects
        )
        for pair in pairs:
            result.examples.append(_example(row, pair, TASK))
        return result

    async def _generate_summary(
        self,
        llm: CompletesPrompts,
        row: MetadataRow,
        facts: str,
        seen: set[str],
        result: ClipResult,
    ) -> Pair | None:
        """Generate a paragraph about a clip, and add its example or its reject to `result`.

        Returns:
            The pair of a question and the paragraph, None if no reply is a paragraph.
        """

        def read_paragraph(reply: Reply) -> ParsedReply:
            return self._parse_paragraph(reply, row)

        pairs = await self._generate_pairs(
            llm, row, self.prompts.inference, facts, read_paragraph, result.rejects
        )
        if not pairs:
            return None
        summary = pairs[0]
        # Of the filters, only that of duplicates applies to a paragraph.
        filters = tuple(name for name in self.filters if name == "duplicate")
        reason = make_filter("", 0, filters, seen)(summary)
        if reason:
            result.rejects.append(_reject(reason, summary))
        else:
            result.examples.append(_example(row, summary, SUMMARY_TASK))
        return summary

    def has_any_reply(self, offline: Llm, clips: Clips) -> bool:
        """Return whether the store answers any metadata row in full.

        The replies read until then are counted in `offline.counts`.
        """

        async def search() -> bool:
            for rows in clips.values():
                result = await self.generate_clip(offline, rows)
                if result.num_failed < len(rows):
                    return True
            return False

        return asyncio.run(search())

    async def _generate_pairs(
        self,
        llm: CompletesPrompts,
        row: MetadataRow,
        prompt: str,
        facts: str,
        parse: Callable[[Reply], ParsedReply],
        rejects: list[Reject],
    ) -> list[Pair]:
        """Send requests until a reply has a pair, and append what was dropped to `rejects`."""
        messages = [
            {"role": "system", "content": prompt},
            {"role": "user", "content": facts},
        ]
        model = self._sample(row, self.models)
        for attempt in range(self.max_attempts):
            # With this name, clips with equal facts get replies of their own.
            reply = await llm.complete(messages, model, f"{row['audio_id']} {attempt}")
            parsed = parse(reply)
            rejects += parsed.rejects
            if parsed.pairs:
                return parsed.pairs
        return []

    def _sample(self, row: MetadataRow, options: list[str]) -> str:
        return random.Random(f"{self.seed} {row['audio_id']}").choice(options)

    def _parse_paragraph(self, reply: Reply, row: MetadataRow) -> ParsedReply:
        """Return the pair of a sampled question and the paragraph of a reply."""
        words = reply.text.split()
        if reply.is_truncated or len(words) < INFERENCE_WORDS:
            return ParsedReply(rejects=[Reject("no paragraph", reply.text)])
        question = self._sample(row, self.prompts.summaries.splitlines())
        return ParsedReply(pairs=[Pair(question, " ".join(words))])


def _filter_pairs(reply: Reply, drop_reason: Callable[[Pair], str | None]) -> ParsedReply:
    """Return the pairs of a reply that no filter drops, and what was dropped."""
    parsed = parse_pairs(reply.text, reply.is_truncated)
    filtered = ParsedReply(rejects=parsed.rejects)
    for pair in parsed.pairs:
        reason = drop_reason(pair)
        if reason:
            filtered.rejects.append(_reject(reason, pair))
        else:
            filtered.pairs.append(pair)
    return filtered


def _reject(reason: str, pair: Pair) -> Reject:
    return Reject(reason, json.dumps([pair.question, pair.answer], ensure_ascii=False))


def _example(row: MetadataRow, pair: Pair, task: str) -> Example:
    transcript = row.get("input")
    if transcript is None:
        transcript = row.get("text") or ""
    return Example(
        instruction=pair.question,
        input=transcript.strip(),
        audio_id=row["audio_id"],
        dataset=row["dataset"],
        task=task,
        output=pair.answer,
    )
