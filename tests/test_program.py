"""A run by papermill, its files, and the counts that have to hold."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, TINY, rounds_of, timeless

from deltaf1_al.config import resolve
from deltaf1_al.corpus import docstrings, load_corpus
from deltaf1_al.loop import ActiveLearner, simulate

FIELDS = """round plan n_labeled n_charged n_trained val_macro_f1 test_macro_f1 delta_f1 settled switched train_steps train_examples train_tokens
train_padded_tokens train_flops score_tokens score_flops seconds""".split()


def test_a_run_leaves_its_files_and_repeats_to_the_byte(papermill, tmp_path):
    first, folder = papermill()
    assert first.returncode == 0, first.output
    assert {p.name for p in folder.iterdir()} == {"config.json", "rounds.jsonl", "summary.json", "learning_curve.png"}
    rounds, summary = rounds_of(folder), json.loads((folder / "summary.json").read_text())
    assert len(rounds) == summary["rounds"] == 3 and set(FIELDS) <= set(rounds[0])
    assert first.output.count("done") >= 1, "the terminal shows the rounds"
    second, folder = papermill(out_dir=str(tmp_path / "again"), store=str(tmp_path / "another store"))
    assert timeless(rounds_of(folder)) == timeless(rounds) and not any(r["reused"] for r in rounds_of(folder))
    notebook = json.loads((tmp_path / "run.ipynb").read_text())
    assert (tmp_path / "run.ipynb").stat().st_size < 500_000 and notebook["metadata"]["papermill"]["exception"] is None


def test_own_files_single_and_multi_label(papermill, tmp_path):
    data = docstrings()
    chosen = np.arange(0, len(data.texts), 16)
    table = pd.DataFrame({"body": [data.texts[i] for i in chosen], "package": [data.label_names[data.labels[i]] for i in chosen]})
    table = table.assign(long=[int(len(t) > 100) for t in table.body], the=[int(" the " in t) for t in table.body])
    for suffix, labels in (("csv", "package"), ("jsonl", "long,the")):
        path = tmp_path / f"mine.{suffix}"
        table.to_csv(path, index=False) if suffix == "csv" else table.to_json(path, orient="records", lines=True)
        process, folder = papermill(dataset=str(path), text_column="body", label_columns=labels, out_dir=str(tmp_path / suffix), strategy="new-only")
        assert process.returncode == 0, process.output
        assert ("test_micro_f1" in rounds_of(folder)[-1]) == (suffix == "jsonl")


def test_the_table_of_a_folder_of_runs_with_prices(tmp_path):
    shutil.copytree(ROOT / "paper/results/cpu/imdb/margin", runs := tmp_path / "runs")
    ask = lambda *prices: subprocess.run([sys.executable, "nbs/compare.py", runs, *prices], cwd=ROOT, text=True, capture_output=True)  # noqa: E731
    done = ask("--label-price", "0.5", "--pflop-price", "100")
    assert done.returncode == 0 and (runs / "pareto.png").stat().st_size, done.stderr
    assert "area against money for labels and compute: on the Pareto front" in done.stdout and "retrain (104.2, by fine-tune)" in done.stdout
    refused = ask("--label-price", "-1")
    assert refused.returncode and refused.stderr == "label_price is -1.0; allowed is 0 to 1000000000\n"


@pytest.mark.parametrize("notebook", ["nbs/eda/dataset_eda.ipynb", "nbs/eda/split_saver.ipynb"])
def test_a_misspelt_parameter_stops_the_other_notebooks_too(notebook, tmp_path):
    command = [sys.executable, "-m", "papermill", notebook, str(tmp_path / "out.ipynb"), "-k", "python3", "--no-progress-bar", "-p", "sead", "1"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode != 0 and "unknown parameter sead" in done.stdout + done.stderr


@pytest.mark.parametrize("strategy", ["retrain", "fine-tune", "new-only", "shrink-perturb", "replay", "retrain>replay@classification_change(1.0)"])
def test_counts_of_a_run(strategy, tiny_encoder, monkeypatch):
    "One load from disk; every text scored at most once a round; validation and test never trained on; every label trained on."
    import deltaf1_al.loop as loop
    import transformers

    loads, scored, trained = [], [], []
    load, score, train = transformers.AutoModelForSequenceClassification.from_pretrained, loop.score, loop.train
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(loop, "score", lambda e, t, rows, *a, **k: scored.append((len(learner.records), rows)) or score(e, t, rows, *a, **k))
    monkeypatch.setattr(loop, "train", lambda e, t, rows, *a, **k: trained.append(rows) or train(e, t, rows, *a, **k))
    config = resolve(**{**TINY, "dataset": "docstrings", "encoder": tiny_encoder, "strategy": strategy, "candidate_size": 0, "max_length": 64, "n_stop": 30})
    corpus = load_corpus(config)
    learner = ActiveLearner(config, corpus)
    records = simulate(learner)
    assert len(loads) == 1
    for round in range(config.n_rounds + 1):
        evaluated, *asked = [rows for r, rows in scored if r == round and len(rows) != config.n_stop][::-1]
        rows = np.concatenate([evaluated, *asked])
        assert len(np.unique(rows)) == len(rows)
    assert not set(np.concatenate(trained)) & (set(corpus.val) | set(corpus.test))
    assert set(np.concatenate(trained)) == set(np.concatenate(learner.bought)) and [len(rows) for rows in trained] == [r.n_trained for r in records]
    assert sum(len(rows) == config.n_stop for _, rows in scored) == len(records)
    assert [r.train_examples for r in records] == [r.train_epochs * r.n_trained for r in records]
    for r in records[1:]:
        assert r.score_padded_tokens <= 1.10 * r.score_tokens and r.eval_padded_tokens <= 1.10 * r.eval_tokens


def test_the_oracle_switches_where_the_study_says(papermill, tmp_path):
    process, _ = papermill(notebook="nbs/sensitivity.ipynb", out_dir=str(tmp_path / "study"), epsilons=[1.0], ks=[1, 2])
    assert process.returncode == 0, process.output
    study = json.loads((tmp_path / "study" / "sensitivity.json").read_text())
    best = study["oracle"][0]["switch_round"]
    process, folder = papermill(strategy=f"retrain>fine-tune@oracle('{tmp_path}/study/sensitivity.json')")
    assert process.returncode == 0, process.output
    assert json.loads((folder / "summary.json").read_text())["switch_round"] == best and all(r["reused"] for r in rounds_of(folder))
    process, _ = papermill(strategy=f"retrain>fine-tune@oracle('{tmp_path}/study/sensitivity.json')", n_query=9, out_dir=str(tmp_path / "other"))
    assert process.returncode != 0 and "oracle has a study whose n_query is 8, here 9; allowed is a study with the settings of the run" in process.output


MEMORY = """
import resource, sys, time
import numpy as np
import deltaf1_al.loop
from deltaf1_al.config import resolve
from deltaf1_al.corpus import Texts, docstrings, draw_split
from deltaf1_al.encoder import load_encoder
from deltaf1_al.tokens import padding_ratio, scoring_batches, tokenize
encoder = load_encoder(sys.argv[1], 4, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
base = docstrings()
texts = [f"{base.texts[i % len(base.texts)]} {i}" for i in range(120_000)]
data = Texts("large", texts, np.arange(120_000) % 4, ("a", "b", "c", "d"), 120_000)
corpus = draw_split(data, resolve(dataset="docstrings", n_val=500, n_test=7600, pool_size=0))
tokens = tokenize(corpus.texts, encoder.tokenizer, 128)
bytes_ = tokens.ids.nbytes
batches = scoring_batches(tokens.lengths[corpus.pool], 8192)
print(len(tokens.ids), tokens.ids.nbytes, tokens.offsets.nbytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
      padding_ratio(tokens.lengths[corpus.pool], batches))
"""


def test_a_pool_of_120_000_texts(tiny_encoder, record_property):
    done = subprocess.run([sys.executable, "-c", MEMORY, tiny_encoder], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    n_tokens, token_bytes, offset_bytes, peak_kb, padding = map(float, done.stdout.split())
    record_property("data path, peak MB", peak_kb / 1024)
    assert token_bytes <= 4 * n_tokens and offset_bytes == 8 * 120_001
    assert padding <= 1.10
    assert peak_kb <= 2**20, f"the data path took {peak_kb / 1024:.0f} MB"
