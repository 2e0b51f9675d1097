"""Converts prompts and audio clips into the tensors that the model takes.

The wire format is `[audio placeholders][padding][text]`: audio comes before `<s>`, and in a row
without audio, padding fills the audio positions.

The processor adds the beginning-of-sequence token itself, because a tokenizer adds it or not
depending on its version and its config. Text that a user types stays text: a literal `</s>` in a
question is tokenized as four characters, not as the end of the sequence.

A training example is tokenized whole, with prompt and answer in one string, as the released
checkpoints were trained.
"""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    FEATURE_EXTRACTOR_MAPPING,
    AutoProcessor,
    BatchFeature,
    ProcessorMixin,
)

from ltu.data.audio import AudioSource
from ltu.models.audio_front_end import make_front_end
from ltu.models.config_checks import (
    ProcessorFields,
    check_fields,
    check_numbers,
    refuse_malformed,
    show,
)
from ltu.models.configuration_ltu import ALPACA_SHORT, IGNORED, LtuConfig
from ltu.models.custom_code import CustomCodeMixin
from ltu.models.locate_checkpoint import check_files
from ltu.models.prompt_template import (
    CUT,
    RenderedPrompt,
    adds_bos,
    broadcast,
    check_prompt_fields,
    control_tokens,
    escape_control_tokens,
    open_tokenizer,
    read_conversation,
    render_prompt,
    tokenize_texts,
    user_message,
)

REPLACEMENT = "\ufffd"  # The character that stands for bytes that are no UTF-8.
# A token of tokenizers that spell rare characters in bytes, as Llama's does.
BYTE = re.compile("<0x([0-9A-F]{2})>")


