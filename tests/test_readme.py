"""The README's figures are those of the result files."""

import subprocess
import sys
from pathlib import Path


def test_the_readme_says_what_the_results_say():
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "bench" / "table.py"), "--check"]
    assert subprocess.run(command).returncode == 0, "run bench/table.py"
