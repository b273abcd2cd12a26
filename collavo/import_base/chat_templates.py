"""Read the chat format of a language model from its own chat template, by cutting small conversations that it renders.

A template is a program, and knows nothing of images. What it writes around texts is what is needed of it.
"""

import re
from posixpath import commonprefix
from typing import Any

from collavo.model.prompt import ChatFormat, first_token

_SYSTEM, _QUESTION, _ANSWER, _NEXT = "Text one.", "Text two?", "Text three.", "Text four?"
_ROLES = {_SYSTEM: "system", _QUESTION: "user", _ANSWER: "assistant", _NEXT: "user"}


def read_chat_format(tokenizer: Any, template: str) -> ChatFormat | None:
    """Read what a template writes before, between and behind the texts of a conversation.

    A system text that it writes by itself becomes that of the format. Where it takes none from a conversation, one
    stands before the first question, as in Mistral's templates.

    Args:
        template: Jinja; empty for none.

    Returns:
        None if the template cannot be rendered, asks for answers in another way than it shows them, or ends them with
        no control token of the tokenizer.
    """
    asked = _around(tokenizer, template, _QUESTION)
    shown = _around(tokenizer, template, _QUESTION, _ANSWER, _NEXT)
    if not asked or not shown:
        return None
    head, answer_open = asked
    if shown[0] != head or shown[3] != answer_open or not shown[1].startswith(answer_open):
        return None
    ends = [shown[2].find(token) + len(token) for token in tokenizer.get_added_vocab() if token in shown[2]]
    if not ends:
        return None
    stop, question_open = shown[2][: min(ends)], shown[2][min(ends) :]
    told = _around(tokenizer, template, _SYSTEM, _QUESTION) or [head, "\n\n", answer_open]
    # What stands before the first question with and without a system text of the conversation's own.
    opening = commonprefix([head[::-1], told[1][::-1]])[::-1]
    if "{}" in told[0] + told[1]:  # which marks the place of the system text
        return None
    system, form = head.removesuffix(opening), f"{told[0]}{{}}{told[1].removesuffix(opening)}"
    lead = shown[1].removeprefix(answer_open)
    return ChatFormat(opening, "\n", answer_open, stop, question_open, lead, system, form)


def _around(tokenizer: Any, template: str, *texts: str) -> list[str] | None:
    """Render a conversation of these texts that asks for an answer, and return what stands around them."""
    try:
        rendered: str = tokenizer.apply_chat_template(
            [{"role": _ROLES[text], "content": text} for text in texts],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            date_string="26 Jul 2024",  # what Llama's templates write where they know no date; the others say today's
        )
    except Exception:  # a template raises what it likes, for roles that it does not know
        return None
    parts = re.split("|".join(map(re.escape, texts)), rendered.removeprefix(first_token(tokenizer)))
    return parts if len(parts) == len(texts) + 1 else None
