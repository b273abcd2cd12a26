"""The sets of classes that a command line's sources state, and the one set that the rows get."""

import posixpath
from collections.abc import Collection, Sequence

import pyarrow.parquet as pq

from collavo.categories import (
    NO_OBJECTS,
    categories_of_annotations,
    categories_of_file,
    common_set,
    joined,
    labels_by_id,
)
from collavo.cli import naming
from collavo.dataset import opened_parquet, read_records, stated_facts
from collavo.errors import Rejected, UserError
from collavo.sources import parsed_json
from collavo.storage import read_bytes
from pipelines.options import Flags
from pipelines.sources import opened_json
from schemas.categories import COCO_PANOPTIC, CategorySet, name_key


class SourceCategories:
    """The sets of classes of a command line's sources, which have to become one."""

    def __init__(self, flags: Flags, notes: list[str]) -> None:
        self.notes = notes
        self._found: list[CategorySet] = []
        self._looked_for: list[CategorySet] = []
        self._finished: CategorySet | None = None
        self.stated = self.renamed = None
        if path := flags.segmentation.categories:
            with naming("categories"):
                # An instance file does not say what is a thing, and so may be named here too.
                only_things = bool(flags.sources.coco_instances) and not flags.sources.coco_panoptic
                self.stated = categories_of_file(path, _bytes_of(path), only_things)
        if path := flags.segmentation.category_map:
            with naming("category_map"):
                self.renamed = _read_map(path)

    def of_annotations(self, flag: str, uri: str) -> CategorySet:
        """Read the set of an annotation file; COCO panoptic's where the file states none."""
        with opened_json(flag, uri) as file:
            stated = categories_of_annotations(file, uri, flag == "coco_instances", self.stated)
        if stated is None:
            self.notes.append(f"{uri} has no 'categories'; its numbers are taken for {COCO_PANOPTIC.name}'s")
        found, groups = stated or (COCO_PANOPTIC, frozenset())
        if not found.things:
            self.notes.append(
                f"{uri}: all of its {len(found)} classes are stuff (isthing: 0), so nothing is counted or located; "
                "where Datumaro wrote the file, it says so of any class: put 1 for things"
            )
        if groups:
            self.notes.append(
                f"{uri}: {', '.join(sorted(groups))}: the 'supercategory' of other classes, so never called absent"
            )
        # A name that the user's map settles needs no word.
        settled = {name_key(name) for name in self.renamed or ()}
        if odd := [each.name for each in found if name_key(each.name) in NO_OBJECTS - settled]:
            self.notes.append(
                f"{uri}: {', '.join(odd)}: no kind of object, so never called absent; --category_map with "
                f'{{"{odd[0]}": ""}} leaves out what is marked as one'
            )
        self.add(found, never_absent=groups.union(odd))
        return found

    def add(self, found: CategorySet, never_absent: Collection[str] = ()) -> None:
        """Take note of a set that the rows are to have, and of names in it that are asked for only where they are."""
        self._found.append(found)
        self._looked_for.append(CategorySet(found.name, tuple(c for c in found if c.name not in never_absent)))

    def would_take(self, found: CategorySet) -> bool:
        """Tell whether a set agrees with those known so far, or something says which class is which."""
        if self.stated or self.renamed or not self._found:
            return True
        try:
            common_set(self._joined([*self._found, found]))
        except UserError:
            return False
        return True

    def note_unused(self) -> None:
        """Tell of names in the map that no source has: a slip in one leaves a class as it is."""
        known = {key for found in self._found for key in found.by_key}
        if unused := [name for name in self.renamed or () if name_key(name) not in known]:
            self.notes.append(f"--category_map: no source has {', '.join(map(repr, unused))}")

    def add_finished(self, found: CategorySet, files: Sequence[str]) -> None:
        """Take note of the set of finished rows, which have to keep it: they name classes by their place in it.

        Rows that another tool has rewritten no longer state what was looked for; what a folder of them shows was.
        """
        self._finished = found
        self._found.insert(0, found)
        shown: dict[str, set[int]] = {}
        for uri in files:
            with opened_parquet(uri) as parquet:
                facts = stated_facts(parquet.metadata.metadata, uri)
                if not facts:
                    shown.setdefault(posixpath.dirname(uri), set()).update(_labels_shown(parquet))
            names = facts.get("askable")
            if isinstance(names, list):
                self._looked_for.append(CategorySet(found.name, tuple(c for c in found if c.name in names)))
        for folder, labels in shown.items():
            self._looked_for.append(CategorySet(found.name, tuple(c for c in found if c.label in labels)))
            self.notes.append(
                f"{folder or '.'}: another tool has rewritten rows, and dropped which classes were looked for; only "
                "those that their segments show are asked for where they are absent"
            )

    def askable(self) -> frozenset[int] | None:
        """Return the things, as positions among those of the target, that every source looks for; None for all.

        A file with three of COCO's classes joins COCO's set, and says nothing about the others.
        """
        position_of, askable = self.target.thing_positions, frozenset(range(len(self.target.things)))
        for found in self._looked_for:
            labels = labels_by_id(found, self.target, self.renamed).values()
            askable &= {position_of[label] for label in labels if label in position_of}
        return askable if len(askable) < len(position_of) else None

    def _joined(self, sets: Sequence[CategorySet]) -> list[CategorySet]:
        """Let sets join the built-in one, unless finished rows say which set it is."""
        return [*sets] if self._finished else [joined(found) for found in sets]

    @property
    def target(self) -> CategorySet:
        """The set that the rows have.

        Raises:
            UserError: if sources have different sets, and nothing says which class is which.
        """
        if self.stated:
            target = self.stated
        elif self.renamed and self._found:
            target = self._joined(self._found)[0]
        else:
            target = common_set(self._joined(self._found)) if self._found else COCO_PANOPTIC
        if self._finished and [(c.name, c.is_thing) for c in self._finished] != [(c.name, c.is_thing) for c in target]:
            raise UserError(
                f"the finished rows have the classes of {self._finished.name}, which are not those of {target.name}; "
                "build the others apart, or say with --category_map which of the first is which"
            )
        return target


def _labels_shown(parquet: pq.ParquetFile) -> set[int]:
    """Read which classes the segments of a file show."""
    records = read_records(parquet, columns=["segments"])
    return {s["label"] for record in records if isinstance(record, dict) for s in record["segments"] or () if s}


def _read_map(path: str) -> dict[str, str]:
    data = _bytes_of(path)
    try:
        renamed = parsed_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(renamed, dict) or not all(isinstance(name, str) for name in renamed.values()):
        raise UserError(f'{path}: expected an object of names, such as {{"pedestrian": "person"}}')
    return renamed


def _bytes_of(path: str) -> bytes:
    try:
        return read_bytes(path)
    except Rejected as error:
        said = {"missing_file": "there is no such file", "not_a_file": "this is not a file"}
        raise UserError(f"{path}: {said[error.reason]}" if error.reason in said else str(error)) from error
