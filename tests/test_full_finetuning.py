"""Tests full fine-tuning, training on a quantized language model, and weights that are not finite.

The quantized tests need bitsandbytes, which also computes on a CPU.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import ltu_as.convert_checkpoint  # noqa: F401  registers LTU-AS with the Auto classes
from ltu import LtuConfig, LtuForConditionalGeneration
from ltu.checkpoints.open_checkpoint import open_model
from ltu.convert_checkpoint import main as convert
from ltu.finetune import main as finetune
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu.inference_batch import main as infer
from ltu.models.finite_weights import check_finite
from ltu.training.arguments import parse_args
from ltu.training.model_setup import apply_liger, open_to_train
from ltu.training.trainer import make_trainer
from ltu_as import LtuAsConfig
from tests import released
from tests.golden.rule_init import rule
from tests.tiny import LORA, clip, training_flags, write_checkpoint, write_llm, write_rows

FULL = {"trainable_params": "full", "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full")


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Path:
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def data_path(root: Path) -> Path:
    return write_rows(root / "rows", 6, without_audio=2)


@pytest.fixture(scope="module")
def full(checkpoint: Path, data_path: Path, root: Path) -> Path:
    """A full fine-tuned folder, with a checkpoint in the middle of its run."""
    train(checkpoint, data_path, root / "run", **FULL, save_steps=3)
    return root / "run"


def train(checkpoint: Path, data_path: Path, output: Path, *words: str, **flags: object) -> None:
    flags = {"num_epochs": 4} | flags  # The first step has a learning rate of 0.
    finetune([*training_flags(checkpoint, data_path, output, **flags), *words])


def open_with(checkpoint: Path, bf16: bool = False, **flags: object) -> LtuForConditionalGeneration:
    """Return the model that a run with these flags would train."""
    arguments = training_flags(checkpoint, Path("rows.json"), Path("run"), **flags)
    return open_to_train(parse_args(arguments)[0], bf16)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def record_of(folder: Path) -> dict:
    return json.loads((folder / "ltu_state.json").read_text())


def different(found: dict, expected: dict) -> list[str]:
    """Return the keys whose tensors differ, or that only one of the two has."""
    common = found.keys() & expected.keys()
    unequal = [key for key in common if not torch.equal(found[key], expected[key])]
    return sorted(unequal + list(found.keys() ^ expected.keys()))


# --- full fine-tuning


def test_the_language_model_is_trained_and_saved(full: Path, checkpoint: Path) -> None:
    config = json.loads((full / "config.json").read_text())
    assert config["lora"] is None
    assert config["language_model"] is None
    assert config["text_config"]["dtype"] == "float32"
    record = record_of(full)
    assert record["language_model"] == "in this folder"
    assert record["parameters"]["trainable"] == record["parameters"]["all"]
    state = state_of(full)
    assert sum(value.numel() for value in state.values()) == record["parameters"]["all"]
    before = open_with(checkpoint, trainable_params="full").state_dict()
    assert before.keys() == state.keys()
    # The classes that a batch never uses, and norms that the audio encoder does not apply, stay.
    changed = {key.split(".")[-2] for key in different(before, state)}
    layers = {"embed_tokens", "q_proj", "down_proj", "input_layernorm", "lm_head", "linear", "fc1"}
    assert layers <= changed


def test_the_loss_falls(full: Path) -> None:
    history = json.loads((full / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_resumed_run_equals_an_uninterrupted_one(
    full: Path, checkpoint: Path, data_path: Path, tmp_path: Path
) -> None:
    resumed = {"save_steps": 3, "resume_from_checkpoint": full / "checkpoint-3"}
    train(checkpoint, data_path, tmp_path / "run", **FULL, **resumed)
    assert not different(state_of(tmp_path / "run"), state_of(full))


def test_a_run_whose_checkpoints_are_in_shards_resumes(
    full: Path, checkpoint: Path, data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers writes shards of 50 GB; 13B in fp32 have more."""
    stock = PreTrainedModel.save_pretrained

    def save_in_shards(*args: Any, **kwargs: Any) -> None:
        stock(*args, **kwargs, max_shard_size="200KB")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_in_shards)
    train(checkpoint, data_path, tmp_path / "run", **FULL, save_steps=3)
    middle = tmp_path / "run" / "checkpoint-3"
    assert len(list(middle.glob("model-*-of-*.safetensors"))) > 1
    resumed = {"save_steps": 3, "resume_from_checkpoint": middle}
    train(checkpoint, data_path, tmp_path / "resumed", **FULL, **resumed)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "resumed").state_dict()
    assert not different(dict(found), state_of(full))


