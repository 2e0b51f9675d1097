"""Generates replies with a Hugging Face model on this machine, as an endpoint of `llm`.

Requests that wait at the same time form one batch. Samples are reproducible only with the same
batch; greedy replies (temperature 0) do not depend on the batch in fp32. A tokenizer without a chat
template gets the messages as paragraphs.
"""

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qa_generation.llm_types import LlmSettings, Message, Reply


@dataclass
class WaitingRequest:
    """A request that is not yet in a batch, and the future that gets its reply."""

    request: dict[str, Any]
    key: str
    future: asyncio.Future


class LocalModel:
    """The model `settings.model`, on the GPU if there is one."""

    def __init__(self, settings: LlmSettings):
        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(device).eval()
        self.waiting: list[WaitingRequest] = []
        self.working: asyncio.Task | None = None

    async def send(self, request: dict[str, Any], key: str) -> Reply:
        """Generate the reply to a request."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(WaitingRequest(request, key, future))
        if self.working is None or self.working.done():
            self.working = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Generate replies until no request waits."""
        while self.waiting:
            await asyncio.sleep(0.02)  # Requests of the same moment join one batch.
            count = self.settings.concurrency
            batch = self.waiting[:count]
            self.waiting = self.waiting[count:]
            generation = asyncio.create_task(asyncio.to_thread(self._generate, batch))
            await asyncio.wait([generation])
            # Every request of the batch must get the error, whatever it is.
            error = generation.exception()
            for number, waiting in enumerate(batch):
                if error:
                    waiting.future.set_exception(error)
                else:
                    waiting.future.set_result(generation.result()[number])

    def _prompt(self, messages: list[Message]) -> str:
        if self.tokenizer.chat_template:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        paragraphs = [f"{message['content']}\n\n" for message in messages]
        return (self.tokenizer.bos_token or "") + "".join(paragraphs)

    def _generate(self, batch: list[WaitingRequest]) -> list[Reply]:
        """Generate the replies to a batch of requests, in their order."""
        prompts = [self._prompt(waiting.request["messages"]) for waiting in batch]
        inputs = self.tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False
        )
        keys = "".join(waiting.key for waiting in batch)
        torch.manual_seed(int(hashlib.sha256(keys.encode()).hexdigest()[:15], 16))
        arguments: dict[str, Any] = {"do_sample": False}
        if self.settings.temperature:
            arguments = {"do_sample": True, "temperature": self.settings.temperature}
        arguments |= {"pad_token_id": self.tokenizer.pad_token_id} | self.settings.extra
        arguments["max_new_tokens"] = self.settings.longest_reply
        with torch.inference_mode():
            tokens = self.model.generate(**inputs.to(self.model.device), **arguments)
        new_tokens = tokens[:, inputs["input_ids"].shape[1] :].tolist()  # (batch, new tokens)
        prompt_lengths = inputs["attention_mask"].sum(-1).tolist()  # (batch,)
        replies = []
        for reply_tokens, prompt_tokens in zip(new_tokens, prompt_lengths, strict=True):
            replies.append(self._decode_reply(reply_tokens, prompt_tokens))
        return replies

    def _decode_reply(self, tokens: list[int], prompt_tokens: int) -> Reply:
        """Decode a reply, which ends with an end token or at the maximum length."""
        end_tokens = self.model.generation_config.eos_token_id
        if not isinstance(end_tokens, list):
            end_tokens = [end_tokens]
        count = 0
        while count < len(tokens) and tokens[count] not in end_tokens:
            count += 1
        return Reply(
            text=self.tokenizer.decode(tokens[:count], skip_special_tokens=True).strip(),
            finish_reason="stop" if count < len(tokens) else "length",
            model=self.settings.model,
            prompt_tokens=prompt_tokens,
            completion_tokens=count,
        )

    async def close(self) -> None:
        """Do nothing; there is nothing to close."""
