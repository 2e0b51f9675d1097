"""Marks model cards that this project wrote, so that a card that somebody edited is not replaced.

The first line below the metadata of such a card is a comment with the hash of all the rest. The
hash no longer fits if anything is edited, in the text or in the metadata.
"""

import hashlib
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"
SEAL = "<!-- Written by ltu; an edited card is not replaced. sha256 of the rest: {} -->\n"
SEAL_PATTERN = re.compile(SEAL.replace("{}", "([0-9a-f]{64})").replace(".", r"\."))


def seal_card(data: ModelCardData, text: str) -> str:
    """Return a model card of metadata and text, with the comment that marks it as ours."""
    rest = f"---\n{data.to_yaml()}\n---\n{text}"
    seal = SEAL.format(hashlib.sha256(rest.encode()).hexdigest())
    return f"---\n{data.to_yaml()}\n---\n{seal}{text}"


def is_sealed(content: str) -> bool:
    """Return whether a model card is as `seal_card` made it."""
    content = content.replace("\r\n", "\n")
    found = SEAL_PATTERN.search(content)
    if found is None:
        return False
    rest = content[: found.start()] + content[found.end() :]
    return hashlib.sha256(rest.encode()).hexdigest() == found[1]


def is_replaceable(path: Path) -> bool:
    """Return whether there is no model card at a path, or one of ours that nobody edited."""
    if not path.is_file():
        return True
    return is_sealed(path.read_text(encoding="utf-8", errors="replace"))


def is_stock(path: Path) -> bool:
    """Return whether a model card is the one that transformers makes for a new repository.

    It is the template of huggingface_hub with a description of one line.
    """
    text = ModelCard.load(path, ignore_metadata_errors=True).text
    mark = "DESCRIPTION OF THE MODEL"
    stock = ModelCard.from_template(ModelCardData(), model_description=mark).text
    before, _, after = stock.strip().partition(mark)
    text = text.strip()
    if not text.startswith(before) or not text.endswith(after):
        return False
    return "\n" not in text[len(before) : len(text) - len(after)]
