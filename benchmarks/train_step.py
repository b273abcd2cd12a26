"""Compare a training step with the steps that others take: results first, then interleaved times, paired ratios.

    python benchmarks/train_step.py                         # on a CPU: a 1:8 model of the 7B shape, in its proportions
    python benchmarks/train_step.py --sizes 7b --device cuda                # the 7B shape with random weights, in NF4
    python benchmarks/train_step.py --sizes 7b --device cuda --parts sweep --repeats 3

Compared:
    step     a dual-adapter CoLLaVO step (both adapters active, one learning, head on supervised positions, crayon
             signal) with the same step of transformers' LLaVA under one plain peft QLoRA and full logits: same sizes,
             tokens, rank and batch; and with itself under full logits
    packing  eight instructions of an image in one sequence with one instruction per sequence, in instructions/s
    sweep    samples/s, share of the measured bf16 matrix product rate, and peak memory over micro-batches, with and
             without gradient checkpointing and packing, beside Trainer + peft + bitsandbytes as they come (for a GPU)

On a CPU, times are the process's CPU seconds, which other work on the machine lengthens little; on a GPU, those of the
clock. The last line is JSON.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, TrainerCallback, TrainingArguments
from transformers import Trainer as HFTrainer

from collavo.model import CollavoConfig, CollavoForConditionalGeneration
from collavo.model.adapters import add_adapters, linear_layer_names, quantize_language_model
from collavo.model.packing import SHARED, packed_positions
from collavo.training.stages import CRAYON_PROMPT, StagedModel, cit_stage

ADAPTERS = ("image_cit", "vl_cit")
IMAGE_CIT = cit_stage("image_cit", ADAPTERS)
IMAGE_TOKEN = 0


@dataclass(frozen=True)
class Sizes:
    """Shape of a model and of a training sequence; `labels` are the supervised tokens of an instruction."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    vision: dict[str, int]
    rank: int
    crayon_width: int
    text: int
    labels: int

    @property
    def side(self) -> int:
        return self.vision["image_size"] // self.vision["patch_size"]


SIZES = {
    # InternLM2-7B and CLIP-L/14 at 490 px, and the same an eighth as wide with fewer layers and a smaller picture.
    "7b": Sizes(4096, 32, 32, 8, 14336, 92544, {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                "num_attention_heads": 16, "image_size": 490, "patch_size": 14}, 64, 1024, 150, 120),
    "proxy": Sizes(512, 8, 8, 2, 1792, 11568, {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6,
                   "num_attention_heads": 2, "image_size": 280, "patch_size": 14}, 8, 128, 50, 40),
    "toy": Sizes(64, 2, 4, 2, 128, 256, {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "image_size": 56, "patch_size": 14}, 4, 16, 8, 5),  # whether it runs at all
}  # fmt: skip


def our_model(sizes: Sizes, device: torch.device) -> CollavoForConditionalGeneration:
    """CoLLaVO with random weights, the Crayon Prompt closed."""
    torch.manual_seed(0)
    config = CollavoConfig(**_shape(sizes), crayon_width=sizes.crayon_width)
    with device:
        return CollavoForConditionalGeneration._from_config(config, dtype=_dtype(device))


def their_model(sizes: Sizes, device: torch.device) -> LlavaForConditionalGeneration:
    """transformers' LLaVA of the same shape."""
    with device:
        return LlavaForConditionalGeneration._from_config(LlavaConfig(**_shape(sizes)), dtype=_dtype(device))


def with_two_adapters(model: CollavoForConditionalGeneration, sizes: Sizes, device: torch.device) -> StagedModel:
    """Ours: NF4 and two adapters, in the stage of a crayon batch."""
    quantize_language_model(model, _dtype(device), device)
    staged = StagedModel(add_adapters(model, ADAPTERS, sizes.rank, sizes.rank).to(device).train(), ADAPTERS)
    for parameter in staged.parameters_of((CRAYON_PROMPT, *ADAPTERS)).values():
        parameter.data = parameter.data.float()
    staged.enter(IMAGE_CIT)
    return staged


