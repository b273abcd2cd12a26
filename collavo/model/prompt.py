"""The prompt protocol: how a conversation about an image becomes token ids, and which of them are supervised.

One function renders for training, evaluation and chat, so that a model is asked in the way it was taught. The image
comes first, wherever `<image>` stands in the data. The loss covers each answer and the stop after it, nothing else.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.text import Text

from collavo.errors import Rejected
from schemas.crayon_row import IMAGE_TOKEN

Kind = Literal["crayon", "dialogue", "caption"]
"""The kinds of text that a model learns from: instructions about a crayon map, free dialogues, and captions, which are
the first question of a dialogue about an image and its answer. The kind decides which weights learn, and whether the
prompt begins with the object list."""

KINDS: tuple[Kind, ...] = ("crayon", "dialogue")
"""The kinds that instruction tuning mixes. Alignment alone uses captions."""

LISTED: Mapping[str, tuple[Kind, ...]] = {"all": KINDS, "dialogues": ("dialogue",), "none": ()}
"""Kinds of texts whose prompts begin with the recognised objects, by the `object_list` argument of training."""

Turns = Sequence[tuple[str, str]]
"""(`human` | `gpt`, text) in turn, beginning with human, before which a `system` turn may stand; a human turn at the
end asks for an answer."""


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The texts between the parts of a conversation, as a language model knows them."""

    opening: str
    """Before the image."""

    after_image: str
    """Between the image and the first question."""

    answer_open: str
    """Between a question and its answer."""

    stop: str
    """After an answer; empty for the tokenizer's end-of-sequence token."""

    question_open: str
    """Between the stop and the next question."""

    answer_lead: str = ""
    """The beginning of an answer: a space after `Assistant:`, which tokenizers make part of the first word. It belongs
    to the answer: a prompt that ended in a space would end in a token that never stood there in training."""

    system: str = ""
    """The system text, at the very beginning, where a conversation brings none of its own."""

    system_form: str = "{} "
    """How a conversation's own system text is written there."""

    @classmethod
    def of(cls, named: "str | Mapping[str, str]") -> "ChatFormat":
        """Take the format of a name, one of `CHAT_FORMATS`, or of these fields."""
        return CHAT_FORMATS[named] if isinstance(named, str) else cls(**named)


_RELEASE_SYSTEM = "AI assistant should give helpful and detailed answers to user after fully understanding an image. "
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

_CHATML = ChatFormat(
    "<|im_start|>user\n",
    "\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>",
    "\n<|im_start|>user\n",
    system_form="<|im_start|>system\n{}<|im_end|>\n",
)

