"""The other endpoint of `qa_generation.llm`: a Hugging Face model on this machine, batched.

Notable:
- Requests that wait at the same time are one batch. Samples repeat with the batch; greedy answers (temperature 0) do
  not depend on it in fp32.
- A tokenizer without a chat template gets the messages as paragraphs.
"""

import asyncio
import hashlib
from typing import Any

from qa_generation.endpoint import LlmSettings


class LocalModel:
    """Loads `settings.model`, onto the GPU if there is one."""

    def __init__(self, settings: LlmSettings):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto")
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.waiting: list[tuple[dict[str, Any], str, asyncio.Future]] = []
        self.working: asyncio.Task | None = None

    async def send(self, request: dict[str, Any], key: str) -> dict[str, Any]:
        """The reply as it is stored."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((request, key, future))
        if self.working is None or self.working.done():
            self.working = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self.waiting:
            await asyncio.sleep(0.02)  # So that requests of the same moment come into one batch.
            count = self.settings.concurrency
            batch, self.waiting = self.waiting[:count], self.waiting[count:]
            answering = asyncio.create_task(
                asyncio.to_thread(self._answer, [part[:2] for part in batch])
            )
            await asyncio.wait([answering])
            for number, (_, _, future) in enumerate(batch):
                if (
                    error := answering.exception()
                ):  # Whatever it is, those who wait for the batch must hear of it.
                    future.set_exception(error)
                else:
                    future.set_result(answering.result()[number])

    def _prompt(self, messages: list[dict[str, str]]) -> str:
        if self.tokenizer.chat_template:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        return (self.tokenizer.bos_token or "") + "".join(
            f"{message['content']}\n\n" for message in messages
        )

    def _answer(self, batch: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
        import torch

        prompts = [self._prompt(request["messages"]) for request, _ in batch]
        inputs = self.tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False
        )
        torch.manual_seed(
            int(hashlib.sha256("".join(key for _, key in batch).encode()).hexdigest()[:15], 16)
        )
        heat = self.settings.temperature
        given = {"do_sample": True, "temperature": heat} if heat else {"do_sample": False}
        given |= {"pad_token_id": self.tokenizer.pad_token_id} | self.settings.extra
        given["max_new_tokens"] = self.settings.longest_reply
        with torch.inference_mode():
            tokens = self.model.generate(**inputs.to(self.model.device), **given)
        said = tokens[:, inputs["input_ids"].shape[1] :].tolist()  # (batch, new tokens)
        return [
            self._reply(*pair)
            for pair in zip(said, inputs["attention_mask"].sum(-1).tolist(), strict=True)
        ]

    def _reply(self, ids: list[int], prompt_tokens: int) -> dict[str, Any]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        count = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text = self.tokenizer.decode(ids[:count], skip_special_tokens=True).strip()
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count}
        reason = "stop" if count < len(ids) else "length"
        return {"text": text, "finish_reason": reason, "model": self.settings.model, "usage": usage}

    async def close(self) -> None:
        """Nothing to close."""
