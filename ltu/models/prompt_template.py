"""What stands around a question and its answer: a template with blanks, or the language model's own chat template.

Notable:
- The prompt is what the chat template writes before an answer: a model that could think aloud answers at once.
- Only the template writes control tokens. One that a user types is cut in two by a mark, and stays text.
"""

import json
import re
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import AutoTokenizer, LlamaTokenizer

from ltu.models.configuration_ltu import ALPACA_SHORT

CHAT = {
    "name": "chat",
    "prompt_no_input": "{instruction}",
    "prompt_input": "{instruction}\n\nTranscript: {input}",
}
CUT, ANSWER = "\ufdd0", "\ufdd1"  # Unicode keeps these two free for marks inside a program.
DATE = "26 Jul 2024"  # What a template that writes the day gets (Llama 3's own default): prompts must not change.
AUDIO_KEYS = ("audio", "audio_url", "url", "path")


class RenderedPrompt(NamedTuple):
    """What stands around an answer: `prompt`, and the space that a tokenizer joins to the first word; then `end` and
    the end token."""

    prompt: str
    leading_space: str
    end: str
    end_id: int


def load_prompt_template(name: str, llm: str | Path) -> dict[str, str]:
    """A template that a checkpoint can keep: "alpaca_short", "chat" (of the language model `llm`), or a JSON file like
    the original's.

    Raises:
        ValueError: there is no such template, or it has other blanks.
    """
    if name == CHAT["name"]:
        tokenizer = AutoTokenizer.from_pretrained(llm)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of {llm} has no chat template. Use --prompt_template alpaca_short."
            )
        return CHAT | {"chat_template": tokenizer.get_chat_template()}
    if name != ALPACA_SHORT["name"] and not Path(name).is_file():
        raise ValueError(
            f"--prompt_template {name}: choose alpaca_short, chat, or a JSON file that is there."
        )
    try:
        template = (
            ALPACA_SHORT
            if name == ALPACA_SHORT["name"]
            else json.loads(Path(name).read_text(encoding="utf-8"))
        )
        texts = [template["prompt_no_input"], template["prompt_input"]]
        blanks = [
            sorted({blank for _, blank, _, _ in Formatter().parse(text) if blank is not None})
            for text in texts
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is no prompt template: {error!r}.") from error
    if blanks != [["instruction"], ["input", "instruction"]]:
        raise ValueError(
            f"{name}: prompt_no_input needs {{instruction}}, prompt_input {{input}} too; it has {blanks}."
        )
    if name != ALPACA_SHORT["name"] and Path(name).stem in (ALPACA_SHORT["name"], CHAT["name"]):
        raise ValueError(
            f"{name}: a template is kept under its file's name, and {Path(name).stem} means another one."
        )
    return template | {"name": Path(name).stem}


def control_tokens(tokenizer: Any, chat_template: str | None) -> re.Pattern | None:
    """Tokens that only the chat template may write: the special ones, and others that it names. None without one."""
    if chat_template is None:
        return None
    added = tokenizer.added_tokens_decoder.values()
    named = {
        t.content for t in added if t.special or (t.content in chat_template and t.content.strip())
    }
    return re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))))


def escape_control_tokens(text: str, controls: re.Pattern | None) -> str:
    """A text with a mark inside each control token, where `LtuProcessor.encode` cuts."""
    if controls is None:
        return text
    return controls.sub(
        lambda token: token[0][0] + CUT + token[0][1:], text.replace(CUT, "").replace(ANSWER, "")
    )


