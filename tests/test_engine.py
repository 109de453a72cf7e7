"""The engine at sizes and in numbers of processes that a notebook has not."""
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import transformers
import yaml
from conftest import ROOT, TINY, rounds_of, timeless

from deltaf1_al.config import resolve
from deltaf1_al.corpus import load_corpus
from deltaf1_al.loop import ActiveLearner, simulate

accelerated = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate, of the extra `team`, is not installed")


def in_team(size, parameters, tmp_path, script="nbs/run_in_team.py"):
    "A run in that many processes on the CPU."
    file = tmp_path / "params.yml"
    file.write_text(yaml.safe_dump(parameters))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size), str(script), str(file)]  # what `accelerate launch` does for GPUs
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


@accelerated
@pytest.mark.parametrize(("query", "then"), [("core-set", "fine-tune"), ("bald", "dash")])
def test_two_processes_select_what_one_selects(query, then, tiny_encoder, tmp_path):
    given = {**TINY, "dataset": "docstrings", "encoder": tiny_encoder, "strategy": f"retrain>{then}@delta_f1", "epsilon": 0.9, "k": 1, "n_rounds": 3, "learning_rate": 1e-3, "query": query, "n_stop": 30, "n_passes": 2}
    runs = {}
    for size in (1, 2):
        given |= {"out_dir": str(tmp_path / f"run-{size}"), "store": str(tmp_path / f"store-{size}")}
        process = in_team(size, given, tmp_path)
        assert process.returncode == 0, process.stdout + process.stderr
        runs[size] = timeless(rounds_of(tmp_path / f"run-{size}"))
    assert len(runs[2]) == 4 and {r["plan"] for r in runs[2]} == {"retrain", then}
    for one, two in zip(runs[1], runs[2]):
        assert one.pop("key") != two.pop("key")
        for name, value in one.items():  # counts and selections are the same, sums of gradients up to rounding
            assert two[name] == (pytest.approx(value, abs=1e-3) if isinstance(value, float) else value), name


@accelerated
@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"strategy": "none such"}, "strategy is 'none such'; allowed are retrain"), ({"max_length": 600}, "max_length is 600; allowed is at most 512")],
    ids=["before the processes meet", "after"],
)
def test_a_team_says_what_is_wrong_once(change, sentence, tiny_encoder, tmp_path):
    process = in_team(2, {**TINY, "encoder": tiny_encoder, "out_dir": str(tmp_path / "run"), **change}, tmp_path)
    assert process.returncode != 0 and process.stderr.count(sentence) == 1 and "gloo" not in process.stderr, process.stderr


FAILS = """
import sys
sys.path.insert(0, "nbs")
import run_in_team
from deltaf1_al import training
from deltaf1_al.config import stream
step, seen = training._step, []

def failing(engine, *rest):
    seen.append(1)
    if len(seen) == 3 and rest[-1].rank == 0:
        raise KeyboardInterrupt
    return step(engine, *rest)

training._step = failing
run_in_team.main()
"""


@accelerated
def test_a_team_ends_when_its_first_process_is_interrupted_in_a_step(tiny_encoder, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    process = in_team(2, {**TINY, "encoder": tiny_encoder, "out_dir": str(tmp_path / "run")}, tmp_path, script=tmp_path / "fails.py")
    assert process.returncode != 0 and "KeyboardInterrupt" in process.stderr


@accelerated
@pytest.mark.skipif(importlib.util.find_spec("small_text") is None, reason="small-text, of the extra `peers`, is not installed")
def test_peers_do_the_same_work(papermill, tiny_encoder, tmp_path):
    names = ["deltaf1_al", "unpacked", "plain", "trainer", "trainer-best", "small-text", "small-text-best"]
    given = {name: None for name in (*TINY, "out_dir", "store")}
    given |= {"encoder": tiny_encoder, "contenders": ",".join(names), "n_turns": 2, "n_labels": 33, "n_epochs": 2, "results": str(tmp_path / "results.json")}
    process, _ = papermill(notebook="nbs/benchmark.ipynb", **given)
    assert process.returncode == 0, process.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["contender"] for row in found["table"]] == names
    for row in found["rounds"]:
        assert row["train_texts"] == 66 and row["train_padded_tokens"] > 0 and row["infer_flops"] > 0
        assert row["infer_texts"] >= 100  # small-text validates beside
    packed, plain = ({r["turn"]: r for r in found["rounds"] if r["contender"] == name} for name in ("deltaf1_al", "plain"))
    for turn in packed:
        assert packed[turn]["train_padded_tokens"] < plain[turn]["train_padded_tokens"] == 66 * 32
        assert packed[turn]["train_flops"] < plain[turn]["train_flops"]
    assert all(bool(row["no_ratio_because"]) == (row["round_ratio"] is None) for row in found["table"])
    assert all(0 < share for share in found["reached"].values()) and abs(sum(found["breakdown"].values()) - 1) < 1e-6


