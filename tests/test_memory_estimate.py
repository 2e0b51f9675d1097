"""Tests the estimated memory of a training run against measured peaks, and what --plan prints."""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.cpu_training_memory import peak_of_allocations
from benchmarks.gpu_speed_and_memory import make_model, train
from ltu import LtuConfig
from ltu.finetune import main
from ltu.training import memory_plan
from ltu.training.memory_estimate import (
    build_on_meta,
    enable_checkpointing,
    quantize,
    trace_training,
)
from ltu.training.memory_plan import interpolate, needed_bytes
from tests.tiny import (
    LLM,
    LORA,
    audio_config,
    training_flags,
    write_checkpoint,
    write_llm,
    write_rows,
)

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GIB = 2**30
BOUND = 0.15
H100_GIB = 79.1  # What the driver reports for the GPU of the measurements.

# (kind, size, what is trained, micro-batch size, gradient checkpointing) of the measurements that
# the quick test compares.
SPREAD = [
    ("ltu", "7b", "proj", 64, False),
    ("ltu", "7b", "all", 1, True),
    ("ltu_as", "7b", "all", 32, False),
    ("ltu", "13b", "all", 8, True),
]


def measurements(name):
    return json.loads((RESULTS / name).read_text())["training"]


def estimate(row, cuda, micro_batch=None):
    """Return the estimated memory of a measured run."""
    model = make_model(row["kind"], row["llm"], row["trainable_params"], torch.device("meta"))
    model.set_trainable(row["trainable_params"])
    if row["gradient_checkpointing"]:
        enable_checkpointing(model)
    size = micro_batch or row["micro_batch"]
    return trace_training(model, size, row["text_tokens"], cuda=cuda)


def error_of(row, memory):
    """Return the relative error of an estimated peak, and print both."""
    error = memory.peak / GIB / row["peak_gib"] - 1
    print(f"{row['peak_gib']:.2f} GiB measured, {memory.peak / GIB:.2f} estimated, {error:+.1%}")
    return error


def is_in_spread(row):
    names = ("kind", "llm", "trainable_params", "micro_batch", "gradient_checkpointing")
    return tuple(row[name] for name in names) in SPREAD and row["text_tokens"] == 108


def test_estimate_equals_measured_peaks_of_a_gpu():
    rows = [row for row in measurements("gpu_speed_and_memory_h100.json") if is_in_spread(row)]
    assert len(rows) == len(SPREAD)
    for row in rows:
        assert abs(error_of(row, estimate(row, cuda=True))) < BOUND


@pytest.mark.slow
def test_estimate_equals_all_measured_peaks_of_a_gpu():
    """Also that the runs which were measured fit, and that the one which was out of memory not."""
    errors = []
    for row in measurements("gpu_speed_and_memory_h100.json"):
        memory = estimate(row, cuda=True)
        fits = needed_bytes(memory) <= H100_GIB * GIB
        assert fits != row.get("out_of_memory", False)
        if fits:
            errors.append(error_of(row, memory))
    print(f"worst of {len(errors)}: {max(errors, key=abs):+.1%}")
    assert max(map(abs, errors)) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_extrapolates_to_larger_micro_batches(checkpointing):
    rows = measurements("gpu_speed_and_memory_h100.json")
    names = ("kind", "llm", "trainable_params", "micro_batch", "gradient_checkpointing")
    wanted = ("ltu", "7b", "all", 64, checkpointing)
    [row] = [row for row in rows if tuple(row[name] for name in names) == wanted]
    low = estimate(row, cuda=True, micro_batch=1)
    high = estimate(row, cuda=True, micro_batch=4)
    assert abs(error_of(row, interpolate(low, high, fraction=63 / 3))) < BOUND


def test_run_that_was_out_of_memory_does_not_fit():
    [row] = [
        row
        for row in measurements("gpu_speed_and_memory_h100.json")
        if row.get("out_of_memory", False)
    ]
    assert needed_bytes(estimate(row, cuda=True)) > H100_GIB * GIB


@pytest.mark.parametrize("number", [0, 1])
def test_estimate_equals_measured_peaks_of_a_cpu(number):
    row = measurements("cpu_training_memory.json")[number]
    assert abs(error_of(row, estimate(row, cuda=False))) < BOUND


# --- a small model

TEXT = LlamaConfig(**(LLM | {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768}))
TEXT.head_dim = 64


def small_model(plan, device, dtype=torch.bfloat16):
    config = LtuConfig(audio_config=audio_config(), text_config=TEXT)
    if device == "meta":
        model = build_on_meta(config, dtype)
    else:
        llm = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        model = AutoModelForCausalLM.from_config(config, language_model=llm)
    if plan == "all":
        model.add_lora(**LORA)
    model.set_trainable(plan)
    return model


@pytest.mark.parametrize("plan", ["proj", "all", "full"])
def test_estimate_equals_the_allocations_of_this_machine(plan):
    """The peak of a real run, whose allocations the profiler of torch records."""
    dtype = torch.float32 if plan == "full" else torch.bfloat16
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = small_model(plan, "cpu", dtype)
        train(model, plan, 8, 60, False, num_micro_batches=2)
    measured = peak_of_allocations(profiler)
    estimated = trace_training(small_model(plan, "meta", dtype), 8, 60, cuda=False).peak
    assert estimated == pytest.approx(measured, rel=BOUND)


