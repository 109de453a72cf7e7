"Records stay true while the code moves: what `make accept` lets pass, what it names, and what a paper of an earlier version is built from."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from project import ACCEPT, copied, make, replace_once, resealed, sha256

from deltaf1_al.accept import differences, stale_parts
from deltaf1_al.golden import GOLDEN, write_inputs
from deltaf1_al.program import ACCEPTED


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *who, *words], cwd=folder, text=True, capture_output=True, check=True).stdout


def python(folder: Path, code: str, *arguments: str) -> str:
    "What the code prints, run with the package of that folder."
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FEW = "retrain fine-tune new-only shrink-perturb replay hybrid fixed-round margin several several-hybrid packed-bf16 still-hybrid".split()


@pytest.fixture
def clone(tmp_path):
    "A repository of its own with what a clone would hold, and with fewer golden runs, which take half a minute."
    folder = copied(tmp_path / "clone")
    runs = yaml.safe_load((folder / GOLDEN).read_text())
    (folder / GOLDEN).write_text(yaml.safe_dump({name: runs[name] for name in FEW}))
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "as it is")
    return folder


CHECK = "from deltaf1_al.results import check_results; print(*check_results(), sep='\\n')"


# ---- what may be changed


def rewrite(path: Path, change):
    path.write_text(change(path.read_text()))


def reformat(path: Path):
    "Every line anew, comments gone."
    rewrite(path, lambda text: ast.unparse(ast.parse(text)) + "\n")


def display_cell(path: Path):
    notebook = json.loads(path.read_text())
    notebook["cells"][-1]["source"] = ["sorted(str(p.name) for p in folder.path.iterdir() if not p.name.startswith('.'))"]
    path.write_text(json.dumps(notebook, indent=1))


def move_function(package: Path):
    "`decide` of metrics to scoring."
    text = (package / "metrics.py").read_text()
    function = text[text.index("def decide(") : text.index("# %% ../nbs/06_metrics.ipynb #ec6e25ed")]
    (package / "metrics.py").write_text(text.replace(function, "from .scoring import decide\n"))
    with open(package / "scoring.py", "a") as f:
        f.write("\n\n" + function)


def split_module(package: Path):
    "The clock and the counted work out of training."
    text = (package / "training.py").read_text()
    imports, rest = text[: text.index("@dataclass\nclass Work")], text[text.index("@dataclass\nclass Work") :]
    (package / "ledger.py").write_text(imports + rest[: rest.index("def stop_reason(")])
    (package / "training.py").write_text(imports + "from .ledger import Clock, Progress, Work\n\n\n" + rest[rest.index("def stop_reason(") :])


HARMLESS = {
    "a local variable of macro_f1": lambda p: rewrite(p / "metrics.py", lambda t: t.replace("hits, halves = _contributions(truth, decided, n_labels).sum(1)\n    return float(_mean_f1(hits, halves))", "found, halves = _contributions(truth, decided, n_labels).sum(1)\n    return float(_mean_f1(found, halves))")),
    "a local variable of top": lambda p: rewrite(p / "query.py", lambda t: t.replace(t[t.index("def top(") : t.index("def lots(")], re.sub(r"\bkeep\b", "kept", t[t.index("def top(") : t.index("def lots(")]))),
    "an annotation": lambda p: replace_once(p / "tokens.py", "def _stand_in(tokenizer)", "def _stand_in(tokenizer: object)"),
    "an import path": lambda p: replace_once(p / "training.py", "from .scoring import", "from deltaf1_al.scoring import") if "from .scoring import" in (p / "training.py").read_text() else replace_once(p / "training.py", "from .tokens import", "from deltaf1_al.tokens import"),
    "a function that nobody calls": lambda p: rewrite(p / "metrics.py", lambda t: t + "\n\ndef nothing():\n    return None\n"),
    "a benchmark": lambda p: rewrite(p / "corpus.py", lambda t: t.replace("\nBENCHMARKS = {", '\nBENCHMARKS = {\n    "trec": Source("trec", "text", ("label",)),', 1)),
    "a parameter with a default": lambda p: rewrite(p / "config.py", lambda t: t.replace("    precision: Annotated", "    beta2: float = 0.999  # AdamW's second\n    precision: Annotated", 1)),
    "a query with a helper": lambda p: rewrite(p / "query.py", lambda t: t + "\n\ndef _helper(probs):\n    return probs.max(1)\n\n\n@query('most-confident', needs='probabilities', data='classes')\ndef most_confident(candidates, n):\n    return top(_helper(candidates.probs), candidates.ids, n)\n"),
    "a display cell": lambda p: display_cell(p.parent / "nbs/run_experiment.ipynb"),
    "a function in another module": move_function,
    "a module in two": split_module,
    "a private class": lambda p: rewrite(p / "config.py", lambda t: t.replace("_Config", "_Checked")),
    "every line": lambda p: [reformat(p / name) for name in ("metrics.py", "query.py", "training.py", "tokens.py", "encoder.py", "trigger.py", "strategy.py", "scoring.py")],
}  # fmt: skip


