"""Marks model cards that this project wrote, so that a card that somebody edited is not replaced.

The first line below the metadata of such a card is a comment with the hash of all the rest. The
hash no longer fits if anything is edited, in the text or in the metadata.

`push_to_hub` of transformers uploads a card of its own; `copy_card` puts that of the checkpoint
folder in its place.
"""

import hashlib
import logging
import re
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ltu.files import replace_file

logger = logging.getLogger(__name__)

CARD = "README.md"
# Files that a card describes, besides those that `save_pretrained` writes.
CARD_FILES = ("ltu_state.json", "trainer_state.json", "evaluation.json")
SEAL = "<!-- Written by ltu; an edited card is not replaced. sha256 of the rest: {} -->\n"
SEAL_PATTERN = re.compile(SEAL.replace("{}", "([0-9a-f]{64})").replace(".", r"\."))
# A sentence of the card that transformers writes if a repository has none.
STOCK_SENTENCE = "This model card has been automatically generated"


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
    """Return whether a model card is absent, ours, or the one that transformers generates."""
    if not path.is_file():
        return True
    content = path.read_text(encoding="utf-8", errors="replace")
    return is_sealed(content) or STOCK_SENTENCE in content


def copy_card(folder: Path, target: Path) -> None:
    """Copy the card of a checkpoint folder, and the records behind it, into what is uploaded.

    A card in `target` that somebody wrote stays, without the records. Tags in the card that
    transformers generates are kept.
    """
    own = folder / CARD
    if not own.is_file():
        return
    if not is_replaceable(target / CARD):
        logger.warning("The repository has a model card that was edited: it stays as it is.")
        return
    content = own.read_text(encoding="utf-8")
    if (target / CARD).is_file() and is_sealed(content):
        # transformers has put the tags of the call into its card.
        card = ModelCard(content)
        tags = ModelCard.load(target / CARD, ignore_metadata_errors=True).data.tags or []
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        content = seal_card(card.data, SEAL_PATTERN.sub("", card.text))
    replace_file(target / CARD, content.encode())
    for name in CARD_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
