# make train   a natively low-rank language model on real English, minutes on two cores
# make test    lint, types and tests as CI runs them; make test-slow for the long ones
# make reproduce   the cards of reproductions/, run: CARD=name for one, SCALE=desk on a GPU; make cards renders them
# make docs    the documentation as a site, in build/site
# All create .venv first; nothing but Python 3.11 and make has to be there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install train test test-slow lint docs bench reproduce cards clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("nativerank needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[demo,report]'
	touch $@

# What tests need besides: linters, and every library that a model of ours goes to.
$(TESTABLE): $(INSTALLED)
	$(PIP) -e '.[demo,report,dev]'
	touch $@

train: install
	$(BIN)/nativerank train

lint: $(TESTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two test processes with one thread each are the best use of two cores.
test: lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(TESTABLE)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist loadfile -m slow

# The site, in build/site. A link that leads nowhere is an error.
docs: $(TESTABLE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

CARD ?=
SCALE ?= pocket
JOBS ?= 2

# What is missing of the cards; two runs with one thread each are the best use of two cores.
reproduce: install
	OMP_NUM_THREADS=$(JOBS) $(BIN)/nativerank reproduce $(CARD) --scale $(SCALE) --jobs $(JOBS)

# Pages and figures of the cards, from their results as they are.
cards: install
	$(BIN)/nativerank reproduce --render

STEPS := spectron spectron+compile lowrank-adamw+compile dense-adamw hf-dense
RECORDS := benchmarks/results
CPU := --threads 1 --clock cpu

# The records that texts quote, by the commands of benchmarks/README.md.
bench: install
	$(BIN)/nativerank bench layer $(CPU) --repeats 3 --json $(RECORDS)/bench-layer.json
	$(BIN)/nativerank bench train $(CPU) --methods $(STEPS) --json $(RECORDS)/bench-train-demo.json
	$(BIN)/nativerank bench train $(CPU) --d_model 512 --repeats 3 --methods spectron lowrank-adamw dense-adamw hf-dense \
		--json $(RECORDS)/bench-train-512.json
	$(BIN)/nativerank bench train $(CPU) --d_model 1024 --layers 1 --context 1024 --tokens 8192 --vocab_size 64 --repeats 3 \
		--methods spectron lowrank-adamw dense-adamw --json $(RECORDS)/bench-train-1024.json
	$(BIN)/python benchmarks/waterfall.py --preset demo --json $(RECORDS)/waterfall-demo.json
	$(BIN)/python benchmarks/waterfall.py --d_model 512 --repeats 5 --json $(RECORDS)/waterfall-512.json
	$(BIN)/nativerank bench memory --policies whole blocks --repeats 2 --json $(RECORDS)/bench-memory.json
	$(BIN)/nativerank bench loss --threads 1 --repeats 3 --json $(RECORDS)/bench-loss.json
	$(BIN)/nativerank bench optimizer $(CPU) --json $(RECORDS)/bench-optimizer.json
	$(BIN)/nativerank bench retraction $(CPU) --json $(RECORDS)/bench-retraction.json
	$(BIN)/nativerank bench frames --json $(RECORDS)/bench-frames.json
	$(BIN)/nativerank bench bound --json $(RECORDS)/bench-bound.json
	$(BIN)/nativerank bench step70b --all --json $(RECORDS)/bench-step70b.json
	$(BIN)/nativerank bench distributed --json $(RECORDS)/bench-distributed.json
	$(BIN)/nativerank bench distributed --paper --json $(RECORDS)/bench-distributed-paper.json
	OMP_NUM_THREADS=1 $(BIN)/nativerank bench generate --model.preset spectron-s --rank.ratio 0.25 0.5 \
		--prompt_tokens 16 --new_tokens 8 --clock cpu --json $(RECORDS)/bench-generate.json

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache
