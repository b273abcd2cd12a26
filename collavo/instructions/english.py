"""The English of class names: how questions and object lists call a class, one of it, several, and with which article.

What a list of classes states counts. COCO's classes bring theirs in `schemas/coco_panoptic.json`; for others, rules do.
"""

import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any

from schemas.categories import COCO_PANOPTIC, without_suffixes

# Words that name one thing in the plural; a count is put before "pair of".
_PAIRS = frozenset(
    "scissors glasses sunglasses goggles headphones trousers pants shorts jeans leggings tights skis pliers tweezers "
    "binoculars shears tongs".split()
)

# Words without a plural of their own; a count is put before "piece of", as before COCO's broccoli.
_MASSES = frozenset(
    "food clothing apparel furniture luggage baggage jewelry jewellery equipment machinery bread meat cheese rice "
    "pasta cutlery silverware stationery footwear headgear underwear litter rubbish garbage debris wood".split()
)


def display_name_of(name: str) -> str:
    """Write a name as questions and object lists hold it: a synonym, no suffix, no underscore, none of their marks."""
    text = unmarked(without_suffixes(name.partition(",")[0]).replace("_", " "))
    return text.lower() if text.istitle() else text


def unmarked(text: str) -> str:
    """Take away what has a meaning in `(#1 name)`."""
    return " ".join(re.sub(r"[()#]", " ", text).split())


def english_forms(record: Mapping[str, Any]) -> dict[str, str]:
    """Singular, plural and article of a thing: the record's own, COCO's where it has the class, else by rule."""
    known = COCO_PANOPTIC.by_key.get(record["key"])
    singular, plural = record["singular"], record["plural"]
    if not singular and known and known.is_thing:
        return {"singular": known.singular, "plural": plural or known.plural, "article": known.article}
    engine = _inflect()
    if not singular:
        name = record["display_name"]
        if name == "clothes":  # which is no plural of anything
            singular, plural = "piece of clothing", plural or "pieces of clothing"
        elif (last := name.lower().split()[-1]) in _PAIRS | _MASSES:
            what = "pair" if last in _PAIRS else "piece"
            singular, plural = f"{what} of {name}", plural or f"{what}s of {name}"
        else:
            # inflect knows words in small letters.
            word = name.lower() if name.isupper() else name
            one = engine.singular_noun(word)
            # inflect takes `bus` and `tennis` for plurals of `bu` and `tenni`.
            is_plural = one and engine.plural_noun(one) == word and not word.endswith(("us", "is", "as", "ss", "lens"))
            singular, plural = (one.upper() if name.isupper() else one, plural or name) if is_plural else (name, plural)
    # inflect spells capitals out, which is right for short words: "an FBI agent", but "a STRAWBERRY".
    spelt = singular if len(singular.split()[0]) < 5 else singular.lower()
    return {
        "singular": singular,
        "plural": plural or _plural_of(singular),
        "article": engine.a(spelt).partition(" ")[0],
    }


def _plural_of(singular: str) -> str:
    if not any("LATIN" in unicodedata.name(letter, "") for letter in singular):
        return singular  # no rule of English holds
    if singular[-1].islower():
        return str(_inflect().plural_noun(singular))
    # By its small letters: of capitals, inflect makes SUVS and BATTERYS, and of WOMAN `women`.
    plural = str(_inflect().plural_noun(singular.lower()))
    ending = plural.removeprefix(singular.lower()).lower()
    if ending in ("", "s", "es"):
        return singular + ending  # SUVs and type 2s
    return plural.upper() if singular.isupper() else plural


@cache
def _inflect() -> Any:
    # Only a set without English forms needs it. For its own type checks, typeguard would parse all of inflect again for
    # each of its methods: five seconds, and a third of one without them.
    from unittest.mock import patch

    import typeguard

    with patch.object(typeguard, "typechecked", lambda function: function):
        import inflect
    return inflect.engine()
