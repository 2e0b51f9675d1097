"""Cleans transcripts of speech by Whisper, those of new clips and those that are in dataset files.

Whisper was trained on the subtitles of videos, and transcribes silence as "Thanks for watching".
Such a hallucinated outro is removed wherever it stands, in the three casings that the original
removes, with one full stop or exclamation mark behind it.
"""

import re

HALLUCINATED_OUTRO = re.compile(
    "(Thanks for watching|thanks for watching|THANKS FOR WATCHING"
    "|Thank you for watching|thank you for watching|THANK YOU FOR WATCHING)[.!]?"
)


def remove_outros(text: str) -> str:
    """Remove hallucinated outros, and nothing else."""
    return HALLUCINATED_OUTRO.sub("", text)


def clean_transcript(text: str) -> str:
    """Remove hallucinated outros, and white space at both ends, from Whisper's transcript."""
    return remove_outros(text).strip()


def clean_as_original(text: str) -> str:
    """Clean a transcript as the original's scripts cleaned the data of its checkpoints.

    White space is removed from the start only, and only if it begins with a space. So the space in
    front of an outro stays: "Hello. Thanks for watching!" becomes "Hello. ".
    """
    text = remove_outros(text)
    return text.lstrip() if text.startswith(" ") else text


# Rule -> function that cleans a transcript.
TRANSCRIPT_RULES = {
    "clean": clean_transcript,
    "original": clean_as_original,
    "unchanged": str,
}
