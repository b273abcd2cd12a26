"""The processor is called as transformers' processors are, and says where its crayon maps come from."""

import base64
import json
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import encoded
from PIL import ExifTags, Image
from tiny_model import GRID, OWN_CLASSES, scene_rows, tiny_model, tiny_processor
from tiny_run import talkative_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

from collavo.images import decode_rgb
from collavo.inference import Picture, picture_of_row
from collavo.model import CollavoProcessor
from collavo.model.prompt import CHAT_FORMATS, chat_template, objects_sentence, render_conversation
from collavo.panoptic.maps import SegmentInfo, build_panoptic_map
from collavo.segmenters import UNFAMILIAR

PROMPT = "User: <image>\nHow many? Assistant:"


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [picture_of_row(row, None) for row in scene_rows(2)]


def chat(image: object, question: str = "How many?") -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def processor_that_begins_texts() -> CollavoProcessor:
    """A processor whose tokenizer puts `<s>` in front of every text, as Llama's does."""
    tokenizer = tiny_processor().tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return CollavoProcessor(tiny_processor().image_processor, tokenizer)


@pytest.mark.parametrize("name", CHAT_FORMATS)
@pytest.mark.parametrize("objects", [None, "", "(#1 car)"])
@pytest.mark.parametrize("made", [tiny_processor, processor_that_begins_texts])
def test_the_chat_template_gives_the_tokens_that_training_saw(
    name: str, objects: str | None, made: Callable[[], CollavoProcessor]
) -> None:
    processor = made()
    turns = [("system", "Be {} kind."), ("human", " What is it? <image>"), ("gpt", "A car. "), ("human", "Whose?")]
    messages = [
        {
            "role": {"human": "user", "gpt": "assistant"}.get(speaker, speaker),
            "content": [{"type": "text", "text": text}],
        }
        for speaker, text in turns
    ]
    messages[-1]["content"].append({"type": "image"})  # an image stands first wherever a chat has it
    if objects is not None:
        messages[1]["content"].append({"type": "objects", "text": objects_sentence(objects)})
    for own_system in (True, False):
        template = chat_template(processor.tokenizer, CHAT_FORMATS[name])
        given = messages if own_system else messages[1:]
        text = processor.apply_chat_template(given, chat_template=template, add_generation_prompt=True)
        expected = render_conversation(
            processor.tokenizer, CHAT_FORMATS[name], turns if own_system else turns[1:], GRID * GRID, objects
        )
        image = Image.new("RGB", (30, 20))
        assert processor(images=image, text=text)["input_ids"] == [expected.input_ids]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_control_tokens_in_messages_are_text_as_in_our_own_prompts(name: str) -> None:
    tokenizer = tiny_processor().tokenizer
    tokenizer.add_tokens(["[UNUSED_TOKEN_145]", "<|im_end|>", "<|eot_id|>"])
    processor = CollavoProcessor(tiny_processor().image_processor, tokenizer, chat_format=name, object_list=False)
    image = Image.new("RGB", (30, 20))
    nested = ("<im<image>age>", "<im<im<image>age>age>", "<im</s>age>", "<im<im</s>age>age>")
    for marker in ("</s>", "<s>", "<image>", *nested, "<|im_end|>", "[UNUSED_TOKEN_145]", "<|eot_id|>"):
        said = f"What {marker}{marker} is it? {marker}"
        messages = [*chat(image, said), {"role": "assistant", "content": said}, {"role": "user", "content": said}]
        expected = processor.render([("human", said), ("gpt", said), ("human", said)]).input_ids
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        found = processor.apply_chat_template(messages, **options)["input_ids"][0]
        control = set(tokenizer.get_added_vocab().values())
        assert [i for i in found if i in control] == [i for i in expected if i in control], marker
        assert tokenizer.decode(found) == tokenizer.decode(expected), marker
    for said in nested:  # as one string, a prompt could not tell an image's token from a user's
        assert processor.apply_chat_template(chat(image, said)).count("<image>") == 1
    options |= {"return_assistant_tokens_mask": True, "add_generation_prompt": False}
    processor.apply_chat_template(chat(image, "<image> What?"), **options)
    with pytest.raises(ValueError, match="a message holds </s>, which would not stay text beside an assistant mask"):
        processor.apply_chat_template(chat(image, "What </s> is it?"), **options)


def test_a_text_begins_once_whoever_writes_its_first_token() -> None:
    processor, image = processor_that_begins_texts(), Image.new("RGB", (30, 20))
    bare = processor(images=image, text=PROMPT)["input_ids"]
    assert processor(images=image, text=f"<s>{PROMPT}")["input_ids"] == bare and bare[0][:2].count(0) == 1
    for option in ({"add_special_tokens": True}, {"text_kwargs": {"add_special_tokens": True}}):
        assert processor(images=image, text=f"<s>{PROMPT}", **option)["input_ids"] == [[0, *bare[0]]]


