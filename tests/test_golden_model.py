"""The whole model against what the original gave: ids, logits, loss, gradients, answers and five steps of training.

Notable:
- the tiny model goes through `ltu.convert_checkpoint`, so every number here holds the conversion too;
- logits are held to 1e-5; a row whose clip is a chirp to 1e-4, because most of a pure tone's filterbank is rounding
  noise of the float32 FFT (tests/golden/README.md), and another build of torch rounds otherwise.
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
from ltu.models.modeling_cavmae import CavMaeModel
from ltu.models.processing_ltu import IGNORED
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

NOISE, CHIRP = 1e-5, 1e-4  # Bounds of logits; see above.
CHIRPS = (2,)  # Rows of toy_ltu.json in golden batches whose clip is one.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Checkpoint folders: "all", and "no_lora", from which stage 1 starts."""
    root, state = tmp_path_factory.mktemp("golden"), trained_state()
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
    stock_encode, known = CavMaeModel.encode, {}

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
    """The toy rows beside their clips."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(GOLDEN / "wav", folder / "wav")
    shutil.copy(GOLDEN / "toy_ltu.json", folder)
    time = np.arange(160_000) / 16_000  # s
    chirp = 0.5 * np.sin(2 * np.pi * (50 + 392.5 * time) * time)  # From 50 to 7900 Hz in 10 s.
    soundfile.write(
        folder / "wav" / "chirp10.wav", np.round(chirp * 32767).astype(np.int16), 16_000
    )
    return folder


def collate(
    processor: LtuProcessor, data: Path, rows: list[int], audio: bool = True
) -> dict[str, torch.Tensor]:
    """These toy rows as a batch of the original's training."""
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
@pytest.mark.usefixtures("runs")  # Its batch b3 has row 0.
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
    # The first layers do not normalise, so the filterbank's own 1e-4 would show: start from the
    # original's.
    real = torch.from_numpy(stored("fbank_ltu")["noise3.collator"])
    spectrogram = torch.full((1, 1024, 128), 5.081 / 4.4849)
    spectrogram[0, : len(real)] = real
    tower, arrays = model.audio_tower, stored("encoder_ltu")
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
    run, figures, arrays = runs[name], read("forward_ltu")[name], stored("forward_ltu")
    text = slice(-run.logits.shape[1], None)
    labels = arrays[f"{name}.labels"].copy()
    for row, length in enumerate(figures["lengths"]):
        if (
            length == labels.shape[1]
        ):  # No pad before <s>: what stands there is audio, and that predicts no label.
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
    gradients, figures, arrays = (
        dict(runs[name].gradients),
        read("forward_ltu")[name],
        stored("forward_ltu"),
    )
    total = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
    golden_report(
        "gradients", f"{name}, norm of all", abs(total / figures["grad_norm_total"] - 1), RELATIVE
    )
    for key, norm in figures["grad_norms"].items():
        gradient = gradients.pop(
            our_name(key), torch.zeros(1)
        )  # An unused norm has a gradient of 0 in the original.
        # In float32 as the stored ones: over two million squares the rounding of that sum alone is 2e-4.
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
def heard(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ear makes of b3, once for all: it is not what varies."""
    monkeypatch.setattr(
        LtuForConditionalGeneration, "get_audio_features", lambda self, features: runs["b3"].audio
    )


@torch.no_grad()
@pytest.mark.usefixtures("heard")
def test_variants(golden_report, model, folders, processor, data, runs: dict[str, Run]) -> None:
    """No mask; no LoRA; positions that do not count pads; text only."""
    batch, figures, arrays = runs["b3"].batch, read("forward_ltu"), stored("forward_ltu")

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
    # Pads before the text of a row without audio see nothing. What they write depends on the kernel, and the last of
    # them predicts <s>: in the original's kernel, as in the eager one, they saw everything alike.
    model.language_model.set_attn_implementation("eager")
    try:
        compare(
            "b3_textonly", model, collate(processor, data, figures["b3"]["examples"], audio=False)
        )
    finally:
        model.language_model.set_attn_implementation("sdpa")


MISTAKES = {
    "positions that do not count pads": lambda batch: {
        "position_ids": batch["attention_mask"].cumsum(-1) - 1
    },
    "pads are seen": lambda batch: {"attention_mask": torch.ones_like(batch["attention_mask"])},
    "<s> before the audio": lambda batch: {"input_ids": batch["input_ids"].roll(1, 1)},
    "another row's audio": lambda batch: {"audio_index": torch.tensor([1, 2, 0])},
}


@torch.no_grad()
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(
    model: LtuForConditionalGeneration, runs: dict[str, Run], mistake: str
) -> None:
    """The bounds above can be broken: each of these moves the logits by far more."""
    batch = runs["b3"].batch
    logits = model(**(batch | MISTAKES[mistake](batch))).logits[:, -CUTOFF:]
    assert worst(logits, stored("forward_ltu")["b3.logits"]) > 1


# --- answers


@pytest.mark.parametrize("index", range(9))
def test_greedy_answers(
    golden_report, model: LtuForConditionalGeneration, processor, data, index: int
) -> None:
    """20 tokens at most: ids, logits, and what goes into the first steps."""
    case = read("generation_ltu")[index]
    name, first = case["name"], case["first_steps"]
    clip = data / read("toy_ltu")[1 if "audio1" in name else 0]["audio_id"]
    if name == "unk_in_prompt":
        # The original took <unk> for a pad, and masked what stands at its place: a vector of audio. So do we, by hand.
        ids = torch.tensor(
            [[model.config.audio_token_id] * model.config.num_audio_tokens + case["prompt_ids"]]
        )
        batch = {"input_ids": ids, "attention_mask": torch.tensor(first[0]["attention_mask"])}
        batch["input_features"] = processor.feature_extractor([load_audio(clip)]).input_features
    else:
        question = re.fullmatch(r"### Instruction:\n(.+)\n\n### Response:\n", case["prompt"])[1]
        batch = processor(text=question, audio=[None if "noaudio" in name else clip])
    length, steps = batch["input_ids"].shape[1], []
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
        if mask is None:  # Current releases drop a mask of ones; its length follows from positions.
            mask = torch.ones(1, int(given["position_ids"].max()) + 1, dtype=torch.long)
        golden_report(
            "answers",
            f"{name}, mask of step {step}",
            mask.tolist() != expected["attention_mask"],
            0,
        )
        seen = mask[
            :, -given["position_ids"].shape[1] :
        ].bool()  # Releases differ in the positions of what is masked.
        error = worst(given["position_ids"][seen], np.array(expected["position_ids"])[seen.numpy()])
        golden_report("answers", f"{name}, positions of step {step}", error, 0)


# --- five steps of training


def stage_one(base_model: Path, data: Path, output_dir: Path) -> LtuTrainer:
    """The trainer of the golden run, by its own flags."""
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


def test_first_steps_of_stage_one(
    golden_report, folders, data, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The golden run took the rows as they stand.
    monkeypatch.setattr(MicroBatchSampler, "order", lambda self, epoch: torch.arange(self.rows))
    figures, arrays = read("traj_ltu_stage1"), stored("traj_ltu_stage1")
    trainer = stage_one(folders["no_lora"], data, tmp_path)
    trained = {
        name: parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    start, shapes, rates = (
        {name: parameter.detach().clone() for name, parameter in trained.items()},
        [],
        [],
    )

    def look(model: LtuForConditionalGeneration, args: tuple, kwargs: dict) -> None:
        shapes.append(list(kwargs["input_ids"].shape))
        rates.append(trainer.optimizer.param_groups[0]["lr"])

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()

    def report(name: str, error: float, bound: float) -> None:
        golden_report("five steps of stage 1", name, error, bound)

    counts = {
        "trainable": figures["n_trainable"],
        "all": read("layout_ltu")["tiny.stage1_proj"]["n_params"],
    }
    report("counts", trainer.record["parameters"] != counts, 0)
    report("names", list(trained) != [our_name(key) for key in figures["trainable_names"]], 0)
    report("shapes", shapes != [shape["attention_mask"] for shape in figures["micro_shapes"]], 0)
    report("rates used", rates != figures["lr_used_step"], 0)
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