def papers(built: Path, clone: Path):
    "Make the paper there again, and ask for the same bytes."
    target, names = ("paper", ["paper/main.pdf"]) if shutil.which("latexmk") else ("figures", [])
    assert make(built, target)[0] == 0
    status, said = make(clone, target)
    assert status == 0, said
    for name in ("paper/build/numbers.tex", "paper/build/heat.pdf", "paper/build/results.tex", *names):
        assert sha256(clone / name) == sha256(built / name), name
    return said


def test_harmless_changes_refuse_no_record(clone, built, long):
    "All of them at once: refused until `make accept` has looked, then accepted; the PDF is the same bytes."
    code = "from deltaf1_al.program import code_of; print(code_of())"
    codes = [python(clone, code)]
    for change in HARMLESS.values():
        state = git(clone, "diff")
        change(clone / "deltaf1_al")
        assert git(clone, "diff") != state, "the change has found nothing to change"
        codes.append(python(clone, code))
    assert len(set(codes)) == 1 + len(HARMLESS) - 2, "but for a display cell and for layout, every change is another code"
    refused = python(clone, CHECK).splitlines()
    assert len(refused) == 1 and "is no accepted version of the program; `make accept` decides" in refused[0], refused
    status, said = make(clone, "accept")
    assert status == 0 and "every field is equal." in said and "Accepted as version 1" in said, said
    assert python(clone, CHECK).strip() == ""
    papers(built, clone)


# ---- what is named

EVERYTHING = ["everything"]
CHANGES = {  # module, old, new; golden runs to make; a run and a field that have to be named; what becomes stale
    "< to <= in ΔF1": ("trigger", "return seen.delta_f1 is not None and seen.delta_f1 < self.epsilon\n\n# %%", "return seen.delta_f1 is not None and seen.delta_f1 <= self.epsilon\n\n# %%", "still-hybrid fine-tune", "still-hybrid settled", ["absolute_delta_f1", "delta_f1", "delta_f1_interval", "relative_delta_f1"]),
    "replay of the oldest labels": ("strategy", "rng.permutation(old)[", "old[", "replay retrain", "replay train_loss", ["replay"]),
    "k off by one": ("trigger", "self.streak >= self.k", "self.streak > self.k", "hybrid fine-tune", "hybrid plan", EVERYTHING),
    "dropout off": ("training", "engine(part, dropout)", "engine(part, None)", "retrain several", "retrain val_macro_f1", EVERYTHING),
    "another order of ids in a tie": ("query", "np.lexsort((ids, -values))", "np.lexsort((-ids, -values))", "ties fine-tune", "ties queried", EVERYTHING),
    "no warm-up": ("training", "rising = max(1, round(config.warmup * steps))", "rising = 1", "retrain several", "several train_loss", EVERYTHING),
    "weights not loaded in fine-tune": ("weights", "\n    return encoder.model.state_dict()\n", "\n    return encoder.initial\n", "fine-tune retrain", "fine-tune train_loss", EVERYTHING),
    "another bootstrap seed": ("loop", '"bootstrap", round)', '"bootstrap", round + 1)', "retrain", "retrain delta_f1_interval", EVERYTHING),
    "thresholds from the test set": ("loop", "thresholds = tune_thresholds(val, truth)", "thresholds = tune_thresholds(test, corpus.labels[corpus.test])", "several retrain", "several val_macro_f1", EVERYTHING),
    "a validation id in the pool": ("corpus", "pool = train[~np.isin(keys[train], keys[val])]", "pool = train[~np.isin(keys[train], keys[val[1:]])]", "retrain", "retrain corpus", EVERYTHING),
    "charged labels miscounted": ("loop", "(self.strategy.labels or corpus.multilabel)", "self.strategy.labels", "several retrain", "several n_charged", EVERYTHING),
    "answers that are all right": ("loop", "[: round(noise * len(pool))]", "[:0]", "wrong-answers retrain", "wrong-answers train_loss", EVERYTHING),
    "the head's FLOPs forgotten": ("engine", "block + 2 * d * d + last", "block + 2 * d * d", "retrain", "retrain train_flops", EVERYTHING),
}  # fmt: skip