CHAT_FORMATS: Mapping[str, ChatFormat] = {
    # Paper, figure 4: `User: {question} Assistant: {answer}<stop>`, the image in front.
    "paper": ChatFormat("User: ", "\n", " Assistant:", "", "User: ", " "),
    # The authors' release: a system sentence and the image, then InternLM2's markers.
    "collavo_release": ChatFormat(
        "",
        " [UNUSED_TOKEN_146]user\n",
        "[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
        "[UNUSED_TOKEN_145]",
        "\n[UNUSED_TOKEN_146]user\n",
        system=_RELEASE_SYSTEM,
    ),
    "vicuna": ChatFormat("USER: ", "\n", " ASSISTANT:", "", "USER: ", " ", _VICUNA_SYSTEM),
    "chatml": _CHATML,
    # Qwen 3 with its thinking off: each answer is preceded by a thought that is empty. Of its own template's history,
    # which has none, this differs from the second answer on; in return, each answer is asked for as it was trained.
    "qwen3": replace(_CHATML, answer_open=f"{_CHATML.answer_open}<think>\n\n</think>\n\n"),
    "llama3": ChatFormat(
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        system_form="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    ),
    "mistral": ChatFormat("[INST] ", "\n", " [/INST]", "", "[INST] ", " "),
}
"""By name; `chatml` serves Qwen 2 and InternLM2/3 chat models."""

_MARKERS = {
    "enable_thinking": "qwen3",
    "<|im_start|>": "chatml",
    "<|start_header_id|>": "llama3",
    "[INST]": "mistral",
    "ASSISTANT:": "vicuna",
}

_CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

_OBJECTS_KNOWN = "The image includes {objects}. "
_OBJECTS_UNKNOWN = "None of detailed object information for image. "
"""The sentence before a question in the authors' release, with and without recognised objects; word for word."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Token ids, and whether the loss covers each of them. The image token is repeated for every cell of the grid."""

    input_ids: list[int]
    supervised: list[bool]

    @property
    def labels(self) -> list[int]:
        """The ids where supervised, -100 elsewhere, which PyTorch's cross entropy ignores."""
        return [i if s else -100 for i, s in zip(self.input_ids, self.supervised, strict=True)]


def render_conversation(
    tokenizer: Any, chat_format: ChatFormat, turns: Turns, image_tokens: int, objects: str | None = None
) -> RenderedPrompt:
    """Render a conversation about one image, or about none.

    Args:
        tokenizer: a fast tokenizer that knows `<image>` as one token.
        image_tokens: cells of the vision encoder's grid; 0 for a conversation without an image.
        objects: the object list that precedes the first question; empty for the phrase that says there is none, None
            for neither.

    Raises:
        Rejected: if the turns do not alternate, beginning with `human`.
    """
    # The text is tokenized in one piece, since pieces tokenized apart may join to other tokens than the whole. Which
    # tokens belong to an answer, and which come from the data, is then told by the characters they came from.
    pieces = _compose(tokenizer, chat_format, turns, objects, image_tokens > 0)
    text = "".join(piece.text for piece in pieces)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = list(accumulate(len(piece.text) for piece in pieces))
    control = _control_tokens(tokenizer, len(tokenizer))
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    input_ids: list[int] = []
    supervised: list[bool] = []
    for token_id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        piece = pieces[min(bisect_right(ends, start), len(pieces) - 1)]
        if token_id not in control or not piece.is_data:
            ids = [token_id] * (image_tokens if token_id == image_token_id else 1)
        else:  # what data or a user wrote is text, whatever it looks like; character by character it is no marker
            ids = [i for character in text[start:end] for i in _ids_within(tokenizer, character)]
        input_ids += ids
        supervised += [piece.supervised and end > start] * len(ids)
    return RenderedPrompt(input_ids, supervised)


def _ids_within(tokenizer: Any, character: str) -> list[int]:
    """Tokenize a character as it stands within a text, where sentencepiece puts no space before it."""
    before, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", f"\n{character}"))
    ids: list[int] = both[len(before) :]
    return ids


def chat_template(tokenizer: Any, chat_format: ChatFormat) -> str:
    """Write a chat format as the Jinja template of transformers' processors; it renders what we render ourselves.

    Messages are those of transformers' chats. Beside blocks of the types `text` and `image`, one of the type `objects`
    is understood: its text, see `objects_sentence`, stands before the first question.
    """
    texts = {
        "BOS": first_token(tokenizer),
        "IMAGE": IMAGE_TOKEN,
        "SYSTEM": chat_format.system,
        "SYSTEM_FORM": chat_format.system_form,
        "OPENING": chat_format.opening,
        "AFTER_IMAGE": chat_format.after_image,
        "AFTER_NO_IMAGE": chat_format.after_image.lstrip(),
        "ANSWER_OPEN": chat_format.answer_open,
        "ANSWER_LEAD": chat_format.answer_lead,
        "STOP": chat_format.stop or tokenizer.eos_token or "",
        "QUESTION_OPEN": chat_format.question_open,
    }
    rest = _CHAT_TEMPLATE.read_text(encoding="utf-8")
    return "".join(f"{{%- set {name} = {text!r} -%}}\n" for name, text in texts.items()) + rest


def objects_sentence(objects: str) -> str:
    """Write what stands before the first question, of recognised objects, or of none."""
    return _OBJECTS_KNOWN.format(objects=objects) if objects else _OBJECTS_UNKNOWN


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, size: int) -> frozenset[int]:
    """Return the ids of a tokenizer's added tokens, which it finds in any text; `size` tells when one was added."""
    return frozenset(tokenizer.get_added_vocab().values())


