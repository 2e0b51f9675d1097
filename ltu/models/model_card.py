"""Writes the model card of a checkpoint folder: its README.md, which a hub shows as the page.

A card says what the files of the folder say, and nothing else: an unfinished run is called
unfinished, a licence that nobody stated is called unknown, and evaluation results are shown only if
they are of the weights in the folder. `evaluation.json` has these results; `save_evaluation` writes
it, for `eval.run --update_model_card`.

Paths in a card are names without folders, and tokens are hidden. A card that somebody edited is
never replaced.
"""

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from ltu.files import replace_file, write_json
from ltu.models.card_seal import CARD, is_replaceable, is_stock, seal_card
from ltu.models.configuration_ltu import LtuConfig
from ltu.models.locate_checkpoint import sha256_of_weights
from ltu.models.provenance import (
    StageRecord,
    is_local_path,
    public_arguments,
    public_value,
    read_lineage,
    read_stage,
    read_state,
)

logger = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
# The files of a checkpoint folder that a card is made of, besides config and weights.
RECORDS = ("ltu_state.json", "trainer_state.json", EVALUATION)
PIPELINE = "audio-text-to-text"
LOSS_ROWS = 10  # Lines of the table of losses.
HASH_DIGITS = 12  # Digits of a sha256 in a table; the files have all 64.

TITLES = {"ltu": "LTU", "ltu_as": "LTU-AS"}
PAPERS = {
    "ltu": "[Listen, Think, and Understand](https://arxiv.org/abs/2305.10790)",
    "ltu_as": "[Joint Audio and Speech Understanding](https://arxiv.org/abs/2309.14405)",
}
AUDIO_ENCODERS = {"cavmae": "CAV-MAE", "yamnet": "YAMNet", "tltr": "TLTR on the layers of Whisper"}
# Stages that a conversion writes, not a run.
CONVERSIONS = {
    "init": "It is the initial checkpoint of stage 1, put together from pretrained components. Its "
    "projection is not trained.",
    "converted": "It was converted from a file of the original project.",
    "merged": "LoRA was merged into the language model, which is in this folder.",
}
CONVERSION_CELLS = {"init": "put together", "converted": "converted", "merged": "LoRA merged"}
# The licence of language models, where it is known.
LLM_LICENCES = {
    "lmsys/vicuna-7b-v1.1": "Vicuna v1.1 is fine-tuned LLaMA (version 1): the LLaMA model licence "
    "of Meta, which is non-commercial, applies to it.",
    "lmsys/vicuna-13b-v1.1": "Vicuna v1.1 is fine-tuned LLaMA (version 1): the LLaMA model licence "
    "of Meta, which is non-commercial, applies to it.",
}


@dataclass(frozen=True)
class EvaluationResult:
    """The main metric of a model on a benchmark.

    Attributes:
        task: the name of the benchmark.
        metric: the name of the metric.
        scoring: how answers were scored.
        protocol: "strict" or "original".
        num_examples: the number of examples.
        answered: the number of examples with an answer.
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
    answered: int
    on_answered: float | None = None
    on_all: float | None = None
    low: float | None = None
    high: float | None = None
    failed: Mapping[str, int] = field(default_factory=dict)
    questions_sha256: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What a result replaces an older one of."""
        return self.task, self.scoring, self.protocol


# --- evaluation results


