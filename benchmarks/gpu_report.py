"""Measures everything that this project promises of one GPU, in one command of eight minutes.

    bash benchmarks/gpu.sh                              this command, on a machine without packages
    python -m benchmarks.gpu_report --sections generate
    python -m benchmarks.gpu_report --size tiny --device cpu

The last command is a quick test of the program itself.

These are the sections:

- prepare: writes a language model of random weights, clips and a dataset, and runs
  `ltu.convert_checkpoint --init` on them;
- parity: logits and greedy tokens in fp32, bf16 and fp16, compared with a CPU in fp32;
- tests: tests/test_devices.py;
- command: the script of stage 4, as it is and with the passes of the original;
- model: forward and backward passes of the model alone, and their peaks of memory compared with
  the estimate of `--plan`;
- generate: answers of the engine with static and dynamic caches, and `generate` alone.

Each section is a process of its own. The first three are not timed, and run at once; the others
follow one by one. A section that fails or runs out of time is a row of the report with the reason,
the others run all the same, and the exit status is 1. It is also 1 if a value misses its bound.
Bounds of speed are those of an H100 at 7B, and do not count elsewhere.

`benchmarks.gpu_speed_and_memory` measures more sizes and the hours of each stage.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

# On a shared machine, spinning threads would also measure the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BatchFeature,
    LlamaConfig,
)
from transformers.utils import is_liger_kernel_available  # noqa: E402

from benchmarks.device import (  # noqa: E402
    default_device,
    device_name,
    parse_device,
    synchronize,
)
from benchmarks.gpu_speed_and_memory import (  # noqa: E402
    LLMS,
    LORA,
    free_memory,
    make_model,
    train,
)
from benchmarks.static_cache import time_generate  # noqa: E402
from data.command_line import command_parser  # noqa: E402
from ltu import CavMaeConfig, CavMaeModel, LtuConfig, LtuProcessor  # noqa: E402
from ltu.convert_checkpoint import main as convert_checkpoint  # noqa: E402
from ltu.data.audio import SAMPLING_RATE  # noqa: E402
from ltu.files import run_command, write_json  # noqa: E402
from ltu.inference.engine import LtuEngine  # noqa: E402
from ltu.inference.requests import Request  # noqa: E402
from ltu.inference.static_cache import COMPILING_THREAD  # noqa: E402
from ltu.models.provenance import read_record  # noqa: E402
from ltu.models.version_check import FP32_TOLERANCE  # noqa: E402
from ltu.training.compiled_layers import (  # noqa: E402
    compile_layers,
    find_layers,
    undo_compilation,
)
from ltu.training.memory_estimate import trace_training  # noqa: E402
from ltu.training.model_setup import apply_liger  # noqa: E402

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"
STAGE = "train_scripts/ltu/stage4_all_mix.sh"

CLIP_SECONDS = 10
NUM_CLIPS = 64
TEXT_TOKENS = 108  # --cutoff_len of the stage scripts; every example fills it.
NEW_TOKENS = 64  # Of an answer.
WORDS = ("a", "dog", "barks", "while", "rain", "falls", "and", "wind", "blows", "far", "away")
PROMPT = "Which sounds are there, and in which order do they occur? This is question {}."

# The GPU and the size of which the bounds of speed are.
BOUND_DEVICE = "H100"
BOUND_SIZE = "7b"

# By the dtype of the language model: the largest difference of two logits, as a fraction of the
# range of logits, and the smallest fraction of positions with the same most likely token. In fp32,
# a recent GPU rounds the inputs of convolutions to a mantissa of 10 bits, so that logits differ by
# 3e-4 (emulated on a CPU).
PARITY_BOUNDS = {"float32": (FP32_TOLERANCE, 1.0), "bfloat16": (0.05, 0.8), "float16": (0.01, 0.95)}
MAX_MEMORY_ERROR = 0.15  # Of the estimate of --plan, as in tests/test_memory_estimate.py.

MIN_FREE_BYTES = {"tiny": 2**28, "7b": 16 * 2**30}  # Of the folder of temporary files.


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Args:
        audio_settings: of the audio encoder's config, if it is not that of the paper.
        stage_flags: further flags of the script of stage 4.
        batch: examples of an optimizer step.
        micro_batch: of the script of stage 4.
        steps, warm_up: optimizer steps of the command, and those of them that are not timed.
        steps_before, warm_up_before: the same for the passes of the original.
        eager_rows, compiled_rows: numbers of rows of a pass of the model alone.
        passes: how many of them are timed.
        questions: numbers of questions that are answered at once.
        new_tokens: of each answer.
    """

    audio_settings: dict[str, int]
    stage_flags: tuple[str, ...]
    batch: int
    micro_batch: int
    steps: int
    warm_up: int
    steps_before: int
    warm_up_before: int
    eager_rows: tuple[int, ...]
    compiled_rows: tuple[int, ...]
    passes: int
    questions: tuple[int, ...]
    new_tokens: int


