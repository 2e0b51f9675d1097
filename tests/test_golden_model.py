"""Compares the whole model with golden numbers of the original.

They are tokens, logits, loss, gradients, answers and five steps of training. The tiny model is
converted by `ltu.convert_checkpoint`, so every number here tests the conversion too.

The bound of logits is 1e-5. It is 1e-4 for an example whose clip is a chirp: most of a pure tone's
filterbank is rounding noise of the float32 FFT (tests/golden/README.md), and another build of torch
rounds differently.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ltu import LtuForConditionalGeneration, LtuProcessor
from ltu.data.audio import load_audio
from ltu.models.configuration_ltu import IGNORED
from ltu.models.modeling_cavmae import CavMaeModel
from ltu.training.arguments import parse_args
from ltu.training.batch_sampler import MicroBatchSampler
from ltu.training.collator import LtuCollator
from ltu.training.trainer import LtuTrainer, make_trainer
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

# Bounds of logits, for clips of noise and of a chirp; see above.
NOISE = 1e-5
CHIRP = 1e-4
CHIRPS = (2,)  # Examples of toy_ltu.json in golden batches whose clip is a chirp.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Checkpoint folders: "all", and "no_lora", the initial checkpoint of stage 1."""
    root = tmp_path_factory.mktemp("golden")
    state = trained_state()
    llm = write_llm(root / "llm")
    without = {key: value for key, value in state.items() if "lora" not in key}
    yield {
        "all": convert(state, llm, root / "all"),
        "no_lora": convert(without, llm, root / "no_lora"),
    }
    shutil.rmtree(root)  # 700 MB, and pytest keeps the folders of three runs.


@pytest.fixture(scope="module", autouse=True)
def encoded_once() -> Iterator[None]:
    """Encode each clip once where the audio encoder is not trained.

    All models of this module have the same encoder.
    """
    stock_encode = CavMaeModel.encode
    known = {}

    def encode(encoder: CavMaeModel, input_features: torch.Tensor) -> torch.Tensor:
        keys = [clip.numpy().tobytes() for clip in input_features]
        is_trained = any(parameter.requires_grad for parameter in encoder.parameters())
        if is_trained and torch.is_grad_enabled():
            encoded = stock_encode(encoder, input_features)
            known.update(zip(keys, encoded.detach(), strict=True))
            return encoded
        for key, clip in zip(keys, input_features, strict=True):
            if key not in known:
                known[key] = stock_encode(encoder, clip[None])[0]
        return torch.stack([known[key] for key in keys])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CavMaeModel, "encode", encode)
        yield


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> LtuForConditionalGeneration:
    return LtuForConditionalGeneration.from_pretrained(folders["all"])


