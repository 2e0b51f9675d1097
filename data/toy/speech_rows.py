"""Questions and answers about the spoken clips, in the OpenASQA row format, and their training audio.

Notable:
- `input` holds the words that the model reads beside the sound: the reference text, "" for none, or, where the key is
  absent, what Whisper makes of the clip.
- A changed version of a clip is played up to 6 % faster or slower, which moves pitch, speed and the resonances of the
  voice together, at another level. Its pitch and speed are named anew. Questions about the words keep to the clip.
"""

from random import Random

import numpy as np
import torch
import torchaudio.functional

from data import closed_qa
from data.toy.rows import PREFIX_SHARE
from data.toy.sounds import read_json
from data.toy.speech import SPEECH, Clip, pitch_and_speed
from ltu.data.audio import SAMPLING_RATE, load_audio

QUESTIONS = read_json("speech/questions.json")
DATASET = "toy_speech"
TASKS = ("speech_gender", "speech_pitch", "speech_speed", "spoken_text", "speech_joint")
WORD_TASKS = (
    "spoken_text",
    "speech_joint",
)  # Their answers repeat the words, so that `input` is never empty.
EMPTY_SHARE = 0.3  # of the speech rows of a stage; others have the clip's text; of committed clips half have no key
PERCENT = (
    88,
    91,
    94,
    97,
    103,
    106,
    109,
    112,
)  # of the speed; four voices alone would be learned by heart
LOUDEST = 0.98

Version = dict  # {"audio_id", "factor"}: a file, and how many times as fast as the committed clip it is played


def change(clip: Clip, rng: Random) -> tuple[np.ndarray, dict]:
    """A version of a clip at another speed and level, (samples at 16 kHz,), and its recipe."""
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
    """A row without `input`; `with_words` decides on that.

    Args:
        task: one of TASKS.
        version: the clip itself (factor 1) or a changed version of it.
        cuts: of `speech.cut_offs`.
        phrasing: "train" or "test": which list the question is drawn from.
    """
    pitch, speed = pitch_and_speed(clip, version["factor"], cuts)
    words = {
        "text": clip["text"],
        "pitch": pitch,
        "speed": speed,
        "Gender": clip["gender"].capitalize(),
    }
    words["person"] = {"female": "woman", "male": "man"}[clip["gender"]]
    if task in QUESTIONS["open"]:
        texts = QUESTIONS["open"][task]
        asked = rng.choice(texts[phrasing]), rng.choice(texts["answers"]).format(**words)
    else:
        questions, answer = QUESTIONS["closed"][task][phrasing], QUESTIONS["answers"][task]
        asked = closed_qa.ask(questions, answer, words, rng, PREFIX_SHARE)
    return closed_qa.make_row(asked, version["audio_id"], DATASET, task, None) | {
        "voice": clip["voice"]
    }


def is_rendered(row: dict) -> bool:
    return row["audio_id"].startswith("audio/")


def with_words(row: dict, text: str | None) -> dict:
    """The row with this `input`, in the place where other rows have it; None leaves the key out."""
    given = {} if text is None else {"input": text}
    return {
        "instruction": row["instruction"],
        **given,
        **{key: row[key] for key in row if key != "instruction"},
    }


def spread(clips: list[Clip], count: int, key, rng: Random) -> list[Clip]:
    """`count` clips in random order: every value of `key(clip)` as often as the others, then every clip of a value."""
    groups: dict = {}
    for clip in clips:
        groups.setdefault(key(clip), []).append(clip)
    queues = []
    for name in sorted(groups):
        rounds = -(-count // (len(groups) * len(groups[name])))
        queues.append(
            [clip for _ in range(rounds) for clip in rng.sample(groups[name], len(groups[name]))]
        )
    rng.shuffle(queues)  # Where the values do not divide `count`, no value is first each time.
    drawn = [queues[number % len(queues)][number // len(queues)] for number in range(count)]
    rng.shuffle(drawn)
    return drawn


def stage_rows(
    shares: dict[str, float],
    count: int,
    clips: list[Clip],
    versions: dict[str, list[Version]],
    cuts: dict,
    rng: Random,
) -> list[dict]:
    """`count` speech rows, shuffled.

    Args:
        shares: task -> share of the rows.
        clips: training clips.
        versions: file -> the committed clip first, then its changed versions.
    """
    tasks = [task for task, share in shares.items() for _ in range(round(share * count))][:count]
    tasks += [next(iter(shares))] * (count - len(tasks))
    rows, texts = [], []
    for task in shares:
        # Balanced over what is asked for; the training voices are two women and two men.
        keys = {
            "speech_pitch": lambda clip: clip["pitch"],
            "speech_speed": lambda clip: clip["speed"],
        }
        for clip in spread(
            clips, tasks.count(task), keys.get(task, lambda clip: clip["voice"]), rng
        ):
            own = versions[clip["file"]]
            rows.append(
                make_row(task, clip, own[0] if task in WORD_TASKS else rng.choice(own), cuts, rng)
            )
            texts.append(clip["text"])
    free = [number for number, row in enumerate(rows) if row["task"] not in WORD_TASKS]
    empty = set(rng.sample(free, min(len(free), round(EMPTY_SHARE * count))))
    rest = [number for number in range(count) if number not in empty]
    given = set(rng.sample(rest, len(rest) // 2))
    rows = [
        # A version rendered for training is not transcribed: its words are the clip's.
        with_words(
            row, "" if number in empty else text if number in given or is_rendered(row) else None
        )
        for number, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]
    rng.shuffle(rows)
    return rows


def heldout_rows(
    clips: list[Clip], known: set[str], audio_id, cuts: dict, name: str
) -> dict[str, list[dict]]:
    """The questions of the test: file name (without .json) -> rows.

    Args:
        clips: held-out clips.
        known: voices of the training clips; about their gender nothing is asked.
        audio_id: clip -> its `audio_id`.
        name: of the random streams.
    """
    files: dict[str, list[dict]] = {file: [] for file in ("speech_gender", "speech_gender_empty")}
    files |= {f"speech_words_{words}": [] for words in ("right", "whisper", "wrong", "none")}
    files |= {"speech_pitch": [], "speech_speed": []}
    for clip in clips:
        rng = Random(f"{name}/heldout/{clip['file']}")
        own = {"audio_id": audio_id(clip), "factor": 1.0}
        row = {task: make_row(task, clip, own, cuts, rng, "test") for task in TASKS}
        other = rng.choice([other["text"] for other in clips if other["text"] != clip["text"]])
        inputs = {"right": clip["text"], "whisper": None, "wrong": other, "none": ""}
        for words, text in inputs.items():
            files[f"speech_words_{words}"].append(with_words(row["spoken_text"], text))
        for task in ("speech_pitch", "speech_speed"):
            files[task].append(with_words(row[task], clip["text"]))
        if clip["voice"] not in known:
            files["speech_gender"].append(with_words(row["speech_gender"], clip["text"]))
            files["speech_gender_empty"].append(with_words(row["speech_gender"], ""))
    return files
