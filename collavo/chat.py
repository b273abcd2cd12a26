"""Talk to a CoLLaVO model about an image: `python -m collavo.chat --model runs/collavo --image X.jpg`.

Reads:    a run directory or a whole model, and an image or a row of crayon data
Writes:   answers, and on request the crayon map that they rest on
Not here: how answers are made, see collavo/inference.py; the page, see collavo/chat_page.py
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import islice
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from collavo.cli import REQUIRED, flag, naming, parse, run
from collavo.errors import LeftOut, Rejected, UserError
from collavo.images import decode_rgb
from collavo.instructions.text import format_object
from collavo.panoptic.colors import crayon_color, crayon_overlay
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.segmenters import SEGMENTER_CHOICES, UNFAMILIAR, Segmenter, open_segmenter
from collavo.web import fetch, is_url

if TYPE_CHECKING:  # it loads torch, which --help does not need
    from collavo.inference import Conversation, Picture, Sampling
    from collavo.panoptic.maps import PanopticMap

_DESCRIPTION = """\
Ask a model about an image: one question with --prompt, or a conversation.
The image is a file or a URL (--image), which is segmented first; or a row of
crayon data (--data, --image_id), which has its map; or an upload to a page
(--gradio). The recognised objects are shown in the colours of their crayon map.

Or answer a file of questions (--questions), each a line of JSON with an image
and a question; an interrupted run goes on after the answers that are there."""

_COMMANDS = """\
  /image PATH   take another image
  /objects      list the recognised objects
  /map PATH     save the crayon map over the image
  /new          forget the conversation
  /quit         leave
  Ctrl-C        stop an answer; leave, where none grows"""

_EPILOG = f"""\
in a conversation:
{_COMMANDS}

