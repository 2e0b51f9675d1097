"""Writes the model card of a checkpoint folder: its README.md, which a hub shows as the page.

A card says what the files of the folder say, and nothing else: an unfinished run is called
unfinished, and evaluation results are shown only if they are of the weights in the folder.
`evaluation.json` has these results; `save_evaluation` writes it, for
`eval.run --update_model_card`.

Paths in a card are names without folders, and tokens are hidden. The last line of a card is a
comment with the hash of all the rest, so that a card that somebody edited or wrote is never
replaced.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig

from ltu.files import read_json_object, replace_file, write_json
from ltu.models.configuration_ltu import LtuConfig
from ltu.models.locate_checkpoint import sha256_of_weights
from ltu.models.provenance import (
    STATE,
    TRAINER_STATE,
    StageRecord,
    public_value,
    read_lineage,
    read_record,
    read_stage,
)

logger = logging.getLogger(__name__)

CARD = "README.md"
SEAL = "<!-- Written by ltu; an edited card is not replaced. sha256 of the lines above: "
STOCK_TITLE = "# Model Card for Model ID"  # Of the card that transformers uploads by default.
EVALUATION = "evaluation.json"
# The files of a checkpoint folder that a card is made of, besides config and weights.
RECORDS = (STATE, TRAINER_STATE, EVALUATION)
LOSS_ROWS = 10  # Lines of the table of losses.
HASH_DIGITS = 12  # Digits of a sha256 in a table; the files have all 64.

KINDS = {
    "ltu": "LTU ([Listen, Think, and Understand](https://arxiv.org/abs/2305.10790))",
    "ltu_as": "LTU-AS ([Joint Audio and Speech Understanding](https://arxiv.org/abs/2309.14405))",
}
AUDIO_ENCODERS = {"cavmae": "CAV-MAE", "yamnet": "YAMNet", "tltr": "TLTR on the layers of Whisper"}
# Stages that a conversion writes, not a run.
CONVERSIONS = {
    "init": "It is the initial checkpoint of stage 1, put together from pretrained components. Its "
    "projection is not trained.",
    "converted": "It was converted from a file of the original project.",
    "merged": "LoRA was merged into the language model, which is in this folder.",
}
# Language models whose licence is known, and what it says.
LLAMA_1 = ("lmsys/vicuna-7b-v1.1", "lmsys/vicuna-13b-v1.1")
LLAMA_1_NOTE = (
    "Vicuna v1.1 is fine-tuned LLaMA (version 1): the LLaMA model licence of Meta, which is "
    "non-commercial, applies to it."
)

TEMPLATE = """
# {stage.name}

An audio language model of the kind {kind}. It takes an audio clip and a question, and generates an
answer in text.

{status}

## Model

- audio encoder: {encoder}, {config.num_audio_tokens} embeddings per clip
- projection: LayerNorm and a linear map, {audio_width} to {text.hidden_size}
- language model: {language_model} ({text.model_type}, width {text.hidden_size}), {place}
- LoRA: {lora}
- prompt template: {prompt_template}
- parameters: {parameters}
- sha256 of the weights: {stage.sha256}

## Use

`./{stage.name}` stands for this folder, or give the hub id of this repository. The package is
`{package}`. If the language model is in another folder, give its path or hub id: `--llm DIR_OR_ID`,
or `from_pretrained(..., language_model=DIR_OR_ID)`.

```bash
python -m {package}.ask clip.wav "What can be inferred from the audio?" --model ./{stage.name}
```

```python
from {package} import {classes}ForConditionalGeneration, {classes}Processor

model = {classes}ForConditionalGeneration.from_pretrained("./{stage.name}")
processor = {classes}Processor.from_pretrained("./{stage.name}")
inputs = processor(text=["What can be inferred from the audio?"], audio=["clip.wav"])
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
answer = output[0, inputs["input_ids"].shape[1] :]
print(processor.decode_answer(answer))
```

## Lineage

The oldest stage is first. A dash is not recorded.

{lineage}

{losses}

{evaluation}

{arguments}

{versions}

## Licence

