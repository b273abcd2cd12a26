from hypothesis import given
from hypothesis import strategies as st

from collavo.sources.coco_panoptic import Annotation
from pipelines.merge import image_key, merge_mentions
from pipelines.records import Input, Mention, Reject
from schemas.crayon_row import Dialogue

MASK = Annotation("1.png", ((5, 1, 0),))
COCO = Mention(Input("coco", "1"), "1.jpg", "/data/train/1.jpg", 3, MASK, "/data/masks/1.png")
FOLDER = Mention(Input("folder", "train/1.jpg"), "train/1.jpg", "/data/train/1.jpg")


def says(dialogue_id: str, text: str, uri: str = "/data/train/1.jpg") -> Mention:
    dialogue = Dialogue(dialogue_id, (("human", text), ("gpt", "Yes.")))
    return Mention(Input("llava", dialogue_id), f"coco{uri.removeprefix('/data')}", uri, dialogue=dialogue)


POOL = [
    COCO,
    COCO._replace(license_id=4),  # the same annotation in two files that differ in what surrounds it
    COCO._replace(mask_uri="/data/other_masks/1.png"),
    COCO._replace(input=Input("coco", "2"), annotation=Annotation("2.png", ())),
    COCO._replace(annotation=None, mask_uri=""),
    FOLDER,
    FOLDER._replace(image_path="1.jpg"),
    FOLDER._replace(uri="/data/train/1.png", image_path="train/1.png"),
    says("a", "Is it one?"),
    says("b", "Is it one?"),
    says("a", "Is it two?"),
    says("c", "Is it one?", "/data/train/1.gif"),
]


@given(st.lists(st.sampled_from(POOL), min_size=1, max_size=10), st.randoms())
def test_what_comes_out_does_not_depend_on_the_order_of_arrival(mentions: list[Mention], random):
    assert merge_mentions(random.sample(mentions, len(mentions))) == merge_mentions(mentions)


@given(st.lists(st.sampled_from(POOL), min_size=1, max_size=10))
def test_every_mention_ends_in_the_task_or_in_a_reject(mentions: list[Mention]):
    task, rejects = merge_mentions(mentions)
    inputs = [mention.input for mention in task.mentions] + [Input(r.source, r.id) for r in rejects]
    assert sorted(inputs) == sorted(mention.input for mention in mentions)
    assert {(r.stage, r.reason) for r in rejects} <= {("merge", "duplicate_entry"), ("merge", "other_annotation")}


def test_two_sources_of_one_image_make_one_row_that_coco_names():
    task, rejects = merge_mentions([says("a", "Is it one?"), FOLDER, COCO])
    assert rejects == []
    assert [mention.input.source for mention in task.mentions] == ["coco", "llava", "folder"]
    assert task.mentions[0].image_path == "1.jpg" and task.annotated == COCO


def test_dialogues_of_one_image_are_kept_unless_they_repeat_each_other():
    task, rejects = merge_mentions([says("b", "Is it one?"), says("a", "Is it one?"), says("a", "Is it one?")])
    assert [mention.dialogue.id for mention in task.mentions] == ["a", "b"]
    assert [(reject.id, reject.reason) for reject in rejects] == [("a", "duplicate_entry")]


def test_a_second_annotation_is_rejected_by_its_own_id():
    second = COCO._replace(input=Input("coco", "2"), annotation=Annotation("2.png", ()))
    task, rejects = merge_mentions([second, COCO, COCO])
    assert task.annotated == COCO
    detail = (
        "entry 1 annotates /data/train/1.jpg otherwise, and was taken; put all objects of an image into one entry of"
    )
    assert rejects == [
        Reject("1", "coco", "merge", "duplicate_entry", "repeats what another entry says of /data/train/1.jpg"),
        Reject("2", "coco", "merge", "other_annotation", f"{detail} one file"),
    ]


def test_an_entry_without_objects_does_not_hide_the_objects_of_another():
    """As where a file lists an image twice and marks one of the two."""
    empty = COCO._replace(input=Input("coco_instances", "1"), annotation=None, mask_uri="", instances="[null,[]]")
    marked = empty._replace(input=Input("coco_instances", "7"), instances="[null,[[1,0,0,[]]]]")
    task, rejects = merge_mentions([empty, marked])
    assert task.annotated == marked and [(r.id, r.reason) for r in rejects] == [("1", "other_annotation")]


def test_mentions_meet_whatever_extension_they_give_the_image_and_nothing_else_does():
    image = says("a", "Is it?", "/data/vg/2.jpg")
    assert image_key(image) == image_key(says("b", "Is it?", "/data/vg/2.gif"))
    others = ["/data/gqa/2.jpg", "/data/vg/2.json", "/data/vg/2.1.jpg", "/data/vg/2"]
    assert [image_key(FOLDER._replace(uri=uri)) == image_key(image) for uri in others] == [False, False, False, True]
