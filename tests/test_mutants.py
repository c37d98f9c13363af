"""The list of deliberate faults (`make mutants`) fits the code as it is."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts/mutants.py"))
MUTANTS, fault_of = SCRIPT["read_mutants"](), SCRIPT["fault_of"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda x: f"{x['file']}: {x['old']}"[:80])
def test_every_fault_has_its_place_and_its_test(mutant):
    if mutant["file"].endswith(".py"):
        compile(fault_of(mutant), mutant["file"], "exec")  # raises where there is no place
    assert mutant["new"] != mutant["old"]
    assert (ROOT / mutant["test"]).is_file()


def test_every_room_has_faults():
    rooms = {path.name for path in (ROOT / "npr_jax").iterdir() if (path / "__init__.py").exists()}
    assert len(MUTANTS) >= 60
    assert {x["file"].split("/")[1] for x in MUTANTS} >= rooms
