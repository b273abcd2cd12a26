"""The card of a run and of its exports: what it is, whose licence binds it, on what and how far it was trained."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load

from collavo.embedded import find_embedded
from collavo.folders import write_whole
from collavo.hub import find_checkpoint
from collavo.model.configuration import CollavoConfig
from collavo.runs import CARD, base_source, read_metrics, read_train_args, steps_taken

_NAMED = 20
"""Classes that the card lists."""

_USES = {
    "run": """\
python -m collavo.evaluate --model {name} --data out/*.parquet
python -m collavo.chat --model {name} --image picture.jpg --prompt "What is on the left?"
""",
    "whole": """\
import collavo.model
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{name}")
image, text = {{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "What is on the left?"}}
print(ask([{{"role": "user", "content": [image, text]}}], return_full_text=False))
""",
}

_TEXT = Path(__file__).with_name("model_card.md")


def write_model_card(
    folder: Path, run: Path, form: str, base: str, name: str | None = None, left_out: Mapping[str, int] | None = None
) -> None:
    """Write the card of a run, or of an export of it, from what the run recorded.

    Args:
        folder: where the card goes.
        form: what it is the card of: "run", "merged" or "adapter".
        base: the base as the card names it, a hub id or a path.
        name: of the finished folder, if that is another.
        left_out: how much of the data could not be used, by reason; None where the card does not say.
    """
    name = name or folder.resolve().name
    source = base_source(run)
    embedded = find_embedded(source)
    args, about_base = read_train_args(run), licence_of_checkpoint(str(embedded.folder) if embedded else source)
    steps = steps_taken(run)
    losses, (results, asked, how) = _losses(run), _results(run)
    data = _data_names(args.get("files", {}))
    licences = ", ".join(args.get("data_licences", ()))
    classes = [category.display_name for category in CollavoConfig.from_pretrained(run).category_set]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted((left_out or {}).items()) if count)
    rows = {
        "base": f"`{base}`, licence {about_base['license_name']}",
        "data": f"{', '.join(data) or 'not recorded'}, licence {licences or 'not recorded'}",
        "classes": f"{len(classes)}: {', '.join(classes[:_NAMED])}" + ", ..." * (len(classes) > _NAMED),
        "language model": f"{'NF4 in training' if args['quantize'] else args.get('dtype', 'float32')}, "
        f"LoRA rank {args.get('lora_rank', '?')}, adapters {', '.join(args['adapter_names']) or 'none'}",
        **({"projector": "trained on captions"} if args.get("projector_trained") else {}),
        "queries": args["queries"],
        "prompts with the object list": args["object_list"],
        "steps": ", ".join(f"{phase} up to {step}" for phase, step in steps.items()) or "none",
        **({} if left_out is None else {"left out": skipped or "nothing"}),
        **{f"validation loss, {kind}": f"{loss:.3f}" for kind, loss in losses.items()},
        **{
            f"{task}, right of {each['questions']} about {asked}{how}": f"{each['correct']:.1%}"
            for task, each in results.items()
        },
    }
    trained_on = ", ".join(data) or "unknown"
    figures = [(trained_on, "loss", f"validation loss, {kind}", loss) for kind, loss in losses.items()]
    figures += [(asked, "accuracy", task, each["correct"]) for task, each in results.items()]
    head = card_head(
        about_base,
        base_model=base,
        pipeline_tag="image-text-to-text",
        library_name="transformers" if form == "merged" else "peft",
        tags=["collavo", "vision-language-model", "crayon-prompt"],
        model_name=name if figures else None,
        eval_results=[
            EvalResult("image-text-to-text", "crayon", of_data, kind, value, metric_name=title)
            for of_data, kind, title, value in figures
        ],
    )
    about = {
        "run": f"A projector for `{base}`."
        if args.get("phase") == "align"
        else f"Crayon Prompt and QLoRA adapters on `{base}`.",
        "adapter": f"Crayon Prompt and one LoRA adapter on `{base}`.",
        "merged": f"A whole model: `{base}` with the Crayon Prompt, the adapters merged into its weights.",
    }
    text = _TEXT.read_text(encoding="utf-8").format(
        name=name,
        about=f"{about[form]} Trained with collavo {args.get('versions', {}).get('collavo', '')}.".replace(" .", "."),
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        use=_USES["run" if form == "run" else "whole"].format(name=name),
    )
    write_whole(folder / CARD, f"{head}{text}")


def card_head(licence: Mapping[str, Any], **more: Any) -> str:
    """Write the metadata at the head of a card.

    Args:
        licence: see `licence_of`.
        more: further arguments of `ModelCardData`.
    """
    own_name = licence["license_name"] if licence["license"] == "other" else None
    metadata = ModelCardData(license=licence["license"], license_name=own_name, **more)
    return f"---\n{metadata.to_yaml()}\n---\n\n"


def write_base_card(folder: Path, name: str, sources: Mapping[str, str]) -> None:
    """Write the card of an imported base.

    Args:
        name: of the finished folder.
        sources: the checkpoints that it is made of, folders or hub ids, by what each of them is.
    """
    licences = {source: licence_of_checkpoint(source) for source in sources.values()}
    named = {source: Path(source).name if Path(source).is_dir() else source for source in licences}
    first = next(iter(licences.values()))
    together = " and ".join(dict.fromkeys(licence["license_name"] for licence in licences.values()))
    licence = first if together == first["license_name"] else {"license": "other", "license_name": together}
    hub = [source for source in licences if not Path(source).is_dir()]
    head = card_head(licence, base_model=hub or None, pipeline_tag="image-text-to-text", tags=["collavo"])
    rows = [f"| {part} | `{named[source]}` | {licences[source]['license_name']} |" for part, source in sources.items()]
    text = "\n".join(
        [f"# {name}", "", "A base for CoLLaVO.", "", "| made of | checkpoint | licence |", "|---|---|---|", *rows]
    )
    write_whole(folder / CARD, f"{head}{text}\n")


def licence_of_checkpoint(source: str) -> dict[str, Any]:
    """Read a licence and its name, as the card of a folder, or of a model of the hub on this machine, states them."""
    try:
        return licence_of(find_checkpoint(source, weights=()))
    except OSError:
        return licence_of(Path(source))


def licence_of(folder: Path) -> dict[str, Any]:
    """Read a licence and its name, as the card in a folder states them."""
    card = folder / CARD
    found = (metadata_load(card) if card.is_file() else None) or {}
    licence = found.get("license", "other")
    return {"license": licence, "license_name": found.get("license_name", licence if licence != "other" else "unknown")}


def _losses(run: Path) -> dict[str, float]:
    """Read the last validation losses by kind."""
    named = [{k[11:-5]: v for k, v in line.items() if k.startswith("validation_")} for line in read_metrics(run)]
    return next(filter(None, reversed(named)), {})


def _results(run: Path) -> tuple[dict[str, dict[str, Any]], str, str]:
    """Read what an evaluation in the run's folder found of its weights as they are now, on rows that no training saw.

    Returns:
        figures by task, of prompts as in training; the data's name; and in what way it asked unlike the default.
    """
    file = run / "evaluation" / "evaluation.json"
    report = json.loads(file.read_text()) if file.exists() else {"arguments": {}}
    arguments = report["arguments"]
    if report.get("steps") != steps_taken(run) or arguments.get("split") != "validation":
        return {}, "", ""
    found = {task: each for task, each in report["results"].get("trained", {}).items() if "correct" in each}
    how = f", the first {arguments['max_images']:,} images" if arguments["max_images"] else ""
    how += f", {arguments['beams']} beams" * (arguments["beams"] > 1)
    return found, ", ".join(_data_names(arguments["data"])), how


def _data_names(paths: Iterable[str]) -> list[str]:
    """Name data sets by their folders, of which, or of whose files, these are the paths."""
    named = map(Path, paths)
    return sorted({(path.parent if path.suffix else path).name or "." for path in named})
