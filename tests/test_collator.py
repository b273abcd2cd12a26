"""Crayon rows under other people's trainers: `transformers.Trainer` with an adapter of peft, and TRL's if there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Image, load_dataset
from peft import LoraConfig, get_peft_model
from tiny_model import scene_rows, tiny_model, tiny_processor, write_crayon_file
from transformers import Trainer, TrainingArguments

from collavo.inference import picture_of_row
from collavo.model.adapters import LINEAR_LAYERS
from collavo.training.collator import CrayonCollator

ROWS = scene_rows(6)
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR_LAYERS.pattern, modules_to_save=["crayon_prompt"])
OPTIONS = {
    "max_steps": 12,
    "per_device_train_batch_size": 3,
    "learning_rate": 3e-2,
    "logging_steps": 3,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "remove_unused_columns": False,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("collator")
    file = write_crayon_file(folder / "train-00000-of-00001.parquet", ROWS)
    return load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(folder / "cache"))


def batch_of(collator: CrayonCollator, rows: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return collator([rows[i] for i in range(len(rows))])


def test_rows_from_datasets_become_what_training_makes_of_them(rows: Dataset) -> None:
    processor = tiny_processor()
    collator = CrayonCollator(processor, instructions=3)
    batch = batch_of(collator, rows)
    undecoded = rows.cast_column("image", Image(decode=False)).cast_column("panoptic_map", Image(decode=False))
    assert all(torch.equal(tensor, batch[name]) for name, tensor in batch_of(collator, undecoded).items())
    pictures = [picture_of_row(row, None) for row in ROWS]
    wanted = processor.picture_inputs([p.image for p in pictures], [p.panoptic for p in pictures])
    assert all(torch.equal(tensor, batch[name]) for name, tensor in wanted.items())
    supervised = processor.decode(batch["labels"][0][batch["labels"][0] != -100])
    answers = [i.answer for i in ROWS[0].instructions] + [t for d in ROWS[0].conversations for _, t in d.turns]
    assert any(answer in supervised for answer in answers)


def test_a_row_that_teaches_nothing_is_named(rows: Dataset) -> None:
    with pytest.raises(
        ValueError, match="row scene-000 has neither instructions nor dialogues; leave it out by a filter"
    ):
        CrayonCollator(tiny_processor())([{**rows[0], "instructions": [], "conversations": []}])


def test_transformers_trainer_learns_and_peft_merges_and_unloads(rows: Dataset, tmp_path: Path) -> None:
    processor, base = tiny_processor(), tiny_model()
    collator = CrayonCollator(processor)
    batch = batch_of(collator, rows)
    with torch.no_grad():
        untrained = base(**batch).logits
    adapted = get_peft_model(base, LORA)
    trainer = Trainer(adapted, TrainingArguments(str(tmp_path), **OPTIONS, label_names=["labels"]), collator, rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    adapted.eval()
    with torch.no_grad():
        trained = adapted(**batch).logits
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(**batch).logits, untrained)
        merged = adapted.merge_and_unload()
        assert not torch.allclose(trained, untrained, atol=0.1)
        torch.testing.assert_close(merged(**batch).logits, trained, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_trl_trains_the_same_way(rows: Dataset, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    processor = tiny_processor()
    config = trl.SFTConfig(
        str(tmp_path),
        **OPTIONS,
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = trl.SFTTrainer(
        tiny_model(), config, CrayonCollator(processor), rows, processing_class=processor, peft_config=LORA
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
