"""Trains a folder with transformers: CHECKPOINT EXAMPLES.json OUTPUT; an example has `messages`."""

import json
import sys

from transformers import AutoModelForMultimodalLM, AutoProcessor, Trainer, TrainingArguments

import ltu_as  # noqa: F401  registers LTU and LTU-AS

processor = AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModelForMultimodalLM.from_pretrained(sys.argv[1])
if model.config.lora is None:
    model.add_lora(r=8, lora_alpha=16, lora_dropout=0.05)
model.set_trainable("all")  # audio encoder, projector and LoRA
options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}


def collate(examples):
    batch = processor.apply_chat_template([each["messages"] for each in examples], **options)
    is_answer = batch.pop("assistant_masks").bool()  # (batch, length)
    return batch | {"labels": batch["input_ids"].masked_fill(~is_answer, -100)}


examples = json.load(open(sys.argv[2]))
args = TrainingArguments(sys.argv[3], learning_rate=1e-3, remove_unused_columns=False)
trainer = Trainer(model, args, collate, examples, processing_class=processor)
trainer.train()
trainer.save_model()
