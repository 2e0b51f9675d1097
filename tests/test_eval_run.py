"""Asking, scoring and reporting in one command: what is resumed, counted, refused, and that it repeats."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from eval import embed, generate_predictions, report, run
from eval.generate_predictions import inference_flags
from eval.score_result import Outcome
from eval.tasks import find_task
from ltu.inference.engine import LtuEngine
from ltu.inference.generation_flags import open_engine
from ltu.inference.predictions_file import AnswerFile
from ltu.inference.requests import Request
from tests.test_eval_questions import Stub
from tests.tiny import LORA, clip, write_checkpoint, write_llm

GENRES = [
    "Hip-Hop",
    "Reggae",
    "Rock",
    "Country",
    "Jazz",
    "Blues",
    "Pop",
    "Disco",
    "Metal",
    "Classical",
]
ASKING = ["--device", "cpu", "--max_new_tokens", "6", "--batch_size", "2"]


class Killed(BaseException):
    pass


def run_killed(argv: list[str], monkeypatch) -> None:
    """Run a command that dies when the third batch of answers is to be kept."""
    stock, count = AnswerFile.append, 0

    def append(*args) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise Killed
        stock(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AnswerFile, "append", append)
        run.main(argv)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    llm = write_llm(tmp_path_factory.mktemp("llm") / "llm")
    return write_checkpoint(llm.parent / "checkpoint", llm, LORA)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two times the same place to stand in, a/ and b/, with five clips (of the fifth question's there is none)."""
    monkeypatch.setattr(embed, "open_embedder", lambda name, folder: Stub())
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        for number in range(4):
            soundfile.write(tmp_path / place / f"{number}.wav", clip(number), 16_000)
        write(tmp_path / place / "gtzan.json", questions(*GENRES[:5]))
    monkeypatch.chdir(tmp_path / "a")
    return tmp_path


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """For tests that look at none: drawing one takes longer than what they test."""
    monkeypatch.setattr(report, "_save", lambda figure, path: None)


def questions(*genres: str) -> list[dict]:
    return [
        {
            "instruction": "Which genre?",
            "input": "",
            "audio_id": f"{number}.wav",
            "output": f"Music genre: {genre}",
        }
        for number, genre in enumerate(genres)
    ]


def predictions(*pairs: tuple[str, str | None]) -> list[dict]:
    """(reference, answer) of each row, in the original's form: no status."""
    made = zip(questions(*(ref for ref, _ in pairs)), pairs, strict=True)
    return [
        {"prompt": q["instruction"], "pred": said, "ref": q["output"], "audio_id": q["audio_id"]}
        for q, (_, said) in made
    ]


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def result(place: str = "out", number: int = 0) -> dict:
    return json.loads(Path(place, "report.json").read_text())["results"][number]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but what ltu.inference_batch wrote, which has wall times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "asked"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- asking


def command(model: Path, *more: str) -> list[str]:
    own = [
        "--task",
        "gtzan",
        "--model",
        f"m={model}",
        "--questions",
        "gtzan.json",
        "--output_dir",
        "out",
    ]
    return [*own, *ASKING, *more]


