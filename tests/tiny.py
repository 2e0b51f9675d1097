"""A model small enough to build in a test.

It has an audio encoder of two blocks and 64 frames, and a language model of two layers. `Gate`
makes it as slow as a test needs it. `start_command` and `start_ranks` run commands on it in
processes of their own.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ltu import CavMaeConfig, LtuConfig, LtuForConditionalGeneration, LtuProcessor
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Answer, OnText, Request
from ltu.models.locate_checkpoint import hash_model

GOLDEN = Path(__file__).parent / "golden"
LLM = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def audio_config() -> CavMaeConfig:
    """0.64 s of 32 bins -> 2 audio tokens of width 32."""
    return CavMaeConfig(
        num_mel_bins=32,
        num_frames=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )


def write_llm(
    folder: Path,
    model_type: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    **settings: Any,
) -> Path:
    """Write a language model with random weights and the golden tokenizer as a folder."""
    config = AutoConfig.for_model(
        model_type, **(LLM | SPECIAL | settings), max_position_embeddings=2048
    )
    model = AutoModelForCausalLM.from_config(config)
    # Seeded here: releases of transformers use different random numbers to build a model.
    torch.manual_seed(seed)
    # Larger than the usual init, so that one token differs clearly from another.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.to(dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return folder
    for file in (GOLDEN / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def write_checkpoint(
    folder: Path,
    llm: Path,
    lora: dict | None = None,
    seed: int = 0,
    prompt_template: dict | None = None,
) -> Path:
    """A checkpoint folder around that language model; a LoRA in it does something."""
    torch.manual_seed(seed)
    text_config = AutoConfig.from_pretrained(llm)
    config = LtuConfig(
        audio_config=audio_config(),
        text_config=text_config,
        language_model=str(llm),
        language_model_sha256=hash_model(llm),
        lora=lora,
        prompt_template=prompt_template,
    )
    # AutoTokenizer opens the golden tokenizer in a Qwen2 folder as a Qwen2 tokenizer without words.
    golden = (llm / "tokenizer.model").is_file()
    processor = LtuProcessor.from_config(config, GOLDEN / "tokenizer" if golden else llm)
    model = LtuForConditionalGeneration(
        config, language_model=AutoModelForCausalLM.from_pretrained(llm)
    )
    torch.manual_seed(seed)
    for name, parameter in model.audio_tower.named_parameters():
        if parameter.ndim > 1 and "pos_embed" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.multi_modal_projector.linear.weight, std=0.3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def training_flags(checkpoint: Path, data_path: Path, output: Path, **more: object) -> list[str]:
    """Return the arguments of `ltu.finetune` for a small run."""
    settings = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "bf16": False,
        "num_workers": 0,
        "save_steps": 100,
    }
    settings |= more
    argv = ["--base_model", str(checkpoint)]
    argv += ["--data_path", str(data_path)]
    argv += ["--output_dir", str(output)]
    for name, value in settings.items():
        argv += [f"--{name}", str(value)]
    return argv


def clip(seed: int, seconds: float = 0.5) -> np.ndarray:
    """Noise, (samples,) at 16 kHz."""
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)


def write_rows(folder: Path, count: int, seed: int = 0, without_audio: int = 0) -> Path:
    """Rows of unequal length about clips of noise; the first `without_audio` have none."""
    import soundfile

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        soundfile.write(folder / f"{index}.wav", clip(seed + index), 16_000)
        words = " ".join(
            rng.choice(["a", "dog", "rain", "loud", "bell", "far", "sound"], rng.integers(1, 9))
        )
        audio_id = "empty" if index < without_audio else f"{index}.wav"
        rows.append(
            {
                "instruction": f"What is it? {words}",
                "input": "",
                "audio_id": audio_id,
                "output": words,
            }
        )
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


class Gate:
    """Holds an engine at each text of an answer until the gate opens or the request is cancelled.

    So a test decides how long an answer takes, and not the speed of the machine.
    """

    def __init__(self, run: Callable):
        self.stock_run = run
        self.is_open = threading.Event()
        self.is_reached = threading.Event()
        self.steps = threading.Semaphore(0)

    def step(self) -> None:
        """Let one text pass."""
        self.steps.release()

    def run(
        self,
        requests: list[Request],
        batch_size: int = 8,
        seed: int = 42,
        on_text: OnText | None = None,
        **decoding: Any,
    ) -> Iterator[tuple[int, Answer]]:
        """`LtuEngine.run`; where nobody reads the text, nothing is held."""

        def hold(index: int, text: str) -> bool | None:
            goes_on = on_text(index, text)
            if text:
                self.is_reached.set()
            while text and goes_on is not False and not self.is_open.is_set():
                if self.steps.acquire(timeout=0.01):
                    break
                goes_on = on_text(index, text)
            return goes_on

        return self.stock_run(requests, batch_size, seed, on_text and hold, **decoding)


@contextmanager
def closed_gate(engine: LtuEngine) -> Iterator[Gate]:
    """Put a closed gate into an engine; it is opened and removed in the end."""
    gate = Gate(engine.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "run", gate.run)
        try:
            yield gate
        finally:
            gate.is_open.set()


# --- processes

# A new interpreter takes 6 seconds of CPU time to import these. Python's fork server imports them
# once for all tests.
PRELOADED = ["ltu.finetune", "ltu.inference_batch", "ltu_as.extract_whisper_feature", "tests.tiny"]


def start_command(
    module: str,
    words: list[str],
    output: Path,
    kill_at: tuple[str, int] | None = None,
    **environment: str,
) -> BaseProcess:
    """Run `python -m MODULE WORDS...` in a process that has torch and transformers already.

    Args:
        output: a file to which stdout and stderr are appended.
        kill_at: with ("fsync", 3) the process kills itself, as kill -9 does, in its third call of
            `os.fsync`. So the moment does not depend on the speed of the machine.
        environment: variables on top of those of the tests.

    Returns:
        The process; after `join`, `exitcode` is its exit status.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    arguments = (module, words, output, kill_at, environment)
    # A daemon is ended with the tests, and so cannot have workers of its own.
    process = context.Process(target=_run_command, args=arguments, daemon=True)
    process.start()
    return process


