"""Choose by hash, so that a choice is the same on any machine, in any order, with any number of workers.

Every choice is drawn from a hash of its subject (seed, image, task, object), never from a running generator: adding an
image or a task changes no other choice.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

NEGATIVE_KINDS = ("random", "popular", "cooccurring")


def stable_hash(*parts: object) -> int:
    """Hash some values to 64 bits, the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(_joined(parts), digest_size=8).digest(), "little")


def stable_uniforms(count: int, *parts: object) -> np.ndarray:
    """Draw `count` numbers in (0, 1) from a hash of some values: float64 [count]."""
    bits = np.frombuffer(hashlib.shake_128(_joined(parts)).digest(8 * count), dtype="<u8")
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _joined(parts: Sequence[object]) -> bytes:
    return "\x1f".join(map(str, parts)).encode()


@dataclass(slots=True)
class ClassStatistics:
    """Counts of images by thing class, and by pair of thing classes, from which POPE's negatives are drawn.

    `together` is int64 [things, things], symmetric, its diagonal the plain frequencies; a class is its position among
    the things of its set. Adding is associative and commutative, so partial statistics can be summed anywhere.
    """

    together: np.ndarray

    askable: frozenset[int] | None = None
    """The things that may be called absent; None for all. What no source looks for may be in any picture."""

    @classmethod
    def of(cls, things: int) -> Self:
        """Empty statistics over that many thing classes."""
        return cls(np.zeros((things, things), dtype=np.int64))

    def add_image(self, present: Sequence[int]) -> None:
        """Count one image, given the things that occur in it, each once."""
        self.together[np.ix_(present, present)] += 1

    def add(self, other: "ClassStatistics") -> None:
        self.together += other.together


def draw_absent_things(present: Sequence[int], count: int, statistics: ClassStatistics, *key: object) -> list[int]:
    """Draw things that are not in an image, to ask for all the same.

    The three kinds of POPE (arXiv 2305.10355) take turns: any class of the data set, a frequent class, a class that
    often occurs with the present ones. Each kind is a weighted draw; no label is drawn twice.

    Args:
        present: the things that occur in the image, as positions among the things of their set.
        count: how many to draw; fewer come back only if fewer classes are absent and askable.
        statistics: of the whole data set.
        key: the subject of the draw, from which the first kind and all chances follow.
    """
    frequency = np.diagonal(statistics.together)
    seen = frequency > 0
    weights = np.array((seen, frequency, statistics.together[list(present)].sum(axis=0)), np.float64)
    # An exponential race for each kind. Where nothing goes with those present, any class of the data set will do; where
    # all of those are present, any at all.
    preference = np.where(weights > 0, 0, 2 - seen)
    waiting = -np.log(stable_uniforms(weights.size, "absent", *key)).reshape(weights.shape)
    arrivals = np.lexsort((waiting / np.maximum(weights, 1.0), preference))
    races = [iter(things) for things in arrivals.tolist()]
    first_kind = stable_hash("kind", *key) % len(NEGATIVE_KINDS)
    absent = set(range(len(frequency)) if statistics.askable is None else statistics.askable).difference(present)
    drawn: list[int] = []
    for turn in range(min(count, len(absent))):
        race = races[(first_kind + turn) % len(races)]
        drawn.append(next(thing for thing in race if thing in absent))
        absent.remove(drawn[-1])
    return drawn
