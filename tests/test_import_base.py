"""Models from LLaVA and from separate parts, and the command that makes them."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from collavo.errors import UserError
from collavo.import_base.__main__ import main
from collavo.import_base.assemble import assemble_from_llava, assemble_from_parts
from collavo.model import CollavoForConditionalGeneration
from collavo.model.processing import CollavoProcessor
from collavo.model_card import licence_of, licence_of_checkpoint

IMAGE_SIZE, GRID = 56, 4
TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=IMAGE_SIZE,
    patch_size=14,
    initializer_range=0.2,
)


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(["User: hello Assistant: Sure, it is. How many people are there?"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    text_config = {"model_type": "llama", **TEXT}
    config = LlavaConfig(
        vision_config=VISION.to_dict(), text_config=text_config, image_token_index=300, vision_feature_layer=-2
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokens = tokenizer()
    tokens.add_tokens(["<image>"], special_tokens=True)
    tokens.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    )
    # As transformers 4 wrote beside it, with nothing of images.
    (folder / "processor_config.json").write_text(json.dumps({"image_token": "<image>", "patch_size": 14}))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    CLIPVisionModel(VISION).save_pretrained(folder)
    return folder


def save_language_model(folder: Path, model_type: str, **changes: Any) -> Path:
    torch.manual_seed(2)
    config = AutoConfig.for_model(model_type, **{**TEXT, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("llama"), "llama")


def batch(image_token_id: int, cells: int = GRID**2, side: int = IMAGE_SIZE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 290, (2, cells + 8), generator=generator)
    ids[:, 3 : 3 + cells] = image_token_id
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, side, side, generator=generator)}


def crayon_maps(grid: int = GRID) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "semantic_ids": torch.randint(0, 134, (2, grid, grid), generator=generator),
        "numbering_ids": torch.randint(0, 21, (2, grid, grid), generator=generator),
    }


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).logits


@pytest.mark.parametrize("queries", [True, False])
def test_a_llava_answers_as_before(llava: Path, queries: bool) -> None:
    original = LlavaForConditionalGeneration.from_pretrained(llava)
    switches = {"semantic_queries": queries, "numbering_queries": queries}
    model, processor = assemble_from_llava(llava, image_size=IMAGE_SIZE, dtype=torch.float32, **switches)
    inputs = batch(300)
    maps = crayon_maps() if queries else {}
    assert torch.equal(logits(model, **inputs, **maps), logits(original, **inputs))
    assert processor.image_processor.image_mean == (0.1, 0.2, 0.3)
    assert model.config.vision_feature_layer == -2
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]  # which look-up would propose


def renamed(llava: Path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of a LLaVA with other beginnings of their names."""
    tensors = LlavaForConditionalGeneration.from_pretrained(llava).state_dict()
    new_names = {name: next(new for new in names if name.startswith(new)) for name in tensors}
    return {names[new] + name.removeprefix(new): tensors[name] for name, new in new_names.items()}


def save_older_llava(llava: Path, folder: Path) -> Path:
    """A LLaVA under the names that transformers gave its tensors until version 4.52."""
    older = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    for file in llava.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(renamed(llava, older), folder / "model.safetensors")
    return folder


