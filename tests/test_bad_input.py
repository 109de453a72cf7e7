"""What a person can get wrong ends in one sentence, before any training, with nothing lost."""
import json
import os
import signal
import subprocess
import time

import pandas as pd
import pytest
from conftest import TINY, fill, rounds_of, timeless

from deltaf1_al.config import UserError, resolve
from deltaf1_al.corpus import load_corpus
from deltaf1_al.loop import ActiveLearner, RunFolder, check_run, open_store, simulate

GOOD = {"text": [f"a fine film {i}" for i in range(60)] + [f"a dull one {i}" for i in range(60)], "label": ["pos"] * 60 + ["neg"] * 60}


def start(**given):
    "What the experiment notebook does before its first round."
    config = resolve(**{"n_val": 10, "n_initial": 4, "n_query": 4, **given})
    check_run(config)
    RunFolder(config)
    store = open_store(config)
    return ActiveLearner(config, load_corpus(config), store)


PARAMETERS = [
    (dict(sed=1), "unknown parameter sed; allowed are dataset, strategy"),
    (dict(n_query="8"), "n_query must be of type int, not str ('8')"),
    (dict(learning_rate="fast"), "learning_rate must be of type float"),
    (dict(k=True), "k must be of type int, not bool"),
    (dict(epsilon=-0.1), "epsilon is -0.1; allowed is 0 to 1"),
    (dict(epsilon=1.01), "epsilon is 1.01; allowed is 0 to 1"),
    (dict(k=0), "k is 0; allowed is 1 to 1000"),
    (dict(n_query=0, strategy="new-only"), "n_query is 0; allowed is 1 to"),  # new-only with nothing new
    (dict(n_initial=100, n_query=100, n_rounds=3, pool_size=300), "n_initial + n_rounds * n_query is 400; allowed is at most pool_size (300)"),
    (dict(n_initial=9000, pool_size=0), "n_initial + n_rounds * n_query is"),
    (dict(dataset="agnews"), "dataset is 'agnews'; allowed are docstrings, ag_news, imdb, jigsaw, a file, a folder or a hub id"),
    (dict(strategy="finetune"), "strategy is 'finetune'; allowed are retrain, fine-tune, new-only, shrink-perturb, replay, fire, dash, reinit-top, average, frozen, lora, hybrid, or two plans and a trigger"),
    (dict(strategy="retrain>replay@kapa(0.9)"), "trigger is 'kapa'; allowed are never, delta_f1, delta_f1_interval"),
    (dict(strategy="retrain>replay@kappa(0.9"), "trigger is 'kappa(0.9'; allowed is one of never, delta_f1"),
    (dict(strategy="retrain>replay@kappa(9)"), "threshold is 9.0; allowed is 0 to 1"),
    (dict(strategy="retrain>fine-tune@delta_f1('0.1')"), "epsilon must be of type float, not str ('0.1')"),
    (dict(strategy="retrain>replay@kappa"), "n_stop is 0, and the trigger of 'retrain>replay@kappa' compares models on unlabelled texts; allowed is 1 to"),
    (dict(strategy="retrain>fine-tune@oracle('none.json')"), "oracle has the study 'none.json', which cannot be read; allowed is a sensitivity.json"),
    (dict(n_stop=10**6), "n_stop is 1000000; allowed is at most"),
    (dict(query="badgee"), "query is 'badgee'; allowed are random, least-confidence, margin, entropy, max-entropy"),
    (dict(query="cvirs"), "query is 'cvirs', which is for several labels, not for classes; allowed are random, least-confidence, margin, entropy, core-set"),
    (dict(extension="mine"), "extension is 'mine'; allowed is a Python file that exists"),
    (dict(encoder="./no-such-folder"), "encoder is './no-such-folder', a folder without config.json"),
    (dict(encoder="nobody/no-such-model"), "encoder is 'nobody/no-such-model', which cannot be used"),
    (dict(max_length=4000), "max_length is 4000; allowed is at most 512"),
    (dict(precision="fp16"), "precision is 'fp16'; allowed are auto, bf16, fp32"),
    (dict(keep="some"), "keep is 'some'; allowed are last, forks, all, none"),
    (dict(store_limit=-1), "store_limit is -1.0; allowed is 0 to"),
    (dict(store=__file__), "which is not a folder"),
    (dict(split="no-such-split.json"), "split is 'no-such-split.json', which is not a file that split_saver wrote"),
]