class LtuProcessor(CustomCodeMixin, ProcessorMixin):
    """The feature extractor of the audio encoder, the tokenizer of the language model, the prompt.

    Args:
        feature_extractor: converts waveforms into the input of the audio encoder.
        tokenizer: the tokenizer of the language model.
        num_audio_tokens, audio_token_id, prompt_template: as in the model's config.
        add_bos: whether texts begin with the tokenizer's `<s>`; by default, the tokenizer's folder
            decides.

    Raises:
        ValueError: the tokenizer has no end token, so generation could not end, or no words; or a
            setting has a wrong type or size.
    """

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
        fields = {
            "num_audio_tokens": num_audio_tokens,
            "audio_token_id": audio_token_id,
            "prompt_template": prompt_template,
            "add_bos": add_bos,
        }
        check_fields(ProcessorFields, fields, "The settings of the processor")
        settings = vars(feature_extractor)
        # The sizes of a Whisper that has not been opened yet are not known.
        known = {name: value for name, value in settings.items() if value is not None}
        check_numbers(known, "The settings of the feature extractor")
        super().__init__(feature_extractor, tokenizer, **kwargs)
        self.num_audio_tokens = num_audio_tokens
        self.audio_token_id = audio_token_id
        self.prompt_template = dict(prompt_template or ALPACA_SHORT)
        if "chat_template" not in self.prompt_template:
            check_prompt_fields(self.prompt_template, "The prompt template of the processor")
        self.front_end = make_front_end(feature_extractor)
        self.controls = control_tokens(tokenizer, self.prompt_template.get("chat_template"))
        self.add_bos = adds_bos(tokenizer) if add_bos is None else add_bos
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path} has no end token. Set its eos_token "
                "first."
            )
        # A tokenizer whose files are missing is opened without words.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path} has {len(tokenizer)} tokens, all of "
                "them special: its files are missing. Copy the folder again."
            )
        tokenizer.split_special_tokens = True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "LtuProcessor":
        """Open the processor of a checkpoint folder, as the stock method does.

        Raises:
            OSError: there is no such folder.
            ValueError: a file of the tokenizer, the feature extractor or the processor is damaged,
                or a value in it has a wrong type or size.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            check_files(folder)
        with refuse_malformed(f"The processor of {folder}"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def check_config(self, config: LtuConfig) -> None:
        """Check that the processor was made for the model of a config.

        Raises:
            ValueError: the two have other sizes.
        """
        sizes = {
            "num_audio_tokens": (self.num_audio_tokens, config.num_audio_tokens),
            "audio_token_id": (self.audio_token_id, config.audio_token_id),
        }
        for name, expected in config.audio_config.extractor_settings.items():
            sizes[name] = getattr(self.feature_extractor, name, None), expected
        for name, (own, expected) in sizes.items():
            if own != expected:
                raise ValueError(
                    f"The processor has {name} {show(own)}, but the model has {expected}. They are "
                    "of two checkpoints: copy or write the folder again."
                )

    @classmethod
    def from_config(
        cls, config: LtuConfig, tokenizer_name: str | Path, **extractor_settings: Any
    ) -> "LtuProcessor":
        """Return the processor that fits a model's config.

        The token that ends the answers of the prompt template is added to `config.eos_token_id`, so
        that generation stops at it.

        Args:
            config: of the model; its `eos_token_id` may change.
            tokenizer_name: folder or hub id of the language model, whose tokenizer is used.
            extractor_settings: further arguments of the feature extractor.
        """
        extractor_class = FEATURE_EXTRACTOR_MAPPING[type(config.audio_config)]
        extractor_settings = config.audio_config.extractor_settings | extractor_settings
        processor = cls(
            extractor_class(**extractor_settings),
            open_tokenizer(tokenizer_name),
            num_audio_tokens=config.num_audio_tokens,
            audio_token_id=config.audio_token_id,
            prompt_template=config.prompt_template,
        )
        end_ids = config.eos_token_id
        if not isinstance(end_ids, list):
            end_ids = [end_ids]
        end_id = processor.render([user_message("")]).end_id
        if end_id not in end_ids:
            config.eos_token_id = end_id if end_ids == [None] else [*end_ids, end_id]
        return processor

    @property
    def pad_token_id(self) -> int:
        """The padding token, 0 if the tokenizer has none that the language model knows.

        The original pads with token 0 (`<unk>`). Padding is masked, so any token will do.
        """
        pad = self.tokenizer.pad_token_id
        if pad is None:
            return 0
        if self.audio_token_id and pad >= self.audio_token_id:
            return 0
        return pad

    @property
    def bos_ids(self) -> list[int]:
        """`[<s>]` for a language model that was trained with one, else `[]`."""
        bos = self.tokenizer.bos_token_id
        return [bos] if self.add_bos and bos is not None else []

    def render(self, messages: list[dict]) -> RenderedPrompt:
        """Render the prompt of messages that `read_conversation` returns."""
        return render_prompt(messages, self.prompt_template, self.controls, self.tokenizer)

    def prompt(self, question: str, transcript: str | None = None) -> str:
        """Return the prompt of a single question, as text."""
        return self.render([user_message(question, transcript)]).prompt

    def encode(self, text: str) -> list[int]:
        """Tokenize a text, with `<s>` in front if the language model was trained with one.

        A chat template writes its own `<s>`, so none is added to a text rendered with it.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Tokenize each text as `encode` does; many texts at once are tokenized in parallel.

        Raises:
            ValueError: the tokenizer has tokens that the language model does not know.
        """
        # JSON can hold halves of surrogate pairs, which a tokenizer does not take.
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        if self.controls is None:
            bos = self.bos_ids
            found = tokenize_texts(self.tokenizer, texts, split_special_tokens=True)
            encoded = [bos + tokens for tokens in found]
        else:
            encoded = self._encode_pieces([text.split(CUT) for text in texts])
        highest = max((max(tokens) for tokens in encoded if tokens), default=0)
        if self.audio_token_id is not None and highest >= self.audio_token_id:
            raise ValueError(
                f"The tokenizer returns token {highest}, but the language model has "
                f"{self.audio_token_id} tokens. It is the tokenizer of another model: convert the "
                "checkpoint with the right --llm."
            )
        return encoded

    def _encode_pieces(self, pieces_of_texts: list[list[str]]) -> list[list[int]]:
        """Tokenize texts that `escape_control_tokens` has cut into pieces."""
        all_pieces = list(chain.from_iterable(pieces_of_texts))
        tokenized = iter(tokenize_texts(self.tokenizer, all_pieces, split_special_tokens=False))
        encoded = []
        for pieces in pieces_of_texts:
            tokens: list[int] = []
            for _ in pieces:
                tokens.extend(next(tokenized))
            encoded.append(tokens)
        return encoded

    def encode_example(
        self, example: dict, cutoff_len: int, train_on_inputs: bool = True
    ) -> tuple[list[int], list[int]]:
        """Tokenize one training example.

        The end token is added only if the text is shorter than the cutoff, because a truncated
        answer has no end.

        Args:
            example: with `instruction`, `output` and perhaps `input`.
            cutoff_len: the largest number of text tokens; audio tokens do not count.
            train_on_inputs: whether the prompt carries a loss too.

        Returns:
            Tokens and labels, both (length <= cutoff_len,).
        """
        rendered, text = self.example(example)
        tokens = self.encode(text)[:cutoff_len]
        if len(tokens) < cutoff_len and tokens[-1] != rendered.end_id:
            tokens.append(rendered.end_id)
        labels = list(tokens)
        if not train_on_inputs:
            num_masked = len(self.encode(rendered.prompt)[:cutoff_len])
            labels[:num_masked] = [IGNORED] * min(num_masked, len(labels))
        return tokens, labels

    def example(self, example: dict) -> tuple[RenderedPrompt, str]:
        """Return the rendered prompt of a training example, and its whole text with the answer."""
        rendered = self.render([user_message(example["instruction"], example.get("input"))])
        answer = escape_control_tokens(example["output"], self.controls)
        text = rendered.prompt + rendered.leading_space + answer + rendered.end
        return rendered, text

    def __call__(
        self,
        text: str | list[str],
        audio: AudioSource | list[AudioSource] = None,
        transcript: str | list[str | None] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Convert questions about clips into the input of `LtuForConditionalGeneration.generate`.

        Args:
            text: one question, or a list of them.
            audio: one clip per question: a path, the bytes of a file, a 16 kHz mono waveform
                (samples,), or None for a question without audio.
            transcript: the speech of each clip as text; "" for none. If it is None, the clip is
                transcribed if the model takes transcripts, as LTU-AS does.

        Returns:
            `input_ids` and `attention_mask` (batch, audio tokens + longest text), and
            `input_features` (clips, frames, mel bins) if there is a clip.

        Raises:
            ltu.data.audio.AudioError: a clip cannot be decoded; the message has its path and the
                reason.
            ValueError: the lists have unequal lengths.
        """
        if return_tensors != "pt":
            raise ValueError(
                f"return_tensors is {return_tensors!r}, but only 'pt' (torch tensors) is supported."
            )
        questions = [text] if isinstance(text, str) else list(text)
        transcripts = broadcast(transcript, len(questions), "transcript")
        clips = broadcast(audio, len(questions), "audio")
        conversations = [
            [user_message(*fields)] for fields in zip(questions, transcripts, clips, strict=True)
        ]
        return self._batch(conversations)

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str = "pt",
        add_generation_prompt: bool = True,
        padding: bool = True,
    ) -> str | list[str] | Tensor | BatchFeature:
        """Render one conversation or several.

        Args:
            conversation: messages as `read_conversation` takes them, or a list of conversations.
            tokenize: whether to return tensors, not the text of the prompts.
            return_dict: whether to return all that `__call__` returns, not `input_ids` alone.
            return_tensors, add_generation_prompt, padding: only the default values are supported.

        Raises:
            ValueError: the prompt template or the model cannot express a conversation.
        """
        if return_tensors != "pt" or not add_generation_prompt or not padding:
            raise ValueError(
                "A prompt ends where the answer begins, in padded rows of torch tensors ('pt')."
            )
        is_batch = bool(conversation) and isinstance(conversation[0], list)
        conversations = conversation if is_batch else [conversation]
        conversations = [read_conversation(each, self.prompt_template) for each in conversations]
        if not tokenize:
            texts = [self.render(messages).prompt.replace(CUT, "") for messages in conversations]
            return texts if is_batch else texts[0]
        batch = self._batch(conversations)
        return batch if return_dict else batch["input_ids"]

    def _batch(self, conversations: list[list[dict]]) -> BatchFeature:
        """Return what `__call__` returns, with one row per conversation."""
        # Each conversation holds at most one clip. Its transcript belongs to the message with the
        # clip, or to the last message if there is no clip.
        audio_messages = []
        for messages in conversations:
            with_audio = (message for message in messages if message.get("audio") is not None)
            audio_messages.append(next(with_audio, messages[-1]))
        clips = []
        for message in audio_messages:
            audio = message.get("audio")
            clips.append(None if audio is None else self.front_end.load_clip(audio))
        transcripts = self.front_end.complete_transcripts(
            clips, [message.get("transcript") for message in audio_messages]
        )
        for message, transcript in zip(audio_messages, transcripts, strict=True):
            message["transcript"] = transcript

        tokens = [self.encode(self.render(messages).prompt) for messages in conversations]
        batch = self.pad_batch(tokens, [clip is not None for clip in clips])
        loaded_clips = [clip for clip in clips if clip is not None]
        if loaded_clips:
            batch["input_features"] = self.front_end.extract_features(loaded_clips)
        return BatchFeature(batch)

    def pad_batch(
        self, ids: list[list[int]], has_audio: list[bool | int], multiple_of: int = 1
    ) -> dict[str, Tensor]:
        """Collate tokenized texts to rows `[audio placeholders][padding][text]`.

        With two audio tokens (A), padding (0), and texts [1, 2, 3] with audio and [4] without:

            input_ids       A A 1 2 3        attention_mask  1 1 1 1 1
                            0 0 0 0 4                        0 0 0 0 1

        Args:
            ids: tokens of the text of each row, `<s>` first.
            has_audio: whether a row has a clip, or the number of its chunks; in a row without,
                padding fills the audio positions.
            multiple_of: the text part is padded to a multiple of this (8 in training).

        Returns:
            `input_ids` and `attention_mask`, both (batch, audio tokens + longest text).
        """
        num_text = -(-max(map(len, ids)) // multiple_of) * multiple_of
        length = self.num_audio_tokens * max(has_audio) + num_text
        input_ids = torch.full((len(ids), length), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, (text, num_chunks) in enumerate(zip(ids, has_audio, strict=True)):
            input_ids[row, length - len(text) :] = torch.tensor(text)
            attention_mask[row, length - len(text) :] = 1
            num_audio = num_chunks * self.num_audio_tokens
            input_ids[row, :num_audio] = self.audio_token_id
            attention_mask[row, :num_audio] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def decode_answer(self, ids: Tensor | list[int]) -> str:
        """Return the text of newly generated tokens, without control tokens.

        More tokens only append to the text, except that they may complete a character whose first
        bytes are U+FFFD at its end.
        """
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        # A tokenizer that is not fast decodes with sentencepiece itself.
        if REPLACEMENT in text and self.tokenizer.is_fast:
            tokens = self.tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
            # Language models have more tokens than their tokenizers know.
            tokens = [token for token in tokens if token is not None]
            if any(BYTE.fullmatch(token) for token in tokens):
                text = self.tokenizer.convert_tokens_to_string(replace_wrong_bytes(tokens))
        return text.strip()


def replace_wrong_bytes(tokens: list[str]) -> list[str]:
    """Replace each byte token that belongs to no character by a token of U+FFFD.

    The tokenizers library decodes a whole run of byte tokens to U+FFFD if one byte of it is wrong,
    even its line breaks. sentencepiece, with which the original decodes, replaces wrong bytes only.
    Tokens of U+FFFD split a run, so that the library decodes the rest of it.

        <0xE2> <0x82> <0xAC> <0xFF> a   ->   <0xE2> <0x82> <0xAC> U+FFFD a   ("€", U+FFFD, "a")
    """
    replaced = list(tokens)
    run = bytearray()  # The values of neighbouring byte tokens.
    for position, token in enumerate([*tokens, ""]):
        byte = BYTE.fullmatch(token)
        if byte is not None:
            run.append(int(byte[1], 16))
            continue
        first = position - len(run)
        for index in find_wrong_bytes(bytes(run)):
            replaced[first + index] = REPLACEMENT
        run.clear()
    return replaced


def find_wrong_bytes(data: bytes) -> list[int]:
    """Return the positions of the bytes that belong to no character in UTF-8."""
    wrong: list[int] = []
    start = 0
    while start < len(data):
        try:
            data[start:].decode("utf-8")
            break
        except UnicodeDecodeError as error:
            wrong.extend(range(start + error.start, start + error.end))
            start += error.end
    return wrong


AutoProcessor.register(LtuConfig, LtuProcessor)
