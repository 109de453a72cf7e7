"""Grids of runs: what makes a result stale, kills, two drivers, bad places. The project is copied, so that it can be changed."""
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from project import SLOW, Project, kernels, n_rounds_written, nothing_twice, papermills, same_as_alone, until

DRY = """
from deltaf1_al.driver import drive, read_profile
from deltaf1_al.grid import read_study, state
study = read_study("it")
todo = [run for run in study.runs if state(run) != "finished"]
status = drive(study, todo, read_profile("local")[0], ["--cores", "1", "--dry-run"]) if todo else 0
assert status == 0, (study.folder / "snakemake.log").read_text()
"""


PRETEND = """
import json
from deltaf1_al.grid import read_study
from deltaf1_al.program import made_by, parts_named
for run in read_study("it").runs:
    run.folder.mkdir(parents=True)
    for name in ("config.json", "summary.json"):
        about = {"config_hash": run.config.hash, "uses": sorted(parts_named(run.config)), **made_by(run.config)}
        (run.folder / name).write_text(json.dumps(about))
    (run.folder / "rounds.jsonl").write_text("{}\\n" * (run.config.n_rounds + 1))
"""


def dry(project):
    "How many jobs of each query and strategy Snakemake would run."
    log = project.runs / "it" / "snakemake.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    project.python(DRY)
    outputs = [line.split("output: ")[1].split("/") for line in log.read_text().splitlines() if line.strip().startswith("output: docstrings/")]
    return {f"{query} {strategy}": sum(o[1:3] == [query, strategy] for o in outputs) for query, strategy in sorted({tuple(o[1:3]) for o in outputs})}


def pretend(project):
    "Write the records of all runs of the study but one, as if they had been made; so that Snakemake always has something to do."
    project.python(PRETEND)
    shutil.rmtree(next(project.runs.glob("it/*/badge/retrain/seed-1-*")))


def edit_cell(project, kind, old, new):
    "Change the run notebook's source."
    path = project.folder / "nbs/run_experiment.ipynb"
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == kind and old in "".join(cell["source"])]
    assert cells
    cells[0]["source"] = "".join(cells[0]["source"]).replace(old, new, 1).splitlines(keepends=True)
    path.write_text(json.dumps(notebook))


def touch_everything(project):
    for path in [*project.folder.rglob("*"), *project.runs.rglob("*")]:
        os.utime(path)


def change_outputs(project):
    path = project.folder / "nbs/run_experiment.ipynb"
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], 7
    path.write_text(json.dumps(notebook))


