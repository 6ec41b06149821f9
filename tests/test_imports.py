"""The order of the rooms: a file imports only from files above it, and none is called utils."""

import ast
from pathlib import Path

import secateurs

SOURCE = Path(secateurs.__file__).parent
ORDER = [
    {"artifacts", "patterns", "leaks", "hub", "parallel", "statistics", "kernels", "int4"},
    {"linalg", "rows", "ranks"},
    {"questions"},
    {"layer", "traces", "prompts"},
    {"scores", "engines"},
    {"solvers", "goals", "tune", "allocators", "calibration", "policy"},
    {"models"},
    {"checkpoint", "cuts"},
    {"collect", "trim"},
    {"pruner", "survey"},
    {"export", "evaluate", "planner", "experts", "narrow"},
    {"report", "packed", "reload"},
    {"page", "runtime"},
    {"packing", "compressed"},
    {"masks"},
    {"recipe", "gains"},
    {"corpus"},
    {"dense"},
    {"ask"},
    {"cell", "bench"},
    {"preview"},
    {"study"},
    {"cli"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
NO_TORCH = {"artifacts", "statistics", "leaks", "hub", "rows", "questions", "traces", "prompts", "report", "page"}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = [path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem != "__init__"]


def test_every_file_has_a_place_in_the_order():
    assert {room(path) for path in FILES} == set(RANK)


def test_imports_only_go_up():
    wrong = []
    for path in FILES:
        for name in imported(path):
            parts = name.split(".")
            inside = parts[0] == "secateurs" and len(parts) > 1 and parts[1] in RANK and parts[1] != room(path)
            if inside and RANK[parts[1]] >= RANK[room(path)]:
                wrong.append(f"{path.name} imports {name}")
    assert not wrong


def test_the_data_lane_does_not_need_torch():
    for path in FILES:
        if room(path) in NO_TORCH:
            assert not any(name.split(".")[0] in ("torch", "transformers") for name in imported(path)), path


def test_no_room_without_a_purpose():
    assert not {room(path) for path in FILES} & {"utils", "common", "core", "base", "helpers"}
