"""The whole program from outside. What a notebook can show stands in the notebook."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = {  # a run of a second or two once the kernel is up
    "n_initial": 8, "n_query": 8, "n_rounds": 2, "n_val": 40, "n_test": 60, "pool_size": 200, "candidate_size": 50,
    "max_length": 16, "max_epochs": 3, "min_steps": 2, "device": "cpu", "precision": "fp32",
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run what takes some minutes: the 104 kills, whole grids, Slurm")


@pytest.fixture
def long(request):
    "For tests that take minutes."
    if not request.config.getoption("--long"):
        pytest.skip("takes some minutes; pytest --long runs it")


@pytest.fixture(scope="session", autouse=True)
def folders(tmp_path_factory):
    "Caches and runs of the tests stay out of the user's."
    base = tmp_path_factory.mktemp("deltaf1_al")
    os.environ.update(DELTAF1_AL_CACHE=str(base / "cache"), DELTAF1_AL_RUNS=str(base / "runs"), DELTAF1_AL_STORE=str(base / "store"), PYDEVD_DISABLE_FILE_VALIDATION="1")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    "A one-layer DistilBERT of random weights, laid out as a hub snapshot."
    from deltaf1_al.corpus import docstrings
    from deltaf1_al.encoder import write_random_encoder

    return str(write_random_encoder(tmp_path_factory.mktemp("encoder"), docstrings().texts[:2000]))


@pytest.fixture
def papermill(tmp_path, tiny_encoder):
    "Run the experiment notebook with papermill in a process of its own: the finished process, and the run's folder."

    def start(wait=True, notebook="nbs/run_experiment.ipynb", **parameters):
        given = {**TINY, "encoder": tiny_encoder, "out_dir": str(tmp_path / "run"), "store": str(tmp_path / "store"), **parameters}
        given = {name: value for name, value in given.items() if value is not None}
        command = [sys.executable, "-m", "papermill", notebook, str(tmp_path / "run.ipynb"), "-k", "python3", "--no-progress-bar"]
        process = subprocess.Popen(
            [*command, "--log-output", "-y", json.dumps(given)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # the tests may have been started with SIGINT ignored
        )  # fmt: skip
        if wait:
            process.output, _ = process.communicate(timeout=600)
        return process, Path(given.get("out_dir", tmp_path))

    return start


@pytest.fixture
def project(tmp_path, tiny_encoder):
    "A copy of the project; what works for it ends with the test."
    from project import Project

    copy = Project(tmp_path, tiny_encoder)
    yield copy
    for process in copy.processes():
        process.kill()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "A copy whose figures, tables and numbers are made; the tests change nothing in it."
    from project import copied, make

    folder = copied(tmp_path_factory.mktemp("paper") / "clone")
    status, said = make(folder, "figures")
    assert not status, said
    return folder


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 20 MB."
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    "Write until the file system is full."
    with open(folder / "fill", "wb") as f, pytest.raises(OSError):
        while True:
            os.write(f.fileno(), b"x" * 4096)


def timeless(rounds):
    "Records without what may differ from one machine and one process to another: wall times, and whether the store had them."
    return [{name: value for name, value in r.items() if name not in ("seconds", "reused")} for r in rounds]


def rounds_of(folder):
    "The records of a run; every line must be whole."
    path = Path(folder) / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
