"""Conversations about a scene, with answers that can all be seen in the picture.

They are about places, light, colours, positions and sizes. Counts, boxes, lists of classes and the presence of a class
are left to the crayon instructions.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations

from collavo.scenes.drawing import Dice
from collavo.scenes.scene import Dialogue, SceneSegment

Fact = tuple[str, str, str]
"""A question, its answer in a word or two, and in a sentence."""

_WHERE = {
    "park": "outdoors on the grass",
    "farm": "outdoors on the grass",
    "mountains": "out in the snow",
    "beach": "on a beach",
    "harbour": "on a quay by the sea",
    "street": "on a street in a town",
    "kitchen": "indoors at a table",
    "office": "indoors at a table",
    "living room": "indoors in a living room",
}
_TIMES = {"morning": "in the morning", "day": "in the daytime", "evening": "in the evening", "night": "at night"}
_WEATHERS = {
    "clear": ("fine", "The weather is fine."),
    "cloudy": ("overcast", "It is dry, but the sky is overcast."),
    "rainy": ("rainy", "It is raining."),
    "snowy": ("snowy", "It is snowing."),
}
_WARM_CLOTHES = "Warm clothes, since snow lies on the ground."
_DARK = "The picture is dark because it is night."
_GROUNDS = {"sea": "water", "floor-wood": "wooden floor"}
_BACKGROUNDS = {
    "mountain": "mountains",
    "sea": "the sea",
    "fence": "a fence",
    "window": "a window",
    "building": "the town",
}
_NO_ARTICLE = ("icing", "handles")
_DESCRIBE = ("Describe the picture.", "What is going on in this picture?", "Give a short description of this image.")
_BRIEFLY = ("Answer with a word or a short phrase.", "Keep your answers short.", "A word or two is enough.")


def dialogues_about(
    segments: tuple[SceneSegment, ...], size_wh: tuple[int, int], place: str, time: str, weather: str, dice: Dice
) -> tuple[Dialogue, ...]:
    """Write one to three conversations of one to four questions each, answered briefly or in sentences."""
    named = dict(_references(segments, size_wh[0]))
    alone = {phrase: thing for phrase, thing in named.items() if phrase == f"the {thing.category.singular}"}
    about = dice.shuffled([*_looks(named), *_relations(alone, size_wh), *_supports(segments, alone)])
    facts = dice.shuffled([*about[:9], *_circumstances(segments, size_wh, place, time, weather)])
    description = [(dice.pick(_DESCRIBE), _description(alone, size_wh[0], place, time, weather))]
    dialogues = []
    for _ in range(dice.pick((1, 2, 2, 3))):
        brief, asked = dice.chance(0.5), [facts.pop() for _ in range(min(len(facts), dice.integer(1, 4)))]
        turns = [(question, short if brief else sentence) for question, short, sentence in asked]
        if brief and turns:
            turns[0] = (f"{turns[0][0]} {dice.pick(_BRIEFLY)}", turns[0][1])
        if description and (not turns or dice.chance(0.3)):
            turns, description = description, []
        if turns:
            turns[0] = (dice.pick(("<image>\n{}", "{}\n<image>")).format(turns[0][0]), turns[0][1])
            dialogues.append(tuple(turn for q, a in turns for turn in (("human", q), ("gpt", a))))
    return tuple(dialogues)


def _references(segments: tuple[SceneSegment, ...], width: int) -> Iterator[tuple[str, SceneSegment]]:
    """Yield phrases that fit one thing only: "the car" if there is one, else "the largest car" and the like."""
    things = [s for s in segments if s.category.is_thing]
    crowds = {s.category_id for s in things if s.is_crowd}
    for category_id in dict.fromkeys(s.category_id for s in things):
        same = [s for s in things if s.category_id == category_id]
        noun = same[0].category.singular
        if category_id in crowds:
            continue
        if len(same) == 1:
            yield f"the {noun}", same[0]
            continue
        by_size, by_x = sorted(same, key=lambda s: -s.area), sorted(same, key=_middle)
        if by_size[0].area > 1.4 * by_size[1].area:
            yield f"the largest {noun}", by_size[0]
        if _middle(by_x[1]) - _middle(by_x[0]) > 0.08 * width:
            yield f"the {noun} furthest to the left", by_x[0]
        if _middle(by_x[-1]) - _middle(by_x[-2]) > 0.08 * width:
            yield f"the {noun} furthest to the right", by_x[-1]


def _middle(segment: SceneSegment) -> float:
    return segment.box_xywh[0] + segment.box_xywh[2] / 2


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _circumstances(
    segments: tuple[SceneSegment, ...], size_wh: tuple[int, int], place: str, time: str, weather: str
) -> list[Fact]:
    """Ask about place, hour, weather and background, and about what follows from them."""
    share = Counter({s.category.display_name: s.area / (size_wh[0] * size_wh[1]) for s in segments})
    where, hour, outdoors = _WHERE[place], _TIMES[time], share["sky"] > 0.03
    sky_tells_time = (outdoors or share["window"] > 0.01) and (weather == "clear" or time == "night")
    back = " and ".join([words for name, words in _BACKGROUNDS.items() if share[name] > 0.015][:2])
    swimming = place == "beach" and time == "day" and weather == "clear"
    umbrella = "It is raining, so an umbrella or a raincoat would help."
    questions = (
        (True, "Where is this?", where, f"The picture shows a scene {where}."),
        (sky_tells_time, "What time of day is it?", hour, f"The picture is set {hour}."),
        (outdoors, "What is the weather like?", *_WEATHERS[weather]),
        (back, "What can be seen in the background?", back, f"In the background one sees {back}."),
        (weather == "rainy", "What should one take along here?", "an umbrella", umbrella),
        (place == "mountains", "What clothes does this place call for?", "warm clothes", _WARM_CLOTHES),
        (swimming, "What could one do here?", "swim", "One could swim in the sea or lie on the sand in the sun."),
        (outdoors and time == "night", "Why is the picture so dark?", "it is night", _DARK),
    )
    return [(question, f"{_capital(short)}.", sentence) for asked, question, short, sentence in questions if asked]


def _looks(named: dict[str, SceneSegment]) -> Iterator[Fact]:
    for phrase, thing in named.items():
        if thing.colors:
            subject = f"the {thing.part} of {phrase}" if thing.part else phrase
            verb = "are" if thing.part.endswith("s") else "is"
            colors = " and ".join(thing.colors)
            yield f"What colour {verb} {subject}?", f"{_capital(colors)}.", f"{_capital(subject)} {verb} {colors}."


def _relations(alone: dict[str, SceneSegment], size_wh: tuple[int, int]) -> Iterator[Fact]:
    """Compare sides, distances and sizes of two things, if they differ plainly."""
    for (a, one), (b, other) in combinations(alone.items(), 2):
        if abs(_middle(one) - _middle(other)) > 0.12 * size_wh[0]:
            side = "left" if _middle(one) < _middle(other) else "right"
            question = f"Is {a} to the left or to the right of {b}?"
            yield question, f"To the {side}.", f"{_capital(a)} is to the {side} of {b}."
        if one.base_y and other.base_y and abs(one.base_y - other.base_y) > 0.07 * size_wh[1]:
            near, far = (a, b) if one.base_y > other.base_y else (b, a)
            question = f"Which is nearer to the viewer, {a} or {b}?"
            yield question, f"{_capital(near)}.", f"{_capital(near)} is nearer to the viewer than {far}."
        if max(one.area, other.area) > 2 * min(one.area, other.area):
            large, small = (a, b) if one.area > other.area else (b, a)
            question = f"Which looks larger, {a} or {b}?"
            yield question, f"{_capital(large)}.", f"{_capital(large)} looks larger than {small}."


def _supports(segments: tuple[SceneSegment, ...], alone: dict[str, SceneSegment]) -> Iterator[Fact]:
    """Ask what things stand or sit on."""
    by_id = {s.id: s for s in segments}
    for phrase, thing in alone.items():
        riders = [s for s in segments if s.on == thing.id]
        if len(riders) == 1:
            rider = riders[0].category.with_article
            yield f"What is on {phrase}?", f"{_capital(rider)}.", f"{_capital(rider)} is on {phrase}."
        bearer = by_id[thing.on] if thing.on else None
        if bearer and not bearer.category.is_thing:
            ground = _GROUNDS.get(bearer.category.display_name, bearer.category.display_name)
            yield f"What is {phrase} on?", f"The {ground}.", f"{_capital(phrase)} is on the {ground}."


def _description(alone: dict[str, SceneSegment], width: int, place: str, time: str, weather: str) -> str:
    """Name place, hour and weather, then the three largest things that are the only ones of their kind."""
    falling = {"rainy": " It is raining.", "snowy": " It is snowing."}.get(weather, "")
    hour = " at night" if time == "night" and "indoors" not in _WHERE[place] else ""
    text = f"The picture shows a scene {_WHERE[place]}{hour}.{falling}"
    # Those with a part come last: "a chair and a person with a red shirt" leaves no doubt who wears it.
    shown = sorted(sorted(alone.values(), key=lambda s: -s.area)[:3], key=lambda s: bool(s.part))
    for third, where in enumerate(("On the left", "In the middle", "On the right")):
        here = [_with_colors(thing) for thing in shown if int(3 * _middle(thing) / width) == third]
        if here:
            text += f" {where} there is {' and '.join([', '.join(here[:-1]), here[-1]] if here[1:] else here)}."
    return text


def _with_colors(thing: SceneSegment) -> str:
    """Return a phrase such as "a red and white kite" or "a person with a blue shirt"."""
    if not thing.colors:
        return thing.category.with_article
    colors = " and ".join(thing.colors)
    article = "an" if colors[0] in "aeiou" else "a"
    if not thing.part:
        return f"{article} {colors} {thing.category.singular}"
    return (
        f"{thing.category.with_article} with {'' if thing.part in _NO_ARTICLE else article + ' '}{colors} {thing.part}"
    )