def save_original_llava(llava: Path, folder: Path) -> Path:
    """A LLaVA-1.5 as its authors publish it: a Llama with a projector, pickled, and its vision encoder elsewhere."""
    original = {
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
        "model.vision_tower.": "vision.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    }
    tensors = renamed(llava, original)
    vision = folder / "vision"
    CLIPVisionModel.from_pretrained(
        None, config=VISION, state_dict={n.removeprefix("vision."): t for n, t in tensors.items() if n[:7] == "vision."}
    ).save_pretrained(vision)
    shutil.copy(llava / "preprocessor_config.json", vision)
    of_language = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision.")}
    of_language["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as older checkpoints have
    torch.save(of_language, folder / "pytorch_model.bin")
    tokenizer().save_pretrained(folder)
    entries = {
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(vision),
    }
    names = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps({**TEXT, **names, **entries}))
    return folder


@pytest.mark.parametrize("save", [save_older_llava, save_original_llava])
def test_a_llava_is_read_in_its_other_layouts(llava: Path, tmp_path: Path, save: Any) -> None:
    folders = llava, save(llava, tmp_path)
    models_ = [assemble_from_llava(f, image_size=IMAGE_SIZE, dtype=torch.float32)[0] for f in folders]
    inputs = batch(300) | crayon_maps()
    assert torch.equal(logits(models_[0], **inputs), logits(models_[1], **inputs))


def test_an_original_llava_is_asked_as_vicuna_with_the_vision_encoder_that_is_named(
    llava: Path, clip: Path, tmp_path: Path
) -> None:
    folder = save_original_llava(llava, tmp_path)
    shutil.move(tmp_path / "vision", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"^vision {tmp_path}/vision: "):
        assemble_from_llava(folder)
    model, processor = assemble_from_llava(folder, tmp_path / "elsewhere", image_size=IMAGE_SIZE)
    assert processor.chat_format == "vicuna" and processor.image_processor.image_mean == (0.1, 0.2, 0.3)
    assert model.config.text_config.architectures == ["LlamaForCausalLM"]
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**entries, "mm_projector_type": "linear"}))
    with pytest.raises(UserError, match=r"mm_projector_type 'linear' in config\.json is not supported; 'mlp2x_gelu'"):
        assemble_from_llava(folder, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 500, "factor": 2}}),
        ("mistral", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        pytest.param("internlm3", {}, marks=pytest.mark.skipif("internlm3" not in CONFIG_MAPPING, reason="too old")),
    ],
)
def test_a_language_model_answers_text_as_before(
    model_type: str, changes: dict[str, Any], clip: Path, tmp_path: Path
) -> None:
    original = AutoModelForCausalLM.from_pretrained(save_language_model(tmp_path / "language", model_type, **changes))
    model, processor = assemble_from_parts(clip, tmp_path / "language", image_size=IMAGE_SIZE, dtype=torch.float32)
    ids = batch(5)["input_ids"]
    assert torch.equal(logits(model, input_ids=ids), logits(original, input_ids=ids))
    model.save_pretrained(tmp_path / "ours")
    restored = CollavoForConditionalGeneration.from_pretrained(tmp_path / "ours")
    inputs = batch(processor.tokenizer.convert_tokens_to_ids("<image>")) | crayon_maps()
    assert torch.equal(logits(restored, **inputs), logits(model, **inputs))


def test_parts_see_the_last_layer_of_the_vision_encoder(clip: Path, llama: Path) -> None:
    model, _ = assemble_from_parts(clip, llama, image_size=IMAGE_SIZE, dtype=torch.float32)
    pixels = batch(300)["pixel_values"]
    with torch.inference_mode():
        last = CLIPVisionModel.from_pretrained(clip)(pixels).last_hidden_state[:, 1:]
        ours = torch.stack(model.get_image_features(pixels).pooler_output)
        torch.testing.assert_close(ours, model.model.multi_modal_projector(last))


def test_the_vision_encoder_of_a_whole_clip_is_taken(clip: Path, llama: Path, tmp_path: Path) -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(vision_config=VISION.to_dict(), text_config=text)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    vision = {f"vision_model.{n}": t for n, t in CLIPVisionModel.from_pretrained(clip).state_dict().items()}
    buffer = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}  # as older checkpoints have
    save_file(
        {n: t for n, t in weights.items() if n.startswith("text")} | vision | buffer, tmp_path / "model.safetensors"
    )
    pixels = batch(300)["pixel_values"]
    whole, alone = (
        assemble_from_parts(f, llama, image_size=IMAGE_SIZE)[0].model.vision_tower for f in (tmp_path, clip)
    )
    with torch.inference_mode():
        assert torch.equal(whole(pixels).last_hidden_state, alone(pixels).last_hidden_state)


@pytest.mark.parametrize("image_size", [28, 84, 70])
def test_positions_are_interpolated_as_transformers_does(clip: Path, llama: Path, image_size: int) -> None:
    model, processor = assemble_from_parts(clip, llama, image_size=image_size, dtype=torch.float32)
    pixels = torch.randn(2, 3, image_size, image_size)
    original = CLIPVisionModel.from_pretrained(clip)
    with torch.inference_mode():
        expected = original(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model.model.vision_tower(pixels).last_hidden_state, expected, rtol=0, atol=1e-5)
    side = image_size // 14
    assert processor.grid_hw == model.config.grid_hw == (side, side)
    assert model.config.image_seq_length == side * side


def test_tokens_beyond_the_vocabulary_get_rows_that_are_never_chosen(clip: Path, tmp_path: Path) -> None:
    tokens = len(tokenizer())
    save_language_model(tmp_path, "llama", vocab_size=tokens)
    model, processor = assemble_from_parts(clip, tmp_path, image_size=IMAGE_SIZE, dtype=torch.float32)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == tokens
    assert model.config.text_config.vocab_size == model.lm_head.weight.shape[0] == 320
    assert model.get_input_embeddings().weight.shape[0] == 320
    answers = logits(model, **batch(tokens), **crayon_maps())
    assert (answers[..., tokens:].amax(-1) < answers[..., :tokens].amax(-1)).all()


