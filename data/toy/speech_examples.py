"""Generates questions and answers about the spoken clips, in the format of OpenASQA, and audio.

`input` is the transcript that the model reads next to the audio: the reference text, "" for none,
or, if the key is absent, the transcript by Whisper.

A changed version of a clip is played up to 12 % faster or slower, at another level. This moves the
pitch, the speed and the resonances of the voice together, so pitch and speed are named again.
Questions about the transcript use the unchanged clip only.
"""

from collections.abc import Callable
from random import Random

import numpy as np
import torch
import torchaudio.functional

from data import closed_qa
from data.toy.sound_clips import read_json
from data.toy.sound_examples import PREFIX_FRACTION
from data.toy.speech_clips import SPEECH, Clip, pitch_and_speed
from ltu.data.audio import SAMPLING_RATE, load_audio

QUESTIONS = read_json("speech/questions.json")
DATASET = "toy_speech"
TASKS = ("speech_gender", "speech_pitch", "speech_speed", "spoken_text", "speech_joint")
# Tasks whose answer repeats the transcript, so that `input` is never empty.
TRANSCRIPT_TASKS = ("spoken_text", "speech_joint")
# Fraction of the speech examples of a stage with an empty `input`. Half of the others contain the
# text of the clip; the rest have no `input`, unless their audio was rendered for training.
EMPTY_FRACTION = 0.3
# Speeds of the changed versions. Without them, the model would memorise the four voices.
PERCENT = (88, 91, 94, 97, 103, 106, 109, 112)
LOUDEST = 0.98

# {"audio_id", "factor"}: a file, and how many times as fast as the committed clip it is played.
Version = dict


def change(clip: Clip, rng: Random) -> tuple[np.ndarray, dict]:
    """Render a version of a clip at another speed and level.

    Returns:
        waveform at 16 kHz, (samples,), and its provenance.
    """
    percent = rng.choice(PERCENT)
    waveform = torch.from_numpy(load_audio(SPEECH / clip["file"]))
    waveform = torchaudio.functional.resample(
        waveform, SAMPLING_RATE // 100 * percent, SAMPLING_RATE
    ).numpy()
    gain = min(10 ** (rng.uniform(-12.0, 3.0) / 20), LOUDEST / float(np.abs(waveform).max()))
    part = {"clip": clip["file"], "start": 0, "samples": len(waveform), "gain": gain, "at": 0}
    return waveform * np.float32(gain), {"kind": "speech", "factor": percent / 100, "parts": [part]}


def make_row(
    task: str, clip: Clip, version: Version, cuts: dict, rng: Random, phrasing: str = "train"
) -> dict:
    """Return an example without `input`, which `with_transcript` adds.

    Args:
        task: one of TASKS.
        clip: the committed clip.
        version: the clip itself (factor 1) or a changed version of it.
        cuts: of `speech.cut_offs`.
        rng: draws the question and the answer.
        phrasing: "train" or "test", the list that the question is drawn from.
    """
    pitch, speed = pitch_and_speed(clip, version["factor"], cuts)
    fields = {
        "text": clip["text"],
        "pitch": pitch,
        "speed": speed,
        "Gender": clip["gender"].capitalize(),
        "person": {"female": "woman", "male": "man"}[clip["gender"]],
    }
    if task in QUESTIONS["open"]:
        texts = QUESTIONS["open"][task]
        question = rng.choice(texts[phrasing])
        answer = rng.choice(texts["answers"]).format(**fields)
    else:
        question, answer = closed_qa.make_question(
            QUESTIONS["closed"][task][phrasing],
            QUESTIONS["answers"][task],
            fields,
            rng,
            PREFIX_FRACTION,
        )
    row = closed_qa.make_row(question, answer, version["audio_id"], DATASET, task, None)
    return row | {"voice": clip["voice"]}


def is_rendered(row: dict) -> bool:
    """Return whether the audio of an example was rendered for training."""
    return row["audio_id"].startswith("audio/")


def with_transcript(row: dict, text: str | None) -> dict:
    """Return the example with this `input` as its second key; None leaves the key out."""
    first = {"instruction": row["instruction"]}
    if text is not None:
        first["input"] = text
    rest = {key: value for key, value in row.items() if key != "instruction"}
    return first | rest


