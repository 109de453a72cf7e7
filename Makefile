# Everything a clean clone needs; `make` alone lists it.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
# Runs measure their own time and use every core: one after the other, also under `make -j`.
.NOTPARALLEL:

# PYTHON makes .venv; an existing .venv keeps the Python it has until another one is named.
PYTHON ?= $(or $(wildcard .venv/bin/python),python3)
VENV = .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install -c constraints.txt -e '.[dev,minilm,team,peers,strategies,lora,grid,slurm,paper]'

export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := true
# Spares every kernel start a warning about frozen modules.
export PYDEVD_DISABLE_FILE_VALIDATION := 1

STRATEGIES := retrain fine-tune new-only hybrid
DEMO := $(STRATEGIES:%=runs/demo/%/summary.json)

.PHONY: help setup demo plan experiments experiments-status results figures paper trace test lib check accept lab clean store-check store-gc own-environment

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "make setup PYTHON=python3.12   chooses the Python of .venv"
	@echo "make experiments STUDY=smoke   names a study of nbs/grid/grid.yml; PROFILE=slurm runs it on a cluster, JOBS=1 one run at a time"
	@echo "make accept VERSION=2          accepts a change of results that is meant, as the next version; AGAIN=1 makes the last comparison again"
	@echo "make store-gc YES=1            removes without asking; DELTAF1_AL_STORE names another store than store/"
	@echo "make test VENV=/path/to/env    uses an environment of yours instead, as it is"

# The stamp's name holds a hash of what the installation depends on, so that `git checkout`, which
# touches files without changing them, does not install anew, and a real change does.
ifeq ($(origin VENV),file)
READY := $(VENV)/.ready-$(shell { cat settings.ini setup.py constraints.txt; $(PYTHON) -V || :; } 2>&1 | cksum | cut -d ' ' -f 1)
else
READY := own-environment
endif

setup: $(READY) ## make .venv and install the tested versions of everything into it
	@echo "Ready: $(BIN)"

$(VENV)/.ready-%:
	@$(PYTHON) -c 'import sys; sys.exit("deltaf1_al needs Python 3.10 or newer: make setup PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	@[ -x $(BIN)/pip ] && [ "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" ] \
	|| $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
	$(INSTALL)
	@rm -f $(VENV)/.ready-*; touch $@

own-environment:
	@$(BIN)/python -I -c 'import os, sys, deltaf1_al, nbdev, papermill; sys.exit(not os.path.samefile(deltaf1_al.__path__[0], "deltaf1_al"))' 2>/dev/null \
	|| { echo "$(VENV) lacks this checkout or its tools. To install them: $(INSTALL)"; exit 1; }

demo: $(DEMO) ## compare the four strategies on real text, offline, in a few minutes
	@$(BIN)/python nbs/compare.py runs/demo

# Order-only: a finished run stays finished. `make clean` lets it run again.
$(DEMO): runs/demo/%/summary.json: | $(READY)
	@mkdir -p $(@D)
	$(BIN)/papermill nbs/run_experiment.ipynb $(@D)/run.ipynb -k python3 --no-progress-bar --log-output \
	  -f nbs/demo.yml -r strategy $* -r out_dir $(@D)

STUDY ?= smoke
PROFILE ?= local
GRID = @$(BIN)/python -c 'import sys; from deltaf1_al.driver import command; command(*sys.argv[1:])'

plan: | $(READY) ## what a study of nbs/grid/grid.yml would run, what is there already, and what the rest will cost
	$(GRID) plan '$(STUDY)' '$(PROFILE)' '$(JOBS)'

experiments: | $(READY) ## run what is missing of a study; again after a kill, it goes on
	$(GRID) experiments '$(STUDY)' '$(PROFILE)' '$(JOBS)'

experiments-status: | $(READY) ## finished, running and failed runs of a study, and why they failed
	$(GRID) status '$(STUDY)'

results: | $(READY) ## copy the records of finished runs to paper/results, checked
	$(GRID) results '$(STUDY)'

PAPER := paper/build
# The only date in the PDF; without it two builds would differ.
export SOURCE_DATE_EPOCH ?= 1700000000

figures: $(PAPER)/provenance.json ## figures, tables and numbers of the paper, from the committed records

