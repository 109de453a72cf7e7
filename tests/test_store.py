"""The store under fire: killed processes, crowds, damage, full and read-only disks; always the same bytes."""
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import ROOT, TINY, fill, rounds_of, timeless

from deltaf1_al.config import UserError, resolve
from deltaf1_al.corpus import load_corpus
from deltaf1_al.loop import ActiveLearner, RunFolder, open_store, simulate
from deltaf1_al.store import WEIGHTS, Store

PROCESSES = multiprocessing.get_context("forkserver")  # a fresh process each time, without importing torch each time
PROCESSES.set_forkserver_preload(["deltaf1_al.loop"])


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_encoder):
    "The parameters of a run of about a second, on texts with one label or several."
    folder = tmp_path_factory.mktemp("texts")
    words = {"a": ("fine", "lovely", "great"), "b": ("dull", "awful", "flat")}
    texts = [(f"a {w} film with {n} scenes", label) for n in range(60) for label, ws in words.items() for w in ws]
    table = pd.DataFrame(texts, columns=["text", "label"]).assign(x=lambda t: (t["label"] == "a").astype(int), y=[i % 3 == 0 for i in range(len(texts))])
    table.assign(y=table["y"].astype(int)).to_json(folder / "texts.jsonl", orient="records", lines=True)
    common = {**TINY, "dataset": str(folder / "texts.jsonl"), "encoder": tiny_encoder, "epsilon": 0.3, "k": 1, "n_rounds": 4, "n_test": 40, "learning_rate": 1e-3}
    return lambda strategy="hybrid", multilabel=False, **more: {**common, "strategy": strategy, **({"label_columns": "x,y"} if multilabel else {}), **more}


def run(given, answer=None, die=None, start=None):
    "One run in this process, as the experiment notebook does it; `die` counts down writes, the last of which kills."
    if die:
        name, left = die
        real, calls = getattr(os, name), iter(range(left))
        setattr(os, name, lambda *args: real(*args) if next(calls, None) is not None else os.kill(os.getpid(), signal.SIGKILL))
    if start:
        start.wait()
    config, said = resolve(**given), []
    folder, store = RunFolder(config), open_store(config, said.append)
    learner = ActiveLearner(config, load_corpus(config), store)
    simulate(learner, folder.append)
    folder.finish(learner)
    if answer:
        answer.put((store.computed, len(learner.trained_again), said))


def in_a_process(given, die=None, after=None):
    "The exit status of a run in a process of its own; with `after`, it is killed after that many seconds."
    process = PROCESSES.Process(target=run, args=(given,), kwargs={"die": die})
    process.start()
    process.join(after)
    process.kill()
    process.join()
    return process.exitcode


def alone(given, folder):
    "The records of an undisturbed run with a store of its own, and how long it took."
    start = time.perf_counter()
    run({**given, "out_dir": str(folder / "run"), "store": str(folder / "store")})
    return timeless(rounds_of(folder / "run")), time.perf_counter() - start


def kill_and_resume(given, folder, n_kills, seed):
    "Kill a run at random moments until it has been killed that often, resuming it each time; it has to end as if nothing had happened."
    rng, kills, finished = random.Random(seed), {"any time": 0, "before a file is complete": 0, "between two files": 0}, 0
    expected, seconds = alone(given, folder / "alone")
    while sum(kills.values()) < n_kills:
        this = {**given, "out_dir": str(folder / f"run-{finished}"), "store": str(folder / f"store-{finished}")}
        how = rng.choice(list(kills))
        die = {"before a file is complete": ("fsync", rng.randrange(12)), "between two files": ("replace", rng.randrange(12))}.get(how)
        status = in_a_process(this, die, None if die else rng.uniform(0, 1.2 * seconds))
        done, store = (folder / f"run-{finished}" / "summary.json").exists(), Store(this["store"])
        assert timeless(rounds_of(this["out_dir"])) == expected[: len(rounds_of(this["out_dir"]))]
        assert all("half written" in line for line in store.check()), store.check()
        if status == -signal.SIGKILL:
            kills[how] += 1
        else:
            assert status == 0 and done
        if done:
            assert timeless(rounds_of(this["out_dir"])) == expected and store.check() == []
            finished += 1
    if not done:
        assert in_a_process(this) == 0
        assert timeless(rounds_of(this["out_dir"])) == expected
    return kills