SCALES = {
    "7b": Scale(
        audio_settings={},
        # By default, layers are compiled in a run of the length of stage 4, but not in this one.
        stage_flags=("--compile_layers", "True"),
        batch=256,
        micro_batch=4,
        steps=7,
        warm_up=2,
        steps_before=2,
        warm_up_before=1,
        eager_rows=(4, 16, 32),
        compiled_rows=(4, 16, 32),
        passes=6,
        questions=(64, 16, 1),
        new_tokens=NEW_TOKENS,
    ),
    "tiny": Scale(
        audio_settings={"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96},
        stage_flags=("--batch_size", "4", "--micro_batch_size", "2"),
        batch=4,
        micro_batch=2,
        steps=3,
        warm_up=1,
        steps_before=2,
        warm_up_before=1,
        eager_rows=(1, 2),
        compiled_rows=(2,),
        passes=2,
        questions=(2, 1),
        new_tokens=8,
    ),
}


@dataclass(frozen=True)
class Row:
    """A line of the report.

    Attributes:
        section, name: what was measured.
        value: the result; None where it could not be measured.
        unit: of the value.
        at_least, at_most: the bounds of the value, if it has any.
        passed: whether the value is within its bounds; None if they do not count here.
        note: what else a reader must know.
    """

    section: str
    name: str
    value: float | None
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    passed: bool | None = None
    note: str = ""

    @property
    def bound(self) -> str:
        """The bounds as text."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return ""

    def describe(self) -> str:
        """Return the row of the printed table."""
        value = "-" if self.value is None else f"{self.value:.4g}"
        verdict = {True: "ok", False: "MISSED", None: ""}[self.passed]
        line = f"{self.section:9}{self.name:58}{value:>9} {self.unit:12}{self.bound:10}{verdict:7}"
        return f"{line}{self.note}".rstrip()


HEAD = f"{'section':9}{'measurement':58}{'value':>9} {'unit':12}{'bound':10}"


@dataclass(frozen=True)
class Context:
    """What a section needs.

    Args:
        section: its name.
        size: of SCALES.
        device: of the models.
        folder: of temporary files, which the sections share.
    """

    section: str
    size: str
    device: torch.device
    folder: Path

    @property
    def scale(self) -> Scale:
        return SCALES[self.size]

    @property
    def rows_path(self) -> Path:
        """The file to which the section appends its rows."""
        return rows_path(self.folder, self.section)

    def add(
        self,
        name: str,
        value: float | None,
        unit: str = "",
        at_least: float | None = None,
        at_most: float | None = None,
        is_speed: bool = True,
        note: str = "",
    ) -> None:
        """Append a row to the report.

        Args:
            name, value, unit, at_least, at_most, note: as of `Row`.
            is_speed: whether the bounds are those of a certain GPU.
        """
        counts = not is_speed
        if self.device.type == "cuda" and self.size == BOUND_SIZE:
            counts = counts or BOUND_DEVICE in device_name(self.device)
        passed = None
        if value is not None and counts and (at_least is not None or at_most is not None):
            passed = at_least is None or value >= at_least
            passed = passed and (at_most is None or value <= at_most)
        row = Row(self.section, name, value, unit, at_least, at_most, passed, note)
        with self.rows_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def rows_path(folder: Path, section: str) -> Path:
    return folder / f"{section}.jsonl"


def audio_config(scale: Scale) -> CavMaeConfig:
    """Return the config of the audio encoder."""
    return CavMaeConfig(**scale.audio_settings)


def make_ltu(context: Context) -> torch.nn.Module:
    """Return an LTU with LoRA and random weights on the device."""
    audio = audio_config(context.scale)
    return make_model("ltu", context.size, "all", context.device, audio)


def make_clip(seed: int) -> np.ndarray:
    """Return a clip of noise, (samples,)."""
    noise = np.random.default_rng(seed).normal(0, 0.1, CLIP_SECONDS * SAMPLING_RATE)
    return noise.astype(np.float32)


# --- prepare


def prepare(context: Context) -> None:
    """Write what the script of stage 4 reads: an initial checkpoint, clips and examples."""
    scale = context.scale
    torch.manual_seed(0)
    config = LlamaConfig(**LLMS[context.size], dtype=torch.bfloat16)
    start = time.perf_counter()
    with torch.device(context.device):
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    llm_folder = context.folder / "llm"
    llm.save_pretrained(llm_folder)
    del llm
    for file in TOKENIZER.iterdir():
        shutil.copy(file, llm_folder)
    context.add("writing the language model", time.perf_counter() - start, "s")

    data = context.folder / "data"
    data.mkdir()
    for number in range(NUM_CLIPS):
        soundfile.write(data / f"{number}.flac", make_clip(number), SAMPLING_RATE)
    write_json(make_examples(scale.batch * max(scale.steps, scale.steps_before)), data_path(data))

    start = time.perf_counter()
    flags = ["--init", "--llm", str(llm_folder)]
    flags += ["--output_dir", str(context.folder / "exp" / "stage3_all_close")]
    if scale.audio_settings:
        encoder = context.folder / "encoder"
        CavMaeModel(audio_config(scale)).save_pretrained(encoder)
        flags += ["--audio_encoder", str(encoder)]
    convert_checkpoint(flags)
    context.add("ltu.convert_checkpoint --init", time.perf_counter() - start, "s")


def data_path(folder: Path) -> Path:
    """Return the path of the dataset file in $DATA of the script."""
    return folder / "stage4.json"


def make_examples(count: int) -> list[dict[str, str]]:
    """Return examples that are longer than the text cutoff."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(count):
        examples.append(
            {
                "instruction": PROMPT.format(number),
                "input": "",
                "audio_id": f"{number % NUM_CLIPS}.flac",
                "dataset": "random",
                "task": "random",
                "output": " ".join(rng.choice(WORDS, TEXT_TOKENS)),
            }
        )
    return examples


# --- parity


def measure_parity(context: Context) -> None:
    """Compare logits and greedy tokens of a small model with those of a CPU in fp32."""
    torch.manual_seed(0)
    text_config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    audio = CavMaeConfig(**SCALES["tiny"].audio_settings)
    config = LtuConfig(audio_config=audio, text_config=text_config, lora=LORA)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        # Larger than usual, so that logits differ clearly from each other. LoRA's B is not 0 then.
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    checkpoint = context.folder / "parity"
    model.save_pretrained(checkpoint)
    LtuProcessor.from_config(config, TOKENIZER).save_pretrained(checkpoint)

    reference = LtuEngine.from_pretrained(checkpoint, "cpu", torch.float32)
    tokens = generate_greedy(reference)
    expected = answer_logits(reference, tokens)
    extent = expected.max() - expected.min()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        engine = LtuEngine.from_pretrained(checkpoint, str(context.device), dtype)
        found = answer_logits(engine, tokens)
        name = str(dtype).removeprefix("torch.")
        max_difference, min_equal = PARITY_BOUNDS[name]
        context.add(
            f"{name}: largest difference of logits / their range",
            float((found - expected).abs().max() / extent),
            at_most=max_difference,
            is_speed=False,
        )
        is_equal = found.argmax(-1) == expected.argmax(-1)  # (rows, new tokens)
        context.add(
            f"{name}: positions with the same most likely token",
            float(is_equal.float().mean()),
            at_least=min_equal,
            is_speed=False,
            note=f"of {is_equal.numel()}",
        )
        if dtype == torch.float32:
            context.add(
                f"{name}: equal tokens, generated greedily",
                float((generate_greedy(engine) == tokens).float().mean()),
                at_least=1.0,
                is_speed=False,
                note=f"of {tokens.numel()}",
            )


def parity_inputs(engine: LtuEngine) -> BatchFeature:
    """Return prompts of unequal length, one of them without audio, on the engine's device."""
    requests = [Request(PROMPT.format("?" * seed), make_clip(seed)) for seed in range(3)]
    requests.append(Request("Is there no audio?"))
    return engine.inputs(requests, NEW_TOKENS)


def generate_greedy(engine: LtuEngine) -> torch.Tensor:
    """Return the greedy tokens after the prompts, (rows, new tokens)."""
    inputs = parity_inputs(engine)
    output = engine.model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=engine.processor.pad_token_id,
    )
    return output[:, inputs["input_ids"].shape[1] :].cpu()


