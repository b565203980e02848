"""How many rooms a package has, how they lie above one another, and which imports run back up.

A room is a direct child of a package, a module or a folder; an arrow is an import between two rooms; a floor
is a row of rooms that import nothing of each other, below all that import them. Of rooms that reach each
other none is above the other: the arrows between them are those in a circle.

    python -m benchmarks.rooms                  # this tree
    python -m benchmarks.rooms --source FOLDER --packages engine planner service    # an older one
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import grimp

PACKAGES = ("chunkplan.engine", "chunkplan.planner", "chunkplan.service")


@dataclass(frozen=True)
class Picture:
    """The rooms of one package."""

    package: str
    num_rooms: int
    num_floors: int
    num_arrows: int
    num_in_circles: int


def picture(graph: grimp.ImportGraph, package: str) -> Picture:
    """Count the rooms of a package."""
    rooms = sorted(graph.find_children(package))
    arrows = {
        (importer, imported)
        for importer in rooms
        for imported in rooms
        if importer != imported and _imports(graph, importer, imported)
    }
    below = {room: {imported for importer, imported in arrows if importer == room} for room in rooms}
    reach = {room: _reach(room, below) for room in rooms}
    circles = {(a, b) for a, b in arrows if a in reach[b]}
    return Picture(package.rpartition(".")[2], len(rooms), _num_floors(reach, below), len(arrows), len(circles))


def _imports(graph: grimp.ImportGraph, importer: str, imported: str) -> bool:
    """Does a module of one room import one of the other itself?"""
    below = {imported, *graph.find_descendants(imported)}
    modules = {importer, *graph.find_descendants(importer)}
    return any(below & graph.find_modules_directly_imported_by(module) for module in modules)


def _reach(room: str, below: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [room]
    while waiting:
        for each in below[waiting.pop()] - found:
            found.add(each)
            waiting.append(each)
    return found


def _num_floors(reach: dict[str, set[str]], below: dict[str, set[str]]) -> int:
    """Rooms of a circle share a floor."""
    floors: dict[frozenset[str], int] = {}

    def circle(room: str) -> frozenset[str]:
        return frozenset({room} | {other for other in reach[room] if room in reach[other]})

    def floor(room: str) -> int:
        own = circle(room)
        if own not in floors:
            lower = {other for member in own for other in below[member]} - own
            floors[own] = 1 + max((floor(other) for other in lower), default=0)
        return floors[own]

    return max(floor(room) for room in below)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1] / "src")
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(given.source.resolve()))
    roots = sorted({package.partition(".")[0] for package in given.packages})
    graph = grimp.build_graph(*roots, cache_dir=None)
    print("| package | rooms | floors | arrows | arrows in a circle |\n|---|---|---|---|---|")
    for package in given.packages:
        print("| " + " | ".join(map(str, astuple(picture(graph, package)))) + " |")


if __name__ == "__main__":
    main()
