"""What a class is, what a set of classes is, and the set that is built in: COCO panoptic's 133.

Three numbers name a class, and confusing them is a classic mistake:

- `category_id`  the number that the set's own source uses: COCO's run from 1 to 200 with gaps
- `label`        the position in the set, from 0 without gaps; what models predict
- semantic index `label + 1`; what a crayon map holds, where 0 means unknown

A number means something only together with its set. Sets are compared by the names of their classes, never by their
numbers; `collavo.categories` reads them from files and checkpoints.

Source of the built-in set, `coco_panoptic.json`: the category list published with the COCO panoptic challenge (ids,
names, thing or stuff, colours). The English forms are ours: a class such as `scissors` is counted in pairs, and stuff
is never counted, so it has no forms.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

_NAME_SUFFIXES = ("-merged", "-other", "-stuff")

LEFT_OUT = -1
"""In place of a label: the user's category map leaves the class out, and its pixels are unknown."""

MAX_NUMBERING = 20
"""The largest ordinal an instance may carry within its class; 21 numbering queries, unknown included."""


@dataclass(frozen=True, slots=True)
class Category:
    """One class of a set.

    `singular` and `plural` are the words that a count is put before ("1 pair of scissors", "3 people"); stuff has
    neither.
    """

    category_id: int
    label: int
    name: str
    display_name: str
    """The name as people read it: `wall-other-merged` is `wall` (CoLLaVO's convention)."""

    is_thing: bool
    color_rgb: tuple[int, int, int]
    singular: str
    plural: str
    article: str
    """`a` or `an`, before `singular`; empty for stuff."""

    @property
    def with_article(self) -> str:
        """ "a person", "an umbrella"; a thing only."""
        return f"{self.article} {self.singular}"

    def counted(self, count: int) -> str:
        """ "1 person", "13 people", "0 people"; a thing only."""
        return f"{count} {self.singular if count == 1 else self.plural}"


@dataclass(frozen=True)
class CategorySet(Sequence[Category]):
    """Classes in the order of their labels.

    Args:
        name: how messages, reports and cards call the set.
        categories: their labels count from 0.
    """

    name: str
    categories: tuple[Category, ...]

    def __getitem__(self, label: Any) -> Any:
        return self.categories[label]

    def __len__(self) -> int:
        return len(self.categories)

    def __iter__(self) -> Iterator[Category]:
        return iter(self.categories)

    @property
    def semantic_indices(self) -> int:
        """Unknown and the classes: the number of semantic queries of a Crayon Prompt."""
        return len(self.categories) + 1

    @cached_property
    def things(self) -> tuple[Category, ...]:
        return tuple(category for category in self.categories if category.is_thing)

    @cached_property
    def thing_positions(self) -> dict[int, int]:
        """The position of each thing class among the things, by its label."""
        return {category.label: position for position, category in enumerate(self.things)}

    @cached_property
    def by_display_name(self) -> dict[str, Category]:
        return {category.display_name: category for category in self.categories}

    @cached_property
    def by_category_id(self) -> dict[int, Category]:
        return {category.category_id: category for category in self.categories}

    @cached_property
    def by_key(self) -> dict[str, Category]:
        """By what names are compared by, see `name_key`."""
        return {name_key(category.name): category for category in self.categories}

    def is_subset_of(self, other: "CategorySet") -> bool:
        """Tell whether `other` has every class of this set, under the same name and of the same kind."""
        return all(
            key in other.by_key and other.by_key[key].is_thing == category.is_thing
            for key, category in self.by_key.items()
        )

    def as_records(self) -> list[dict[str, Any]]:
        """Plain values for JSON, in the order of the labels: COCO's `categories` list with the English forms."""
        return [
            {
                "id": category.category_id,
                "name": category.name,
                "isthing": int(category.is_thing),
                "color": list(category.color_rgb),
                "display_name": category.display_name,
                "singular": category.singular,
                "plural": category.plural,
                "article": category.article,
            }
            for category in self.categories
        ]

    @classmethod
    def from_records(cls, name: str, records: Iterable[Mapping[str, Any]]) -> Self:
        """Make the set that `as_records` wrote."""
        return cls(
            name,
            tuple(
                Category(
                    category_id=record["id"],
                    label=label,
                    name=record["name"],
                    display_name=record["display_name"],
                    is_thing=bool(record["isthing"]),
                    color_rgb=tuple(record["color"]),
                    singular=record["singular"],
                    plural=record["plural"],
                    article=record["article"],
                )
                for label, record in enumerate(records)
            ),
        )


def name_key(name: str) -> str:
    """Reduce a class's name to what its spellings share: case, hyphens, underscores and COCO's suffixes aside.

    `Wall-other-merged`, `wall` and `WALL` are one class; `floor-wood` and `floor wood` are one, and not `floor`. Of
    ADE20K's lists of synonyms (`road, route`) the first one counts.
    """
    return " ".join(without_suffixes(name.partition(",")[0].lower()).replace("-", " ").replace("_", " ").split())


def without_suffixes(name: str) -> str:
    """Return a name of COCO panoptic without `-merged`, `-other` and `-stuff`."""
    while name.endswith(_NAME_SUFFIXES):
        name = name.rpartition("-")[0]
    return name


COCO_PANOPTIC = CategorySet.from_records(
    "COCO panoptic", json.loads(Path(__file__).with_name("coco_panoptic.json").read_text(encoding="utf-8"))
)
"""The set that is built in: 80 things, then 53 stuff classes."""
