"""Renders questions and conversations as prompts.

A prompt template is either a text with fields, as in the original, or the chat template of the
language model. With a chat template, the prompt is all that the template writes before an answer. A
model with a reasoning mode therefore answers at once.

Only the template writes control tokens. A control token that a user types is cut in two by a mark,
and is tokenized as text.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from ltu.data.audio import AudioSource
from ltu.files import read_json_object
from ltu.models.config_checks import refuse_malformed
from ltu.models.configuration_ltu import ALPACA_SHORT
from ltu.models.locate_checkpoint import check_files

CHAT = {
    "name": "chat",
    "prompt_no_input": "{instruction}",
    "prompt_input": "{instruction}\n\nTranscript: {input}",
}
# Marks inside a text, of two characters that Unicode reserves for the internal use of programs: the
# cut in a control token that a user typed, and the position of the answer.
CUT = "\ufdd0"
ANSWER = "\ufdd1"
# The date for chat templates that write one, so that prompts do not change from day to day. It is
# the default of Llama 3's template.
DATE = "26 Jul 2024"
AUDIO_KEYS = ("audio", "audio_url", "url", "path", "base64")
MAX_SHOWN_ROLES = 20  # turns that an error quotes


class RenderedPrompt(NamedTuple):
    """The text around an answer."""

    prompt: str
    leading_space: str  # Between prompt and answer; a tokenizer joins it to the first word.
    end: str  # Between the answer and the end token.
    end_id: int  # The token that ends the answer.


@dataclass
class Conversation:
    """A conversation, and where its text ends.

    Args:
        messages: as `read_conversation` returns them.
        ending: "prompt" where the answer to the last message begins, "continued" within the last
            message, which is the beginning of the answer, "answered" after the last message.
    """

    messages: list[dict]
    ending: Literal["prompt", "continued", "answered"] = "prompt"


class RenderedText(str):
    """The text of a conversation, for reading, with the conversation itself.

    A processor takes it back as what it is. A text alone could not be told from a question that
    has the same characters.
    """

    conversation: Conversation

    @classmethod
    def of(cls, text: str, conversation: Conversation) -> "RenderedText":
        rendered = cls(text)
        rendered.conversation = conversation
        return rendered


def load_prompt_template(name: str, llm: str | Path) -> dict[str, str]:
    """Load a prompt template, as a checkpoint stores it.

    Args:
        name: "alpaca_short", "chat" (the chat template of the language model), or a JSON file like
            the original's.
        llm: folder or hub id of the language model.

    Raises:
        ValueError: there is no such template, or it has other fields.
    """
    if name == CHAT["name"]:
        tokenizer = open_tokenizer(llm)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of {llm} has no chat template. Use --prompt_template alpaca_short."
            )
        return CHAT | {"chat_template": tokenizer.get_chat_template()}
    if name == ALPACA_SHORT["name"]:
        return dict(ALPACA_SHORT)
    if not Path(name).is_file():
        raise ValueError(
            f"--prompt_template {name}: choose alpaca_short, chat, or a JSON file that exists."
        )
    try:
        template = read_json_object(Path(name))
    except ValueError as error:
        raise ValueError(f"{name} is no prompt template: {error}") from error
    check_prompt_fields(template, name)
    if Path(name).stem in (ALPACA_SHORT["name"], CHAT["name"]):
        raise ValueError(
            f"{name}: a template is stored under the name of its file, and {Path(name).stem} is "
            "the name of another one. Rename the file."
        )
    return template | {"name": Path(name).stem}


def open_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a language model in a folder or on the hub.

    Raises:
        OSError: there is no such model, or it has no tokenizer.
        ValueError: a file of the tokenizer is damaged.
    """
    if Path(name).is_dir():
        check_files(Path(name))
    with refuse_malformed(f"The tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(name)


def check_prompt_fields(template: dict, subject: str) -> None:
    """Check that the prompts of a template have the fields that are filled in, and no others.

    Raises:
        ValueError: a prompt is absent, or has other fields. The message begins with `subject`.
    """
    try:
        fields = [_fields_of(template["prompt_no_input"]), _fields_of(template["prompt_input"])]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{subject} is no prompt template: {error!r}.") from error
    if fields != [["instruction"], ["input", "instruction"]]:
        raise ValueError(
            f"{subject}: prompt_no_input must have the field {{instruction}}, and prompt_input the "
            f"fields {{instruction}} and {{input}}; the fields are {fields}."
        )


def _fields_of(text: str) -> list[str]:
    """Return the names of the fields in a format string, sorted."""
    return sorted({name for _, name, _, _ in Formatter().parse(text) if name is not None})


def control_tokens(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> re.Pattern | None:
    """Return a pattern of the tokens that only the chat template may write.

    These are the special tokens, and other added tokens that the template names. Returns None if
    there is no chat template.
    """
    if chat_template is None:
        return None
    controls = set()
    for token in tokenizer.added_tokens_decoder.values():
        is_named = token.content in chat_template and token.content.strip()
        if token.special or is_named:
            controls.add(token.content)
    # The longest comes first, so that a token that begins with another one is found whole.
    return re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))))