def test_ten_kills(given, tmp_path, record_property):
    record_property("kills", kill_and_resume(given(), tmp_path, n_kills=10, seed=0))


@pytest.mark.parametrize("multilabel", [False, True], ids=["one label", "several"])
@pytest.mark.parametrize("strategy", ["retrain", "fine-tune", "new-only", "hybrid"])
def test_a_hundred_kills(strategy, multilabel, given, tmp_path, request, capsys):
    if not request.config.getoption("--long"):
        pytest.skip("100 kills take a while; pytest --long runs them")
    kills = kill_and_resume(given(strategy, multilabel), tmp_path, n_kills=13, seed=len(strategy) + multilabel)
    with capsys.disabled():
        print(f"\n{strategy}, {'several labels' if multilabel else 'one label'}: {sum(kills.values())} kills, {kills}")


@pytest.mark.parametrize("keep", ["last", "forks"])
def test_four_strategies_at_once_on_one_store(given, tmp_path, keep):
    strategies = ["retrain", "fine-tune", "new-only", "hybrid"]
    store, start, answers = str(tmp_path / "store"), PROCESSES.Barrier(4), PROCESSES.Queue()
    runs = {s: given(s, out_dir=str(tmp_path / s), store=store, keep=keep) for s in strategies}
    processes = [PROCESSES.Process(target=run, args=(given_, answers), kwargs={"start": start}) for given_ in runs.values()]
    for process in processes:
        process.start()
    got = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    computed = [key for keys, _, _ in got for key in keys]
    assert len(computed) == len(set(computed)), "something was computed twice"
    if keep == "forks":
        assert sum(again for _, again, _ in got) == 0, "weights that were kept were trained again"
    assert Store(store).check() == []
    for s in strategies:
        assert timeless(rounds_of(tmp_path / s)) == alone(given(s), tmp_path / f"{s} alone")[0]
    keys = {s: [r["key"] for r in rounds_of(tmp_path / s)] for s in strategies}
    assert len({k[0] for k in keys.values()}) == 1 and 1 <= len(set(keys["hybrid"]) & set(keys["retrain"])) < 5


def test_only_one_process_runs_in_a_folder(given, tmp_path):
    config = resolve(**given(out_dir=str(tmp_path / "run"), store=str(tmp_path / "store")))
    learner = ActiveLearner(config, load_corpus(config), open_store(config))
    script = "import sys, json; from deltaf1_al.loop import *; from deltaf1_al.config import resolve; import deltaf1_al.store as s; " + (
        "lock = s.FileLock; s.FileLock.acquire = (lambda a: lambda self, timeout=-1, **k: a(self, timeout=min(timeout, 1), **k))(lock.acquire); "
        "c = resolve(**json.loads(sys.argv[1])); open_store(c).claim(c.folder, c.hash)"
    )
    command = [sys.executable, "-c", script, json.dumps(given(out_dir=str(tmp_path / "run"), store=str(tmp_path / "store")))]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode and "is where another process is running; wait for it, or choose another out_dir" in done.stderr
    assert learner.store.runs() == []  # it has asked for nothing yet
    learner.tell(ids := learner.ask(), learner.corpus.labels[ids])
    assert [learner.store.is_live(run) for run in learner.store.runs()] == [True]
    learner.close()
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_a_full_disk(given, tmp_path, small_disk, monkeypatch):
    "One sentence; the store stays valid; with room again the run goes on to the same bytes."
    expected, _ = alone(given(), tmp_path)
    this = given(out_dir=str(tmp_path / "run"), store=str(small_disk / "store"))
    config = resolve(**this)
    folder, learner = RunFolder(config), ActiveLearner(config, load_corpus(config), open_store(config))
    for _ in range(2):
        folder.append(learner.tell(ids := learner.ask(), learner.corpus.labels[ids]))
    ids = learner.ask()
    fill(small_disk)
    with pytest.raises(UserError, match=r"store .* has \d+ MB of free space; round 2 needs \d+ MB"):
        learner.tell(ids, learner.corpus.labels[ids])
    import deltaf1_al.store as store

    free = type("usage", (), {"free": 2**40})
    with monkeypatch.context() as m:  # the disk fills up while the round is trained
        m.setattr(store.shutil, "disk_usage", lambda path: free)
        with pytest.raises(UserError, match="could not be written .No space left on device.; make room there"):
            learner.tell(ids, learner.corpus.labels[ids])
    assert learner.store.check() == [] and len(learner.records) == 2
    (small_disk / "fill").unlink()
    learner.close()
    run(this)
    assert timeless(rounds_of(tmp_path / "run")) == expected


