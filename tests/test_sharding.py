"""Tests FSDP2: two ranks on gloo against one process, and what cannot be sharded.

The ranks run `tests.finetune_on_gloo`: the command with the Trainer and accelerate as on GPUs.
"""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from ltu import LtuConfig, LtuForConditionalGeneration
from ltu.finetune import main
from ltu.models.configuration_ltu import YamnetConfig
from ltu.training import sharding
from ltu.training.batch_sampler import MicroBatchSampler
from ltu_as import LtuAsConfig, LtuAsForConditionalGeneration
from ltu_as.configuration_ltu_as import TltrConfig
from tests.machine import PATIENCE
from tests.tiny import (
    LLM,
    LORA,
    SPECIAL,
    audio_config,
    start_ranks,
    training_flags,
    write_checkpoint,
    write_llm,
    write_rows,
)

CONFIG = Path("train_scripts/configs/fsdp.json")
FSDP = ["--fsdp", "--fsdp_config", str(CONFIG)]
NUM_EXAMPLES = 20
NUM_WITHOUT_AUDIO = 8
COMMON = {"batch_size": 8, "save_steps": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Path:
    return write_checkpoint(root / "checkpoint", write_llm(root / "llm"), LORA)


@pytest.fixture(scope="module")
def data_path(root: Path) -> Path:
    return write_rows(root / "rows", NUM_EXAMPLES, without_audio=NUM_WITHOUT_AUDIO)


@pytest.fixture(scope="module")
def full(checkpoint: Path, data_path: Path, root: Path) -> tuple[Path, Path]:
    """Full fine-tuning in one process, and sharded over two ranks."""
    flags = COMMON | {"trainable_params": "full"}
    main(training_flags(checkpoint, data_path, root / "one", **flags))
    run_ranks(training_flags(checkpoint, data_path, root / "two", **flags))
    return root / "one", root / "two"


def run_ranks(words: list[str]) -> None:
    """Train sharded over two ranks on gloo."""
    output = Path(words[words.index("--output_dir") + 1])
    printed = Path(f"{output}.printed")
    for rank in start_ranks(2, "tests.finetune_on_gloo", words + FSDP, printed):
        rank.join(PATIENCE)
        assert rank.exitcode == 0, Path(f"{printed}.0").read_text()[-3000:]


def logged(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(found: Path, expected: Path, bound: float = 1e-5) -> None:
    first = weights(found)
    second = weights(expected)
    assert first.keys() == second.keys()
    for key, value in second.items():
        assert first[key].dtype == value.dtype
        error = (first[key] - value).abs()
        if key.endswith("attn.qkv.bias"):
            # Attention does not depend on the bias of the keys: its gradient is rounding, which
            # Adam scales to the learning rate.
            queries, _, values = error.chunk(3)
            error = torch.cat([queries, values])
        assert error.max() <= bound, key


def read_sharding(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"sharding.{rank}.json").read_text())


# --- two ranks


def test_micro_batches_with_and_without_audio_meet() -> None:
    """In some step of the runs below, one rank has audio and the other none."""
    has_audio = []
    for rank in range(2):
        batches = MicroBatchSampler(NUM_EXAMPLES, 2, accumulation=2, rank=rank, world_size=2)
        has_audio.append([any(index >= NUM_WITHOUT_AUDIO for index in batch) for batch in batches])
    assert has_audio[0][:5] != has_audio[1][:5]


def test_full_fine_tuning_equals_one_process(full: tuple[Path, Path]) -> None:
    one, two = full
    assert len(logged(two, "loss")) == 4
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), abs=1e-5)
    assert logged(two, "grad_norm") == pytest.approx(logged(one, "grad_norm"), abs=1e-5)
    for folder in ("", "checkpoint-2", "checkpoint-4"):
        assert_same_weights(two / folder, one / folder)


def test_every_parameter_is_sharded(full: tuple[Path, Path]) -> None:
    reports = [read_sharding(full[1], rank) for rank in range(2)]
    for name, parameter in reports[0]["parameters"].items():
        assert parameter["is_sharded"], name
        num_local = parameter["num_local"] + reports[1]["parameters"][name]["num_local"]
        assert num_local == parameter["num_elements"], name
    # Each layer is a unit of its own, which is gathered alone.
    units = {name.replace("._checkpoint_wrapped_module", "") for name in reports[0]["units"]}
    layers = {f"language_model.model.layers.{number}" for number in range(2)}
    assert layers | {"audio_tower.blocks_a.0", "audio_tower.blocks_u.0", ""} <= units


