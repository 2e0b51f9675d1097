"""Compares LTU-AS with golden numbers of the original.

They are TLTR, audio tokens, logits, loss, gradients and five steps of training. The tiny model is
converted by `ltu_as.convert_checkpoint`. The features, noise by `golden/rule_init.py`, are read
from a folder as the original wrote it (`.npz` under its own names, but not compressed). So the
numbers test conversion and reading too.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ltu.models.configuration_ltu import IGNORED
from ltu.training.arguments import parse_args
from ltu.training.batch_sampler import MicroBatchSampler
from ltu.training.collator import LtuCollator
from ltu.training.trainer import make_trainer
from ltu_as import LtuAsForConditionalGeneration, LtuAsProcessor
from ltu_as.convert_checkpoint import main
from tests.golden.rule_init import seeded
from tests.released import (
    CUTOFF,
    GOLDEN,
    RELATIVE,
    Run,
    convert,
    our_name,
    read,
    run_batch,
    stored,
    trained_state,
    worst,
    write_llm,
)

BOUND = 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the checkpoint "all", and of the features of the toy examples."""
    folder = tmp_path_factory.mktemp("golden_as")
    state = trained_state("layout_ltu_as")
    llm = write_llm(folder / "llm")
    convert(state, llm, folder / "all", main)
    (folder / "features").mkdir()
    for index, row in enumerate(read("toy_ltu_as")):
        # The original's name of a feature file has three folders and the name of the clip.
        parts = row["audio_id"].removesuffix(".flac").split("/")
        features = seeded(f"ltuas.feat.clip{index}", (32, 25, 1280), -2, 2)
        np.savez(folder / "features" / f"{'_'.join(parts[-4:])}.npz", features)
    yield folder
    shutil.rmtree(folder)  # 700 MB, and pytest keeps the folders of three runs.


@pytest.fixture(scope="module")
def model(root: Path) -> LtuAsForConditionalGeneration:
    return LtuAsForConditionalGeneration.from_pretrained(root / "all")


@pytest.fixture(scope="module")
def processor(root: Path) -> LtuAsProcessor:
    processor = LtuAsProcessor.from_pretrained(root / "all")
    processor.front_end.configure(feature_root=str(root / "features"))
    return processor


def collate(
    processor: LtuAsProcessor, rows: list[int], audio: bool = True
) -> dict[str, torch.Tensor]:
    """Collate toy examples to a batch of the original's training."""
    items = []
    for row in (read("toy_ltu_as")[index] for index in rows):
        ids, labels = processor.encode_example(row, CUTOFF)
        features = (
            processor.front_end.load_features(row | {"audio": row["audio_id"]}) if audio else None
        )
        items.append({"input_ids": ids, "labels": labels, "input_features": features})
    return LtuCollator(processor, original_positions=True)(items)


@torch.no_grad()
def test_audio_encoder(golden_report, model, processor) -> None:
    features = collate(processor, [0, 1])["input_features"]
    arrays = stored("encoder_ltu_as")
    outputs = []
    tower = model.audio_tower
    hooks = []
    for part in (tower.time_tr, tower):
        hooks.append(part.register_forward_hook(lambda *call: outputs.append(call[2])))
    tokens = model.get_audio_features(features)
    for hook in hooks:
        hook.remove()
    time = outputs[0].unflatten(0, (2, 32))[:, ::4, ::4, ::64]
    golden_report("TLTR", "over time", worst(time, arrays["time_tr_strided"]), BOUND)
    golden_report("TLTR", "output", worst(outputs[1], arrays["tltr_out"]), BOUND)
    golden_report("TLTR", "audio tokens", worst(tokens, arrays["audio_tokens"]), BOUND)
    # Neither transformer has position embeddings: the order of layers has no effect, and outputs
    # follow the order of time steps.
    first = features[:1]
    output = arrays["tltr_out"][:1]
    golden_report("TLTR", "layers reversed", worst(tower(first.flip(1)), output), BOUND)
    backwards = tower(first.flip(2))
    golden_report("TLTR", "time reversed", worst(backwards.flip(1), output), BOUND)
    assert worst(backwards, output) > 1  # The bounds can be broken.


