"""Writes generated examples, what was dropped, and how they were made.

Every file appears as a whole when it is complete, so a run that fails leaves the files of the run
before it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ltu.files import check_output
from qa_generation.generate_for_clip import ClipResult, Example
from qa_generation.qa_json import Reject

HASH_BLOCK = 2**20  # bytes


@dataclass(frozen=True)
class OutputPaths:
    """The files that a run writes."""

    examples: Path
    rejects: Path
    provenance: Path
    replies: Path

    @classmethod
    def next_to_examples(cls, examples: Path, replies: Path | None) -> "OutputPaths":
        """Return the paths, which are next to the examples; `replies` may be elsewhere."""
        return cls(
            examples=examples,
            rejects=Path(f"{examples}.rejects.jsonl"),
            provenance=Path(f"{examples}.provenance.json"),
            replies=replies or Path(f"{examples}.replies.jsonl"),
        )

    def check(self, inputs: Iterable[Path]) -> None:
        """Check that every output can be written, and differs from all other files.

        Raises:
            ValueError: A path is wrong; the message names it.
        """
        if self.examples.suffix not in (".json", ".jsonl"):
            raise ValueError(
                f"--output {self.examples}: the output is .json (a list) or .jsonl (JSON lines)."
            )
        outputs = [self.examples, self.replies, self.rejects, self.provenance]
        input_files = {path.resolve() for path in inputs}
        output_files = {path.resolve() for path in outputs}
        if len(output_files) < len(outputs) or output_files & input_files:
            names = ", ".join(str(path) for path in outputs)
            raise ValueError(f"Each of these is written and must be a file of its own: {names}")
        for path in outputs:
            if path.is_dir():
                raise ValueError(f"{path} is a folder; a file is needed.")


@dataclass
class Counts:
    """What a run has made of its metadata.

    Args:
        clips: Clips with metadata that can be used.
        clips_without_reply: Clips with a metadata row that has no reply.
        clips_without_examples: Clips whose replies have no pair that can be used.
        examples: Examples written.
        dropped: Reason -> number of texts that were dropped for it.
        prompt_tokens: Tokens of the prompts of the replies that were used.
        completion_tokens: Tokens of the replies that were used.
        repeated_metadata_rows: Metadata rows that repeat another.
        invalid_metadata_rows: Metadata rows that cannot be used.
    """

    clips: int = 0
    clips_without_reply: int = 0
    clips_without_examples: int = 0
    examples: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    repeated_metadata_rows: int = 0
    invalid_metadata_rows: int = 0

    def __str__(self) -> str:
        values = asdict(self)
        dropped = values.pop("dropped")
        parts = []
        for name, count in values.items():
            parts.append(f"{name.replace('_', ' ')} {count}")
        for reason, count in sorted(dropped.items()):
            parts.append(f"dropped: {reason} {count}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Provenance:
    """How the examples were made.

    It is the same for the same examples, however often the run was interrupted.
    """

    source: str
    count: int
    min_words: int
    input: str
    input_sha256: str
    previous_files_sha256: dict[str, str]
    versions: dict[str, str]
    llm: dict[str, Any]
    prompts_sha256: dict[str, str]
    seed: int
    filters: list[str]
    max_attempts: int
    counts: Counts

    def write(self, path: Path) -> None:
        with write_whole(path) as file:
            file.write(json.dumps(asdict(self), indent=1) + "\n")


class ExampleWriter:
    """Writes examples as a JSON list or as JSON lines, and rejects as JSON lines.

    Args:
        examples_file: An open file.
        rejects_file: An open file.
        is_list: Write a JSON list.
    """

    def __init__(self, examples_file: IO[str], rejects_file: IO[str], is_list: bool):
        self.examples_file = examples_file
        self.rejects_file = rejects_file
        self.is_list = is_list
        self.counts = Counts()
        if is_list:
            examples_file.write("[\n")

    def write(self, audio_id: str, result: ClipResult) -> None:
        """Write what was generated for a clip."""
        self.counts.clips += 1
        if result.num_failed:
            self.counts.clips_without_reply += 1
        elif not result.examples:
            self.counts.clips_without_examples += 1
        for example in result.examples:
            self._write_example(example)
        for reject in result.rejects:
            self._write_reject(audio_id, reject)

    def _write_example(self, example: Example) -> None:
        if self.counts.examples:
            self.examples_file.write(",\n" if self.is_list else "\n")
        json.dump(asdict(example), self.examples_file, ensure_ascii=False)
        self.counts.examples += 1

    def _write_reject(self, audio_id: str, reject: Reject) -> None:
        dropped = self.counts.dropped
        dropped[reject.reason] = dropped.get(reject.reason, 0) + 1
        entry = {"audio_id": audio_id, "reason": reject.reason, "text": reject.text}
        self.rejects_file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def end(self) -> None:
        """End the last line, and the list."""
        if self.counts.examples:
            self.examples_file.write("\n")
        if self.is_list:
            self.examples_file.write("]\n")


@contextmanager
def write_whole(path: Path) -> Iterator[IO[str]]:
    """Open a file that appears as a whole when the block ends, and not at all if it fails.

    Raises:
        OSError: it cannot be written.
        ValueError: the path is that of something else than a file.
    """
    check_output(path)
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)  # On a full disk it would only take space.


def hash_file(path: Path) -> str:
    """Return the sha256 of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