# A folder's time changes when a record comes or goes, a file's when it is edited. No run is ever started from here,
# and no PDF of other records stays.
$(PAPER)/provenance.json: nbs/paper_figures.ipynb $(wildcard paper/version.tex) nbs/grid/grid.yml $(wildcard deltaf1_al/*.py) $(shell find paper/results) | $(READY)
	@rm -rf $(PAPER) paper/main.pdf; mkdir -p $(PAPER)
	@$(BIN)/python -m deltaf1_al.report figures
	@echo "Figures, tables and numbers: $(PAPER)"

paper: figures ## build paper/main.pdf from the committed records, offline; installs nothing
	@if command -v latexmk >/dev/null; then \
	  cd paper && latexmk -pdf -interaction=nonstopmode -halt-on-error -outdir=build main.tex > build/latexmk.log 2>&1 \
	  || { grep -A 3 '^!' build/latexmk.log | head -n 8; echo "Not made: paper/main.pdf. The whole log: $(PAPER)/latexmk.log"; exit 1; }; \
	elif command -v tectonic >/dev/null; then (cd paper && tectonic --chatter minimal --outdir build main.tex); \
	else echo "Not made: paper/main.pdf. TeX is missing: apt-get install latexmk texlive-latex-recommended texlive-fonts-recommended (or use the tectonic of environment.yml)."; exit 1; fi
	@cp $(PAPER)/main.pdf paper/main.pdf
	@echo "paper/main.pdf"

trace: figures ## the runs, parameters, keys and commits behind NUMBER=\hybridCostAG, or behind a figure or table
	@$(BIN)/python -m deltaf1_al.report trace '$(NUMBER)'

test: | $(READY) ## run the tests: every notebook, then the whole program from outside
	@$(BIN)/pytest -q tests

lib: | $(READY) ## write deltaf1_al/ from the notebooks, then clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/python -c 'import sys; from deltaf1_al.config import write_parameters; write_parameters(*sys.argv[1:])' nbs/*.ipynb
	$(BIN)/nbdev_clean

accept: | $(READY) ## run the golden set under the code accepted last and under today's; equal, the records stay
	@$(BIN)/python -c 'import sys; from deltaf1_al.accept import command; command(*sys.argv[1:])' '$(VERSION)' '$(AGAIN)'

check: | $(READY) ## before a commit: notebooks clean, modules in step with them, nothing untracked, records current
	@old=$$(mktemp -d); trap 'rm -rf "$$old"' EXIT; cp -R nbs deltaf1_al "$$old"; bad=0; \
	fail() { bad=1; echo "make check: $$1"; }; \
	$(MAKE) --no-print-directory -s lib; \
	diff -rq "$$old/nbs" nbs || fail "the notebooks above were not clean; they are now, commit them."; \
	diff -rq "$$old/deltaf1_al" deltaf1_al || fail "the modules above were not what the notebooks say; they are now, commit them."; \
	new=$$(git ls-files --others --exclude-standard); \
	[ -z "$$new" ] || { echo "$$new"; fail "the files above are untracked; add them, or name them in .gitignore."; }; \
	if ! $(BIN)/python -c 'import sys; from deltaf1_al.results import check_results; sys.exit("\n".join(check_results()) or 0)'; then fail "the records above cannot stay."; \
	elif $(BIN)/python -c 'from deltaf1_al.results import editions; print(*editions(), sep="\n", end="")'; $(MAKE) --no-print-directory -s figures; then $(BIN)/python -m deltaf1_al.report check || fail "the text above cannot stay."; \
	else fail "the paper's figures and numbers cannot be made."; fi; \
	[ $$bad = 0 ] && echo "make check: notebooks clean, modules in step, nothing untracked, records sound, the paper's numbers those of the records."

store-check: | $(READY) ## verify every finished round in the store
	@$(BIN)/python -c 'from deltaf1_al.store import check_store; check_store()'

store-gc: | $(READY) ## show what no run refers to any more, and remove it
	@$(BIN)/python -c 'from deltaf1_al.store import collect_garbage; collect_garbage(yes="$(YES)" == "1")'

lab: | $(READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter-lab nbs

clean: ## remove caches, build products and the demo's runs; keeps .venv, the store and all other runs
	@echo "Removed:"
	@find . \( -path ./.git -o -path ./.venv \) -prune -o \( -name __pycache__ -o -name .pytest_cache -o -name .hypothesis \
	  -o -name .ipynb_checkpoints -o -path ./build -o -path ./dist -o -path ./_proc -o -path ./_docs -o -path ./paper/build -o -path ./paper/main.pdf -o -path ./runs/demo \) \
	  -prune -print -exec rm -rf {} +
