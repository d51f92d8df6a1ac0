"""The house has floors: a module imports only from lower ones, also where it imports late or for types alone."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

from tests.house import FLOORS, PICTURE, arrows, imports, modules, picture, room_of

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def test_every_room_stands_on_a_floor_and_imports_only_from_lower_ones() -> None:
    known = modules()
    for name in known:
        room = room_of(name)
        for other in imports(name, known):
            there = room_of(other)
            assert there == room or FLOOR[there] < FLOOR[room], f"{name} imports {other}"
    assert FLOOR.keys() == {room_of(name) for name in known}


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {name: imports(name, known) for name in known}
    order = list(TopologicalSorter(graph).static_order())  # which a circle makes impossible
    assert set(order) == set(known)


def test_names_with_an_underscore_stay_in_their_module() -> None:
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or "actrec" in (node.module or "")):
                private = [one.name for one in node.names if one.name.startswith("_")]
                private = [one for one in private if f"actrec.{one}" not in modules()]
                assert not private, f"{name} imports {private}"


def test_the_map_on_the_contributing_page_is_up_to_date() -> None:
    assert PICTURE.read_text() == picture(), "run python tests/house.py"


def test_an_arrow_is_drawn_only_where_no_chain_of_others_leads() -> None:
    imported = {"top": {"middle", "ground"}, "middle": {"ground"}, "ground": set()}
    assert arrows(imported) == [("top", "middle"), ("middle", "ground")]