def test_generation_ends_where_a_turn_of_the_chat_format_ends(clip: Path, llama: Path) -> None:
    for chat_format, ends in (("paper", [1]), ("chatml", [3, 1])):
        model, processor = assemble_from_parts(clip, llama, image_size=IMAGE_SIZE, chat_format=chat_format)
        assert model.generation_config.eos_token_id == ends
        assert processor.chat_format == model.config.chat_format == chat_format
        assert processor.tokenizer.pad_token_id == model.generation_config.pad_token_id == 1


@pytest.mark.parametrize(
    "template, chat_format",
    [
        ("{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}", "chatml"),
        ("{{ message['role'].upper() + ': ' }}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}", "vicuna"),
        ("{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}", "mistral"),
        ("{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>' }}", "paper"),  # no token ends its turns
        (None, "paper"),
    ],
)
def test_a_language_model_converses_as_its_own_template_says(
    template: str | None, chat_format: str, clip: Path, llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    if template:
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
    model, processor = assemble_from_parts(clip, tmp_path / "model", image_size=IMAGE_SIZE)
    assert processor.chat_format == model.config.chat_format == chat_format


def test_the_command_writes_a_card_with_the_licences_and_says_where_prompts_have_no_format_of_their_own(
    clip: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, folder, licence in (("vision", clip, "mit"), ("language", llama, "llama2")):
        shutil.copytree(folder, tmp_path / part)
        (tmp_path / part / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    output = tmp_path / "base"
    flags = ["--vision", str(tmp_path / "vision"), "--language", str(tmp_path / "language"), "--output", str(output)]
    assert main([*flags, "--image_size", "84"]) == 0
    assert "prompts: in the format paper" in capsys.readouterr().out
    card = (output / "README.md").read_text()
    assert "| language model | `language` | llama2 |" in card and str(tmp_path) not in card
    assert licence_of(output) == {"license": "other", "license_name": "mit and llama2"}
    assert licence_of_checkpoint(str(output))["license_name"] == "mit and llama2"


def test_a_llava_of_version_1_6_is_refused_before_its_weights_are_read(llava: Path, tmp_path: Path) -> None:
    folder = save_original_llava(llava, tmp_path)
    entries = json.loads((folder / "config.json").read_text()) | {"mm_patch_merge_type": "spatial_unpad"}
    (folder / "config.json").write_text(json.dumps(entries))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"mm_patch_merge_type 'spatial_unpad' .* of LLaVA-1\.5, is$"):
        assemble_from_llava(folder)


def test_the_command_writes_a_whole_model(llava: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    flags = ["--llava", str(llava), "--image_size", "84", "--chat_format", "chatml", "--output", str(output)]
    main(flags)
    model = CollavoForConditionalGeneration.from_pretrained(output)
    processor = CollavoProcessor.from_pretrained(output)
    expected, _ = assemble_from_llava(llava, image_size=84, chat_format="chatml")
    weights = expected.state_dict()
    for name, tensor in model.state_dict().items():
        if "crayon_prompt" not in name:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, weights[name]), name
    question = [{"type": "image", "image": np.zeros((30, 40, 3), np.uint8)}, {"type": "text", "text": "How many?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"crayon": "none"}}
    inputs = processor.apply_chat_template([{"role": "user", "content": question}], **options)
    generated = model.generate(**inputs.to(torch.bfloat16), max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]

    before = (output / "model.safetensors").read_bytes()
    assert main(flags) == 2
    assert main([*flags, "--overwrite"]) == 0
    assert (output / "model.safetensors").read_bytes() == before  # new weights are drawn from the same seed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_shards_and_tensor_pickles_are_read_and_other_pickles_are_not(clip: Path, llama: Path, tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(llama)
    expected = logits(original, input_ids=batch(5)["input_ids"])
    original.save_pretrained(tmp_path, max_shard_size="20KB")
    for file in llama.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    read = {"image_size": IMAGE_SIZE, "dtype": torch.float32}
    model, _ = assemble_from_parts(clip, tmp_path, **read)
    assert torch.equal(logits(model, input_ids=batch(5)["input_ids"]), expected)

    weights = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    shards[0].unlink()
    with pytest.raises(UserError, match=rf"1 of {len(shards)} weight files are missing, {shards[0].name} first"):
        assemble_from_parts(clip, tmp_path, **read)

    for file in tmp_path.glob("model*"):
        file.unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model, _ = assemble_from_parts(clip, tmp_path, **read)
    assert torch.equal(logits(model, input_ids=batch(5)["input_ids"]), expected)

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("sprung").touch, ())

    for save in (lambda f: torch.save({"w": Trap()}, f), lambda f: Path(f).write_bytes(pickle.dumps(Trap()))):
        save(tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match=f"language {tmp_path}: .*") as refusal:
            assemble_from_parts(clip, tmp_path, **read)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "sprung").exists()


def spoilt(folder: Path, **entries: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


@pytest.fixture(scope="module")
def places(clip: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by the names that the flags below have for them, most of them faulty."""
    folder = tmp_path_factory.mktemp("places")
    for name in ("EMPTY", "FULL"):
        (folder / name).mkdir()
    (folder / "FULL" / "thesis.txt").write_text("years of work")
    for name in ("ADAPTER", "TOKENLESS"):
        save_language_model(folder / name, "llama")
    (folder / "ADAPTER" / "model.safetensors").rename(folder / "ADAPTER" / "adapter_model.safetensors")
    (folder / "ADAPTER" / "adapter_config.json").write_text("{}")
    spoilt(folder / "TOKENLESS", quantization_config=None)  # as some configurations say of no quantisation
    (folder / "TOKENLESS" / "tokenizer.json").unlink()
    spoilt(save_language_model(folder / "QUANTISED", "llama"), quantization_config={"load_in_4bit": True})
    (save_language_model(folder / "WEIGHTLESS", "llama") / "model.safetensors").unlink()
    spoilt(save_language_model(folder / "RESHAPED", "llama"), intermediate_size=64)
    CLIPVisionModel(VISION).save_pretrained(folder / "SHALLOW")
    spoilt(folder / "SHALLOW", num_hidden_layers=4)
    faulty = ("ADAPTER", "EMPTY", "FULL", "TOKENLESS", "QUANTISED", "WEIGHTLESS", "RESHAPED", "SHALLOW", "NOWHERE")
    return {"CLIP": clip, "LLAMA": llama} | {name: folder / name for name in faulty}


@pytest.mark.parametrize(
    "flags, problem",
    [
        ([], "one of --llava, --vision with --language, or --release is needed; given: none"),
        (["--vision", "CLIP"], "given: --vision"),
        (["--llava", "LLAMA", "--release", "LLAMA"], "given: --llava, --release"),
        (["--llava", "LLAMA"], "--llava LLAMA: architecture 'llama' is not supported"),
        (["--release", "LLAMA"], "--release LLAMA: no entry 'bias'|--release LLAMA: .*layout of CoLLaVO-7B"),
        (["--vision", "LLAMA", "--language", "LLAMA"], "--vision LLAMA: architecture 'llama' is not supported"),
        (
            ["--vision", "CLIP", "--language", "CLIP"],
            "--language CLIP: architecture 'clip_vision_model' .*llama, mistral",
        ),
        (["--vision", "CLIP", "--language", "EMPTY"], "--language EMPTY: no config.json there"),
        (["--vision", "CLIP", "--language", "NOWHERE"], "--language NOWHERE: there is no such folder"),
        (["--vision", "CLIP", "--language", "a/b"], "--language a/b: neither a folder nor a whole model in the cache"),
        (["--vision", "CLIP", "--language", "QUANTISED"], "--language QUANTISED: its weights are quantised"),
        (["--vision", "CLIP", "--language", "WEIGHTLESS"], "--language WEIGHTLESS: no weights"),
        (["--vision", "CLIP", "--language", "ADAPTER"], "--language ADAPTER: no weights: it is an adapter; merge it"),
        (["--vision", "CLIP", "--language", "TOKENLESS"], "TOKENLESS: no tokenizer .*: neither tokenizer.json nor"),
        (
            ["--vision", "CLIP", "--language", "RESHAPED"],
            "--language RESHAPED: tensors of another shape: .* instead of",
        ),
        (["--vision", "SHALLOW", "--language", "LLAMA"], "--vision SHALLOW: tensors missing: .* and 13 more"),
        (
            ["--vision", "CLIP", "--language", "LLAMA", "--image_size", "100"],
            "--image_size 100: no multiple of the patch size, 14",
        ),
        (
            ["--vision", "CLIP", "--language", "LLAMA", "--chat_format", "llama3"],
            "--chat_format llama3: the tokenizer has no token <.eot_id.>",
        ),
        (["--vision", "CLIP", "--language", "LLAMA", "--output", "FULL"], "--output FULL: is no CoLLaVO model"),
        (["--vision", "CLIP", "--language", "LLAMA", "--seed", "1"], "unknown flag --seed"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(
    flags: list[str], problem: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--output" not in flags:
        flags = [*flags, "--output", str(tmp_path / "out")]
    try:
        status = main([str(places.get(flag, flag)) for flag in flags])
    except SystemExit as error:  # argparse's
        status = error.code
    assert status == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for name, place in places.items():
        error = error.replace(str(place), name)
    assert error.startswith("collavo.import_base: error: ")
    assert re.search(problem, error), error
    assert not (tmp_path / "out").exists() and (places["FULL"] / "thesis.txt").exists()
