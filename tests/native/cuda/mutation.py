"""What a fault of the mutation test is."""

from __future__ import annotations

from dataclasses import dataclass

BARRIER = "sync_block();"


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
        name: What is wrong.
        path: The file, from the repository's root.
        old: What stands there, exactly once; white space counts as one space.
        new: What is put in its place.
        unit: Stem of the source that is compiled with it; all others are the right ones.
        calls: Whose calls may notice it, which come first; the unit's if empty.
    """

    name: str
    path: str
    old: str
    new: str
    unit: str
    calls: str = ""


def faults_in(path: str, unit: str, *faults: tuple[str, ...]) -> list[Mutation]:
    """A fault is its name, old and new text and, where it is not the file's, its unit."""
    return [
        Mutation(fault[0], path, fault[1], fault[2], *(fault[3:] or (unit,))) for fault in faults
    ]
