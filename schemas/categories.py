"""The 133 classes of COCO panoptic segmentation: 80 things, then 53 stuff classes.

Three numbers name a class, and confusing them is a classic COCO mistake:

- `category_id`  COCO's own id, 1..200 with gaps; what annotation files hold
- `label`        0..132 without gaps, in the order of the category ids; what models predict
- semantic index `label + 1`; what a crayon map holds, where 0 means unknown

Source: the category list published with the COCO panoptic challenge (ids, names, thing or stuff, colours). The English
forms are ours: a class such as `scissors` is counted in pairs, and stuff is never counted, so it has no forms.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Category:
    """One COCO panoptic class.

    `singular` and `plural` are the words a count is put before ("1 pair of scissors", "3 people"); stuff has neither.
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

    @property
    def with_article(self) -> str:
        """ "a person", "an umbrella"; a thing only."""
        article = "an" if self.singular[0] in "aeiou" else "a"
        return f"{article} {self.singular}"

    def counted(self, count: int) -> str:
        """ "1 person", "13 people", "0 people"; a thing only."""
        return f"{count} {self.singular if count == 1 else self.plural}"


def _parse_table(table: str) -> tuple[Category, ...]:
    categories = []
    for label, line in enumerate(table.strip().splitlines()):
        category_id, name, kind, color, *forms = line.split("|")
        singular, plural = forms or ("", "")
        red, green, blue = bytes.fromhex(color)
        display_name = name
        for suffix in _NAME_SUFFIXES:
            display_name = display_name.replace(suffix, "")
        categories.append(
            Category(int(category_id), label, name, display_name, kind == "thing", (red, green, blue), singular, plural)
        )
    return tuple(categories)


CATEGORIES: tuple[Category, ...] = _parse_table(_TABLE)
"""All classes, indexed by label."""

THINGS: tuple[Category, ...] = tuple(category for category in CATEGORIES if category.is_thing)

BY_CATEGORY_ID: dict[int, Category] = {category.category_id: category for category in CATEGORIES}

BY_DISPLAY_NAME: dict[str, Category] = {category.display_name: category for category in CATEGORIES}

SEMANTIC_INDICES = len(CATEGORIES) + 1
"""134: unknown and the 133 classes; the number of semantic queries of the Crayon Prompt."""

MAX_NUMBERING = 20
"""The largest ordinal an instance may carry within its class; 21 numbering queries, unknown included."""
