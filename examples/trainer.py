"""Fine-tune with `transformers.Trainer`, one LoRA adapter of peft, on crayon rows; then merge it and ask.

    python pipelines/build_crayon.py --scenes 60 --segmenter annotations --output out
    python examples/trainer.py out

Some minutes on two cores. `collavo.train` trains the paper's way; this is the shortest way with another trainer.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, pipeline

from collavo.dataset import category_set, find_files
from collavo.model.adapters import LINEAR_LAYERS
from collavo.runs import load_base
from collavo.training.collator import CrayonCollator

data, base, output = sys.argv[1], "tiny", "runs/trainer"

model, processor = load_base(base, torch.float32)
# The tiny base cannot read lists of objects, and its pictures are scenes, which a small segmenter knows.
processor.object_list, processor.segmenter = False, "scenes"
# The adapter is LoRA on the language model; the Crayon Prompt is trained whole beside it.
lora = LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR_LAYERS.pattern, modules_to_save=["crayon_prompt"])
trainer = Trainer(
    get_peft_model(model, lora),
    TrainingArguments(
        output,
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the collator reads columns that the model does not take
        label_names=["labels"],
    ),
    CrayonCollator(processor, category_set(find_files([data]))),
    load_dataset(data, split="train"),
)
trainer.train()
trainer.model.merge_and_unload().save_pretrained(output)  # a whole model, which no longer needs peft
processor.save_pretrained(output)

row = load_dataset(data, split="validation")[0]
asked = row["instructions"][0]
content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": asked["question"]}]
ask = pipeline("image-text-to-text", model=output)
answer = ask([{"role": "user", "content": content}], return_full_text=False)[0]["generated_text"]
print(f"{asked['question']} {answer.strip()} (right: {asked['answer']})")
