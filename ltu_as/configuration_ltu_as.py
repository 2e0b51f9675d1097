"""Defines the configs of LTU-AS and of its audio encoder, TLTR."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ltu.models.config_checks import check_sizes, show
from ltu.models.configuration_ltu import LtuConfig

# (Blocks, width) of the encoders of OpenAI's models, by the first part of their names. A `.pt` file
# holds its own sizes.
WHISPER_SIZES = {
    "tiny": (4, 384),
    "base": (6, 512),
    "small": (12, 768),
    "medium": (24, 1024),
    "large": (32, 1280),
    "turbo": (32, 1280),
}


class TltrConfig(PreTrainedConfig):
    """The time-and-layer-wise transformer of Whisper-AT: the audio encoder of LTU-AS.

    Args:
        hidden_size: width of the Whisper encoder.
        num_whisper_layers: blocks of the Whisper encoder, whose outputs are the input of TLTR.
        num_audio_tokens: time steps of a chunk of 10 s.
        num_time_heads, num_layer_heads: attention heads of the transformer over time, and of the
            transformer over layers.
        standardize: scale each channel of each layer to mean 0 and standard deviation 1 first, with
            statistics stored with the weights. `ltu_as.pretrain_tltr` does: a few channels of
            Whisper are large and constant, and would dominate the output. The released TLTRs,
            trained on AudioSet, do not.
        feature_divisor: see `ltu.CavMaeConfig`; TLTR needs none.
    """

    model_type = "tltr"

    def __init__(
        self,
        hidden_size: int = 1280,
        num_whisper_layers: int = 32,
        num_audio_tokens: int = 25,
        num_time_heads: int = 1,
        num_layer_heads: int = 8,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        standardize: bool = False,
        feature_divisor: float = 1.0,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.num_whisper_layers = num_whisper_layers
        self.num_audio_tokens = num_audio_tokens
        self.num_time_heads = num_time_heads
        self.num_layer_heads = num_layer_heads
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.standardize = standardize
        self.feature_divisor = feature_divisor
        check_sizes(self)
        if type(standardize) is not bool:
            raise ValueError(f"standardize is {show(standardize)}; possible: true or false.")
        for name, heads in (
            ("num_time_heads", num_time_heads),
            ("num_layer_heads", num_layer_heads),
        ):
            if hidden_size % heads:
                raise ValueError(
                    f"hidden_size {hidden_size} does not divide by {name} {heads}. Choose a "
                    f"divisor of {hidden_size}."
                )
        super().__init__(**kwargs)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of the features of one clip."""
        return self.num_whisper_layers, self.num_audio_tokens, self.hidden_size

    @property
    def extractor_settings(self) -> dict[str, Any]:
        """Arguments of the feature extractor that follow from the audio encoder."""
        return {"num_layers": self.num_whisper_layers, "hidden_size": self.hidden_size}


class LtuAsConfig(LtuConfig):
    """`LtuConfig` with TLTR as the default audio encoder."""

    model_type = "ltu_as"
    default_audio_model_type = "tltr"

    # Without it, transformers generates an __init__ that does not call LtuConfig's.
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)


AutoConfig.register("tltr", TltrConfig)
AutoConfig.register("ltu_as", LtuAsConfig)
