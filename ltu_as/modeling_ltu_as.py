"""Defines the model of LTU-AS, which differs from that of LTU only in its audio encoder."""

from ltu.models.modeling_ltu import LtuForConditionalGeneration, register_model
from ltu_as.configuration_ltu_as import LtuAsConfig


class LtuAsForConditionalGeneration(LtuForConditionalGeneration):
    """`LtuForConditionalGeneration` with TLTR as audio encoder.

    Its `input_features` are layers of Whisper's encoder: (clips, layers, time, width).
    """

    config_class = LtuAsConfig


register_model(LtuAsConfig, LtuAsForConditionalGeneration)