def chat_format_of(template: str) -> str:
    """Name the chat format whose markers stand in a checkpoint's chat template; `paper` where none do."""
    return next((name for marker, name in _MARKERS.items() if marker in template), "paper")


def show_supervision(tokenizer: Any, prompt: RenderedPrompt, in_color: bool = True) -> Text:
    """Show a rendered prompt: supervised tokens in green, or between >> and << without colours; the image's tokens as
    one."""
    shown, before, decoded = Text(), "", list[int]()
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    pairs = zip(prompt.input_ids, prompt.supervised, strict=True)
    for (is_image, supervised), alike in groupby(pairs, key=lambda pair: (pair[0] == image_token_id, pair[1])):
        ids = [token_id for token_id, _ in alike]
        # A part decoded alone would lose the space at its beginning.
        decoded += [] if is_image else ids
        after = tokenizer.decode(decoded)
        text, before = f"{IMAGE_TOKEN} x {len(ids)}" if is_image else after[len(before) :], after
        text = f">>{text}<<" if supervised and not in_color else text
        shown.append(text, style="bold blue" if is_image else "bold green" if supervised else "dim")
    return shown


class _Piece(NamedTuple):
    """A part of a prompt's text: of the protocol or from the data, supervised or not."""

    text: str
    is_data: bool = False
    supervised: bool = False


def _compose(
    tokenizer: Any, chat_format: ChatFormat, turns: Turns, objects: str | None, has_image: bool
) -> list[_Piece]:
    """Make the whole text, in pieces; an answer is supervised with its stop."""
    pieces = [_Piece(first_token(tokenizer))]
    if turns and turns[0][0] == "system":
        before, after = chat_format.system_form.split("{}")
        pieces += [_Piece(before), _Piece(turns[0][1].strip(), is_data=True), _Piece(after)]
        turns = turns[1:]
    else:
        pieces.append(_Piece(chat_format.system))
    speakers = [speaker for speaker, _ in turns]
    if not turns or speakers != [("human", "gpt")[i % 2] for i in range(len(turns))]:
        found = ", ".join(speakers) or "none"
        raise Rejected("turns_do_not_alternate", f"turns must alternate, human first; found {found}")
    stop = chat_format.stop or tokenizer.eos_token
    # Without an image, what stands between it and the question loses its space or line break; a marker in it stays.
    lead = f"{IMAGE_TOKEN}{chat_format.after_image}" if has_image else chat_format.after_image.lstrip()
    pieces.append(_Piece(f"{chat_format.opening}{lead}"))
    if objects is not None:
        before, after = _OBJECTS_KNOWN.split("{objects}") if objects else (_OBJECTS_UNKNOWN, "")
        pieces += [_Piece(before), _Piece(objects, is_data=True), _Piece(after)]
    for position, (speaker, value) in enumerate(turns):
        said = value.replace(IMAGE_TOKEN, "").strip()
        if speaker == "human":
            pieces.append(_Piece(chat_format.question_open if position else ""))
            pieces += [_Piece(said, is_data=True), _Piece(chat_format.answer_open)]
        else:
            pieces.append(_Piece(chat_format.answer_lead, supervised=True))
            pieces += [_Piece(said, is_data=True, supervised=True), _Piece(stop, supervised=True)]
    return pieces


def first_token(tokenizer: Any) -> str:
    """Return the token that the tokenizer itself puts in front of a text, whatever it puts behind; empty for none."""
    return tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