def escape_control_tokens(text: str, controls: re.Pattern | None) -> str:
    """Return a text with a mark inside each control token, where `LtuProcessor.encode` cuts."""
    if controls is None:
        return text
    text = text.replace(CUT, "").replace(ANSWER, "")
    return controls.sub(lambda token: token[0][0] + CUT + token[0][1:], text)


def render_prompt(
    messages: list[dict],
    template: dict[str, str],
    controls: re.Pattern | None,
    tokenizer: PreTrainedTokenizerBase,
) -> RenderedPrompt:
    """Render the prompt of a conversation.

    Args:
        messages: as `read_conversation` returns them, each with its transcript if it has one.
        template: of `load_prompt_template`.
        controls: of `control_tokens`; None without a chat template.
        tokenizer: of the language model.

    Raises:
        ValueError: the chat template does not take these messages.
    """
    filled = []
    for message in messages:
        text = message["content"]
        transcript = message.get("transcript")
        if message["role"] == "user":
            key = "prompt_input" if transcript else "prompt_no_input"
            text = template[key].format(instruction=text, input=transcript)
        filled.append({"role": message["role"], "content": escape_control_tokens(text, controls)})
    if controls is None:
        return RenderedPrompt(filled[-1]["content"], "", "", tokenizer.eos_token_id)

    # Render the conversation with a mark for the answer, and cut the text at the mark.
    filled.append({"role": "assistant", "content": ANSWER})
    try:
        text = tokenizer.apply_chat_template(
            filled, chat_template=template["chat_template"], tokenize=False, date_string=DATE
        )
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"The chat template refuses the turns {_shorten(roles)}: {error}"
        ) from error
    before, mark, after = text.partition(ANSWER)
    if not mark:
        raise ValueError(
            "The chat template writes no assistant turn. Use --prompt_template alpaca_short."
        )
    prompt = before.rstrip(" ")
    leading_space = before[len(prompt) :]

    # The first control token after the answer ends the answer.
    end_token = controls.search(after)
    if end_token is None:
        return RenderedPrompt(prompt, leading_space, after.rstrip(), tokenizer.eos_token_id)
    end_id = tokenizer.convert_tokens_to_ids(end_token[0])
    return RenderedPrompt(prompt, leading_space, after[: end_token.start()], end_id)


