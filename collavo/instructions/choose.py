"""Choose by hash, so that a choice is the same on any machine, in any order, with any number of workers.

Every choice is drawn from a hash of its subject (seed, image, task, object), never from a running generator: adding an
image or a task changes no other choice.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from schemas.categories import THINGS

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

    Adding is associative and commutative, so partial statistics can be summed anywhere.
    """

    # int64 [80, 80], symmetric: images in which two classes occur together; on its diagonal, those of one class.
    together: np.ndarray = field(default_factory=lambda: np.zeros((len(THINGS), len(THINGS)), dtype=np.int64))

    def add_image(self, present_labels: Sequence[int]) -> None:
        """Count one image, given the thing labels (0..79) that occur in it, each once."""
        self.together[np.ix_(present_labels, present_labels)] += 1

    def add(self, other: "ClassStatistics") -> None:
        self.together += other.together


def draw_absent_labels(
    present_labels: Sequence[int], count: int, statistics: ClassStatistics, *key: object
) -> list[int]:
    """Draw thing labels that are not in an image, for questions whose answer is no.

    The three kinds of POPE (arXiv 2305.10355) take turns: any class of the data set, a frequent class, a class that
    often occurs with the present ones. Each kind is a weighted draw; no label is drawn twice.

    Args:
        present_labels: thing labels (0..79) that occur in the image.
        count: how many to draw; fewer are returned only if fewer classes are absent.
        statistics: of the whole data set.
        key: the subject of the draw, from which the first kind and all chances follow.
    """
    present = list(present_labels)
    frequency = np.diagonal(statistics.together)
    weights = np.stack([frequency > 0, frequency, statistics.together[present].sum(axis=0)]).astype(np.float64)
    # A weighted draw without replacement is a race: each label arrives after an exponential time divided by its weight.
    # Labels of weight 0 come after all others: first classes of the data set, for images whose classes never occur with
    # another, then all the rest, for images that hold every class of the data set.
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
