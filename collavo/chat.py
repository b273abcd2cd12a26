"""Talk to a CoLLaVO model about an image: `python -m collavo.chat --model runs/collavo --image X.jpg`.

Reads:    a run directory or a whole model, and an image or a row of crayon data
Writes:   answers, and on request the crayon map that they rest on
Not here: how answers are made, see collavo/inference.py; the page, see collavo/chat_page.py
"""

import argparse
import sys
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text
from transformers import TextStreamer

from collavo.cli import Parser
from collavo.dataset import find_files, read_rows
from collavo.device import resolve_device
from collavo.errors import Rejected, UserError
from collavo.images import decode_rgb
from collavo.inference import Answerer, Request, load_answerer
from collavo.instructions.text import format_object
from collavo.panoptic.colors import crayon_color
from collavo.panoptic.thresholds import PRESETS
from collavo.pictures import (
    SEGMENTER_CHOICES,
    Picture,
    colored,
    open_segmenter,
    picture_of_row,
    segmented,
)
from collavo.runs import base_of
from collavo.segmenters import Segmenter

_DESCRIPTION = """\
Ask a model about an image, once with --prompt, or in a conversation without it.
The image is a file (--image), which is segmented first, a row of crayon data
(--data, --image_id), which has its map, or what is dropped on a page
(--gradio). What was recognised is shown in the colours of its crayon map."""

_COMMANDS = """\
  /image PATH   another image
  /objects      what was recognised
  /map PATH     save the crayon map over the image
  /new          forget the conversation
  /quit         leave"""

_EPILOG = f"""\
in a conversation:
{_COMMANDS}

examples:
  python -m collavo.chat --model runs/collavo --image street.jpg \\
      --prompt "What are the people doing?"
  python -m collavo.chat --model runs/collavo --data out/*.parquet \\
      --image_id images/scene-000007
  python -m collavo.chat --model runs/collavo --gradio
"""


class Conversation:
    """Turns about one picture.

    Args:
        with_objects: whether the first question is preceded by what was recognised.
    """

    def __init__(self, answerer: Answerer, picture: Picture, with_objects: bool, max_new_tokens: int) -> None:
        self.picture = picture
        self._answerer = answerer
        self._objects = picture.objects if with_objects else None
        self._max_new_tokens = max_new_tokens
        self._turns: list[tuple[str, str]] = []

    def ask(self, question: str, streamer: Any = None) -> str:
        """The answer, in view of all that was said before; `streamer` as in `Answerer.answer`."""
        turns = [*self._turns, ("human", question)]
        request = Request(0, turns, self._objects, self._max_new_tokens)
        answer = self._answerer.answer([self.picture], [request], streamer=streamer)[0]
        self._turns = [*turns, ("gpt", answer)]
        return answer


class Chat:
    """What a command line asks for: a model, pictures, and conversations about them."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags = flags
        self.answerer = load_answerer(flags.model, resolve_device(flags.device), flags.quantize, flags.beams)

    @cached_property
    def _segmenter(self) -> Segmenter:
        """Loaded when it is first needed: rows of crayon data come with their maps."""
        flags = self._flags
        return open_segmenter(
            flags.segmenter,
            flags.device,
            checkpoint=flags.segmenter_checkpoint,
            config=flags.segmenter_config,
            preset=flags.segmenter_preset,
            input_size=flags.segmenter_input_size,
            base=base_of(flags.model),
        )

    def about(self, picture: Picture) -> Conversation:
        listed = self.answerer.lists_objects("dialogue", self._flags.object_list)
        return Conversation(self.answerer, picture, listed, self._flags.max_new_tokens)

    def about_file(self, path: str) -> Conversation:
        """A conversation about an image file, segmented here.

        Raises:
            UserError: where it cannot be read.
        """
        try:
            image = decode_rgb(Path(path).read_bytes())
        except (OSError, Rejected) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--image {path}: {reason}") from error
        return self.about(segmented(image, self._segmenter))

    def about_row(self, files: Sequence[Path], image_id: str, image_root: Path | None) -> Conversation:
        """A conversation about an image of a data set, with the map it has there.

        Raises:
            UserError: where there is none of that id.
        """
        row = next((row for row in read_rows(files) if row.image_id == image_id), None)
        if row is None:
            raise UserError(f"--image_id {image_id}: --data has no such row")
        return self.about(picture_of_row(row, image_root))


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for what it was given."""
    flags = _build_parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        _check(flags)
        files = find_files(flags.data) if flags.data else []
        chat = Chat(flags)
        if flags.gradio:
            from collavo.chat_page import serve

            serve(chat.about_file, flags.port)
            return 0
        conversation = (
            chat.about_row(files, flags.image_id, flags.image_root) if files else chat.about_file(flags.image)
        )
        console.print(_objects_shown(conversation.picture))
        if flags.save_map:
            _save_map(conversation.picture, flags.save_map)
        if flags.prompt:
            _tell(conversation, flags.prompt, chat.answerer, console)
        else:
            _converse(chat, conversation, console)
    except UserError as error:
        print(f"collavo.chat: error: {error}", file=sys.stderr)
        return 2
    return 0


