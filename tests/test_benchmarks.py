"""The real benchmarks, where their files are at hand, and loading as from the hub."""
import json
import os
import zipfile

import numpy as np
import pandas as pd
import pytest
from conftest import rounds_of

from deltaf1_al.config import UserError, resolve
from deltaf1_al.corpus import BENCHMARKS, load_corpus, load_texts, local_folder, text_key

real = pytest.mark.skipif(not os.environ.get("DELTAF1_AL_DATA"), reason="DELTAF1_AL_DATA is not set: no real data here")


@real
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_splits(name):
    if not local_folder(name):
        pytest.skip(f"DELTAF1_AL_DATA holds no {name}")
    corpora = [load_corpus(resolve(dataset=name, seed=seed, n_rounds=1, pool_size=3000, n_test=1000)) for seed in (0, 1)]
    corpus = corpora[0]
    assert corpus.multilabel == (name == "jigsaw") and len(corpus.label_names) == len(BENCHMARKS[name].names or BENCHMARKS[name].labels)
    assert (len(corpus.pool), len(corpus.test)) == (3000, 1000)
    assert np.array_equal(corpora[0].test, corpora[1].test) and not np.array_equal(corpora[0].val, corpora[1].val)
    keys = [{text_key(corpus.texts[i]) for i in ids} for ids in (corpus.pool, corpus.val, corpus.test)]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    share = np.stack([corpus.label_counts(ids) / len(ids) for ids in (corpus.pool, corpus.val, corpus.test)])
    assert (share > 0).all() and np.ptp(share, axis=0).max() < 0.01


@real
def test_jigsaw_is_six_labels_from_end_to_end(papermill):
    process, folder = papermill(dataset="jigsaw", n_val=200, n_test=200, strategy="fine-tune", query="entropy")
    assert process.returncode == 0, process.output
    last = rounds_of(folder)[-1]
    assert {"val_roc_auc", "test_roc_auc", "val_micro_f1", "test_micro_f1"} <= set(last) and 0 < last["test_roc_auc"] <= 1


def jigsaw_like(n, ids):
    rng = np.random.default_rng(0)
    labels = {name: (rng.random(n) < 0.3).astype(int) for name in BENCHMARKS["jigsaw"].labels}
    return pd.DataFrame({"id": [f"{ids}{i}" for i in range(n)], "comment_text": [f"a comment, number {ids} {i}" for i in range(n)], **labels})


@pytest.mark.parametrize("packed", [False, True], ids=["csv", "zip"])
def test_kaggle_files_as_they_come(packed, tmp_path, monkeypatch):
    "train.csv, test.csv without labels, test_labels.csv with −1 for what was never scored; loose, or zips inside a zip."
    train, test = jigsaw_like(80, "a"), jigsaw_like(30, "b")
    labels = test.drop(columns="comment_text")
    labels.loc[:9, list(BENCHMARKS["jigsaw"].labels)] = -1
    files = {"train.csv": train, "test.csv": test[["id", "comment_text"]], "test_labels.csv": labels, "sample_submission.csv": labels}
    folder = tmp_path / "jigsaw"
    folder.mkdir()
    for name, table in files.items():
        table.to_csv(folder / name, index=False)
        if packed:
            with zipfile.ZipFile(folder / f"{name}.zip", "w") as z:
                z.write(folder / name, name)
            (folder / name).unlink()
    if packed:
        with zipfile.ZipFile(folder / "jigsaw-toxic-comment-classification-challenge.zip", "w") as z:
            for name in files:
                z.write(folder / f"{name}.zip", f"{name}.zip")
                (folder / f"{name}.zip").unlink()
    monkeypatch.setenv("DELTAF1_AL_DATA", str(tmp_path))
    data = load_texts(resolve(dataset="jigsaw"))
    assert (data.n_train, len(data.texts), data.labels.shape) == (80, 100, (100, 6))
    assert np.array_equal(data.labels[80:], test[list(data.label_names)].to_numpy()[10:])


def test_a_hub_data_set_by_id(tmp_path, monkeypatch):
    "The hub's own reader, on a folder laid out as a hub repository; class names come from its card."
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "owner" / "films"
    repository.mkdir(parents=True)
    for split, n in (("train", 40), ("test", 10)):
        pd.DataFrame({"text": [f"film {split} {i}" for i in range(n)], "label": [0, 1] * (n // 2)}).to_parquet(repository / f"{split}.parquet")
    features = "- name: text\n    dtype: string\n  - name: label\n    dtype:\n      class_label:\n        names:\n          '0': bad\n          '1': good"
    (repository / "README.md").write_text(f"---\ndataset_info:\n  features:\n  {features}\n---\n")
    from deltaf1_al.corpus import Source, _from_hub

    tables, names = _from_hub(Source("owner/films", "text", ("label",)), "owner/films")
    assert names == ("bad", "good") and {split: len(t) for split, t in tables.items()} == {"train": 40, "test": 10}


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    monkeypatch.delenv("DELTAF1_AL_DATA", raising=False)
    with pytest.raises(UserError, match="dataset 'nobody/no-such-data' could not be loaded from the hub") as error:
        load_texts(resolve(dataset="nobody/no-such-data"))
    assert "\n" not in str(error.value) and "give a file or a folder" in str(error.value)


def test_saved_split_is_used_by_a_run(papermill, tmp_path):
    from deltaf1_al.corpus import save_split

    corpus = load_corpus(resolve(dataset="docstrings", n_val=30, n_test=50, pool_size=100, seed=9))
    path = save_split(corpus, tmp_path / "split.json")
    process, folder = papermill(split=str(path), candidate_size=30)
    assert process.returncode == 0, process.output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["corpus"]["split"] == corpus.split_fingerprint and summary["n_val"] == 30
