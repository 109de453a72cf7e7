"""One run on several GPUs of one machine: accelerate launch --num_processes 2 nbs/run_in_team.py params.yml

The file holds the parameters of `run_experiment`; the run's folder gets the same files, but for the notebook.
"""
import os
import sys
import time
import traceback
from pathlib import Path

import yaml

from deltaf1_al.config import RunConfig, UserError, resolve
from deltaf1_al.corpus import load_corpus
from deltaf1_al.encoder import hardware
from deltaf1_al.loop import ActiveLearner, RunFolder, check_run, open_store, progress_header, progress_line, simulate
from deltaf1_al.team import Team


def parameters_in(path: str) -> dict:
    "What the file holds; `UserError` when it is no mapping from names to values."
    try:
        given = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"{path!r} cannot be read ({type(e).__name__}); a YAML file of parameters is needed") from e
    if not isinstance(given, dict):
        raise UserError(f"{path!r} holds a {type(given).__name__}; a YAML file of parameters, one `name: value` a line, is needed")
    return given


def run(config: RunConfig, team: Team):
    "The whole run in the first process; in the others, what it orders."
    corpus = load_corpus(config)
    if team.rank:
        return ActiveLearner(config, corpus, team=team).help_out()
    folder, store = RunFolder(config), open_store(config)
    learner = ActiveLearner(config, corpus, store, say=print, team=team)
    print(progress_header())

    def on_round(record):
        folder.append(record)
        print(progress_line(record, config.n_rounds), flush=True)

    simulate(learner, on_round)
    folder.finish(learner)
    team.dismiss()


def main():
    "The first process speaks; the others end when it does."
    first, team = os.environ.get("RANK", "0") == "0", None
    try:
        if len(sys.argv) != 2:
            raise UserError(f"{len(sys.argv) - 1} arguments were given; one is needed, a YAML file of parameters")
        config = resolve(**parameters_in(sys.argv[1]))
        check_run(config)
        team = Team.launched(hardware(config.device, config.precision)[0])
        run(config, team)
    except BaseException as e:
        if first:
            print(e if isinstance(e, UserError) else traceback.format_exc(), file=sys.stderr, flush=True)
        elif team:
            team.outlive()
        else:
            time.sleep(60)  # the launcher ends it with the first
        os._exit(1)  # at once: the others may wait for this process in the middle of a step
    sys.stdout.flush()
    os._exit(0)  # threads of the connections may still run, and would abort the interpreter's own end


if __name__ == "__main__":
    main()