def _converse(chat: Chat, conversation: Conversation, console: Console) -> None:
    """Questions and commands from the terminal, until the user leaves."""
    console.print(_COMMANDS, style="dim")
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
            command, _, argument = line.partition(" ")
            match command:
                case "":
                    continue
                case "/quit":
                    return
                case "/image":
                    conversation = chat.about_file(argument.strip())
                    console.print(_objects_shown(conversation.picture))
                case "/new":
                    conversation = chat.about(conversation.picture)
                case "/objects":
                    console.print(_objects_shown(conversation.picture))
                case "/map":
                    _save_map(conversation.picture, Path(argument.strip()))
                case _ if command.startswith("/"):
                    console.print(_COMMANDS, style="dim")
                case _:
                    _tell(conversation, line, chat.answerer, console)
        except (EOFError, KeyboardInterrupt):
            return
        except UserError as error:
            console.print(str(error), style="red", markup=False)


def _tell(conversation: Conversation, question: str, answerer: Answerer, console: Console) -> None:
    """Print an answer as it grows; a beam search knows it at the end only."""
    if answerer.beams == 1:
        tokenizer: Any = answerer.processor.tokenizer
        conversation.ask(question, _AnswerStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    else:
        console.print(conversation.ask(question), markup=False)


class _AnswerStreamer(TextStreamer):
    """Without the space that an answer begins with."""

    _begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        shown = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(shown)
        super().on_finalized_text(shown, stream_end)


def _objects_shown(picture: Picture) -> Text:
    """The objects of a picture, each behind a patch of its crayon colour."""
    shown = Text()
    for segment in picture.panoptic.segments:
        red, green, blue = crayon_color(segment.label, segment.numbering)
        shown.append("■ ", style=f"rgb({red},{green},{blue})").append(f"{format_object(segment)} ")
    return shown or Text("Nothing was recognised.")


def _save_map(picture: Picture, path: Path) -> None:
    try:
        Image.fromarray(colored(picture)).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"the map cannot be saved as {path} ({error}); name a .png file in a folder") from error


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m collavo.chat",
        usage="python -m collavo.chat --model RUN IMAGE [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--model", metavar="RUN", required=True, help="a run directory, or a whole model: folder or hub id")
    add("--image", metavar="FILE", help="the image, segmented here")
    add("--data", metavar="PARQUET", nargs="+", help="crayon files, to take image and map from a row")
    add("--image_id", metavar="ID", help="which row of --data")
    add("--image_root", metavar="DIR", type=Path, help="where rows that refer to their image find it")
    add("--prompt", metavar="TEXT", help="one question; without it a conversation")
    add("--save_map", metavar="PNG", type=Path, help="save the crayon map over the image")
    add("--object_list", choices=("trained", "with", "none"), default="trained",
        help="whether prompts begin with the recognised objects (default: as the model was trained)")  # fmt: skip
    add("--max_new_tokens", metavar="N", type=int, default=512, help="length of an answer at most (default: 512)")
    add("--beams", type=int, choices=(1, 3), default=1, help="1 for greedy decoding, 3 as in the paper (default: 1)")
    add("--segmenter", choices=SEGMENTER_CHOICES, default="auto",
        help="auto (mask2former), none (nothing is recognised), mask2former or detectron2 (default: auto)")  # fmt: skip
    add("--segmenter_checkpoint", metavar="ID_OR_PATH",
        help="hub id, folder, or scenes for the embedded network, which knows drawn scenes only; for detectron2 a "
        "weights file (default: scenes for auto and a model made from --preset tiny, else the paper's)")  # fmt: skip
    add("--segmenter_config", metavar="YAML", help="detectron2's config, of the model zoo or a file")
    add("--segmenter_preset", choices=tuple(PRESETS),
        help="mask2former's thresholds: default, scenes for networks trained on drawn scenes, or paper for the "
        "authors' call (default: scenes for the embedded network, else default)")  # fmt: skip
    add("--segmenter_input_size", metavar="PIXELS", type=int,
        help="side of the square that mask2former sees (default: 320x256 for scenes, else 768)")  # fmt: skip
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--quantize", action=argparse.BooleanOptionalAction, default=None,
        help="NF4 for the language model (default: as it was trained)")  # fmt: skip
    add("--gradio", action="store_true", help="serve a page instead; needs pip install 'collavo[demo]'")
    add("--port", metavar="N", type=int, default=7860, help="where the page is served (default: 7860)")
    return parser


def _check(flags: argparse.Namespace) -> None:
    sources = [name for name in ("image", "data", "gradio") if getattr(flags, name)]
    if len(sources) != 1:
        found = " and ".join(f"--{name}" for name in sources) or "none of them"
        raise UserError(f"one of --image, --data with --image_id, or --gradio is needed; given: {found}")
    if flags.gradio and find_spec("gradio") is None:
        raise UserError("--gradio needs gradio; pip install 'collavo[demo]' brings it")
    if bool(flags.data) != bool(flags.image_id):
        raise UserError("--data and --image_id go together: the files, and which of their rows is meant")
    if flags.image and not Path(flags.image).is_file():
        raise UserError(f"--image {flags.image}: there is no such file")
    if flags.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {flags.max_new_tokens}, but must be at least 1")


if __name__ == "__main__":
    raise SystemExit(main())