ALL = {f"{query} {strategy}": 2 for query in ("badge", "margin") for strategy in ("hybrid", "retrain", "retrain_replay_kappa_0.9")}
CHANGES = {
    "every file touched": (touch_everything, {}),
    "a comment in a used module": (lambda p: p.append("deltaf1_al/training.py", "\n# a comment\n"), {}),
    "prose in the run notebook": (lambda p: edit_cell(p, "markdown", "What it cost", "What was paid"), {}),
    "a comment in the run notebook": (lambda p: edit_cell(p, "code", "# names every random stream", "# another comment"), {}),
    "outputs of the run notebook": (change_outputs, {}),
    "Snakemake's metadata lost": (lambda p: shutil.rmtree(p.runs / "it" / ".snakemake"), {}),
    "the Snakefile": (lambda p: p.replace("nbs/grid/Snakefile", "--no-progress-bar", "--no-progress-bar --cwd ."), {}),
    "a module of figures": (lambda p: p.append("deltaf1_al/figures.py", "\nx = 1\n"), {}),
    "a display cell of the run notebook": (lambda p: edit_cell(p, "code", "sorted(p.name", "sorted(str(p.name)"), {}),
    "a new trigger, accepted": (lambda p: (p.append("deltaf1_al/trigger.py", "\nx = 1\n"), p.accept()), {}),
    "a trigger that some use, accepted": (lambda p: (p.append("deltaf1_al/trigger.py", "\nx = 1\n"), p.accept("kappa")), {key: 2 for key in ALL if "kappa" in key}),
    "a plan that some use, accepted": (lambda p: (p.append("deltaf1_al/strategy.py", "\nx = 1\n"), p.accept("replay")), {key: 2 for key in ALL if "replay" in key}),
    "a query that some use, accepted": (lambda p: (p.append("deltaf1_al/query.py", "\nx = 1\n"), p.accept("badge")), {key: 2 for key in ALL if "badge" in key}),
    "the training loop, accepted": (lambda p: (p.append("deltaf1_al/training.py", "\nx = 1\n"), p.accept("everything")), ALL),
    "the metrics": (lambda p: p.append("deltaf1_al/metrics.py", "\nx = 1\n"), ALL),
    "a code cell of the run notebook": (lambda p: edit_cell(p, "code", "records = simulate(learner, on_round)", "records = list(simulate(learner, on_round))"), ALL),
    "a default in the parameters cell": (lambda p: edit_cell(p, "code", 'strategy: str = "hybrid"', 'strategy: str = "retrain"'), ALL),
    "a parameter": (lambda p: p.study(**{**TABLE, "n_query": 9}), ALL),
    "where weights are kept": (lambda p: p.study(**{**TABLE, "keep": "none"}), {}),
    "ε": (lambda p: p.study(**{**TABLE, "epsilon": 0.3}), ALL),
    "another ε beside the first": (lambda p: p.study(**{**TABLE, "epsilon": [0.01, 0.3]}), {"badge hybrid": 2, "margin hybrid": 2}),
    "a new seed": (lambda p: p.study(**{**TABLE, "seed": [0, 1, 2]}), {key: 1 + (key == "badge retrain") for key in ALL}),
    "a deleted result": (lambda p: next(p.runs.glob("it/*/margin/retrain/seed-1-*/summary.json")).unlink(), {"margin retrain": 1}),
}  # fmt: skip
TABLE = {"query": ["margin", "badge"], "strategy": ["retrain", "hybrid", "retrain>replay@kappa(0.9)"], "seed": [0, 1], "n_stop": 20, "k": 2}


def test_what_makes_a_result_stale(project, long):
    project.study(**TABLE)
    project.accept()
    assert dry(project) == ALL
    saved = project.folder.parent / "saved"
    pretend(project)
    shutil.copytree(project.folder, saved)
    shutil.copytree(project.runs, project.folder.parent / "saved runs")
    found = {}
    for name, (change, _) in CHANGES.items():
        for here, there in ((project.folder, saved), (project.runs, project.folder.parent / "saved runs")):
            shutil.rmtree(here)
            shutil.copytree(there, here)
        change(project)
        found[name] = dry(project)
    assert found == {name: {"badge retrain": 1, **expected} for name, (_, expected) in CHANGES.items()}


def test_a_plan_of_300_runs(project):
    "Every one of them is in Snakemake's dry run; how long that takes is a benchmark, see README."
    project.study(query=["margin", "random", "entropy"], strategy=["retrain", "fine-tune", "new-only", "hybrid", "replay"], seed=list(range(20)))
    status, said = project.call("plan")
    assert status == 0 and "300 runs" in said and "· to do 300" in said, said
    assert sum(dry(project).values()) == 300


def test_kills_in_the_middle_of_a_grid(project, long, tmp_path):
    "Of a papermill, a kernel and the driver; one command goes on, nothing is computed twice, the records are what they are alone."
    project.study(**SLOW, query=["margin", "random"], epsilon=1.0, k=2, seed=[0, 1])
    driver = project.start("experiments", "local", "2")
    until(lambda: n_rounds_written(project) >= 1 and papermills(project), driver)
    papermills(project)[0].kill()
    so_far = n_rounds_written(project)
    until(lambda: n_rounds_written(project) >= so_far + 2 and kernels(project), driver)
    kernels(project)[0].kill()
    so_far = n_rounds_written(project)
    until(lambda: n_rounds_written(project) >= so_far + 2 and papermills(project), driver)
    driver.kill()
    driver.wait()
    orphans = papermills(project)
    until(lambda: not [p for p in project.processes() if "snakemake" in p.cmdline()], seconds=5)
    assert orphans, "the driver's runs go on without it"
    status, said = project.call("experiments", "local", "2")
    assert status == 0, said
    assert len(project.folders()) == 8 and all((folder / "summary.json").exists() for folder in project.folders())
    nothing_twice(project)
    before = project.written()
    status, said = project.call("experiments", "local", "2")
    assert status == 0 and "8 of 8 runs are finished, nothing to do" in said and project.written() == before
    same_as_alone(project, tmp_path)


