"""The plan of the house: one order of rooms, imports point one way, nothing goes in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import npr_jax

PACKAGE = Path(npr_jax.__path__[0])

# A room imports itself and those before it.
ROOMS = (
    "base",
    "answers",
    "tree",
    "kernels",
    "model",
    "data",
    "runs",
    "decode",
    "evaluate",
    "report",
    "serve",
    "train",
    "plan",
    "demo",
    "cli",
)


def modules() -> dict[str, Path]:
    """All modules by their dotted names below npr_jax, packages by the name of their folder."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


KNOWN = modules()
HOMES = {f"npr_jax.{name}": home for name, home in npr_jax._HOMES.items()}


def imported(path: Path) -> set[str]:
    """Modules of npr_jax that a file imports, in functions too: `base.config`, `tree`, ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [x if x.removeprefix("npr_jax.") in KNOWN else node.module for x in whole]
            # What comes through the package's own face lives in a room, too.
            names += [HOMES[x] for x in whole if x in HOMES]
        else:
            continue
        found |= {name.removeprefix("npr_jax.") for name in names if name.startswith("npr_jax.")}
    return found


def test_every_module_lies_in_a_room():
    at_the_root = {name for name in KNOWN if "." not in name}
    assert at_the_root == {*ROOMS, "__init__", "__main__"}


def test_imports_point_one_way():
    wrong = []
    for name, path in KNOWN.items():
        room = name.split(".")[0]
        if room not in ROOMS:
            continue  # the package's own face
        allowed = ROOMS[: ROOMS.index(room) + 1]
        wrong += [f"{name} -> {x}" for x in imported(path) if x.split(".")[0] not in allowed]
    assert not wrong, f"a room imports itself and those before it, {ROOMS}: {wrong}"


def test_imports_make_no_circle():
    """A room's face imports its modules; these do not import the face."""
    TopologicalSorter({name: imported(path) for name, path in KNOWN.items()}).prepare()
