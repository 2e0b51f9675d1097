"""Tests that compiled layers train as layers that are not, and that training goes on without."""

import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from ltu import LtuConfig, LtuForConditionalGeneration, YamnetConfig
from ltu.finetune import main
from ltu.training import compiled_layers
from ltu.training.arguments import parse_args
from ltu.training.compiled_layers import (
    MIN_EXAMPLES,
    RECOMPILE_LIMIT,
    chooses_compilation,
    compile_layers,
    describe_failure,
    find_layers,
    undo_compilation,
)
from ltu_as import LtuAsConfig, LtuAsForConditionalGeneration, TltrConfig
from tests import tiny

CUDA = torch.device("cuda")  # Only its name is used.
# Of the text. With two audio tokens, 62 are 64, which is also the width of the language model.
LENGTHS = (20, 31, 62, 23)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    lora = tiny.LORA | {"lora_dropout": 0.3}
    return tiny.write_checkpoint(root / "checkpoint", tiny.write_llm(root / "llm"), lora)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("data"), 14)


def open_tiny(folder: Path, checkpointing: bool = False) -> LtuForConditionalGeneration:
    """Open a checkpoint to train LoRA and the audio encoder, without dropout."""
    model = LtuForConditionalGeneration.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.set_trainable("all")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_batch(model: LtuForConditionalGeneration, length: int, rows: int = 3) -> dict[str, Any]:
    """Return rows of one clip and random text each; the second row is padded."""
    generator = torch.Generator().manual_seed(length)
    config = model.config
    num_tokens = config.num_audio_tokens
    input_ids = torch.randint(3, 500, (rows, num_tokens + length), generator=generator)
    input_ids[:, :num_tokens] = config.audio_token_id
    mask = torch.ones_like(input_ids)
    mask[1:2, num_tokens : num_tokens + 4] = 0
    labels = input_ids.masked_fill((mask == 0) | (input_ids == config.audio_token_id), -100)
    shape = config.audio_config.feature_shape
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
        "input_features": torch.randn(rows, *shape, generator=generator),
        "use_cache": False,
    }