def test_interrupted_asking_goes_on(model, folder, monkeypatch, capsys):
    """And ends with the bytes of a run that nothing interrupted."""
    monkeypatch.chdir(folder / "b")
    assert run.main(command(model)) == 1
    expected = contents(folder / "b" / "out")
    assert set(expected) == {
        "report.json", "report.md", "report.png", "m/gtzan.predictions.json", "m/gtzan.provenance.json",
        "m/gtzan.items.jsonl", "m/gtzan.confusion.png",
    }  # fmt: skip
    monkeypatch.chdir(folder / "a")
    run_killed(command(model), monkeypatch)
    capsys.readouterr()
    assert run.main(command(model)) == 1
    kept, asked = map(
        int,
        re.search(r"(\d+) from the partial file; asked (\d+)", capsys.readouterr().out).groups(),
    )
    assert kept >= 1 and asked < 5 and kept + asked == 5
    assert contents(folder / "a" / "out") == expected
    found = result()
    assert (found["asked"], found["answered"], found["failed"]) == (5, 4, {"missing": 1})
    assert (
        len(found["checkpoint"]) == 64
        and found["decoding"]["max_new_tokens"] == 6
        and found["embedder"] == "stub"
    )
    # The clip is brought: it alone is asked. Then nothing is.
    soundfile.write("4.wav", clip(4), 16_000)
    assert run.main(command(model)) == 0 and result()["failed"] == {}
    assert "4 from the partial file; asked 1" in capsys.readouterr().out
    monkeypatch.setattr(LtuEngine, "from_pretrained", None)
    whole = contents(Path("out"))
    assert run.main(command(model)) == 0 and contents(Path("out")) == whole


@pytest.mark.usefixtures("no_figures")
def test_what_decides_answers_is_asked_anew(model, folder, capsys):
    for number, row in enumerate(rows := questions(*GENRES[:4])):
        row["audio_id"] = f"{number % 2}.wav"  # Two trials.
    write(Path("gtzan.json"), rows)
    assert run.main(command(model)) == 0
    greedy = [row["pred"] for row in json.loads(Path("out/m/gtzan.predictions.json").read_text())]
    assert greedy[:2] == greedy[2:] and capsys.readouterr().out.count("from the partial file") == 1
    assert run.main(command(model, "--temperature", "2.0", "--seed", "7")) == 0
    sampled = [row["pred"] for row in json.loads(Path("out/m/gtzan.predictions.json").read_text())]
    assert sampled[0] != sampled[2] and sampled[1] != sampled[3]
    engine = open_engine(inference_flags(str(model), run.parse_args(command(model))))
    for trial in (0, 1):
        asked = [Request("Which genre?", f"{number}.wav", "", f"{number}.wav") for number in (0, 1)]
        own = engine(asked, seed=7 + trial, temperature=2.0, do_sample=True, max_new_tokens=6)
        assert [answer.text for answer in own] == sampled[2 * trial : 2 * trial + 2]
    capsys.readouterr()
    assert run.main(command(model)) == 0 and "asked 2," in capsys.readouterr().out


def ask_twice(*clips: str) -> tuple[str, ...]:
    """Each clip's question two times, so in two trials; the flags that sample."""
    rows = [
        row | {"audio_id": clip}
        for row, clip in zip(questions(*GENRES[:4]), clips * 2, strict=False)
    ]
    write(Path("gtzan.json"), rows)
    return "--temperature", "2.0"


def asked_of(capsys) -> list[str]:
    """How many questions each trial asked since the last look."""
    return re.findall(r"asked (\d+),", capsys.readouterr().out)


@pytest.mark.usefixtures("no_figures")
def test_a_trial_is_kept_when_a_later_one_is_killed(model, folder, monkeypatch, capsys):
    sampled = ask_twice("0.wav", "1.wav")
    run_killed(command(model, *sampled), monkeypatch)
    assert asked_of(capsys) == ["2"]
    assert run.main(command(model, *sampled)) == 0 and asked_of(capsys) == ["2"]


@pytest.mark.usefixtures("no_figures")
def test_max_bad_is_of_all_trials(model, folder, capsys):
    """And what was answered beside failures that are allowed is not asked again."""
    sampled = ask_twice("0.wav", "missing.wav")
    assert run.main(command(model, *sampled, "--max_bad", "1")) == 1 and asked_of(capsys) == [
        "2",
        "2",
    ]
    for _ in range(2):
        assert run.main(command(model, *sampled, "--max_bad", "2")) == 0 and asked_of(capsys) == [
            "1",
            "1",
        ]
    assert result()["failed"] == {"missing": 2}