@pytest.fixture(scope="module")
def runs(model: LtuAsForConditionalGeneration, processor: LtuAsProcessor) -> dict[str, Run]:
    found = {}
    for name in ("b3", "b1"):
        batch = collate(processor, read("forward_ltu_as")[name]["examples"])
        found[name] = run_batch(model, batch)
    return found


@pytest.mark.parametrize("name", ["b3", "b1"])
def test_forward_and_gradients(golden_report, runs: dict[str, Run], name: str) -> None:
    figures, arrays = read("forward_ltu_as")[name], stored("forward_ltu_as")
    batch = runs[name].batch
    logits = runs[name].logits
    gradients = dict(runs[name].gradients)
    text = slice(-arrays[f"{name}.input_ids"].shape[1], None)
    golden_report(
        "LTU-AS forward",
        f"{name}, ids",
        worst(batch["input_ids"][:, text], arrays[f"{name}.input_ids"]),
        0,
    )
    error = worst(logits[:, text], arrays[f"{name}.logits"])
    golden_report("LTU-AS forward", f"{name}, logits", error, BOUND)
    golden_report("LTU-AS forward", f"{name}, loss", abs(runs[name].loss - figures["loss"]), BOUND)
    labels = arrays[f"{name}.labels"].copy()
    for row, length in enumerate(figures["lengths"]):
        # Without padding before <s>, an audio token comes before it, and predicts no label.
        if length == labels.shape[1]:
            labels[row, 0] = IGNORED
    golden_report("LTU-AS forward", f"{name}, labels", worst(batch["labels"][:, text], labels), 0)
    mask = arrays[f"{name}.attention_mask"]
    golden_report("LTU-AS forward", f"{name}, mask", worst(batch["attention_mask"], mask), 0)

    total = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
    golden_report(
        "LTU-AS gradients",
        f"{name}, norm of all",
        abs(total / figures["grad_norm_total"] - 1),
        RELATIVE,
    )
    for key, norm in figures["grad_norms"].items():
        gradient = gradients.pop(our_name(key))
        error = abs(gradient.norm().item() - norm) / norm
        golden_report("LTU-AS gradients", f"{name}, norm of {our_name(key)}", error, RELATIVE)
        if f"{name}.grad.{key}" in arrays:
            sample = arrays[f"{name}.grad.{key}"]
            stride = 101 if "audio_proj.1.weight" in key else 1009 if "audio_encoder" in key else 1
            error = (
                worst(gradient.flatten()[::stride].reshape(sample.shape), sample)
                / np.abs(sample).max()
            )
            golden_report("LTU-AS gradients", f"{name}, {our_name(key)}", error, RELATIVE)
    assert not gradients


@torch.no_grad()
def test_variants(golden_report, model, processor, runs: dict[str, Run], monkeypatch) -> None:
    """Variants of batch b3: no mask, no LoRA, positions that do not count padding, text only."""
    figures, arrays = read("forward_ltu_as"), stored("forward_ltu_as")
    batch = runs["b3"].batch
    audio = runs["b3"].audio
    monkeypatch.setattr(model, "get_audio_features", lambda features: audio)

    def compare(variant: str, model: LtuAsForConditionalGeneration, batch: dict) -> None:
        output = model(**batch)
        error = abs(output.loss.item() - figures[variant]["loss"])
        golden_report("LTU-AS variants", f"{variant}, loss", error, BOUND)
        if f"{variant}.logits_strided" in arrays:
            error = worst(output.logits[:, -CUTOFF:][:, ::8], arrays[f"{variant}.logits_strided"])
            golden_report("LTU-AS variants", f"{variant}, logits", error, BOUND)

    compare(
        "b3_nomask", model, {key: value for key, value in batch.items() if key != "attention_mask"}
    )
    compare("b3_cumsum_positions", model, batch | {"position_ids": None})
    # The tokens that padding attends to depend on the kernel; see test_golden_model.py.
    model.language_model.set_attn_implementation("eager")
    try:
        compare("b3_textonly", model, collate(processor, figures["b3"]["examples"], audio=False))
    finally:
        model.language_model.set_attn_implementation("sdpa")
    # Set the product of LoRA to 0. test_golden_model.py converts a folder without LoRA.
    factors = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    values = [parameter.clone() for parameter in factors]
    assert factors
    try:
        for parameter in factors:
            parameter.zero_()
        compare("b3_nolora", model, batch)
    finally:
        for parameter, value in zip(factors, values, strict=True):
            parameter.copy_(value)


