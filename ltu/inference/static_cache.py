"""Decides where generation uses a static cache, and bounds the shapes that are compiled for it.

With a static cache, transformers compiles the decoding step on CUDA and replays it as one CUDA
graph, so the host launches it at once instead of kernel by kernel. The shapes of the step are the
number of rows and the length of the cache; the prompt is not part of it. Both are rounded up, so
that a run compiles a few shapes and not one for each batch. Positions that are not used are masked
and weigh exactly zero, so answers do not change but for the order in which numbers are added.
"""

from concurrent.futures import ThreadPoolExecutor

from transformers import PreTrainedModel

from ltu.models.device_check import check_compile
from ltu.models.version_check import check_static_cache

CHOICES = ("auto", "on", "off")

# Batches from which "auto" uses a static cache. On an H100 with a 7B model in bf16, a batch of 16
# or 64 answers of 64 tokens takes 1.9 or 2.4 s less with it, and compiling takes 34 to 51 s, at
# most twice in a run (`benchmarks/static_cache.py`). So 54 batches earn it at worst.
MIN_BATCHES = 64
# Length of the shortest cache, in tokens.
MIN_LENGTH = 128

# The thread in which all engines of the process generate with static caches; it starts with its
# first task. CUDA graphs belong to the thread that recorded them: torch 2.11 fails on them in
# another one, and torch 2.14 records them again for each. torch 2.11 also crashes where a second
# thread compiles after the first has ended.
COMPILING_THREAD = ThreadPoolExecutor(1, "static cache")


def find_obstacle(model: PreTrainedModel) -> str | None:
    """Return why a model cannot generate with a static cache, or None.

    Args:
        model: a model of LTU on its device.
    """
    language_model = model.language_model
    # The attribute says for which models transformers tests compiled generation.
    if not language_model._can_compile_fullgraph:
        return f"transformers cannot compile {type(language_model).__name__}"
    if getattr(language_model, "is_quantized", False):
        return "its weights are quantized, which was not tested with it"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "its layers are on several devices"
    # What a language model without support raises depends on its code.
    try:
        check_static_cache(model)
        if model.device.type == "cuda":
            check_compile(model.device)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    return None


def count_rows(batch_size: int) -> int:
    """Return the number of rows of each batch of a run: the next power of two."""
    return 1 << (batch_size - 1).bit_length()


def choose_length(num_tokens: int) -> int:
    """Return the length of the cache of a batch; there are two lengths for each doubling.

    Args:
        num_tokens: of the padded prompt and the longest possible answer.
    """
    length = MIN_LENGTH
    while length < num_tokens:
        if length * 3 // 2 >= num_tokens:
            return length * 3 // 2
        length *= 2
    return length
