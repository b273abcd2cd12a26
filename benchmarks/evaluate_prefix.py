"""Time the answers to all questions about an image: its tokens computed once, beside once for every question.

    python benchmarks/evaluate_prefix.py --model RUN --data out/*.parquet [--images 4] [--batch_size 16] [--repeats 3]

Both generate greedily with the same model and the same prompts, in batches of the same size: `collavo.evaluation`
from one pass over each image, transformers' plain `generate` from whole prompts, padded on the left. They take turns.
Prints a line of JSON, with the number of answers that are equal: all of them in float32.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import islice

import torch

from collavo.dataset import find_files, read_rows
from collavo.device import device_name, resolve_device
from collavo.evaluation.judge import Judge
from collavo.evaluation.questions import questions_of
from collavo.inference import Answerer, Picture, Request, load_answerer, picture_of_row
from schemas.categories import COCO_PANOPTIC

JUDGE = Judge(COCO_PANOPTIC)
TASKS = ("class_to_binary", "box_to_class", "counting", "class_to_box")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=8, help="of every answer at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    device = resolve_device(args.device)
    answerer = load_answerer(args.model, device)
    rows = list(islice(read_rows(find_files(args.data), "validation"), args.images))
    pictures = [picture_of_row(row, None) for row in rows]
    requests = [
        Request(number, question.turns, None, args.new_tokens)
        for number, row in enumerate(rows)
        for question in questions_of(row, TASKS, JUDGE)
    ]

    def once() -> list[str]:
        return answerer.answer(pictures, requests, args.batch_size)

    def every_time() -> list[str]:
        return plain_answers(answerer, pictures, requests, args.batch_size)

    equal = sum(one == other for one, other in zip(once(), every_time(), strict=True))
    once_s, every_time_s = time_in_turns(once, every_time, args.repeats)
    record = {
        "benchmark": "evaluate_prefix",
        "questions": len(requests),
        "images": len(pictures),
        "image_tokens": answerer.processor.grid_hw[0] * answerer.processor.grid_hw[1],
        "equal_answers": equal,
        "plain_questions_per_s": round(len(requests) / statistics.median(every_time_s), 2),
        "shared_questions_per_s": round(len(requests) / statistics.median(once_s), 2),
        "ratio": round(statistics.median(every_time_s) / statistics.median(once_s), 2),
        "ratio_range": [round(slow / fast, 2) for slow, fast in zip(every_time_s, once_s, strict=True)],
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "date": f"{date.today()}",
    }
    print(json.dumps(record))


@torch.inference_mode()
def plain_answers(
    answerer: Answerer, pictures: Sequence[Picture], requests: Sequence[Request], batch_size: int
) -> list[str]:
    """Answers by `generate` from whole prompts, the image beside each."""
    answers = []
    for start in range(0, len(requests), batch_size):
        part = requests[start : start + batch_size]
        batch = answerer.processor(
            [pictures[request.picture].image for request in part],
            [pictures[request.picture].panoptic for request in part],
            [request.turns for request in part],
            object_list=False,
        ).to(answerer.model.device)
        tokens = answerer.model.generate(
            **batch,
            max_new_tokens=part[0].max_new_tokens,
            do_sample=False,
            pad_token_id=answerer.processor.tokenizer.pad_token_id,
        )
        answers += answerer.processor.tokenizer.batch_decode(
            tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return [answer.strip() for answer in answers]


def time_in_turns(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of each, `repeats` figures, by turns; answers end as text on the host, so nothing is left running."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, figures in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            run()
            figures.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
