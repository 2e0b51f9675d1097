"""Generates questions and answers about the toy sounds, in the format of OpenAQA.

`data.closed_qa` fills the templates of this dataset: `questions.json` (questions and answers) and
`labels.json` (texts for each label and category). An answer says what the manifest says about the
clip or what is true for every sound of its category; nothing is made up. The questions for training
and those for the test have no question in common.
"""

from collections import defaultdict
from pathlib import Path
from random import Random

from data import closed_qa
from data.toy.sound_clips import AUDIO, Sound, read_json
from data.toy.training_audio import AudioPools, committed_id, sample_sounds

QUESTIONS = read_json("questions.json")
VOCABULARY = read_json("labels.json")
DATASET = "toy_sounds"
PREFIX_FRACTION = 0.5  # Half of the closed-ended questions have the prefix, as in OpenAQA.
MIXTURE_TASKS = ("caption_mixture", "how_many")
PAIR_TASKS = ("temporal_first", "temporal_order")
OPEN_TASKS = tuple(task for task in QUESTIONS["open"] if task not in MIXTURE_TASKS)
# Fraction of each task in a stage. As in the paper, stages 1 and 2 have classification, stage 3 has
# all closed-ended questions and stage 4 has all questions. There, two thirds of the paper's are
# open-ended; with so few examples, a half keeps what the stages before have learned.
OPEN_FRACTION = 0.5
OPEN = {task: OPEN_FRACTION / (len(OPEN_TASKS) + 1) for task in (*OPEN_TASKS, "how_many")}
CLASSIFY = {"cla_label": 0.75, "cla_label_des": 0.25}
CLOSED = {
    "cla_label": 0.5,
    "cla_label_des": 0.15,
    "caption": 0.1,
    "caption_mixture": 0.05,
    "temporal_first": 0.1,
    "temporal_order": 0.1,
}
STAGES = {
    1: CLASSIFY,
    2: CLASSIFY,
    3: CLOSED,
    4: {task: (1 - OPEN_FRACTION) * fraction for task, fraction in CLOSED.items()} | OPEN,
}
# Task of each example that the demo shows.
SHOWN = ("cla_label", "cla_label_des", "caption", "identify_why", "scene")


def make_example(
    task: str, sounds: list[Sound], audio_id: str, rng: Random, phrasing: str = "train"
) -> dict[str, str]:
    """Return an example about a clip of one sound, or of two for the tasks on mixtures and pairs.

    Args:
        task: a closed-ended one ("cla_label", "cla_label_des", "caption", "caption_mixture",
            "temporal_first", "temporal_order") or an open one (a key of "open" in questions.json).
        sounds: the sounds of the clip, in the order of time for a pair.
        audio_id: of the clip.
        rng: selects the question and the answer.
        phrasing: "train" or "test", the list that the question is from.
    """
    fields = _fields(sounds, rng)
    if task in QUESTIONS["open"]:
        question, answer = _open_question(task, sounds[0], fields, rng, phrasing)
    else:
        question, answer = closed_question(QUESTIONS, task, fields, rng, phrasing)
    return closed_qa.make_example(question, answer, audio_id, DATASET, task)


def closed_question(
    texts: dict, task: str, fields: dict[str, str], rng: Random, phrasing: str
) -> tuple[str, str]:
    """Return a closed-ended question and its answer.

    Args:
        texts: a file of questions: "closed" -> task -> phrasing -> questions, "answers" -> task.
        task: of the question; a caption of a mixture has the questions of a caption.
        fields: fill question and answer.
        rng: selects the question.
        phrasing: "train" or "test", the list that the question is from.
    """
    kind = "caption" if task == "caption_mixture" else task
    questions = texts["closed"][kind][phrasing]
    answer = texts["answers"][task]
    return closed_qa.make_question(questions, answer, fields, rng, PREFIX_FRACTION)


def _fields(sounds: list[Sound], rng: Random) -> dict[str, str]:
    """Return all fields of an answer; those of the second sound begin with `other_`."""
    fields = {}
    for prefix, sound in zip(("", "other_"), sounds, strict=False):
        label = VOCABULARY["labels"][sound["label"]]
        category = VOCABULARY["categories"][sound["category"]]
        for key in ("label", "category", "caption"):
            fields[prefix + key] = sound[key]
        for key in ("kind", "reason", "place", "meaning"):
            fields[prefix + key] = category[key]
        fields[prefix + "phrase"] = label["phrase"]
        fields[prefix + "description"] = rng.choice(label["descriptions"])
    return fields


