"""Extracts the encoder layers and the transcript of a waveform with stock openai-whisper.

The log-mel is computed of the whole clip, whose loudest part sets the floor. Only then is it cut,
or padded with zeros, to 1000 frames (10 s). A layer is the output of a block, without `ln_post`.
The input of the first block is not a layer.

Each layer is averaged over time on the device as soon as it is computed. The blocks are called from
this module and not by hooks, because hooks would change a model that other threads and the
transcription use as well.

`feature_precision` is both the precision of the encoder and the dtype of the result, with one
exception: on a CPU, where half precision takes five times as long, "fp16" features are computed in
fp32 and rounded at the end. `describe` reports it.

Weights are loaded at first use and cached by this module, so an extractor holds only its settings.
"""

import hashlib
import os
import pickle
import threading
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from transformers import BatchFeature
from whisper.audio import N_FRAMES, N_SAMPLES, log_mel_spectrogram, pad_or_trim

from ltu.data.audio import SAMPLING_RATE, Downmix
from ltu.data.transcripts import TRANSCRIPT_RULES
from ltu.models.feature_extraction_ltu import SpectrogramFeatureExtractor
from ltu_as.configuration_ltu_as import WHISPER_SIZES

# Whisper gets the mean of a clip's channels, as in the original, which decodes with ffmpeg.
DOWNMIX: Downmix = "mean"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
GPU_BATCH = 32  # Chunks that are encoded at once on a GPU; a clip may have hundreds.
# On a CPU a larger batch is not faster. It is slower once its tensors are too large for malloc to
# reuse their memory.
CPU_BATCH = 2
# The model that transcribes, by the model of the features, where the papers use two.
TEXT_MODELS = {"large-v1": "large-v2"}
SEED = 0  # Of Whisper's sampling, which it uses if greedy decoding fails.
# Whisper stores the cache of its decoder in the model, so one thread may transcribe at a time.
_decoding_lock = threading.Lock()


@lru_cache(maxsize=4)
def load_whisper(name: str, device: str, in_half: bool) -> tuple[whisper.Whisper, str]:
    """Load a Whisper model, and compute the fingerprint of its encoder.

    Args:
        name: the official name of a model, or the path of its `.pt` file.
        device: of the model.
        in_half: convert the matrices to half precision, to which Whisper would cast them at each
            call.

    Raises:
        FileNotFoundError: there is no such file, or the model is neither cached nor can it be
            downloaded.
        ValueError: the file is no checkpoint of openai-whisper.
    """
    hint = (
        "Give the path of an openai-whisper .pt file, or a name of whisper.available_models() on a "
        "machine with network (it is cached in ~/.cache/whisper). "
        "python -m train_scripts.quickstart.download_pretrained makes a small one."
    )
    if name not in whisper.available_models() and not os.path.isfile(name):
        raise FileNotFoundError(f"Whisper {name!r} is no file and no name of a model. {hint}")
    try:
        # Whisper initialises the weights at random before it loads them. That must not change the
        # random numbers of a run.
        with torch.random.fork_rng([]):
            model = whisper.load_model(name, device=device).eval().requires_grad_(False)
    except OSError as error:
        raise FileNotFoundError(
            f"Whisper {name!r} cannot be read or downloaded ({error}). {hint}"
        ) from error
    except (KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{name} is no checkpoint of openai-whisper ({error!r}). {hint}"
        ) from error

    # The fingerprint is a hash of the biases and norms of the encoder.
    digest = hashlib.sha256()
    for key, parameter in sorted(model.encoder.named_parameters()):
        if parameter.ndim == 1:
            digest.update(key.encode() + parameter.float().cpu().numpy().tobytes())
    for module in model.modules():
        if in_half and isinstance(module, torch.nn.Linear | torch.nn.Conv1d):
            module.half()
    return model, digest.hexdigest()


class _FirstChunkDecoded:
    """A Whisper model that returns a given result for its first chunk, and is stock otherwise."""

    def __init__(self, model: whisper.Whisper, result: whisper.DecodingResult | None):
        self._model = model
        self._result = result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def decode(self, mel: torch.Tensor, options: whisper.DecodingOptions) -> whisper.DecodingResult:
        result = self._result
        self._result = None
        return result or self._model.decode(mel, options)


