"""One run on several GPUs of one machine: accelerate launch --num_processes 2 nbs/run_in_team.py params.yml

The file holds the parameters of `run_experiment`; the run's folder gets the same files, but for the notebook.
"""
import sys
from pathlib import Path

import yaml

from deltaf1_al.config import UserError, resolve
from deltaf1_al.corpus import load_corpus
from deltaf1_al.encoder import hardware
from deltaf1_al.loop import ActiveLearner, RunFolder, check_run, open_store, progress_header, progress_line, simulate
from deltaf1_al.team import Team


def main(parameters: dict):
    config = resolve(**parameters)
    check_run(config)
    team = Team.launched(hardware(config.device, config.precision)[0])
    if team.rank:
        return ActiveLearner(config, load_corpus(config), team=team).help_out()
    try:
        folder, store = RunFolder(config), open_store(config)
        learner = ActiveLearner(config, load_corpus(config), store, say=print, team=team)
        print(progress_header())

        def on_round(record):
            folder.append(record)
            print(progress_line(record, config.n_rounds), flush=True)

        simulate(learner, on_round)
        folder.finish(learner)
    finally:
        team.dismiss()


if __name__ == "__main__":
    try:
        main(yaml.safe_load(Path(sys.argv[1]).read_text()) or {})
    except UserError as e:
        sys.exit(f"{e}")