def test_parts_of_the_estimate():
    model = small_model("all", "meta")
    memory = trace_training(model, 8, 60)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.trained_weights == pytest.approx(4 * trained, rel=0.1)
    assert memory.gradients == memory.trained_weights
    assert memory.optimizer_state == 2 * memory.trained_weights
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert memory.frozen_weights == pytest.approx(2 * frozen, rel=0.01)
    larger = trace_training(model, 16, 60)
    assert larger.activations == pytest.approx(2 * memory.activations, rel=0.1)
    assert larger.persistent == memory.persistent


def test_gradients_are_not_counted_twice_without_accumulation():
    model = small_model("full", "meta", torch.float32)
    several = trace_training(model, 2, 20, accumulates=True)
    one = trace_training(model, 2, 20, accumulates=False)
    assert several.persistent == one.persistent
    assert one.persistent <= one.peak <= several.peak


def test_checkpointing_needs_less():
    model = small_model("all", "meta")
    stored = trace_training(model, 8, 60)
    enable_checkpointing(model)
    checkpointed = trace_training(model, 8, 60)
    logits = 4 * 8 * 61 * 4096  # Their log-softmax is saved in both cases.
    assert checkpointed.activations - logits < 0.25 * (stored.activations - logits)


def test_quantized_weights():
    """The layers of 8 bits save their inputs, those of 4 bits do not."""
    plain = trace_training(small_model("all", "meta"), 8, 60)
    memory = {}
    for quantization in ("8bit", "4bit"):
        model = small_model("all", "meta")
        quantize(model, quantization)
        memory[quantization] = trace_training(model, 8, 60)
    linear = 2 * (4 * 256 * 256 + 3 * 256 * 768)  # Weights of both layers, embeddings left out.
    for quantization, size in (("8bit", 1.0), ("4bit", 0.5625)):
        saved = plain.frozen_weights - memory[quantization].frozen_weights
        assert saved == pytest.approx((2 - size) * linear, rel=0.01)
    assert memory["4bit"].activations == plain.activations
    assert memory["8bit"].activations > 1.1 * plain.activations


def test_frozen_lora_is_not_quantized():
    model = small_model("all", "meta")
    model.set_trainable("proj")
    quantize(model, "4bit")
    lora = [p for name, p in model.named_parameters() if ".lora_" in name]
    assert len(lora) == 8
    assert {parameter.dtype for parameter in lora} == {torch.float32}


def test_sharded_memory():
    memory = trace_training(small_model("all", "meta"), 8, 60)
    sharded = memory.sharded(4)
    assert sharded.persistent == pytest.approx(memory.persistent / 4, abs=4)
    assert sharded.activations == memory.activations
    # Embeddings, output layer and the final norm in bf16; two decoder layers.
    outside = 2 * (2 * 4096 * 256 + 256)
    layers = 2 * 2 * (4 * 256 * 256 + 3 * 256 * 768 + 2 * 256)
    assert memory.gathered == pytest.approx(outside + layers, rel=0.1)
    assert sharded.temporary == memory.temporary + memory.gathered


def test_functions_of_torch_are_restored():
    stock = (torch.nn.functional.dropout, torch.nn.functional.layer_norm)
    trace_training(small_model("all", "meta"), 2, 20)
    assert (torch.nn.functional.dropout, torch.nn.functional.layer_norm) == stock


# --- the command


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Flags of a run whose language model has lost its weights."""
    root = tmp_path_factory.mktemp("memory")
    llm = write_llm(root / "llm")
    checkpoint = write_checkpoint(root / "checkpoint", llm, LORA)
    (llm / "model.safetensors").write_bytes(b"")
    data = write_rows(root / "rows", 8)
    return training_flags(checkpoint, data, root / "run")


def test_plan_says_that_a_run_fits(arguments, capsys):
    assert main([*arguments, "--plan", "--gpu_memory", "24"]) == 0
    printed = capsys.readouterr().out
    assert "2 examples x 110 tokens" in printed
    assert "in all: fits into 24.0" in printed
    assert "--rows_per_pass 4" in printed  # The batch size is the limit.


def test_plan_names_flags_that_make_a_run_fit(arguments, capsys, monkeypatch):
    """On a GPU that is too small for the run, and on one that is too small for any."""
    monkeypatch.setattr(memory_plan, "CONTEXT_BYTES", 0)
    flags = [*arguments, "--micro_batch_size", "4", "--plan", "--gpu_memory"]
    assert main([*flags, "0.003"]) == 0
    printed = capsys.readouterr().out
    assert "does not fit into 0.0" in printed
    fitting = printed.split("the fastest first:\n")[1]
    assert fitting.splitlines()[0].split()[1:] == ["--rows_per_pass", "1"]
    assert "--gradient_checkpointing True" in fitting
    assert "--fsdp --fsdp_config train_scripts/configs/fsdp.json on 2 GPUs" in fitting
    assert main([*flags, "0.003", "--rows_per_pass", "1"]) == 0
    assert "1 examples x 110 tokens" in capsys.readouterr().out
    main([*flags, "0.000001"])
    assert "nothing, up to 8 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gpu_memory", "24"], "--gpu_memory is only for --plan"),
        (["--plan", "--gpu_memory", "0"], "--gpu_memory 0.0: it must be more than 0"),
        (["--plan", "--gpu_memory", "nan"], "--gpu_memory nan: it must be more than 0"),
    ],
)
def test_wrong_flags(arguments, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
