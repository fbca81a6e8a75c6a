"""The house: imports point one way, from room to room and from file to file."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "ms_quant": (
        *("native_library", "errors", "timestep", "budget", "allocation", "progress", "numerics"),
        *("kernels", "attention", "files", "schemes", "models", "statistics", "algorithms", "data"),
        *("recipe", "plan", "job", "quantization", "formats", "verify", "serve", "diffusers"),
        *("pipeline", "evaluation", "tasks", "server", "report", "analysis", "mixed_precision"),
        *("cells", "cli"),
    ),
    "sparse_compress": (
        *("codec", "rate", "layouts", "ranks", "msmodelslim", "verify", "serve", "pipeline"),
        *("vllm_plugin", "cli"),
    ),
}


def modules() -> dict[str, Path]:
    found = {}
    for package in ROOMS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def known(name: str) -> str:
    """The module that a dotted name is or lies in, or ""."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def imported(tree: ast.AST, *, at_once: bool) -> set[str]:
    """Modules that a tree imports; ``at_once``: only those that importing it imports."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if at_once and (
            isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ):
            continue
        if isinstance(node, ast.Import):
            found |= {known(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {known(f"{node.module}.{alias.name}") for alias in node.names}
        found |= imported(node, at_once=at_once)
    return found - {""}


TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def test_no_file_imports_itself_in_a_circle():
    graph = {name: imported(tree, at_once=True) - {name} for name, tree in TREES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_from_rooms_above(package):
    rooms, wrong = ROOMS[package], []
    for name, tree in TREES.items():
        own, _, rest = name.partition(".")
        if own != package or not rest:
            continue
        room = rest.partition(".")[0]
        for other in imported(tree, at_once=False):
            place, _, inner = other.partition(".")
            if place != package or not inner:
                continue
            if rooms.index(inner.partition(".")[0]) > rooms.index(room):
                wrong.append(f"{name} -> {other}")
    assert not wrong


def test_the_quantizer_does_not_know_the_compressor():
    users = [n for n in TREES if n.startswith("ms_quant")]
    assert not [
        n
        for n in users
        if any(m.startswith("sparse_compress") for m in imported(TREES[n], at_once=False))
    ]


def test_mindspore_is_imported_only_where_networks_or_gradients_are():
    users = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and node.names[0].name.startswith("mindspore"))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mindspore"))
    }
    assert {name for name in users if not name.startswith("ms_quant.cells")} == {
        "ms_quant.algorithms.flat_training",
        "ms_quant.cli.console",  # prepares it for that training
        "ms_quant.job.directory",  # records its version
        "sparse_compress.vllm_plugin.runtime",  # sets vllm-mindspore's parameters
    }


def test_every_room_is_in_the_list():
    for package, rooms in ROOMS.items():
        found = {n.split(".")[1] for n in MODULES if n.startswith(f"{package}.")}
        assert found == set(rooms), sys.version


def test_the_drawing_has_the_rooms_in_their_order():
    """Floors from the ground up, each from left to right; the smaller house stands to the right."""
    drawing = (ROOT / "docs" / "images" / "house.svg").read_text()
    found = re.findall(r'<text class="room" x="(\d+)" y="(-?\d+)">(\w+)<', drawing)
    places = sorted((-int(y), int(x), room) for x, y, room in found)
    drawn = {
        "ms_quant": tuple(room for _, x, room in places if x < 900),
        "sparse_compress": tuple(room for _, x, room in places if x >= 900),
    }
    assert drawn == ROOMS
