"""The console script `collavo`: one name for all commands. What a command needs is imported when it is chosen."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from collavo import __version__


class _Command(NamedTuple):
    module: str
    says: str


COMMANDS = {
    "build": _Command("pipelines.command", "build crayon instruction data out of images"),
    "train": _Command("collavo.train", "train a model on crayon data with Dual QLoRA"),
    "evaluate": _Command("collavo.evaluate", "measure a model on crayon data"),
    "chat": _Command("collavo.chat", "ask a model about a picture, in the terminal or a browser"),
    "serve": _Command("collavo.serve", "serve a model over HTTP to OpenAI's clients"),
    "train-segmenter": _Command("collavo.train_segmenter", "teach a segmenter classes of your own"),
    "export-model": _Command("collavo.export_model", "write a trained model as one folder for transformers"),
    "export-data": _Command("collavo.export_data", "write crayon data in the formats of other trainers"),
    "import-base": _Command("collavo.import_base.__main__", "make a base model out of published checkpoints"),
    "scenes": _Command("collavo.scenes.__main__", "draw sample scenes with exact annotations"),
}
"""The commands by name; `main` of the module takes the rest of the command line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands, and return its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: collavo COMMAND [flags]\n")
        for known, command in COMMANDS.items():
            print(f"  {known:<16}{command.says}")
        print("\ncollavo COMMAND --help lists the flags of a command; collavo --version prints the version")
        return 0
    if name == "--version":
        print(f"collavo {__version__}")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {nearest[0]}?" if nearest else "collavo --help lists the commands"
        print(f"collavo: error: unknown command {name}; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name].module).main(rest) or 0
