"""The command `python -m collavo.import_base`."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from collavo.cli import Parser
from collavo.errors import UserError
from collavo.import_base.assemble import assemble_from_llava, assemble_from_parts
from collavo.import_base.release import load_release
from collavo.model.prompt import CHAT_FORMATS

_DESCRIPTION = """\
Make a CoLLaVO model from published checkpoints, each a folder or a hub id:

  --llava                  a LLaVA checkpoint in transformers' layout; its
                           projector stays
  --vision and --language  a CLIP vision encoder, and a language model: Llama,
                           Mistral, Qwen 2 and 3, InternLM 1 to 3; the projector
                           between them is new and has to be trained
  --release                the authors' CoLLaVO-7B, which adds the crayon signal
                           through low-rank branches

The Crayon Prompt of the first two is new. It starts closed, so that the model
answers as it did until it is trained."""

_EPILOG = """\
What is written is a whole model: config.json, model*.safetensors, tokenizer,
processor. python -m collavo.train --preset DIR starts from it, and
CollavoForConditionalGeneration.from_pretrained(DIR) loads it.

No code of a checkpoint is run. Tensors are read from safetensors, or
where there are none from pytorch_model*.bin, of which nothing but tensors is
unpickled.

examples:
  python -m collavo.import_base --llava llava-hf/llava-1.5-7b-hf \\
      --chat_format vicuna --output models/llava
  python -m collavo.import_base --vision openai/clip-vit-large-patch14-336 \\
      --language internlm/internlm2-7b --output models/internlm2
  python -m collavo.import_base --release BK-Lee/CoLLaVO-7B --output models/collavo"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m collavo.import_base",
        usage="python -m collavo.import_base CHECKPOINTS --output DIR [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, type=Path, help="where the model goes; a new or empty folder")
    add("--llava", metavar="ID_OR_DIR", help="a LLaVA checkpoint")
    add("--vision", metavar="ID_OR_DIR", help="a CLIP vision encoder")
    add("--language", metavar="ID_OR_DIR", help="a language model")
    add("--release", metavar="ID_OR_DIR", help="CoLLaVO-7B")
    add("--image_size", metavar="PIXELS", type=int, default=490, help="a multiple of the patch size (default: 490)")
    add(
        "--chat_format",
        choices=sorted(CHAT_FORMATS),
        help="how the language model converses (default: as its own template says)",
    )
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights (default: bfloat16)")
    add("--overwrite", action="store_true", help="replace the model that an earlier run left in the folder")
    flags = parser.parse_args(argv)
    given = [name for name in ("llava", "vision", "language", "release") if getattr(flags, name)]
    if given not in (["llava"], ["vision", "language"], ["release"]):
        found = ", ".join(f"--{name}" for name in given) or "none"
        parser.error(f"one of --llava, --vision with --language, or --release is needed; given: {found}")
    if problem := _unusable(flags.output, flags.overwrite):
        parser.error(f"--output {flags.output}: {problem}")

    torch.manual_seed(0)  # for what is new
    options = {"image_size": flags.image_size, "dtype": getattr(torch, flags.dtype)}
    if flags.chat_format:
        options["chat_format"] = flags.chat_format
    try:
        if flags.llava:
            model, processor = assemble_from_llava(flags.llava, **options)
        elif flags.release:
            model, processor = load_release(flags.release, **options)
        else:
            model, processor = assemble_from_parts(flags.vision, flags.language, **options)
    except UserError as error:
        parser.error(f"--{error}")
    partial = flags.output.with_name(f".{flags.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size="5GB")
    processor.save_pretrained(partial)
    if flags.output.exists():
        shutil.rmtree(flags.output)
    partial.rename(flags.output)
    print(f"{flags.output}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters", file=sys.stderr)


def _unusable(output: Path, overwrite: bool) -> str | None:
    """Why a model cannot go there; nothing but an earlier model is ever replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / "config.json").is_file() or '"collavo"' not in (output / "config.json").read_text(
        errors="replace"
    ):
        return "holds something that is no CoLLaVO model; name a new or empty folder"
    return None if overwrite else "holds a model already; name another folder, or give --overwrite"


if __name__ == "__main__":
    main()
