"""ATTRIBUTION.md from the manifest: who made each sound, where it comes from, under which licence."""

from collections import defaultdict
from pathlib import Path

from data.toy.sounds import Sound

LICENCES = {
    "CC0-1.0": ("CC0 1.0 Universal", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "CC-BY-3.0": ("Creative Commons Attribution 3.0 Unported", "https://creativecommons.org/licenses/by/3.0/"),
    "CC-BY-SA-3.0": (
        "Creative Commons Attribution-ShareAlike 3.0 Unported",
        "https://creativecommons.org/licenses/by-sa/3.0/",
    ),
    "CC-BY-SA-2.0 OR GPL-2.0-or-later": (
        "Creative Commons Attribution-ShareAlike 2.0 Generic, taken here; or GNU GPL 2 or later",
        "https://creativecommons.org/licenses/by-sa/2.0/",
    ),
    "Free-Art-License": ("Free Art Licence (Licence Art Libre)", "https://artlibre.org/licence/lal/en/"),
}
PACKAGES = {
    "npm supersonic-scsynth-samples 0.84.2": (
        "Sonic Pi samples",
        "https://www.npmjs.com/package/supersonic-scsynth-samples",
    ),
    "deb openttd-opensfx 1.0.3-2": ("OpenSFX", "https://packages.debian.org/bookworm/openttd-opensfx"),
    "deb asterisk-core-sounds-en-wav 1.6.1-1": (
        "Asterisk core sounds",
        "https://packages.debian.org/bookworm/asterisk-core-sounds-en-wav",
    ),
    "deb gcompris-qt-data 3.1-2": ("GCompris", "https://packages.debian.org/bookworm/gcompris-qt-data"),
    "deb lincity-ng-data 2.9": ("LinCity-NG", "https://packages.debian.org/bookworm/lincity-ng-data"),
    "deb minetest-data 5.6.1+dfsg": ("Minetest Game", "https://packages.debian.org/bookworm/minetest-data"),
    "deb sound-theme-freedesktop 0.8-2": (
        "freedesktop sound theme",
        "https://packages.debian.org/bookworm/sound-theme-freedesktop",
    ),
}
HEAD = """# Where the toy sounds come from

{count} clips, {minutes:.1f} minutes. Each was mixed down to one channel, resampled to 16 kHz, cut to at most 10 s,
brought to a peak of 0.7 and stored as FLAC; nothing else was changed. These changed versions are shared under the
licence of each clip's original. Authors are given as the package names them. This file is written by
`python -m data.toy.build --write_attribution` from `manifest.jsonl`.

The code of this repository has another licence; the sounds keep theirs. The OpenSFX collection as a whole is
CC-BY-SA-3.0; its table gives the licence of each of its sounds.

| Licence | Clips | Text |
|---|---|---|
"""


def write_attribution(sounds: list[Sound], path: Path) -> None:
    """One table for each source package, one row for each clip."""
    by_package = defaultdict(list)
    for sound in sounds:
        by_package[sound["package"]].append(sound)
    lines = [HEAD.format(count=len(sounds), minutes=sum(sound["seconds"] for sound in sounds) / 60).rstrip("\n")]
    for licence, (title, link) in LICENCES.items():
        number = sum(sound["licence"] == licence for sound in sounds)
        lines.append(f"| {licence} | {number} | [{title}]({link}) |")
    for package, clips in by_package.items():
        title, link = PACKAGES[package]
        lines += ["", f"## {title}", "", f"`{package}`, <{link}>, {len(clips)} clips.", ""]
        lines += ["| Clip | Original file | Author | Licence |", "|---|---|---|---|"]
        lines += [f"| {clip['file']} | {clip['source_file']} | {_author(clip)} | {clip['licence']} |" for clip in clips]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _author(clip: Sound) -> str:
    author = clip["author"].replace("|", "\\|")
    return f"{author}, <{clip['origin']}>" if "origin" in clip else author
