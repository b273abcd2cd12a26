"""Choices by hash: the same for any machine, order or number of workers, and independent of one another.

Every choice is drawn from a hash of what it is about (seed, image, task, object), never from a running generator, so
that adding an image or a task changes no other choice.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from schemas.categories import THINGS

NEGATIVE_KINDS = ("random", "popular", "cooccurring")


def stable_hash(*parts: object) -> int:
    """A 64-bit hash of some values, the same everywhere and for ever."""
    return int.from_bytes(hashlib.blake2b(_joined(parts), digest_size=8).digest(), "little")


def stable_uniforms(count: int, *parts: object) -> np.ndarray:
    """`count` numbers in (0, 1) out of a hash of some values, float64."""
    bits = np.frombuffer(hashlib.shake_128(_joined(parts)).digest(8 * count), dtype="<u8")
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _joined(parts: Sequence[object]) -> bytes:
    return "\x1f".join(map(str, parts)).encode()


@dataclass(slots=True)
class ClassStatistics:
    """In how many images each thing class occurs, alone and beside each other one; what POPE's negatives rest on.

    `together` is int64 [80, 80], symmetric, its diagonal the plain frequencies. Adding is associative and commutative,
    so partial statistics can be summed anywhere.
    """

    together: np.ndarray = field(default_factory=lambda: np.zeros((len(THINGS), len(THINGS)), dtype=np.int64))

    def add_image(self, present_labels: Sequence[int]) -> None:
        """Count one image, given the thing labels (0..79) that occur in it, each once."""
        self.together[np.ix_(present_labels, present_labels)] += 1

    def add(self, other: "ClassStatistics") -> None:
        self.together += other.together


def draw_absent_labels(
    present_labels: Sequence[int], count: int, statistics: ClassStatistics, *key: object
) -> list[int]:
    """Thing labels that are not in an image, to ask for all the same.

    The three kinds of POPE (arXiv 2305.10355) take turns: any class of the data set, a frequent class, a class that
    often goes with those present. Each kind is a weighted draw, without replacement over all kinds.

    Args:
        present_labels: thing labels (0..79) that occur in the image.
        count: how many to draw; fewer come back only if fewer classes are absent.
        statistics: of the whole data set.
        key: what the draw is about; the first kind and the order follow from it.
    """
    present = list(present_labels)
    frequency = np.diagonal(statistics.together)
    weights = np.stack([frequency > 0, frequency, statistics.together[present].sum(axis=0)]).astype(np.float64)
    # An exponential race for each kind. Where nothing goes with those present, any class of the data set will do; where
    # all of those are present, any at all.
    preference = np.where(weights > 0, 0, np.where(frequency > 0, 1, 2))
    waiting = -np.log(stable_uniforms(weights.size, "absent", *key)).reshape(weights.shape)
    arrivals = np.lexsort((waiting / np.where(weights > 0, weights, 1.0), preference))
    races = [iter(labels) for labels in arrivals.tolist()]
    first_kind = stable_hash("kind", *key) % len(NEGATIVE_KINDS)
    taken = set(present)
    drawn: list[int] = []
    for turn in range(min(count, len(THINGS) - len(present))):
        race = races[(first_kind + turn) % len(races)]
        drawn.append(next(label for label in race if label not in taken))
        taken.add(drawn[-1])
    return drawn
