"""Trains a folder with TRL: CHECKPOINT EXAMPLES.json OUTPUT; an example has `messages`."""

import json
import sys

from datasets import Dataset
from transformers import AutoModelForMultimodalLM, AutoProcessor, Trainer
from trl import SFTConfig, SFTTrainer

import ltu_as  # noqa: F401  registers LTU and LTU-AS

processor = AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModelForMultimodalLM.from_pretrained(sys.argv[1])
if model.config.lora is None:
    model.add_lora(r=8, lora_alpha=16, lora_dropout=0.05)
model.set_trainable("all")  # audio encoder, projector and LoRA
options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}


class AudioTrainer(SFTTrainer):
    compute_loss = Trainer.compute_loss  # TRL's own needs a backbone and a head.


def collate(examples):
    batch = processor.apply_chat_template([each["messages"] for each in examples], **options)
    is_answer = batch.pop("assistant_masks").bool()  # (batch, length)
    return batch | {"labels": batch["input_ids"].masked_fill(~is_answer, -100)}


examples = Dataset.from_list(json.load(open(sys.argv[2])))
settings = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
args = SFTConfig(sys.argv[3], learning_rate=1e-3, bf16=False, **settings)
trainer = AudioTrainer(model, args, collate, examples, processing_class=processor)
trainer.train()
trainer.save_model()