def test_a_checkpoint_is_written_once(full: tuple[Path, Path]) -> None:
    """The weights are whole; the optimizer states are sharded, a file of each rank."""
    files = {path.name for path in (full[1] / "checkpoint-2").rglob("*") if path.is_file()}
    parts = {name for name in files if name.endswith(".distcp")}
    assert parts == {"__0_0.distcp", "__1_0.distcp"}
    assert not {name for name in files if "fsdp" in name}
    assert (full[1] / "checkpoint-2" / sharding.OPTIMIZER_FOLDER / "__1_0.distcp").is_file()


def test_a_sharded_folder_opens(full: tuple[Path, Path]) -> None:
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in full]
    assert type(models[1]) is LtuForConditionalGeneration
    assert json.loads((full[1] / "config.json").read_text()) == json.loads(
        (full[0] / "config.json").read_text()
    )
    tokens = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        one, two = (model(input_ids=tokens).logits for model in models)
    assert torch.allclose(one, two, atol=1e-3)


def test_a_resumed_run_equals_an_uninterrupted_one(
    full: tuple[Path, Path], checkpoint: Path, data_path: Path, tmp_path: Path
) -> None:
    flags = COMMON | {"trainable_params": "full"}
    flags["resume_from_checkpoint"] = full[1] / "checkpoint-2"
    run_ranks(training_flags(checkpoint, data_path, tmp_path / "resumed", **flags))
    assert logged(tmp_path / "resumed", "loss") == logged(full[1], "loss")
    assert_same_weights(tmp_path / "resumed", full[1], bound=0.0)


def test_a_sharded_run_does_not_continue_without_fsdp(
    full: tuple[Path, Path], checkpoint: Path, data_path: Path, tmp_path: Path
) -> None:
    flags = COMMON | {"trainable_params": "full"}
    flags["resume_from_checkpoint"] = full[1] / "checkpoint-2"
    with pytest.raises(ValueError, match="was written with --fsdp"):
        main(training_flags(checkpoint, data_path, tmp_path / "run", **flags))


def test_lora_next_to_bf16_equals_one_process(
    checkpoint: Path, data_path: Path, tmp_path: Path
) -> None:
    flags = COMMON | {"bf16": True, "val_set_size": 4}
    main(training_flags(checkpoint, data_path, tmp_path / "one", **flags))
    run_ranks(training_flags(checkpoint, data_path, tmp_path / "two", **flags))
    for name in ("loss", "grad_norm", "eval_loss"):
        expected = logged(tmp_path / "one", name)
        assert logged(tmp_path / "two", name) == pytest.approx(expected, abs=1e-5), name
    # Gradients of fp32 weights are rounded to bf16, and Adam scales small ones up.
    assert_same_weights(tmp_path / "two", tmp_path / "one", bound=1e-2)

    parameters = read_sharding(tmp_path / "two", 0)["parameters"]
    assert all(parameter["is_sharded"] for parameter in parameters.values())
    for name, parameter in parameters.items():
        is_frozen_llm = name.startswith("language_model.") and ".lora_" not in name
        assert parameter["dtype"] == ("torch.bfloat16" if is_frozen_llm else "torch.float32"), name
    # The frozen language model is not in the checkpoint.
    keys = weights(tmp_path / "two" / "checkpoint-2").keys()
    assert any(".lora_" in key for key in keys)
    assert not [key for key in keys if "embed_tokens" in key or "down_proj" in key]


# --- what is sharded, and in which dtype


def tiny_models() -> list[LtuForConditionalGeneration]:
    """A model with each audio encoder, with random weights."""
    text_config = AutoConfig.for_model("llama", **(LLM | SPECIAL))
    yamnet = YamnetConfig(num_mel_bins=32, num_frames=64, hidden_size=32)
    tltr = TltrConfig(hidden_size=32, num_whisper_layers=3, num_audio_tokens=4)
    return [
        LtuForConditionalGeneration(
            LtuConfig(audio_config=audio_config(), text_config=text_config)
        ),
        LtuForConditionalGeneration(LtuConfig(audio_config=yamnet, text_config=text_config)),
        LtuAsForConditionalGeneration(LtuAsConfig(audio_config=tltr, text_config=text_config)),
    ]


def test_layers_are_found_in_the_model() -> None:
    found = [sharding.find_layer_classes(model) for model in tiny_models()]
    audio_blocks = ("CavMaeBlock", "YamnetBlock", "TltrBlock")
    assert found == [sorted([block, "LlamaDecoderLayer"]) for block in audio_blocks]


def test_a_model_without_declared_layers_is_refused() -> None:
    model = tiny_models()[0]
    model.language_model._no_split_modules = None
    expected = "LlamaForCausalLM does not declare its layers .* repeated ones are LlamaDecoderLayer"
    with pytest.raises(ValueError, match=expected):
        sharding.find_layer_classes(model)


