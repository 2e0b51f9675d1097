"""What training and asking cost at the papers' size on one GPU: memory, samples per second, hours per stage.

    python -m benchmarks.cost --output_path benchmarks/results/cost_h100.json
    python -m benchmarks.cost --size tiny --device cpu            a quick look at the program itself

Notable:
- whole models with random weights (speed and memory do not depend on them) and random inputs: every row has a clip and
  fills the text cut-off, so real rows, which are shorter, cost less;
- the language model is frozen in bf16, what is trained is fp32, under autocast, as in `ltu.finetune`; a batch of 256 is
  256 / micro-batch passes and one AdamW step, and both are timed; loading and decoding of clips are not;
- hours follow from the rows of the papers' stages and the measured rate: one GPU, derived;
- asking: five questions on each of 16 clips (one by one: of two), 64 new tokens each, one by one and 16 at a time.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.train_step import LORA
from ltu import CavMaeConfig, LtuConfig, LtuForConditionalGeneration
from ltu_as import LtuAsConfig, LtuAsForConditionalGeneration, TltrConfig

LLMS = {
    "tiny": dict(hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4),
    "7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
    "13b": dict(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
}
BATCH = 256
# (stage script, what it trains, text cut-off, rows x epochs), as in the scripts and the README.
STAGES = {
    "ltu": [
        ("stage1_proj_cla", "proj", 108, 2 * 1_190_489),
        ("stage2_all_cla", "all", 108, 2 * 1_190_489),
        ("stage3_all_close", "all", 108, 1_917_894),
        ("stage4_all_mix", "all", 108, 5_681_708),
    ],
    "ltu_as": [
        ("stage1_proj_cla", "proj", 108, 2 * 2_072_481),
        ("stage2_all_cla", "all", 108, 2 * 2_072_481),
        ("stage3_all_mix_v2", "all", 160, 2 * 9_397_025),
    ],
}


def make_model(kind: str, size: str, trains: str, device: torch.device) -> torch.nn.Module:
    """A model of random weights as `ltu.finetune` holds it: LLM in bf16, the rest in fp32; LoRA where it is trained."""
    torch.manual_seed(0)
    lora = None if trains == "proj" else LORA
    text_config = LlamaConfig(**LLMS[size], dtype=torch.bfloat16)
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(text_config, dtype=torch.bfloat16)
        if kind == "ltu":
            config = LtuConfig(audio_config=CavMaeConfig(), text_config=text_config, lora=lora)
        else:
            config = LtuAsConfig(audio_config=TltrConfig(), text_config=text_config, lora=lora)
        model = {"ltu": LtuForConditionalGeneration, "ltu_as": LtuAsForConditionalGeneration}[kind](
            config, llm
        )
    wrong = {
        p.dtype
        for n, p in model.named_parameters()
        if ".lora_" in n or not n.startswith("language_model.")
    }
    assert wrong == {torch.float32}, wrong
    model.set_attn_implementation("sdpa")  # As a loaded model has it.
    return model


def make_inputs(model: torch.nn.Module, batch: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """Random clips and full rows of text, with loss on all text."""
    config, device = model.config, model.get_input_embeddings().weight.device
    audio_encoder = config.audio_config
    if hasattr(audio_encoder, "num_whisper_layers"):
        shape = (
            audio_encoder.num_whisper_layers,
            audio_encoder.num_audio_tokens,
            audio_encoder.hidden_size,
        )
    else:
        shape = (audio_encoder.num_frames, audio_encoder.num_mel_bins)
    text = torch.randint(3, config.text_config.vocab_size, (batch, text_tokens), device=device)
    audio = text.new_full((batch, config.num_audio_tokens), config.audio_token_id)
    ids = torch.cat([audio, text], 1)
    labels = torch.cat([torch.full_like(audio, -100), text], 1)
    features = torch.randn(batch, *shape, device=device)
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), input_features=features, labels=labels
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(
    model: torch.nn.Module,
    plan: str,
    micro_batch: int,
    text_tokens: int,
    checkpointing: bool,
    passes: int,
):
    """Seconds of a pass and of an optimizer step (medians), and the peak of allocated memory in GiB."""
    device = model.get_input_embeddings().weight.device
    model.train()
    model.set_trainable(plan)
    model.gradient_checkpointing_enable() if checkpointing else model.gradient_checkpointing_disable()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0
    )
    inputs = make_inputs(model, micro_batch, text_tokens)
    keep = torch.arange(
        model.config.num_audio_tokens - 1, inputs["input_ids"].shape[1], device=device
    )
    inputs = inputs | {
        "labels": inputs["labels"][:, keep],
        "logits_to_keep": keep,
        "use_cache": False,
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: dict[str, list[float]] = {"pass": [], "step": []}

    def timed(name: str, run) -> None:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times[name].append(time.perf_counter() - start)

    def forward_backward() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()

    def step() -> None:
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # The first of each warms up: kernels are chosen, AdamW's moments are made.
        for _ in range(passes // 2 + 1):
            timed("pass", forward_backward)
        timed("step", step)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return statistics.median(times["pass"][1:]), times["step"][-1], peak


def training_rows(
    kind: str, size: str, trains: str, model: torch.nn.Module, args: argparse.Namespace
) -> list[dict]:
    """One row for each plan, cut-off, micro-batch and way of keeping activations."""
    rows = []
    settings = sorted({(plan, cutoff) for _, plan, cutoff, _ in STAGES[kind] if plan == trains})
    for plan, cutoff in settings:
        for micro_batch in args.micro_batches:
            for checkpointing in (False, True):
                row = dict(
                    kind=kind, llm=size, trains=plan, text_tokens=cutoff, micro_batch=micro_batch
                )
                row["gradient_checkpointing"] = checkpointing
                try:
                    in_pass, in_step, peak = train(
                        model, plan, micro_batch, cutoff, checkpointing, args.passes
                    )
                except torch.OutOfMemoryError:
                    row["out_of_memory"] = True
                else:
                    rate = BATCH / (in_pass * BATCH / micro_batch + in_step)
                    row |= dict(
                        pass_seconds=in_pass,
                        step_seconds=in_step,
                        peak_gib=peak,
                        samples_per_second=rate,
                    )
                    done = [s for s in STAGES[kind] if s[1:3] == (plan, cutoff)]
                    row["derived_hours"] = {name: count / rate / 3600 for name, _, _, count in done}
                model.zero_grad(set_to_none=True)
                gc.collect()
                if args.device.type == "cuda":
                    torch.cuda.empty_cache()
                print(json.dumps(row), flush=True)
                rows.append(row)
    return rows


def ask(
    model: torch.nn.Module,
    batch: int,
    clips: int,
    questions: int,
    prompt_tokens: int,
    new_tokens: int,
) -> dict:
    """Questions per second; at `batch` 1 every question encodes its clip again."""
    device = model.get_input_embeddings().weight.device
    model.eval()
    model.gradient_checkpointing_disable()
    inputs = make_inputs(model, 1, prompt_tokens)
    features = inputs["input_features"]
    options = dict(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )

    def run(count: int) -> None:
        for start in range(0, count, batch):
            number = min(batch, count - start)
            ids, mask = (
                inputs[name].expand(number, -1) for name in ("input_ids", "attention_mask")
            )
            owners = [(start + row) // questions for row in range(number)]
            index = torch.tensor([owner - owners[0] for owner in owners], device=device)
            heard = features.expand(owners[-1] - owners[0] + 1, *features.shape[1:])
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                input_features=heard,
                audio_index=index,
                **options,
            )

    run(batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    start, count = time.perf_counter(), clips * questions
    run(count)
    synchronize(device)
    rate = count / (time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return dict(
        batch=batch,
        questions=count,
        new_tokens=new_tokens,
        questions_per_second=rate,
        peak_gib=peak,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=list(LLMS), default=["7b"])
    parser.add_argument("--kind", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--micro_batches", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--passes", type=int, default=6, help="timed passes of each setting")
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    parser.add_argument(
        "--trains",
        nargs="+",
        choices=("proj", "all"),
        default=["proj", "all"],
        help="asking goes with all",
    )
    parser.add_argument("--output_path", type=Path)
    args = parser.parse_args()
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu"
    report = {
        "device": device,
        "torch": torch.__version__,
        "batch": BATCH,
        "training": [],
        "asking": [],
    }
    for size, kind, trains in itertools.product(args.size, args.kind, args.trains):
        model = make_model(kind, size, trains, args.device)
        report["training"] += training_rows(kind, size, trains, model, args)
        for batch in [1, 16] if trains == "all" else []:
            row = dict(kind=kind, llm=size) | ask(model, batch, 16 if batch > 1 else 2, 5, 40, 64)
            print(json.dumps(row), flush=True)
            report["asking"].append(row)
        del model
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
        if args.output_path:  # After each model: a run that is cut off keeps what it measured.
            args.output_path.parent.mkdir(parents=True, exist_ok=True)
            args.output_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
