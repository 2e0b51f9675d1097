"""Tests generating, scoring and reporting in one command.

It tests what is resumed, counted and refused, and that results are reproducible.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from eval import generate_predictions, report, run, text_embeddings
from eval.generate_predictions import GenerationSettings
from eval.scorer_interface import Outcome
from eval.tasks import find_task
from ltu.inference.engine import LtuEngine
from ltu.inference.generation_flags import open_engine
from ltu.inference.predictions_file import PredictionsFile
from ltu.inference.requests import Request
from ltu_as.convert_checkpoint import main as convert
from tests.test_eval_questions import Stub
from tests.tiny import LORA, clip, write_checkpoint, write_llm
from tests.whisper_tiny import save_whisper

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
GENERATION = ["--device", "cpu", "--max_new_tokens", "6", "--batch_size", "2"]


class Killed(BaseException):
    pass


def run_killed(argv: list[str], monkeypatch) -> None:
    """Run a command that is killed before it stores the third batch of answers."""
    stock, count = PredictionsFile.append, 0

    def append(*args) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise Killed
        stock(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PredictionsFile, "append", append)
        run.main(argv)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    llm = write_llm(tmp_path_factory.mktemp("llm") / "llm")
    return write_checkpoint(llm.parent / "checkpoint", llm, LORA)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two equal working directories, a/ and b/, with five questions.

    The clip of the fifth question is missing.
    """
    monkeypatch.setattr(text_embeddings, "open_embedder", lambda name, folder: Stub())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            soundfile.write(tmp_path / name / f"{number}.wav", clip(number), 16_000)
        write(tmp_path / name / "gtzan.json", questions(*GENRES[:5]))
    monkeypatch.chdir(tmp_path / "a")
    return tmp_path


@pytest.fixture
def no_plots(monkeypatch) -> None:
    """Draw no plots, for tests that check none: drawing takes longer than the rest."""
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
    """Return predictions from (reference, answer) pairs, without status as the original does."""
    rows = []
    for question, (_, answer) in zip(questions(*(ref for ref, _ in pairs)), pairs, strict=True):
        row = {"prompt": question["instruction"], "pred": answer, "ref": question["output"]}
        rows.append(row | {"audio_id": question["audio_id"]})
    return rows


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def result(folder: str = "out", number: int = 0) -> dict:
    return json.loads(Path(folder, "report.json").read_text())["results"][number]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file except those of ltu.inference_batch, which contain wall times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "trials"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- generating


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
    return [*own, *GENERATION, *more]


def test_interrupted_generation_resumes(model, folder, monkeypatch, capsys):
    """It ends with the bytes of a run without interruption."""
    monkeypatch.chdir(folder / "b")
    assert run.main(command(model)) == 1
    expected = contents(folder / "b" / "out")
    assert set(expected) == {
        "report.json", "report.md", "report.png", "m/gtzan.predictions.json",
        "m/gtzan.provenance.json", "m/gtzan.items.jsonl", "m/gtzan.confusion.png",
    }  # fmt: skip
    monkeypatch.chdir(folder / "a")
    run_killed(command(model), monkeypatch)
    capsys.readouterr()
    assert run.main(command(model)) == 1
    output = capsys.readouterr().out
    found = re.search(r"(\d+) from the partial file; generated (\d+)", output)
    num_stored, num_generated = int(found[1]), int(found[2])
    assert num_stored >= 1 and num_generated < 5 and num_stored + num_generated == 5
    assert contents(folder / "a" / "out") == expected
    found = result()
    assert (found["num_examples"], found["answered"], found["failed"]) == (5, 4, {"missing": 1})
    assert (
        len(found["checkpoint"]) == 64
        and found["decoding"]["max_new_tokens"] == 6
        and found["embedder"] == "stub"
    )
    # When the missing clip is added, only its question is generated. Then none is.
    soundfile.write("4.wav", clip(4), 16_000)
    assert run.main(command(model)) == 0 and result()["failed"] == {}
    assert "4 from the partial file; generated 1" in capsys.readouterr().out
    monkeypatch.setattr(LtuEngine, "from_pretrained", None)
    whole = contents(Path("out"))
    assert run.main(command(model)) == 0 and contents(Path("out")) == whole