def render_prompt(
    messages: list[dict], template: dict[str, str], controls: re.Pattern | None, tokenizer: Any
) -> RenderedPrompt:
    """What stands around the answer to messages of `read_conversation`, each with its transcript if it has one.

    Raises:
        ValueError: the chat template does not take them.
    """
    filled, roles = [], [message["role"] for message in messages]
    for role, message in zip(roles, messages, strict=True):
        text, heard = message["content"], message.get("transcript")
        if role == "user":
            text = template["prompt_input" if heard else "prompt_no_input"].format(
                instruction=text, input=heard
            )
        filled.append({"role": role, "content": escape_control_tokens(text, controls)})
    if controls is None:
        return RenderedPrompt(filled[-1]["content"], "", "", tokenizer.eos_token_id)
    filled.append({"role": "assistant", "content": ANSWER})
    try:
        chosen = template["chat_template"]
        text = tokenizer.apply_chat_template(
            filled, chat_template=chosen, tokenize=False, date_string=DATE
        )
    except TemplateError as error:
        raise ValueError(f"The chat template refuses the turns {roles}: {error}") from error
    before, found, behind = text.partition(ANSWER)
    if not found:
        raise ValueError(
            "The chat template writes no assistant turn. Use --prompt_template alpaca_short."
        )
    prompt, token = before.rstrip(" "), controls.search(behind)
    end = behind[: token.start()] if token else behind.rstrip()
    end_id = tokenizer.convert_tokens_to_ids(token[0]) if token else tokenizer.eos_token_id
    return RenderedPrompt(prompt, before[len(prompt) :], end, end_id)


def read_conversation(messages: list[dict], template: dict[str, str]) -> list[dict]:
    """Messages as Qwen2-Audio's processor takes them -> the same with plain texts as `content`, one with `audio`.

    `content` is a text, or a list of `{"type": "text", "text"}` (which become lines) and `{"type": "audio", "audio" or
    "audio_url", "transcript"?}`. The model hears the clip in front of all text, wherever it stands.

    Raises:
        ValueError: the template, or the model, cannot express them.
    """
    read, clips = [], []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise ValueError(
                f"The content of a message is a text, or a list of parts, not {content!r}."
            )
        if other := {str(part.get("type")) for part in parts} - {"text", "audio"}:
            raise ValueError(
                f"A message holds {', '.join(sorted(other))}; text and audio are possible."
            )
        read.append(
            {
                "role": message["role"],
                "content": "\n".join(p["text"] for p in parts if p["type"] == "text"),
            }
        )
        for part in (part for part in parts if part["type"] == "audio"):
            found = next((part[key] for key in AUDIO_KEYS if part.get(key) is not None), None)
            read[-1] |= {"audio": found, "transcript": part.get("transcript")}
            clips.append(message["role"] if found is not None else "nothing")
    roles = [message["role"] for message in read]
    if roles[-1:] != ["user"] or ("chat_template" not in template and len(roles) > 1):
        raise ValueError(
            f"The template {template.get('name')!r} cannot express the turns {roles}: the last must be the user's, and "
            "the only one unless the checkpoint was made with --prompt_template chat."
        )
    if clips not in ([], ["user"]):
        raise ValueError(
            f"The model hears one clip ({', '.join(AUDIO_KEYS)}), in a turn of the user; here are {len(clips)}, of "
            f"{clips}. Join the clips, or ask about each by itself."
        )
    return read


def user_message(text: str, transcript: str | None = None, audio: Any = None) -> dict:
    return {"role": "user", "content": text, "transcript": transcript, "audio": audio}


def tokenize_texts(tokenizer: Any, texts: list[str], split_special_tokens: bool) -> list[list[int]]:
    """Ids of each text, without special tokens around it. What a tokenizer says beside ids would double the time."""
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


def adds_bos(tokenizer: Any) -> bool:
    """What the tokenizer's folder says. Old Llama folders say nothing: their tokenizer always added `<s>`."""
    said = tokenizer.init_kwargs.get("add_bos_token")
    if said is not None:
        return said
    ids = tokenizer("a").input_ids
    return isinstance(tokenizer, LlamaTokenizer) or (bool(ids) and ids[0] == tokenizer.bos_token_id)


def broadcast(value: Any, length: int, name: str) -> list:
    """An argument of a batch as a list: one a question, or None for all."""
    if value is None:
        return [None] * length
    values = value if isinstance(value, list) else [value]  # A tuple is one clip: (array, rate).
    if len(values) != length:
        raise ValueError(
            f"{length} questions, but {len(values)} entries of {name}. Give one each, None for none."
        )
    return values
