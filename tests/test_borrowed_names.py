"""Lists the names of other libraries that no interface guarantees, and tests that they exist.

A release may rename or drop such a name. Then the test names it, the file that uses it, and a
replacement. The list is complete: the tests search the code for private names, for imports from
inside a library, and for private members of library classes that ours replace.
"""

import ast
import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import ltu
import ltu_as

ROOT = Path(__file__).parents[1]
FOLDERS = ("ltu", "ltu_as", "eval", "data", "qa_generation", "train_scripts", "benchmarks")
LIBRARIES = (
    "accelerate fastapi gradio huggingface_hub jiwer msgspec openai peft pyarrow pycocoevalcap "
    "safetensors soundfile starlette tokenizers torchaudio transformers uvicorn whisper"
).split()
# Modules inside a library whose documentation describes them as the place to import from.
DOCUMENTED_MODULES = (
    "accelerate.utils fastapi.responses fastapi.security huggingface_hub.errors pyarrow.ipc "
    "pyarrow.parquet safetensors.numpy "
    "safetensors.torch starlette.exceptions starlette.middleware starlette.requests "
    "torchaudio.compliance torchaudio.functional transformers.generation "
    "transformers.modeling_outputs transformers.utils"
).split()
OPTIONAL = ("pycocoevalcap",)  # An extra, which the oldest environment of the tests leaves out.


@dataclass(frozen=True)
class BorrowedName:
    """A name that a library may change without notice.

    Args:
        name: "module:attribute".
        used_in: the file that uses it.
        replacement: a substitute if the name no longer exists.
    """

    name: str
    used_in: str
    replacement: str