@pytest.mark.usefixtures("no_plots")
def test_other_settings_generate_again(model, folder, capsys):
    for number, row in enumerate(rows := questions(*GENRES[:4])):
        row["audio_id"] = f"{number % 2}.wav"  # two trials
    write(Path("gtzan.json"), rows)
    assert run.main(command(model)) == 0
    greedy = [row["pred"] for row in json.loads(Path("out/m/gtzan.predictions.json").read_text())]
    assert greedy[:2] == greedy[2:] and capsys.readouterr().out.count("from the partial file") == 1
    assert run.main(command(model, "--temperature", "2.0", "--seed", "7")) == 0
    sampled = [row["pred"] for row in json.loads(Path("out/m/gtzan.predictions.json").read_text())]
    assert sampled[0] != sampled[2] and sampled[1] != sampled[3]
    engine = open_engine(GenerationSettings(flags=GENERATION).parse_flags(str(model)))
    for trial in (0, 1):
        requests = [
            Request("Which genre?", f"{number}.wav", "", f"{number}.wav") for number in (0, 1)
        ]
        own = engine(requests, seed=7 + trial, temperature=2.0, do_sample=True, max_new_tokens=6)
        assert [answer.text for answer in own] == sampled[2 * trial : 2 * trial + 2]
    capsys.readouterr()
    assert run.main(command(model)) == 0 and "generated 2," in capsys.readouterr().out


def write_two_trials(*clips: str) -> tuple[str, ...]:
    """Write the question of each clip twice, for two trials, and return the flags that sample."""
    rows = [
        row | {"audio_id": clip}
        for row, clip in zip(questions(*GENRES[:4]), clips * 2, strict=False)
    ]
    write(Path("gtzan.json"), rows)
    return "--temperature", "2.0"


def num_generated(capsys) -> list[str]:
    """Return the number of answers that each trial has generated since the last call."""
    return re.findall(r"generated (\d+),", capsys.readouterr().out)


@pytest.mark.usefixtures("no_plots")
def test_a_trial_is_stored_when_a_later_one_is_killed(model, folder, monkeypatch, capsys):
    sampled = write_two_trials("0.wav", "1.wav")
    run_killed(command(model, *sampled), monkeypatch)
    assert num_generated(capsys) == ["2"]
    assert run.main(command(model, *sampled)) == 0 and num_generated(capsys) == ["2"]


@pytest.mark.usefixtures("no_plots")
def test_max_bad_is_of_all_trials(model, folder, capsys):
    """Answers next to allowed failures are not generated again."""
    sampled = write_two_trials("0.wav", "missing.wav")
    assert run.main(command(model, *sampled, "--max_bad", "1")) == 1 and num_generated(capsys) == [
        "2",
        "2",
    ]
    for _ in range(2):
        assert run.main(command(model, *sampled, "--max_bad", "2")) == 0 and num_generated(
            capsys
        ) == [
            "1",
            "1",
        ]
    assert result()["failed"] == {"missing": 2}


@pytest.mark.usefixtures("no_plots")
def test_provenance_is_of_these_predictions(model, folder, monkeypatch):
    """The provenance is that of the first run after another run was killed.

    The other run is killed between writing its answers and their provenance.
    """
    sampled = write_two_trials("0.wav", "1.wav")
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


@pytest.mark.usefixtures("no_plots")
def test_another_processor_generates_again(model, folder, capsys):
    own = Path(shutil.copytree(model, model.parent / "own"))
    write(Path("gtzan.json"), questions(*GENRES[:2]))
    assert run.main(command(own)) == 0 and num_generated(capsys) == ["2"]
    (own / "README.md").write_text("A card.")
    assert run.main(command(own)) == 0 and num_generated(capsys) == []
    settings = (own / "processor_config.json").read_text()
    (own / "processor_config.json").write_text(settings.replace("### Response:", "### Answer:"))
    assert run.main(command(own)) == 0 and num_generated(capsys) == ["2"]


