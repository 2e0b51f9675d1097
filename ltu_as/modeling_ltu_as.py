"""LTU-AS is LTU with another ear and a transcript in the prompt: nothing of the model is new but the ear."""

from transformers import AutoModel, AutoModelForCausalLM

from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu_as.configuration_ltu_as import LtuAsConfig


class LtuAsForConditionalGeneration(LtuForConditionalGeneration):
    """`LtuForConditionalGeneration` whose `input_features` are layers of Whisper: (clips, layers, time, width)."""

    config_class = LtuAsConfig


AutoModel.register(LtuAsConfig, LtuAsForConditionalGeneration)
AutoModelForCausalLM.register(LtuAsConfig, LtuAsForConditionalGeneration)