BORROWED_NAMES = [
    # The model
    BorrowedName(
        "transformers:PreTrainedModel.init_weights",
        "ltu/models/modeling_ltu.py",
        "the method that post_init calls to initialise weights; ours does nothing",
    ),
    BorrowedName(
        "transformers:PreTrainedModel._init_weights",
        "ltu/models/modeling_cavmae.py ltu/models/modeling_yamnet.py",
        "the hook of transformers' guide to custom models",
    ),
    *(
        BorrowedName(
            f"transformers:PreTrainedModel.{name}",
            "ltu/models/modeling_ltu.py ltu/models/modeling_cavmae.py "
            "ltu/models/modeling_yamnet.py ltu_as/modeling_tltr.py",
            "the attribute of transformers' guide to custom models that replaces it",
        )
        for name in ("_supports_sdpa", "_supports_flash_attn", "_no_split_modules")
    ),
    *(
        BorrowedName(
            f"transformers:PreTrainedModel.{name}",
            "ltu/models/modeling_audio_encoder_wrapper.py",
            "the attribute of transformers' guide to custom models that replaces it",
        )
        for name in ("_supports_sdpa", "_supports_flash_attn")
    ),
    BorrowedName(
        "transformers:PreTrainedModel._upload_modified_files",
        "ltu/models/modeling_ltu.py ltu/models/custom_code.py",
        "upload_folder of huggingface_hub, with the model card of the checkpoint folder",
    ),
    BorrowedName(
        "transformers:PreTrainedConfig._attn_implementation",
        "ltu/models/modeling_ltu.py",
        "the argument attn_implementation of from_config, for each part",
    ),
    BorrowedName(
        "transformers.cache_utils:DynamicLayer",
        "ltu/inference/row_cache.py",
        "the class of a layer of DynamicCache() that holds keys and values of all tokens",
    ),
    BorrowedName(
        "transformers:PreTrainedModel._can_compile_fullgraph",
        "ltu/inference/static_cache.py",
        "the comparison of check_static_cache alone",
    ),
    BorrowedName(
        "transformers:GenerationMixin.prepare_inputs_for_generation",
        "ltu/models/generation_ltu.py",
        "the method of transformers that makes the arguments of a step of generate",
    ),
    BorrowedName(
        "transformers.initialization:trunc_normal_",
        "ltu/models/modeling_cavmae.py ltu/models/modeling_yamnet.py",
        "torch.nn.init, for parameters that were not loaded",
    ),
    BorrowedName(
        "peft.utils:TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "ltu/models/lora.py",
        "LoraConfig without target_modules, which peft fills in",
    ),
    # Training
    *(
        BorrowedName(f"transformers:Trainer.{name}", "ltu/training/trainer.py", replacement)
        for name, replacement in (
            ("_get_grad_norm", "the callback on_pre_optimizer_step, with a norm of our own"),
            ("_save_checkpoint", "the callback on_save, after old checkpoints were deleted"),
        )
    ),
    BorrowedName(
        "transformers.integrations:get_available_reporting_integrations",
        "ltu/training/arguments.py",
        "the RuntimeError of the Trainer's constructor",
    ),
    BorrowedName(
        "transformers:PreTrainedModel._no_split_modules",
        "ltu/training/memory_estimate.py",
        "the class of the largest repeated block of the model",
    ),
    BorrowedName(
        "torch._subclasses.fake_tensor:FakeTensorMode",
        "ltu/training/memory_estimate.py",
        "torch.device('meta') without autocast, with the dtypes of autocast written out",
    ),
    BorrowedName(
        "torch._subclasses.fake_tensor:DataDependentOutputException",
        "ltu/training/memory_estimate.py",
        "RuntimeError",
    ),
    BorrowedName(
        "torch._subclasses.fake_tensor:DynamicOutputShapeException",
        "ltu/training/memory_estimate.py",
        "RuntimeError",
    ),
    BorrowedName(
        "torch:ops.aten._local_scalar_dense",
        "ltu/training/memory_estimate.py",
        "DataDependentOutputException, which ends the estimate on transformers 5.17",
    ),
    BorrowedName(
        "torch.utils._python_dispatch:TorchDispatchMode",
        "ltu/training/memory_estimate.py",
        "torch.distributed._tools.mem_tracker, once it takes frozen parameters",
    ),
    BorrowedName(
        "torch.utils._pytree:tree_leaves",
        "ltu/training/memory_estimate.py",
        "a loop over the tuples and lists that operations return",
    ),
    BorrowedName(
        "transformers.trainer_utils:rotate_checkpoints",
        "ltu/training/trainer.py",
        "shutil.rmtree of all checkpoints but the newest and the best",
    ),
    BorrowedName(
        "transformers.integrations:apply_liger_kernel",
        "ltu/training/model_setup.py",
        "liger_kernel.transformers.apply_liger_kernel_to_llama and its siblings",
    ),
    *(
        BorrowedName(
            f"torch{name}",
            "ltu/training/compiled_layers.py",
            "the argument recompile_limit that torch.compile of newer releases has",
        )
        for name in (":_dynamo", "._dynamo.config:recompile_limit")
    ),
    BorrowedName(
        "torch._dynamo.exc:TorchDynamoException",
        "ltu/training/compiled_layers.py",
        "RuntimeError, which errors of the computation are too",
    ),
    BorrowedName(
        "torch.cpu:_is_amx_tile_supported",
        "ltu/models/device_check.py",
        "the flags of /proc/cpuinfo; without it, auto chooses fp32",
    ),
    BorrowedName(
        "torch.cpu:_is_avx512_bf16_supported",
        "ltu/models/device_check.py",
        "the flags of /proc/cpuinfo; without it, auto chooses fp32",
    ),
    *(
        BorrowedName(
            f"transformers:Trainer.{name}",
            "ltu/training/sharding.py",
            "save_model and the callbacks on_save and on_train_begin",
        )
        for name in (
            "_save",
            "_save_optimizer_and_scheduler",
            "_load_from_checkpoint",
            "_load_optimizer_and_scheduler",
            "_load_best_model",
        )
    ),
    BorrowedName(
        "transformers:Trainer._load_from_checkpoint",
        "ltu/training/forward_passes.py",
        "the callback on_train_begin, with the folder of the checkpoint",
    ),
    BorrowedName(
        "transformers.loss.loss_utils:ForCausalLMLoss",
        "ltu/training/forward_passes.py",
        "PreTrainedModel.loss_type, by its name",
    ),
    # The server
    *(
        BorrowedName(
            f"uvicorn.protocols.http.h11_impl:H11Protocol{member}",
            "ltu/serving/connection_limits.py",
            "asyncio.start_server with h11, or a reverse proxy that has the limits",
        )
        for member in (
            "",
            ".connection_made",
            ".connection_lost",
            ".data_received",
            ".on_response_complete",
            ".pause_writing",
            ".resume_writing",
        )
    ),
    BorrowedName(
        "uvicorn:Server.startup",
        "ltu/serving/openai_server.py",
        "the event startup of the app, where the sockets do not listen yet",
    ),
    # The page
    BorrowedName(
        "gradio.utils:get_upload_folder",
        "ltu/serving/gradio_security.py",
        "the environment variable GRADIO_TEMP_DIR, which the command sets",
    ),
    BorrowedName(
        "gradio:Blocks.process_api",
        "ltu/serving/gradio_page.py",
        "gr.Error in the functions of the events, for errors of ours alone",
    ),
    # Whisper
    *(
        BorrowedName(
            f"whisper.audio:{name}",
            "ltu_as/feature_extraction_ltu_as.py benchmarks/whisper_features.py",
            "whisper.log_mel_spectrogram and pad_or_trim, which its README names",
        )
        for name in ("N_FRAMES", "N_SAMPLES", "log_mel_spectrogram", "pad_or_trim")
    ),
    *(
        BorrowedName(
            f"whisper.model:{name}", "benchmarks/whisper_features.py benchmarks/train_step.py", "-"
        )
        for name in ("ModelDimensions", "ResidualAttentionBlock", "Whisper", "disable_sdpa")
    ),
    # Evaluation
    BorrowedName(
        "transformers.models.whisper.english_normalizer:EnglishTextNormalizer",
        "eval/speech.py eval/toy_speech.py",
        "whisper.normalizers.EnglishTextNormalizer",
    ),
    BorrowedName(
        "pycocoevalcap.meteor.meteor:Meteor._stat",
        "eval/captions.py",
        "one process of the METEOR jar per trial",
    ),
    *(
        BorrowedName(f"pycocoevalcap.{name}", "eval/captions.py", "aac-metrics")
        for name in (
            "tokenizer.ptbtokenizer:PTBTokenizer",
            "cider.cider:Cider",
            "meteor.meteor:Meteor",
            "rouge.rouge:Rouge",
            "bleu.bleu_scorer:BleuScorer",
            "spice.spice",
        )
    ),
]