class LtuAsFeatureExtractor(SpectrogramFeatureExtractor):
    """Extracts Whisper features `(clips, layers, time, width)` and transcripts.

    Args:
        num_layers, hidden_size: of Whisper's encoder; None takes them from the model.
        whisper_model: an official name, or the path of an openai-whisper `.pt` file.
        transcription_model: the model that transcribes; None for the same one.
        feature_precision: "fp16" ("new GPU" of the original) or "fp32" ("old GPU").
        whisper_fingerprint: of the Whisper encoder that the checkpoint was trained with, as in
            `describe`; another encoder is an error.
        num_frames: frames of 10 ms in a chunk.
        time_pooling: positions of 20 ms that are averaged into one.
        loop_short_clips: repeat in the features what does not fill a chunk; by default it is padded
            with silence, as in the original. Transcripts are of the clip itself.
        language: of the speech, such as "en"; None lets Whisper detect it.
        transcript_rule: how transcripts are cleaned, a key of `TRANSCRIPT_RULES`: "original" as in
            the data of the released checkpoints.
    """

    downmix = DOWNMIX

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
        transcript_rule: str = "clean",
        loop_short_clips: bool = False,
        **kwargs,
    ):
        super().__init__(num_mel_bins, num_frames, sampling_rate, padding_value, **kwargs)
        if transcript_rule not in TRANSCRIPT_RULES:
            raise ValueError(
                f"transcript_rule is {transcript_rule!r}; possible: {', '.join(TRANSCRIPT_RULES)}."
            )
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
        self.transcript_rule = transcript_rule
        self.loop_short_clips = loop_short_clips
        self._device: str | None = None

    @classmethod
    def shape_of(cls, whisper_model: str) -> tuple[int, int]:
        """Return (layers, width) of a model's features; the model is loaded if it is a file.

        Raises:
            FileNotFoundError: it is neither a file nor the name of an official model.
        """
        if whisper_model in whisper.available_models():
            return WHISPER_SIZES[whisper_model.split(".")[0].split("-")[0]]
        extractor = cls(None, None, whisper_model, feature_precision="fp32")
        layers, _, width = extractor.describe()["shape"]
        return layers, width

    @property
    def device(self) -> torch.device:
        """The device of Whisper: by default a CUDA GPU if there is one, else the CPU.

        It can be set, and is not saved with the extractor.
        """
        if self._device is not None:
            return torch.device(self._device)
        # A forked worker of a data loader cannot use CUDA.
        if not torch.cuda.is_available() or torch.utils.data.get_worker_info() is not None:
            return torch.device("cpu")
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", local_rank % torch.cuda.device_count())

    @device.setter
    def device(self, device: str | torch.device | None) -> None:
        if device is None:
            self._device = None
        elif str(device).startswith("mps"):
            self._device = "cpu"
        else:
            self._device = str(device)

    @property
    def num_tokens(self) -> int:
        """Time steps of the features of a chunk; the encoder has one position per two frames."""
        return self.num_frames // 2 // self.time_pooling

    @num_tokens.setter
    def num_tokens(self, num_tokens: int) -> None:
        """Set `time_pooling` so that a chunk has so many time steps.

        Raises:
            ValueError: the positions of a chunk cannot be divided among them.
        """
        num_positions = self.num_frames // 2
        if num_tokens < 1 or num_positions % num_tokens:
            raise ValueError(
                f"{num_tokens} audio tokens: Whisper has {num_positions} positions in a chunk. "
                "Give a number that divides it."
            )
        self.time_pooling = num_positions // num_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, without the device."""
        return {name: value for name, value in super().to_dict().items() if name != "_device"}

    def _load(self, name: str) -> tuple[whisper.Whisper, str]:
        in_half = self.device.type == "cuda" and self.feature_precision == "fp16"
        return load_whisper(name, str(self.device), in_half)

    def load_encoder(self) -> tuple[whisper.Whisper, str]:
        """Return the model of the features and its fingerprint.

        Sizes and fingerprint that were not known before are set.

        Raises:
            FileNotFoundError: the weights of the model cannot be found.
            ValueError: the model is not the one that this extractor was made for.
        """
        model, fingerprint = self._load(self.whisper_model)
        num_layers = model.dims.n_audio_layer
        width = model.dims.n_audio_state
        expected_layers = self.num_layers or num_layers
        expected_width = self.hidden_size or width
        if (num_layers, width) != (expected_layers, expected_width):
            raise ValueError(
                f"Whisper {self.whisper_model} has {num_layers} layers of width {width}, but "
                f"{expected_layers} layers of width {expected_width} are needed. Give the Whisper "
                "that the checkpoint was trained with."
            )
        if self.whisper_fingerprint not in (None, fingerprint):
            raise ValueError(
                f"Whisper {self.whisper_model} has fingerprint {fingerprint[:12]}, but the "
                f"checkpoint was trained with {self.whisper_fingerprint[:12]}, another model of "
                "the same size. Give the Whisper that the checkpoint was trained with."
            )
        self.whisper_fingerprint = fingerprint
        self.num_layers = num_layers
        self.hidden_size = width
        self.num_mel_bins = self.feature_size = model.dims.n_mels
        return model, fingerprint

    def describe(self) -> dict[str, Any]:
        """Return the description by which a feature store recognises features of another kind.

        The model is loaded for it. The key `computed_in` is set only if the precision of the
        encoder differs from `feature_precision`, and `loop_short_clips` only if it is true.
        """
        _, fingerprint = self.load_encoder()
        description = {
            "whisper_model": os.path.basename(self.whisper_model),
            "fingerprint": fingerprint,
            "feature_precision": self.feature_precision,
            "shape": [self.num_layers, self.num_tokens, self.hidden_size],
            "transcription_model": os.path.basename(self.transcription_model or self.whisper_model),
            "language": self.language,
            "transcript_rule": self.transcript_rule,
            "channels": DOWNMIX,
        }
        if self.device.type == "cpu" and self.feature_precision == "fp16":
            description["computed_in"] = "fp32"
        if self.loop_short_clips:
            description["loop_short_clips"] = True
        return description

    @torch.no_grad()
    def __call__(
        self,
        raw_speech: np.ndarray | list[np.ndarray],
        *args,
        return_tensors: str | None = "pt",
        **kwargs,
    ):
        """Convert one batch of waveforms into features.

        Arguments as for `ltu.LtuFeatureExtractor`.

        Returns:
            `input_features`, `(chunks, layers, time, width)` on the CPU, in `feature_precision`.
        """
        encoder = self.load_encoder()[0].encoder
        mels = super().__call__(raw_speech, *args, **kwargs).input_features
        mels = mels.to(self.device)  # (chunks, mels, frames)
        dtype = DTYPES[self.feature_precision]
        if self.device.type == "cpu":
            batch_size = CPU_BATCH
        else:
            batch_size = GPU_BATCH
            mels = mels.to(dtype)
        # Without cuDNN, whose "fp32" convolutions have the 10 bits of TF32 on a recent GPU.
        with torch.backends.cudnn.flags(enabled=False):
            parts = [self._layers(encoder, part) for part in mels.split(batch_size)]
        features = torch.cat(parts).to("cpu", dtype)
        return BatchFeature({"input_features": features.numpy()}, tensor_type=return_tensors)

    def _layers(self, encoder: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return layers `(chunks, layers, time, width)` of log-mels `(chunks, mels, frames)`."""
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(x))))  # (chunks, width, positions)
        x = x.transpose(1, 2)  # (chunks, positions, width)
        x = (x + encoder.positional_embedding[: x.shape[1]]).to(x.dtype)
        layers = []
        for block in encoder.blocks:
            x = block(x)
            pooled = x.unflatten(1, (self.num_tokens, self.time_pooling)).mean(2)
            layers.append(pooled)  # (chunks, time, width)
        return torch.stack(layers, 1)

    def extract_features(self, waveform: torch.Tensor) -> torch.Tensor:
        """Return the log-mel `(num_mel_bins, num_frames)` of a waveform `(samples,)`."""
        return self.extract_chunks(waveform, 1)[0]

    def extract_chunks(self, waveform: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """Return chunks `(chunks, num_mel_bins, num_frames)` of the log-mel of a whole waveform."""
        missing = num_chunks * self.chunk_step - len(waveform)
        if missing > 0 and self.loop_short_clips:
            # Repeat what is in the last chunk until the chunk is full.
            rest = waveform[(num_chunks - 1) * self.chunk_step :]
            repeated = rest.repeat(-(-missing // len(rest)))[:missing]
            waveform = torch.cat([waveform, repeated])
        mel = log_mel_spectrogram(waveform, self.num_mel_bins, device=self.device).cpu()
        mel = pad_or_trim(mel, num_chunks * self.num_frames)  # (mels, chunks x frames)
        return mel.unflatten(1, (num_chunks, -1)).transpose(0, 1)

    def spectrogram(self, waveform: torch.Tensor) -> torch.Tensor:
        """Return the log-mel `(frames, num_mel_bins)` of a waveform `(samples,)`."""
        return log_mel_spectrogram(waveform, self.num_mel_bins, device=self.device).cpu().T

    @torch.no_grad()
    def transcribe(self, waveforms: list[np.ndarray], batched: bool | None = None) -> list[str]:
        """Transcribe the speech of each whole clip; "" if Whisper finds none.

        This is `whisper.transcribe` with seeded sampling, and without the text of the previous
        chunk as a prompt.

        Args:
            waveforms: 16 kHz waveforms (samples,).
            batched: whether to decode the first chunks of all clips at once. By default only on a
                GPU: on a CPU it saves nothing, and the batch waits for its longest text.
        """
        model, _ = self._load(self.transcription_model or self.whisper_model)
        fp16 = model.device.type == "cuda"
        clips = [
            torch.as_tensor(clip, dtype=torch.float32, device=model.device) for clip in waveforms
        ]
        is_batched = bool(clips) and (fp16 if batched is None else batched)
        texts = []
        with _decoding_lock, torch.random.fork_rng([model.device] if fp16 else []):
            first_chunks = [None] * len(clips)
            if is_batched:
                first_chunks = self._first_chunks(model, clips, fp16)
            for clip, first_chunk in zip(clips, first_chunks, strict=True):
                torch.manual_seed(SEED)
                result = whisper.transcribe(
                    _FirstChunkDecoded(model, first_chunk),
                    clip,
                    condition_on_previous_text=False,
                    fp16=fp16,
                    language=first_chunk.language if first_chunk else self.language,
                )
                texts.append(TRANSCRIPT_RULES[self.transcript_rule](result["text"]))
        return texts

    def _first_chunks(
        self, model: whisper.Whisper, clips: list[torch.Tensor], fp16: bool
    ) -> list[whisper.DecodingResult]:
        """Decode the first 30 s of each clip greedily, as `whisper.transcribe` does first."""
        mels = [log_mel_spectrogram(clip, model.dims.n_mels, padding=N_SAMPLES) for clip in clips]
        languages = [self.language or "en"] * len(clips)
        if model.is_multilingual and self.language is None:
            # As in `whisper.transcribe`, the language is detected in the log-mel of the clip with
            # silence after it, while the log-mel that is decoded is padded with zeros.
            padded = torch.stack([pad_or_trim(mel, N_FRAMES) for mel in mels])
            _, probabilities = model.detect_language(padded.half() if fp16 else padded)
            languages = [max(by_language, key=by_language.get) for by_language in probabilities]
        chunks = [pad_or_trim(mel[:, :-N_FRAMES], N_FRAMES) for mel in mels]
        chunks = torch.stack(chunks)  # (clips, mels, 3000)
        results = {}
        for language in sorted(set(languages)):
            rows = [row for row, found in enumerate(languages) if found == language]
            options = whisper.DecodingOptions(language=language, fp16=fp16)
            results |= dict(zip(rows, model.decode(chunks[rows], options), strict=True))
        return [results[row] for row in range(len(clips))]