@torch.no_grad()
def answer_logits(engine: LtuEngine, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits that predict each token of given answers.

    Args:
        tokens: of the answers to the prompts, (rows, new tokens).

    Returns:
        (rows, new tokens, tokens of the vocabulary)
    """
    inputs = parity_inputs(engine)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    own_tokens = tokens.to(inputs["input_ids"])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], own_tokens], 1)
    mask = torch.ones_like(own_tokens).to(inputs["attention_mask"])
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], 1)
    logits = engine.model(**inputs, use_cache=False).logits
    return logits[:, num_prompt_tokens - 1 : -1].float().cpu()


# --- tests


def run_tests(context: Context) -> None:
    """Run the tests that need a GPU."""
    report = context.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", "tests/test_devices.py"]
    environment = dict(os.environ)
    if context.device.type == "cuda":
        environment["LTU_TEST_GPU"] = "1"
    process = subprocess.run(command, cwd=ROOT, env=environment)
    if not report.is_file():
        raise ValueError(f"pytest has written no report; its exit status is {process.returncode}")
    [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    total = int(suite.get("tests", 0))
    num_skipped = int(suite.get("skipped", 0))
    num_failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    context.add("tests/test_devices.py: failed", num_failed, at_most=0, is_speed=False)
    num_needed = None  # Without a GPU all are skipped.
    if context.device.type == "cuda":
        num_needed = 1
    context.add(
        "tests/test_devices.py: passed",
        total - num_skipped - num_failed,
        at_least=num_needed,
        is_speed=False,
        note=f"of {total}, {num_skipped} skipped",
    )


# --- command


@dataclass(frozen=True)
class CommandRun:
    """A run of the script of stage 4.

    Attributes:
        first_seconds: from the start of the command to the end of the first step.
        samples_per_second: of the steps after the warm-up.
        rows_per_pass: rows that go through the model at once.
        compiled_layers: whether they are.
        data_wait_fraction: of the training time.
    """

    first_seconds: float
    samples_per_second: float
    rows_per_pass: int
    compiled_layers: bool
    data_wait_fraction: float


def measure_command(context: Context) -> None:
    """Run the script of stage 4, and again with the passes of the original."""
    scale = context.scale
    ours = run_stage(context, "ours", scale.steps, scale.warm_up)
    add_command(context, "stage 4", ours, at_least=115)
    context.add(
        "stage 4: time that training waits for data",
        ours.data_wait_fraction,
        at_most=0.02,
        note="of the training time",
    )
    flags = ("--rows_per_pass", str(scale.micro_batch), "--compile_layers", "False")
    before = run_stage(context, "before", scale.steps_before, scale.warm_up_before, *flags)
    add_command(context, f"stage 4, {' '.join(flags)}", before)
    context.add(
        "stage 4: times as fast", ours.samples_per_second / before.samples_per_second, at_least=6
    )


def add_command(
    context: Context, name: str, run: CommandRun, at_least: float | None = None
) -> None:
    """Append the rows of a run."""
    compiled = "compiled" if run.compiled_layers else "eager"
    note = f"{run.rows_per_pass} rows a pass, {compiled}, {run.data_wait_fraction:.2%} waiting"
    context.add(name, run.samples_per_second, "samples/s", at_least, note=note)
    context.add(f"{name}: until the first step ends", run.first_seconds, "s")


def run_stage(context: Context, name: str, steps: int, warm_up: int, *flags: str) -> CommandRun:
    """Run the script of stage 4 for a few steps, and time them by the lines of its log.

    Raises:
        ValueError: the script fails.
    """
    output = context.folder / "exp" / name
    command = ["bash", STAGE, *context.scale.stage_flags, "--max_steps", str(steps)]
    command += ["--output_dir", str(output), "--logging_steps", "1", "--disable_tqdm", "True"]
    if context.device.type == "cpu":
        command += ["--use_cpu", "True"]
    command += flags
    environment = os.environ | {
        "DATA": str(context.folder / "data"),
        "EXP": str(context.folder / "exp"),
        "NPROC": "1",
        "PYTHON": sys.executable,
        "PYTHONUNBUFFERED": "1",
    }
    start = time.perf_counter()
    times = []
    line = ""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{'loss'"):
                times.append(time.perf_counter())
    if process.returncode:
        raise ValueError(f"{STAGE} has failed ({process.returncode}): {line.strip()}")
    if len(times) != steps:
        raise ValueError(f"{STAGE} has logged {len(times)} losses in {steps} steps.")
    seconds = times[-1] - times[warm_up - 1]
    record = read_record(output)
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    [wait] = [entry["data_wait_fraction"] for entry in state["log_history"][-1:]]
    return CommandRun(
        first_seconds=times[0] - start,
        samples_per_second=(steps - warm_up) * context.scale.batch / seconds,
        rows_per_pass=record["rows_per_pass"],
        compiled_layers=record["compiled_layers"],
        data_wait_fraction=wait,
    )


# --- model


def measure_model(context: Context) -> None:
    """Measure passes of the model alone, and compare their memory with the estimate."""
    scale = context.scale
    model = make_ltu(context)
    for rows in scale.eager_rows:
        peak = add_passes(context, model, rows, "eager")
        add_memory(context, rows, peak)
    layers = find_layers(model)
    compile_layers(layers)
    for rows in scale.compiled_rows:
        add_passes(context, model, rows, "compiled", at_least=120 if rows == 32 else None)
    undo_compilation(layers)

    rows = scale.compiled_rows[-1]
    kernels = "eager"
    if context.device.type == "cuda" and is_liger_kernel_available():
        kernels = "Liger"
        apply_liger(model)
        for liger_rows in {scale.micro_batch, rows}:
            add_passes(context, model, liger_rows, kernels)
    else:
        context.add("Liger kernels", None, note="liger-kernel is not installed, or no GPU")
    num_tokens = model.config.num_audio_tokens + TEXT_TOKENS
    rate = time_language_model(model.language_model, rows, num_tokens, scale.passes)
    name = f"language model alone, {rows} rows of {num_tokens} tokens, {kernels}"
    context.add(name, rate, "samples/s")


def add_passes(
    context: Context,
    model: torch.nn.Module,
    rows: int,
    kernels: str,
    at_least: float | None = None,
) -> float | None:
    """Measure passes of so many rows, append a row, and return their peak of memory in GiB."""
    name = f"model alone, {rows} rows, {kernels}"
    try:
        cost = train(model, "all", rows, TEXT_TOKENS, False, context.scale.passes)
    except torch.OutOfMemoryError:
        context.add(name, None, "samples/s", note="out of memory")
        return None
    finally:
        model.zero_grad(set_to_none=True)
        free_memory(context.device)
    note = f"{1000 * cost.micro_batch_seconds:.0f} ms a pass, the first {cost.first_seconds:.1f} s"
    if cost.peak_gib is not None:
        note += f", peak {cost.peak_gib:.1f} GiB"
    context.add(name, rows / cost.micro_batch_seconds, "samples/s", at_least, note=note)
    return cost.peak_gib


def add_memory(context: Context, rows: int, peak_gib: float | None) -> None:
    """Append the estimate of `--plan` for a pass, compared with its measured peak."""
    audio = audio_config(context.scale)
    model = make_model("ltu", context.size, "all", torch.device("meta"), audio)
    model.set_trainable("all")
    is_cuda = context.device.type == "cuda"
    estimate = trace_training(model, rows, TEXT_TOKENS, cuda=is_cuda).peak / 2**30
    name = f"memory, {rows} rows: error of --plan"
    note = f"{estimate:.2f} GiB estimated"
    if peak_gib is None:
        context.add(name, None, note=f"{note}, the peak is not measured")
        return
    error = abs(estimate / peak_gib - 1)
    note += f", {peak_gib:.2f} GiB measured"
    context.add(name, error, at_most=MAX_MEMORY_ERROR, is_speed=False, note=note)


def time_language_model(llm: torch.nn.Module, rows: int, num_tokens: int, num_passes: int) -> float:
    """Return the rows per second of forward and backward passes of text alone."""
    device = llm.get_input_embeddings().weight.device
    tokens = torch.randint(3, llm.config.vocab_size, (rows, num_tokens), device=device)
    llm.train()
    seconds = []
    for _ in range(num_passes + 1):
        synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = llm(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    llm.zero_grad(set_to_none=True)
    return rows / statistics.median(seconds[1:])


# --- generate


# Bounds of questions per second with a static cache, by the number of questions at once. One
# question takes at most 0.8 s.
MIN_QUESTIONS_PER_SECOND = {1: 1 / 0.8, 16: 20.0, 64: 60.0}


def measure_generation(context: Context) -> None:
    """Measure the engine with both caches, and `generate` alone with a static one.

    All questions are about one clip. The static cache comes first, because its bounds matter if
    time runs out.
    """
    scale = context.scale
    model = make_ltu(context).eval()
    processor = LtuProcessor.from_config(model.config, TOKENIZER)
    engine = LtuEngine(model, processor)
    clip = make_clip(0)
    for choice, cache in (("on", "static"), ("off", "dynamic")):
        engine.static_cache = choice
        for count in scale.questions:
            requests = [Request(PROMPT.format(number), clip) for number in range(count)]
            bound = MIN_QUESTIONS_PER_SECOND.get(count) if cache == "static" else None
            add_answers(context, engine, requests, cache, bound)
            if cache == "static":
                add_generate(context, engine, requests, bound)


def add_generate(
    context: Context, engine: LtuEngine, requests: list[Request], at_least: float | None
) -> None:
    """Append the questions per second of `generate` with a static cache, after the engine's."""
    count = len(requests)
    new_tokens = context.scale.new_tokens
    # With the engine's length of the cache, and in its thread, nothing is compiled again. Another
    # thread could not replay its CUDA graphs.
    prompt_length = engine.inputs(requests, new_tokens)["input_ids"].shape[1]
    settings = engine.cache_settings(prompt_length + new_tokens)
    timing = COMPILING_THREAD.submit(time_generate, engine.model, count, new_tokens, **settings)
    found = timing.result()
    name = f"generate, {count} at once, static cache"
    note = f"first call {found['first_seconds']:.1f} s, then {found['seconds']:.2f} s, "
    note += f"{settings['max_cache_len']} tokens in the cache"
    context.add(name, found["questions_per_second"], "questions/s", at_least, note=note)


def add_answers(
    context: Context,
    engine: LtuEngine,
    requests: list[Request],
    cache: str,
    at_least: float | None,
) -> None:
    """Append the questions per second of the engine; the faster of two calls counts.

    Raises:
        ValueError: an answer has another length, or the cache is not the one that was asked for.
    """
    count = len(requests)
    new_tokens = context.scale.new_tokens
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    seconds = []
    for _ in range(3):
        synchronize(context.device)
        start = time.perf_counter()
        answers = engine(requests, count, **settings)
        seconds.append(time.perf_counter() - start)
        for answer in answers:
            if answer.new_tokens != new_tokens:
                raise ValueError(f"an answer does not have {new_tokens} tokens: {answer}")
    if cache == "static" and not engine.can_use_static_cache:
        raise ValueError("this model cannot use a static cache; the log has the reason")
    best = min(seconds[1:])
    note = f"first call {seconds[0]:.1f} s, then {best:.2f} s"
    name = f"engine, {count} at once, {cache} cache"
    context.add(name, count / best, "questions/s", at_least, note=note)


# --- the report


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Args:
        run: measures, in a process of its own.
        max_seconds: after which it is ended.
        is_timed: whether it measures time, so that nothing else may run.
        needs: the section whose files it reads.
    """

    run: Callable[[Context], None]
    max_seconds: float
    is_timed: bool = True
    needs: str | None = None


SECTIONS = {
    "prepare": Section(prepare, 120, is_timed=False),
    "parity": Section(measure_parity, 120, is_timed=False),
    "tests": Section(run_tests, 180, is_timed=False),
    "command": Section(measure_command, 270, needs="prepare"),
    "model": Section(measure_model, 150),
    "generate": Section(measure_generation, 270),
}


@dataclass
class Outcome:
    """How a section has ended.

    Attributes:
        reason: why it has failed, "" if it has not.
        seconds: that it took.
    """

    reason: str
    seconds: float


@dataclass
class Report:
    """What is written as JSON after each section.

    Attributes:
        size: of SCALES.
        machine: the device and the versions of packages.
        outcomes: of the sections that have ended, by name.
        rows: of all sections.
        seconds: since the start.
    """

    size: str
    machine: dict[str, str | None]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def has_failed(self) -> bool:
        """Whether a section has failed, or a value missed its bound."""
        reasons = [outcome.reason for outcome in self.outcomes.values()]
        return any(reasons) or any(row.passed is False for row in self.rows)


class SectionProcess:
    """A section that runs.

    Args:
        name: of SECTIONS.
        context: what it needs.
        max_seconds: after which it is ended.
    """

    def __init__(self, name: str, context: Context, max_seconds: float):
        self.name = name
        self.folder = context.folder
        self.start = time.perf_counter()
        self.max_seconds = max_seconds
        self.log = self.folder / f"{name}.log"
        command = [sys.executable, "-m", "benchmarks.gpu_report", "--run_section", name]
        command += ["--size", context.size, "--device", str(context.device)]
        command += ["--work_dir", str(self.folder)]
        with self.log.open("wb") as log:
            # A session of its own, so that its processes can be ended with it.
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> Outcome:
        """Wait until the section has ended, or end it."""
        reason = ""
        seconds_left = self.start + self.max_seconds - time.perf_counter()
        try:
            status = self.process.wait(max(0.0, seconds_left))
        except subprocess.TimeoutExpired:
            reason = f"ended after {self.max_seconds:.0f} s"
            self.end()
        else:
            if status:
                reason = f"exit status {status}: {self._last_line()}"
        if reason:
            print(f"--- the end of the log of {self.name}, {reason}")
            print("\n".join(self._log_lines()[-30:]), flush=True)
        return Outcome(reason, round(time.perf_counter() - self.start, 1))

    def end(self) -> None:
        """End the section and all processes that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def read_rows(self) -> list[Row]:
        """Return the rows that it has written so far."""
        path = rows_path(self.folder, self.name)
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A section that was ended may have been writing its last row.
        return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]

    def _log_lines(self) -> list[str]:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()]

    def _last_line(self) -> str:
        lines = self._log_lines()
        return lines[-1].strip() if lines else "no output"


