"""The house has floors: a module imports only from lower ones, also where it imports late or for types alone."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import actrec

ROOT = Path(actrec.__file__).parent
#: From the ground up. A room is a module or a package of actrec.
FLOORS = [
    {"errors", "_text", "_torch"},
    {"_values", "_selection", "_tables"},
    {"_recordings"},
    {"_calls", "store"},
    {"_record"},
    {"data", "plot", "testing"},
    {""},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """All modules, by their name without ``actrec.``; the package itself is ``""``."""
    paths = {path.relative_to(ROOT).with_suffix(""): path for path in ROOT.rglob("*.py")}
    names = {
        ".".join(rel.parts).removesuffix("__init__").rstrip("."): p for rel, p in paths.items()
    }
    return {name if name != "__main__" else "__main__": path for name, path in names.items()}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a module imports, wherever in it that is."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = f"actrec.{package}".rstrip(".").split(".") if node.level else []
            parts = parts[: len(parts) - node.level + 1] if node.level else parts
            base = ".".join([*parts, *([node.module] if node.module else [])])
            dotted = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for one in dotted:
            if one == "actrec" or one.startswith("actrec."):
                inside = one.removeprefix("actrec").lstrip(".")
                found.add(inside if inside in known else inside.rpartition(".")[0])
    return found - {name}


def test_every_room_stands_on_a_floor_and_imports_only_from_lower_ones() -> None:
    known = modules()
    for name, path in known.items():
        room = name.partition(".")[0]
        for other in imports(name, path, known):
            there = other.partition(".")[0]
            assert there == room or FLOOR[there] < FLOOR[room], f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {name: imports(name, path, known) for name, path in known.items()}
    order = list(TopologicalSorter(graph).static_order())  # which a circle makes impossible
    assert set(order) == set(known)
