"""Tests the model card of a folder: it is true, it is whole, and it is the one that is pushed."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import ltu_as  # noqa: F401  registers its classes
from ltu import ask
from ltu.convert_checkpoint import main as convert
from ltu.files import sha256_of
from ltu.finetune import main
from ltu.models import provenance
from ltu.models.locate_checkpoint import sha256_of_weights
from ltu.models.model_card import EvaluationResult, save_evaluation, write_model_card
from ltu.models.provenance import (
    code_version,
    library_versions,
    lineage_from,
    public_value,
    read_lineage,
    read_record,
)
from ltu_as.convert_checkpoint import main as convert_as
from tests.fake_hub import open_fake_hub
from tests.tiny import clip, training_flags, write_checkpoint, write_llm, write_rows
from tests.whisper_tiny import save_whisper

RESULT = EvaluationResult(
    task="esc50",
    metric="accuracy",
    scoring="embedding",
    protocol="strict",
    num_examples=200,
    on_answered=0.85,
    on_all=0.8125,
    low=0.8,
    high=0.9,
    failed={"empty": 10},
)


def change_state(folder: Path, **entries: object) -> None:
    state = json.loads((folder / "ltu_state.json").read_text())
    (folder / "ltu_state.json").write_text(json.dumps(state | entries))


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with an initial checkpoint and two stages, each with a card."""
    root = tmp_path_factory.mktemp("runs")
    write_llm(root / "llm")
    write_checkpoint(root / "init", root / "llm")
    data = write_rows(root / "rows", 12, without_audio=1)
    stages = {
        "stage1": ("init", {"trainable_params": "proj"}),
        "stage2": ("stage1", {"val_set_size": 4, "save_steps": 2, "num_epochs": 3}),
    }
    for name, (parent, flags) in stages.items():
        main(training_flags(root / parent, data, root / name, **flags))
    soundfile.write(root / "clip.wav", clip(1), 16_000)
    return root


@pytest.fixture
def stage2(runs, tmp_path) -> Path:
    """A copy of the second stage that a test may change; its parents are gone."""
    shutil.copytree(runs / "llm", tmp_path / "llm")
    return Path(shutil.copytree(runs / "stage2", tmp_path / "stage2"))


# --- the content