def test_benchmark_names_what_it_lacks(papermill):
    process, _ = papermill(notebook="nbs/benchmark.ipynb", **{name: None for name in (*TINY, "out_dir", "store")}, contenders="deltaf1_al,fastest")
    assert process.returncode != 0 and "contenders is 'fastest'; allowed are deltaf1_al, unpacked, plain" in process.output


@pytest.mark.parametrize("kind", ["bart", "longformer", "deberta-v2", "electra", "roberta"])
def test_encoders_of_other_kinds_are_run_or_refused_in_a_sentence(kind, tiny_encoder, tmp_path):
    from deltaf1_al.config import UserError
    from deltaf1_al.encoder import load_encoder
    from deltaf1_al.engine import Engine, Packed, counted_flops, engine_for, example

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, embedding_size=32, vocab_size=1000, pad_token_id=0)
    twists = {"bart": dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2)}
    twists |= {"longformer": dict(attention_window=[64, 64], max_position_embeddings=512), "deberta-v2": dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)}
    transformers.AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(kind, **{**small, **twists.get(kind, {})}))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), 3, 0)
    if kind in ("bart", "longformer"):
        with pytest.raises(UserError, match="encoder (is )?of type '(bart|longformer)'"):
            engine_for(encoder)
    else:
        engine = engine_for(encoder)
        assert type(engine) is (Packed if kind == "roberta" else Engine)
        assert engine.flops(*engine.counts(example([90, 70, 9]))) == counted_flops(engine, [90, 70, 9])


def test_a_run_loads_its_model_once(tiny_encoder, monkeypatch):
    loads, load = [], transformers.AutoModelForSequenceClassification.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", lambda *args, **given: loads.append(args) or load(*args, **given))
    config = resolve(**{**TINY, "dataset": "docstrings", "encoder": tiny_encoder, "strategy": "retrain"})
    records = simulate(ActiveLearner(config, load_corpus(config)))
    assert len(loads) == 1 and len(records) == 3
    assert all(r.train_padded_tokens == r.train_tokens and r.score_padded_tokens == r.score_tokens for r in records)  # no padding at all


MILLION = """
import json, sys
import numpy as np
from deltaf1_al.encoder import load_encoder, peak_memory
from deltaf1_al.engine import Packed, engine_for
from deltaf1_al.query import margin, top
from deltaf1_al.scoring import probabilities, score
from deltaf1_al.tokens import Tokens
encoder = load_encoder(sys.argv[1], 4, 0)
engine = engine_for(encoder)
before, passes, forward = peak_memory(encoder.device), [], Packed.__call__
Packed.__call__ = lambda self, batch, dropout=None: passes.append(len(batch.rows)) or forward(self, batch, dropout)
rng, n = np.random.default_rng(0), 1_000_000
lengths = rng.integers(6, 24, n)
tokens = Tokens(rng.integers(5, 500, lengths.sum()).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))
scores = score(engine, tokens, np.arange(n), 32768, embeddings=True)
chosen = top(margin(probabilities(scores.logits, False), False), np.arange(n), 100)
print(json.dumps({"bytes": peak_memory(encoder.device) - before, "texts": sum(passes), "passes": len(passes), "chosen": chosen.tolist(), "padded": scores.work.padded_tokens - scores.work.tokens}))
"""


def test_a_million_texts_fit(tiny_encoder):
    "Scored once each, embeddings included, and queried, within 1.5 GB beyond the model."
    process = subprocess.run([sys.executable, "-c", MILLION, tiny_encoder], text=True, capture_output=True, timeout=900)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found["texts"] == 1_000_000 and found["passes"] < 600 and found["padded"] == 0
    assert len(np.unique(found["chosen"])) == 100
    assert found["bytes"] < 1.5e9, found["bytes"]