@pytest.mark.usefixtures("no_plots")
def test_label_scores(model, folder, monkeypatch):
    """They equal those of the engine, and an interrupted run resumes, also after half a line."""
    stock = LtuEngine.score
    scored = []

    def score(engine, request, candidates):
        if len(scored) == 2:
            raise Killed
        scored.append(request.audio_id)
        return stock(engine, request, candidates)

    monkeypatch.setattr(LtuEngine, "score", score)
    labels = command(
        model, "--score_labels", "--label_prompt", "Genre?", "--label_answer", "Music genre: {}"
    )
    with pytest.raises(Killed):
        run.main(labels)
    with Path("out/m/gtzan.label_scores.jsonl").open("a") as lines:
        lines.write('{"example": 2, "scores": [-1.0, ')
    scored.clear()
    monkeypatch.setattr(
        LtuEngine, "score", lambda *args: (scored.append(args[1].audio_id), stock(*args))[1]
    )
    assert run.main(labels) == 1
    assert scored == ["2.wav", "3.wav", "4.wav"]
    engine = open_engine(GenerationSettings(flags=GENERATION).parse_flags(str(model)))
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
    # A task without classes is left out of "all", which the report notes, and is refused otherwise.
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


@pytest.mark.usefixtures("no_plots")
def test_ltu_as(folder, tmp_path, capsys):
    """The engine opens it as it opens LTU, and the transcripts in its predictions are scored."""
    save_whisper(tmp_path / "whisper.pt")
    write_llm(tmp_path / "llm")
    checkpoint = tmp_path / "init"
    flags = f"--init --llm {tmp_path}/llm --whisper {tmp_path}/whisper.pt --num_layer_heads 2"
    convert(f"{flags} --feature_precision fp32 --output_dir {checkpoint}".split())
    examples = []
    for number, transcript in enumerate(["good morning", "it rains"]):
        example = {
            "instruction": "Can you identify the spoken text?",
            "input": transcript,
            "audio_id": f"{number}.wav",
            "output": "Spoken text: good morning",
        }
        examples.append(example)
    write(Path("librispeech.json"), examples)
    flags = ["--task", "librispeech", "--model", f"as={checkpoint}", "--output_dir", "out"]
    flags += ["--questions", "librispeech.json", *GENERATION]
    assert run.main(flags) == 0 and num_generated(capsys) == ["2"]
    predictions = json.loads(Path("out/as/librispeech.predictions.json").read_text())
    assert [row["model"] for row in predictions] == ["ltu_as", "ltu_as"]
    assert [row["transcript"] for row in predictions] == ["good morning", "it rains"]
    # Both words of the second transcript are wrong.
    assert result()["on_all"]["wer_whisper"] == pytest.approx(2 / 4)


# --- scoring


def test_two_models_side_by_side(folder, capsys):
    """The same command twice gives the same bytes, and the metrics are those by hand."""
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
    assert mine["value"]["on_answered"] == other["value"]["on_answered"] == pytest.approx(2 / 3)
    assert mine["value"]["on_all"] == 0.5 and mine["paper"] == {"LTU-AS": 0.503, "LTU": 0.298}
    assert (mine["failed"], other["failed"]) == ({"no answer": 1}, {"empty answer": 1})
    items = [
        json.loads(line) for line in Path("out/mine/gtzan.items.jsonl").read_text().splitlines()
    ]
    assert [(item["chosen"], item["failed"]) for item in items[-2:]] == [
        ("Disco", None),
        (None, "no answer"),
    ]
    assert not re.search(rb"(?i)matplotlib|20\d\d-\d\d-\d\d", first["report.png"])


@pytest.mark.usefixtures("no_plots")
def test_the_embedder_and_the_judge_are_opened_once(folder, monkeypatch):
    opened = []

    def open_embedder(name, folder):
        opened.append(name)
        return Stub()

    class CountedJudge(run.Judge):
        def __init__(self, settings, folder):
            opened.append(settings.model)
            super().__init__(settings, folder)

    monkeypatch.setattr(text_embeddings, "open_embedder", open_embedder)
    monkeypatch.setattr(run, "Judge", CountedJudge)
    write(Path("p.json"), predictions(("Rock", "Rock"), ("Jazz", "Jazz")))
    flags = ["--task", "gtzan", "--predictions", "p.json", "same=p.json", "--output_dir", "out"]
    assert run.main([*flags, "--judge_model", "judge"]) == 0
    assert sorted(opened) == ["judge", "minilm"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge_url", "http://127.0.0.1:9"], "need --judge_model"),
        (["--judge_local"], "need --judge_model"),
        (["--judge_budget", "9"], "need --judge_model"),
        (["--label_prompt", "Genre?"], "need --score_labels"),
        (["--label_answer", "{}"], "need --score_labels"),
        (["--embedder", "FOLDER", "--embeddings", "t.json"], "not allowed with"),
    ],
)
def test_flags_without_effect_are_refused(folder, capsys, flags, message):
    write(Path("p.json"), predictions(("Rock", "Rock")))
    command = ["--task", "gtzan", "--predictions", "p.json", "--output_dir", "out"]
    with pytest.raises(SystemExit):
        run.main([*command, *flags])
    assert message in capsys.readouterr().err