def start_ranks(
    count: int,
    module: str,
    words: list[str],
    output: Path,
    kill_last_at: tuple[str, int] | None = None,
    **environment: str,
) -> list[BaseProcess]:
    """Run a command on several ranks of one job, with the environment that torchrun gives them.

    Args:
        output: stdout and stderr of a rank are appended to the file `OUTPUT.RANK`.
        kill_last_at: `kill_at` of the last rank.
        environment: variables on top of those of the tests.
    """
    # As in torchrun, the launcher holds the store at which ranks meet: no other process can take
    # the port before rank 0 listens.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "true",
        **environment,
    }
    ranks = []
    for number in range(count):
        own = {"RANK": str(number), "LOCAL_RANK": str(number)}
        kill_at = kill_last_at if number == count - 1 else None
        rank = start_command(module, words, Path(f"{output}.{number}"), kill_at, **shared, **own)
        rank.store = store  # It lives as long as the ranks.
        ranks.append(rank)
    return ranks


def _run_command(
    module: str,
    words: list[str],
    output: Path,
    kill_at: tuple[str, int] | None,
    environment: dict[str, str],
) -> None:
    """Run the command in a forked process."""
    os.environ.update(environment)
    tempfile.tempdir = None  # It may have been looked up before TMPDIR was there.
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    torch.set_num_threads(1)
    if kill_at is not None:
        name, calls = kill_at
        setattr(os, name, _killing(getattr(os, name), calls))
    sys.argv = [module, *words]
    sys.modules.pop(module, None)  # runpy warns of a module that was imported before.
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _killing(function: Callable, calls: int) -> Callable:
    """Wrap a function so that it kills its process in place of that call."""
    done = 0

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return count
