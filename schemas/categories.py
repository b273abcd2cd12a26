"""What a class is, what a set of classes is, and the set that is built in: COCO panoptic's 133.

Three numbers name a class, and confusing them is a classic mistake:

- `category_id`  the number that the set's own source uses: COCO's run from 1 to 200 with gaps
- `label`        the position in the set, from 0 without gaps; what models predict
- semantic index `label + 1`; what a crayon map holds, where 0 means unknown

A number means something only together with its set. Sets are compared by the names of their classes, never by their
numbers; `collavo.categories` reads them from files and checkpoints.

Source of the built-in set: the category list published with the COCO panoptic challenge (ids, names, thing or stuff,
colours). The English forms are ours: a class such as `scissors` is counted in pairs, and stuff is never counted, so it
has no forms.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

# category_id | name | kind | colour | one of them | several of them
_TABLE = """
1|person|thing|dc143c|person|people
2|bicycle|thing|770b20|bicycle|bicycles
3|car|thing|00008e|car|cars
4|motorcycle|thing|0000e6|motorcycle|motorcycles
5|airplane|thing|6a00e4|airplane|airplanes
6|bus|thing|003c64|bus|buses
7|train|thing|005064|train|trains
8|truck|thing|000046|truck|trucks
9|boat|thing|0000c0|boat|boats
10|traffic light|thing|faaa1e|traffic light|traffic lights
11|fire hydrant|thing|64aa1e|fire hydrant|fire hydrants
13|stop sign|thing|dcdc00|stop sign|stop signs
14|parking meter|thing|af74af|parking meter|parking meters
15|bench|thing|fa001e|bench|benches
16|bird|thing|a52a2a|bird|birds
17|cat|thing|ff4dff|cat|cats
18|dog|thing|00e2fc|dog|dogs
19|horse|thing|b6b6ff|horse|horses
20|sheep|thing|005200|sheep|sheep
21|cow|thing|78a69d|cow|cows
22|elephant|thing|6e4c00|elephant|elephants
23|bear|thing|ae39ff|bear|bears
24|zebra|thing|c76400|zebra|zebras
25|giraffe|thing|480076|giraffe|giraffes
27|backpack|thing|ffb3f0|backpack|backpacks
28|umbrella|thing|007d5c|umbrella|umbrellas
31|handbag|thing|d10097|handbag|handbags
32|tie|thing|bcd0b6|tie|ties
33|suitcase|thing|00dcb0|suitcase|suitcases
34|frisbee|thing|ff63a4|frisbee|frisbees
35|skis|thing|5c0049|pair of skis|pairs of skis
36|snowboard|thing|8581ff|snowboard|snowboards
37|sports ball|thing|4eb4ff|sports ball|sports balls
38|kite|thing|00e400|kite|kites
39|baseball bat|thing|aefff3|baseball bat|baseball bats
40|baseball glove|thing|2d59ff|baseball glove|baseball gloves
41|skateboard|thing|868667|skateboard|skateboards
42|surfboard|thing|9194ae|surfboard|surfboards
43|tennis racket|thing|ffd0ba|tennis racket|tennis rackets
44|bottle|thing|c5e2ff|bottle|bottles
46|wine glass|thing|ab8601|wine glass|wine glasses
47|cup|thing|6d3f36|cup|cups
48|fork|thing|cf8aff|fork|forks
49|knife|thing|97005f|knife|knives
50|spoon|thing|09503d|spoon|spoons
51|bowl|thing|546933|bowl|bowls
52|banana|thing|4a4169|banana|bananas
53|apple|thing|a6c466|apple|apples
54|sandwich|thing|d0c3d2|sandwich|sandwiches
55|orange|thing|ff6d41|orange|oranges
56|broccoli|thing|008f95|piece of broccoli|pieces of broccoli
57|carrot|thing|b300c2|carrot|carrots
58|hot dog|thing|d1636a|hot dog|hot dogs
59|pizza|thing|057900|pizza|pizzas
60|donut|thing|e3ffcd|donut|donuts
61|cake|thing|93bad0|cake|cakes
62|chair|thing|994501|chair|chairs
63|couch|thing|035fa1|couch|couches
64|potted plant|thing|a3ff00|potted plant|potted plants
65|bed|thing|7700aa|bed|beds
67|dining table|thing|00b6c7|dining table|dining tables
70|toilet|thing|00a578|toilet|toilets
72|tv|thing|b78258|TV|TVs
73|laptop|thing|5f2000|laptop|laptops
74|mouse|thing|827287|mouse|mice
75|remote|thing|6e8185|remote|remotes
76|keyboard|thing|a64a76|keyboard|keyboards
77|cell phone|thing|db8eb9|cell phone|cell phones
78|microwave|thing|4fd272|microwave|microwaves
79|oven|thing|b25a3e|oven|ovens
80|toaster|thing|41460f|toaster|toasters
81|sink|thing|7fa773|sink|sinks
82|refrigerator|thing|3b696a|refrigerator|refrigerators
84|book|thing|8e6c2d|book|books
85|clock|thing|c4ac00|clock|clocks
86|vase|thing|5f3650|vase|vases
87|scissors|thing|804cff|pair of scissors|pairs of scissors
88|teddy bear|thing|c93901|teddy bear|teddy bears
89|hair drier|thing|f6007a|hair drier|hair driers
90|toothbrush|thing|bfa2d0|toothbrush|toothbrushes
92|banner|stuff|ffff80
93|blanket|stuff|93d3cb
95|bridge|stuff|966464
100|cardboard|stuff|a8abac
107|counter|stuff|9270c6
109|curtain|stuff|d2aa64
112|door-stuff|stuff|5c8859
118|floor-wood|stuff|da58b8
119|flower|stuff|f18100
122|fruit|stuff|d911ff
125|gravel|stuff|7c4ab5
128|house|stuff|464646
130|light|stuff|ffe4ff
133|mirror-stuff|stuff|9ad000
138|net|stuff|c1005c
141|pillow|stuff|4c5b71
144|platform|stuff|ffb4c3
145|playingfield|stuff|6a9ab0
147|railroad|stuff|e6968c
148|river|stuff|3c8fff
149|road|stuff|804080
151|roof|stuff|5c5237
154|sand|stuff|fed47c
155|sea|stuff|494dae
156|shelf|stuff|ffa062
159|snow|stuff|ffffff
161|stairs|stuff|68546d
166|tent|stuff|a9a483
168|towel|stuff|e1c7ff
171|wall-brick|stuff|89364a
175|wall-stone|stuff|879edf
176|wall-tile|stuff|07f6e7
177|wall-wood|stuff|6bffc8
178|water-other|stuff|3a2995
180|window-blind|stuff|b7798e
181|window-other|stuff|ff4961
184|tree-merged|stuff|6b8e23
185|fence-merged|stuff|be9999
186|ceiling-merged|stuff|928b8d
187|sky-other-merged|stuff|4682b4
188|cabinet-merged|stuff|86c79c
189|table-merged|stuff|d1e28c
190|floor-other-merged|stuff|60246c
191|pavement-merged|stuff|606060
192|mountain-merged|stuff|40aa40
193|grass-merged|stuff|98fb98
194|dirt-merged|stuff|d0e5e4
195|paper-merged|stuff|cebaab
196|food-other-merged|stuff|98a140
197|building-other-merged|stuff|747000
198|rock-merged|stuff|00728f
199|wall-other-merged|stuff|66669c
200|rug-merged|stuff|fa8dff
"""

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
    for suffix in _NAME_SUFFIXES:
        name = name.replace(suffix, "")
    return name


def _parse_table(table: str) -> Iterator[Category]:
    for label, line in enumerate(table.strip().splitlines()):
        category_id, name, kind, color, *forms = line.split("|")
        singular, plural = forms or ("", "")
        article = ("an" if singular[0] in "aeiou" else "a") if singular else ""
        red, green, blue = bytes.fromhex(color)
        yield Category(
            category_id=int(category_id),
            label=label,
            name=name,
            display_name=without_suffixes(name),
            is_thing=kind == "thing",
            color_rgb=(red, green, blue),
            singular=singular,
            plural=plural,
            article=article,
        )


COCO_PANOPTIC = CategorySet("COCO panoptic", tuple(_parse_table(_TABLE)))
"""The set that is built in: 80 things, then 53 stuff classes."""
