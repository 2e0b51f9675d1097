"""Names, counts, kinds of checkpoint files, prompts and ids against the original's: what needs no real weights."""

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
    f"{size}.{stage}"
    for size in ("tiny", "real7b")
    for stage in ("stage1_proj", "stage2_all", "lora_all")
]
CONFIGS = {"layout_ltu": LtuConfig, "layout_ltu_as": LtuAsConfig}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_names_and_counts(golden_report, name: str, kind: str) -> None:
    """On the meta device: every parameter of the original has its place here, and the same ones are trained."""
    layout = read(kind)[name]
    targets = [] if layout["lora_target_modules"] == ["dummy"] else layout["lora_target_modules"]
    lora = {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": targets} if targets else None
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
        if not re.search(
            "audio|lora|rotary", key
        ):  # Rotary tables are no parameters: the language model computes them.
            wrapped = (
                key.replace(".weight", ".base_layer.weight")
                if key.split(".")[-2] in targets
                else key
            )
            language_model["language_model." + wrapped.removeprefix(PREFIX)] = shape
    saved = {our_name(key): shape for key, shape in layout["saved_by_trainer"].items()}
    report("saved", {key: shape for key, shape in ours.items() if model.is_own(key)}, saved)
    report("all", ours, saved | language_model)
    report(
        "trained",
        dict.fromkeys(trained, 0),
        {our_name(key): 0 for key in layout["trainable_names"]},
    )
    golden_report(
        "names",
        f"{kind} {name}, count",
        sum(p.numel() for p in model.parameters()) != layout["n_params"],
        0,
    )
    golden_report(
        "names", f"{kind} {name}, trainable", sum(trained.values()) != layout["n_trainable"], 0
    )


# --- checkpoint files


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llm(tmp_path_factory.mktemp("names") / "llm")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """The file of the original's Trainer, but its ear has two blocks and is 64 wide."""
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
    """Two of them silently gave nothing in the original, because of how their keys are written. Here they load."""
    assert kind in read("ckpt_ltu")
    folder = convert(
        {KINDS[kind](key): value for key, value in state.items()}, llm, llm.parent / kind
    )
    stored, expected = (
        load_file(folder / "model.safetensors"),
        {our_name(key): value for key, value in state.items()},
    )
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
    lora = {"r": adapter["r"], "alpha": adapter["lora_alpha"], "dropout": adapter["lora_dropout"]}
    lora["target_modules"] = adapter["target_modules"]
    golden_report(
        "checkpoint files", f"{kind}, LoRA {model.config.lora}", model.config.lora != lora, 0
    )


@pytest.mark.parametrize("lacks", ["audio_encoder", "audio_"])
def test_a_part_of_a_model_is_no_checkpoint(llm: Path, state: dict, lacks: str) -> None:
    """LoRA with the projection, or alone, as in an adapter_model.bin: the ear would be a random one."""
    with pytest.raises(KeyError, match="audio_tower"):
        convert(
            {key: value for key, value in state.items() if lacks not in key},
            llm,
            llm.parent / lacks,
        )


# --- text


@pytest.fixture(scope="module")
def processor(llm: Path) -> LtuProcessor:
    return LtuProcessor.from_config(LtuConfig(text_config=LLAMA), llm)


SOURCES = [("tokenization_ltu", "toy_ltu"), ("tokenization_ltu", "edge_text")]
SOURCES += [
    ("tokenization_ltu_as", "toy_ltu_as"),
    ("tokenization_ltu_as", "edge_text"),
]  # With transcripts.


@pytest.mark.parametrize("cases, source", SOURCES)
def test_ids_and_labels(golden_report, processor: LtuProcessor, cases: str, source: str) -> None:
    for case in (case for case in read(cases) if source.startswith(case["source"])):
        row, name = read(source)[case["index"]], f"{cases}, {case['source']} {case['index']}"
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
        for key in (key for key in case if key.startswith("cutoff")):
            # add_eos changes nothing in the original either.
            cutoff, on_inputs = re.fullmatch(
                r"cutoff(\d+)\.train_on_inputs=(\w+)\.add_eos=\w+", key
            ).groups()
            ids, labels = processor.encode_example(row, int(cutoff), on_inputs == "True")
            golden_report("tokenization", f"{name}, {key}, ids", ids != case[key]["input_ids"], 0)
            golden_report(
                "tokenization", f"{name}, {key}, labels", labels != case[key]["labels"], 0
            )


def test_a_typed_control_token_stays_text(processor: LtuProcessor) -> None:
    """The one deliberate difference: the original made <s> and </s> of what a user typed."""
    row, case = read("edge_text")[3], read("tokenization_ltu")[9]
    assert (case["source"], case["index"]) == ("edge", 3)
    assert processor.prompt(row["instruction"], row["input"]) + row["output"] == case["prompt_full"]
    original = case["cutoff512.train_on_inputs=True.add_eos=False"]["input_ids"]
    assert original.count(1) == 2 and original.count(2) == 3
    ids, labels = processor.encode_example(row, 512)
    assert ids == labels and ids.count(1) == ids.count(2) == 1 and (ids[0], ids[-1]) == (1, 2)
    assert processor.tokenizer.decode(ids[1:-1]).strip() == case["prompt_full"]
