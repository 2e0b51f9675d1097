"""Generates questions and answers about the toy sounds, in the format of OpenAQA.

`data.closed_qa` fills the templates of this dataset: `questions.json` (questions and answers) and
`labels.json` (texts for each label and category). An answer says what the manifest says about the
clip or what is true for every sound of its category; nothing is made up. The questions for training
and those for the test have no question in common.
"""

from random import Random

from data import closed_qa
from data.toy.sound_clips import Sound, read_json

QUESTIONS = read_json("questions.json")
VOCABULARY = read_json("labels.json")
DATASET = "toy_sounds"
PREFIX_FRACTION = 0.5  # Half of the closed-ended questions have the prefix, as in OpenAQA.
MIXTURE_TASKS = ("caption_mixture", "how_many")
PAIR_TASKS = ("temporal_first", "temporal_order")
OPEN_TASKS = tuple(task for task in QUESTIONS["open"] if task not in MIXTURE_TASKS)


def make_row(
    task: str, sounds: list[Sound], audio_id: str, rng: Random, phrasing: str = "train"
) -> dict[str, str]:
    """Return an example about a clip of one sound, or of two for the tasks on mixtures and pairs.

    Args:
        task: a closed-ended one ("cla_label", "cla_label_des", "caption", "caption_mixture",
            "temporal_first", "temporal_order") or an open one (a key of "open" in questions.json).
        sounds: the sounds of the clip, in the order of time for a pair.
        audio_id: of the clip.
        rng: draws the question and the answer.
        phrasing: "train" or "test", the list that the question is drawn from.
    """
    fields = _fields(sounds, rng)
    if task in QUESTIONS["open"]:
        question, answer = _open_question(task, sounds[0], fields, rng, phrasing)
    else:
        kind = "caption" if task == "caption_mixture" else task
        question, answer = closed_qa.make_question(
            QUESTIONS["closed"][kind][phrasing],
            QUESTIONS["answers"][task],
            fields,
            rng,
            PREFIX_FRACTION,
        )
    return closed_qa.make_row(question, answer, audio_id, DATASET, task)


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
