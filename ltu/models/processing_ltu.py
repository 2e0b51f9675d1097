"""Prompt, question and clip -> tensors.

Notable:
- The wire format is `[audio placeholders][pads][text]`: audio comes before `<s>`; pads take its place if there is none.
- The beginning-of-sequence token is put in front by hand. Whether a tokenizer adds it depends on its version and its
  config.
- What a user types stays text: a literal `</s>` in a question is five characters, not the end of the sequence.
- A training row is tokenized whole, prompt and answer in one string, as the released checkpoints were.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    FEATURE_EXTRACTOR_MAPPING,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    ProcessorMixin,
)

from ltu.data.audio import SAMPLING_RATE, AudioClip, AudioSource, decode_audio
from ltu.models.configuration_ltu import ALPACA_SHORT, LtuConfig
from ltu.models.prompt_template import (
    CUT,
    RenderedPrompt,
    adds_bos,
    broadcast,
    control_tokens,
    escape_control_tokens,
    read_conversation,
    render_prompt,
    tokenize_texts,
    user_message,
)

IGNORED = -100  # Labels with this value carry no loss (torch.nn.functional.cross_entropy).
# Settings of `LtuProcessor.use`, as flags of commands. Only LTU-AS takes them.
WHISPER_FLAGS = ("whisper", "transcription_model", "feature_precision", "feature_root")


class LtuProcessor(ProcessorMixin):
    """A feature extractor for the ear, a tokenizer for the language model, and the prompt between them.

    Args:
        feature_extractor: waveform -> what the ear takes.
        tokenizer: of the language model.
        num_audio_tokens, audio_token_id, prompt_template: as in the model's config.
        add_bos: whether texts begin with the tokenizer's `<s>`; by default, what its folder says.

    Raises:
        ValueError: the tokenizer has no end token, so no answer could end.
    """

    # What the extractor must know of the ear: its argument -> the field of `audio_config`.
    extractor_sizes = {"num_mel_bins": "num_mel_bins", "num_frames": "num_frames"}
    transcribes = False

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        num_audio_tokens: int = 32,
        audio_token_id: int | None = None,
        prompt_template: dict | None = None,
        add_bos: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__(feature_extractor, tokenizer, **kwargs)
        self.num_audio_tokens = num_audio_tokens
        self.audio_token_id = audio_token_id
        self.prompt_template = dict(prompt_template or ALPACA_SHORT)
        self.controls = control_tokens(tokenizer, self.prompt_template.get("chat_template"))
        self.add_bos = adds_bos(tokenizer) if add_bos is None else add_bos
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path} has no end token; set its eos_token first."
            )
        tokenizer.split_special_tokens = True

    @classmethod
    def from_config(
        cls, config: LtuConfig, tokenizer_name: str | Path, **extractor_settings: Any
    ) -> "LtuProcessor":
        """The processor that fits a model's config, with the tokenizer of its language model (a folder or hub id).

        The token that ends its answers joins `config.eos_token_id`, for generation to stop there.
        """
        extractor_class = FEATURE_EXTRACTOR_MAPPING[type(config.audio_config)]
        sizes = {
            ours: getattr(config.audio_config, audio_encoders)
            for ours, audio_encoders in cls.extractor_sizes.items()
        }
        processor = cls(
            extractor_class(**sizes, **extractor_settings),
            AutoTokenizer.from_pretrained(tokenizer_name),
            num_audio_tokens=config.num_audio_tokens,
            audio_token_id=config.audio_token_id,
            prompt_template=config.prompt_template,
        )
        ends = (
            config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        )
        if (end := processor.render([user_message("")]).end_id) not in ends:
            config.eos_token_id = end if ends == [None] else [*ends, end]
        return processor

    @property
    def pad_token_id(self) -> int:
        """The original pads with id 0 (`<unk>`); pads are masked, so any id that the language model has does."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None and pad < (self.audio_token_id or pad + 1) else 0

    @property
    def bos_ids(self) -> list[int]:
        """`[<s>]` for a language model that was trained with one, else `[]`."""
        bos = self.tokenizer.bos_token_id
        return [bos] if self.add_bos and bos is not None else []

    def render(self, messages: list[dict]) -> RenderedPrompt:
        """What stands around the answer to messages of `read_conversation`."""
        return render_prompt(messages, self.prompt_template, self.controls, self.tokenizer)

    def prompt(self, question: str, transcript: str | None = None) -> str:
        """The text in front of the answer."""
        return self.render([user_message(question, transcript)]).prompt

    def encode(self, text: str) -> list[int]:
        """Ids of a text, `<s>` first where the language model knows one. A chat template writes its own."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; many at once are tokenized in parallel."""
        texts = [
            text.encode("utf-8", "replace").decode() for text in texts
        ]  # JSON can hold halves of characters.
        if self.controls is None:
            found = [
                self.bos_ids + ids
                for ids in tokenize_texts(self.tokenizer, texts, split_special_tokens=True)
            ]
        else:
            pieces = [text.split(CUT) for text in texts]
            parts = iter(
                tokenize_texts(self.tokenizer, [part for each in pieces for part in each], False)
            )
            found = [[token for _ in each for token in next(parts)] for each in pieces]
        highest = max((max(ids) for ids in found if ids), default=0)
        if self.audio_token_id is not None and highest >= self.audio_token_id:
            raise ValueError(
                f"The tokenizer writes id {highest}, but the language model has {self.audio_token_id} tokens. "
                "It is the tokenizer of another model: convert the checkpoint with the right --llm."
            )
        return found

    def encode_example(
        self, row: dict, cutoff_len: int, train_on_inputs: bool = True
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of one training row, both (length <= cutoff_len,). Audio does not count.

        The end token is there only when the text is shorter than the cutoff: a truncated answer has no end.
        """
        render, text = self.example(row)
        ids = self.encode(text)[:cutoff_len]
        if len(ids) < cutoff_len and ids[-1] != render.end_id:
            ids.append(render.end_id)
        labels = list(ids)
        if not train_on_inputs:
            masked = len(self.encode(render.prompt)[:cutoff_len])
            labels[:masked] = [IGNORED] * min(masked, len(labels))
        return ids, labels

    def example(self, row: dict) -> tuple[RenderedPrompt, str]:
        """What stands around the answer of a training row, and its whole text."""
        render = self.render([user_message(row["instruction"], row.get("input"))])
        return render, render.prompt + render.leading_space + escape_control_tokens(
            row["output"], self.controls
        ) + render.end

    def __call__(
        self,
        text: str | list[str],
        audio: AudioSource | list[AudioSource] = None,
        transcript: str | list[str | None] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Questions about clips -> what `LtuForConditionalGeneration.generate` takes.

        Args:
            text: one question a row.
            audio: one clip a row: a path, the bytes of a file, a 16 kHz mono waveform (samples,), or None for a
                question alone.
            transcript: what is said in the clip, one a row; "" for none. None is none for LTU; LTU-AS transcribes.

        Returns:
            `input_ids` and `attention_mask` (batch, tokens + longest text), and `input_features` (clips, frames, mel
            bins) if a row has audio.

        Raises:
            ltu.data.audio.AudioError: a clip cannot be heard; the message has its path and the reason.
            ValueError: the lists have unequal lengths.
        """
        if return_tensors != "pt":
            raise ValueError(
                f"return_tensors is {return_tensors!r}; only 'pt' (torch tensors) is made here."
            )
        questions = [text] if isinstance(text, str) else list(text)
        given = [
            broadcast(transcript, len(questions), "transcript"),
            broadcast(audio, len(questions), "audio"),
        ]
        return self._batch([[user_message(*row)] for row in zip(questions, *given, strict=True)])

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str = "pt",
        add_generation_prompt: bool = True,
        padding: bool = True,
    ) -> str | list[str] | Tensor | BatchFeature:
        """One or several conversations, as `read_conversation` takes them -> what `__call__` returns.

        Without `return_dict`: `input_ids` alone; without `tokenize`: the text. The last three have no other values.

        Raises:
            ValueError: the prompt template or the model cannot express a conversation.
        """
        if return_tensors != "pt" or not add_generation_prompt or not padding:
            raise ValueError(
                "A prompt ends where the answer begins, in padded rows of torch tensors ('pt')."
            )
        several = bool(conversation) and isinstance(conversation[0], list)
        read = [
            read_conversation(each, self.prompt_template)
            for each in (conversation if several else [conversation])
        ]
        if not tokenize:
            texts = [self.render(messages).prompt.replace(CUT, "") for messages in read]
            return texts if several else texts[0]
        return self._batch(read) if return_dict else self._batch(read)["input_ids"]

    def _batch(self, conversations: list[list[dict]]) -> BatchFeature:
        """What `__call__` returns, one row a conversation."""
        asked = [
            next((m for m in each if m.get("audio") is not None), each[-1])
            for each in conversations
        ]
        heard = [
            None if message.get("audio") is None else self.load_clip(message["audio"])
            for message in asked
        ]
        texts = self.complete_transcripts(heard, [message.get("transcript") for message in asked])
        for message, transcript in zip(asked, texts, strict=True):
            message["transcript"] = transcript
        ids = [self.encode(self.render(messages).prompt) for messages in conversations]
        batch = self.pad_batch(ids, [clip is not None for clip in heard])
        if found := [clip for clip in heard if clip is not None]:
            batch["input_features"] = self.extract_features(found)
        return BatchFeature(batch)

    def pad_batch(
        self, ids: list[list[int]], has_audio: list[bool | int], multiple_of: int = 1
    ) -> dict[str, Tensor]:
        """`[audio placeholders][pads][text]`: `input_ids` and `attention_mask`, both (batch, tokens + longest text).

        Args:
            ids: text of each row, `<s>` first.
            has_audio: whether a row hears a clip, or how many chunks of it; otherwise pads stand in that place.
            multiple_of: the text part is padded to a multiple of this (8 in training).
        """
        width = -(-max(map(len, ids)) // multiple_of) * multiple_of
        tokens, pad = self.num_audio_tokens * max(has_audio), self.pad_token_id
        input_ids = torch.full((len(ids), tokens + width), pad)
        attention_mask = torch.zeros_like(input_ids)
        for row, (text, hears) in enumerate(zip(ids, has_audio, strict=True)):
            input_ids[row, tokens + width - len(text) :] = torch.tensor(text)
            attention_mask[row, tokens + width - len(text) :] = 1
            input_ids[row, : hears * self.num_audio_tokens] = self.audio_token_id
            attention_mask[row, : hears * self.num_audio_tokens] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def load_clip(
        self, audio: AudioSource, audio_id: str | None = None, num_chunks: int = 1
    ) -> AudioClip:
        """A clip, of which `num_chunks` are to be heard, 0 for all that it has. `audio_id` is its name in a row, by which
        LTU-AS finds it in a feature folder.

        Raises:
            ltu.data.audio.AudioError: it cannot be heard.
        """
        sound = decode_audio(audio)
        there = self.feature_extractor.count_chunks(len(sound.waveform))
        found = {"sampling_rate": sound.sampling_rate, "channels": sound.channels}
        found["num_chunks"] = min(num_chunks or there, there)
        return AudioClip(audio, len(sound.waveform) / SAMPLING_RATE, sound.waveform, **found)

    def stored(self, audio: AudioSource, audio_id: str | None = None) -> Any | None:
        """What a feature folder holds of a clip: nothing for LTU."""
        return None

    @property
    def audio_settings(self) -> tuple:
        """What can be changed after opening and changes what is heard; equal settings hear the same."""
        return ()

    def extract_features(self, clips: list[AudioClip]) -> Tensor:
        """What the ear takes: (chunks of all clips, frames, mel bins)."""
        todo = [clip for clip in clips if clip.features is None]
        waveforms, num_chunks = [clip.waveform for clip in todo], [clip.num_chunks for clip in todo]
        made = (
            self.feature_extractor(waveforms, sampling_rate=SAMPLING_RATE, num_chunks=num_chunks)
            if todo
            else None
        )
        parts = iter(made.input_features.split(num_chunks) if made else ())
        return torch.cat(
            [next(parts) if clip.features is None else clip.features[None] for clip in clips]
        )

    def load_features(self, row: dict) -> Tensor:
        """What the ear takes of a row's clip: (frames, mel bins)."""
        return self.extract_features([self.load_clip(row["audio"], row.get("audio_id"))])[0]

    def complete_transcripts(
        self, clips: list[AudioClip | None], transcripts: list[str | None]
    ) -> list[str]:
        """Transcripts of clips, where None is given: LTU knows none, LTU-AS asks Whisper."""
        return [transcript or "" for transcript in transcripts]

    def add_transcripts(self, rows: list[dict]) -> list[dict]:
        """Rows with `input`, where it is absent: "" for LTU, Whisper's transcript for LTU-AS."""
        return [row | {"input": row.get("input") or ""} for row in rows]

    def use(self, **settings: str | None) -> None:
        """Change what LTU-AS hears with: its Whisper, that one's precision, a folder of features.

        Raises:
            ValueError: a setting is not None, and the checkpoint is of LTU.
        """
        if asked := [f"--{name}" for name, value in settings.items() if value is not None]:
            raise ValueError(
                f"{', '.join(asked)}: only LTU-AS listens with Whisper; this checkpoint is of LTU."
            )

    def decode_answer(self, ids: Tensor | list[int]) -> str:
        """The text of newly generated ids, without control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


AutoProcessor.register(LtuConfig, LtuProcessor)