def test_a_reference_that_is_no_class(folder):
    write(Path("p.json"), predictions(("Rock", "Rock"), ("Schlager", "Rock")))
    for protocol in ("strict", "original"):
        with pytest.raises(ValueError, match="p.json, prediction 2: .*chlager"):
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


@pytest.mark.usefixtures("no_plots")
def test_questions_without_a_prediction_fail(folder):
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
    assert (found["num_examples"], found["answered"], found["failed"]) == (
        5,
        2,
        {"no prediction": 3},
    )
    assert (found["value"]["on_answered"], found["value"]["on_all"]) == (0.5, 0.2)
    for wrong, message in (
        ([*rows, rows[0]], r"p.json, prediction 3: .*0\.wav"),
        ([rows[0], rows[1] | {"ref": "Music genre: Pop"}], r"p.json, prediction 2: .*1\.wav"),
        ([rows[0], {"pred": "Rock", "audio_id": "1.wav"}], "p.json, prediction 2: no prompt, ref"),
        ([], "p.json contains no predictions"),
    ):
        write(Path("p.json"), wrong)
        with pytest.raises(ValueError, match=message):
            run.main(flags)


@pytest.mark.usefixtures("no_plots")
def test_without_questions_the_report_says_what_it_cannot_see(model, folder, capsys):
    rows = predictions(("Hip-Hop", "Hip-Hop"), ("Reggae", "Rock"))
    write(Path("p.json"), [*rows, rows[0]])
    flags = ["--task", "gtzan", "--predictions", "p.json", "--output_dir", "out"]
    assert run.main(flags) == 0
    assert run.NO_QUESTIONS in result()["notes"]
    assert f"- p, gtzan: {run.NO_QUESTIONS}\n" in capsys.readouterr().out
    write(Path("p.json"), rows)
    own = command(model, "--score_labels")
    for with_questions in ([*flags, "--questions", "gtzan.json"], own):
        run.main(with_questions)
        assert run.NO_QUESTIONS not in result()["notes"]


@pytest.mark.parametrize("value", [["0.wav"], 5, False, {"id": "0.wav"}])
@pytest.mark.parametrize("task", ["gtzan", "audiocaps"])
def test_a_malformed_audio_id_is_one_line(folder, task, value):
    """In the predictions and in the questions, which name file and number."""
    flags = ["--task", task, "--predictions", "p.json", "--output_dir", "out"]
    rows = predictions(("Hip-Hop", "Hip-Hop"), ("Reggae", "Rock"))
    kind = type(value).__name__
    write(Path("p.json"), [rows[0], rows[1] | {"audio_id": value}])
    message = f"^p.json, prediction 2: 'audio_id' is a {kind}, not text.*[^\n]$"
    for more in ([], ["--questions", "gtzan.json"]):
        with pytest.raises(ValueError, match=message):
            run.main([*flags, *more])
    write(Path("p.json"), rows)
    write(Path("gtzan.json"), [*questions("Hip-Hop"), questions("Reggae")[0] | {"audio_id": value}])
    with pytest.raises(ValueError, match=f"^gtzan.json, example 2: 'audio_id' is a {kind}"):
        run.main([*flags, "--questions", "gtzan.json"])
    # A question without audio has none; a prediction for it must be there too.
    write(Path("gtzan.json"), [questions("Hip-Hop")[0] | {"audio_id": None}])
    with pytest.raises(ValueError, match="^p.json, prediction 1: not in gtzan.json"):
        run.main([*flags, "--questions", "gtzan.json"])