def describe_machine(device: torch.device) -> dict[str, str | None]:
    """Return the name of the device, and the versions of packages; None of one that is missing."""
    machine: dict[str, str | None] = {"device": device_name(device)}
    machine["python"] = platform.python_version()
    for package in ("torch", "transformers", "accelerate", "peft", "triton", "liger-kernel"):
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = None
    return machine


class Runner:
    """Runs sections and writes the report.

    Args:
        report: to write.
        output_path: where.
        context: what each section needs.
        time_limit: seconds for all sections.
    """

    def __init__(self, report: Report, output_path: Path, context: Context, time_limit: float):
        self.report = report
        self.output_path = output_path
        self.context = context
        self.start = time.perf_counter()
        self.time_limit = time_limit
        self.running: list[SectionProcess] = []

    def run(self, names: list[str]) -> None:
        """Run sections: those that are not timed at once, the others one by one."""
        untimed = [name for name in names if not SECTIONS[name].is_timed]
        timed = [name for name in names if SECTIONS[name].is_timed]
        try:
            for process in [self._start(name) for name in untimed]:
                self._finish(process)
            for name in timed:
                needs = SECTIONS[name].needs
                if needs is not None and self.report.outcomes[needs].reason:
                    self._record(name, Outcome(f"{needs} has failed", 0.0), [])
                    continue
                self._finish(self._start(name))
        finally:
            for process in self.running:
                process.end()

    def _seconds(self) -> float:
        return time.perf_counter() - self.start

    def _start(self, name: str) -> SectionProcess:
        seconds = min(SECTIONS[name].max_seconds, max(0.0, self.time_limit - self._seconds()))
        process = SectionProcess(name, self.context, seconds)
        self.running.append(process)
        return process

    def _finish(self, process: SectionProcess) -> None:
        outcome = process.wait()
        self._record(process.name, outcome, process.read_rows())

    def _record(self, name: str, outcome: Outcome, rows: list[Row]) -> None:
        """Add what a section has found, print it, and write the report."""
        if outcome.reason:
            rows = [*rows, Row(name, "FAILED", None, passed=False, note=outcome.reason)]
        print(f"--- {name}: {outcome.seconds:.0f} s", flush=True)
        for row in rows:
            print(row.describe(), flush=True)
        self.report.outcomes[name] = outcome
        self.report.rows += rows
        self.report.seconds = round(self._seconds(), 1)
        write_json(asdict(self.report), self.output_path)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--size", choices=list(SCALES), default="7b", help="Size of the language model."
    )
    parser.add_argument(
        "--device", type=parse_device, default=default_device(), help="cpu, cuda, ..."
    )
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=list(SECTIONS),
        default=list(SECTIONS),
        help="What is measured. A section that another one needs is added.",
    )
    parser.add_argument(
        "--time_limit",
        type=float,
        default=480,
        help="Seconds for all sections; a section that exceeds them is ended.",
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        help="Folder for temporary files, 15 GB at 7b (default: that of the system).",
    )
    parser.add_argument(
        "--output_path",
        type=Path,
        help="Write the report there as JSON (default: benchmarks/results/gpu_DEVICE.json, or "
        "exp/gpu_tiny.json).",
    )
    parser.add_argument("--run_section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device = torch.device(args.device)
    for name in args.sections:
        needs = SECTIONS[name].needs
        if needs is not None and needs not in args.sections:
            args.sections.append(needs)
    return args


def default_output(size: str, device: torch.device) -> Path:
    """Return the file of the report."""
    if size == "tiny":
        return ROOT / "exp" / "gpu_tiny.json"
    name = re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")
    return ROOT / "benchmarks" / "results" / f"gpu_{name}.json"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.run_section:
        context = Context(args.run_section, args.size, args.device, args.work_dir)
        SECTIONS[args.run_section].run(context)
        return 0

    output_path = args.output_path or default_output(args.size, args.device)
    report = Report(args.size, describe_machine(args.device))
    print(json.dumps(report.machine), flush=True)
    with tempfile.TemporaryDirectory(prefix="ltu_gpu_", dir=args.work_dir) as folder:
        free = shutil.disk_usage(folder).free
        needed = MIN_FREE_BYTES[args.size]
        if free < needed:
            raise ValueError(
                f"{Path(folder).parent} has {free / 2**30:.1f} GiB free, but {needed / 2**30:.1f} "
                "are needed. Name another folder with --work_dir."
            )
        context = Context("", args.size, args.device, Path(folder))
        runner = Runner(report, output_path, context, args.time_limit)
        runner.run([name for name in SECTIONS if name in args.sections])
    print(f"\n{HEAD}")
    for row in report.rows:
        print(row.describe())
    print(f"{report.seconds:.0f} s; written to {output_path}")
    return int(report.has_failed)


if __name__ == "__main__":
    run_command(main)
