# Everything runs in a .venv that make creates. A step runs again only when what it was made from has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find calibration engines nova_export reference_model -name '*.py')

# As many processes as cores, each with one thread; at most four, for each of them holds torch.
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

DEMO_CHECKPOINT := reference_model/demo/checkpoint
DEMO_PROMPT := a red circle moving right

.PHONY: help demo demo-train eval test slow test-engines test-triton lint format bench clean

help:
	@echo "make demo    build a bundle of the demo checkpoint and generate a video with it"
	@echo "make eval    score the demo bundle with ShapesEval, in minutes"
	@echo "make test    the tests"
	@echo "make slow    the heavy tests only"
	@echo "make test-engines  all that compiles engines, heavy ones too"
	@echo "make test-triton   a real Triton server on this machine, installed in .triton"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff sort imports and format"
	@echo "make bench   time the demo bundle on this machine"
	@echo "make demo-train  train the demo checkpoint anew, in hours on a CPU; goes on where it was stopped"
	@echo "make clean   remove everything that make made"
	@echo "PYTHON=python3.12 make ...  picks the interpreter of .venv ($(PYTHON) now)"

demo: demo/demo.mp4
	@echo "bundle: $(CURDIR)/demo/bundle"
	@echo "video:  $(CURDIR)/demo/demo.mp4"

demo-train: $(VENV)/export.stamp
	$(BIN)/python -m reference_model.demo --work demo/train --out $(DEMO_CHECKPOINT)

eval: demo/bundle/manifest.json
	$(BIN)/nova-export eval demo/bundle --sheet demo/shapes_eval.png

test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow

test-engines: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "slow or not slow" tests/engine

test-triton: demo/bundle/manifest.json
	PYTHON=$(PYTHON) tests/triton/install.sh
	OMP_NUM_THREADS=1 .triton/venv/bin/python -m pytest -m triton tests/triton

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: demo/bundle/manifest.json
	$(BIN)/nova-export bench demo/bundle --against $(DEMO_CHECKPOINT)

clean:
	rm -rf $(VENV) .triton demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find calibration nova_export reference_model tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

demo/demo.mp4: demo/bundle/manifest.json
	$(BIN)/nova-export run "$(DEMO_PROMPT)" --bundle demo/bundle --seed 1 -o $@

demo/bundle/manifest.json: $(VENV)/export.stamp $(SOURCES) $(wildcard $(DEMO_CHECKPOINT)/*/*)
	@mkdir -p demo
	$(BIN)/nova-export build --force -o demo/bundle

$(VENV)/%.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[$*]'
	@touch $@
