"""Rows in an S3 store serve whatever reads rows on a disk, with the same results."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from stores import Store, s3_store
from tiny_model import save_tiny_base, scene_rows, tiny_processor, write_crayon_file

from collavo import chat, evaluate, export_data, storage, train
from collavo.dataset import find_files
from collavo.errors import UserError
from collavo.training.batch_plan import Sample
from collavo.training.batches import Example, ExampleDataset
from collavo.training.lengths import LengthLimit
from collavo.training.row_index import build_row_indexes

TRAINING = (
    "--device cpu --precision fp32 --batch_size 2 --lora_rank 4 --max_length 350 --max_steps 1 --workers 0 "
    "--crayon_share 0.5"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and rows that lie in `rows` and in a store alike."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_base(folder / "base")
    (folder / "rows").mkdir()
    write_crayon_file(folder / "rows" / "crayon-00000-of-00001.parquet", scene_rows(6))
    return folder


@pytest.fixture(scope="module")
def store(world: Path) -> Iterator[Store]:
    with s3_store() as store:
        for file in (world / "rows").iterdir():
            store.put(f"rows/{file.name}", file.read_bytes())
        store.put("rows/manifest.json", b"{}")  # without which a build would seem to be under way
        storage._file_system.cache_clear()
        yield store


def test_training_evaluation_chat_and_export_take_rows_from_a_store(
    world: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for data in (str(world / "rows"), "s3://bucket/rows/"):
        run, exported = tmp_path / f"run-{len(found)}", tmp_path / f"exported-{len(found)}"
        flags = ["--preset", str(world / "base"), "--output_dir", str(run), *TRAINING.split()]
        assert train.main(["--data", data, *flags]) == 0
        assert evaluate.main(["--model", str(run), "--data", data, "--split", "train", "--max_images", "1"]) == 0
        assert export_data.main(["--data", data, "--to", "llava", "--output", str(exported)]) == 0
        capsys.readouterr()
        asked = ["--image_id", scene_rows(1)[0].image_id, "--prompt", "How many dogs are there?"]
        assert chat.main(["--model", str(run), "--data", data, *asked, "--max_new_tokens", "8"]) == 0
        losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
        results = json.loads((run / "evaluation" / "evaluation.json").read_text())["results"]
        files = {file.relative_to(exported): file.read_bytes() for file in exported.rglob("*.j*")}
        found[data] = losses, results, files, capsys.readouterr().out
    on_disk, in_store = found.values()
    assert in_store == on_disk


def test_a_store_that_does_not_answer_ends_a_training_and_costs_no_sample(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collavo.object_store._MOST_RETRIES", 1)
    storage._file_system.cache_clear()
    files = find_files(["s3://bucket/rows/"])
    index = build_row_indexes(files, LengthLimit(tiny_processor(), 9999, "none", 8))["train"]
    examples, sample = ExampleDataset(index, tiny_processor()), Sample("crayon", 0, (0,))
    with store.dying_after("^$"):
        outage = examples[sample]
    assert isinstance(outage, UserError) and outage.exit_status == 1 and str(outage).startswith(files[0])
    assert isinstance(examples[sample], Example)


def test_a_folder_of_a_store_is_named_with_its_slash_or_without(store: Store) -> None:
    folder, files = "s3://bucket/rows", ["s3://bucket/rows/crayon-00000-of-00001.parquet"]
    assert find_files([folder]) == find_files([f"{folder}/"]) == find_files([f"{folder}/*.parquet"]) == files


def test_datasets_loads_rows_from_a_store(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("s3fs", reason="needs s3fs")
    options = {"endpoint_url": store.endpoint}
    files = "s3://bucket/rows/*.parquet"
    rows = datasets.load_dataset("parquet", data_files=files, storage_options=options, cache_dir=str(tmp_path))
    assert len(rows["train"]) == 6
