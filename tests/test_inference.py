import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_model import OWN_CLASSES, scene_rows, tiny_config, tiny_model, tiny_processor
from tiny_run import save_tiny_run
from transformers.utils import is_flash_attn_2_available

from collavo import runs
from collavo.errors import UserError
from collavo.evaluation.judge import Judge
from collavo.evaluation.questions import EVALUATED_TASKS, questions_of
from collavo.inference import Answerer, Picture, Request, Sampling, load_answerer, picture_of_row
from collavo.model import CollavoForConditionalGeneration
from collavo.model.query_init import adopt_categories
from collavo.runs import load_run
from collavo.training.lengths import LengthLimit, object_list
from schemas.categories import COCO_PANOPTIC

CPU = torch.device("cpu")
ROWS = scene_rows(3)
PICTURES = [picture_of_row(row, None) for row in ROWS]
REQUESTS = [
    Request(number, question.turns, PICTURES[number].objects if question.task == "dialogue" else None, limit)
    for number, row in enumerate(ROWS)
    for question, limit in zip(questions_of(row, EVALUATED_TASKS, Judge(COCO_PANOPTIC)), [4, 9] * 50, strict=False)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_tiny_run(tmp_path_factory.mktemp("answering") / "run")


@pytest.fixture(scope="module")
def answerer(run):
    return load_answerer(str(run), CPU)


@torch.inference_mode()
def alone(answerer: Answerer, request: Request) -> str:
    """The answer to one prompt by transformers' own `generate`, nothing shared and nothing padded."""
    picture, processor = PICTURES[request.picture], answerer.processor
    processor.object_list = request.objects is not None
    chat = [
        {
            "role": {"human": "user", "gpt": "assistant"}.get(speaker, speaker),
            "content": [{"type": "text", "text": text}],
        }
        for speaker, text in request.turns
    ]
    first = next(turn for turn in chat if turn["role"] == "user")
    first["content"].append({"type": "image", "image": Image.fromarray(picture.image)})
    options = {"return_dict": True, "return_tensors": "pt", "processor_kwargs": {"crayon": [picture.panoptic]}}
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, **options)
    assert inputs["attention_mask"].all()
    tokens = answerer.model.generate(
        **inputs, max_new_tokens=request.max_new_tokens, num_beams=answerer.beams, do_sample=False, pad_token_id=2
    )
    return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_from_a_shared_beginning_equal_those_of_whole_prompts_alone(run, beams):
    answerer = load_answerer(str(run), CPU, beams=beams)
    requests = REQUESTS[::3]
    expected = [alone(answerer, request) for request in requests]
    assert len(set(expected)) > len(expected) // 2  # prompts that differ are answered differently
    assert answerer.answer(PICTURES, requests, 16) == expected


def test_answers_do_not_depend_on_the_company_they_are_given_in(answerer):
    requests = REQUESTS[::2]
    together = answerer.answer(PICTURES, requests, 16)
    assert answerer.answer(PICTURES, requests, 3) == together
    assert answerer.answer(PICTURES, requests[::-1], 5) == together[::-1]


def test_system_texts_which_stand_before_the_picture_are_answered_to_as_alone(answerer):
    questions = [("human", "Who is here?")], [("human", "How many?")]
    told = [[("system", text), *turns] for text in ("Be brief.", "Answer in two words.") for turns in questions]
    requests = [Request(number, turns, None, 6) for turns in (*questions, *told) for number in (1, 0)]
    assert answerer.answer(PICTURES[:2], requests, 4) == [alone(answerer, request) for request in requests]


def test_an_image_passes_the_vision_tower_once_for_all_of_its_questions(answerer):
    passes = []
    tower = answerer.model.get_base_model().model.vision_tower
    handle = tower.register_forward_hook(lambda module, args, kwargs, output: passes.append(1), with_kwargs=True)
    answerer.answer(PICTURES[:1], [request for request in REQUESTS if request.picture == 0], 4)
    handle.remove()
    assert len(passes) == 1