def read_conversation(
    messages: list[dict],
    template: dict[str, str],
    last_role: Literal["user", "assistant"] = "user",
    needs_clips: bool = True,
) -> list[dict]:
    """Convert messages as Qwen2-Audio's processor takes them to messages with plain text.

    The `content` of a message is a text, or a list of `{"type": "text", "text"}` and
    `{"type": "audio", "audio", "transcript"?}`, where `AUDIO_KEYS` are other names of "audio".
    Several texts of a message become lines of one text. The audio tokens come before all text,
    wherever the clip is in the list.

    Args:
        messages: the conversation.
        template: of `load_prompt_template`.
        last_role: of the last message; "assistant" for a conversation with its answer.
        needs_clips: whether a part of type audio must hold its clip, which may follow otherwise.

    Returns:
        Messages with `role` and a text as `content`; one may have `audio`, `transcript` and
        `has_audio` too.

    Raises:
        ValueError: the template or the model cannot express the conversation.
    """
    plain_messages = []
    clip_roles = []  # Of each audio part, the role of its message; "nothing" if it has no clip.
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError("A message is an object with role and content.")
        parts = _parts_of(message.get("content"))
        texts = [part["text"] for part in parts if part["type"] == "text"]
        plain_message = {"role": message["role"], "content": "\n".join(texts)}
        for part in parts:
            if part["type"] != "audio":
                continue
            clip = _clip_of(part)
            plain_message |= {"audio": clip, "transcript": part.get("transcript")}
            plain_message["has_audio"] = True
            is_missing = clip is None and needs_clips
            clip_roles.append("nothing" if is_missing else message["role"])
        plain_messages.append(plain_message)

    roles = [message["role"] for message in plain_messages]
    num_turns = 1 if last_role == "user" else 2
    if roles[-1:] != [last_role] or ("chat_template" not in template and len(roles) != num_turns):
        position = "only" if last_role == "user" else "second"
        raise ValueError(
            f"The template {template.get('name')!r} cannot express the turns {_shorten(roles)}: "
            f"the last must be the {last_role}'s, and the {position} one unless the checkpoint was "
            "made with --prompt_template chat."
        )
    if clip_roles not in ([], ["user"]):
        raise ValueError(
            f"The model takes one clip ({', '.join(AUDIO_KEYS)}), in a turn of the user; here are "
            f"{len(clip_roles)}, of {_shorten(clip_roles)}. Join the clips, or ask about each by "
            "itself."
        )
    return plain_messages


def _clip_of(part: dict) -> AudioSource:
    """Return the clip of a part of type audio, None if it holds none.

    Raises:
        ValueError: it holds two.
    """
    given = {key: part[key] for key in AUDIO_KEYS if part.get(key) is not None}
    if len(given) > 1:
        raise ValueError(f"A part of type audio holds {', '.join(given)}, but one clip is needed.")
    if "base64" in given:
        return f"data:;base64,{given['base64']}"
    return next(iter(given.values()), None)


def _shorten(roles: list[str]) -> str:
    """Return roles as an error quotes them, the first of many."""
    if len(roles) <= MAX_SHOWN_ROLES:
        return str(roles)
    return f"{roles[:MAX_SHOWN_ROLES]} and {len(roles) - MAX_SHOWN_ROLES:,} more"


def _parts_of(content: Any) -> list[dict]:
    """Return the content of a message as a list of parts, each of type text or audio.

    Raises:
        ValueError: the content is neither a text nor a list of such parts.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(
            f"The content of a message is a text, or a list of parts, not {content!r}."
        )
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"A part of type text needs a text, but here is {texts!r}.")
    other_types = {str(part.get("type")) for part in content} - {"text", "audio"}
    if other_types:
        raise ValueError(
            f"A message holds {', '.join(sorted(other_types))}; text and audio are possible."
        )
    return content


def user_message(text: str, transcript: str | None = None, audio: AudioSource = None) -> dict:
    """Return a message of the user, as `read_conversation` returns it."""
    return {"role": "user", "content": text, "transcript": transcript, "audio": audio}


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], split_special_tokens: bool
) -> list[list[int]]:
    """Tokenize each text, without special tokens around it.

    A fast tokenizer is called through its backend: its other outputs would double the time.

    Args:
        split_special_tokens: whether special tokens in a text are tokenized as text.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        return tokenizer(
            texts, add_special_tokens=False, split_special_tokens=split_special_tokens
        ).input_ids
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = split_special_tokens
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether texts begin with `<s>`, by the config in the tokenizer's folder.

    Old Llama folders have no such setting; their tokenizer always added `<s>`.
    """
    setting = tokenizer.init_kwargs.get("add_bos_token")
    if setting is not None:
        return setting
    tokens = tokenizer("a").input_ids
    begins_with_bos = bool(tokens) and tokens[0] == tokenizer.bos_token_id
    return isinstance(tokenizer, LlamaTokenizer) or begins_with_bos


def broadcast(value: Any, length: int, name: str) -> list:
    """Return an argument of a batch as a list with one value per question.

    A value of None becomes a list of None.

    Raises:
        ValueError: the list has another length.
    """
    if value is None:
        return [None] * length
    values = value if isinstance(value, list) else [value]  # A tuple is one clip: (array, Hz).
    if len(values) != length:
        raise ValueError(
            f"{length} questions, but {len(values)} values of {name}. Give one per question, None "
            "for none."
        )
    return values