def test_images_may_be_pixels_arrays_paths_and_base64_one_or_many(pictures, tmp_path):
    processor, images = tiny_processor(), [Image.fromarray(picture.image) for picture in pictures]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    wanted = processor(images=images, text=[PROMPT] * 2, return_tensors="pt")
    encodings = [base64.b64encode(encoded(image)).decode() for image in images]
    for given in ([picture.image for picture in pictures], paths, [[path] for path in paths], encodings):
        found = processor(images=given, text=[PROMPT] * 2, return_tensors="pt")
        assert found.keys() == wanted.keys() == set(processor.model_input_names) - {"token_type_ids"}
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.filterwarnings("ignore:The segmenter knows no pictures")
@pytest.mark.parametrize("form", ["L", "LA", "P", "1", "RGBA", "CMYK", "I;16", "upside down", "on its side"])
def test_pictures_of_any_form_have_the_pixels_that_training_sees(pictures, tmp_path, form):
    processor, scene, options = tiny_processor(), Image.fromarray(pictures[0].image), {}
    if form == "I;16":
        scene = Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 256)
    elif len(form) > 4:
        options["exif"] = scene.getexif()
        options["exif"][ExifTags.Base.Orientation] = 3 if form == "upside down" else 6
    else:
        scene = scene.convert(form)
    path = tmp_path / "scene.tiff" if form == "CMYK" else tmp_path / "scene.png"
    scene.save(path, **options)
    seen = decode_rgb(path.read_bytes())
    expected = processor.picture_inputs([seen], [build_panoptic_map(np.zeros(seen.shape[:2], np.int32), ())])
    for given in (str(path), Image.open(path), [[Image.open(path)]]):
        found = processor(images=given, text=PROMPT, crayon="none", return_tensors="pt")
        assert torch.equal(found["pixel_values"], expected["pixel_values"]), given
        assert found.panoptic[0].index_map.shape == seen.shape[:2]
    processor.segmenter = "scenes"
    asked = processor.apply_chat_template(chat(Image.open(path)), tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(asked["pixel_values"], expected["pixel_values"])


def test_a_damaged_picture_is_named(pictures, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(encoded(Image.fromarray(pictures[0].image), "JPEG")[:900])
    with pytest.raises(ValueError, match=r"broken\.jpg: JPEG of 96 x 72: image file is truncated"):
        tiny_processor()(images=str(tmp_path / "broken.jpg"), text=PROMPT)


def test_maps_are_given_made_or_left_out_and_the_output_says_which(pictures):
    processor, image = tiny_processor(), Image.fromarray(pictures[0].image)
    options = {"images": image, "text": PROMPT, "return_tensors": "pt"}
    bare = processor(**options)
    assert bare.crayon == "none" and not bare["semantic_ids"].any() and not bare["numbering_ids"].any()
    given = processor(**options, crayon=[pictures[0].panoptic])
    expected = processor.picture_inputs([pictures[0].image], [pictures[0].panoptic])
    assert given.crayon == "given" and all(torch.equal(given[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="no segmenter"):
        processor(**options, crayon="segment")
    with pytest.raises(ValueError, match=r"need crayon maps of the same; found \[\(5, 5\)\]"):
        processor(**options, crayon=[type(pictures[0].panoptic)(np.zeros((5, 5), np.uint8), ())])
    processor.segmenter = "scenes"
    made = processor(**options, crayon="segment")
    assert made.crayon == "segment" and made["semantic_ids"].any() and made.panoptic[0].segments
    # A chat is a question to a finished model, so it is asked with what the segmenter finds.
    asked = processor.apply_chat_template(chat(image), tokenize=True, return_dict=True, return_tensors="pt")
    assert asked.crayon == "segment" and torch.equal(asked["semantic_ids"], made["semantic_ids"])
    assert "The image includes" in processor.decode(asked["input_ids"][0])


def test_maps_that_the_model_cannot_trust_are_warned_of(pictures):
    processor, image = tiny_processor(), Image.fromarray(pictures[0].image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(images=image, text=PROMPT, crayon=[pictures[0].panoptic])
    labels = [OWN_CLASSES.by_display_name[name].label for name in ("sky", "traffic cone")]
    size_hw = pictures[0].image.shape[:2]
    ids = np.where(np.arange(size_hw[0])[:, None] < 20, 1, np.full(size_hw, 2)).astype(np.int32)
    own = build_panoptic_map(ids, [SegmentInfo(i, label) for i, label in enumerate(labels, start=1)], OWN_CLASSES)
    with pytest.warns(UserWarning) as said:
        options = {
            "tokenize": True,
            "return_dict": True,
            "processor_kwargs": {"crayon": [replace(own, unfamiliar=True)]},
        }
        processor.apply_chat_template(chat(image), **options)
    assert [str(line.message) for line in said] == [UNFAMILIAR, "The model has no query for: traffic cone."]


@pytest.mark.parametrize("side", [{}, {"padding_side": "right"}])
def test_prompts_of_a_batch_are_padded_on_the_left_and_answered_as_alone(pictures, side, tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    saved.pop("padding_side", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved | side))
    model, processor = talkative_model(), CollavoProcessor.from_pretrained(tmp_path)
    texts = [PROMPT, PROMPT.replace("many", "many dogs are there in the picture")]
    images = [Image.fromarray(picture.image) for picture in pictures]
    maps = [picture.panoptic for picture in pictures]
    both = processor(images=images, text=texts, crayon=maps, padding=True, return_tensors="pt")
    together = model.generate(**both, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, -5:]
    for row, (image, text, found) in enumerate(zip(images, texts, maps, strict=True)):
        alone = processor(images=image, text=text, crayon=[found], return_tensors="pt")
        assert torch.equal(
            model.generate(**alone, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, -5:], together[row]
        )


def test_a_processor_is_saved_and_loaded_whole(tmp_path):
    processor = tiny_processor()
    processor.segmenter, processor.object_list, processor.chat_template = "scenes", False, "{{ messages[0].content }}"
    processor.save_pretrained(tmp_path)
    tiny_model().config.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is CollavoProcessor and loaded.to_dict() == processor.to_dict()
    assert (loaded.segmenter, loaded.object_list, loaded.chat_template) == (
        "scenes",
        False,
        "{{ messages[0].content }}",
    )
