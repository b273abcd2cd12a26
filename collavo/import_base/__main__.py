"""The command `python -m collavo.import_base`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from collavo.cli import REQUIRED, flag, output_folder, parse, run
from collavo.errors import UserError

_DESCRIPTION = """\
Make a CoLLaVO model from published checkpoints, each a folder or a hub id:

  --llava                  a LLaVA checkpoint, in transformers' layout or, of
                           LLaVA-1.5, in its authors'; its projector stays.
                           The latter's vision encoder is the one that it
                           names, or that of --vision
  --vision and --language  a vision encoder, CLIP or SigLIP 1 or 2, and a
                           language model: Llama, Mistral, Qwen 2 and 3,
                           InternLM 1 to 3; the projector between them is new,
                           and collavo.train begins with it (--phase align)
  --release                the authors' CoLLaVO-7B, which adds the crayon signal
                           through low-rank branches

The Crayon Prompt of the first two is new. It starts without effect, so that the
model answers as before until it is trained."""

_EPILOG = """\
The command writes a whole model: config.json, model*.safetensors, tokenizer,
processor. python -m collavo.train --preset DIR starts from it, and
CollavoForConditionalGeneration.from_pretrained(DIR) loads it.

No code of a checkpoint is run. Tensors are read from safetensors; where there
are none, from pytorch_model*.bin, of which only tensors are unpickled.

examples:
  python -m collavo.import_base --llava llava-hf/llava-1.5-7b-hf \\
      --chat_format vicuna --output models/llava
  python -m collavo.import_base --vision openai/clip-vit-large-patch14-336 \\
      --language internlm/internlm2-7b --output models/internlm2
  python -m collavo.import_base --release BK-Lee/CoLLaVO-7B --output models/collavo"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The command line."""

    output: Path = flag(REQUIRED, "where the model goes; a new or empty folder", kind=Path, metavar="DIR")
    llava: str | None = flag(None, "a LLaVA checkpoint", metavar="ID_OR_DIR")
    vision: str | None = flag(None, "a vision encoder: CLIP, SigLIP or SigLIP 2", metavar="ID_OR_DIR")
    language: str | None = flag(None, "a language model", metavar="ID_OR_DIR")
    release: str | None = flag(None, "CoLLaVO-7B", metavar="ID_OR_DIR")
    image_size: int | None = flag(None, "a multiple of the patch size (default: 490 with CLIP; SigLIP's own)", kind=int,
        metavar="PIXELS", least=1)  # fmt: skip
    chat_format: str | None = flag(None, "how the language model converses, such as vicuna or chatml (default: as its "
        "own template says)")  # fmt: skip
    dtype: str = flag("bfloat16", "of the weights", choices=("bfloat16", "float32"))
    overwrite: bool = flag(False, "replace the model that an earlier run left in the folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    usage = "python -m collavo.import_base CHECKPOINTS --output DIR [options]"
    options = {"prog": "python -m collavo.import_base", "usage": usage, "description": _DESCRIPTION, "epilog": _EPILOG}
    return run("collavo.import_base", lambda: _import(parse(Flags, argv, **options)))


def _import(flags: Flags) -> None:
    given = [name for name in ("llava", "vision", "language", "release") if getattr(flags, name)]
    if given not in (["llava"], ["llava", "vision"], ["vision", "language"], ["release"]):
        found = ", ".join(f"--{name}" for name in given) or "none"
        raise UserError(f"one of --llava, --vision with --language, or --release is needed; given: {found}")
    _check_output(flags.output, flags.overwrite)

    import torch

    from collavo.import_base.assemble import assemble_from_llava, assemble_from_parts
    from collavo.import_base.release import load_release
    from collavo.model_card import write_base_card

    torch.manual_seed(0)  # for new weights
    options = {"image_size": flags.image_size, "chat_format": flags.chat_format, "dtype": getattr(torch, flags.dtype)}
    with output_folder(flags.output) as folder:
        try:
            if flags.llava:
                model, processor = assemble_from_llava(flags.llava, flags.vision, **options)
            elif flags.release:
                model, processor = load_release(flags.release, **options)
            else:
                model, processor = assemble_from_parts(str(flags.vision), str(flags.language), **options)
        except UserError as error:  # it begins with the argument, which is called like its flag
            raise UserError(f"--{error}") from error
        model.save_pretrained(folder, max_shard_size="5GB")
        processor.save_pretrained(folder)
        names = {"llava": "LLaVA", "release": "CoLLaVO", "vision": "vision encoder", "language": "language model"}
        sources = {title: getattr(flags, name) for name, title in names.items() if getattr(flags, name)}
        write_base_card(folder, flags.output.resolve().name, sources)
    if processor.chat_format == "paper" and not (flags.chat_format or flags.release):
        print(
            "prompts: in the format paper, for the language model has no chat template known here; --chat_format names "
            "another"
        )
    print(f"{flags.output}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters")


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse a folder with content, but for an earlier model that may be replaced."""
    if not output.is_dir() or not any(output.iterdir()):
        return
    config = output / "config.json"
    if not config.is_file() or '"collavo"' not in config.read_text(errors="replace"):
        raise UserError(f"--output {output}: is no CoLLaVO model; name a new or empty folder")
    if not overwrite:
        raise UserError(f"--output {output}: holds a model already; name another folder, or give --overwrite")


if __name__ == "__main__":
    raise SystemExit(main())