def read_evaluation(folder: Path, sha256: str) -> list[EvaluationResult]:
    """Return the evaluation results of a folder that are of the weights with this hash.

    Raises:
        ValueError: `evaluation.json` is damaged.
    """
    path = folder / EVALUATION
    if not path.is_file():
        return []
    names = {entry.name for entry in fields(EvaluationResult)}
    try:
        stored = json.loads(path.read_bytes())
        results = []
        for entry in stored["results"]:
            known = {name: value for name, value in entry.items() if name in names}
            results.append(EvaluationResult(**known))
        checkpoint = stored["checkpoint"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
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
    merged = {result.key: result for result in read_evaluation(folder, sha256)}
    merged |= {result.key: result for result in results}
    entries = [asdict(result) for result in merged.values()]
    write_json({"checkpoint": sha256, "results": entries}, folder / EVALUATION)
    write_model_card(folder)


# --- the card


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
    if not is_replaceable(target / CARD) and not is_stock(target / CARD):
        logger.warning("The repository has a model card that was edited: it stays as it is.")
        return
    for name in RECORDS:
        if (folder / name).is_file():
            record = json.loads((folder / name).read_bytes())
            write_json(public_value(record), target / name)
    if not is_replaceable(folder / CARD):
        shutil.copyfile(folder / CARD, target / CARD)
        return
    metadata = {}
    if (target / CARD).is_file():
        own_tags = ModelCard.load(folder / CARD).data.tags or []
        tags = ModelCard.load(target / CARD, ignore_metadata_errors=True).data.tags or []
        metadata["tags"] = list(dict.fromkeys([*own_tags, *tags]))
    content = render_model_card(target, metadata=metadata, name=folder.resolve().name)
    replace_file(target / CARD, content.encode("utf-8", "backslashreplace"))


def write_model_card(
    folder: str | Path,
    log_history: list[dict[str, Any]] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bool:
    """Write the model card of a checkpoint folder, unless it has one that somebody wrote.

    Args:
        folder: the checkpoint folder.
        log_history: the log of the run; by default, that of `trainer_state.json`.
        metadata: entries of the card's metadata that the user states, such as
            `{"license": "mit"}`.

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
    content = render_model_card(folder, log_history, metadata)
    replace_file(card, content.encode("utf-8", "backslashreplace"))
    return True


def render_model_card(
    folder: Path,
    log_history: list[dict[str, Any]] | None = None,
    metadata: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> str:
    """Return the model card of a checkpoint folder.

    Args:
        folder, log_history, metadata: as for `write_model_card`.
        name: of the model, by default that of the folder.

    Raises: as `write_model_card`.
    """
    config = AutoConfig.from_pretrained(folder)
    state = read_state(folder)
    stage = read_stage(folder)
    if name is not None:
        stage = replace(stage, name=name)
    lineage = [*read_lineage(state), stage]
    results = read_evaluation(folder, stage.sha256)
    log = _read_log(folder) if log_history is None else log_history

    sections = [
        _introduction(config, state, stage),
        _model_section(config, state, stage, lineage),
        _use_section(config, folder, stage),
        _lineage_section(lineage),
        _loss_section(log),
        _evaluation_section(results),
        _arguments_section(state),
        _versions_section(state),
        _licence_section(config, lineage, (metadata or {}).get("license")),
    ]
    text = "\n\n".join(section for section in sections if section)
    data = _metadata(config, lineage, results)
    for key, value in (metadata or {}).items():
        data[key] = value
    return seal_card(data, f"\n{text}\n")


def _read_log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "trainer_state.json"
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_bytes())["log_history"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Copy or write it again.") from error


def _metadata(
    config: LtuConfig, lineage: Sequence[StageRecord], results: Sequence[EvaluationResult]
) -> ModelCardData:
    """Return the metadata. The base model is in it only if it is known by a hub id."""
    name = lineage[-1].name
    hub_id = _language_model_on_hub(lineage)
    relation = None
    if hub_id is not None:
        relation = "finetune" if config.language_model is None else "adapter"
    eval_results = []
    for result in results:
        if result.on_all is not None and math.isfinite(result.on_all):
            eval_results.append(
                EvalResult(
                    task_type=PIPELINE,
                    dataset_type=result.task,
                    dataset_name=result.task,
                    metric_type=result.metric,
                    metric_name=f"{result.metric}, all examples, protocol {result.protocol}",
                    metric_value=result.on_all,
                )
            )
    data = ModelCardData(
        base_model=hub_id,
        library_name="transformers",
        pipeline_tag=PIPELINE,
        tags=[config.model_type, "audio", "audio-question-answering", "audio-captioning"],
        model_name=name if eval_results else None,
        eval_results=eval_results or None,
    )
    if relation is not None:
        data["base_model_relation"] = relation
    return data


def _language_model_on_hub(lineage: Sequence[StageRecord]) -> str | None:
    """Return the hub id of the language model that the last stage which names one has."""
    for stage in reversed(lineage):
        if stage.language_model is not None:
            # The name of a local folder has no slash.
            return stage.language_model if "/" in stage.language_model else None
    return None


# --- sections


def _introduction(config: LtuConfig, state: Mapping[str, Any], stage: StageRecord) -> str:
    title = TITLES.get(config.model_type, config.model_type)
    paper = PAPERS.get(config.model_type)
    lines = [
        f"# {stage.name}",
        "",
        f"An audio language model of the kind {title}{f' ({paper})' if paper else ''}. It takes an "
        "audio clip and a question, and generates an answer in text.",
        "",
    ]
    if stage.stage in CONVERSIONS:
        lines.append(CONVERSIONS[stage.stage])
    elif stage.total_steps is None or stage.step is None:
        lines.append("The folder does not record how the model was trained.")
    elif state.get("finished", False):
        lines.append(f"Training is finished: {stage.step} of {stage.total_steps} steps.")
    else:
        lines.append(
            f"**Training is not finished: step {stage.step} of {stage.total_steps}.** The weights "
            "are those of this step."
        )
    return "\n".join(lines)


def _model_section(
    config: LtuConfig,
    state: Mapping[str, Any],
    stage: StageRecord,
    lineage: Sequence[StageRecord],
) -> str:
    audio = config.audio_config
    text = config.text_config
    encoder = AUDIO_ENCODERS.get(audio.model_type, audio.model_type)
    rows = [
        ("audio encoder", f"{encoder}: {config.num_audio_tokens} embeddings per clip"),
        ("projection", f"LayerNorm and a linear map, {audio.hidden_size} to {text.hidden_size}"),
        ("language model", _language_model_cell(config, stage, lineage)),
        ("LoRA", _lora_cell(config.lora)),
        ("prompt template", str(config.prompt_template.get("name", "its own"))),
    ]
    parameters = state.get("parameters", {})
    if "trainable" in parameters:
        trained = f"{parameters['trainable']:,} of {parameters['all']:,}"
        parts = _trained_parts(config, state, stage.trainable_params)
        rows.append(("trained parameters", f"{trained}: {', '.join(parts)}"))
    elif "all" in parameters:
        rows.append(("parameters", f"{parameters['all']:,}"))
    rows.append(("sha256 of the weights", f"`{stage.sha256}`"))
    return "## Model\n\n" + _table(("part", "this model"), rows)


def _trained_parts(config: LtuConfig, state: Mapping[str, Any], plan: str | None) -> list[str]:
    """Return the parts of the model that a plan of `--trainable_params` trains."""
    parts = ["projection"]
    if plan != "proj" and not state.get("arguments", {}).get("freeze_audio_tower"):
        parts.insert(0, "audio encoder")
    if plan == "full":
        parts.append("language model")
    elif plan != "proj" and config.lora:
        parts.append("LoRA")
    return parts


def _language_model_cell(
    config: LtuConfig, stage: StageRecord, lineage: Sequence[StageRecord]
) -> str:
    kind = f"{config.text_config.model_type}, width {config.text_config.hidden_size}"
    if config.language_model is None:
        named = [record.language_model for record in lineage if record.language_model]
        source = f", from `{named[-1]}`" if named else ""
        return f"in this folder ({kind}{source})"
    sha256 = stage.language_model_sha256
    identity = f"; sha256 of its config and index `{sha256[:HASH_DIGITS]}`" if sha256 else ""
    return f"`{stage.language_model}` ({kind}{identity}), not in this folder"


def _lora_cell(lora: Mapping[str, Any] | None) -> str:
    if not lora:
        return "none"
    targets = ", ".join(lora["target_modules"])
    sizes = f"rank {lora['r']}, alpha {lora['lora_alpha']}, dropout {lora['lora_dropout']}"
    return f"{sizes}, on {targets}"


def _use_section(config: LtuConfig, folder: Path, stage: StageRecord) -> str:
    package = config.model_type
    prefix = {"ltu": "Ltu", "ltu_as": "LtuAs"}.get(package, "Ltu")
    name = stage.name
    lines = [
        "## Use",
        "",
        f"`./{name}` stands for this folder, or give the hub id of this repository. The package is "
        f"`{package}`.",
        "",
        "```bash",
        f'python -m {package}.ask clip.wav "What can be inferred from the audio?" --model ./{name}',
        "```",
        "",
        "```python",
        f"from {package} import {prefix}ForConditionalGeneration, {prefix}Processor",
        "",
        f'model = {prefix}ForConditionalGeneration.from_pretrained("./{name}")',
        f'processor = {prefix}Processor.from_pretrained("./{name}")',
        'inputs = processor(text=["What can be inferred from the audio?"], audio=["clip.wav"])',
        "output = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(processor.decode_answer(answer))",
        "```",
    ]
    if config.language_model is not None and is_local_path(config.language_model):
        lines += [
            "",
            f"The language model `{stage.language_model}` is in another folder, to which "
            "`config.json` has a relative path. Elsewhere, give its folder or hub id: "
            "`--llm DIR_OR_ID`, or `from_pretrained(..., language_model=...)`.",
        ]
    return "\n".join(lines)


def _lineage_section(lineage: Sequence[StageRecord]) -> str:
    titles = (
        "stage",
        "sha256 of weights",
        "trained",
        "dataset",
        "sha256 of dataset",
        "examples",
        "with audio",
        "steps",
        "examples per step",
        "learning rate",
    )
    rows = []
    for number, stage in enumerate(lineage, start=1):
        name = f"**{stage.name}** (this)" if number == len(lineage) else stage.name
        data = stage.data
        examples = _shown(stage.num_examples)
        with_audio = None
        if data is not None and data.num_examples is not None:
            if stage.num_examples not in (None, data.num_examples):
                examples = f"{stage.num_examples} of {data.num_examples}"
            if data.num_with_audio is not None:
                with_audio = f"{data.num_with_audio} of {data.num_examples}"
        steps = None
        if stage.step is not None and stage.total_steps is not None:
            steps = f"{stage.step} of {stage.total_steps}"
        rows.append(
            (
                name,
                _hash_cell(stage.sha256),
                _shown(stage.trainable_params or CONVERSION_CELLS.get(stage.stage or "")),
                _shown(data.name if data else None),
                _hash_cell(data.sha256 if data else None),
                examples,
                _shown(with_audio),
                _shown(steps),
                _shown(stage.examples_per_step),
                _shown(stage.learning_rate),
            )
        )
    return "## Lineage\n\nThe oldest stage is first. A dash is not recorded.\n\n" + _table(
        titles, rows
    )


def _loss_section(log: Sequence[Mapping[str, Any]]) -> str:
    """Return about ten losses; nothing if none was logged."""
    by_step: dict[int, dict[str, Any]] = {}
    for entry in log:
        if "loss" in entry or "eval_loss" in entry:
            by_step.setdefault(entry["step"], {}).update(entry)
    entries = sorted(by_step.items())
    losses = [(step, entry["loss"]) for step, entry in entries if "loss" in entry]
    held_out = [(step, entry["eval_loss"]) for step, entry in entries if "eval_loss" in entry]
    if not losses:
        return ""
    sentences = [f"First: {losses[0][1]:.4f} (step {losses[0][0]})."]
    sentences.append(f"Last: {losses[-1][1]:.4f} (step {losses[-1][0]}).")
    if held_out:
        sentences.append(f"Held-out examples: {held_out[-1][1]:.4f} (step {held_out[-1][0]}).")
    else:
        sentences.append("No examples were held out.")
    rows = []
    for step in _spread(sorted(by_step), LOSS_ROWS):
        entry = by_step[step]
        row = [str(step), _number(entry.get("loss")), _number(entry.get("learning_rate"))]
        if held_out:
            row.append(_number(entry.get("eval_loss")))
        rows.append(row)
    titles = ["step", "loss", "learning rate after the step"]
    if held_out:
        titles.append("held-out loss")
    return f"## Loss\n\n{' '.join(sentences)}\n\n{_table(titles, rows)}"


def _spread(items: Sequence[int], count: int) -> list[int]:
    """Return at most `count` items at equal distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    last = len(items) - 1
    return [items[round(number * last / (count - 1))] for number in range(count)]


def _evaluation_section(results: Sequence[EvaluationResult]) -> str:
    if not results:
        return ""
    titles = (
        "benchmark",
        "metric",
        "on answered",
        "95 % interval",
        "on all",
        "examples",
        "failed",
        "scoring",
        "protocol",
    )
    rows = []
    for result in results:
        failed = [f"{reason} {count}" for reason, count in result.failed.items()]
        interval = "-"
        if result.low is not None and result.high is not None:
            interval = f"{_number(result.low)} to {_number(result.high)}"
        rows.append(
            (
                result.task,
                result.metric,
                _number(result.on_answered),
                interval,
                _number(result.on_all),
                str(result.num_examples),
                ", ".join(failed) or "0",
                result.scoring,
                result.protocol,
            )
        )
    return "## Evaluation\n\nMeasured on these weights with `eval.run`.\n\n" + _table(titles, rows)


def _arguments_section(state: Mapping[str, Any]) -> str:
    lines = []
    for name, value in public_arguments(state.get("arguments", {})).items():
        if value is not None:
            lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    if not lines:
        return ""
    shown = "\n".join(lines)
    return (
        "## Arguments\n\nPaths are shown without their folders.\n\n"
        f"<details><summary>All {len(lines)} arguments of the run</summary>\n\n"
        f"```yaml\n{shown}\n```\n\n</details>"
    )


def _versions_section(state: Mapping[str, Any]) -> str:
    rows = [(name, value) for name, value in state.get("versions", {}).items()]
    if "code" in state:
        rows.insert(0, ("code", f"`{state['code']}`"))
    if not rows:
        return ""
    return "## Versions\n\n" + _table(("package", "version of the run"), rows)


def _licence_section(config: LtuConfig, lineage: Sequence[StageRecord], stated: str | None) -> str:
    title = AUDIO_ENCODERS.get(config.audio_config.model_type, config.audio_config.model_type)
    own = "This card does not state a licence of its own."
    if stated is not None:
        own = f"Who published this model states the licence `{stated}`."
    lines = [
        "## Licence",
        "",
        "The licences of the language model, of the audio encoder "
        f"({title}) and of the training data apply to these weights. {own}",
    ]
    note = LLM_LICENCES.get(_language_model_on_hub(lineage) or "")
    if note:
        lines += ["", note]
    return "\n".join(lines)


# --- cells


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_line(titles), _line(["---"] * len(titles))]
    for row in rows:
        lines.append(_line([_escaped(cell) for cell in row]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(cell: str) -> str:
    """Return the text of a cell in one line, in which a bar is no border."""
    return " ".join(cell.replace("|", "\\|").split())


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _hash_cell(sha256: str | None) -> str:
    return "-" if sha256 is None else f"`{sha256[:HASH_DIGITS]}`"
