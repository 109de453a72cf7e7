"""Every notebook runs from its first cell to its last."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

from deltaf1_al.program import acceptances, code_of, version_of
from deltaf1_al.report import paper_version

NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
OF_THE_PAPER = ("nbs/paper_figures.ipynb", "nbs/tuning.ipynb", "nbs/triggers.ipynb")  # of the version of the program that the paper names


def run(notebook):
    "From the first cell to the last, on one core."
    nbdev_test = Path(sys.executable).with_name("nbdev_test")
    return subprocess.run([nbdev_test, "--n_workers", "1", "--path", notebook], cwd=ROOT, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def started(request):
    "Notebook -> its end, for those that are asked for; as many at once as there are cores."
    asked = [item.callspec.params["notebook"] for item in request.session.items if item.name.startswith("test_notebook[")]
    with ThreadPoolExecutor(os.cpu_count()) as cores:
        yield {notebook: cores.submit(run, notebook) for notebook in asked}


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook, started):
    if notebook in OF_THE_PAPER and version_of(code_of(), acceptances()) not in (None, paper_version()):
        pytest.skip("is of another version of the program, whose code makes it: see test_accept.py")
    done = started[notebook].result()
    assert done.returncode == 0 and "Success." in done.stderr + done.stdout, done.stdout + done.stderr
