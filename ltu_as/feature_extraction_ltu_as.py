"""A waveform to what LTU-AS hears, by stock openai-whisper: the layers of its encoder, and its transcript.

Notable:
- The log-mel is that of the whole clip, whose loudest part sets the floor, and only then cut, or filled with zeros, to
  1000 frames (10 s). A layer is what a block gives, without `ln_post`; what goes into the first block is none.
- Each layer is averaged over time on the device as soon as it is there. The blocks are called from here: hooks would
  hang on a model that other threads, and the transcript, use as well.
- `feature_precision` is what the encoder computes in and the type of the result, with one exception: on a CPU, where
  half precision takes five times as long, "fp16" is computed in fp32 and rounded at the end. `describe` says so.
- Weights are loaded at first use and kept by this module, so that an extractor stays a few numbers.
"""

import hashlib
import os
import pickle
import re
import threading
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from transformers import BatchFeature
from whisper.audio import N_FRAMES, N_SAMPLES, log_mel_spectrogram, pad_or_trim

from ltu.data.audio import SAMPLING_RATE
from ltu.models.feature_extraction_ltu import ChunkedFeatureExtractor
from ltu_as.configuration_ltu_as import WHISPER_SIZES

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
GPU_BATCH = 32  # chunks: a clip may have hundreds
CPU_BATCH = (
    2  # clips: gains nothing on a CPU by size, and loses where tensors outgrow what malloc keeps
)
TEXT_MODELS = {
    "large-v1": "large-v2"
}  # The papers' pair: what reads the words beside the model of the features.
SEED = 0  # of Whisper's sampling, which it falls back to where greedy decoding fails
_decoding = (
    threading.Lock()
)  # Whisper hangs the cache of its decoder on the model, so one at a time.


@lru_cache(maxsize=4)
def load_whisper(name: str, device: str, in_half: bool) -> tuple[whisper.Whisper, str]:
    """A model by its official name or the path of its `.pt`, and the fingerprint of its encoder.

    Args:
        in_half: keep matrices in half precision, to which Whisper would cast them at each call.

    Raises:
        FileNotFoundError: no such file, or a model that is neither here nor can be downloaded.
        ValueError: the file is no checkpoint of openai-whisper.
    """
    ways_out = (
        "Give the path of an openai-whisper .pt file, or a name of whisper.available_models() on a machine with network"
        " (it is kept in ~/.cache/whisper). python -m train_scripts.fetch_parts makes a small one."
    )
    if name not in whisper.available_models() and not os.path.isfile(name):
        raise FileNotFoundError(f"Whisper {name!r} is no file and no name of a model. {ways_out}")
    try:
        with torch.random.fork_rng(
            []
        ):  # Weights are drawn before they are read; a run must not see the difference.
            model = whisper.load_model(name, device=device).eval().requires_grad_(False)
    except OSError as error:
        raise FileNotFoundError(
            f"Whisper {name!r} cannot be read or downloaded ({error}). {ways_out}"
        ) from error
    except (KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{name} is no checkpoint of openai-whisper ({error!r}). {ways_out}"
        ) from error
    digest = hashlib.sha256()
    for key, parameter in sorted(model.encoder.named_parameters()):
        if parameter.ndim == 1:
            digest.update(key.encode() + parameter.float().cpu().numpy().tobytes())
    for module in model.modules():
        if in_half and isinstance(module, torch.nn.Linear | torch.nn.Conv1d):
            module.half()
    return model, digest.hexdigest()


# Whisper learned from the subtitles of videos and writes this for silence. In three casings, no others.
HALLUCINATED_OUTRO = re.compile(
    "|".join(
        change_case(f"{thanks} for watching") + "[.!]?"
        for thanks in ("Thanks", "Thank you")
        for change_case in (str, str.lower, str.upper)
    )
)


def clean_transcript(text: str) -> str:
    """Remove hallucinated outros, and white space at both ends, from a transcript of Whisper."""
    return HALLUCINATED_OUTRO.sub("", text).strip()


class _FirstChunkKnown:
    """A Whisper whose first chunk is decoded already; all else, and every rule, is the stock one's."""

    def __init__(self, model: whisper.Whisper, result: whisper.DecodingResult | None):
        self._model, self._result = model, result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def decode(self, mel: torch.Tensor, options: whisper.DecodingOptions) -> whisper.DecodingResult:
        result, self._result = self._result, None
        return result or self._model.decode(mel, options)


