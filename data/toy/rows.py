"""Questions and answers about the toy sounds, in the OpenAQA row format.

Notable:
- Rows are made by `data.closed_qa`, of words that are this set's own: `questions.json` (questions, answer formats) and
  `labels.json` (labels and categories in words).
- An answer says what the manifest says of the clip or what holds for every sound of its category; nothing is made up.
- Questions come in two lists, for training and for test, which have no question in common.
"""

from random import Random

from data import closed_qa
from data.toy.sounds import Sound, read_json

QUESTIONS = read_json("questions.json")
WORDS = read_json("labels.json")
DATASET = "toy_sounds"
PREFIX_SHARE = 0.5  # half of the closed-ended questions carry the prefix, as in OpenAQA
MIXTURE_TASKS = ("caption_mixture", "how_many")
PAIR_TASKS = ("temporal_first", "temporal_order")
OPEN_TASKS = tuple(task for task in QUESTIONS["open"] if task not in MIXTURE_TASKS)


def make_row(
    task: str, sounds: list[Sound], audio_id: str, rng: Random, phrasing: str = "train"
) -> dict[str, str]:
    """A row about a clip of one sound, or of two for the tasks on mixtures and pairs.

    Args:
        task: a closed-ended one ("cla_label", "cla_label_des", "caption", "caption_mixture", "temporal_first",
            "temporal_order") or an open one (a key of "open" in questions.json).
        sounds: the sounds of the clip, in the order of time for a pair.
        phrasing: "train" or "test": which list the question is drawn from.
    """
    words = _words(sounds, rng)
    if task in QUESTIONS["open"]:
        asked = _open(task, sounds[0], words, rng, phrasing)
    else:
        questions = QUESTIONS["closed"]["caption" if task == "caption_mixture" else task][phrasing]
        asked = closed_qa.ask(questions, QUESTIONS["answers"][task], words, rng, PREFIX_SHARE)
    return closed_qa.make_row(asked, audio_id, DATASET, task)


def _words(sounds: list[Sound], rng: Random) -> dict[str, str]:
    """Everything that an answer may say; the second sound's words begin with `other_`."""
    words = {}
    for prefix, sound in zip(("", "other_"), sounds, strict=False):
        label, category = WORDS["labels"][sound["label"]], WORDS["categories"][sound["category"]]
        about = {key: sound[key] for key in ("label", "category", "caption")}
        about |= {key: category[key] for key in ("kind", "reason", "place", "meaning")}
        about |= {"phrase": label["phrase"], "description": rng.choice(label["descriptions"])}
        words |= {prefix + key: value for key, value in about.items()}
    return words


def _open(
    task: str, sound: Sound, words: dict[str, str], rng: Random, phrasing: str
) -> tuple[str, str]:
    texts = QUESTIONS["open"][task]
    question = rng.choice(texts[phrasing])
    if task != "yes_no":
        return question, rng.choice(texts["answers"]).format(**words)
    is_yes = rng.random() < 0.5
    # "No" is due only to categories that the sound certainly does not belong to: a ship's horn is an alert of a kind.
    asked = (
        sound["category"]
        if is_yes
        else rng.choice(WORDS["categories"][sound["category"]]["certainly_not"])
    )
    answers = texts["answers_yes" if is_yes else "answers_no"]
    return question.format(question=WORDS["categories"][asked]["question"]), rng.choice(
        answers
    ).format(**words)
