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
from transformers.utils import to_py_obj

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
    Conversation,
    RenderedPrompt,
    RenderedText,
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
from ltu.models.stock_arguments import (
    ProcessingArguments,
    check_stock_argument,
    read_processing_arguments,
    resolve_clip,
)

REPLACEMENT = "\ufffd"  # The character that stands for bytes that are no UTF-8.
# A token of tokenizers that spell rare characters in bytes, as Llama's does.
BYTE = re.compile("<0x([0-9A-F]{2})>")
# What other models take in place of a clip, such as <sound>, <|AUDIO|> and [AUDIO].
OTHER_PLACEHOLDER = re.compile(r"\s*[<\[]\|?\w*(audio|sound)\w*\|?[>\]]", re.IGNORECASE)
# A question that no user asks: a character that Unicode reserves for the internal use of programs.
QUESTION = "\ufdd2"


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
        # The side on which the pipelines of transformers pad; `pad_batch` does not ask.
        tokenizer.padding_side = "left"

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
        question = user_message(example["instruction"], example.get("input"))
        rendered, text = self._render_answer([question], example["output"])
        return rendered, text + rendered.end

    def _render_answer(self, messages: list[dict], answer: str) -> tuple[RenderedPrompt, str]:
        """Return the rendered prompt of messages, and its text with an answer, without an end."""
        rendered = self.render(messages)
        answer = escape_control_tokens(answer, self.controls)
        return rendered, rendered.prompt + rendered.leading_space + answer

    def _render_conversation(self, conversation: Conversation) -> tuple[str, int | None]:
        """Return the text of a conversation, and the token after it that ends the answer."""
        if conversation.ending == "prompt":
            return self.render(conversation.messages).prompt, None
        *history, last = conversation.messages
        rendered, text = self._render_answer(history, last["content"])
        if conversation.ending == "continued":
            return text, None
        return text + rendered.end, rendered.end_id

    def __call__(
        self,
        text: str | list[str],
        audio: AudioSource | list[AudioSource] = None,
        transcript: str | list[str | None] | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Convert questions about clips into the input of `LtuForConditionalGeneration.generate`.

        Args:
            text: one question, or a list of them; or what `apply_chat_template` returned with
                `tokenize=False`, which is tokenized as it is.
            audio: one clip per question: a path, the bytes of a file, a 16 kHz mono waveform
                (samples,), an http(s) URL, or None for a question without audio. For texts of
                `apply_chat_template`, one per part of type audio; by default, the clips of the
                messages.
            transcript: the speech of each clip as text; "" for none. If it is None, the clip is
                transcribed if the model takes transcripts, as LTU-AS does.
            return_tensors: "pt".
            kwargs: `padding`, `sampling_rate` (of arrays, in Hz) and `output_labels` (adds
                `labels` of all text) as for Audio Flamingo 3; other arguments of transformers'
                processors, such as `truncation`, are accepted with the value that describes what is
                done here (`ltu.models.stock_arguments`).

        Returns:
            `input_ids` and `attention_mask` (batch, audio tokens + longest text), and
            `input_features` (clips, frames, mel bins) if there is a clip.

        Raises:
            ltu.data.audio.AudioError: a clip cannot be decoded; the message has its path and the
                reason.
            ValueError: the lists have unequal lengths, a text is a rendered prompt that was
                changed, or begins with the placeholder of another model, or an argument has no
                meaning here.
        """
        arguments = read_processing_arguments(kwargs | {"return_tensors": return_tensors})
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not all(isinstance(each, str) for each in texts):
            raise ValueError(f"text is one question or a list of them, not {type(text).__name__}.")
        if not texts:
            raise ValueError("text is an empty list. Give one question at least.")
        transcripts = broadcast(transcript, len(texts), "transcript")
        if all(isinstance(each, RenderedText) for each in texts):
            conversations = [_copy_conversation(each.conversation) for each in texts]
            if audio is not None:
                _replace_clips(conversations, audio)
            for conversation, given in zip(conversations, transcripts, strict=True):
                if given is not None:
                    find_audio_message(conversation.messages)["transcript"] = given
            return self._batch(conversations, arguments)

        clips = broadcast(audio, len(texts), "audio")
        conversations = []
        for question, given, clip in zip(texts, transcripts, clips, strict=True):
            self._check_question(question)
            placeholder = None if clip is None else OTHER_PLACEHOLDER.match(question)
            if placeholder is not None:
                raise ValueError(
                    f"The text begins with {placeholder[0].strip()!r}, a placeholder of other "
                    "models, which would be text here. Leave it out: the clip comes first anyway."
                )
            conversations.append(Conversation([user_message(question, given, clip)]))
        return self._batch(conversations, arguments)

    def _check_question(self, text: str) -> None:
        """Check that a text is a question, and not a prompt that was rendered before.

        Raises:
            ValueError: it has the beginning and the end that the prompt template writes around a
                question, and would get them a second time.
        """
        for transcript in (None, QUESTION):
            prompt = self.prompt(QUESTION, transcript)
            begin = prompt.partition(QUESTION)[0].strip()
            end = prompt.rpartition(QUESTION)[2].strip()
            # A chat template may write a system text, which differs.
            control = None if self.controls is None else self.controls.search(begin)
            if control is not None:
                begin = begin[: control.end()]
            is_rendered = text.lstrip().startswith(begin)
            if begin:
                is_rendered = is_rendered and end in text
            else:
                is_rendered = bool(end) and text.rstrip().endswith(end)
            if is_rendered or isinstance(text, RenderedText):
                raise ValueError(
                    f"The text {text[:60]!r}... is a rendered prompt, and would be rendered again. "
                    "Give the question alone, or all texts as apply_chat_template returned them "
                    "(a copy as plain str has lost its conversation), or call "
                    "apply_chat_template(..., tokenize=True, return_dict=True)."
                )

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | Tensor | BatchFeature:
        """Render one conversation or several.

        Args:
            conversation: messages as `read_conversation` takes them, or a list of conversations.
            chat_template: None; the template is that of the checkpoint.
            tokenize: whether to return tensors, not texts. The texts are for reading, and for
                `__call__`.
            return_dict: whether to return all that `__call__` returns, not `input_ids` alone.
            return_tensors: "pt"; None and "auto" mean the same.
            add_generation_prompt: True for a prompt, whose last turn is the user's; False for a
                whole conversation, whose last turn is the assistant's, with the token that ends
                the answer. By default, the last turn decides.
            continue_final_message: whether the last turn is the beginning of an answer that is to
                be continued.
            return_assistant_tokens_mask: whether to add `assistant_masks` (batch, length), 1 for
                the tokens of all answers.
            processor_kwargs, kwargs: as for `__call__`.

        Raises:
            ValueError: the prompt template or the model cannot express a conversation, or an
                argument has no meaning here.
        """
        check_stock_argument("chat_template", chat_template)
        if return_tensors in (None, "auto"):
            return_tensors = "pt"
        given = {**(processor_kwargs or {}), **kwargs, "return_tensors": return_tensors}
        arguments = read_processing_arguments(given)
        if not isinstance(continue_final_message, bool):
            raise ValueError("continue_final_message is True or False: answers have one text.")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ValueError(
                "continue_final_message cannot be combined with add_generation_prompt or "
                "return_assistant_tokens_mask: the last answer has no end."
            )
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError(
                "return_assistant_tokens_mask needs tokenize=True and return_dict=True."
            )
        if not conversation:
            raise ValueError("The conversation has no messages.")
        is_batch = isinstance(conversation[0], list | tuple)
        conversations = [
            self._read_conversation(
                messages, add_generation_prompt, continue_final_message, needs_clips=tokenize
            )
            for messages in (conversation if is_batch else [conversation])
        ]
        if tokenize:
            batch = self._batch(conversations, arguments, return_assistant_tokens_mask)
            return batch if return_dict else batch["input_ids"]
        texts = []
        for each in conversations:
            text, end_id = self._render_conversation(each)
            if end_id is not None:
                text += self.tokenizer.convert_ids_to_tokens(end_id)
            texts.append(RenderedText.of(text.replace(CUT, ""), each))
        return texts if is_batch else texts[0]

    def _read_conversation(
        self,
        messages: list[dict],
        add_generation_prompt: bool | None,
        continue_final_message: bool,
        needs_clips: bool,
    ) -> Conversation:
        """Read a conversation, by the arguments of `apply_chat_template` of these names."""
        if not messages:
            raise ValueError("The conversation has no messages.")
        last = messages[-1]
        ends_with_answer = isinstance(last, dict) and last.get("role") == "assistant"
        ending = "prompt"
        if continue_final_message:
            ending = "continued"
        elif add_generation_prompt is False or (add_generation_prompt is None and ends_with_answer):
            ending = "answered"
        if ending == "answered" and not ends_with_answer:
            raise ValueError(
                "With add_generation_prompt=False the last turn is the assistant's: a question "
                "without the beginning of its answer is no prompt of this model."
            )
        last_role = "user" if ending == "prompt" else "assistant"
        plain = read_conversation(messages, self.prompt_template, last_role, needs_clips)
        return Conversation(plain, ending)

    def _batch(
        self,
        conversations: list[Conversation],
        arguments: ProcessingArguments,
        with_masks: bool = False,
    ) -> BatchFeature:
        """Return what `__call__` returns, with one row per conversation.

        Args:
            with_masks: whether to add `assistant_masks`.
        """
        audio_messages = [find_audio_message(each.messages) for each in conversations]
        clips = []
        for message in audio_messages:
            source = resolve_clip(message.get("audio"), arguments.sampling_rate)
            if source is None and message.get("has_audio"):
                raise ValueError("A part of type audio holds no clip. Give it as audio=.")
            clips.append(None if source is None else self.front_end.load_clip(source))
        transcripts = self.front_end.complete_transcripts(
            clips, [message.get("transcript") for message in audio_messages]
        )
        for message, transcript in zip(audio_messages, transcripts, strict=True):
            message["transcript"] = transcript

        rendered = [self._render_conversation(each) for each in conversations]
        tokens = self.encode_all([text for text, _ in rendered])
        for row, (_, end_id) in zip(tokens, rendered, strict=True):
            if end_id is not None and row[-1:] != [end_id]:
                row.append(end_id)
        has_audio = [clip is not None for clip in clips]
        is_ragged = len(set(map(len, tokens))) > 1 or len(set(has_audio)) > 1
        if is_ragged and not arguments.padding:
            raise ValueError("Rows of unequal length cannot be one tensor with padding=False.")
        batch = self.pad_batch(tokens, has_audio)
        length = batch["input_ids"].shape[1]
        if arguments.output_labels:
            batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
            for row, text in enumerate(tokens):
                num_bos = int(text[:1] == self.bos_ids)  # Nothing predicts <s>.
                batch["labels"][row, length - len(text) + num_bos :] = torch.tensor(text[num_bos:])
        if with_masks:
            batch["assistant_masks"] = torch.zeros_like(batch["input_ids"])
            for row, conversation in enumerate(conversations):
                first = length - len(tokens[row])
                for start, end in self._find_answers(conversation, len(tokens[row])):
                    batch["assistant_masks"][row, first + start : first + end] = 1
        loaded_clips = [clip for clip in clips if clip is not None]
        if loaded_clips:
            batch["input_features"] = self.front_end.extract_features(loaded_clips)
        return BatchFeature(batch)

    def _find_answers(self, conversation: Conversation, length: int) -> list[tuple[int, int]]:
        """Return the tokens of each answer in a conversation: the first, and the one after.

        Args:
            length: number of tokens of the whole text.

        Raises:
            ValueError: the chat template writes an answer in another way if turns follow it.
        """
        whole, _ = self._render_conversation(conversation)
        spans = []
        for position, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            history = conversation.messages[:position]
            rendered, text = self._render_answer(history, message["content"])
            text += rendered.end
            if not whole.startswith(text):
                raise ValueError(
                    "return_assistant_tokens_mask: the chat template writes an answer in another "
                    "way if turns follow it. Train on conversations of one answer each."
                )
            end = length
            if position < len(conversation.messages) - 1:
                end = len(self.encode(text))
                # The next control token ends the answer.
                control = self.controls.match(whole, len(text))
                end += int(control is not None)
            spans.append((len(self.encode(rendered.prompt)), end))
        return spans

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

    @property
    def model_input_names(self) -> list[str]:
        """The names of what `__call__` returns."""
        return ["input_ids", "attention_mask", *self.feature_extractor.model_input_names]

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """Decode tokens as the stock method does, with its arguments.

        Audio placeholders have no text, and are left out. Bytes that are no UTF-8 do not change the
        text around them.
        """
        tokens = self._without_placeholders(to_py_obj(token_ids))
        options = {
            "skip_special_tokens": skip_special_tokens,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
            **kwargs,
        }
        if isinstance(tokens, list) and any(isinstance(part, list) for part in tokens):
            return [self.decode(part, **options) for part in tokens]
        text = self.tokenizer.decode(tokens, **options)
        # A tokenizer that is not fast decodes with sentencepiece itself.
        if REPLACEMENT not in text or not self.tokenizer.is_fast or not isinstance(tokens, list):
            return text
        if clean_up_tokenization_spaces:
            return text
        words = self.tokenizer.convert_ids_to_tokens(
            tokens, skip_special_tokens=skip_special_tokens
        )
        # Language models have more tokens than their tokenizers know.
        words = [word for word in words if word is not None]
        if any(BYTE.fullmatch(word) for word in words):
            text = self.tokenizer.convert_tokens_to_string(replace_wrong_bytes(words))
        return text

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Decode several sequences as `decode` does; a single one becomes a list of one text."""
        if len(sequences) == 0:
            return []
        texts = self.decode(sequences, *args, **kwargs)
        return [texts] if isinstance(texts, str) else texts

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decode what `generate` returned, as the pipeline "any-to-any" needs it."""
        return self.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def _without_placeholders(self, tokens: int | list) -> int | list:
        """Return tokens as lists of the same depth, without audio placeholders."""
        if not isinstance(tokens, list):
            return [] if tokens == self.audio_token_id else tokens
        if not any(isinstance(part, list) for part in tokens):
            return [token for token in tokens if token != self.audio_token_id]
        return [self._without_placeholders(part) for part in tokens]

    def decode_answer(self, ids: Tensor | list[int]) -> str:
        """Return the text of newly generated tokens, without control tokens.

        More tokens only append to the text, except that they may complete a character whose first
        bytes are U+FFFD at its end.
        """
        return self.decode(ids, skip_special_tokens=True).strip()


def find_audio_message(messages: list[dict]) -> dict:
    """Return the message to which the clip and its transcript belong.

    A conversation holds at most one clip. Without a clip, a transcript belongs to the last message
    of the user.
    """
    for message in messages:
        if message.get("audio") is not None or message.get("has_audio"):
            return message
    users = [message for message in messages if message["role"] == "user"]
    return users[-1] if users else messages[-1]


def _copy_conversation(conversation: Conversation) -> Conversation:
    """Return a conversation whose messages can be changed."""
    messages = [dict(message) for message in conversation.messages]
    return Conversation(messages, conversation.ending)


def _replace_clips(
    conversations: list[Conversation], audio: AudioSource | list[AudioSource]
) -> None:
    """Put clips into the messages that hold parts of type audio, in their order.

    Raises:
        ValueError: there is another number of them.
    """
    messages = [find_audio_message(each.messages) for each in conversations]
    messages = [message for message in messages if message.get("has_audio")]
    clips = audio if isinstance(audio, list) else [audio]
    clips = [clip for clip in clips if clip is not None]
    if len(clips) != len(messages):
        raise ValueError(
            f"The texts have {len(messages)} parts of type audio, but audio has {len(clips)} clips."
        )
    for message, clip in zip(messages, clips, strict=True):
        message["audio"] = clip


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