def made(root: Path, inputs: Path, names: list, out: Path) -> dict:
    "What the package there makes of these golden runs."
    runs, out = yaml.safe_load((ROOT / GOLDEN).read_text()), out / "inputs"
    out.mkdir()
    for path in inputs.iterdir():
        (out / path.name).symlink_to(path)
    (out / "set.json").write_text(json.dumps({name: runs[name] for name in names}))
    python(root, "import sys; from deltaf1_al.golden import main; main(*sys.argv[1:])", str(out), str(out / "out.json"))
    return json.loads((out / "out.json").read_text())["runs"]


@pytest.fixture(scope="module")
def changed(tmp_path_factory, request):
    "Change -> the changed copy, and what the golden runs were before and are now; two at a time."
    base, inputs = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("golden")
    write_inputs(inputs)
    wanted = list(CHANGES)[: None if request.config.getoption("--long") else 2]
    before = made(ROOT, inputs, sorted({name for change in wanted for name in CHANGES[change][3].split()}), base)

    def tried(change: str) -> tuple[Path, dict, dict]:
        module, old, new, names, *_ = CHANGES[change]
        copy = Path(tempfile.mkdtemp(dir=base))
        for name in ("deltaf1_al", "nbs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        replace_once(copy / f"deltaf1_al/{module}.py", old, new)
        return copy, {name: before[name] for name in names.split()}, made(copy, inputs, names.split(), copy)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(tried, wanted)))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_behaviour_is_named(change, changed, request):
    if change not in changed:
        request.getfixturevalue("long")
    copy, before, after = changed[change]
    *_, named, stale = CHANGES[change]
    differ, (run, field) = differences(before, after), named.split()
    assert run in [d["run"] for d in differ], differ
    rounds = zip([*before[run]["rounds"], before[run]["summary"]], [*after[run]["rounds"], after[run]["summary"]])
    assert field in [name for was, now in rounds for name in was if was[name] != now.get(name)]
    assert stale_parts(copy, after, differ) == stale, differ


# ---- a change that is meant


def commit(folder: Path, words: str):
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", words)


def test_a_paper_of_an_earlier_version(clone, built, long):
    "A rule is changed on purpose: the paper is still the same bytes, and says its version; a new record among its old ones is refused."
    replace_once(clone / "deltaf1_al/trigger.py", "self.streak >= self.k", "self.streak > self.k")
    status, said = make(clone, "accept", "VERSION=3")
    assert status and re.search(r"hybrid, round \d, \w+: .* before, now ", said) and "make accept VERSION=2" in said, said
    assert "Committed records that use it: 40 of tuning, 108 of cpu, 90 of switching, 18 of floor, 1 of hybridal." in said, said
    status, said = make(clone, "accept", "VERSION=2")
    assert status == 0 and "Accepted as version 2" in said, said
    commit(clone, "k counts otherwise")
    said = papers(built, clone)
    assert "records of version 1, the program is at 2: tuning, cpu, switching, floor, hybridal" in said, said
    assert python(clone, CHECK).strip() == ""
    [record] = clone.glob("paper/results/cpu/ag_news/margin/hybrid/seed-0-*")
    new = json.loads((clone / ACCEPTED).read_text().splitlines()[-1])["code"]
    resealed(record, code=new)
    status, said = make(clone, "figures")
    assert status and f"{record.relative_to(clone)} is of version 2 of the program" in said and "records of two versions cannot be compared" in said, said
    assert "cannot be compared" in python(clone, CHECK)


# ---- the file of acceptances