def test_metadata(runs, stage2):
    data = ModelCard.load(runs / "stage2" / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "audio-text-to-text"
    assert "ltu" in data.tags
    # Nobody has stated a licence, and a folder of this machine is no base model on the hub.
    assert data.license is None
    assert data.base_model is None

    config = json.loads((stage2 / "config.json").read_text())
    config["language_model"] = "lmsys/vicuna-7b-v1.1"
    (stage2 / "config.json").write_text(json.dumps(config))
    write_model_card(stage2)
    data = ModelCard.load(stage2 / "README.md").data
    assert data.base_model == "lmsys/vicuna-7b-v1.1"
    assert data.base_model_relation == "adapter"
    assert "LLaMA" in card_of(stage2)
    assert "LLaMA" not in card_of(runs / "stage2")


def test_lineage_outlives_the_parents(runs, stage2):
    assert not (stage2.parent / "stage1").exists()
    write_model_card(stage2)
    lines = card_of(stage2).splitlines()
    rows = [line for line in lines if re.match(r"\| (init|stage1|stage2) ", line)]
    hashes = [sha256_of_weights(runs / name)[:12] for name in ("init", "stage1", "stage2")]
    for row, sha256 in zip(rows, hashes, strict=True):
        assert sha256 in row
    dataset = sha256_of(runs / "rows" / "rows.json")[:12]
    trained = f"| proj | rows.json | {dataset} | 12 | 11 | 12 | 3 | 3 | 4 | 0.01 |"
    assert rows[1].endswith(trained)
    assert "| 12 | 11 | 8 | 6 | 6 | 4 |" in rows[2]


def test_lineage_of_a_state_without_one(stage2):
    """Runs of earlier versions record only their parent."""
    state = read_record(stage2)
    del state["lineage"]
    (stage2 / "ltu_state.json").write_text(json.dumps(state))
    assert [stage.name for stage in read_lineage(state)] == ["stage1"]
    assert [entry["name"] for entry in lineage_from(stage2)] == ["stage1", "stage2"]


def test_losses_are_those_of_the_log(runs):
    card = card_of(runs / "stage2")
    log = json.loads((runs / "stage2" / "trainer_state.json").read_text())["log_history"]
    losses = [entry for entry in log if "loss" in entry]
    held_out = [entry for entry in log if "eval_loss" in entry]
    for entry in losses:
        row = f"| {entry['step']} | {entry['loss']:.4g} | {entry['learning_rate']:.4g} |"
        assert row in card
    assert f"Held-out examples: {held_out[-1]['eval_loss']:.4f} (step 6)." in card
    assert "No examples were held out." in card_of(runs / "stage1")


def test_a_long_log_is_a_short_table(stage2):
    log = [{"step": step, "loss": 9 / step, "learning_rate": 1e-4} for step in range(1, 1000)]
    (stage2 / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    write_model_card(stage2)
    table = card_of(stage2).split("## Loss")[1].split("##")[0]
    rows = [line for line in table.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 10
    assert rows[0].startswith("| 1 |")
    assert rows[-1].startswith("| 999 |")


def test_an_unfinished_run_says_so(runs, stage2):
    assert "Training is finished: 6 of 6 steps." in card_of(runs / "stage2")
    checkpoint = runs / "stage2" / "checkpoint-4"
    write_model_card(checkpoint)
    assert "Training is not finished: 4 of 6 steps." in card_of(checkpoint)
    assert "| 4 |" in card_of(checkpoint)
    assert "| 5 |" not in card_of(checkpoint).split("## Loss")[1].split("##")[0]


def test_no_path_and_no_token_of_this_machine(stage2):
    """Training writes none into `ltu_state.json`, and the card repeats none of an older one."""
    for path in stage2.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            assert str(stage2.parent).encode() not in path.read_bytes(), path
    arguments = read_record(stage2)["arguments"]
    more = {"hub_token": "hf_secret", "data_path": str(stage2.parent / "rows.json")}
    change_state(stage2, arguments=arguments | more)
    write_model_card(stage2)
    card = card_of(stage2)
    assert 'data_path: "rows.json"' in card
    assert str(stage2.parent) not in card
    assert "hf_secret" not in card


@pytest.mark.parametrize(
    "value, public",
    [
        ("/home/me/rows.json", "rows.json"),
        ("C:\\data\\rows.json", "rows.json"),
        ("~/rows.json", "rows.json"),
        ("../me/rows.json", "rows.json"),
        ("exp/../../me/rows.json", "rows.json"),
        ("exp/rows.json", "exp/rows.json"),
        ("org/llm", "org/llm"),
        ("https://hub/model", "https://hub/model"),
        ("/home/me/", "me"),
        (["/home/me/a", 3], ["a", 3]),
        ({"config": "/home/me/fsdp.json"}, {"config": "fsdp.json"}),
        (True, True),
        (None, None),
    ],
)
def test_public_values(value, public):
    assert public_value({"flag": value}) == {"flag": public}


def test_tokens_are_hidden():
    arguments = {"hub_token": "hf_1", "push_to_hub_token": None, "add_eos_token": True}
    expected = {"hub_token": "<hidden>", "push_to_hub_token": None, "add_eos_token": True}
    assert public_value(arguments) == expected


def blocks(card: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", card, re.DOTALL)[1]


def test_the_code_of_a_card_runs(runs, monkeypatch, capsys):
    card = card_of(runs / "stage2")
    monkeypatch.chdir(runs)
    exec(compile(blocks(card, "python"), "card", "exec"), {})  # noqa: S102
    from_python = capsys.readouterr().out
    _, _, command, *words = shlex.split(blocks(card, "bash"))
    assert command == "ltu.ask"
    assert ask.main([*words, "--max_new_tokens", "64"]) == 0
    assert capsys.readouterr().out == from_python


def test_card_of_ltu_as(tmp_path, monkeypatch, capsys):
    save_whisper(tmp_path / "whisper.pt")
    write_llm(tmp_path / "llm")
    flags = f"--init --llm {tmp_path}/llm --whisper {tmp_path}/whisper.pt --num_layer_heads 2"
    convert_as(f"{flags} --feature_precision fp32 --output_dir {tmp_path}/first".split())
    card = card_of(tmp_path / "first")
    assert "It is the initial checkpoint of stage 1" in card
    assert "TLTR on the layers of Whisper" in card
    soundfile.write(tmp_path / "clip.wav", clip(1), 16_000)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(blocks(card, "python"), "card", "exec"), {})  # noqa: S102
    assert "python -m ltu_as.ask" in card
    assert str(tmp_path) not in card


# --- conversions


def test_conversions_write_cards(runs, tmp_path):
    convert(["--model", f"{runs}/stage2", "--merge", "--output_dir", str(tmp_path / "merged")])
    card = card_of(tmp_path / "merged")
    assert "LoRA was merged into the language model, which is in this folder." in card
    assert "language model: llm (llama, width 64), in this folder" in card
    names = [stage.name for stage in read_lineage(read_record(tmp_path / "merged"))]
    assert names == ["init", "stage1", "stage2"]


def test_a_conversion_keeps_a_card_that_somebody_wrote(runs, tmp_path):
    words = ["--model", f"{runs}/stage2", "--merge", "--output_dir", str(tmp_path / "merged")]
    convert(words)
    (tmp_path / "merged" / "README.md").write_text("mine")
    convert(words)
    assert card_of(tmp_path / "merged") == "mine"


# --- cards that somebody edited


@pytest.mark.parametrize("edit", ["metadata", "text", "whole"])
def test_an_edited_card_stays(stage2, edit, caplog):
    card = card_of(stage2)
    edited = {
        "metadata": card.replace("---\n", "---\nlicense: mit\n", 1),
        "text": f"{card}\nI like it.\n",
        "whole": "# Mine\n",
    }[edit]
    (stage2 / "README.md").write_text(edited, encoding="utf-8")
    assert not write_model_card(stage2)
    assert card_of(stage2) == edited
    assert "was edited" in caplog.text


def test_a_card_that_nobody_edited_is_written_again(stage2):
    before = card_of(stage2)
    change_state(stage2, step=5, finished=False)
    assert write_model_card(stage2)
    assert "Training is not finished: 5 of 6 steps." in card_of(stage2)
    change_state(stage2, step=6, finished=True)
    assert write_model_card(stage2)
    assert card_of(stage2) == before


# --- evaluation


def test_results_are_shown_with_their_weights_only(stage2, caplog):
    save_evaluation(stage2, [RESULT], sha256_of_weights(stage2))
    assert "| esc50 | accuracy | 0.85 | 0.8 | 0.9 | 0.8125 | 200 | empty 10 |" in card_of(stage2)

    # Other weights: the results are of the old ones.
    state = load_file(stage2 / "model.safetensors")
    state = {key: value + 1 for key, value in state.items()}
    save_file(state, stage2 / "model.safetensors", metadata={"format": "pt"})
    write_model_card(stage2)
    assert "esc50" not in card_of(stage2)
    assert "is of other weights" in caplog.text
    with pytest.raises(ValueError, match="has other weights"):
        save_evaluation(stage2, [RESULT], "0" * 64)


def test_results_of_several_evaluations_are_merged(stage2):
    sha256 = sha256_of_weights(stage2)
    for task in ("esc50", "gtzan", "esc50"):
        values = vars(RESULT) | {"task": task}
        save_evaluation(stage2, [EvaluationResult(**values)], sha256)
    stored = json.loads((stage2 / "evaluation.json").read_text())
    assert [entry["task"] for entry in stored["results"]] == ["esc50", "gtzan"]


@pytest.mark.parametrize("name", ["ltu_state.json", "trainer_state.json", "evaluation.json"])
def test_a_damaged_file_is_named(stage2, name):
    (stage2 / name).write_text('{"step": 1, "ste')
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        write_model_card(stage2)


# --- versions


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git checkout that `code_version` takes for that of this project."""
    root = tmp_path / "checkout"
    (root / "ltu").mkdir(parents=True)
    (root / "ltu" / "code.py").write_text("1")
    author = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    monkeypatch.setattr(provenance, "ROOT", root)
    return root


def fresh_version() -> str:
    code_version.cache_clear()
    try:
        return code_version()
    finally:
        code_version.cache_clear()


def test_code_version_of_a_checkout(checkout, monkeypatch):
    assert re.fullmatch("[0-9a-f]{40}", fresh_version())
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # As in a hook of git.
    commit = fresh_version()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (checkout / "notes.txt").write_text("not code")
    assert fresh_version() == commit
    (checkout / "ltu" / "code.py").write_text("2")
    assert fresh_version() == f"{commit}+changes"


@pytest.mark.parametrize("missing", ["git", "checkout", "commit"])
def test_code_version_without_git(checkout, monkeypatch, missing):
    if missing == "git":
        monkeypatch.setenv("PATH", "")
    else:
        shutil.rmtree(checkout / ".git")
    if missing == "commit":
        (checkout / ".git").mkdir()
    assert fresh_version() == library_versions().get("ltu", "unknown")


# --- push_to_hub


def test_push_to_hub_uploads_the_card(runs, stage2):
    """The model is pushed to a new repository, and to one whose card somebody wrote."""
    private = str(stage2.parent).encode()
    change_state(stage2, log=str(stage2.parent / "log"))  # Runs of earlier versions have paths.
    mine = "---\nlicense: mit\n---\n# Mine\n"
    code = f"""
import torch
from ltu import LtuForConditionalGeneration, LtuProcessor

folder = {str(stage2)!r}
model = LtuForConditionalGeneration.from_pretrained(folder)
processor = LtuProcessor.from_pretrained(folder)
model.config.language_model = "org/llm"
model.push_to_hub("me/new", tags=["mine"])
processor.push_to_hub("me/new")
model.push_to_hub("me/used")
with torch.no_grad():
    model.multi_modal_projector.linear.bias += 1
model.push_to_hub("me/other_weights")
"""
    with open_fake_hub() as hub:
        hub.files["me/used", "README.md"] = mine.encode()
        done = hub.run(code)
        assert done.returncode == 0, done.stderr[-3000:]
        card = ModelCard(hub.text("me/new", "README.md"))
        assert card.data.base_model == "org/llm"
        assert "mine" in card.data.tags
        assert "# stage2" in card.text
        assert "| stage1 |" in card.text
        assert "org/llm" in card.text
        for (repo, path), content in hub.files.items():
            assert private not in content, f"{repo}: {path}"
        names = {path for repo, path in hub.files if repo == "me/new"}
        assert {"ltu_state.json", "model.safetensors", "processor_config.json"} <= names

        assert hub.text("me/used", "README.md").endswith("# Mine\n")
        assert ("me/used", "model.safetensors") in hub.files

        # The card describes other weights than these.
        assert "# stage2" not in hub.text("me/other_weights", "README.md")
        assert "its model card is not uploaded" in done.stderr


def test_training_uploads_a_finished_run(runs, tmp_path):
    """The record and the card say that the run is finished, and no file has the token."""
    flags = training_flags(
        runs / "init", runs / "rows" / "rows.json", tmp_path / "run", save_steps=1
    )
    flags += ["--push_to_hub", "--hub_model_id", "me/run", "--hub_token", "hf_secret"]
    with open_fake_hub() as hub:
        done = hub.run(f"from ltu.finetune import main; main({flags!r})")
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(hub.text("me/run", "ltu_state.json"))["finished"]
        assert "Training is finished: 3 of 3 steps." in hub.text("me/run", "README.md")
        for (_, path), content in hub.files.items():
            assert b"hf_secret" not in content, path


def test_equal_weights_are_found(stage2):
    from ltu import LtuForConditionalGeneration

    model = LtuForConditionalGeneration.from_pretrained(stage2)
    assert model._has_weights_of(stage2)
    with torch.no_grad():
        model.multi_modal_projector.linear.bias[0] += 1e-3
    assert not model._has_weights_of(stage2)