def test_two_drivers(project, long):
    project.study(**SLOW)
    first = project.start("experiments", "local", "1")
    until(lambda: (project.runs / "it" / "plan.json").exists(), first)
    status, said = project.call("experiments")
    assert status == 1 and f"a driver works on study it already: process {first.pid} on" in said and "Nothing was done" in said, said
    status, said = project.call("status")
    assert status == 0 and f"driver {first.pid} on" in said, said
    until(lambda: n_rounds_written(project) >= 1, first)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and "Stopping; finished rounds are kept." in said, said
    until(lambda: not project.processes(), seconds=30)
    status, said = project.call("experiments", "local", "1")
    assert status == 0, said
    nothing_twice(project)


def test_a_run_that_fails_does_not_keep_others_from_running(project, long):
    "One data set is not there; its runs say so, also the hybrid, which was to follow a run that failed."
    project.study(dataset=["docstrings", "ag_news"])
    status, said = project.call("experiments")
    assert status == 1 and said.count(" ✓ docstrings/") == 2 and said.count(" ✗ ag_news/") >= 2, said
    status, said = project.call("status")
    assert status == 0 and "✓ finished 2  ✗ failed 2" in said
    failed = [line for line in said.splitlines() if line.startswith("✗ ag_news/")]
    assert len(failed) == 2 and all("UserError: dataset 'ag_news' could not be loaded from the hub" in line for line in failed), said
    notebooks = [Path(line.strip()) for line in said.splitlines() if line.strip().endswith("run.ipynb")]
    assert len(notebooks) == 2 and all("could not be loaded" in path.read_text() for path in notebooks)


def test_places_that_cannot_be_used(project, small_disk):
    project.study()
    project.environment["DELTAF1_AL_RUNS"] = str(small_disk)
    status, said = project.call("experiments")
    assert status == 1 and "MB of free space; at least 67 MB are needed, or DELTAF1_AL_RUNS" in said and "Traceback" not in said, said
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, said = project.call("experiments")
    assert status == 1 and "cannot be written (" in said and "set DELTAF1_AL_RUNS to another folder" in said and "Traceback" not in said, said


@pytest.mark.parametrize("arguments, says", [
    (("experiments", "slrum"), "PROFILE is 'slrum'; allowed are local, slurm, or a folder with a config.yaml"),
    (("experiments", "local", "none"), "JOBS is 'none'; allowed is a number from 1 on"),
    (("plan",), "study it of nbs/grid/grid.yml: unknown parameter n_round"),
])  # fmt: skip
def test_bad_words(project, arguments, says):
    project.study(**({"n_round": 3} if arguments == ("plan",) else {}))
    status, said = project.call(*arguments)
    assert status == 1 and said.startswith(says) and len(said.splitlines()) == 1, said