def spread(clips: list[Clip], count: int, key: Callable, rng: Random) -> list[Clip]:
    """Return `count` clips in random order.

    Every value of `key(clip)` is as frequent as the others, and so is every clip of a value.
    """
    groups: dict = {}
    for clip in clips:
        groups.setdefault(key(clip), []).append(clip)
    queues = []
    for name in sorted(groups):
        group = groups[name]
        rounds = -(-count // (len(groups) * len(group)))
        queue = []
        for _ in range(rounds):
            queue += rng.sample(group, len(group))
        queues.append(queue)
    # If the number of values does not divide `count`, another value is first each time.
    rng.shuffle(queues)
    chosen = []
    for number in range(count):
        queue = queues[number % len(queues)]
        chosen.append(queue[number // len(queues)])
    rng.shuffle(chosen)
    return chosen


def stage_rows(
    fractions: dict[str, float],
    count: int,
    clips: list[Clip],
    versions: dict[str, list[Version]],
    cuts: dict,
    rng: Random,
) -> list[dict]:
    """Return `count` examples about speech, shuffled.

    Args:
        fractions: task -> fraction of the examples.
        count: number of examples.
        clips: training clips.
        versions: file -> the committed clip first, then its changed versions.
        cuts: of `speech.cut_offs`.
        rng: draws everything.
    """
    tasks = []
    for task, fraction in fractions.items():
        tasks += [task] * round(fraction * count)
    tasks = tasks[:count]
    tasks += [next(iter(fractions))] * (count - len(tasks))

    rows = []
    texts = []
    for task in fractions:
        # Balance the answers of a task. Its training voices are two women and two men.
        balanced = {"speech_pitch": "pitch", "speech_speed": "speed"}.get(task, "voice")
        chosen = spread(clips, tasks.count(task), lambda clip, key=balanced: clip[key], rng)
        for clip in chosen:
            own = versions[clip["file"]]
            version = own[0] if task in TRANSCRIPT_TASKS else rng.choice(own)
            rows.append(make_row(task, clip, version, cuts, rng))
            texts.append(clip["text"])

    # Draw which examples have an empty `input`, and which of the others contain the text.
    can_be_empty = [i for i, row in enumerate(rows) if row["task"] not in TRANSCRIPT_TASKS]
    num_empty = min(len(can_be_empty), round(EMPTY_FRACTION * count))
    empty = set(rng.sample(can_be_empty, num_empty))
    rest = [i for i in range(count) if i not in empty]
    with_text = set(rng.sample(rest, len(rest) // 2))
    complete = []
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        transcript = None
        if i in empty:
            transcript = ""
        # Whisper does not transcribe what was rendered for training: it gets the text of the clip.
        elif i in with_text or is_rendered(row):
            transcript = text
        complete.append(with_transcript(row, transcript))
    rng.shuffle(complete)
    return complete


def heldout_rows(
    clips: list[Clip], known: set[str], audio_id: Callable[[Clip], str], cuts: dict, name: str
) -> dict[str, list[dict]]:
    """Return the test questions: file name (without .json) -> examples.

    Args:
        clips: held-out clips.
        known: voices of the training clips. There are no questions about their gender.
        audio_id: clip -> its `audio_id`.
        cuts: of `speech.cut_offs`.
        name: of the random streams.
    """
    names = (
        "speech_gender",
        "speech_gender_empty",
        "speech_words_right",
        "speech_words_whisper",
        "speech_words_wrong",
        "speech_words_none",
        "speech_pitch",
        "speech_speed",
    )
    files: dict[str, list[dict]] = {file: [] for file in names}
    for clip in clips:
        rng = Random(f"{name}/heldout/{clip['file']}")
        version = {"audio_id": audio_id(clip), "factor": 1.0}
        rows = {task: make_row(task, clip, version, cuts, rng, "test") for task in TASKS}
        text = clip["text"]
        wrong = rng.choice([other["text"] for other in clips if other["text"] != text])
        transcripts = {"right": text, "whisper": None, "wrong": wrong, "none": ""}
        for kind, transcript in transcripts.items():
            row = with_transcript(rows["spoken_text"], transcript)
            files[f"speech_words_{kind}"].append(row)
        for task in ("speech_pitch", "speech_speed"):
            files[task].append(with_transcript(rows[task], text))
        if clip["voice"] not in known:
            files["speech_gender"].append(with_transcript(rows["speech_gender"], text))
            files["speech_gender_empty"].append(with_transcript(rows["speech_gender"], ""))
    return files
