"""Compares names, counts, checkpoint files, prompts and tokens with the original's.

None of these tests needs real weights.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ltu import LtuConfig, LtuForConditionalGeneration, LtuProcessor
from ltu_as import LtuAsConfig
from tests.golden.rule_init import PREFIX, rule
from tests.released import LLAMA, convert, our_name, read, write_llm

# --- parameters

LAYOUTS = [
    "tiny.stage1_proj",
    "tiny.stage2_all",
    "tiny.lora_all",
    "real7b.stage1_proj",
    "real7b.stage2_all",
    "real7b.lora_all",
]
CONFIGS = {"layout_ltu": LtuConfig, "layout_ltu_as": LtuAsConfig}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_names_and_counts(golden_report, name: str, kind: str) -> None:
    """Every parameter of the original has a counterpart, and the same ones are trained.

    The model is on the meta device.
    """
    layout = read(kind)[name]
    targets = [] if layout["lora_target_modules"] == ["dummy"] else layout["lora_target_modules"]
    lora = None
    if targets:
        lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": targets}
    text_config = LLAMA if name.startswith("tiny") else {"model_type": "llama"}
    with torch.device("meta"):
        config = CONFIGS[kind](text_config=text_config, language_model="llm", lora=lora)
        model = AutoModelForCausalLM.from_config(config)
    model.set_trainable(layout["trainable_params"])
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    trained = {
        key: parameter.numel()
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }

    def report(what: str, found: dict, expected: dict) -> None:
        different = [key for key in found | expected if found.get(key) != expected.get(key)]
        golden_report("names", f"{kind} {name}, {what} {different[:3]}", len(different), 0)

    language_model = {}
    for key, shape in layout["peft_state_dict"].items():
        # Rotary tables are not parameters here: the language model computes them.
        if re.search("audio|lora|rotary", key):
            continue
        if key.split(".")[-2] in targets:
            key = key.replace(".weight", ".base_layer.weight")
        language_model["language_model." + key.removeprefix(PREFIX)] = shape
    saved = {our_name(key): shape for key, shape in layout["saved_by_trainer"].items()}
    report("saved", {key: shape for key, shape in ours.items() if model.is_own(key)}, saved)
    report("all", ours, saved | language_model)
    report(
        "trained",
        dict.fromkeys(trained, 0),
        {our_name(key): 0 for key in layout["trainable_names"]},
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    golden_report("names", f"{kind} {name}, count", count != layout["n_params"], 0)
    golden_report(
        "names", f"{kind} {name}, trainable", sum(trained.values()) != layout["n_trainable"], 0
    )


# --- checkpoint files


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llm(tmp_path_factory.mktemp("names") / "llm")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Weights as the original's Trainer writes them, with an audio encoder of two narrow blocks."""
    shapes = read("layout_ltu")["tiny.lora_all"]["saved_by_trainer"]
    assert len(shapes) == read("ckpt_ltu")["trainer_ckpt"]["n_keys"]
    narrow = {768: 64, 2304: 192, 3072: 256}
    shapes = {
        key: shape for key, shape in shapes.items() if not re.search(r"blocks_a\.(?!0\.)", key)
    }
    small = {key: tuple(narrow.get(size, size) for size in shape) for key, shape in shapes.items()}
    return {key: torch.from_numpy(rule(key, shape)) for key, shape in small.items()}