def train(
    model: LtuForConditionalGeneration, bf16: bool = False
) -> tuple[list[float], list[torch.Tensor]]:
    """Train a step on each length; return the losses, and the gradients of the last step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    losses = []
    for length in LENGTHS:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**make_batch(model, length)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    return losses, gradients


def check_equal_training(
    eager: LtuForConditionalGeneration, backend: str, num_kinds: int = 3
) -> dict[str, int]:
    """Check losses, gradients, names and the number of compilations, over all lengths.

    Args:
        eager: the model.
        backend: of `torch.compile`, which compiles a copy of the model.
        num_kinds: of layers. Blocks of CAV-MAE with joint norms are one kind, those with audio
            norms another one, and decoder layers a third one.

    Returns:
        What the compiler has counted.
    """
    compiled = copy.deepcopy(eager)
    keys = list(compiled.state_dict())
    layers = find_layers(compiled)
    compile_layers(layers, backend)
    losses, gradients = train(eager)
    found_losses, found = train(compiled)

    assert counters["stats"]["unique_graphs"] == num_kinds
    assert not counters["graph_break"]
    assert found_losses == pytest.approx(losses, abs=2e-6)
    assert len(found) == len(gradients) > 0
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)
    assert list(compiled.state_dict()) == keys
    counts = dict(counters["inductor"])

    # When it is undone, an input of another kind is not compiled any more.
    undo_compilation(layers)
    counters.clear()
    compiled(**make_batch(compiled, 20, rows=1))
    assert not counters["stats"]
    return counts


def test_training_is_equal(checkpoint: Path) -> None:
    check_equal_training(open_tiny(checkpoint), "eager")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_a_compiled_backward_pass_is_equal(
    checkpoint: Path, checkpointing: bool
) -> None:
    check_equal_training(open_tiny(checkpoint, checkpointing), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "gemma2"])
def test_training_of_other_language_models_is_equal(tmp_path: Path, model_type: str) -> None:
    settings = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if model_type == "gpt2" else {}
    lora = {**tiny.LORA, "target_modules": ["c_attn"]} if model_type == "gpt2" else tiny.LORA
    llm = tiny.write_llm(tmp_path / "llm", model_type, **settings)
    folder = tiny.write_checkpoint(tmp_path / "model", llm, lora)
    check_equal_training(open_tiny(folder), "aot_eager")


@pytest.mark.slow
def test_training_of_tltr_is_equal() -> None:
    model = make_ltu_as().train()
    model.set_trainable("all")
    check_equal_training(model, "aot_eager")


def make_ltu_as() -> LtuAsForConditionalGeneration:
    config = LtuAsConfig(
        audio_config=TltrConfig(hidden_size=32, num_layer_heads=2),
        text_config=tiny.AutoConfig.for_model("llama", **tiny.LLM),
        lora=tiny.LORA,
    )
    return LtuAsForConditionalGeneration(config)


def test_layers_of_models() -> None:
    """The layers are found by their class; a model without such layers has none."""
    names = {}
    for model_type in ("llama", "gpt2", "openai-gpt"):
        config = tiny.AutoConfig.for_model(model_type, **tiny.LLM)
        layers = find_layers(AutoModelForCausalLM.from_config(config))
        names[model_type] = [type(layer).__name__ for layer in layers]
    assert names["llama"] == ["LlamaDecoderLayer"] * 2
    assert set(names["gpt2"]) == {"GPT2Block"}
    assert names["openai-gpt"] == []

    llama = tiny.AutoConfig.for_model("llama", **tiny.LLM)
    yamnet = LtuForConditionalGeneration(
        LtuConfig(audio_config=YamnetConfig(hidden_size=32), text_config=llama, lora=tiny.LORA)
    )
    assert len(find_layers(yamnet)) == 2
    tltr = make_ltu_as()
    assert find_layers(tltr) == [
        tltr.audio_tower.time_tr,
        tltr.audio_tower.layer_tr,
        *tltr.language_model.model.layers,
    ]


def test_the_limit_of_compilations_is_raised_not_lowered(checkpoint: Path) -> None:
    """torch's own limit of 8 is for all layers together, and stops compilation silently."""
    layers = find_layers(open_tiny(checkpoint))
    compile_layers(layers, "eager")
    assert torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT
    torch._dynamo.config.recompile_limit = 100
    compile_layers(layers, "eager")
    assert torch._dynamo.config.recompile_limit == 100


# --- the choice


def choose(*more: str, num_examples: int = MIN_EXAMPLES, device: torch.device = CUDA) -> bool:
    required = "--base_model base --data_path data.json --output_dir run".split()
    model_args, _, run = parse_args([*required, *more])
    return chooses_compilation(model_args, run, num_examples, device)