def test_results_are_promoted_and_checked(project, long):
    project.study(seed=[0, 1], n_rounds=1)
    project.accept()
    status, said = project.call("experiments", study="it/docstrings/margin/hybrid")
    assert status == 0 and "0 of 2 runs are finished; 2 to do" in said and len(project.folders()) == 2, said
    status, said = project.call("experiments")
    assert status == 0 and "2 of 4 runs are finished; 2 to do" in said, said
    status, said = project.call("results")
    assert status == 0 and "4 records written, 0 removed that the study no longer asks for, 0 of 4 runs still missing" in said, said
    records = sorted((project.folder / "paper/results/it").rglob("summary.json"))
    text = "".join(path.read_text() for path in (project.folder / "paper/results/it").rglob("*.json*"))
    assert len(records) == 4 and str(project.runs) not in text and "/root" not in text
    check = "from deltaf1_al.results import *; print(*check_results('it'), sep='\\n'); print(load_results('it').groupby('strategy').size().to_dict())"
    assert "{'hybrid': 4, 'retrain': 4}" in project.python(check)
    shutil.move(records[0].parent, project.folder / "elsewhere")
    load = "from deltaf1_al.results import *\ntry: load_results('it')\nexcept ValueError as e: print(e)"
    refused = project.python(load)
    assert refused.startswith(f"{records[0].parent.relative_to(project.folder)}: is missing; make experiments STUDY=it, then make results"), refused
    shutil.move(project.folder / "elsewhere", records[0].parent)
    shutil.rmtree(records[-1].parent)  # of retrain
    status, said = project.call("results", study="it/docstrings/margin/hybrid")
    assert status == 0 and "0 records written, 0 removed that the study no longer asks for, 0 of 2 runs still missing" in said, said
    assert sorted((project.folder / "paper/results/it").rglob("summary.json")) == records[:-1]
    project.study(seed=1, n_rounds=1)
    status, said = project.call("results")
    assert status == 0 and "1 records written, 2 removed that the study no longer asks for" in said, said
    project.append("deltaf1_al/metrics.py", "\nx = 1\n")
    refused = project.python(load)
    assert "is no accepted version of the program; `make accept` decides" in refused
    status, said = project.call("plan")
    assert status == 0 and "2 runs have records that another program has made; `make accept` decides whether it is the same." in said, said
    project.accept("everything")
    refused = project.python(load)
    assert refused.startswith("paper/results/it/docstrings/margin/") and "is of version 1 of the program, not of version 2" in refused, refused
    status, said = project.call("results")
    assert status == 1 and "is of another version of the program (and 1 more); a study by today's program needs a name of its own in nbs/grid/grid.yml" in said, said
    assert "{'hybrid': 2, 'retrain': 2}" in project.python("from deltaf1_al.results import *; print(load_results('it', 1).groupby('strategy').size().to_dict())")


def test_a_study_goes_on_on_another_clone(project, long, tmp_path, tiny_encoder):
    "Killed on one machine, with some of its runs promoted; another has nothing but the committed records, and runs only the others."
    project.study(**SLOW, seed=[0, 1])
    project.accept()
    driver = project.start("experiments", "local", "2")
    until(lambda: list(project.runs.glob("it/*/*/*/*/summary.json")), driver)
    driver.kill()
    driver.wait()
    for process in project.processes():
        process.kill()
    until(lambda: not project.processes(), seconds=30)
    status, said = project.call("results")
    committed = {path.parent.relative_to(project.folder / "paper/results") for path in (project.folder / "paper/results/it").rglob("summary.json")}
    assert status == 0 and committed and f"{len(committed)} records written" in said and f"{4 - len(committed)} of 4 runs still missing" in said, said
    other = Project(tmp_path / "other", tiny_encoder)
    for name in ("paper/results", "nbs/grid"):
        shutil.rmtree(other.folder / name)
        shutil.copytree(project.folder / name, other.folder / name)
    status, said = other.call("plan")
    assert status == 0 and f"✓ finished {len(committed)}" in said and f"· to do {4 - len(committed)}" in said, said
    status, said = other.call("experiments")
    assert status == 0 and f"{len(committed)} of 4 runs are finished; {4 - len(committed)} to do" in said, said
    computed = {folder.relative_to(other.runs) for folder in other.folders()}
    assert len(computed) == 4 - len(committed) and not computed & committed
    status, said = other.call("experiments")
    assert status == 0 and "4 of 4 runs are finished, nothing to do" in said, said
    status, said = other.call("results")
    assert status == 0 and f"{len(computed)} records written, 0 removed" in said and "0 of 4 runs still missing" in said, said
