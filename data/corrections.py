"""Corrects examples that are combined, as the original's scripts do: transcripts and audio_ids.

Every correction is counted.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ltu.data.transcripts import TRANSCRIPT_RULES, remove_outros


@dataclass
class Corrections:
    """Corrects examples and counts them.

    Attributes:
        rule: for transcripts, one of `TRANSCRIPT_RULES`.
        replacements: part of an `audio_id` -> what replaces it.
        num_outros: number of examples from whose transcript an outro was removed.
        num_spaces: number of other examples from whose transcript white space was removed.
        num_replaced: part of an `audio_id` -> number of examples in which it was replaced.
    """

    rule: str
    replacements: dict[str, str]
    num_outros: int = 0
    num_spaces: int = 0
    num_replaced: Counter[str] = field(default_factory=Counter)

    def apply(self, example: dict[str, Any]) -> None:
        """Correct an example in place. A missing or null transcript stays as it is."""
        self._clean_transcript(example)
        audio_id = example.get("audio_id")
        for old, new in self.replacements.items():
            if audio_id and old in audio_id:
                audio_id = audio_id.replace(old, new)
                example["audio_id"] = audio_id
                self.num_replaced[old] += 1

    def _clean_transcript(self, example: dict[str, Any]) -> None:
        text = example.get("input")
        if not text:
            return
        cleaned = TRANSCRIPT_RULES[self.rule](text)
        if cleaned == text:
            return
        example["input"] = cleaned
        if remove_outros(text) != text:
            self.num_outros += 1
        else:
            self.num_spaces += 1

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of a provenance file."""
        replaced = {}
        for old, new in self.replacements.items():
            replaced[f"{old} -> {new}"] = self.num_replaced[old]
        return {
            "transcripts": self.rule,
            "transcripts_without_outro": self.num_outros,
            "transcripts_without_spaces": self.num_spaces,
            "audio_ids": replaced,
        }

    def lines(self) -> list[str]:
        """Return one line for each kind of correction that was made."""
        lines = []
        if self.num_outros:
            lines.append(f"hallucinated outros removed from {self.num_outros:,} transcripts")
        if self.num_spaces:
            lines.append(f"spaces at the ends removed from {self.num_spaces:,} transcripts")
        for old, number in self.num_replaced.items():
            lines.append(f"{old} replaced by {self.replacements[old]} in {number:,} audio_ids")
        return lines