@pytest.mark.parametrize("given, sentence", PARAMETERS, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_parameter(given, sentence, tiny_encoder, tmp_path):
    with pytest.raises(UserError) as error:
        start(**{"encoder": tiny_encoder, "out_dir": str(tmp_path), **given})
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not rounds_of(tmp_path)


def test_a_query_without_its_library(tiny_encoder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"query is 'falcun', which needs scikit-activeml; install it with: pip install 'deltaf1_al\[strategies\]'"):
        check_run(resolve(encoder=tiny_encoder, query="falcun"))
    check_run(resolve(encoder=tiny_encoder, query="badge"))


def changed(**columns):
    return pd.DataFrame({**GOOD, **columns})


def with_row(row, column, value):
    table = changed().astype(object)
    table.loc[row, column] = value
    return table


DATA = [
    (changed().rename(columns={"text": "body"}), "text_column is 'text'; the data set has the columns body, label"),
    (changed().rename(columns={"label": "y"}), "label_columns is 'label'; the data set has the columns text, y"),
    (changed().iloc[:0], "holds no rows"),
    (changed(label=["pos"] * 120), "every text has the label 'pos'; allowed are two classes or more"),
    (with_row(7, "text", None), "text_column 'text' is empty in 1 rows, the first is row 7"),
    (with_row(7, "text", "   "), "text_column 'text' holds an empty text in row 7"),
    (with_row(7, "label", None), "label_columns 'label' is empty in 1 rows, the first is row 7"),
    (changed(text=range(120)), "text_column 'text' holds int (0) in row 0; allowed is text"),
]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("table, sentence", DATA, ids=[sentence[:40] for _, sentence in DATA])
def test_data(table, sentence, suffix, tmp_path, tiny_encoder):
    path = tmp_path / f"mine.{suffix}"
    write = {
        "csv": lambda: table.to_csv(path, index=False), "tsv": lambda: table.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True), "parquet": lambda: table.to_parquet(path),
    }  # fmt: skip
    write[suffix]()
    with pytest.raises(UserError) as error:
        start(dataset=str(path), encoder=tiny_encoder, out_dir=str(tmp_path / "run"))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_data_multilabel_label_without_positive(tmp_path, tiny_encoder):
    changed(a=[0, 1] * 60, b=[0] * 120).to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(UserError, match="no text of the train split has the label 'b'; every label needs a positive"):
        start(dataset=str(tmp_path / "mine.csv"), label_columns="a, b", encoder=tiny_encoder, out_dir=str(tmp_path / "run"))


def test_data_labels_differ_between_splits(tmp_path, tiny_encoder):
    changed().to_csv(tmp_path / "train.csv", index=False)
    changed(label=["pos"] * 60 + ["bad"] * 60).to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(UserError, match="the test split holds the label 'bad'; allowed are neg, pos, as in train"):
        start(dataset=str(tmp_path), encoder=tiny_encoder, out_dir=str(tmp_path / "run"))


def test_data_files(tmp_path, tiny_encoder):
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\u00e9,a\n".encode("latin-1"))
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name, sentence in [
        ("latin.csv", "is not UTF-8"),
        ("empty.csv", "holds no rows"),
        ("gone.csv", "does not exist"),
        ("folder", "holds no train file"),
    ]:
        with pytest.raises(UserError, match=sentence):
            start(dataset=str(tmp_path / name), encoder=tiny_encoder, out_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("given, sentence", [PARAMETERS[0], PARAMETERS[1], PARAMETERS[8]], ids=["name", "type", "value"])
def test_papermill_stops_with_the_sentence(papermill, given, sentence):
    process, folder = papermill(**given)
    assert process.returncode != 0
    last = [line for line in process.output.splitlines() if line.strip()][-1]
    assert last.startswith("UserError: ") and sentence in last
    assert not rounds_of(folder)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_rounds(tiny_encoder, tmp_path):
    config = resolve(**{**TINY, "dataset": "docstrings", "encoder": tiny_encoder, "strategy": "retrain", "out_dir": str(tmp_path)})
    folder = RunFolder(config)
    learner = ActiveLearner(config, load_corpus(config))

    def poison(record):
        folder.append(record)
        learner.encoder.initial["classifier.bias"].fill_(float("inf"))

    with pytest.raises(UserError, match="learning_rate is 0.0001: the training loss became nan in round 1, epoch 1"):
        simulate(learner, poison)
    assert [r["round"] for r in rounds_of(tmp_path)] == [0] and not (tmp_path / "summary.json").exists()


def test_papermill_another_run_in_out_dir_is_left_alone(papermill):
    process, folder = papermill()
    assert process.returncode == 0, process.output
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    process, _ = papermill(seed=1)
    assert process.returncode != 0 and "holds another run" in process.output
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_keeps_its_rounds_and_goes_on(papermill, sent, tmp_path):
    longer = dict(n_rounds=12, max_epochs=60, target_loss=0.0)
    process, folder = papermill(wait=False, **longer)
    for _ in range(1200):
        if len(rounds_of(folder)) >= 2 or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode != 0
    kept = rounds_of(folder)
    assert 2 <= len(kept) < 13 and [r["round"] for r in kept] == list(range(len(kept)))
    assert not (folder / "summary.json").exists()
    process, _ = papermill(**longer)
    assert process.returncode == 0, process.output
    resumed, summary = rounds_of(folder), json.loads((folder / "summary.json").read_text())
    assert len(kept) <= summary["rounds_reused"] < 13 == len(resumed)
    assert [r["seconds"] for r in resumed[: len(kept)]] == [r["seconds"] for r in kept]
    _, alone = papermill(**longer, out_dir=str(tmp_path / "alone"), store=str(tmp_path / "another store"))
    assert timeless(resumed) == timeless(rounds_of(alone))


def test_full_disk(small_disk, tiny_encoder):
    given = {**TINY, "dataset": "docstrings", "encoder": tiny_encoder, "out_dir": str(small_disk / "run")}
    config = resolve(**given)
    folder = RunFolder(config)
    learner = ActiveLearner(config, load_corpus(config))
    folder.append(learner.tell(ids := learner.ask(), learner.corpus.labels[ids]))
    fill(small_disk)
    record = learner.tell(ids := learner.ask(), learner.corpus.labels[ids])
    with pytest.raises(UserError, match="rounds.jsonl could not be written .No space left on device.; make room there"):
        folder.append(record)
    assert [r["round"] for r in rounds_of(config.folder)] == [0]
    with pytest.raises(UserError, match="free space|could not be written"):
        RunFolder(resolve(**{**given, "out_dir": str(small_disk / "another")}))
    assert json.loads((config.folder / "config.json").read_text())["config_hash"] == config.hash
