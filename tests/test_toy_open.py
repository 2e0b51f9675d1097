"""Tests the scores of answers to open-ended questions, and of losses, in the toy table."""

import json
from pathlib import Path
from random import Random

import pytest

from data.toy import sound_examples
from eval.scorer_interface import EvaluationError
from eval.toy import Mean, Toy, evaluate, format_table, main
from eval.toy_open import Mentions, is_sentence
from tests.test_toy_eval import perfect, write_fold

TOY = Toy.load()


def sounds_by_label() -> dict[str, dict]:
    return {clip["label"]: clip for clip in TOY.clips.values()}


@pytest.mark.parametrize("task", sound_examples.OPEN_TASKS)
def test_every_answer_of_the_data_is_a_sentence_that_names_its_own_category_only(task):
    for clip in sounds_by_label().values():
        for number in range(40):
            example = sound_examples.make_example(task, [clip], "clip", Random(number))
            answer = example["output"]
            assert TOY.mentions.categories(answer) == {clip["category"]}, answer
            assert is_sentence(answer, TOY.closed_prefixes), answer


def test_longer_phrases_win_and_parts_of_words_are_no_phrases():
    mentions = Mentions({"steam": "ambience", "a steam train": "vehicles", "a fly": "animals"})
    assert mentions.categories("I hear A Steam Train.") == {"vehicles"}
    assert mentions.categories("One hears steam and a fly.") == {"ambience", "animals"}
    assert mentions.categories("Steamy; a flying thing") == set()
    assert mentions.categories("The steam train passes some flys.") == {"vehicles", "animals"}


@pytest.mark.parametrize(
    "answer",
    ["Labels: dog; animals.", " labels: dog; animals.", "Audio caption: A dog barks twice.", ""]
    + ["dog; animals; bark; loud.", "loud and short -> dog."]
    + ["First: dog; second: bell.", "Order: dog; bell.", "A dog.", "It is a dog that barks"],
)
def test_what_is_no_sentence(answer):
    assert not is_sentence(answer, TOY.closed_prefixes)


def open_answers(fold: int, texts: list[str]) -> list[dict]:
    """Return an answer about each held-out clip, the texts in turn."""
    answers = []
    for number, answer in enumerate(perfect(fold)):
        answers.append(answer | {"pred": texts[number % len(texts)], "ref": "A sentence."})
    return answers


def write(folder: Path, name: str, content: list[dict]) -> None:
    (folder / "stage1_name" / f"{name}.json").write_text(json.dumps(content))


def phrase_of(prediction: dict) -> str:
    clip = TOY.clips[Path(prediction["audio_id"]).name]
    return sound_examples.VOCABULARY["labels"][clip["label"]]["phrase"]


def test_open_answers_that_fit_the_own_label(tmp_path):
    folder = write_fold(tmp_path, 0, stages=1)
    answers = open_answers(0, ["?"])
    for number, answer in enumerate(answers):
        answer["pred"] = f"Answer {number}: this is {phrase_of(answer)}."
    write(folder, "open", answers)
    row = evaluate([folder], None).rows[0]
    assert row.sentences.fraction == row.own_label.fraction == row.open_right.fraction == 1
    assert row.distinct.fraction == 1
    assert row.top_five.part == 5


def test_open_answers_about_another_sound_than_the_own_label(tmp_path):
    folder = write_fold(tmp_path, 0, stages=1)
    # The label of every clip is read as "dog", and the sentence names the right sound.
    labels = [answer | {"pred": "Labels: dog; animals."} for answer in perfect(0)]
    write(folder, "right", labels)
    answers = open_answers(0, ["?"])
    for answer in answers:
        answer["pred"] = f"This is clearly {phrase_of(answer)}."
    write(folder, "open", answers)
    row = evaluate([folder], None).rows[0]
    num_animals = sum(TOY.clips[file]["category"] == "animals" for file in TOY.folds[0])
    assert row.own_label.right == num_animals
    assert row.open_right.fraction == 1


