from conftest import CAR, SKY, crayon_row, segment

from pipelines.accounts import Counts
from pipelines.records import Draft, Input, Reject
from schemas.crayon_row import CrayonRow, Dialogue, Instruction

YES = Instruction("class_to_binary", "Is there a car?", "Yes.", "yes", "present", (1,), "b-1")
NO = Instruction("class_to_binary", "Is there a dog?", "No.", "no", "absent", (), "b-1")
LISTING = Instruction("list_objects", "What is there?", "Sure, it is (#1 car).", None, None, (1,), "l-1")


def counted(*rows: CrayonRow, rejects: tuple[Reject, ...] = ()) -> Counts:
    counts = Counts()
    for row in rows:
        inputs = tuple(Input(source, row.image_id) for source in row.sources)
        counts.add_row(row, Draft(row, inputs, (), {"read": 0.25, "decode": 0.5}), merged=0)
    for reject in rejects:
        counts.add_reject(reject)
    return counts


FULL = crayon_row(
    sources=("coco", "llava"),
    segments=(segment(label=CAR), segment(id=2, label=CAR, numbering=2), segment(id=3, label=SKY)),
    instructions=(YES, NO, LISTING),
    conversations=(Dialogue("d", (("human", "Hi"),)),),
)
BARE = crayon_row(split="validation")
REJECTS = (Reject("x", "llava", "read", "missing_file", ""), Reject("y", "coco", "segment", "empty_segment", ""))


def test_everything_in_a_row_is_counted():
    json = counted(FULL, rejects=REJECTS).as_json()
    assert (json["rows"], json["conversations"]) == (1, 1)
    assert json["inputs_in_rows"] == {"coco": 1, "llava": 1}
    assert json["segments"] == {"car": 2, "sky": 1}
    assert json["objects_per_image"] == {3: 1}
    assert json["instructions"] == {"class_to_binary": 2, "list_objects": 1}
    assert json["polarities"] == {"class_to_binary/absent": 1, "class_to_binary/present": 1}
    assert json["answer_lengths"] == {1: 2, 5: 1}
    assert json["rejects"] == {"empty_segment": 1, "missing_file": 1}
    assert json["rejects_by_source"] == {"coco": 1, "llava": 1}
    assert json["seconds"]["read"] == 0.25


def test_counts_add_up_however_they_are_grouped():
    whole = counted(FULL, BARE, FULL, rejects=REJECTS)
    summed = Counts()
    for part in (counted(FULL), counted(BARE, rejects=REJECTS[1:]), Counts(), counted(FULL, rejects=REJECTS[:1])):
        summed.add(part)
    assert summed == whole
