"""Generates questions and answers about the spoken clips, in the format of OpenASQA.

`input` is the transcript that the model reads next to the audio: the reference text, "" for none,
or, if the key is absent, the transcript by Whisper.

A changed version of a clip is played up to 12 % faster or slower, at another level. This moves the
pitch, the speed and the resonances of the voice together, so pitch and speed are named again.
Questions about the transcript use the unchanged clip only.
"""

from collections.abc import Callable
from random import Random

from data import closed_qa
from data.toy.sound_clips import read_json
from data.toy.sound_examples import closed_question, tasks_of
from data.toy.speech_clips import PERSONS, Clip, cut_offs, pitch_and_speed
from data.toy.training_audio import Version

QUESTIONS = read_json("speech/questions.json")
DATASET = "toy_speech"
TASKS = ("speech_gender", "speech_pitch", "speech_speed", "spoken_text", "speech_joint")
# Fraction of each task in the examples of a stage about speech.
CLASSIFY = {"speech_gender": 0.7, "speech_pitch": 0.2, "speech_speed": 0.1}
ALL = {
    "spoken_text": 0.45,
    "speech_gender": 0.2,
    "speech_pitch": 0.1,
    "speech_speed": 0.1,
    "speech_joint": 0.15,
}
# Task -> what is equally frequent in its examples.
BALANCED = {
    "speech_gender": "voice",
    "speech_pitch": "pitch",
    "speech_speed": "speed",
    "spoken_text": "text",
    "speech_joint": "voice",
}
# Tasks whose answer repeats the transcript, so that `input` is never empty.
TRANSCRIPT_TASKS = ("spoken_text", "speech_joint")
# Fraction of the speech examples of a stage with an empty `input`. Half of the others contain the
# text of the clip; the rest have no `input`, unless their audio was rendered for training.
EMPTY_FRACTION = 0.3


def make_example(
    task: str, clip: Clip, version: Version, cuts: dict, rng: Random, phrasing: str = "train"
) -> dict:
    """Return an example without `input`, which `with_transcript` adds.

    Args:
        task: one of TASKS.
        clip: the committed clip.
        version: the clip itself (factor 1) or a changed version of it.
        cuts: of `speech_clips.cut_offs`.
        rng: selects the question and the answer.
        phrasing: "train" or "test", the list that the question is from.
    """
    pitch, speed = pitch_and_speed(clip, version.factor, cuts)
    fields = {
        "text": clip["text"],
        "pitch": pitch,
        "speed": speed,
        "Gender": clip["gender"].capitalize(),
        "person": PERSONS[clip["gender"]],
    }
    if task in QUESTIONS["open"]:
        texts = QUESTIONS["open"][task]
        question = rng.choice(texts[phrasing])
        answer = rng.choice(texts["answers"]).format(**fields)
    else:
        question, answer = closed_question(QUESTIONS, task, fields, rng, phrasing)
    return closed_qa.make_example(question, answer, version.audio_id, DATASET, task, None)


def is_rendered(example: dict) -> bool:
    """Return whether the audio of an example was rendered for training."""
    return example["audio_id"].startswith("audio/")


def with_transcript(example: dict, text: str | None) -> dict:
    """Return the example with this `input` as its second key; None leaves the key out."""
    first = {"instruction": example["instruction"]}
    if text is not None:
        first["input"] = text
    rest = {key: value for key, value in example.items() if key != "instruction"}
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


def stage_examples(
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
        cuts: of `speech_clips.cut_offs`.
        rng: the only random generator that is used.
    """
    tasks = tasks_of(fractions, count)
    examples = []
    texts = []
    for task in fractions:
        # Balance the answers of a task. As many training voices are women as men.
        chosen = spread(clips, tasks.count(task), lambda clip, key=BALANCED[task]: clip[key], rng)
        for clip in chosen:
            own = versions[clip["file"]]
            version = own[0] if task in TRANSCRIPT_TASKS else rng.choice(own)
            examples.append(make_example(task, clip, version, cuts, rng))
            texts.append(clip["text"])

    # Select the examples that have an empty `input`, and those of the others that contain the text.
    can_be_empty = [
        i for i, example in enumerate(examples) if example["task"] not in TRANSCRIPT_TASKS
    ]
    num_empty = min(len(can_be_empty), round(EMPTY_FRACTION * count))
    empty = set(rng.sample(can_be_empty, num_empty))
    rest = [i for i in range(count) if i not in empty]
    with_text = set(rng.sample(rest, len(rest) // 2))
    complete = []
    for i, (example, text) in enumerate(zip(examples, texts, strict=True)):
        transcript = None
        if i in empty:
            transcript = ""
        # Whisper does not transcribe what was rendered for training: it gets the text of the clip.
        elif i in with_text or is_rendered(example):
            transcript = text
        complete.append(with_transcript(example, transcript))
    rng.shuffle(complete)
    return complete


def heldout_examples(
    clips: list[Clip], versions: dict[str, list[Version]], name: str
) -> dict[str, list[dict]]:
    """Return the test questions: file name (without .json) -> examples.

    There are no questions about the gender of a voice that is in the training clips.

    Args:
        clips: all spoken clips.
        versions: file -> the committed clip first.
        name: of the random streams.
    """
    cuts = cut_offs(clips)
    test_clips = []
    known_voices = set()
    for clip in clips:
        if clip["split"] == "test":
            test_clips.append(clip)
        else:
            known_voices.add(clip["voice"])
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
    for clip in test_clips:
        rng = Random(f"{name}/heldout/{clip['file']}")
        version = versions[clip["file"]][0]
        examples = {task: make_example(task, clip, version, cuts, rng, "test") for task in TASKS}
        text = clip["text"]
        wrong = rng.choice([other["text"] for other in test_clips if other["text"] != text])
        transcripts = {"right": text, "whisper": None, "wrong": wrong, "none": ""}
        for kind, transcript in transcripts.items():
            example = with_transcript(examples["spoken_text"], transcript)
            files[f"speech_words_{kind}"].append(example)
        for task in ("speech_pitch", "speech_speed"):
            files[task].append(with_transcript(examples[task], text))
        if clip["voice"] not in known_voices:
            files["speech_gender"].append(with_transcript(examples["speech_gender"], text))
            files["speech_gender_empty"].append(with_transcript(examples["speech_gender"], ""))
    return files
