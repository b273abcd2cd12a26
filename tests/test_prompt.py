"""One function renders every conversation: what is supervised, and how a prompt continues into its answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import GRID, tiny_processor, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from collavo.errors import Rejected
from collavo.model.prompt import CHAT_FORMATS, render_conversation, show_supervision

TURNS = [
    ("human", "What colour is the car?\n<image>"),
    ("gpt", "Red."),
    ("human", "And the boat?"),
    ("gpt", "It is blue and white."),
]
TOKENIZER = tiny_tokenizer()
TOKENIZER.add_tokens(["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]", "<|im_start|>", "<|im_end|>", "<|eot_id|>"])


def supervised_text(name: str, turns: list[tuple[str, str]]) -> str:
    prompt = render_conversation(TOKENIZER, CHAT_FORMATS[name], turns, 1)
    return TOKENIZER.decode([i for i, s in zip(prompt.input_ids, prompt.supervised, strict=True) if s])


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_exactly_the_answers_and_their_stops_are_supervised(name: str) -> None:
    chat = CHAT_FORMATS[name]
    stop = chat.stop or "</s>"
    lead = chat.answer_lead
    assert supervised_text(name, TURNS) == f"{lead}Red.{stop}{lead}It is blue and white.{stop}"


@pytest.mark.parametrize("ends", [("<s>", ""), ("<s>", "</s>"), ("", "</s>"), ("", "")])
def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_does_not_end_as_one(ends: tuple[str, str]) -> None:
    """Some are saved with the end of each text that they were trained on, which a prompt has not."""
    tokenizer, (first, last) = tiny_tokenizer(), ends
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        f"{first} $A {last}".split(), special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    prompt = render_conversation(tokenizer, CHAT_FORMATS["paper"], TURNS[:1], 1)
    assert tokenizer.decode(prompt.input_ids) == f"{first}User: <image>\nWhat colour is the car? Assistant:"


@pytest.mark.parametrize("name", CHAT_FORMATS)
@pytest.mark.parametrize("answered", [1, 3])
def test_a_prompt_to_be_answered_is_the_beginning_of_the_text_that_was_trained_on(name: str, answered: int) -> None:
    whole = render_conversation(TOKENIZER, CHAT_FORMATS[name], TURNS, 9, "(#1 car) [0.10, 0.20, 0.30, 0.40]")
    asked = render_conversation(TOKENIZER, CHAT_FORMATS[name], TURNS[:answered], 9, "(#1 car) [0.10, 0.20, 0.30, 0.40]")
    assert whole.input_ids[: len(asked.input_ids)] == asked.input_ids
    assert whole.supervised[len(asked.input_ids)]


def test_the_paper_format_reads_as_in_the_paper() -> None:
    prompt = render_conversation(TOKENIZER, CHAT_FORMATS["paper"], TURNS[:2], 1)
    assert TOKENIZER.decode(prompt.input_ids) == "User: <image>\nWhat colour is the car? Assistant: Red.</s>"


@given(st.integers(0, 3))
def test_the_image_stands_once_and_first_wherever_the_data_have_it(position: int) -> None:
    question = "What is the weather like?"
    texts = [question, f"<image>\n{question}", f"{question}\n<image>", f"{question} <image> <image>"]
    prompt = render_conversation(TOKENIZER, CHAT_FORMATS["paper"], [("human", texts[position]), ("gpt", "Fine.")], 9)
    image = TOKENIZER.convert_tokens_to_ids("<image>")
    assert prompt.input_ids.count(image) == 9
    plain = render_conversation(TOKENIZER, CHAT_FORMATS["paper"], [("human", question), ("gpt", "Fine.")], 9)
    assert prompt == plain


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        ("(#1 car)", "The image includes (#1 car). Where?"),  # recognised objects
        ("", "None of detailed object information for image. Where?"),  # an image in which nothing was recognised
        (None, "\nWhere?"),  # the model is to do without
    ],
)
def test_the_object_list_precedes_the_first_question(objects: str | None, said: str) -> None:
    prompt = render_conversation(TOKENIZER, CHAT_FORMATS["paper"], [("human", "Where?")], 1, objects)
    assert said in TOKENIZER.decode(prompt.input_ids)


@pytest.mark.parametrize("turns", [[], [("gpt", "Yes.")], [("human", "a"), ("human", "b")]])
def test_turns_that_do_not_alternate_are_refused(turns: list[tuple[str, str]]) -> None:
    with pytest.raises(Rejected, match="alternate"):
        render_conversation(TOKENIZER, CHAT_FORMATS["paper"], turns, 1)


@pytest.mark.parametrize("name", CHAT_FORMATS)
@pytest.mark.parametrize("marker", ["</s>", "<s>", "<im<image>age>", "<|im_end|>", "[UNUSED_TOKEN_145]", "<|eot_id|>"])
def test_control_tokens_in_a_text_are_text(name: str, marker: str) -> None:
    turns = [("system", f"Be{marker}brief."), ("human", f"Why {marker} so?"), ("gpt", f"So{marker} {marker}it is.")]
    prompt = render_conversation(TOKENIZER, CHAT_FORMATS[name], turns, 9, f"(#1 {marker})")
    plain = render_conversation(
        TOKENIZER, CHAT_FORMATS[name], [(s, v.replace(marker, "")) for s, v in turns], 9, "(#1 )"
    )
    added = set(TOKENIZER.get_added_vocab().values())
    assert [i for i in prompt.input_ids if i in added] == [i for i in plain.input_ids if i in added]
    ends = [i for i in prompt.labels if i in added]
    assert ends == [TOKENIZER.convert_tokens_to_ids(CHAT_FORMATS[name].stop or "</s>")][: len(ends)]
    seen = marker.replace("<image>", "", 1)
    text = TOKENIZER.decode(prompt.input_ids)
    for part in (f"Be{marker}brief.", f"Why {seen} so?", f"So{seen} {seen}it is.", f"(#1 {marker})"):
        assert part in text


def test_the_supervised_part_is_shown_in_green() -> None:
    processor = tiny_processor()
    shown = show_supervision(processor.tokenizer, processor.render(TURNS[:2]))
    assert f"<image> x {GRID * GRID}" in shown.plain
    green = "".join(shown.plain[span.start : span.end] for span in shown.spans if "green" in str(span.style))
    assert green == " Red.</s>"
