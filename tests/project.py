"""A copy of the project in which grids run, and what their tests ask of it."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from conftest import ROOT, TINY, rounds_of, timeless

COUNTED = """

import time

_write_uncounted = Store._write


def _write_counted(self, key, parts, made):
    _write_uncounted(self, key, parts, made)
    with open(os.environ["WRITTEN"], "a") as f:
        f.write(f"{parts['kind']} {key}\\n")
    time.sleep(float(os.environ.get("NAP", "0")))


Store._write = _write_counted
_take_back_uncounted = Store.take_back


def _take_back_counted(self, key, weights):
    with open(os.environ["WRITTEN"], "a") as f:
        f.write(f"again {key}\\n")
    _take_back_uncounted(self, key, weights)


Store.take_back = _take_back_counted
"""


def copied(folder: Path) -> Path:
    "What a clone would hold, there."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    if listed.returncode:  # not a git checkout
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".venv", "build", "runs", "store", "logs"))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def make(folder: Path, *words: str, **environment: str) -> tuple[int, str]:
    "Exit status and output of make there, with the environment that runs the tests."
    given = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", **environment}
    given = {name: value for name, value in given.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", *words, f"VENV={sys.prefix}", "READY="], cwd=folder, env=given, text=True, capture_output=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


ACCEPT = """
import json
from deltaf1_al.config import project_root
from deltaf1_al.program import ACCEPTED, Acceptance, acceptances, code_of
last, stale = acceptances()[-1], {stale!r}
line = Acceptance(last.version + bool(stale), code_of(), last.code, last.commit, stale, "of a test", "of a test")
with open(project_root() / ACCEPTED, "a") as f: f.write(json.dumps(vars(Acceptance(**vars(line) | dict(hash=line.chained(last.hash))))) + chr(10))
"""


def resealed(record, rounds=None, **changes):
    "A committed record with other rounds, and other fields in its summary, sealed again."
    from deltaf1_al.results import sealed

    if rounds is not None:
        (record / "rounds.jsonl").write_text(rounds)
    summary = json.loads((record / "summary.json").read_text()) | changes
    (record / "summary.json").write_text(json.dumps(sealed(summary, (record / "rounds.jsonl").read_text()), indent=1) + "\n")


def replace_once(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new))


class Project:
    "A copy of the project with runs and a store of its own, whose store notes what is written into it."

    def __init__(self, folder, encoder):
        self.folder, self.runs = folder / "project", folder / "runs"
        for name in ("deltaf1_al", "nbs", "paper"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        shutil.copy(ROOT / "settings.ini", self.folder)
        shutil.copytree(encoder, self.folder / "encoder")
        self.append("deltaf1_al/store.py", COUNTED)
        self.environment = {
            **os.environ, "DELTAF1_AL_RUNS": str(self.runs), "DELTAF1_AL_STORE": str(folder / "store"), "WRITTEN": str(folder / "written"),
            "PYTHONPATH": str(self.folder), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache"), "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"),
        }  # fmt: skip
        self.environment.pop("DELTAF1_AL_DATA", None)

    def append(self, path, text):
        with open(self.folder / path, "a") as f:
            f.write(text)

    def replace(self, path, old, new):
        replace_once(self.folder / path, old, new)

    def accept(self, *stale):
        "Enter the copy's code among the accepted ones, as the same program or as the next version, in which these parts are stale."
        self.python(ACCEPT.format(stale=stale))

    def study(self, **changes):
        "Write the study `it`."
        study = {**TINY, "dataset": "docstrings", "encoder": "encoder", "strategy": ["retrain", "hybrid"], "seed": 0, "job": {"mem_mb": 500}, **changes}
        (self.folder / "nbs/grid/grid.yml").write_text(yaml.safe_dump({"it": study}))

    def python(self, code):
        "What the code prints, run in the copy."
        done = subprocess.run([sys.executable, "-c", code], cwd=self.folder, env=self.environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name, *arguments, study="it"):
        "What `make` starts, as a process."
        code = "import sys; from deltaf1_al.driver import command; command(*sys.argv[1:])"
        return subprocess.Popen(
            [sys.executable, "-c", code, name, study, *arguments], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def call(self, name, *arguments, study="it"):
        "Its exit status and what it said."
        process = self.start(name, *arguments, study=study)
        said, _ = process.communicate(timeout=900)
        return process.returncode, said

    def written(self):
        "What was put into the store, in order."
        path = Path(self.environment["WRITTEN"])
        return path.read_text().splitlines() if path.exists() else []

    def folders(self):
        "Of the runs there are, by what they are called without seed and hash."
        return sorted(p.parent for p in self.runs.glob("it/*/*/*/*/config.json"))

    def processes(self):
        "All that works for this project."
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("DELTAF1_AL_RUNS") == str(self.runs) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


SLOW = {"n_rounds": 4, "max_epochs": 40, "target_loss": 0.0, "learning_rate": 1e-3}  # rounds of about a second


def until(condition, process=None, seconds=180):
    "Wait for it; fail when the process ends first, or time does."
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, "it took too long"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return found


def papermills(project):
    return [p for p in project.processes() if "papermill" in p.cmdline()]


def kernels(project):
    return [p for p in project.processes() if "ipykernel_launcher" in p.cmdline()]


def n_rounds_written(project):
    return sum(line.startswith("round") for line in project.written())


ALONE = """
import json, os, sys
os.environ["OMP_NUM_THREADS"] = "1"
from deltaf1_al.config import resolve
from deltaf1_al.corpus import load_corpus
from deltaf1_al.loop import ActiveLearner, RunFolder, simulate
for given in json.loads(sys.stdin.read()):
    config = resolve(**given)
    folder = RunFolder(config)
    simulate(ActiveLearner(config, load_corpus(config)), folder.append)
"""


def same_as_alone(project, tmp_path):
    "Every run has the records it has when it runs alone, without a store."
    given = [json.loads((folder / "config.json").read_text())["config"] | {"out_dir": str(tmp_path / "alone" / folder.name)} for folder in project.folders()]
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=project.folder, env=project.environment, text=True, capture_output=True, input=json.dumps(given))
    assert done.returncode == 0, done.stderr
    for folder in project.folders():
        assert timeless(rounds_of(folder)) == timeless(rounds_of(tmp_path / "alone" / folder.name))


def nothing_twice(project):
    "No round was computed twice, nor a question; hybrids took what they share from the store."
    written = project.written()
    assert len(written) == len(set(written)), [line for line in set(written) if written.count(line) > 1]
    assert not [line for line in written if line.startswith("again")], "weights that were not kept were trained again"
    computed = sum(not r["reused"] for folder in project.folders() for r in rounds_of(folder))
    assert computed <= n_rounds_written(project) < sum(len(rounds_of(folder)) for folder in project.folders())