examples:
  python -m collavo.chat --model runs/collavo --image street.jpg \\
      --prompt "What are the people doing?"
  python -m collavo.chat --model runs/collavo --data out/*.parquet \\
      --image_id images/scene-000007.jpg
  python -m collavo.chat --model runs/collavo --gradio
  python -m collavo.chat --model runs/collavo --questions questions.jsonl \\
      --answers answers.jsonl
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags:
    """What commands ask a model with: the model, its segmenter, and where they run."""

    model: str = flag(REQUIRED, "a run directory, or a whole model: folder or hub id", metavar="RUN")
    object_list: str = flag("trained", "whether prompts begin with the recognised objects (default: as the model was "
        "trained)", choices=("trained", "with", "none"), group="answers and segmenter")  # fmt: skip
    max_new_tokens: int = flag(512, "length of an answer at most", least=1)
    segmenter: str = flag("auto", "auto (transformers), none (nothing is recognised), transformers or detectron2",
        choices=SEGMENTER_CHOICES)  # fmt: skip
    segmenter_checkpoint: str | None = flag(None, "hub id, folder, or scenes for the embedded network, which knows "
        "drawn scenes only; for detectron2 a weights file (default: scenes for auto and a model made from --preset "
        "tiny, else the paper's)", metavar="ID_OR_PATH")  # fmt: skip
    segmenter_config: str | None = flag(None, "detectron2's config, of the model zoo or a file", metavar="YAML")
    segmenter_preset: str | None = flag(None, "transformers' thresholds: default, scenes for networks trained on drawn "
        "scenes, or paper for the authors' call (default: scenes for the embedded network, else default)",
        choices=THRESHOLD_PRESETS)  # fmt: skip
    segmenter_input_size: int | None = flag(None, "side of a square that transformers' network sees, into which "
        "pictures are squeezed (default: the checkpoint's own way)", kind=int, metavar="PIXELS", least=1)  # fmt: skip
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    quantize: bool | None = flag(None, "NF4 for the language model (default: as it was trained)", kind=bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags(ModelFlags):
    """The command line."""

    image: str | None = flag(None, "an image file or an http(s) URL, which is segmented", metavar="FILE",
        group="image and questions")  # fmt: skip
    data: tuple[str, ...] = flag((), "crayon files, to take image and map from a row", many=True, metavar="PARQUET")
    image_id: str | None = flag(None, "which row of --data", metavar="ID")
    image_root: Path | None = flag(None, "folder of the images, if the rows only refer to them, or that the images of "
        "--questions stand in", kind=Path, metavar="DIR")  # fmt: skip
    prompt: str | None = flag(None, "one question; without it a conversation", metavar="TEXT")
    questions: Path | None = flag(None, "a file of questions: a line of JSON each, with image, question (or prompt, "
        "or text) and perhaps more", kind=Path, metavar="JSONL")  # fmt: skip
    answers: Path | None = flag(None, "where the answers to --questions go, line by line", kind=Path, metavar="JSONL")
    batch_size: int = flag(16, "questions of --questions answered together", least=1)
    save_map: Path | None = flag(None, "save the crayon map over the image", kind=Path, metavar="PNG")
    beams: int = flag(1, "beams of the search; 1 for greedy decoding, 3 are the paper's", least=1)
    temperature: float = flag(0.0, "above 0, tokens are drawn at random, the likeliest less often the higher it is",
        least=0)  # fmt: skip
    top_p: float = flag(1.0, "draw among the likeliest tokens that sum up to this probability", least=0, most=1)
    seed: int = flag(0, "of what is drawn", least=0)
    gradio: bool = flag(False, "serve a page instead; needs pip install 'collavo[demo]'")
    port: int = flag(7860, "where the page is served", least=1, most=65535)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    usage = "python -m collavo.chat --model RUN --image FILE [options]"
    options = {"prog": "python -m collavo.chat", "usage": usage, "description": _DESCRIPTION, "epilog": _EPILOG}
    return run("collavo.chat", lambda: _chat(parse(Flags, argv, **options)))


def _chat(flags: Flags) -> None:
    _check(flags)
    if flags.questions:
        return _answer_file(flags)
    with naming("image"):  # before the model is loaded, which takes its time
        image = _read_image(flags.image) if flags.image else None
    session = _conversations(flags)
    if flags.gradio:
        from collavo.chat_page import serve

        with naming("port"):
            return serve(session.about_file, session.cautions, flags.port)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    conversation = session.about_row() if image is None else session.about(session.segmented(image))
    _show_objects(conversation.picture, session.cautions(conversation.picture.panoptic), console)
    if flags.save_map:
        with naming("save_map"):
            _save_map(conversation.picture, flags.save_map)
    with _memory(flags):
        if flags.prompt:
            _tell(conversation, flags.prompt)
        else:
            _converse(session, conversation, console)


def _check(flags: Flags) -> None:
    if bool(flags.data) != bool(flags.image_id):
        raise UserError("--data and --image_id go together: the files, and which of their rows is meant")
    sources = [name for name in ("image", "data", "questions", "gradio") if getattr(flags, name)]
    if len(sources) != 1:
        found = " and ".join(f"--{name}" for name in sources) or "none of them"
        raise UserError(f"one of --image, --data with --image_id, --questions, or --gradio is needed; given: {found}")
    if flags.gradio and find_spec("gradio") is None:
        raise UserError("--gradio needs gradio; pip install 'collavo[demo]' brings it")
    if bool(flags.questions) != bool(flags.answers):
        raise UserError("--questions and --answers go together: what is asked, and where the answers go")
    if flags.questions and flags.answers and flags.questions.resolve() == flags.answers.resolve():
        raise UserError(f"--answers {flags.answers}: is the file of the questions; name another one")
    for name in ("prompt", "save_map"):
        if getattr(flags, name) and (flags.questions or flags.gradio):
            raise UserError(f"--{name} is about a single picture; leave it out, or name the picture by --image")
    if flags.top_p < 1 and not flags.temperature:
        raise UserError("--top_p says among which tokens --temperature draws; give it a temperature above 0")
    if flags.temperature and flags.beams > 1:
        raise UserError("--temperature draws tokens at random, --beams searches the likeliest; choose one")


class Session:
    """A model and its segmenter, as the flags of a command say; the segmenter is loaded when it is first needed."""

    def __init__(self, flags: ModelFlags, beams: int = 1, sampling: Sampling | None = None) -> None:
        from collavo.device import resolve_device
        from collavo.inference import load_answerer

        self.flags = flags
        with naming("device"):
            device = resolve_device(flags.device)
        with naming("model"):
            self.answerer = load_answerer(flags.model, device, flags.quantize, beams, sampling)
        if line := self.answerer.untrained({"dialogues": "dialogue"}, flags.object_list):
            print(f"--object_list {flags.object_list}: {line}")

    @cached_property
    def segmenter(self) -> Segmenter:
        from collavo.runs import base_of

        flags = self.flags
        with naming("segmenter"):
            return open_segmenter(
                flags.segmenter,
                flags.device,
                checkpoint=flags.segmenter_checkpoint,
                config=flags.segmenter_config,
                preset=flags.segmenter_preset,
                input_size=flags.segmenter_input_size,
                base=base_of(flags.model),
            )

    def segmented(self, image: np.ndarray) -> Picture:
        """Make the map of an image, uint8 RGB [height, width, 3]."""
        from collavo.inference import Picture

        return Picture(image, self.segmenter.segment([image])[0])

    def cautions(self, panoptic: PanopticMap) -> list[str]:
        """Say, a sentence each, why what was recognised in a picture is to be trusted less."""
        said = [UNFAMILIAR] if panoptic.unfamiliar else []
        unknown = set(self.answerer.without_query(panoptic.categories))
        names = unknown & {panoptic.categories[segment.label].display_name for segment in panoptic.segments}
        return said + [f"The model has no query for: {', '.join(sorted(names))}."] * bool(names)

    @property
    def lists_objects(self) -> bool:
        """Whether prompts begin with the recognised objects."""
        return self.answerer.lists_objects("dialogue", self.flags.object_list)


class _Conversations(Session):
    """Conversations about the pictures that a command line or a user names."""

    flags: Flags

    def about(self, picture: Picture) -> Conversation:
        from collavo.inference import Conversation

        return Conversation(self.answerer, picture, self.lists_objects, self.flags.max_new_tokens)

    def about_file(self, path: str) -> Conversation:
        """Segment an image file, and start a conversation about it.

        Raises:
            UserError: if it cannot be read.
        """
        return self.about(self.segmented(_read_image(path)))

    def about_row(self) -> Conversation:
        """Start a conversation about the row that the flags name, with the row's own map."""
        from collavo.dataset import category_set, find_files, read_rows
        from collavo.inference import picture_of_row

        flags = self.flags
        with naming("data"):
            files = find_files(flags.data)
            damaged = LeftOut()
            row = next(read_rows(files, left_out=damaged, image_id=flags.image_id), None)
            if row is None:
                other = next(read_rows(files, left_out=damaged), None)
                known = f"; there is one of {other.image_id}" if other else ""
                left_out = "".join(f"; left out: {line}" for line in damaged.lines())
                raise UserError(f"there is no row of --image_id {flags.image_id}{known}{left_out}")
            try:
                return self.about(picture_of_row(row, flags.image_root, category_set(files)))
            except Rejected as error:
                raise UserError(f"image of {row.image_id}: {error}") from error


def _answer_file(flags: Flags) -> None:
    """Answer the questions of a file that have no answer yet."""
    from collavo.dataset import decoded_image
    from collavo.progress import Progress
    from collavo.question_file import QuestionAnswerer, count_answers, count_questions, read_questions

    assert flags.questions is not None and flags.answers is not None
    with naming("questions"):
        total = count_questions(flags.questions)
    with naming("answers"):
        done, unanswered = count_answers(flags.questions, flags.answers)
    left_out, cautions = LeftOut(), Counter[str]()
    if done < total:
        session = _conversations(flags)

        def segment(images: Sequence[np.ndarray]) -> Sequence[PanopticMap]:
            maps = session.segmenter.segment(images)
            for panoptic in maps:
                cautions.update(session.cautions(panoptic))
            return maps

        def read_image(name: str) -> np.ndarray:
            if flags.image_root is None:
                return _read_image(name)
            with naming("image_root"):
                return decoded_image(name, None, flags.image_root)

        answerer = QuestionAnswerer(
            session.answerer,
            segment,
            read_image,
            flags.object_list,
            flags.max_new_tokens,
            flags.batch_size,
        )
        console = Console(stderr=True)
        with Progress(console, transient=True) as progress, _memory(flags), naming("answers"):
            bar = progress.add("Answering", total, done)
            remaining = islice(read_questions(flags.questions), done, None)
            for number, of_batch in enumerate(answerer.answer(remaining, flags.answers), start=1):
                left_out.merge(of_batch)
                progress.update(bar, min(done + number * flags.batch_size, total))
    for line in (*left_out.lines(), *(f"of {count:,} pictures: {said}" for said, count in cautions.items())):
        print(line)
    before = f"; an earlier run, of whichever model, took the first {done:,}" if done else ""
    unanswered += left_out.counts.total()
    if unanswered == total:
        raise UserError(f"none of {total:,} questions answered{before}: {flags.answers}; remove it to try again", 1)
    said = f"{total - unanswered:,} of {total:,}" if unanswered else f"{total:,}"
    print(f"{said} questions answered{before}: {flags.answers}")


def _read_image(path: str) -> np.ndarray:
    try:
        return decode_rgb(fetch(path) if is_url(path) else Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except Rejected as error:
        raise UserError(f"{path}: {error}") from error


def _conversations(flags: Flags) -> _Conversations:
    from collavo.inference import Sampling

    if not flags.temperature:
        return _Conversations(flags, flags.beams)
    import torch

    torch.manual_seed(flags.seed)
    return _Conversations(flags, flags.beams, Sampling(flags.temperature, flags.top_p))


def _memory(flags: Flags) -> AbstractContextManager[None]:
    from collavo.device import memory_named

    shorter = f"--batch_size below {flags.batch_size}" if flags.questions else "fewer --max_new_tokens"
    return memory_named(f"{shorter}, fewer --beams, or --quantize")


def _converse(session: _Conversations, conversation: Conversation, console: Console) -> None:
    """Take questions and commands from the terminal until the user leaves."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not UTF-8 is refused, and the next one read
        sys.stdin.reconfigure(errors="surrogateescape")
    console.print(_COMMANDS, style="dim")
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
            command, _, argument = line.partition(" ")
            argument = expanduser(argument.strip())  # as a shell does it for --image
            match command:
                case "":
                    continue
                case "/quit":
                    return
                case "/image" | "/map" if not argument:
                    raise UserError(f"{command} needs the name of a file, such as picture.png")
                case "/image":
                    conversation = session.about_file(argument)
                    _show_objects(conversation.picture, session.cautions(conversation.picture.panoptic), console)
                case "/new":
                    conversation = session.about(conversation.picture)
                case "/objects":
                    console.print(_objects_shown(conversation.picture))
                case "/map":
                    _save_map(conversation.picture, Path(argument))
                    console.print(f"Saved: {argument}")
                case _ if command.startswith("/"):
                    console.print(f"{command} is none of the commands:\n{_COMMANDS}", style="dim")
                case _:
                    try:
                        _tell(conversation, line)
                    except KeyboardInterrupt:
                        console.print("\n(The answer was stopped, and its question is forgotten.)", style="dim")
        except (EOFError, KeyboardInterrupt):
            return
        except UserError as error:
            console.print(str(error), style="red")


def _tell(conversation: Conversation, question: str) -> None:
    """Print an answer while it grows."""
    forgotten = conversation.forgotten
    conversation.ask(question, lambda text: print(text, end="", flush=True))
    print()
    if conversation.forgotten > forgotten:
        print(f"(The first {conversation.forgotten} questions and answers no longer fit the model, and are forgotten.)")


def _show_objects(picture: Picture, cautions: Sequence[str], console: Console) -> None:
    """Print what was recognised, and how far that can be trusted."""
    console.print(_objects_shown(picture))
    for caution in cautions:
        console.print(caution, style="yellow")


def _objects_shown(picture: Picture) -> Text:
    """List the objects of a picture, each behind a patch of its crayon colour."""
    shown = Text()
    for segment in picture.panoptic.segments:
        category = picture.panoptic.categories[segment.label]
        red, green, blue = crayon_color(category, segment.numbering)
        shown.append("■ ", style=f"rgb({red},{green},{blue})").append(f"{format_object(segment)} ")
    return shown or Text("Nothing was recognised.")


def _save_map(picture: Picture, path: Path) -> None:
    try:
        Image.fromarray(crayon_overlay(picture.image, picture.panoptic)).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the map cannot be saved there ({error}); name a .png file in a folder") from error


if __name__ == "__main__":
    raise SystemExit(main())