@pytest.mark.parametrize(
    ("more", "changes", "expected"),
    [
        ([], {}, True),
        ([], {"num_examples": MIN_EXAMPLES - 1}, False),
        ([], {"device": torch.device("cpu")}, False),
        ([], {"device": torch.device("mps")}, False),
        (["--quantization", "4bit"], {}, False),
        (["--device_map", "auto"], {}, False),
        (["--torch_compile"], {}, False),
        (["--compile_layers"], {"num_examples": 1, "device": torch.device("cpu")}, True),
        (["--compile_layers", "true", "--quantization", "4bit"], {}, True),
        (["--compile_layers", "False"], {}, False),
    ],
)
def test_choice(more: list[str], changes: dict[str, Any], expected: bool) -> None:
    assert choose(*more, **changes) is expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compile_layers", "maybe"], "--compile_layers maybe: choose"),
        (["--compile_layers", "--torch_compile"], "does not work with --torch_compile"),
        (["--compile_layers", "--device_map", "auto"], "does not work with --device_map"),
    ],
)
def test_flags_that_contradict(capsys, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        choose(*more)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert message in error and len(error.splitlines()) == 1


# --- the command


@pytest.fixture
def run(
    checkpoint: Path, data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Train three steps with some flags, and return the folder of the run.

    The compiler of the tests takes the layers as torch reads them, and generates no code.
    """

    def finetune(*more: str, compiler: Any = "eager", data_path: Path = data_path) -> Path:
        monkeypatch.setattr(compiled_layers, "COMPILER", compiler)
        folder = tmp_path / "run"
        words = tiny.training_flags(checkpoint, data_path, folder, save_steps=2, val_set_size=2)
        assert main([*words, *more]) == 0
        return folder

    return finetune


@pytest.fixture(scope="module")
def plain(checkpoint: Path, data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run without compiled layers."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    words = tiny.training_flags(checkpoint, data_path, folder, save_steps=2, val_set_size=2)
    assert main(words) == 0
    assert not is_compiled(folder)
    assert not counters["stats"]
    return folder


def losses_of(folder: Path, key: str = "loss") -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def is_compiled(folder: Path) -> bool:
    return json.loads((folder / "ltu_state.json").read_text())["compiled_layers"]


def check_equal_runs(found: Path, expected: Path) -> None:
    for key in ("loss", "eval_loss"):
        assert losses_of(found, key) == pytest.approx(losses_of(expected, key), abs=1e-5)
    weights = load_file(found / "model.safetensors")
    expected_weights = load_file(expected / "model.safetensors")
    assert set(weights) == set(expected_weights)
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[key], rtol=1e-3, atol=1e-4)


def test_run(run: Callable[..., Path], plain: Path) -> None:
    """A run with compiled layers equals one without, and continues without them."""
    folder = run("--compile_layers")
    assert is_compiled(folder)
    # Decoder layers are compiled with a mask and without. Evaluation compiles none.
    assert 3 <= counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]
    check_equal_runs(folder, plain)

    state = json.loads((folder / "checkpoint-2" / "ltu_state.json").read_text())
    assert state["compiled_layers"]
    shutil.rmtree(folder / "checkpoint-3")
    for name in ("ltu_state.json", "model.safetensors"):
        (folder / name).unlink()
    run("--compile_layers", "False", "--resume_from_checkpoint", "last")
    assert not is_compiled(folder)
    check_equal_runs(folder, plain)


def test_a_language_model_without_layers(data_path: Path, tmp_path: Path) -> None:
    base = tiny.write_checkpoint(tmp_path / "base", tiny.write_llm(tmp_path / "llm", "openai-gpt"))
    flags = tiny.training_flags(base, data_path, tmp_path / "run", compile_layers=True, lora_r=4)
    with pytest.raises(ValueError, match="a openai-gpt has no layers that can be compiled"):
        main([*flags, "--lora_target_modules", "[c_attn]"])


def fail_in_forward(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> None:
    raise FileNotFoundError("no compiler")


def fail_in_backward(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> None:
    raise RuntimeError("no compiler\nand a second line")


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param(fail_in_forward, id="forward"),
        pytest.param(
            aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fail_in_backward),
            id="backward",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_without_a_compiler_one_line_warns(
    run: Callable[..., Path], plain: Path, caplog: pytest.LogCaptureFixture, compiler: Any
) -> None:
    with caplog.at_level(logging.WARNING, "ltu"):
        folder = run("--compile_layers", compiler=compiler)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("ltu")]
    assert len(warnings) == 1
    assert warnings[0].startswith("--compile_layers: the layers cannot be compiled")
    assert "no compiler" in warnings[0] and "\n" not in warnings[0]
    assert not is_compiled(folder)
    assert losses_of(folder) == losses_of(plain)


def test_memory_for_a_part_of_a_micro_batch_only(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With passes of one row, layers are compiled on one row."""
    rows = record_rows(monkeypatch)
    folder = run("--compile_layers", "--rows_per_pass", "1")
    assert set(rows) == {1}
    assert is_compiled(folder)


def test_layers_are_compiled_on_a_part_if_memory_is_not_enough(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = record_rows(monkeypatch, limit=1)
    folder = run("--compile_layers")
    assert rows[:4] == [2, 1, 2, 1]  # In the pass that compiles, and in the first of the run.
    assert is_compiled(folder)


def record_rows(monkeypatch: pytest.MonkeyPatch, limit: int | None = None) -> list[int]:
    """Return a list that gets the rows of each pass that trains; larger ones run out of memory."""
    rows = []
    stock_forward = LtuForConditionalGeneration.forward

    def forward(self: LtuForConditionalGeneration, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if self.training:
            rows.append(len(input_ids))
            if limit is not None and len(input_ids) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return stock_forward(self, input_ids, **kwargs)

    monkeypatch.setattr(LtuForConditionalGeneration, "forward", forward)
    return rows


def test_a_failure_later_is_an_error_of_one_line(run: Callable[..., Path], tmp_path: Path) -> None:
    """A micro-batch of another kind is compiled later, for example one that has a single clip."""
    data_path = tiny.write_rows(tmp_path / "data", 14, without_audio=3)
    num_graphs = 0

    def fail_later(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal num_graphs
        num_graphs += 1
        if num_graphs > 3:
            raise OSError("No space left on device")
        return graph

    with pytest.raises(ValueError, match="a layer cannot be compiled") as raised:
        run("--compile_layers", compiler=fail_later, data_path=data_path)
    message = str(raised.value)
    assert "No space left on device" in message and "\n" not in message
    assert "--resume_from_checkpoint last --compile_layers False" in message


def test_descriptions_of_failures() -> None:
    assert describe_failure(RuntimeError("\n first \n second")) == "first"
    assert describe_failure(RuntimeError("backend raised:\n  reason\n")) == "backend raised: reason"
    assert describe_failure(RuntimeError()) == "RuntimeError"


# --- the real compiler


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_command_without_cxx_compiler(
    checkpoint: Path, data_path: Path, tmp_path: Path, num_ranks: int
) -> None:
    environment = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = tiny.training_flags(checkpoint, data_path, tmp_path / "run", compile_layers=True)
    file = tmp_path / "output"
    ranks = tiny.start_ranks(num_ranks, "ltu.finetune", words, file, **environment)
    output = ""
    for number, rank in enumerate(ranks):
        rank.join()
        output += Path(f"{file}.{number}").read_text(encoding="utf-8")
    assert [rank.exitcode for rank in ranks] == [0] * num_ranks, output
    assert output.count("--compile_layers: the layers cannot be compiled") == 1
    assert "Traceback" not in output
    assert not is_compiled(tmp_path / "run")


@pytest.mark.slow
@needs_compiler
def test_two_ranks(checkpoint: Path, data_path: Path, tmp_path: Path) -> None:
    """Both compile; their losses are those of the run without compiled layers."""
    folders = []
    for choice in (False, True):
        folder = tmp_path / f"run_{choice}"
        words = tiny.training_flags(checkpoint, data_path, folder, compile_layers=choice)
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        for rank in tiny.start_ranks(2, "ltu.finetune", words, tmp_path / "output", **environment):
            rank.join()
            assert rank.exitcode == 0
        assert is_compiled(folder) is choice
        folders.append(folder)
    first, second = (losses_of(folder) for folder in folders)
    assert first == pytest.approx(second, rel=0.1)  # Dropout takes other random numbers.


@pytest.mark.slow
@needs_compiler
def test_inductor(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own compiler, whose results a later run takes from its cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = open_tiny(checkpoint)
    first = check_equal_training(copy.deepcopy(model), "inductor")
    assert first["fxgraph_cache_miss"] > 0
    torch.compiler.reset()
    later = check_equal_training(model, "inductor")
    assert later["fxgraph_cache_hit"] > 0
    assert "fxgraph_cache_miss" not in later


@pytest.mark.slow
@needs_compiler
def test_inductor_seeds_dropout(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    losses = []
    for seed in (1, 1, 2):
        model = open_tiny(checkpoint)
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(0.5)
        compile_layers(find_layers(model))
        torch.manual_seed(seed)
        losses.append(train(model)[0])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
@needs_compiler
def test_inductor_in_bf16(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    expected, _ = train(open_tiny(checkpoint), bf16=True)
    compiled = open_tiny(checkpoint)
    compile_layers(find_layers(compiled))
    losses, _ = train(compiled, bf16=True)
    assert losses == pytest.approx(expected, rel=2**-7)  # The rounding of bf16 is 2**-8.