@pytest.mark.parametrize("rows", [2, 1])
def test_five_steps(
    golden_report, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Audio encoder, projector and a new LoRA are trained from a folder of features.

    A pass has the two rows of a micro-batch, or one.
    """
    monkeypatch.setattr(
        MicroBatchSampler, "order", lambda self, epoch: torch.arange(self.num_examples)
    )
    figures, arrays = read("traj_ltu_as_all"), stored("traj_ltu_as_all")
    names = ("learning_rate", "cutoff_len", "val_set_size", "trainable_params", "train_on_inputs")
    flags = {
        name: figures["args"][name]
        for name in (*names, "batch_size", "micro_batch_size", "num_epochs")
    }
    flags |= {name: figures["trainer_args"][name] for name in ("warmup_steps", "max_steps", "seed")}
    flags |= {
        "base_model": root / "all",
        "data_path": GOLDEN / "toy_ltu_as.json",
        "output_dir": tmp_path,
    }
    flags |= {
        "feature_root": root / "features",
        "rows_per_pass": rows,
        "original_positions": True,
        "bf16": False,
        "logging_steps": 1,
    }
    trainer = make_trainer(
        *parse_args([word for flag, value in flags.items() for word in (f"--{flag}", str(value))])
    )
    trainer.args.save_strategy = "no"
    trained = {
        name: parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    shapes = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(list(kwargs["attention_mask"].shape)),
        with_kwargs=True,
    )
    trainer.train()

    def report(name: str, error: float, bound: float) -> None:
        golden_report(f"LTU-AS, five steps, {rows} rows", name, error, bound)

    report("names", set(trained) != {our_name(key) for key in figures["trainable_names"]}, 0)
    expected_shapes = [shape["attention_mask"] for shape in figures["micro_shapes"]]
    if rows == 1:
        expected_shapes = [[1, length] for _, length in expected_shapes for _ in range(2)]
    report("shapes", shapes != expected_shapes, 0)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for index, (entry, expected) in enumerate(zip(logged, figures["log_history"][:5], strict=True)):
        norm = figures["grad_norm_before_clip"][index]
        report(
            f"rate logged at step {index + 1}",
            entry["learning_rate"] != expected["learning_rate"],
            0,
        )
        report(
            f"loss of step {index + 1}", abs(entry["loss"] - figures["micro_losses"][index]), BOUND
        )
        report(f"gradient norm of step {index + 1}", abs(entry["grad_norm"] / norm - 1), RELATIVE)
    for key, length in figures["final_param_l2"].items():
        name = our_name(key)
        value = trained[name].detach().double()
        report(f"length of {name}", abs(value.norm().item() / length - 1), RELATIVE)
        moved = (value - start[name].double()).norm().item()
        report(f"way of {name}", abs(moved / figures["final_param_delta_l2"][key] - 1), 1e-3)
    for key, expected in arrays.items():
        value = trained[our_name(key)].detach().flatten()
        sample = value[:: max(1, -(-len(value) // expected.size))].reshape(-1)[: expected.size]
        report(f"values of {our_name(key)}", worst(sample, expected.flatten()), 1e-5)