def python_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def own_private_names() -> set[str]:
    """Collect the private names that our own code defines."""
    names = {"_exit"}  # os._exit is documented.
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


def is_private(name: str | None) -> bool:
    return bool(name) and name.startswith("_") and not name.startswith("__")


def uses_in_code() -> set[tuple[str, str]]:
    """Find (attribute, file) of each private name and each import from inside a library."""
    own = own_private_names()
    found = set()
    for path in python_files():
        file = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                found.add((node.attr, file))
            elif isinstance(node, ast.keyword) and is_private(node.arg):
                found.add((node.arg, file))
            elif isinstance(node, ast.ImportFrom) and is_inside_library(node.module):
                found |= {(alias.name, file) for alias in node.names}
            elif isinstance(node, ast.Import):
                inside = [alias.name for alias in node.names if is_inside_library(alias.name)]
                found |= {(name, file) for name in inside}
    return found


def is_inside_library(module: str | None) -> bool:
    library, dot, _ = (module or "").partition(".")
    return library in LIBRARIES and bool(dot) and module not in DOCUMENTED_MODULES


def private_overrides() -> set[tuple[str, str]]:
    """Find (member, file) of each private member of a library class that one of ours replaces."""
    found = set()
    for package in (ltu, ltu_as):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                module = importlib.import_module(info.name)
            except (ImportError, SystemExit):  # Its extra is not installed.
                continue
            for _, owner in inspect.getmembers(module, inspect.isclass):
                if owner.__module__ != module.__name__:
                    continue
                library_bases = [
                    base for base in owner.__mro__ if base.__module__.split(".")[0] in LIBRARIES
                ]
                replaced = [
                    name
                    for name in vars(owner)
                    if is_private(name)
                    and name != "_abc_impl"  # Python's own, of each abstract class.
                    and any(name in vars(base) for base in library_bases)
                ]
                file = Path(module.__file__).relative_to(ROOT).as_posix()
                found |= {(name, file) for name in replaced}
    return found


def listed() -> set[tuple[str, str]]:
    return {
        (entry.name.rpartition(":")[2].rpartition(".")[2], file)
        for entry in BORROWED_NAMES
        for file in entry.used_in.split()
    }


@pytest.mark.parametrize("entry", BORROWED_NAMES, ids=lambda entry: entry.name)
def test_each_name_exists(entry: BorrowedName) -> None:
    library = entry.name.split(":")[0].split(".")[0]
    if library in OPTIONAL:
        pytest.importorskip(library)
    try:
        pkgutil.resolve_name(entry.name)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"{error}. It is used in {entry.used_in}; instead: {entry.replacement}")


def test_each_use_is_listed() -> None:
    unlisted = (uses_in_code() | private_overrides()) - listed()
    assert not unlisted, f"add them to BORROWED_NAMES, or use a public name: {sorted(unlisted)}"


def test_each_listed_name_is_used() -> None:
    for entry in BORROWED_NAMES:
        name = entry.name.rpartition(":")[2].rpartition(".")[2]
        texts = [(ROOT / file).read_text(encoding="utf-8") for file in entry.used_in.split()]
        assert any(name in text for text in texts), f"{entry.name}: {entry.used_in} do not use it"