def test_an_unreadable_own_label_fits_no_open_answer(tmp_path):
    folder = write_fold(tmp_path, 0, stages=1)
    write(folder, "right", [answer | {"pred": "no idea"} for answer in perfect(0)])
    write(folder, "open", open_answers(0, ["I can hear nothing there."]))
    assert evaluate([folder], None).rows[0].own_label.right == 0


def test_stock_sentences_and_label_lists(tmp_path):
    folder = write_fold(tmp_path, 0, stages=1)
    stock = ["It is a dog, and it barks.", "It is  A DOG, and it barks.", "Labels: dog; animals."]
    write(folder, "open", open_answers(0, stock))
    table = evaluate([folder], None)
    row = table.rows[0]
    assert row.distinct.part == 2
    assert row.top_five.fraction == 1
    assert row.sentences.right == sum(number % 3 < 2 for number in range(34))
    assert "Open-ended questions" in format_table(table)


def test_a_missing_open_answer_counts_as_wrong(tmp_path):
    folder = write_fold(tmp_path, 0, stages=1)
    answers = open_answers(0, ["It is a dog, and it barks."])
    answers[0] |= {"pred": "", "status": "missing"}
    write(folder, "open", answers)
    assert evaluate([folder], None).rows[0].sentences.right == 33


def test_open_answers_about_other_clips_are_an_error(tmp_path):
    folder = write_fold(tmp_path, 0, stages=1)
    write(folder, "open", open_answers(0, ["It is a dog."])[::-1])
    with pytest.raises(EvaluationError, match="open.json does not have the clips of right.json"):
        evaluate([folder], None)


def test_losses_are_compared_clip_by_clip(tmp_path):
    folder = write_fold(tmp_path, 0, stages=1)
    losses = {"right": 1.0, "wrong": 1.5, "none": 3.0}
    for condition, loss in losses.items():
        entries = []
        for number, answer in enumerate(perfect(0)):
            # A large difference between the clips, which cancels in the difference.
            entries.append(answer | {"loss": loss + number, "num_tokens": 5})
        write(folder, f"loss_{condition}", entries)
    table = evaluate([folder], None)
    row = table.rows[0]
    assert row.loss_right.mean == pytest.approx(1.0 + 33 / 2)
    assert (row.loss_gain.mean, row.loss_gain.low) == pytest.approx((0.5, 0.5))
    assert "nats per token" in format_table(table)


@pytest.mark.parametrize(
    ("loss_wrong", "error"),
    [(1.5, None), (1.0, "uses nothing of the audio"), (0.5, "uses nothing of the audio")],
)
def test_a_model_that_uses_nothing_of_the_audio_fails(tmp_path, loss_wrong, error):
    folder = write_fold(tmp_path, 0, stages=1)
    argv = ["--folds", str(folder), "--no_probe", "--require_audio"]
    with pytest.raises(EvaluationError, match="stage1 has no losses"):
        main(argv)
    for condition, loss in {"right": 1.0, "wrong": loss_wrong, "none": 3.0}.items():
        entries = [answer | {"loss": loss, "num_tokens": 5} for answer in perfect(0)]
        write(folder, f"loss_{condition}", entries)
    if error is None:
        main(argv)
        return
    with pytest.raises(EvaluationError, match=error):
        main(argv)
    main(argv[:-1])  # Without the flag, the table is all that is wanted.


def test_losses_of_other_answers_are_an_error(tmp_path):
    folder = write_fold(tmp_path, 0, stages=1)
    for condition in ("right", "wrong", "none"):
        write(folder, f"loss_{condition}", [{"ref": "A dog.", "loss": 1.0}])
    with pytest.raises(EvaluationError, match="loss_right.json does not have the questions"):
        evaluate([folder], None)


def test_mean_against_a_known_interval():
    # Standard deviation 1 of 4 values: 1.96 / 2 at either side.
    values = [0.0, 0.0, 3**0.5, 3**0.5]
    mean = Mean.of(values)
    assert (mean.mean, mean.high - mean.mean) == pytest.approx((3**0.5 / 2, 0.98))