def test_an_answer_rests_on_the_image_the_crayon_map_and_the_adapters(answerer):
    requests = [request for request in REQUESTS if request.picture == 0 and request.objects is None]
    answers = answerer.answer(PICTURES[:1], requests)
    first, second = PICTURES[0], PICTURES[1]
    assert answerer.answer([Picture(second.image, first.panoptic)], requests) != answers
    assert answerer.answer([Picture(first.image, second.panoptic)], requests) != answers
    with answerer.model.disable_adapter():
        assert answerer.answer(PICTURES[:1], requests) != answers


def test_an_object_list_keeps_the_largest_objects_that_fit_as_in_training(answerer):
    """The list that training gives the same question, of a picture with more objects than the context has room for."""
    picture, turns = PICTURES[0], [("human", "Who is here?")]
    segments = [replace(s, numbering=1 + n % 20, area=s.area + n) for n in range(60) for s in picture.panoptic.segments]
    crowded = Picture(picture.image, replace(picture.panoptic, segments=tuple(segments)))
    request = answerer.request(0, crowded, turns, True, 32)
    height, width = picture.image.shape[:2]
    record = {
        "segments": [segment.as_record() for segment in segments],
        "width": width,
        "height": height,
        "conversations": [{"turns": [{"from": "human", "value": turns[0][1]}, {"from": "gpt", "value": ""}]}],
    }
    whole = len(answerer.processor.render([*turns, ("gpt", "")]).input_ids) - len(
        answerer.processor.render(turns).input_ids
    )
    limit = LengthLimit(answerer.processor, answerer.context - 32 + whole, "dialogues", 8)
    (fitted,) = limit.fit("dialogue", [0], record)
    assert 1 < fitted.objects < len(segments) and fitted.shortened
    assert request.objects == object_list(record, fitted.objects)
    assert len(answerer.answer([crowded], [request])) == 1
    assert answerer.request(0, picture, turns, True, 32) == Request(0, turns, picture.objects, 32)
    with pytest.raises(UserError, match=r"the question has [\d,]+ tokens"):
        answerer.request(0, picture, [("human", "word " * answerer.context)], True, 32)


@pytest.mark.parametrize(
    "text, context",
    [
        ({"model_type": "mistral", "sliding_window": 256}, 256),
        ({"model_type": "mistral", "sliding_window": None}, 1024),
        ({"model_type": "qwen2", "sliding_window": 256, "use_sliding_window": False}, 1024),
    ],
)
def test_no_prompt_is_longer_than_a_sliding_window(text, context):
    """Beside prompts of other lengths in its batch, such a prompt would be answered otherwise than alone."""
    config = tiny_config(text)
    answerer = Answerer(tiny_model(config), tiny_processor(config), ("dialogue",))
    request = answerer.request(0, PICTURES[0], [("human", "Who?")], True, 32)
    prompt = answerer.processor.render(request.turns, request.objects).input_ids
    assert 32 < len(prompt) <= context - 32 and (request.objects == PICTURES[0].objects) == (context == 1024)
    with pytest.raises(UserError, match=f"and the model takes {context}$"):
        answerer.request(0, PICTURES[0], [("human", "word " * context)], True, 32)


def test_sampling_draws_among_all_tokens_that_sum_up_to_top_p():
    assert Sampling(0.7, 0.9).options == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}


def test_nf4_answers_are_the_same_every_time_and_for_any_batch_size(run):
    answerer = load_answerer(str(run), CPU, quantize=True)
    first = answerer.answer(PICTURES[:1], REQUESTS[:8], 8)  # bitsandbytes repacks a CPU's weights at their first use
    assert answerer.answer(PICTURES[:1], REQUESTS[:8], 8) == first
    assert answerer.answer(PICTURES[:1], REQUESTS[:8], 3) == first


@pytest.mark.parametrize(
    ("part", "quantize"),
    [("bitsandbytes.nn.Linear4bit.to", True), ("bitsandbytes.functional.quantize_4bit", "dequantized"),
        ("peft.tuners.lora.LoraLayer.update_layer", False)],
)  # fmt: skip
def test_a_gpu_that_is_full_while_a_model_loads_is_one_line(run, monkeypatch, part, quantize):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    monkeypatch.setattr(part, full)
    with pytest.raises(UserError, match=r"^the GPU has no memory left \(.* 2\.00 GiB\.\); what helps: a GPU that"):
        load_run(run, CPU, torch.float32, quantize)