class LtuAsFeatureExtractor(ChunkedFeatureExtractor):
    """Whisper as an ear: `(clips, layers, 25, width)` and transcripts.

    Args:
        num_layers, hidden_size: of Whisper's encoder; None takes them from the model.
        whisper_model: an official name, or the path of an openai-whisper `.pt`.
        transcription_model: the model that writes the transcripts; None for the same one.
        feature_precision: "fp16" ("new GPU" of the original) or "fp32" ("old GPU").
        whisper_fingerprint: of the encoder that the ear was trained with (`describe`); another one is an error.
        num_frames: of 10 ms that are heard.
        time_pooling: positions of 20 ms that are averaged into one.
        language: of the speech, such as "en"; None lets Whisper find out.
    """

    def __init__(
        self,
        num_layers: int | None = 32,
        hidden_size: int | None = 1280,
        whisper_model: str = "large-v1",
        transcription_model: str | None = "large-v2",
        feature_precision: str = "fp16",
        whisper_fingerprint: str | None = None,
        num_frames: int = 1000,
        time_pooling: int = 20,
        sampling_rate: int = SAMPLING_RATE,
        num_mel_bins: int = 80,
        padding_value: float = 0.0,
        language: str | None = None,
        **kwargs,
    ):
        super().__init__(num_mel_bins, num_frames, sampling_rate, padding_value, **kwargs)
        if feature_precision not in DTYPES:
            raise ValueError(f"feature_precision is fp16 or fp32, not {feature_precision!r}.")
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.whisper_model = whisper_model
        self.transcription_model = transcription_model
        self.feature_precision = feature_precision
        self.whisper_fingerprint = whisper_fingerprint
        self.time_pooling = time_pooling
        self.language = language
        self._device: str | None = None

    @classmethod
    def shape_of(cls, whisper_model: str) -> tuple[int, int]:
        """(layers, width) of a model's features; loads it if it is a file.

        Raises:
            FileNotFoundError: neither a file nor the name of an official model.
        """
        if whisper_model in whisper.available_models():
            return WHISPER_SIZES[whisper_model.split(".")[0].split("-")[0]]
        layers, _, width = cls(None, None, whisper_model, feature_precision="fp32").describe()[
            "shape"
        ]
        return layers, width

    @property
    def device(self) -> torch.device:
        """Where Whisper runs: a GPU of CUDA if there is one, else the CPU. Can be set; is not saved."""
        if self._device is not None:
            return torch.device(self._device)
        if not torch.cuda.is_available() or torch.utils.data.get_worker_info() is not None:
            return torch.device("cpu")  # A forked worker of a data loader cannot use CUDA.
        return torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        )

    @device.setter
    def device(self, device: str | torch.device | None) -> None:
        self._device = "cpu" if str(device).startswith("mps") else device and str(device)

    @property
    def num_tokens(self) -> int:
        """Time steps of a feature; the encoder has a position for two frames."""
        return self.num_frames // 2 // self.time_pooling

    def to_dict(self) -> dict[str, Any]:
        """As the stock method, without the device."""
        return {name: value for name, value in super().to_dict().items() if name != "_device"}

    def _load(self, name: str) -> tuple[whisper.Whisper, str]:
        return load_whisper(
            name, str(self.device), self.device.type == "cuda" and self.feature_precision == "fp16"
        )

    def load_encoder(self) -> tuple[whisper.Whisper, str]:
        """The model of the features and its fingerprint.

        Raises:
            FileNotFoundError: its weights are not there.
            ValueError: it is another one than this extractor was made for.
        """
        model, fingerprint = self._load(self.whisper_model)
        sizes = model.dims.n_audio_layer, model.dims.n_audio_state
        wanted = self.num_layers or sizes[0], self.hidden_size or sizes[1]
        if sizes != wanted:
            raise ValueError(
                f"Whisper {self.whisper_model} has {sizes[0]} layers of width {sizes[1]}, but {wanted[0]} layers of "
                f"width {wanted[1]} are needed. Give the Whisper that the checkpoint was trained with."
            )
        if self.whisper_fingerprint not in (None, fingerprint):
            raise ValueError(
                f"Whisper {self.whisper_model} has fingerprint {fingerprint[:12]}, but the checkpoint was trained with "
                f"{self.whisper_fingerprint[:12]}: another model of the same size. Give that one."
            )
        self.whisper_fingerprint = fingerprint
        self.num_layers, self.hidden_size = sizes
        self.num_mel_bins = self.feature_size = model.dims.n_mels
        return model, fingerprint

    def describe(self) -> dict[str, Any]:
        """What a feature store keeps, to refuse features of another kind. Loads the model.

        `computed_in` is there only where it differs from `feature_precision`.
        """
        _, fingerprint = self.load_encoder()
        description = {
            "whisper_model": os.path.basename(self.whisper_model),
            "fingerprint": fingerprint,
            "feature_precision": self.feature_precision,
            "shape": [self.num_layers, self.num_tokens, self.hidden_size],
            "transcription_model": os.path.basename(self.transcription_model or self.whisper_model),
            "language": self.language,
        }
        rounded = self.device.type == "cpu" and self.feature_precision == "fp16"
        return description | ({"computed_in": "fp32"} if rounded else {})

    @torch.no_grad()
    def __call__(
        self,
        raw_speech: np.ndarray | list[np.ndarray],
        *args,
        return_tensors: str | None = "pt",
        **kwargs,
    ):
        """One batch; arguments as for `ltu.LtuFeatureExtractor`.

        Returns:
            `input_features`, `(clips, layers, 25, width)` on the CPU, in `feature_precision`.
        """
        encoder = self.load_encoder()[0].encoder
        mels = (
            super().__call__(raw_speech, *args, **kwargs).input_features.to(self.device)
        )  # (clips, mels, frames)
        is_cpu = self.device.type == "cpu"
        mels = mels if is_cpu else mels.to(DTYPES[self.feature_precision])
        with torch.backends.cudnn.flags(
            allow_tf32=False
        ):  # Else "fp32" convolutions of a new GPU have 10 bits.
            parts = [
                self._layers(encoder, part)
                for part in mels.split(CPU_BATCH if is_cpu else GPU_BATCH)
            ]
        features = torch.cat(parts).to("cpu", DTYPES[self.feature_precision])
        return BatchFeature({"input_features": features.numpy()}, tensor_type=return_tensors)

    def _layers(self, encoder: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`(clips, mels, frames)` → `(clips, layers, 25, width)`"""
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(x)))).transpose(
            1, 2
        )  # (clips, positions, width)
        x = (x + encoder.positional_embedding[: x.shape[1]]).to(x.dtype)
        layers = []
        for block in encoder.blocks:
            x = block(x)
            layers.append(
                x.unflatten(1, (self.num_tokens, self.time_pooling)).mean(2)
            )  # (clips, 25, width)
        return torch.stack(layers, 1)

    def extract_features(self, waveform: torch.Tensor) -> torch.Tensor:
        """`(samples,)` → `(num_mel_bins, num_frames)`"""
        return self.extract_chunks(waveform, 1)[0]

    def extract_chunks(self, waveform: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """`(samples,)` → `(chunks, num_mel_bins, num_frames)`, cut from the log-mel of the whole clip."""
        mel = log_mel_spectrogram(waveform, self.num_mel_bins, device=self.device).cpu()
        return (
            pad_or_trim(mel, num_chunks * self.num_frames)
            .unflatten(1, (num_chunks, -1))
            .transpose(0, 1)
        )

    @torch.no_grad()
    def transcribe(self, waveforms: list[np.ndarray], batched: bool | None = None) -> list[str]:
        """What is said in each clip, all of it; "" where Whisper hears no speech.

        As `whisper.transcribe` without the text of the chunk before, its sampling seeded. On a GPU (`batched` None),
        the first chunk of all clips is decoded at once; on a CPU a batch only waits for its longest text.
        """
        model, _ = self._load(self.transcription_model or self.whisper_model)
        fp16 = model.device.type == "cuda"
        clips = [
            torch.as_tensor(clip, dtype=torch.float32, device=model.device) for clip in waveforms
        ]
        texts = []
        with _decoding, torch.random.fork_rng([model.device] if fp16 else []):
            is_batched = bool(clips) and (fp16 if batched is None else batched)
            windows = self._first_chunks(model, clips, fp16) if is_batched else [None] * len(clips)
            for clip, window in zip(clips, windows, strict=True):
                torch.manual_seed(SEED)
                options = {"fp16": fp16, "language": window.language if window else self.language}
                found = whisper.transcribe(
                    _FirstChunkKnown(model, window),
                    clip,
                    condition_on_previous_text=False,
                    **options,
                )
                texts.append(clean_transcript(found["text"]))
        return texts

    def _first_chunks(self, model: whisper.Whisper, clips: list[torch.Tensor], fp16: bool) -> list:
        """The greedy decoding of each clip's first 30 s, as `whisper.transcribe` begins."""
        mels = [log_mel_spectrogram(clip, model.dims.n_mels, padding=N_SAMPLES) for clip in clips]
        languages = [self.language or "en"] * len(clips)
        if model.is_multilingual and self.language is None:
            # Whisper finds the language in a clip that silence follows, but decodes one that zeros follow.
            heard = torch.stack([pad_or_trim(mel, N_FRAMES) for mel in mels])
            found = model.detect_language(heard.half() if fp16 else heard)[1]
            languages = [max(probabilities, key=probabilities.get) for probabilities in found]
        windows = torch.stack(
            [pad_or_trim(mel[:, :-N_FRAMES], N_FRAMES) for mel in mels]
        )  # (clips, mels, 3000)
        results = {}
        for language in sorted(set(languages)):
            rows = [row for row, found in enumerate(languages) if found == language]
            decoded = model.decode(
                windows[rows], whisper.DecodingOptions(language=language, fp16=fp16)
            )
            results |= dict(zip(rows, decoded, strict=True))
        return [results[row] for row in range(len(clips))]