@pytest.mark.usefixtures("no_figures")
def test_provenance_is_of_these_predictions(model, folder, monkeypatch):
    """One run, another that is killed between its answers and what says how they were asked, the first again."""
    sampled = ask_twice("0.wav", "1.wav")
    assert run.main(command(model, *sampled)) == 0
    expected, stock = contents(Path("out")), generate_predictions.write_json

    def write_json(value, path: Path) -> None:
        if path == Path("out/m/gtzan.provenance.json"):
            raise Killed
        stock(value, path)

    monkeypatch.setattr(generate_predictions, "write_json", write_json)
    with pytest.raises(Killed):
        run.main(command(model, *sampled, "--seed", "7"))
    scoring = [
        "--task",
        "gtzan",
        "--predictions",
        "out/m/gtzan.predictions.json",
        "--output_dir",
        "other",
    ]
    assert run.main(scoring) == 0 and result("other")["decoding"] == "not recorded"
    monkeypatch.setattr(generate_predictions, "write_json", stock)
    assert run.main(command(model, *sampled)) == 0 and contents(Path("out")) == expected
    assert run.main(scoring) == 0 and result("other")["decoding"]["temperature"] == 2.0


@pytest.mark.usefixtures("no_figures")
def test_another_processor_is_asked_anew(model, folder, capsys):
    own = Path(shutil.copytree(model, model.parent / "own"))
    write(Path("gtzan.json"), questions(*GENRES[:2]))
    assert run.main(command(own)) == 0 and asked_of(capsys) == ["2"]
    (own / "README.md").write_text("A card.")
    assert run.main(command(own)) == 0 and asked_of(capsys) == []
    settings = (own / "processor_config.json").read_text()
    (own / "processor_config.json").write_text(settings.replace("### Response:", "### Answer:"))
    assert run.main(command(own)) == 0 and asked_of(capsys) == ["2"]


@pytest.mark.usefixtures("no_figures")
def test_label_scores(model, folder, monkeypatch):
    """They are the engine's; what was interrupted goes on, after half a line too."""
    stock, asked = LtuEngine.score, []

    def score(engine, request, candidates):
        if len(asked) == 2:
            raise Killed
        asked.append(request.audio_id)
        return stock(engine, request, candidates)

    monkeypatch.setattr(LtuEngine, "score", score)
    labels = command(
        model, "--score_labels", "--label_prompt", "Genre?", "--label_answer", "Music genre: {}"
    )
    with pytest.raises(Killed):
        run.main(labels)
    with Path("out/m/gtzan.label_scores.jsonl").open("a") as lines:
        lines.write('{"row": 2, "scores": [-1.0, ')
    asked.clear()
    monkeypatch.setattr(
        LtuEngine, "score", lambda *args: (asked.append(args[1].audio_id), stock(*args))[1]
    )
    assert run.main(labels) == 1
    assert asked == ["2.wav", "3.wav", "4.wav"]
    engine = open_engine(inference_flags(str(model), run.parse_args(command(model))))
    lines = [
        json.loads(line)
        for line in Path("out/m/gtzan.label_scores.jsonl").read_text().splitlines()[1:]
    ]
    candidates = [f"Music genre: {genre}" for genre in GENRES]
    likeliest = []
    for number in range(4):
        own = stock(engine, Request("Genre?", f"{number}.wav", ""), candidates)
        assert lines[number]["scores"] == pytest.approx(
            [score.log_likelihood for score in own], abs=1e-4
        )
        likeliest.append(
            max(own, key=lambda score: score.log_likelihood).text.removeprefix("Music genre: ")
        )
    found = result()
    items = [json.loads(line) for line in Path("out/m/gtzan.items.jsonl").read_text().splitlines()]
    assert [item["chosen"] for item in items] == [*likeliest, None]
    assert (
        found["failed"] == {"missing": 1}
        and found["embedder"] is None
        and found["label_prompt"] == "Genre?"
    )
    assert found["scoring"] == "label log-likelihood"
    # A task without classes is left out of "all", with a word, and otherwise refused.
    shutil.copy("gtzan.json", "voxceleb_age.json")
    labels[labels.index("gtzan.json")] = "."
    assert run.main(["--task", "all", *labels[2:]]) == 1
    assert json.loads(Path("out/report.json").read_text())["left_out"] == [
        "m, voxceleb_age: it has no classes"
    ]
    for tasks, more in (
        (["gtzan", "voxceleb_age"], []),
        (["voxceleb_age"], []),
        (["gtzan"], ["--protocol", "original"]),
    ):
        with pytest.raises(SystemExit):
            run.main(["--task", *tasks, *labels[2:], *more])
    Path("gtzan.json").unlink()
    with pytest.raises(
        ValueError, match="Nothing is left to score. m, voxceleb_age: it has no classes"
    ):
        run.main(["--task", "all", *labels[2:]])