def _open_question(
    task: str, sound: Sound, fields: dict[str, str], rng: Random, phrasing: str
) -> tuple[str, str]:
    """Return an open question and its answer."""
    texts = QUESTIONS["open"][task]
    question = rng.choice(texts[phrasing])
    if task != "yes_no":
        return question, rng.choice(texts["answers"]).format(**fields)
    is_yes = rng.random() < 0.5
    category = sound["category"]
    if not is_yes:
        # Only for some categories is "no" certain: a ship's horn is an alert of a kind.
        category = rng.choice(VOCABULARY["categories"][category]["certainly_not"])
    answers = texts["answers_yes" if is_yes else "answers_no"]
    question = question.format(question=VOCABULARY["categories"][category]["question"])
    return question, rng.choice(answers).format(**fields)


def tasks_of(fractions: dict[str, float], count: int) -> list[str]:
    """Return the task of each of `count` examples; rounding adds to or takes from the ends.

    Args:
        fractions: task -> fraction of the examples.
        count: number of examples.
    """
    tasks = []
    for task, fraction in fractions.items():
        tasks += [task] * round(fraction * count)
    tasks = tasks[:count]
    first_task = next(iter(fractions))
    return tasks + [first_task] * (count - len(tasks))


def without_descriptions(fractions: dict[str, float]) -> dict[str, float]:
    """Return the fractions of tasks if labels are asked for without a description."""
    changed = dict(fractions)
    changed["cla_label"] += changed.pop("cla_label_des")
    return changed


def stage_examples(
    fractions: dict[str, float], count: int, sounds: list[Sound], pools: AudioPools, rng: Random
) -> list[dict]:
    """Return `count` examples of the tasks of a stage, shuffled.

    Args:
        fractions: task -> fraction of the examples, such as `STAGES[stage]`.
        count: number of examples.
        sounds: training sounds.
        pools: their audio.
        rng: the only random generator that is used.
    """
    tasks = tasks_of(fractions, count)
    examples = []
    singles = [task for task in tasks if task not in MIXTURE_TASKS + PAIR_TASKS]
    rng.shuffle(singles)
    for task, sound in zip(singles, sample_sounds(sounds, len(singles), rng), strict=True):
        audio_id = rng.choice(pools.crops[sound["file"]])
        examples.append(make_example(task, [sound], audio_id, rng))
    for pool, tasks_of_two in ((pools.mixtures, MIXTURE_TASKS), (pools.pairs, PAIR_TASKS)):
        start = rng.randrange(len(pool))
        selected = [task for task in tasks if task in tasks_of_two]
        for number, task in enumerate(selected):
            audio_id, two = pool[(start + number) % len(pool)]
            examples.append(make_example(task, list(two), audio_id, rng))
    rng.shuffle(examples)
    return examples


def heldout_examples(heldout: list[Sound], folder: Path, name: str) -> dict[str, list[dict]]:
    """Return the test questions: file name (without .json) -> examples.

    The questions are the same with the right clip, with a clip of another category and without
    audio. The reference is always that of the right clip, so that an answer that is right with a
    wrong clip was guessed.

    Args:
        heldout: held-out clips.
        folder: folder of the examples.
        name: of the random streams.
    """
    right = []
    wrong = []
    none = []
    for sound in heldout:
        rng = Random(f"{name}/heldout/{sound['file']}")
        example = make_example(
            "cla_label", [sound], committed_id(sound, AUDIO, folder), rng, "test"
        )
        other = rng.choice([clip for clip in heldout if clip["category"] != sound["category"]])
        right.append(example)
        wrong.append(example | {"audio_id": committed_id(other, AUDIO, folder)})
        none.append(example | {"audio_id": "empty"})

    # Ask one open-ended question about each clip, each task as often as the others.
    open_questions = []
    for number, sound in enumerate(heldout):
        rng = Random(f"{name}/open/{sound['file']}")
        task = OPEN_TASKS[number % len(OPEN_TASKS)]
        audio_id = committed_id(sound, AUDIO, folder)
        open_questions.append(make_example(task, [sound], audio_id, rng, "test"))

    # Select the sounds of the demo, each of another category, and then their questions.
    rng = Random(f"{name}/show")
    by_category = defaultdict(list)
    for sound in heldout:
        by_category[sound["category"]].append(sound)
    categories = rng.sample(sorted(by_category), len(SHOWN))
    shown = [rng.choice(by_category[category]) for category in categories]
    show = []
    for task, sound in zip(SHOWN, shown, strict=True):
        show.append(make_example(task, [sound], committed_id(sound, AUDIO, folder), rng, "test"))
    return {
        "heldout_right": right,
        "heldout_wrong": wrong,
        "heldout_none": none,
        "heldout_open": open_questions,
        "heldout_show": show,
    }