def test_precision() -> None:
    model = tiny_models()[0]
    model.add_lora(r=2, lora_alpha=4, lora_dropout=0.0)
    model.set_trainable("all")
    assert sharding.choose_precision(model, bf16=True).param_dtype is None
    model.language_model.requires_grad_(True)
    policy = sharding.choose_precision(model, bf16=True)
    assert policy.param_dtype == torch.bfloat16
    assert policy.reduce_dtype == torch.float32
    assert policy.output_dtype is None
    assert sharding.choose_precision(model, bf16=False).param_dtype is None


def test_a_clip_without_placeholders_changes_nothing() -> None:
    """It is encoded, so that the ranks meet, and its gradient is zero."""
    for model in tiny_models():
        model.requires_grad_(True)
        tokens = torch.tensor([[1, 50, 60, 70]])
        clip = {
            "input_features": torch.zeros(1, *model.config.audio_config.feature_shape),
            "audio_index": torch.empty(0, dtype=torch.long),
        }
        alone = model(input_ids=tokens, labels=tokens).loss
        loss = model(input_ids=tokens, labels=tokens, **clip).loss
        assert torch.equal(loss, alone)
        loss.backward()
        unused = set(getattr(model.audio_tower, "unused_parameter_names", ()))
        for name, parameter in model.audio_tower.named_parameters():
            if name not in unused:
                assert parameter.grad is not None, name
                assert not parameter.grad.any(), name


def test_tied_weights_are_gathered_once() -> None:
    settings = LLM | SPECIAL | {"tie_word_embeddings": True}
    text_config = AutoConfig.for_model("llama", **settings)
    config = LtuConfig(audio_config=audio_config(), text_config=text_config)
    model = LtuForConditionalGeneration(config)
    gathered = sharding.gather_weights(model, keep=True)
    assert gathered.keys() == model.state_dict().keys()
    embeddings = gathered["language_model.model.embed_tokens.weight"]
    assert gathered["language_model.lm_head.weight"] is embeddings
    assert sharding.gather_weights(model, keep=False) == {}


# --- what is refused


def test_fsdp_without_gpus_is_refused(
    checkpoint: Path, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        main(training_flags(checkpoint, data_path, tmp_path / "run") + FSDP)
    assert end.value.code == 2
    assert "error: --fsdp: this machine has no GPU" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"version": 1}, "only FSDP2"),
        ({"xla": True}, "torch_xla"),
        ({"cpu_ram_efficient_loading": True}, "buffers of the audio encoder"),
    ],
)
def test_settings_that_do_not_work_are_refused(
    settings: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it.
    model = tiny_models()[0]
    stored = json.loads(CONFIG.read_text())
    arguments = TrainingArguments(tmp_path, fsdp=True, fsdp_config=stored | settings, use_cpu=True)
    with pytest.raises(ValueError, match=message):
        sharding.check_settings(model, arguments)


def test_other_flags_that_do_not_work_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    model = tiny_models()[0]
    common = {"fsdp": True, "use_cpu": True}
    arguments = TrainingArguments(tmp_path, fsdp_config=json.loads(CONFIG.read_text()), **common)
    sharding.check_settings(model, arguments)
    arguments.torch_compile = True
    with pytest.raises(ValueError, match="--torch_compile"):
        sharding.check_settings(model, arguments)
    arguments.torch_compile = False
    model.hf_device_map = {"": 0}
    with pytest.raises(ValueError, match="--device_map"):
        sharding.check_settings(model, arguments)


class RunsCode:
    """Runs code when it is opened as a pickle."""

    def __reduce__(self) -> tuple:
        return print, ("code",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / sharding.METADATA_FILE
    path.write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(ValueError, match="refers to builtins.print"):
        sharding.check_metadata(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        sharding.check_metadata(path)
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        sharding.check_metadata(path)
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_optimizer_states_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    model = tiny_models()[0]
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written: rank 0"):
        sharding.save_optimizer(model, optimizer, tmp_path / "file")
    sharding.save_optimizer(model, optimizer, tmp_path / "folder")
    sharding.load_optimizer(model, optimizer, tmp_path / "folder")
    part = next((tmp_path / "folder").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        sharding.load_optimizer(model, optimizer, tmp_path / "folder")


@pytest.mark.parametrize(
    "content, reason",
    [(None, "No such file"), ("{", "is damaged"), ("[]", "is a list, not an object")],
)
def test_a_config_of_fsdp_that_cannot_be_read(tmp_path, capsys, content, reason):
    path = tmp_path / "fsdp.json"
    if content is not None:
        path.write_text(content)
    flags = training_flags(tmp_path / "model", tmp_path / "rows.json", tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        main([*flags, "--fsdp_config", str(path)])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --fsdp_config") and message.count("\n") == 1
    assert str(path) in message and reason in message