# --- scoring


def test_two_models_side_by_side(folder, capsys):
    """The same command twice: the same bytes. Figures by hand."""
    write(
        Path("p.json"),
        predictions(("Rock", "Rock"), ("Jazz", "a Jazz piece"), ("Pop", "Disco"), ("Blues", None)),
    )
    write(
        Path("q.json"),
        predictions(("Rock", "Metal"), ("Jazz", "Jazz"), ("Pop", "Pop"), ("Blues", "  ")),
    )
    flags = ["--task", "gtzan", "--predictions", "mine=p.json", "q.json", "--output_dir", "out"]
    assert run.main(flags) == 0
    first = contents(Path("out"))
    assert "| gtzan | mine | accuracy | embedding | 0.6667 |" in capsys.readouterr().out
    shutil.rmtree("out")
    assert run.main(flags) == 0 and contents(Path("out")) == first
    assert {"report.png", "mine/gtzan.confusion.png", "q/gtzan.items.jsonl"} < set(first)
    mine, other = result(), result(number=1)
    assert mine["figure"]["on_answered"] == other["figure"]["on_answered"] == pytest.approx(2 / 3)
    assert mine["figure"]["on_all"] == 0.5 and mine["paper"] == {"LTU-AS": 0.503, "LTU": 0.298}
    assert (mine["failed"], other["failed"]) == ({"no answer": 1}, {"empty answer": 1})
    items = [
        json.loads(line) for line in Path("out/mine/gtzan.items.jsonl").read_text().splitlines()
    ]
    assert [(item["chosen"], item["failed"]) for item in items[-2:]] == [
        ("Disco", None),
        (None, "no answer"),
    ]
    assert not re.search(rb"(?i)matplotlib|20\d\d-\d\d-\d\d", first["report.png"])


def test_a_truth_that_is_no_class(folder):
    write(Path("p.json"), predictions(("Rock", "Rock"), ("Schlager", "Rock")))
    for protocol in ("strict", "original"):
        with pytest.raises(ValueError, match="p.json, row 2: .*chlager"):
            run.main(
                [
                    "--task",
                    "gtzan",
                    "--predictions",
                    "p.json",
                    "--output_dir",
                    "out",
                    "--protocol",
                    protocol,
                ]
            )
    assert not Path("out/report.json").exists()


@pytest.mark.usefixtures("no_figures")
def test_questions_without_a_row_are_failed(folder):
    rows = predictions(("Hip-Hop", "Hip-Hop"), ("Reggae", "Rock"))
    flags = [
        "--task",
        "gtzan",
        "--predictions",
        "p.json",
        "--questions",
        "gtzan.json",
        "--output_dir",
        "out",
    ]
    write(Path("p.json"), rows)
    assert run.main(flags) == 0
    found = result()
    assert (found["asked"], found["answered"], found["failed"]) == (5, 2, {"no row": 3})
    assert (found["figure"]["on_answered"], found["figure"]["on_all"]) == (0.5, 0.2)
    for wrong, message in (
        ([*rows, rows[0]], r"p.json, row 3: .*0\.wav"),
        ([rows[0], rows[1] | {"ref": "Music genre: Pop"}], r"p.json, row 2: .*1\.wav"),
        ([rows[0], {"pred": "Rock", "audio_id": "1.wav"}], "p.json, row 2: no prompt, ref"),
        ([], "p.json holds no rows"),
    ):
        write(Path("p.json"), wrong)
        with pytest.raises(ValueError, match=message):
            run.main(flags)


