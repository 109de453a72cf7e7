"""Every notebook runs from its first cell to its last."""
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook):
    nbdev_test = Path(sys.executable).with_name("nbdev_test")
    done = subprocess.run([nbdev_test, "--n_workers", "1", "--path", notebook], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "Success." in done.stderr + done.stdout, done.stdout + done.stderr
