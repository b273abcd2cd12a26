"""Make the documents of crayon_c2b.yaml from rows, a question each, and judge answers as `collavo.evaluate` does."""

from typing import Any

from datasets import Dataset, Features, Image, Value

from collavo.evaluation.judge import Judge
from schemas.categories import COCO_PANOPTIC

_TASK = "class_to_binary"
_JUDGE = Judge(COCO_PANOPTIC)  # yes or no names no class, so any set will do


def questions(rows: Dataset) -> Dataset:
    """List the questions of the validation split, each with its image."""

    def spread(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        asked = [
            (image, instruction["question"], instruction["label"])
            for image, split, instructions in zip(batch["image"], batch["split"], batch["instructions"], strict=True)
            for instruction in instructions
            if split == "validation" and instruction["task"] == _TASK
        ]
        images, texts, truths = zip(*asked, strict=True) if asked else ((), (), ())
        return {"image": list(images), "question": list(texts), "truth": list(truths)}

    encoded = rows.cast_column("image", Image(decode=False))  # decoded images would be encoded again
    features = Features({"image": Image(), "question": Value("string"), "truth": Value("string")})
    return encoded.map(spread, batched=True, batch_size=8, remove_columns=rows.column_names, features=features)


def visuals(document: dict[str, Any]) -> list[Any]:
    return [document["image"]]


def verdicts(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    judgement = _JUDGE.judge(_TASK, results[0], document["truth"])
    return {"accuracy": float(judgement.correct), "yes_ratio": float(judgement.read == "yes")}