def test_malformed_questions(model, folder):
    write(Path("p.json"), predictions(("Rock", "Rock")))
    scoring = [
        "--task",
        "gtzan",
        "--predictions",
        "p.json",
        "--questions",
        "gtzan.json",
        "--output_dir",
        "out",
    ]
    for wrong, message in (
        ([{"audio_id": "0.wav"}], "gtzan.json, row 1: no 'instruction'"),
        ([], "json holds no rows"),
    ):
        write(Path("gtzan.json"), wrong)
        for flags in (scoring, command(model)):
            with pytest.raises(ValueError, match=message):
                run.main(flags)


def test_all_tasks_of_a_folder(folder, capsys):
    place = folder / "answers"
    place.mkdir()
    write(place / "gtzan.json", predictions(("Rock", "Rock")))
    write(place / "voxceleb_age.predictions.json", [
        {"prompt": "How old?", "pred": "30", "ref": "The age of the speaker is 35.", "audio_id": "a.wav"}
    ])  # fmt: skip
    flags = ["--predictions", f"m={place}", "--output_dir", "out"]
    assert run.main(["--task", "all", *flags]) == 0
    assert [result(number=n)["task"] for n in (0, 1)] == ["voxceleb_age", "gtzan"]
    assert result()["figure"] == {"on_answered": 5.0, "on_all": 5.0, "low": None, "high": None}
    with pytest.raises(ValueError, match="fma.json is not there"):
        run.main(["--task", "gtzan", "fma", *flags])
    # What was asked and not answered at all is said.
    for name in ("gtzan", "fma"):
        write(folder / "a" / f"{name}.json", questions("Rock"))
    write(Path("w.json"), {})
    assert run.main(["--task", "all", *flags, "--questions", ".", "--whisper_text", "w.json"]) == 0
    found = json.loads(Path("out/report.json").read_text())
    assert found["left_out"] == ["m, voxceleb_age: no questions", "m, fma: no predictions"]
    assert "m, fma: no predictions" in Path("out/report.md").read_text()
    assert found["whisper_text"] == {"path": "w.json", "sha256": hashlib.sha256(b"{}").hexdigest()}
    assert "openai-whisper" in found["versions"]
    capsys.readouterr()
    assert run.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"esc50 +esc50.json +accuracy +LTU 0.831, .*Close-ended question: Write an audio caption",
        shown,
    )
    for more in (
        [],
        [*flags, "--max_new_token", "9"],
        [*flags, "--predictions", "m=x", "m=y"],
        [*flags, "--score_labels"],
    ):
        with pytest.raises(SystemExit):
            run.main(["--task", "gtzan", *more])


def test_interval():
    """Of 100 right ones of 400 answered: 1.96 standard errors each way. Failed items play no part; nan is None."""
    items = [{"failed": None}] * 400 + [{"failed": "missing"}] * 50
    right = np.arange(450) % 4 == 0
    outcome = Outcome(
        items, lambda indices: {"accuracy": float(right[indices].mean()), "other": float("nan")}
    )
    found = report.summarize(outcome, find_task("gtzan"), seed=0)
    error = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert found["figure"]["low"] == pytest.approx(0.25 - error, abs=0.006)
    assert found["figure"]["high"] == pytest.approx(0.25 + error, abs=0.006)
    assert found["on_answered"] == {"accuracy": 0.25, "other": None} and found["resamples"] == 1000
    assert found["figure"] != report.summarize(outcome, find_task("gtzan"), seed=1)["figure"]