def test_lora_is_merged_as_by_the_converter(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = open_with(checkpoint, trainable_params="full")
    assert "is merged into the language model" in caplog.text
    convert(["--model", str(checkpoint), "--merge", "--output_dir", str(tmp_path / "merged")])
    assert not different(dict(model.state_dict()), state_of(tmp_path / "merged"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of a second LoRA next to the first.
        model.add_lora(r=2, lora_alpha=4, lora_dropout=0.0)


def test_lora_on_a_tied_weight_is_not_merged(tmp_path: Path) -> None:
    llm = write_llm(tmp_path / "llm", tie_word_embeddings=True)
    lora = LORA | {"target_modules": ["embed_tokens"]}
    folder = write_checkpoint(tmp_path / "checkpoint", llm, lora)
    with pytest.raises(ValueError, match="embed_tokens.*one tensor"):
        open_with(folder, trainable_params="full")


def test_tied_weights_and_a_frozen_audio_encoder(data_path: Path, tmp_path: Path) -> None:
    llm = write_llm(tmp_path / "llm", tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path / "checkpoint", llm)
    train(folder, data_path, tmp_path / "run", "--freeze_audio_tower", **FULL)
    before = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert not different(before.audio_tower.state_dict(), model.audio_tower.state_dict())
    head = model.language_model.lm_head.weight
    assert head is model.language_model.model.embed_tokens.weight
    assert not torch.equal(head, before.language_model.lm_head.weight)
    parameters = record_of(tmp_path / "run")["parameters"]
    frozen = sum(parameter.numel() for parameter in model.audio_tower.parameters())
    assert parameters["trainable"] == parameters["all"] - frozen


def test_the_language_model_is_fp32_even_if_training_is_bf16(checkpoint: Path) -> None:
    model = open_with(checkpoint, bf16=True, trainable_params="full")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def original(root: Path, data_path: Path) -> Path:
    """A file of the original in the folder of a full fine-tuned model, next to its parts.

    The audio encoder is narrow, but takes clips of 10.24 s, as all those of the original.
    """
    folder = root / "original"
    folder.mkdir()
    shapes = released.read("layout_ltu")["tiny.lora_all"]["saved_by_trainer"]
    state = {}
    for key, shape in released.narrow(shapes).items():
        state[key] = torch.from_numpy(rule(key, tuple(shape)))
    base = released.convert(state, released.write_llm(folder / "llm"), folder / "base")
    train(base, data_path, folder / "run", **FULL)
    convert(["--model", str(folder / "run"), "--to_original", str(folder / "full_ft.bin")])
    return folder / "full_ft.bin"


def test_to_the_original_and_back(original: Path, tmp_path: Path) -> None:
    found = torch.load(original, weights_only=True)
    layout = released.read("layout_ltu")["tiny.stage2_all"]["peft_state_dict"]
    expected = {key for key in released.narrow(layout) if "rotary" not in key}
    assert found.keys() == expected
    flags = ["--llm", str(original.parent / "llm"), "--checkpoint", str(original)]
    convert([*flags, "--output_dir", str(tmp_path / "back")])
    assert not different(state_of(tmp_path / "back"), state_of(original.parent / "run"))
    assert AutoConfig.from_pretrained(tmp_path / "back").language_model is None


def test_a_full_folder_answers(full: Path, data_path: Path, tmp_path: Path) -> None:
    engine = LtuEngine.from_pretrained(full, device="cpu")
    requests = [Request("Loud?", clip(1)), Request("What is it, and why?", clip(2)), Request("a?")]
    answers = engine(requests, max_new_tokens=8)
    assert answers == [engine([request], max_new_tokens=8)[0] for request in requests]
    flags = ["--model", str(full), "--data_path", str(data_path), "--max_new_tokens", "4"]
    assert infer([*flags, "--output_path", str(tmp_path / "p.json"), "--device", "cpu"]) == 0
    assert len(json.loads((tmp_path / "p.json").read_text())) == 6


def test_lora_on_a_full_fine_tuned_language_model(
    full: Path, data_path: Path, tmp_path: Path
) -> None:
    """The language model is in no other folder, so the next folder holds it, unchanged."""
    train(full, data_path, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.language_model is None
    assert model.config.lora["r"] == 8
    state = state_of(tmp_path / "run")
    base = {key.replace(".base_layer.", "."): value for key, value in state.items()}
    for key, value in state_of(full).items():
        if key.startswith("language_model."):
            assert torch.equal(base[key], value), key
    assert any(".lora_B." in key and value.any() for key, value in state.items())
    # And again full, which merges this LoRA.
    merged = open_with(tmp_path / "run", trainable_params="full")
    key = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.state_dict()[key], base[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_training_does_not_round_a_language_model_in_the_folder(
    full: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    folder = full
    if dtype == torch.bfloat16:
        folder = tmp_path / "half"
        flags = ["--model", str(full), "--merge", "--llm_dtype", "bfloat16"]
        convert([*flags, "--output_dir", str(folder)])
    model = open_with(folder, bf16=True)
    assert model.language_model.lm_head.weight.dtype == dtype
    assert ("--merge --llm_dtype bfloat16" in caplog.text) == (dtype == torch.float32)
    assert model.multi_modal_projector.linear.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_r", "8"], "--lora_r with --trainable_params full"),
        (["--lora_target_modules", "[q_proj]"], "--lora_target_modules with"),
        (["--quantization", "4bit"], "quantized weights cannot be trained"),
    ],
)
def test_flags_that_contradict_full(
    checkpoint: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    arguments = training_flags(checkpoint, Path("rows.json"), Path("run"), **FULL)
    with pytest.raises(SystemExit) as end:
        parse_args([*arguments, *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    parse_args([*arguments, "--lora_target_modules", '["dummy"]'])


@pytest.mark.parametrize(
    ("config_class", "layout", "count"),
    [
        (LtuConfig, "layout_ltu", 6_827_286_528),
        (LtuAsConfig, "layout_ltu_as", 6_783_014_912),
    ],
)
def test_counts_of_the_real_sizes(config_class: type[LtuConfig], layout: str, count: int) -> None:
    """The original without LoRA has as many parameters; all of them are trained."""
    with torch.device("meta"):
        config = config_class(text_config={"model_type": "llama"}, language_model="llm")
        model = AutoModelForCausalLM.from_config(config)
    model.set_trainable("full")
    assert model.num_parameters(only_trainable=True) == model.num_parameters() == count
    assert released.read(layout)["real7b.stage2_all"]["n_params"] == count
    assert config.language_model is None or model.config.language_model is None
    assert all(model.is_own(key) for key in model.state_dict())


# --- a quantized language model


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_training_on_a_quantized_language_model(
    checkpoint: Path, data_path: Path, tmp_path: Path, bits: str
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra 4bit is not installed")
    flags = {"quantization": bits, "num_epochs": 6, "save_steps": 3}
    arguments = training_flags(checkpoint, data_path, tmp_path / "run", **flags)
    trainer = make_trainer(*parse_args([*arguments, "--gradient_checkpointing"]))
    layer = trainer.model.language_model.model.layers[0].self_attn.q_proj
    kinds = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}
    assert isinstance(layer.base_layer, kinds[bits])
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    assert layer.lora_A["default"].weight.dtype == torch.float32
    quantized = layer.base_layer.weight.clone()
    before = layer.lora_B["default"].weight.clone()
    # The count is that of the model without quantization.
    whole = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert trainer.record["parameters"]["all"] == whole.num_parameters()

    finetune([*arguments, "--gradient_checkpointing"])
    state = state_of(tmp_path / "run")
    assert state.keys() == state_of(checkpoint).keys()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert "quantization_config" not in (tmp_path / "run" / "config.json").read_text()
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]

    # The folder opens with and without quantization, and has the weights of the run.
    for quantization in (bits, None):
        model = open_model(tmp_path / "run", torch.float32, quantization=quantization)
        layer = model.language_model.model.layers[0].self_attn.q_proj
        after = layer.lora_B["default"].weight
        assert torch.equal(after, state[f"language_model.{LORA_B}"])
        assert not torch.equal(after, before)
        assert torch.equal(layer.base_layer.weight, quantized) == (quantization == bits)
    arguments = training_flags(checkpoint, data_path, tmp_path / "resumed", **flags)
    checkpoint_3 = str(tmp_path / "run" / "checkpoint-3")
    finetune([*arguments, "--gradient_checkpointing", "--resume_from_checkpoint", checkpoint_3])
    assert not different(state_of(tmp_path / "resumed"), state)
    # Gradient checkpointing computes the same gradients.
    finetune(training_flags(checkpoint, data_path, tmp_path / "stored", **flags))
    torch.testing.assert_close(state_of(tmp_path / "stored"), state, rtol=0, atol=1e-5)


def test_a_fresh_lora_on_a_quantized_language_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra 4bit is not installed")
    folder = write_checkpoint(tmp_path / "checkpoint", write_llm(tmp_path / "llm"))
    layer = open_with(folder, quantization="4bit").language_model.model.layers[1].self_attn.v_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    assert layer.base_layer.weight.quant_type == "nf4"
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert layer.lora_A["default"].weight.requires_grad
    assert not layer.base_layer.weight.requires_grad


LORA_B = "model.layers.0.self_attn.q_proj.lora_B.default.weight"


def test_a_wrong_number_of_bits(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        open_with(checkpoint, quantization="3bit")
    assert "--quantization 3bit: choose from 4bit, 8bit" in capsys.readouterr().err


def test_a_quantized_language_model_has_no_full_plan(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"merge_lora\(\) first"):
        model.set_trainable("full")
    model.language_model.is_quantized = True
    with pytest.raises(ValueError, match="is quantized: LoRA cannot be merged"):
        model.merge_lora()


# --- liger-kernel


def test_liger_gets_the_language_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels themselves need a GPU."""
    monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    calls = []
    monkeypatch.setitem(
        monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN,
        "llama",
        lambda model=None, rope=True: calls.append((model, rope)),
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    apply_liger(model, {"rope": False})
    assert calls == [(model.language_model, False)]
    model.language_model.config.model_type = "gpt_neox"
    with pytest.raises(ValueError, match="no kernels for a gpt_neox. It has them for .*llama"):
        apply_liger(model)


def test_liger_that_is_not_installed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"--use_liger_kernel: .*pip install -e '.\[liger\]'"):
        apply_liger(model)


# --- weights that are not finite


def write_broken(checkpoint: Path, folder: Path, value: float) -> Path:
    """Copy a checkpoint folder, with one value of its projection replaced."""
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    state = state_of(checkpoint)
    state["multi_modal_projector.linear.weight"][1, 2] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # The path of the language model is relative to the folder.
    config = json.loads((folder / "config.json").read_text())
    if config["language_model"] is not None:
        config["language_model"] = str(checkpoint.parent / "llm")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_folder_with_weights_that_are_not_finite(
    checkpoint: Path, tmp_path: Path, value: float
) -> None:
    folder = write_broken(checkpoint, tmp_path / "broken", value)
    message = rf"{folder} is not opened: 1 of \d+ tensors .*multi_modal_projector.linear.weight"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    for words in (["--to_original", "back.bin"], ["--merge", "--output_dir", "merged"]):
        output = tmp_path / words[-1]
        with pytest.raises(ValueError, match="is not written from .*broken: 1 of .*proj"):
            convert(["--model", str(folder), *words[:-1], str(output)])
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_model_that_diverged_is_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, parameter in model.named_parameters():
        if ".lora_A" in name:
            parameter.data[0, 0] = float("nan")
    message = r"is not written: 4 of \d+ tensors .*lora_A.*lora_A.*lora_A.*, \.\.\.\).*Train again"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_files_of_others_that_are_not_finite(original: Path, tmp_path: Path) -> None:
    file = tmp_path / "full.bin"
    state = torch.load(original, weights_only=True)
    state["base_model.model.model.norm.weight"][3] = float("inf")
    torch.save(state, file)
    flags = ["--llm", str(original.parent / "llm"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="from full.bin: 1 of .*language_model.model.norm.weight"):
        convert([*flags, "--checkpoint", str(file)])
    assert [path.name for path in tmp_path.iterdir()] == ["full.bin"]


def test_a_dtype_that_is_too_small_for_the_weights(full: Path, tmp_path: Path) -> None:
    folder = write_broken(full, tmp_path / "large", 1.0)
    state = state_of(folder)
    state["language_model.lm_head.weight"][0, 0] = 1e5  # More than the largest number of fp16.
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    flags = ["--model", str(folder), "--merge", "--llm_dtype", "float16"]
    with pytest.raises(ValueError, match="large: 1 of .*lm_head"):
        convert([*flags, "--output_dir", str(tmp_path / "half")])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_position_and_dtype_is_checked(dtype: torch.dtype) -> None:
    good = torch.zeros(3, 40, dtype=dtype)
    check_finite({"a": good, "empty": torch.zeros(0, dtype=dtype)}, "folder")
    for value in (float("nan"), float("inf"), -float("inf")):
        for position in (0, 39, 119):
            bad = good.clone()
            bad.view(-1)[position] = value
            with pytest.raises(ValueError, match=r"folder: 1 of 2 .*\(b\)"):
                check_finite({"a": good, "b": bad}, "folder")
            with pytest.raises(ValueError, match=r"\(b\)"):
                check_finite({"a": good, "b": bad.t()}, "folder")


def test_tensors_without_values_that_can_be_read() -> None:
    state = {
        "meta": torch.empty(2, device="meta"),
        "integers": torch.full((2,), 255, dtype=torch.uint8),
        "eight_bits": torch.ones(2).to(torch.float8_e4m3fn),
    }
    check_finite(state, "folder")