def test_a_file_of_acceptances_that_nobody_earned(clone, request):
    "Damaged, shortened or forged: it is noticed; what a forged line claims, only the comparison itself can tell."
    path = clone / ACCEPTED
    text = path.read_text()
    assert python(clone, CHECK).strip() == ""
    path.write_text(text.replace('"version": 1', '"version": 2', 1))
    assert "accepted.jsonl line 1 is not as `make accept` wrote it" in python(clone, CHECK)
    path.write_text("".join(text.splitlines(keepends=True)[:-1]))
    shorter = python(clone, CHECK)
    assert "is no accepted version of the program" in shorter and "lacks lines that the last commit has" in shorter, shorter
    path.write_text(text)
    replace_once(clone / "deltaf1_al/metrics.py", "return float(_mean_f1(hits, halves))", "return float(_mean_f1(hits, halves)) / 2")
    python(clone, ACCEPT.format(stale=()).replace("last.commit", repr(git(clone, "rev-parse", "HEAD").strip())))
    assert python(clone, CHECK).strip() == ""
    request.getfixturevalue("long")
    status, said = make(clone, "accept", "AGAIN=1")
    assert status and "accepted.jsonl says otherwise of today's code (nothing changed); it was not written by `make accept`" in said, said


def test_an_acceptance_without_its_code(clone, long):
    "The line is committed and the code is not: nothing is built upon it."
    replace_once(clone / "deltaf1_al/trigger.py", "self.streak >= self.k", "self.streak > self.k")
    python(clone, ACCEPT.format(stale=("everything",)).replace("last.commit", repr(git(clone, "rev-parse", "HEAD").strip())))
    git(clone, "commit", "-q", "-m", "the line alone", ACCEPTED)
    git(clone, "checkout", "deltaf1_al/trigger.py")
    rewrite(clone / "deltaf1_al/metrics.py", lambda text: text + "\n\ndef nothing():\n    return None\n")
    status, said = make(clone, "accept")
    assert status and "does not hold version 2 of the program" in said and "commit an acceptance together with its code" in said, said


# ---- a parameter that is new


def test_a_new_parameter_is_in_the_key(clone, tmp_path, tiny_encoder):
    "beta2, as a newcomer would add it: another value is never served the rounds of the default, and the default keeps its hash."
    code = """
import sys
from dataclasses import replace
from deltaf1_al.config import resolve
from deltaf1_al.corpus import load_corpus
from deltaf1_al.loop import ActiveLearner, open_store, simulate
config = resolve(dataset="docstrings", n_rounds=1, max_epochs=2, max_length=16, n_test=50, n_val=40, pool_size=200, candidate_size=50, n_initial=8, n_query=8, encoder=sys.argv[1], store=sys.argv[2], device="cpu", precision="fp32")
print(config.hash)
for given in ({}, {"beta2": 0.5}, {"beta2": 0.5, "store": ""}):
    if "beta2" not in config.__dataclass_fields__ and given: continue
    this = replace(config, **{**given, "out_dir": sys.argv[2] + str(given)})
    for record in simulate(ActiveLearner(this, load_corpus(this), open_store(this, lambda line: None) if this.store else None)): print(record.reused, record.train_loss)
"""
    before = python(clone, code, tiny_encoder, str(tmp_path / "store")).split()
    replace_once(clone / "deltaf1_al/config.py", "    precision: Annotated", "    beta2: float = 0.999  # AdamW's second\n    precision: Annotated")
    replace_once(clone / "deltaf1_al/training.py", "torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)", "torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)")
    after = python(clone, code, tiny_encoder, str(tmp_path / "store")).split()
    assert after[0] == before[0], "a parameter at its default changes no hash"
    rewrite(clone / "deltaf1_al/config.py", lambda text: text.replace("beta2: float = 0.999", "beta2: float = 0.5"))
    moved = python(clone, code, tiny_encoder, str(tmp_path / "store")).split()
    assert moved[2:5:2] == after[6:9:2], "another default is never served the rounds of the first"
    default, other, computed = after[1:5], after[5:9], after[9:13]
    assert default == before[1:5], "computed anew by other code, and equal"
    assert other == computed and other[::2] == ["False"] * 2 and other[1::2] != default[1::2]