@pytest.fixture(scope="module")
def processor(folders: dict[str, Path]) -> LtuProcessor:
    return LtuProcessor.from_pretrained(folders["all"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the toy dataset file and its clips."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(GOLDEN / "wav", folder / "wav")
    shutil.copy(GOLDEN / "toy_ltu.json", folder)
    time = np.arange(160_000) / 16_000  # In seconds.
    chirp = 0.5 * np.sin(2 * np.pi * (50 + 392.5 * time) * time)  # From 50 to 7900 Hz in 10 s.
    soundfile.write(
        folder / "wav" / "chirp10.wav", np.round(chirp * 32767).astype(np.int16), 16_000
    )
    return folder


def collate(
    processor: LtuProcessor, data: Path, rows: list[int], audio: bool = True
) -> dict[str, torch.Tensor]:
    """Collate toy examples to a batch of the original's training."""
    items = []
    for row in (read("toy_ltu")[index] for index in rows):
        ids, labels = processor.encode_example(row, CUTOFF)
        clip = load_audio(data / row["audio_id"])
        features = processor.feature_extractor([clip]).input_features[0] if audio else None
        items.append({"input_ids": ids, "labels": labels, "input_features": features})
    return LtuCollator(processor, original_positions=True)(items)


@pytest.fixture(scope="module")
def runs(model: LtuForConditionalGeneration, processor: LtuProcessor, data: Path) -> dict[str, Run]:
    found = {}
    for name in ("b3", "b1"):
        batch = collate(processor, data, read("forward_ltu")[name]["examples"])
        found[name] = run_batch(model, batch)
    return found


# --- the audio encoder


@torch.no_grad()
@pytest.mark.usefixtures("runs")  # Example 0 is in batch b3 of the fixture.
def test_audio_encoder(golden_report, model, processor: LtuProcessor, data: Path) -> None:
    features, arrays = collate(processor, data, [0, 1])["input_features"], stored("encoder_ltu")
    tower = model.audio_tower
    encoded, pooled = tower.encode(features), tower(features)
    assert encoded.shape == (2, 512, 768) and pooled.shape == (2, 32, 768)
    figures = {
        "enc_strided": encoded[:, ::16, ::24],
        "enc_token_mean": encoded.mean(-1),
        "enc_token_std": encoded.std(-1, correction=0),
        "enc_token_l2": encoded.norm(dim=-1),
        "pooled_div50": (pooled / tower.config.feature_divisor)[:, :, ::4],
    }
    for name, figure in figures.items():
        golden_report("encoder (CAV-MAE)", name, worst(figure, arrays[name]), 1e-5)
    tokens = model.get_audio_features(features)
    golden_report("audio tokens", "rows 0, 1", worst(tokens, arrays["audio_tokens"]), NOISE)


@torch.no_grad()
def test_layers_on_the_originals_filterbank(golden_report, model) -> None:
    # Start from the original's filterbank. The first layers do not normalise, so the deviation of
    # our filterbank (1e-4) would show.
    real = torch.from_numpy(stored("fbank_ltu")["noise3.collator"])
    spectrogram = torch.full((1, 1024, 128), 5.081 / 4.4849)
    spectrogram[0, : len(real)] = real
    tower = model.audio_tower
    arrays = stored("encoder_ltu")
    patches = tower.patch_embed_a(spectrogram)
    stages = {
        "patch_embed_strided": patches,
        "block0_strided": tower.blocks_a[0](patches + tower.pos_embed_a + tower.modality_a),
        "enc_strided": tower.encode(spectrogram),
    }
    for name, stage in stages.items():
        error = worst(stage[:, ::16, ::24], arrays[name][:1])
        golden_report("encoder (CAV-MAE), same filterbank", name, error, 1e-5)


# --- forward and backward


@pytest.mark.parametrize("name", ["b3", "b1"])
def test_batch_logits_and_loss(golden_report, runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    figures = read("forward_ltu")[name]
    arrays = stored("forward_ltu")
    text = slice(-run.logits.shape[1], None)
    labels = arrays[f"{name}.labels"].copy()
    for row, length in enumerate(figures["lengths"]):
        # Without padding before <s>, an audio token comes before it, and predicts no label.
        if length == labels.shape[1]:
            labels[row, 0] = IGNORED
    golden_report(
        "forward",
        f"{name}, ids",
        worst(run.batch["input_ids"][:, text], arrays[f"{name}.input_ids"]),
        0,
    )
    golden_report("forward", f"{name}, labels", worst(run.batch["labels"][:, text], labels), 0)
    golden_report(
        "forward",
        f"{name}, mask",
        worst(run.batch["attention_mask"], arrays[f"{name}.attention_mask"]),
        0,
    )
    for row, index in enumerate(figures["examples"]):
        error = worst(run.logits[row], arrays[f"{name}.logits"][row])
        golden_report(
            "forward", f"{name}, logits of row {index}", error, CHIRP if index in CHIRPS else NOISE
        )
    golden_report("forward", f"{name}, loss", abs(run.loss - figures["loss"]), 1e-5)


@pytest.mark.parametrize("name", ["b3", "b1"])
def test_gradients(golden_report, runs: dict[str, Run], name: str) -> None:
    gradients = dict(runs[name].gradients)
    figures = read("forward_ltu")[name]
    arrays = stored("forward_ltu")
    total = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
    golden_report(
        "gradients", f"{name}, norm of all", abs(total / figures["grad_norm_total"] - 1), RELATIVE
    )
    for key, norm in figures["grad_norms"].items():
        # An unused norm has a gradient of 0 in the original.
        gradient = gradients.pop(our_name(key), torch.zeros(1))
        # Compute the norm in float32, as the golden one: over two million squares, the rounding of
        # the sum alone is 2e-4.
        error = abs(gradient.norm().item() - norm) / (norm or 1.0)
        golden_report("gradients", f"{name}, norm of {our_name(key)}", error, RELATIVE)
        if f"{name}.grad.{key}" in arrays:
            sample = arrays[f"{name}.grad.{key}"]
            stride = 101 if "audio_proj.1.weight" in key else 1009 if "audio_encoder" in key else 1
            error = (
                worst(gradient.flatten()[::stride].reshape(sample.shape), sample)
                / np.abs(sample).max()
            )
            golden_report("gradients", f"{name}, {our_name(key)}", error, RELATIVE)
    assert not gradients


@pytest.fixture
def audio_encoded_once(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the audio encoder by its output for batch b3, which no variant changes."""
    monkeypatch.setattr(
        LtuForConditionalGeneration, "get_audio_features", lambda self, features: runs["b3"].audio
    )


@torch.no_grad()
@pytest.mark.usefixtures("audio_encoded_once")
def test_variants(golden_report, model, folders, processor, data, runs: dict[str, Run]) -> None:
    """Variants: no mask, no LoRA, positions that do not count padding, text only."""
    batch = runs["b3"].batch
    figures = read("forward_ltu")
    arrays = stored("forward_ltu")

    def compare(variant: str, model: LtuForConditionalGeneration, batch: dict) -> None:
        output = model(**batch)
        golden_report(
            "variants", f"{variant}, loss", abs(output.loss.item() - figures[variant]["loss"]), 1e-5
        )
        if f"{variant}.logits_strided" in arrays:
            for row, index in enumerate(figures["b3"]["examples"]):
                error = worst(
                    output.logits[row, -CUTOFF:][::8], arrays[f"{variant}.logits_strided"][row]
                )
                bound = CHIRP if index in CHIRPS and "text" not in variant else NOISE
                golden_report("variants", f"{variant}, logits of row {index}", error, bound)

    compare(
        "b3_nomask", model, {key: value for key, value in batch.items() if key != "attention_mask"}
    )
    compare("b3_nolora", LtuForConditionalGeneration.from_pretrained(folders["no_lora"]), batch)
    compare("b3_cumsum_positions", model, batch | {"position_ids": None})
    # Padding before the text of a row without audio attends to no token. Its output depends on the
    # attention kernel, and its last token predicts <s>. In the original's kernel, as in the eager
    # one, it attends to all tokens alike.
    model.language_model.set_attn_implementation("eager")
    try:
        compare(
            "b3_textonly", model, collate(processor, data, figures["b3"]["examples"], audio=False)
        )
    finally:
        model.language_model.set_attn_implementation("sdpa")


MISTAKES = {
    "positions that do not count padding": lambda batch: {
        "position_ids": batch["attention_mask"].cumsum(-1) - 1
    },
    "padding is not masked": lambda batch: {
        "attention_mask": torch.ones_like(batch["attention_mask"])
    },
    "<s> before the audio": lambda batch: {"input_ids": batch["input_ids"].roll(1, 1)},
    "another row's audio": lambda batch: {"audio_index": torch.tensor([1, 2, 0])},
}


@torch.no_grad()
@pytest.mark.usefixtures("audio_encoded_once")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(
    model: LtuForConditionalGeneration, runs: dict[str, Run], mistake: str
) -> None:
    """Each mistake moves the logits by far more than the bounds above."""
    batch = runs["b3"].batch
    logits = model(**(batch | MISTAKES[mistake](batch))).logits[:, -CUTOFF:]
    assert worst(logits, stored("forward_ltu")["b3.logits"]) > 1


# --- answers


@pytest.mark.parametrize("index", range(9))
def test_greedy_answers(
    golden_report, model: LtuForConditionalGeneration, processor, data, index: int
) -> None:
    """At most 20 tokens: tokens, logits, and the inputs of the first steps."""
    case = read("generation_ltu")[index]
    name = case["name"]
    first = case["first_steps"]
    clip = data / read("toy_ltu")[1 if "audio1" in name else 0]["audio_id"]
    if name == "unk_in_prompt":
        # The original took <unk> for padding, and masked the embedding at its position, which is
        # an audio embedding. Use the same mask here.
        ids = torch.tensor(
            [[model.config.audio_token_id] * model.config.num_audio_tokens + case["prompt_ids"]]
        )
        batch = {"input_ids": ids, "attention_mask": torch.tensor(first[0]["attention_mask"])}
        batch["input_features"] = processor.feature_extractor([load_audio(clip)]).input_features
    else:
        question = re.fullmatch(r"### Instruction:\n(.+)\n\n### Response:\n", case["prompt"])[1]
        batch = processor(text=question, audio=[None if "noaudio" in name else clip])
    length = batch["input_ids"].shape[1]
    steps = []
    found = batch["input_ids"][0, -len(case["prompt_ids"]) :].tolist()
    golden_report("answers", f"{name}, prompt", found != case["prompt_ids"], 0)

    hook = model.language_model.register_forward_pre_hook(
        lambda *call: steps.append(call[2]), with_kwargs=True
    )
    decoding = {
        "max_new_tokens": 20,
        "do_sample": False,
        "repetition_penalty": case["repetition_penalty"],
    }
    output = model.generate(
        **batch, **decoding, return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    hook.remove()
    golden_report(
        "answers", f"{name}, ids", output.sequences[0, length:].tolist() != case["new_tokens"], 0
    )
    error = worst(torch.cat(output.logits), stored("generation_ltu")[f"{name}.raw_logits"])
    golden_report("answers", f"{name}, logits", error, NOISE)
    for step, (expected, scores) in enumerate(zip(case["steps"], output.scores, strict=True)):
        error = worst(
            scores[0, expected["penalised_top5_ids"]], np.array(expected["penalised_top5"])
        )
        golden_report("answers", f"{name}, penalised scores of step {step}", error, NOISE)
    for step, (expected, given) in enumerate(zip(first, steps, strict=False)):
        mask = given["attention_mask"]
        if mask is None:
            # Current releases drop a mask of ones; its length follows from the positions.
            mask = torch.ones(1, int(given["position_ids"].max()) + 1, dtype=torch.long)
        golden_report(
            "answers",
            f"{name}, mask of step {step}",
            mask.tolist() != expected["attention_mask"],
            0,
        )
        # Releases differ in the positions of masked tokens, so compare those of the others.
        seen = mask[:, -given["position_ids"].shape[1] :].bool()
        error = worst(given["position_ids"][seen], np.array(expected["position_ids"])[seen.numpy()])
        golden_report("answers", f"{name}, positions of step {step}", error, 0)


# --- five steps of training


def stage_one(base_model: Path, data: Path, output_dir: Path, rows: int) -> LtuTrainer:
    """Return the trainer of the golden run, made from its own flags."""
    figures = read("traj_ltu_stage1")
    names = ("learning_rate", "cutoff_len", "val_set_size", "trainable_params", "train_on_inputs")
    flags = {
        name: figures["args"][name]
        for name in (*names, "batch_size", "micro_batch_size", "num_epochs")
    }
    flags |= {name: figures["trainer_args"][name] for name in ("warmup_steps", "max_steps", "seed")}
    flags |= {
        "base_model": base_model,
        "data_path": data / "toy_ltu.json",
        "output_dir": output_dir,
    }
    flags |= {
        "rows_per_pass": rows,
        "lora_target_modules": '["dummy"]',
        "original_positions": True,
        "bf16": False,
        "logging_steps": 1,
    }
    trainer = make_trainer(
        *parse_args([word for flag, value in flags.items() for word in (f"--{flag}", str(value))])
    )
    trainer.args.save_strategy = "no"
    return trainer


@pytest.mark.parametrize("rows", [2, 1])
def test_first_steps_of_stage_one(
    golden_report, folders, data, tmp_path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """With a pass for a micro-batch, and for each of its two rows."""
    # The golden run did not shuffle the examples.
    monkeypatch.setattr(
        MicroBatchSampler, "order", lambda self, epoch: torch.arange(self.num_examples)
    )
    figures, arrays = read("traj_ltu_stage1"), stored("traj_ltu_stage1")
    trainer = stage_one(folders["no_lora"], data, tmp_path, rows)
    trained = {
        name: parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    shapes = []
    rates = []

    def record_step(model: LtuForConditionalGeneration, args: tuple, kwargs: dict) -> None:
        shapes.append(list(kwargs["input_ids"].shape))
        rates.append(trainer.optimizer.param_groups[0]["lr"])

    trainer.model.register_forward_pre_hook(record_step, with_kwargs=True)
    trainer.train()

    def report(name: str, error: float, bound: float) -> None:
        golden_report(f"five steps of stage 1, {rows} rows", name, error, bound)

    counts = {
        "trainable": figures["n_trainable"],
        "all": read("layout_ltu")["tiny.stage1_proj"]["n_params"],
    }
    report("counts", trainer.record["parameters"] != counts, 0)
    report("names", list(trained) != [our_name(key) for key in figures["trainable_names"]], 0)
    expected_shapes = [shape["attention_mask"] for shape in figures["micro_shapes"]]
    expected_rates = figures["lr_used_step"]
    if rows == 1:
        expected_shapes = [[1, length] for _, length in expected_shapes for _ in range(2)]
        expected_rates = [rate for rate in expected_rates for _ in range(2)]
    report("shapes", shapes != expected_shapes, 0)
    report("rates used", rates != expected_rates, 0)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for index, (entry, expected) in enumerate(zip(logged, figures["log_history"][:5], strict=True)):
        norm = figures["grad_norm_before_clip"][index]
        report(
            f"rate logged at step {index + 1}",
            entry["learning_rate"] != expected["learning_rate"],
            0,
        )
        report(f"epoch of step {index + 1}", round(entry["epoch"], 2) != expected["epoch"], 0)
        report(
            f"loss of step {index + 1}", abs(entry["loss"] - figures["micro_losses"][index]), 1e-5
        )
        report(f"gradient norm of step {index + 1}", abs(entry["grad_norm"] / norm - 1), RELATIVE)
    for key, expected in arrays.items():
        name, value = our_name(key), trained[our_name(key)].detach()
        moved = (value.double() - start[name].double()).norm().item()
        report(
            f"length of {name}",
            abs(value.double().norm().item() / figures["final_param_l2"][key] - 1),
            RELATIVE,
        )
        report(f"way of {name}", abs(moved / figures["final_param_delta_l2"][key] - 1), RELATIVE)
        report(
            f"values of {name}",
            worst(value.flatten()[:: 37 if value.ndim > 1 else 1], expected),
            1e-6,
        )