@pytest.mark.parametrize(
    ("transcripts", "message"),
    [
        ([1], "w.json is a list, not an object"),
        ({"0.wav": 7}, "w.json: the transcript of '0.wav' is 7, not text"),
        (None, "p.json: the transcript of '0.wav' is None, not text"),
    ],
)
def test_malformed_transcripts(folder, transcripts, message):
    row = {"prompt": "?", "pred": "a", "ref": "Spoken text: a", "audio_id": "0.wav"}
    write(Path("p.json"), [row | {"model": "ltu_as"}])
    flags = ["--task", "librispeech", "--predictions", "p.json", "--output_dir", "out"]
    if transcripts is not None:
        write(Path("w.json"), transcripts)
        flags += ["--whisper_text", "w.json"]
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
        ([{"audio_id": "0.wav"}], "gtzan.json, example 1: no 'instruction'"),
        ([], "json contains no examples"),
    ):
        write(Path("gtzan.json"), wrong)
        for flags in (scoring, command(model)):
            with pytest.raises(ValueError, match=message):
                run.main(flags)


def test_all_tasks_of_a_folder(folder, capsys):
    answers = folder / "answers"
    answers.mkdir()
    write(answers / "gtzan.json", predictions(("Rock", "Rock")))
    row = {"prompt": "How old?", "pred": "30", "ref": "The age of the speaker is 35."}
    write(answers / "voxceleb_age.predictions.json", [row | {"audio_id": "a.wav"}])
    flags = ["--predictions", f"m={answers}", "--output_dir", "out"]
    assert run.main(["--task", "all", *flags]) == 0
    assert [result(number=n)["task"] for n in (0, 1)] == ["voxceleb_age", "gtzan"]
    assert result()["value"] == {"on_answered": 5.0, "on_all": 5.0, "low": None, "high": None}
    with pytest.raises(ValueError, match="fma.json is not there"):
        run.main(["--task", "gtzan", "fma", *flags])
    # The report names a task with questions and without predictions.
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
    """For 100 right of 400 answered items it is 1.96 standard errors to each side.

    Failed items do not count, and nan becomes None.
    """
    items = [{"failed": None}] * 400 + [{"failed": "missing"}] * 50
    right = np.arange(450) % 4 == 0
    outcome = Outcome(
        items, lambda indices: {"accuracy": float(right[indices].mean()), "other": float("nan")}
    )
    found = report.summarize(outcome, find_task("gtzan"), seed=0)
    error = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert found.value.low == pytest.approx(0.25 - error, abs=0.006)
    assert found.value.high == pytest.approx(0.25 + error, abs=0.006)
    assert found.on_answered == {"accuracy": 0.25, "other": None} and found.resamples == 1000
    assert found.value != report.summarize(outcome, find_task("gtzan"), seed=1).value


def test_results_in_the_model_card(folder, model, no_plots, tmp_path, monkeypatch):
    """The results are in the model's folder too, and the next run uses the answers again."""
    shutil.copytree(model.parent / "llm", tmp_path / "llm")
    checkpoint = Path(shutil.copytree(model, tmp_path / "checkpoint"))
    argv = ["--task", "gtzan", "--model", f"mine={checkpoint}", "--questions", "gtzan.json"]
    argv += ["--output_dir", "out", "--max_bad", "1", "--update_model_card", *GENERATION]
    assert run.main(argv) == 0
    (result,) = json.loads(Path("out/report.json").read_text())["results"]
    (stored,) = json.loads((checkpoint / "evaluation.json").read_text())["results"]
    assert stored["on_all"] == result["value"]["on_all"]
    assert stored["questions_sha256"] == result["questions"]["sha256"]
    card = (checkpoint / "README.md").read_text()
    assert "| gtzan | accuracy |" in card
    assert "| 5 | missing 1 |" in card
    assert str(tmp_path) not in card + (checkpoint / "evaluation.json").read_text()

    # The new files in the folder do not make it another model: only the missing clip is retried.
    provenance = Path("out/mine/gtzan.provenance.json").read_bytes()
    run.main(argv)
    assert Path("out/mine/gtzan.provenance.json").read_bytes() == provenance
    assert (checkpoint / "README.md").read_text() == card


def test_a_model_card_needs_a_folder(folder, capsys):
    argv = ["--task", "gtzan", "--output_dir", "out", "--update_model_card"]
    for words, message in (
        (["--predictions", "P.json"], "needs --model"),
        (["--model", "org/model", "--questions", "gtzan.json"], "is no folder of this machine"),
    ):
        with pytest.raises(SystemExit) as end:
            run.main([*argv, *words])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
