"""Cuts secrets out of texts, however they are escaped."""

import re
from collections.abc import Iterable

# Local servers take any key, and people give them words, such as "EMPTY" or "anything". Such a word
# may be a part of an answer, and is no secret.
PLACEHOLDER = re.compile(r".{0,7}|[A-Za-z]{1,19}")
MARK = "[key]"  # in the place of a secret


class Redactor:
    """Replaces secrets in texts with "[key]".

    A secret is found as it is, escaped as in JSON, Python or a URL, and as HTML entities; also if
    only some of its letters are escaped, and up to three times over. Other encodings are not found.

    Args:
        secrets: printable texts; empty ones are ignored.
    """

    def __init__(self, secrets: Iterable[str]):
        # If one secret is a part of another, the longer one is replaced.
        ordered = sorted(filter(None, secrets), key=len, reverse=True)
        patterns = ["".join(_escapes(letter) for letter in secret) for secret in ordered]
        self.pattern = re.compile("|".join(patterns)) if patterns else None

    def __call__(self, text: str) -> str:
        """Return a text without the secrets."""
        if self.pattern is None:
            return text
        return self.pattern.sub(MARK, text)


def is_placeholder(key: str) -> bool:
    """Return whether a key is a word or a few letters, which no endpoint gives out as a secret."""
    return PLACEHOLDER.fullmatch(key) is not None


def _escapes(letter: str) -> str:
    """Return a regular expression of a letter and of its escapes."""
    number = ord(letter)
    # An escape that is escaped again has two backslashes, then four. Their number is bounded, so
    # that a long run of them takes no quadratic time.
    backslashes = r"\\{1,8}"
    escaped = rf"{backslashes}(?i:u{number:04x}|x{number:02x})"
    if not letter.isalnum():
        escaped += f"|{backslashes}{re.escape(letter)}"
    entity = f"&(?:amp;){{0,2}}#(?:0{{0,6}}{number}|(?i:x0{{0,6}}{number:x}));"
    in_url = f"(?i:%(?:25){{0,2}}{number:02x})"
    return f"(?:{re.escape(letter)}|{escaped}|{in_url}|{entity})"
