"""Tests LTU-AS at tiny size, from raw audio and from a feature folder.

Whisper is a real checkpoint file with random weights.
"""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

import ltu_as
from ltu import LtuForConditionalGeneration
from ltu.data.check_examples import read_examples
from ltu.data.dataset_parser import DatasetError
from ltu.index_dataset import main as index_rows
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu.inference_batch import main as inference_batch
from ltu.training.arguments import parse_args
from ltu.training.dataset_index import IndexedExamples
from ltu.training.trainer import make_trainer
from ltu_as.convert_checkpoint import main as convert
from ltu_as.extract_whisper_feature import main as extract
from ltu_as.pretrain_tltr import main as pretrain_tltr
from tests import tiny
from tests.whisper_tiny import save_whisper

QUESTIONS = ["What is it?", "Who says what, and why do you think so?", "Loud?"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Whisper, a language model, an initial checkpoint, clips of noise and a dataset.

    The examples have no `input`, an empty one, or a transcript.
    """
    folder = tmp_path_factory.mktemp("ltu_as")
    save_whisper(folder / "whisper.pt")
    tiny.write_llm(folder / "llm")
    flags = f"--init --llm {folder}/llm --whisper {folder}/whisper.pt --num_layer_heads 2"
    convert(f"{flags} --feature_precision fp32 --output_dir {folder}/init".split())
    rows = []
    for index in range(6):
        soundfile.write(folder / f"{index}.wav", tiny.clip(index, 0.6 + index / 2), 16_000)
        row = {
            "instruction": QUESTIONS[index % 3],
            "audio_id": f"{index}.wav",
            "output": "rain and a dog",
        }
        rows.append(row | ({}, {"input": ""}, {"input": "good morning"})[index % 3])
    rows.append(
        {"instruction": "Name an animal.", "input": "", "audio_id": "empty", "output": "dog"}
    )
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def features(root: Path) -> Path:
    extract(
        f"--data_path {root}/rows.json --output_dir {root}/features --model {root}/init".split()
    )
    return root / "features"


def make(root: Path, output: Path, *flags: str):
    arguments = f"--base_model {root}/init --data_path {root}/rows.json --output_dir {output}"
    arguments += " --batch_size 2 --micro_batch_size 2 --max_steps 2 --warmup_steps 1"
    arguments += " --learning_rate 1e-3 --bf16 False --num_workers 0 --logging_steps 1"
    return make_trainer(*parse_args([*arguments.split(), *flags]))


def losses(trainer) -> list[float]:
    trainer.args.save_strategy = "no"
    # Seed LoRA's dropout here, because several trainers are made before the first one runs.
    torch.manual_seed(0)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_raw_audio_and_folder_train_alike(root: Path, features: Path, tmp_path: Path) -> None:
    """Training from audio, from features, and from a mixture has the same examples and losses."""
    raw = make(root, tmp_path / "raw")
    stored = make(root, tmp_path / "stored", "--feature_root", str(features))
    half = tmp_path / "half"
    half_data = write_first_half(root, tmp_path)
    command = f"--data_path {half_data} --audio_root {root} --output_dir {half}"
    extract(f"{command} --model {root}/init".split())
    both = make(root, tmp_path / "both", "--feature_root", str(half))
    for one, other in zip(raw.train_dataset.examples, stored.train_dataset.examples, strict=True):
        assert one["input"] == other["input"]
    for index in range(6):
        computed = raw.train_dataset[index]["input_features"]
        assert torch.allclose(stored.train_dataset[index]["input_features"], computed, atol=1e-5)
        assert torch.allclose(both.train_dataset[index]["input_features"], computed, atol=1e-5)
    expected = losses(raw)
    assert losses(stored) == pytest.approx(expected, abs=1e-5)
    assert losses(both) == pytest.approx(expected, abs=1e-5)


def write_first_half(root: Path, tmp_path: Path) -> Path:
    """Write a dataset file with half of the clips."""
    rows = json.loads((root / "rows.json").read_text())
    (tmp_path / "some.json").write_text(json.dumps(rows[:3]))
    return tmp_path / "some.json"


def test_input_of_an_example(root: Path) -> None:
    """A given input is used as it is, also ""; Whisper transcribes the clip where it is absent."""
    processor = AutoProcessor.from_pretrained(root / "init")
    batch_sizes = []

    def transcribe(waveforms: list) -> list[str]:
        batch_sizes.append(len(waveforms))
        return ["words"] * len(waveforms)

    processor.feature_extractor.transcribe = transcribe
    rows = [
        {"audio": str(root / "0.wav"), "audio_id": "0.wav", **given}
        for given in ({}, {"input": ""}, {"input": " x "})
    ]
    inputs = [row["input"] for row in processor.front_end.add_transcripts(rows)]
    assert inputs == ["words", "", " x "] and batch_sizes == [1]
    batch = processor(text=["Q"] * 3, audio=[str(root / "0.wav")] * 3, transcript=[None, "", "x"])
    texts = [
        processor.tokenizer.decode([i for i in ids if i < 512])
        for ids in batch["input_ids"].tolist()
    ]
    assert "words" in texts[0] and "Input" not in texts[1] and "x" in texts[2]
    assert batch["input_features"].shape == (3, 4, 25, 64)


def test_save_and_load(root: Path, tmp_path: Path) -> None:
    """The Auto classes open a trained folder, which finds its Whisper and has the same logits."""
    trainer = make(root, tmp_path / "stage")
    losses(trainer)
    trainer.save_model()
    assert json.loads((tmp_path / "stage" / "ltu_state.json").read_text())["stage"] == "stage"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stage")
    processor = AutoProcessor.from_pretrained(tmp_path / "stage")
    assert type(model) is ltu_as.LtuAsForConditionalGeneration
    assert type(processor) is ltu_as.LtuAsProcessor
    assert Path(processor.feature_extractor.whisper_model).samefile(root / "whisper.pt")
    inputs = processor(text=QUESTIONS[0], audio=str(root / "1.wav"), transcript="")
    with torch.no_grad():
        again = model(**inputs).logits
        assert torch.allclose(trainer.model.eval()(**inputs).logits, again, atol=1e-5)
        other = model(**inputs | {"input_features": inputs["input_features"].flip(2)}).logits
        assert not torch.allclose(other, again, atol=1e-3)


def test_the_model_has_no_forward_of_its_own() -> None:
    assert "forward" not in vars(ltu_as.LtuAsForConditionalGeneration)


def test_batch_equals_single_and_modes(root: Path) -> None:
    engine = LtuEngine.from_pretrained(root / "init", device="cpu")
    requests = [
        Request(q, str(root / f"{i}.wav"), t)
        for i, q in enumerate(QUESTIONS)
        for t in ("", "a dog", None)
    ]
    together = engine(requests, batch_size=9, max_new_tokens=8)
    alone = [engine([request], max_new_tokens=8)[0] for request in requests]
    assert [answer.text for answer in together] == [answer.text for answer in alone]

    def answer(**changes) -> tuple[str, str]:
        request = Request(QUESTIONS[1], str(root / "1.wav"), "a dog", **changes)
        found = engine([request], max_new_tokens=8)[0]
        return found.text, found.transcript

    assert answer(mode="audio_only") == (alone[3].text, "")
    text_only = engine([Request(QUESTIONS[1], None, "a dog")], max_new_tokens=8)[0].text
    assert answer(mode="asr_only") == (text_only, "a dog")
    request = Request(QUESTIONS[1], str(root / "1.wav"), "a dog", mode="asr_only")
    without_audio = engine([request], max_new_tokens=2)[0]
    assert without_audio.seconds_heard == 0 < without_audio.seconds_total


def test_inference_batch_from_the_feature_folder_alone(
    root: Path, features: Path, tmp_path: Path
) -> None:
    """Without the clips, the features and transcripts in the folder are enough."""
    (tmp_path / "rows.json").write_text((root / "rows.json").read_text())
    common = f"--model {root}/init --device cpu --max_new_tokens 6 --data_path"
    stored = f"{common} {tmp_path}/rows.json --output_path {tmp_path}/p.json"
    assert inference_batch(f"{stored} --feature_root {features}".split()) == 0
    computed = f"{common} {root}/rows.json --output_path {tmp_path}/raw.json"
    assert inference_batch(computed.split()) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert [row["pred"] for row in found] == [row["pred"] for row in raw]
    assert [row["transcript"] for row in found] == [row["transcript"] for row in raw]


def test_other_precision_is_a_warning_that_names_both(root: Path, features: Path) -> None:
    processor = AutoProcessor.from_pretrained(root / "init")
    with pytest.warns(UserWarning, match="fp32.*fp16"):
        processor.front_end.configure(feature_precision="fp16")
    assert processor.feature_extractor.feature_precision == "fp16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoProcessor.from_pretrained(root / "init").front_end.configure(feature_root=str(features))


def test_features_of_another_whisper_are_refused(
    root: Path, features: Path, tmp_path: Path
) -> None:
    save_whisper(tmp_path / "other.pt", suffix="other")
    flags = f"--init --llm {root}/llm --whisper {tmp_path}/other.pt --num_layer_heads 2"
    convert(f"{flags} --feature_precision fp32 --output_dir {tmp_path}/other".split())
    processor = AutoProcessor.from_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="whisper.pt.*other.pt"):
        processor.front_end.configure(feature_root=str(features))


def test_a_whisper_without_fingerprint_is_compared_by_name(root: Path, features: Path) -> None:
    """A checkpoint converted with an official name has no fingerprint before its first use."""
    processor = AutoProcessor.from_pretrained(root / "init")
    processor.feature_extractor.whisper_fingerprint = None
    processor.front_end.configure(feature_root=str(features))
    # The fingerprint is taken from the folder, and saved from now on.
    assert processor.feature_extractor.whisper_fingerprint
    processor.feature_extractor.whisper_fingerprint = None
    with pytest.raises(ValueError, match="whisper.pt.*large-v1"):
        processor.front_end.configure(feature_root=str(features), whisper="large-v1")


def test_a_flag_that_contradicts_the_features_is_refused(root: Path, features: Path) -> None:
    processor = AutoProcessor.from_pretrained(root / "init")
    with pytest.raises(ValueError, match="fp16.*fp32"):
        processor.front_end.configure(feature_root=str(features), feature_precision="fp16")
    with pytest.raises(ValueError, match="bf16"):
        processor.front_end.configure(feature_precision="bf16")


def test_damaged_features_fail_one_clip(root: Path, features: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(features, tmp_path / "features")
    file = next(folder.glob("*/1-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    engine = LtuEngine.from_pretrained(root / "init", device="cpu")
    engine.processor.front_end.configure(feature_root=str(folder))
    requests = [Request("What?", str(root / f"{i}.wav"), "", audio_id=f"{i}.wav") for i in (0, 1)]
    answers = engine(requests, max_new_tokens=4)
    assert [answer.status for answer in answers] == ["ok", "damaged"]
    assert "extract" in answers[1].error


def test_two_kinds_in_one_process(root: Path, tmp_path: Path) -> None:
    """The folder decides which model it is; LTU refuses settings that only LTU-AS has."""
    ltu_folder = tiny.write_checkpoint(tmp_path / "ltu", root / "llm")
    engines = [
        LtuEngine.from_pretrained(folder, device="cpu") for folder in (ltu_folder, root / "init")
    ]
    assert type(engines[0].model) is LtuForConditionalGeneration
    assert type(engines[1].model) is ltu_as.LtuAsForConditionalGeneration
    for engine in engines:
        assert engine([Request("What?", tiny.clip(3))], max_new_tokens=4)[0].status == "ok"
    with pytest.raises(ValueError, match="does not use --feature_precision"):
        engines[0].processor.front_end.configure(feature_precision="fp16")


def test_an_index_holds_the_transcripts_that_examples_lack(
    root: Path, features: Path, tmp_path: Path
) -> None:
    """They are those of the feature folder or of Whisper; training from the index is the same."""
    data = Path(shutil.copy(root / "rows.json", tmp_path))
    command = f"{data} --base_model {root}/init --output_path {tmp_path}/rows.arrow"
    index_rows(f"{command} --audio_root {root} --feature_root {features}".split())
    indexed = IndexedExamples(tmp_path / "rows.arrow", root)
    plain = make(root, tmp_path / "plain", "--feature_root", str(features))
    trainer = make(
        root,
        tmp_path / "run",
        "--data_path",
        str(tmp_path / "rows.arrow"),
        "--audio_root",
        str(root),
    )
    assert [row["input"] for row in indexed] == [
        row["input"] for row in plain.train_dataset.examples
    ]
    assert [row["input"] for row in trainer.train_dataset.examples] == [
        row["input"] for row in indexed
    ]
    assert trainer.train_dataset.lengths.tolist() == plain.train_dataset.lengths.tolist()


def test_an_index_of_clips_that_cannot_be_transcribed(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is an error, unless --max_bad allows it: then the clips are named."""
    data = Path(shutil.copy(root / "rows.json", tmp_path))
    output = tmp_path / "rows.arrow"
    command = f"{data} --base_model {root}/init --output_path {output}".split()
    # The clips are not next to the dataset file.
    with pytest.raises(DatasetError, match="that cannot be decoded: [0-9]+, more than --max_bad 0"):
        index_rows(command)
    assert not output.exists()
    index_rows([*command, "--max_bad", "100"])
    assert len(IndexedExamples(output, root)) == len(read_examples(data))
    assert 'have the transcript "" now' in caplog.text


def test_start_from_a_whisper_at_file(root: Path, tmp_path: Path) -> None:
    """TLTR is used and the classifier dropped; a 'low' file, or an unknown key, is refused."""
    start = AutoModelForCausalLM.from_pretrained(root / "init")
    tltr = {f"module.{key}": value for key, value in start.audio_tower.state_dict().items()}
    flags = f"--init --llm {root}/llm --whisper {root}/whisper.pt --num_layer_heads 2"
    flags += f" --output_dir {tmp_path}/out --audio_encoder {tmp_path}/tltr.pth"

    def init(extra: dict) -> Path:
        torch.save(tltr | extra, tmp_path / "tltr.pth")
        convert(flags.split())
        return tmp_path / "out"

    folder = init({"module.mlp_layer.1.weight": torch.zeros(527, 64)})
    state = json.loads((folder / "ltu_state.json").read_text())
    assert list(state["dropped_keys"]) == ["module.mlp_layer.1.weight"]
    opened = AutoModelForCausalLM.from_pretrained(folder).audio_tower.state_dict()
    assert all(
        torch.equal(opened[key.removeprefix("module.")], value) for key, value in tltr.items()
    )
    with pytest.raises(ValueError, match="low"):
        init({"down_layer.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no rule matches"):
        init({"time_tr2.weight": torch.zeros(1)})


def test_a_new_model_takes_the_settings_of_its_features(root: Path, tmp_path: Path) -> None:
    """Number of audio tokens and treatment of short clips are those of the feature folder."""
    looped = tmp_path / "looped"
    flags = f"--whisper {root}/whisper.pt --data_path {root}/rows.json --transcribe none"
    extract([*flags.split(), "--output_dir", str(looped), *"--num_audio_tokens 5".split()])
    with pytest.raises(ValueError, match="loop_short_clips None there, True now"):
        more = "--num_audio_tokens 5 --loop_short_clips".split()
        extract([*flags.split(), "--output_dir", str(looped), *more])
    shutil.rmtree(looped)
    extract([*flags.split(), "--output_dir", str(looped), *more])

    flags = f"--init --llm {root}/llm --whisper {root}/whisper.pt --num_layer_heads 2"
    labels = [{"audio_id": f"{index}.wav", "labels": [f"{index % 2}"]} for index in range(6)]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    tltr = tmp_path / "tltr.safetensors"
    more = f"--feature_root {looped} --output_path {tltr} --audio_root {root} --num_layer_heads 2"
    pretrain_tltr(f"--data_path {tmp_path}/labels.json --learning_rate 1e-2 {more}".split())
    convert(f"{flags} --output_dir {tmp_path}/out --audio_encoder {tltr}".split())
    engine = LtuEngine.from_pretrained(tmp_path / "out", device="cpu")
    assert engine.model.config.num_audio_tokens == 5
    assert engine.processor.feature_extractor.loop_short_clips
    request = Request(QUESTIONS[0], str(root / "0.wav"), "", "0.wav")
    from_audio = engine.score(request, ["a dog"])[0].log_likelihood
    engine = LtuEngine.from_pretrained(tmp_path / "out", device="cpu")
    engine.processor.front_end.configure(feature_root=str(looped))
    from_features = engine.score(request, ["a dog"])[0].log_likelihood
    assert from_features == pytest.approx(from_audio, abs=1e-2)  # The stored ones are fp16.

    # Features of padded clips are those of another treatment.
    padded = tmp_path / "padded"
    flags = f"--whisper {root}/whisper.pt --data_path {root}/rows.json --transcribe none"
    extract([*flags.split(), "--output_dir", str(padded), *"--num_audio_tokens 5".split()])
    with pytest.raises(ValueError, match="pads them; that of the checkpoint repeats"):
        engine.processor.front_end.configure(feature_root=str(padded))


def test_start_from_a_released_folder(root: Path, tmp_path: Path) -> None:
    """Of a vicuna_ltuas folder, audio encoder and projector are used, and other keys dropped."""
    from safetensors.torch import save_file

    start = AutoModelForCausalLM.from_pretrained(root / "init")
    rng = torch.Generator().manual_seed(0)
    audio_encoder = {
        f"model.audio_encoder.{k}": torch.randn(v.shape, generator=rng)
        for k, v in start.audio_tower.state_dict().items()
    }
    proj = {
        f"model.audio_proj.1.{k}": torch.randn(v.shape, generator=rng)
        for k, v in start.multi_modal_projector.linear.state_dict().items()
    }
    folder = tmp_path / "vicuna_ltuas"
    folder.mkdir()
    save_file(
        audio_encoder | {"model.embed_tokens.weight": torch.zeros(2, 2)},
        folder / "model-00001-of-00002.safetensors",
    )
    save_file(
        proj | {"lm_head.weight": torch.zeros(2, 2)}, folder / "model-00002-of-00002.safetensors"
    )
    (folder / "config.json").write_text((root / "llm" / "config.json").read_text())
    index = {"weight_map": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    flags = f"--init --llm {root}/llm --whisper {root}/whisper.pt --num_layer_heads 2"
    convert(f"{flags} --output_dir {tmp_path}/out --audio_encoder {folder}".split())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(
        opened.audio_tower.time_tr.attn.query.weight,
        audio_encoder["model.audio_encoder.time_tr.attn.query.weight"],
    )
    assert torch.equal(
        opened.multi_modal_projector.linear.weight, proj["model.audio_proj.1.weight"]
    )
    assert len(json.loads((tmp_path / "out" / "ltu_state.json").read_text())["dropped_keys"]) == 2


def test_wrong_features_name_both_shapes(root: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "init")
    with pytest.raises(ValueError, match=r"4, 25, 64.*2, 25, 64"):
        model.audio_tower(torch.zeros(1, 2, 25, 64))
    with pytest.raises(ValueError, match="does not divide"):
        ltu_as.TltrConfig(hidden_size=10, num_layer_heads=4)


def test_a_block_equals_whispers_own_block() -> None:
    """Neither the merged matrices of one head nor the early mean changes the output."""
    from whisper.model import ResidualAttentionBlock

    from ltu_as.modeling_tltr import TltrBlock

    hidden = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 7, 32)).astype(np.float32))
    for heads in (1, 4):
        theirs = ResidualAttentionBlock(32, heads)
        ours = TltrBlock(32, heads, 1e-5)
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            assert torch.allclose(ours(hidden), theirs(hidden), atol=1e-5)
            assert torch.allclose(ours(hidden, mean=True), theirs(hidden).mean(1), atol=1e-5)
