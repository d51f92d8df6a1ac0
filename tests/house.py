"""The map of the house: which room of actrec imports which. ``python tests/house.py`` draws it, and lists the files.

The picture is ``docs/house.svg``. It shows rooms (a module or a package of actrec) on their floors. An arrow leads from a
room to one that it imports, unless other arrows lead there as well.
"""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "house.svg"
#: From the ground up, each room with its column in the picture, so that no arrow crosses a box. A room imports only from
#: lower floors; the package itself is ``""``.
FLOORS = [
    {"_torch": 0, "errors": 1, "_text": 2, "_rank": 3, "_progress": 4},
    {"_selection": 0, "_attention": 1, "_values": 2, "_tables": 3},
    {"reduce": 0, "_layers": 1, "_recordings": 4},
    {"_calls": 0, "_report": 2, "store": 3},
    {"_block": 2},
    {"testing": 0, "_record": 2, "data": 3, "plot": 4},
    {"": 1},
    {"__main__": 1},
]


def modules() -> dict[str, Path]:
    """All modules, by their name without ``actrec.``; the package itself is ``""``."""
    package = ROOT / "actrec"
    paths = {path.relative_to(package).with_suffix(""): path for path in package.rglob("*.py")}
    dotted = {".".join(relative.parts): path for relative, path in paths.items()}
    return {name.removesuffix("__init__").rstrip("."): path for name, path in dotted.items()}


def imports(name: str, known: dict[str, Path]) -> set[str]:
    """The modules that a module imports, wherever in it that is: at the top, late, or for types alone."""
    path = known[name]
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


def room_of(name: str) -> str:
    return name.partition(".")[0]


def room_imports() -> dict[str, set[str]]:
    """For each room, the rooms that it imports."""
    known = modules()
    found: dict[str, set[str]] = {room: set() for floor in FLOORS for room in floor}
    for name in known:
        found[room_of(name)] |= {room_of(other) for other in imports(name, known)}
    return {room: others - {room} for room, others in found.items()}


def below(room: str, imported: dict[str, set[str]]) -> set[str]:
    """The rooms that can be reached from one, itself not included."""
    return set().union(*({other} | below(other, imported) for other in imported[room]))


def arrows(imported: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that no chain of other imports stands for."""
    found = []
    for room, others in imported.items():
        further = set().union(*(below(other, imported) for other in others))
        found += [(room, other) for other in sorted(others - further)]
    return found


def summary(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "")


# --- The picture -------------------------------------------------------------------------------------

COLUMN, BOX, HEIGHT, GAP = 270, 246, 88, 36
WIDTH = 5 * COLUMN
STYLE = """
text { font: 12px sans-serif; fill: #222 }
text.name { font: bold 14px monospace }
rect.room { fill: #fff; stroke: #666 }
line { stroke: #888; marker-end: url(#tip) }
"""


def corners() -> dict[str, tuple[float, float]]:
    """The upper left corner of each room's box: the ground floor is at the bottom."""
    return {
        room: ((COLUMN - BOX) / 2 + column * COLUMN, GAP / 2 + row * (HEIGHT + GAP))
        for row, floor in enumerate(reversed(FLOORS))
        for room, column in floor.items()
    }


def box(room: str, left: float, top: float, about: str) -> str:
    lines = wrap(about, 34)[:4]
    texts = [f'<text class="name" x="{left + 10:g}" y="{top + 20:g}">{room or "actrec"}</text>']
    texts += [
        f'<text x="{left + 10:g}" y="{top + 37 + 14 * at:g}">{escape(line)}</text>'
        for at, line in enumerate(lines)
    ]
    frame = f'<rect class="room" x="{left:g}" y="{top:g}" width="{BOX}" height="{HEIGHT}" rx="6"/>'
    return "\n".join([frame, *texts])


def picture() -> str:
    """Return the map as SVG."""
    places, known = corners(), modules()
    lines = []
    for room, other in arrows(room_imports()):
        (x, y), (to_x, to_y) = places[room], places[other]
        ends = (x + BOX / 2, y + HEIGHT, to_x + BOX / 2, to_y - 2)
        lines.append('<line x1="{:g}" y1="{:g}" x2="{:g}" y2="{:g}"/>'.format(*ends))
    boxes = [box(room, *places[room], summary(known[room])) for room in places]
    height = len(FLOORS) * (HEIGHT + GAP)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"',
            'orient="auto"><path d="M0 0 8 4 0 8z" fill="#888"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{height}" fill="#f6f6f4"/>',
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


def listing() -> str:
    """Return all files, from the ground up, each with what it says it is."""
    known = modules()
    files = [
        (name, path)
        for floor in FLOORS
        for room in floor
        for name, path in sorted(known.items())
        if room_of(name) == room
    ]
    return "\n".join(f"{path.relative_to(ROOT)!s:34} {summary(path)}" for _, path in files)


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(listing())  # noqa: T201