def test_a_read_only_store(given, tmp_path, small_disk):
    store = small_disk / "store"
    run(given("retrain", n_rounds=2, out_dir=str(tmp_path / "before"), store=str(store), keep="forks"))
    before = sorted(p.relative_to(store) for p in store.rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said = []
    config = resolve(**given("retrain", out_dir=str(tmp_path / "run"), store=str(store)))
    folder, learner = RunFolder(config), ActiveLearner(config, load_corpus(config), open_store(config, said.append))
    simulate(learner, folder.append)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert [r["reused"] for r in rounds_of(tmp_path / "run")] == [True] * 3 + [False] * 2
    assert said == [f"store {store} cannot be written (Read-only file system): rounds found there are used, new ones are not kept"]
    assert timeless(rounds_of(tmp_path / "run")) == alone(given("retrain"), tmp_path / "alone")[0]
    assert sorted(p.relative_to(store) for p in store.rglob("*")) == before


def harm_weights(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [harm_weights, lambda path: os.truncate(path, 1000), lambda path: path.unlink()], ids=["bit", "cut", "gone"])
def test_damaged_weights_are_trained_again(given, tmp_path, harm):
    "The tail of a hybrid forks from weights that are no longer what they were."
    this = given("fine-tune", out_dir=str(tmp_path / "run"), store=str(tmp_path / "store"), keep="all")
    expected, _ = alone(given("fine-tune"), tmp_path / "alone")
    run({**this, "n_rounds": 2, "out_dir": str(tmp_path / "short")})
    config = resolve(**this)
    said = []
    folder, learner = RunFolder(config), ActiveLearner(config, load_corpus(config), open_store(config, said.append))
    for _ in range(3):
        folder.append(learner.tell(ids := learner.ask(), learner.corpus.labels[ids]))
    path = learner.store.folder(learner.records[2].key) / WEIGHTS
    harm(path)
    assert len(learner.store.check()) == 1
    simulate(learner, folder.append)
    assert timeless(rounds_of(tmp_path / "run")) == expected
    assert len([line for line in said if "its weights are trained again" in line]) == 1 and "\n" not in said[0]
    assert learner.store.check() == []


def test_make_store_check_and_gc(given, tmp_path):
    for name in ("a", "b"):
        run(given("retrain", out_dir=str(tmp_path / name), store=str(tmp_path / "store"), seed=int(name == "b")))
    environment = {**os.environ, "DELTAF1_AL_STORE": str(tmp_path / "store")}
    make = ["make", "-s", f"VENV={sys.prefix}"]
    done = subprocess.run([*make, "store-check"], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0 and "0 are damaged" in done.stdout, done.stdout + done.stderr
    for path in (tmp_path / "b").iterdir():
        path.unlink()
    (tmp_path / "b").rmdir()
    done = subprocess.run([*make, "store-gc"], cwd=ROOT, env=environment, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert "9 entries no run refers to" in done.stdout and "Nothing was removed" in done.stdout, done.stdout + done.stderr
    done = subprocess.run([*make, "store-gc", "YES=1"], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert "Removed" in done.stdout, done.stdout + done.stderr
    kept = Store(tmp_path / "store")
    assert (len(kept.entries()), len(list(kept.path.rglob(WEIGHTS))), kept.garbage()) == (9, 1, [])
    harm_weights(next(kept.path.rglob(WEIGHTS)))
    done = subprocess.run([*make, "store-check"], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode and "is damaged (weights.safetensors does not have the hash it was written with)" in done.stdout


def test_garbage_of_a_run_in_progress_is_left_alone(given, tmp_path):
    "No folder refers to its rounds and its policy keeps the last weights only, but it is being run."
    this = given("fine-tune", out_dir=str(tmp_path / "never made"), store=str(tmp_path / "store"))
    config = resolve(**this)
    learner = ActiveLearner(config, load_corpus(config), open_store(config))
    for _ in range(3):
        learner.tell(ids := learner.ask(), learner.corpus.labels[ids])
    here, store = sorted((tmp_path / "store").rglob("*")), Store(this["store"])
    command = [sys.executable, "-c", f"from deltaf1_al.store import collect_garbage; collect_garbage(True, {str(tmp_path / 'store')!r})"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "Removed" not in done.stdout, done.stdout + done.stderr
    assert sorted((tmp_path / "store").rglob("*")) == here
    learner.close()
    stale = store.garbage()
    assert len([path for path in stale if path.is_dir()]) == 5
    learner = ActiveLearner(config, load_corpus(config), open_store(config))  # between the listing and the removal
    learner.tell(ids := learner.ask(), learner.corpus.labels[ids])
    store.collect(stale)
    assert sorted((tmp_path / "store").rglob("*")) == here
    learner.close()
    store.collect(stale)
    assert store.entries() == [] and store.runs() == []


def test_a_labelling_session_closed_for_weeks_keeps_its_rounds(given, tmp_path):
    this = given(out_dir=str(tmp_path / "never made"), store=str(tmp_path / "store"))
    config = resolve(**this)
    corpus = load_corpus(config)
    for _ in range(2):
        learner = ActiveLearner(config, corpus, open_store(config), journal=tmp_path / "journal.jsonl")
        learner.tell(ids := learner.ask(), corpus.labels[ids])
        question = learner.ask().tolist()
        learner.close()
        assert not [path for path in Store(this["store"]).garbage() if path.is_dir()]
    learner = ActiveLearner(config, corpus, open_store(config), journal=tmp_path / "journal.jsonl")
    assert learner.ask().tolist() == question and [r.reused for r in learner.records] == [True, True]
    learner.close()
    (tmp_path / "journal.jsonl").unlink()
    assert len([path for path in Store(this["store"]).garbage() if path.is_dir()]) == 4


def test_the_table_costs_one_run_and_a_tail_for_each_switch_round(papermill, given, tmp_path):
    "30 rules; nothing is computed a second time; a cell is what a hybrid with that ε and k gives alone."
    grid = {"seeds": [0], "epsilons": [0.0, 0.01, 0.05, 0.1, 0.2, 0.5], "ks": [1, 2, 3, 4, 5]}
    shared = {name: value for name, value in given(n_rounds=6).items() if name not in ("strategy", "epsilon", "k")}
    counts = []
    for _ in range(2):
        process, folder = papermill(notebook="nbs/sensitivity.ipynb", **shared, **grid)
        assert process.returncode == 0, process.output
        counts.append(json.loads((folder / "sensitivity.json").read_text())["counts"])
    table = json.loads((folder / "sensitivity.json").read_text())
    switches = {r["switch_round"] for r in table["rules"]} - {None}
    assert counts[0]["rounds_computed_now"] == counts[0]["rounds_needed"] == 7 + sum(7 - s for s in switches)
    assert (counts[0]["rules"], counts[0]["rounds_naive"], counts[1]["rounds_computed_now"]) == (30, 31 * 7, 0)
    assert len(switches) >= 2 and (folder / "sensitivity.png").stat().st_size > 10_000
    for rule in [next(r for r in table["rules"] if r["switch_round"] == s) for s in sorted(switches)[:2]]:
        records, _ = alone({**given(n_rounds=6), "epsilon": rule["epsilon"], "k": rule["k"]}, tmp_path / f"rule {rule['switch_round']}")
        assert records[-1]["test_macro_f1"] == pytest.approx(rule["f1"], rel=1e-12) and sum(r["train_flops"] for r in records) == rule["train_flops"]
        assert next(r["round"] for r in records if r["switched"]) == rule["switch_round"]
    process, _ = papermill(notebook="nbs/sensitivity.ipynb", **{**shared, **grid, "ks": [1, 0]})
    assert process.returncode and "k is 0; allowed is 1 to 1000" in process.output