def with_plain_qlora(model: Any, sizes: Sizes, device: torch.device) -> nn.Module:
    """Theirs: the same NF4 and one LoRA on the same layers."""
    quantize_language_model(model, _dtype(device), device)
    config = LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules=linear_layer_names(model))
    return get_peft_model(model, config).to(device).train()


def make_inputs(
    sizes: Sizes, batch: int, packed: int, device: torch.device, crayon: bool = True
) -> dict[str, torch.Tensor]:
    """`batch` sequences with an image and `packed` instructions each."""
    cells = sizes.side**2
    generator = torch.Generator().manual_seed(1)
    tokens = cells + packed * sizes.text
    input_ids = torch.randint(1, sizes.vocabulary, (batch, tokens), generator=generator)
    input_ids[:, :cells] = IMAGE_TOKEN
    labels = input_ids.clone()
    labels[:, :cells] = -100
    for number in range(packed):
        start = cells + number * sizes.text
        labels[:, start : start + sizes.text - sizes.labels] = -100
    size = sizes.vision["image_size"]
    inputs = {"input_ids": input_ids, "labels": labels, "pixel_values": torch.randn(batch, 3, size, size)}
    if crayon:
        inputs["semantic_ids"] = torch.randint(0, 134, (batch, sizes.side, sizes.side), generator=generator)
        inputs["numbering_ids"] = torch.randint(0, 21, (batch, sizes.side, sizes.side), generator=generator)
    if packed > 1:
        numbers = torch.arange(1, packed + 1).repeat_interleave(sizes.text)
        sequence_ids = torch.cat([torch.full((cells,), SHARED), numbers]).expand(batch, -1)
        inputs |= {"sequence_ids": sequence_ids, "position_ids": packed_positions(sequence_ids)}
    else:
        inputs["attention_mask"] = torch.ones_like(input_ids)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