The licences of the language model, of the audio encoder ({encoder_name})
and of the training data apply to these weights. This card does not state a licence of its own.

{licence}
"""


@dataclass(frozen=True)
class EvaluationResult:
    """The main metric of a model on a benchmark.

    Attributes:
        task: the name of the benchmark.
        metric: the name of the metric.
        scoring: how answers were scored.
        protocol: "strict" or "original".
        num_examples: the number of examples.
        on_answered: over the examples with an answer; None where it is not computed.
        on_all: over all examples.
        low, high: the 95 % interval of `on_answered`.
        failed: reason -> number of examples without an answer.
        questions_sha256: of the file of questions.
    """

    task: str
    metric: str
    scoring: str
    protocol: str
    num_examples: int
    on_answered: float | None
    on_all: float | None
    low: float | None
    high: float | None
    failed: Mapping[str, int]
    questions_sha256: str | None = None


# --- evaluation results


def read_evaluation(folder: Path, sha256: str) -> list[EvaluationResult]:
    """Return the evaluation results of a folder that are of the weights with this hash.

    Raises:
        ValueError: `evaluation.json` is damaged.
    """
    path = folder / EVALUATION
    if not path.is_file():
        return []
    stored = read_json_object(path)
    try:
        results = [EvaluationResult(**entry) for entry in stored["results"]]
        checkpoint = stored["checkpoint"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}). Remove it, and write it again with: "
            "python -m eval.run --update_model_card"
        ) from error
    if checkpoint != sha256:
        logger.warning(
            "%s is of other weights (%s) than the folder has now (%s): not in the model card.",
            path,
            checkpoint[:HASH_DIGITS],
            sha256[:HASH_DIGITS],
        )
        return []
    return results


def save_evaluation(folder: Path, results: Sequence[EvaluationResult], sha256: str) -> None:
    """Add results to `evaluation.json` of a checkpoint folder, and write its model card.

    A result replaces an older one of the same task, scoring and protocol. Results of other weights
    are removed.

    Args:
        folder: the checkpoint folder.
        results: what was measured.
        sha256: of the weights that were evaluated.

    Raises:
        ValueError: the folder has other weights, or one of its files is damaged.
    """
    found = sha256_of_weights(folder)
    if found != sha256:
        raise ValueError(
            f"{folder} has other weights ({found[:HASH_DIGITS]}) than those that were evaluated "
            f"({sha256[:HASH_DIGITS]}). Evaluate it again."
        )
    newest = {}
    for result in [*read_evaluation(folder, sha256), *results]:
        newest[result.task, result.scoring, result.protocol] = asdict(result)
    write_json({"checkpoint": sha256, "results": [*newest.values()]}, folder / EVALUATION)
    write_model_card(folder)


# --- the card of a folder


def write_model_card(folder: str | Path) -> bool:
    """Write the model card of a checkpoint folder, unless it has one that somebody wrote.

    Returns:
        Whether the card was written.

    Raises:
        ValueError: a file of the folder is damaged.
        FileNotFoundError: the folder has no config or no weights.
    """
    folder = Path(folder)
    card = folder / CARD
    if not is_replaceable(card):
        logger.warning("%s was edited: it stays as it is. Remove it to get a new one.", card)
        return False
    _write(card, render_model_card(folder, read_stage(folder)))
    return True


def add_model_card(folder: Path, target: Path) -> None:
    """Add the model card of a checkpoint folder, and its records, to files that are uploaded.

    The card is written again, because the files may name another language model than those in the
    folder; one that somebody edited is copied. A card in `target` that somebody wrote stays. Of the
    card that transformers generates, only the tags are used. Paths in the records become names.

    Args:
        folder: the checkpoint folder.
        target: a folder with the same config and weights.

    Raises: as `write_model_card`.
    """
    for name in RECORDS:
        if (folder / name).is_file():
            write_json(public_value(read_json_object(folder / name)), target / name)

    card = target / CARD
    tags = []
    if card.is_file() and STOCK_TITLE in card.read_text(encoding="utf-8", errors="replace"):
        tags = ModelCard.load(card, ignore_metadata_errors=True).data.tags or []
    elif not is_replaceable(card):
        logger.warning("The repository has a model card that was edited: it stays as it is.")
        return
    if is_replaceable(folder / CARD):
        stage = replace(read_stage(target), name=folder.resolve().name)
        _write(card, render_model_card(target, stage, tags))
    else:
        shutil.copyfile(folder / CARD, card)


def is_replaceable(card: Path) -> bool:
    """Return whether there is no model card at a path, or one of ours that nobody edited."""
    if not card.is_file():
        return True
    text = card.read_text(encoding="utf-8", errors="replace")
    content, _, seal = text.rpartition(SEAL)
    return seal.strip() == f"{_sha256_of_text(content)} -->"


def _write(card: Path, content: str) -> None:
    """Write a model card with the comment that marks it as ours."""
    # A name of a file that is not UTF-8 is escaped.
    content = content.encode("utf-8", "backslashreplace").decode()
    sealed = f"{content}{SEAL}{_sha256_of_text(content)} -->\n"
    replace_file(card, sealed.encode())


def _sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def render_model_card(folder: Path, stage: StageRecord, tags: Sequence[str] = ()) -> str:
    """Return the model card of a checkpoint folder.

    Args:
        folder: the checkpoint folder.
        stage: the record of its stage.
        tags: more tags for the hub.

    Raises: as `write_model_card`.
    """
    config = AutoConfig.from_pretrained(folder)
    record = read_record(folder)
    lineage = [*read_lineage(record), stage]
    is_inside = config.language_model is None
    language_model = find_language_model(lineage)
    # The name of a local folder has no slash.
    hub_id = language_model if language_model and "/" in language_model else None
    lora = "none"
    if config.lora:
        lora = "rank {r}, alpha {lora_alpha}, dropout {lora_dropout}, on {target_modules}"
        lora = lora.format(**config.lora)
    counts = [f"{count:,} {name}" for name, count in record.get("parameters", {}).items()]
    text = TEMPLATE.format(
        stage=stage,
        kind=KINDS.get(config.model_type, config.model_type),
        status=_describe_status(record, stage),
        config=config,
        encoder=_describe_encoder(config),
        encoder_name=_name_encoder(config),
        audio_width=config.audio_config.hidden_size,
        text=config.text_config,
        language_model=language_model or "random weights",
        place="in this folder" if is_inside else "not in this folder",
        lora=lora,
        prompt_template=config.prompt_template.get("name", "its own"),
        parameters=", ".join(counts) or "not recorded",
        package=config.model_type,
        classes=type(config).__name__.removesuffix("Config"),
        lineage=_lineage(lineage),
        losses=_losses(folder),
        evaluation=_evaluation(read_evaluation(folder, stage.sha256)),
        arguments=_arguments(record),
        versions=_versions(record),
        licence=LLAMA_1_NOTE if hub_id in LLAMA_1 else "",
    )
    text = re.sub(r"\n{3,}", "\n\n", text)  # Where a part is empty.

    own_tags = [config.model_type, "audio", "audio-question-answering", "audio-captioning"]
    metadata = ModelCardData(
        base_model=hub_id,
        library_name="transformers",
        pipeline_tag="audio-text-to-text",
        tags=list(dict.fromkeys([*own_tags, *tags])),
    )
    if hub_id is not None:
        metadata["base_model_relation"] = "finetune" if is_inside else "adapter"
    return f"---\n{metadata.to_yaml()}\n---\n{text}"


# --- parts of the card


def _name_encoder(config: LtuConfig) -> str:
    model_type = config.audio_config.model_type
    wrapped = getattr(config.audio_config, "encoder_config", None)
    if wrapped is None:
        return AUDIO_ENCODERS.get(model_type, model_type)
    return f"{wrapped.model_type} of transformers"


def _describe_encoder(config: LtuConfig) -> str:
    """Return what the audio encoder is, where its weights are, and its LoRA."""
    text = _name_encoder(config)
    if config.named_encoder is not None:
        text += f" ({public_value(config.named_encoder)}, not in this folder)"
    if config.encoder_lora:
        text += " with LoRA of rank {r} on {target_modules}".format(**config.encoder_lora)
    return text


def _describe_status(record: Mapping[str, Any], stage: StageRecord) -> str:
    if stage.stage in CONVERSIONS:
        return CONVERSIONS[stage.stage]
    if stage.step is None:
        return "The folder does not record how the model was trained."
    steps = f"{stage.step} of {stage.total_steps} steps"
    if record.get("finished", False):
        return f"Training is finished: {steps}."
    return f"**Training is not finished: {steps}.** The weights are those of the last of these."


def find_language_model(lineage: Sequence[StageRecord]) -> str | None:
    """Return the language model of the last stage that names one."""
    names = [stage.language_model for stage in lineage if stage.language_model]
    return names[-1] if names else None


def _lineage(lineage: Sequence[StageRecord]) -> str:
    rows = []
    for stage in lineage:
        row = {
            "stage": stage.name,
            "sha256 of weights": _short(stage.sha256),
            "trained": stage.trainable_params or stage.stage,
            "dataset": stage.data.get("name"),
            "sha256 of dataset": _short(stage.data.get("sha256")),
            "examples in it": stage.data.get("num_examples"),
            "with audio": stage.data.get("num_with_audio"),
            "trained on": stage.num_examples,
            "steps": stage.step,
            "of": stage.total_steps,
            "examples per step": stage.examples_per_step,
            "learning rate": stage.learning_rate,
        }
        rows.append(row)
    return _table(rows)


def _losses(folder: Path) -> str:
    """Return about ten losses of the log, the first and the last among them."""
    path = folder / TRAINER_STATE
    log = read_json_object(path).get("log_history", []) if path.is_file() else []
    entries = [entry for entry in log if "loss" in entry]
    if not entries:
        return ""
    sentence = "No examples were held out."
    held_out = [entry for entry in log if "eval_loss" in entry]
    if held_out:
        last = held_out[-1]
        sentence = f"Held-out examples: {last['eval_loss']:.4f} (step {last['step']})."
    count = min(LOSS_ROWS, len(entries))
    rows = []
    for number in range(count):
        entry = entries[number * (len(entries) - 1) // max(1, count - 1)]
        rows.append({name: entry.get(name) for name in ("step", "loss", "learning_rate")})
    return f"## Loss\n\n{sentence}\n\n{_table(rows)}"


def _evaluation(results: Sequence[EvaluationResult]) -> str:
    rows = []
    for result in results:
        failed = [f"{reason} {count}" for reason, count in result.failed.items()]
        row = {
            "benchmark": result.task,
            "metric": result.metric,
            "on answered": result.on_answered,
            "95 % interval from": result.low,
            "to": result.high,
            "on all": result.on_all,
            "examples": result.num_examples,
            "failed": ", ".join(failed) or "0",
            "scoring": result.scoring,
            "protocol": result.protocol,
        }
        rows.append(row)
    if not rows:
        return ""
    return f"## Evaluation\n\nMeasured on these weights with `eval.run`.\n\n{_table(rows)}"


def _arguments(record: Mapping[str, Any]) -> str:
    lines = []
    for name, value in public_value(record.get("arguments", {})).items():
        if value is not None:
            lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    if not lines:
        return ""
    listed = "\n".join(lines)
    return f"## Arguments\n\nPaths are shown without their folders.\n\n```yaml\n{listed}\n```"


def _versions(record: Mapping[str, Any]) -> str:
    versions = {"code": record.get("code")} | record.get("versions", {})
    lines = [f"- {name}: {value}" for name, value in versions.items() if value is not None]
    return "\n".join(["## Versions", "", *lines]) if lines else ""


def _table(rows: Sequence[Mapping[str, str | float | None]]) -> str:
    """Return a table of rows that have the same titles."""
    lines = [[*rows[0]], ["---"] * len(rows[0])]
    for row in rows:
        lines.append([_cell(value) for value in row.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str | float | None) -> str:
    """Return a value as one line, in which a bar is no border; None is a dash."""
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _short(sha256: str | None) -> str | None:
    return None if sha256 is None else sha256[:HASH_DIGITS]
