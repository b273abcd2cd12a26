"""The page of `python -m collavo.chat --gradio`: an image, its crayon map, a conversation about it.

Needs gradio, which `pip install 'collavo[demo]'` brings. The page is served to this machine only.
"""

from collections.abc import Callable
from typing import Any

import gradio as gr

from collavo.errors import UserError
from collavo.panoptic.colors import crayon_overlay

_INTRODUCTION = (
    "# CoLLaVO\nChoose an image; the recognised objects appear in the colours of their crayon map. Then ask."
)


def build_page(about_file: Callable[[str], Any], cautions: Callable[[Any], list[str]]) -> gr.Blocks:
    """Lay out the page, without serving it.

    Args:
        about_file: starts a `collavo.inference.Conversation` about an image file; the visitor sees its errors.
        cautions: says of a picture's panoptic map why it is to be trusted less, if so.
    """

    def choose(path: str | None) -> tuple[Any, ...]:
        if path is None:
            return None, None, gr.Markdown(visible=False), "", []
        try:
            conversation = about_file(path)
        except (ValueError, RuntimeError) as error:
            raise gr.Error(str(error)) from error
        picture = conversation.picture
        said = " ".join(cautions(picture.panoptic))
        caution = gr.Markdown(f"> ⚠️ {said}", visible=bool(said))
        return conversation, crayon_overlay(picture.image, picture.panoptic), caution, picture.objects, []

    def ask(conversation: Any, question: str, shown: list[dict[str, str]]) -> tuple[str, list[dict[str, str]]]:
        if conversation is None:
            raise gr.Error("Choose an image first.")
        try:
            answer = conversation.ask(question)
        except (ValueError, RuntimeError) as error:
            raise gr.Error(str(error)) from error
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return "", [*shown, *said]

    with gr.Blocks(title="CoLLaVO", analytics_enabled=False) as page:
        conversation = gr.State()
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column():
                # As a file, untouched: collavo.images decodes all images.
                image = gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image")
                crayon_map = gr.Image(interactive=False, format="png", label="Crayon map")
                caution = gr.Markdown(visible=False)
                objects = gr.Textbox(interactive=False, lines=3, max_lines=6, label="Objects")
            with gr.Column():
                shown = gr.Chatbot(label="Conversation", height=480)
                question = gr.Textbox(label="Question", placeholder="What is in the image?")
        image.change(choose, image, [conversation, crayon_map, caution, objects, shown], api_name="choose")
        question.submit(ask, [conversation, question, shown], [question, shown], api_name="ask")
    return page


def serve(about_file: Callable[[str], Any], cautions: Callable[[Any], list[str]], port: int) -> None:
    """Serve the page until it is interrupted.

    Raises:
        UserError: if the port is taken.
    """
    try:
        build_page(about_file, cautions).launch(server_name="127.0.0.1", server_port=port, share=False)
    except OSError as error:  # gradio tells of a port that it cannot have by its message only
        raise UserError(f"{port}: {str(error).strip().split('. ')[0]}; name a free port") from error