@pytest.mark.parametrize(
    "trained, listed", [("dialogues", ("dialogue",)), ("all", ("crayon", "dialogue")), ("none", ())]
)
def test_a_run_tells_which_prompts_it_was_trained_to_see_the_objects_in(tmp_path, trained, listed):
    assert load_answerer(str(save_tiny_run(tmp_path / "run", object_list=trained)), CPU).listed == listed


def test_a_whole_model_is_loaded_like_a_run(run):
    base = json.loads((run / "train_args.json").read_text())["base"]
    answerer = load_answerer(base, CPU)
    request = REQUESTS[0]
    assert answerer.answer(PICTURES[:1], [request]) == [alone(answerer, request)]


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_a_run_trained_with_flash_attention_is_asked_without_its_package(tmp_path, monkeypatch):
    run = save_tiny_run(tmp_path / "run", attention="flash_attention_2")
    monkeypatch.setattr(runs, "move_to_device", lambda *_: None)  # there may be no GPU
    model, _ = load_run(run, torch.device("cuda"), torch.float32)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_run_with_adapters_adopts_other_classes_query_by_query(run):
    model, processor = load_run(run, CPU, torch.float32)
    queries = model.get_base_model().model.crayon_prompt.semantic_queries.weight.detach()
    assert adopt_categories(model, processor, OWN_CLASSES) == ["sky", "car"]
    adopted = model.get_base_model().model.crayon_prompt.semantic_queries.weight
    assert adopted.shape == (len(OWN_CLASSES) + 1, queries.shape[1])
    for name in ("sky", "car"):
        before, after = (known.by_display_name[name].label + 1 for known in (COCO_PANOPTIC, OWN_CLASSES))
        assert torch.equal(adopted[after], queries[before])


def test_a_device_map_of_transformers_names_a_gpu_and_other_keywords_are_refused(run, monkeypatch):
    asked = []
    loaded = load_run(run, CPU, torch.float32)
    monkeypatch.setattr(runs, "load_run", lambda _, device, *__: (asked.append(device), loaded)[1])
    several_names = {"model": 1, "lm_head": "cuda:1"}
    for device_map in ({"": 0}, 1, {"": "cpu"}, None, several_names):
        CollavoForConditionalGeneration.from_pretrained(run, device_map=device_map, dtype="float32")
    assert asked == [torch.device("cuda", 0), torch.device("cuda", 1), CPU, CPU, torch.device("cuda", 1)]
    for keyword, value in (("quantization_config", {"load_in_8bit": True}), ("load_in_4bit", True)):
        with pytest.raises(UserError, match=rf"without {keyword}; collavo\.export_model --as merged"):
            CollavoForConditionalGeneration.from_pretrained(run, **{keyword: value})
    with pytest.raises(UserError, match=r"onto one device, not cuda:0, cuda:1; collavo\.export_model --as merged"):
        CollavoForConditionalGeneration.from_pretrained(run, device_map={"model": 0, "lm_head": 1})


def test_a_whole_model_of_the_hub_is_asked_as_its_training_asked_it(run, tmp_path, monkeypatch):
    base = json.loads((run / "train_args.json").read_text())["base"]
    merged = shutil.copytree(base, tmp_path / "snapshot")
    (merged / "export.json").write_text(json.dumps({"object_list": "none", "base": "tiny"}))
    monkeypatch.setattr(runs, "find_checkpoint", lambda source, **_: merged)
    assert load_answerer("org/name", CPU).listed == ()
    assert runs.base_of("org/name") == "tiny"


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]*: holds neither a run's train_args.json nor a model's config.json$"):
        load_answerer(str(tmp_path), CPU)


def test_a_run_whose_base_is_gone_is_refused_in_one_line(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    args = json.loads((run / "train_args.json").read_text())
    (tmp_path / "run" / "train_args.json").write_text(json.dumps({**args, "base": "./gone"}))
    with pytest.raises(UserError, match=r"run: its base, ./gone: there is no such folder$"):
        load_answerer(str(tmp_path / "run"), CPU)