class Step:
    """Forward, backward and AdamW update of a model on fixed inputs."""

    def __init__(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], supervised_only: bool, micro: int = 0
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.more = {"supervised_only": True} if supervised_only else {}
        self.micro = micro or len(inputs["input_ids"])
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def __call__(self) -> float:
        device = self.inputs["input_ids"].device
        total = 0.0
        for start in range(0, len(self.inputs["input_ids"]), self.micro):
            part = {name: tensor[start : start + self.micro] for name, tensor in self.inputs.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = self.model(**part, **self.more, use_cache=False).loss
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def interleaved(steps: dict[str, Callable[[], float]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step, in turn, after one warm-up each; each round goes the other way, so that drift cancels."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    now = time.perf_counter if device.type == "cuda" else time.process_time
    for round_ in range(repeats + 1):
        for name in list(steps)[:: (-1) ** round_]:
            _synchronize(device)
            start = now()
            steps[name]()
            _synchronize(device)
            if round_:
                seconds[name].append(now() - start)
    return seconds


def ratio(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Mean of the pairwise ratios with its standard error, their median, smallest and largest."""
    pairs = sorted(a / b for a, b in zip(first, second, strict=True))
    error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
    found = {"mean": statistics.mean(pairs), "error": error, "median": statistics.median(pairs)}
    return {name: round(value, 4) for name, value in {**found, "least": pairs[0], "most": pairs[-1]}.items()}


def compare_step(sizes: Sizes, batch: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """A dual-adapter step against LLaVA with one adapter, and against itself with full logits."""
    ours, theirs = our_model(sizes, device), their_model(sizes, device)
    theirs.load_state_dict({name: t for name, t in ours.state_dict().items() if "crayon_prompt" not in name})
    staged, plain_model = with_two_adapters(ours, sizes, device), with_plain_qlora(theirs, sizes, device)
    inputs, plain = make_inputs(sizes, batch, 1, device), make_inputs(sizes, batch, 1, device, crayon=False)
    steps = {
        "collavo": Step(staged.model, inputs, supervised_only=True),
        "llava": Step(plain_model, plain, supervised_only=False),
        "collavo, full logits": Step(staged.model, inputs, supervised_only=False),
    }
    # A closed prompt and fresh adapters change nothing yet, so the first losses are those of one model.
    first = [step() for step in steps.values()][:2]
    assert abs(first[0] - first[1]) < 1e-2 * first[1], first
    seconds = interleaved(steps, repeats, device)
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "collavo / llava": ratio(seconds["collavo"], seconds["llava"]),
        "full logits / label-only": ratio(seconds["collavo, full logits"], seconds["collavo"]),
    }


def compare_packing(sizes: Sizes, images: int, instructions: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Instructions a second, packed and one by one, on the same images, in the same number of forward passes' rows."""
    staged = with_two_adapters(our_model(sizes, device), sizes, device)
    packed = make_inputs(sizes, images, instructions, device)
    apart = make_inputs(sizes, images * instructions, 1, device)
    seconds = interleaved(
        {
            "packed": Step(staged.model, packed, supervised_only=True),
            "apart": Step(staged.model, apart, supervised_only=True, micro=images),
        },
        repeats,
        device,
    )
    count = images * instructions
    return {
        "instructions per s": {name: count / statistics.median(values) for name, values in seconds.items()},
        "apart / packed": ratio(seconds["apart"], seconds["packed"]),
    }


def sweep(sizes: Sizes, micro_batches: Sequence[int], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Throughput and memory over micro-batches: ours with and without checkpointing and packing, then HF's defaults."""
    peak = matmul_flops(device)
    rows = [row for on in (False, True) for row in our_rows(sizes, micro_batches, repeats, on, device, peak)]
    for micro in micro_batches:
        seconds = hf_defaults_seconds(sizes, micro, repeats, device)
        rows.append(_row("Trainer + peft + bitsandbytes", sizes, micro, 1, seconds, device, peak))
        print("sweep", rows[-1], flush=True)  # at once, for the command may be out of time before its end
    return rows


def our_rows(
    sizes: Sizes,
    micro_batches: Sequence[int],
    repeats: int,
    checkpointing: bool,
    device: torch.device,
    peak: float,
) -> list[dict[str, Any]]:
    """The rows of one model, which is gone afterwards."""
    model = our_model(sizes, device)
    if checkpointing:
        model.activation_checkpointing_enable()
    staged = with_two_adapters(model, sizes, device)
    who = "collavo, checkpointing" if checkpointing else "collavo"
    rows: list[dict[str, Any]] = []
    for packed in (1, 8):
        for micro in micro_batches:
            _forget_peak(device)
            step = Step(staged.model, make_inputs(sizes, micro, packed, device), supervised_only=True)
            rows.append(_row(who, sizes, micro, packed, _seconds_of(step, repeats, device), device, peak))
            print("sweep", rows[-1], flush=True)
            staged.model.zero_grad(set_to_none=True)  # of a step that did not fit
    return rows


def hf_defaults_seconds(sizes: Sizes, micro: int, repeats: int, device: torch.device) -> float | None:
    """Median seconds of a step of transformers' Trainer on LLaVA, prepared as peft's QLoRA guide says."""
    model = their_model(sizes, device)
    quantize_language_model(model, _dtype(device), device)  # type: ignore[arg-type]
    prepared = prepare_model_for_kbit_training(model)
    config = LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules=linear_layer_names(prepared))
    inputs = make_inputs(sizes, micro, 1, torch.device("cpu"), crayon=False)
    rows = [{name: tensor[i] for name, tensor in inputs.items()} for i in range(micro)] * (repeats + 2)
    clock = _StepClock(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=micro, max_steps=repeats + 1, bf16=device.type == "cuda", report_to=[],
            save_strategy="no", use_cpu=device.type == "cpu", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        _forget_peak(device)
        try:
            trainer = HFTrainer(get_peft_model(prepared, config), arguments, train_dataset=rows, callbacks=[clock])
            trainer.train()
        except torch.OutOfMemoryError:
            return None
    return statistics.median(clock.seconds[1:])


def matmul_flops(device: torch.device, size: int = 8192) -> float:
    """FLOP/s of a square matrix product in the training precision: the roof that throughput is held against."""
    size = size if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=_dtype(device))
    seconds = []
    for _ in range(10):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def sample_flops(sizes: Sizes, packed: int) -> float:
    """Floating-point operations of a training sample, nothing recomputed: frozen weights need no gradient of their
    own."""
    tokens = sizes.side**2 + packed * sizes.text
    head_width = sizes.hidden // sizes.heads
    attention = sizes.hidden * (sizes.hidden + 2 * sizes.kv_heads * head_width) + sizes.hidden**2
    linear = sizes.layers * (attention + 3 * sizes.hidden * sizes.feed_forward)
    lora = (
        sizes.layers
        * sizes.rank
        * (
            (sizes.hidden * 4 + sizes.hidden * 2 + 2 * sizes.kv_heads * head_width)
            + 3 * (sizes.hidden + sizes.feed_forward)
        )
    )
    cells, text = sizes.side**2, sizes.text
    pairs = cells**2 / 2 + packed * (text * cells + text**2 / 2)  # of tokens, one of which attends to the other
    scores = 4 * sizes.layers * sizes.hidden * pairs  # two products
    head = packed * sizes.labels * sizes.hidden * sizes.vocabulary
    width, layers = sizes.vision["hidden_size"], sizes.vision["num_hidden_layers"]
    vision = layers * (4 * width**2 + 2 * width * sizes.vision["intermediate_size"]) * (sizes.side**2 + 1)
    # Forward and the gradient of inputs for frozen products; two adapters forward and back, one with weight gradients.
    return 2 * (2 * linear * tokens + 2 * head + 5 * lora * tokens + vision) + 3 * scores


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="proxy")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=("step", "packing", "sweep"), default=["step", "packing"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    arguments = parser.parse_args(argv)
    sizes, device = SIZES[arguments.sizes], torch.device(arguments.device)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    }
    if "step" in arguments.parts:
        results["step"] = compare_step(sizes, arguments.batch, arguments.repeats, device)
    if "packing" in arguments.parts:
        results["packing"] = compare_packing(sizes, arguments.batch, 8, arguments.repeats, device)
    if "sweep" in arguments.parts:
        results["sweep"] = sweep(sizes, arguments.micro_batches, arguments.repeats, device)
    for part in ("device", "step", "packing"):
        if part in results:
            print(part, results[part])
    print(json.dumps(results))


class _StepClock(TrainerCallback):
    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._device = device

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        _synchronize(self._device)
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _synchronize(self._device)
        self.seconds.append(time.perf_counter() - self._start)


def _seconds_of(step: Callable[[], float], repeats: int, device: torch.device) -> float | None:
    """Median seconds of a step, or None where it does not fit the device's memory."""
    try:
        return statistics.median(interleaved({"": step}, repeats, device)[""])
    except torch.OutOfMemoryError:
        return None


def _row(
    who: str, sizes: Sizes, micro: int, packed: int, seconds: float | None, device: torch.device, peak: float
) -> dict[str, Any]:
    row: dict[str, Any] = {"who": who, "packed": packed, "micro_batch": micro}
    if seconds is None:
        return row | {"samples_per_s": "out of memory"}
    rate = micro / seconds
    row |= {"samples_per_s": round(rate, 3), "instructions_per_s": round(rate * packed, 3)}
    row["percent_of_matmul_rate"] = round(100 * rate * sample_flops(sizes, packed) / peak, 1)
    if device.type == "cuda":
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return row


def _forget_peak(device: torch.device) -> None:
    """Start to count memory anew, without what an earlier model, or a step that did not fit, has left behind."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _shape(sizes: Sizes) -> dict[str, Any]:
    text = {
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 8192,
    }
    return {
        "vision_config": {"model_type": "clip_vision_model", **sizes.vision},
        "text_config": text,
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": sizes.side**2,
        "vision_feature_layer": -1,
    }


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