KINDS = {
    "trainer_ckpt": lambda key: key,
    "unprefixed_keys_into_peft": lambda key: key.removeprefix(PREFIX),
    "lora_without_default": lambda key: key.replace(".default", ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_checkpoint_files(golden_report, llm: Path, state: dict, kind: str) -> None:
    """All of them load here. The original silently ignores two of them because of their keys."""
    assert kind in read("ckpt_ltu")
    original = {KINDS[kind](key): value for key, value in state.items()}
    folder = convert(original, llm, llm.parent / kind)
    stored = load_file(folder / "model.safetensors")
    expected = {our_name(key): value for key, value in state.items()}
    different = [
        key for key in stored | expected if not torch.equal(stored.get(key), expected.get(key))
    ]
    golden_report("checkpoint files", f"{kind} {different[:3]}", len(different), 0)
    model = LtuForConditionalGeneration.from_pretrained(folder)
    different = [
        key for key, value in expected.items() if not torch.equal(model.state_dict()[key], value)
    ]
    golden_report("checkpoint files", f"{kind}, loaded {different[:3]}", len(different), 0)
    adapter = read("ckpt_ltu")["adapter_all"]["config"]
    names = ("r", "lora_alpha", "lora_dropout", "target_modules")
    lora = {name: adapter[name] for name in names}
    golden_report(
        "checkpoint files", f"{kind}, LoRA {model.config.lora}", model.config.lora != lora, 0
    )


@pytest.mark.parametrize("lacks", ["audio_encoder", "audio_"])
def test_a_part_of_a_model_is_no_checkpoint(llm: Path, state: dict, lacks: str) -> None:
    """A file of LoRA, with or without projector, is refused: the audio encoder would be random."""
    part = {key: value for key, value in state.items() if lacks not in key}
    with pytest.raises(ValueError, match="audio_tower"):
        convert(part, llm, llm.parent / lacks)


# --- text


@pytest.fixture(scope="module")
def processor(llm: Path) -> LtuProcessor:
    return LtuProcessor.from_config(LtuConfig(text_config=LLAMA), llm)


SOURCES = [
    ("tokenization_ltu", "toy_ltu"),
    ("tokenization_ltu", "edge_text"),
    # With transcripts.
    ("tokenization_ltu_as", "toy_ltu_as"),
    ("tokenization_ltu_as", "edge_text"),
]


@pytest.mark.parametrize("cases, source", SOURCES)
def test_ids_and_labels(golden_report, processor: LtuProcessor, cases: str, source: str) -> None:
    for case in read(cases):
        if not source.startswith(case["source"]):
            continue
        row = read(source)[case["index"]]
        name = f"{cases}, {case['source']} {case['index']}"
        if name.endswith("edge 3"):  # A control token that a user types: see the next test.
            continue
        prompt = processor.prompt(row["instruction"], row["input"])
        golden_report("tokenization", f"{name}, prompt", prompt != case["prompt_infer"], 0)
        golden_report(
            "tokenization", f"{name}, text", prompt + row["output"] != case["prompt_full"], 0
        )
        golden_report(
            "tokenization", f"{name}, prompt ids", processor.encode(prompt) != case["infer_ids"], 0
        )
        for key in case:
            if not key.startswith("cutoff"):
                continue
            # add_eos has no effect, in the original either.
            pattern = r"cutoff(\d+)\.train_on_inputs=(\w+)\.add_eos=\w+"
            cutoff, on_inputs = re.fullmatch(pattern, key).groups()
            ids, labels = processor.encode_example(row, int(cutoff), on_inputs == "True")
            golden_report("tokenization", f"{name}, {key}, ids", ids != case[key]["input_ids"], 0)
            golden_report(
                "tokenization", f"{name}, {key}, labels", labels != case[key]["labels"], 0
            )


def test_a_typed_control_token_stays_text(processor: LtuProcessor) -> None:
    """The original makes control tokens of a typed <s> and </s>; this difference is deliberate."""
    row = read("edge_text")[3]
    case = read("tokenization_ltu")[9]
    assert (case["source"], case["index"]) == ("edge", 3)
    assert processor.prompt(row["instruction"], row["input"]) + row["output"] == case["prompt_full"]
    original = case["cutoff512.train_on_inputs=True.add_eos=False"]["input_ids"]
    assert original.count(1) == 2 and original.count(2) == 3
    ids, labels = processor.encode_example(row, 512)
    assert ids == labels and ids.count(1) == ids.count(2) == 1 and (ids[0], ids[-1]) == (1, 2)
    assert processor.tokenizer.decode(ids[1:-1]).strip() == case["prompt_full"]
