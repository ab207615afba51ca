# featherweight: `make` lists the targets. Every target sets up what it needs.
# Benchmarks leave out arms that have a row; `make bench-... AGAIN=1` measures them once more and keeps the old rows;
# ARMS="first arm;second*" measures these alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ZOO_VENV := .venv-zoo
DOCS_VENV := .venv-docs
BUILD_VENV := .venv-build
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo docs figures matrix matrix-one packages packages-run test test-all fuzz check fix api zoo bench-bits bench-cifar bench-import bench-runtimes clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 16

setup: $(READY) ## make .venv with the pinned development environment
$(READY): requirements-dev.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: $(READY) ## the main job on scikit-learn's digits: train, compress, measure, report (out/demo)
	$(BIN)/featherweight demo --out out/demo

test: $(READY) ## the tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" tests

test-all: $(READY) ## the tests, and those that say the same of more and larger networks
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests

MINUTES ?= 30
fuzz: $(READY) ## hostile files for 30 minutes (MINUTES=...); what it finds becomes a file in tests/attacks
	OMP_NUM_THREADS=1 $(BIN)/python tests/attacks/fuzz.py --minutes $(MINUTES)

check: $(READY) ## ruff (docstrings too) and mypy (strict)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy

api: $(READY) ## write the public surface anew (tests/public_api.txt), after it was changed on purpose
	$(BIN)/python tests/public_api.py

fix: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix src tests benchmarks examples

$(DOCS_VENV)/.ready: mkdocs.yml
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=1,<2' ruff
	touch $@

docs: $(DOCS_VENV)/.ready ## the documentation as a site: site/index.html (a warning is an error)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict

figures: $(READY) ## draw the documentation's figures and tables anew from the rows in benchmarks/results
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/figures.py

$(ZOO_VENV)/.ready: pyproject.toml
	test -x $(ZOO_VENV)/bin/python || $(PYTHON) -m venv $(ZOO_VENV)
	$(ZOO_VENV)/bin/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.23.0
	$(ZOO_VENV)/bin/python -m pip install --quiet -e .
	touch $@

zoo: $(ZOO_VENV)/.ready ## capture one model of each torchvision family; prune the zoo (5.6 GB of packages; resumes)
	$(ZOO_VENV)/bin/python benchmarks/zoo_capture.py
	$(ZOO_VENV)/bin/python benchmarks/zoo_prune.py

bench-runtimes: $(ZOO_VENV)/.ready ## float and int8 in ONNX Runtime and OpenVINO, beside their own quantizers
	$(ZOO_VENV)/bin/python -m pip install --quiet openvino nncf scikit-learn
	$(ZOO_VENV)/bin/python benchmarks/int8_runtimes.py

bench-bits: $(ZOO_VENV)/.ready ## few bits, after and in training, beside the runtimes' quantizers (CHECKPOINTS=folder)
	$(ZOO_VENV)/bin/python -m pip install --quiet openvino nncf scikit-learn
	$(ZOO_VENV)/bin/python benchmarks/post_training.py --checkpoints $(CHECKPOINTS)
	$(ZOO_VENV)/bin/python benchmarks/ladder.py
	$(ZOO_VENV)/bin/python benchmarks/low_bit_training.py --checkpoints $(CHECKPOINTS) lenet5 resnet20

bench-cifar: $(READY) ## the trained CIFAR-10 ResNets (CHECKPOINTS=folder with the weights)
	$(BIN)/python benchmarks/cifar_resnets.py --checkpoints $(CHECKPOINTS)

bench-import: $(READY) ## what importing costs beside torch
	$(BIN)/python benchmarks/import_time.py

packages: ## build wheel and sdist, install both in a clean environment, and run the command there
	test -x $(BUILD_VENV)/bin/python || $(PYTHON) -m venv $(BUILD_VENV)
	$(BUILD_VENV)/bin/python -m pip install --quiet build
	rm -rf dist $(BUILD_VENV)-clean && $(BUILD_VENV)/bin/python -m build --outdir dist .
	$(PYTHON) -m venv $(BUILD_VENV)-clean && $(BUILD_VENV)-clean/bin/python -m pip install --quiet dist/*.whl
	$(MAKE) packages-run
	$(BUILD_VENV)-clean/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.tar.gz
	$(MAKE) packages-run

# what is installed in the clean environment: the command, an example copied out of it, a job file that it knows
packages-run:
	cd $(BUILD_VENV)-clean && rm -rf tabular && bin/featherweight --version && bin/featherweight examples && \
	    bin/featherweight examples tabular && test -f tabular/job.toml && bin/featherweight schema > /dev/null

# one Python and one torch: the quick tests in an environment of their own (TORCH="==2.11.*"; nothing: the newest)
TORCH ?=
TESTS ?= -n 2 --dist loadgroup tests
matrix-one:
	rm -rf .venv-matrix && $(PYTHON) -m venv .venv-matrix
	.venv-matrix/bin/python -m pip install --quiet "torch$(TORCH)" -e '.[dev]'
	OMP_NUM_THREADS=1 .venv-matrix/bin/python -m pytest -m "not slow" $(TESTS)

PYTHONS ?= python3.11 python3.12 python3.13
matrix: ## the quick tests on every Python that is here (PYTHONS=..., TESTS=files), with the oldest and the newest torch
	for python in $(PYTHONS); do \
	    if ! $$python --version > /dev/null 2>&1; then echo "$$python is not here: left out"; continue; fi; \
	    for torch in "==2.11.*" ""; do $(MAKE) matrix-one PYTHON=$$python TORCH="$$torch" || exit 1; done; \
	done

clean: ## remove what was built
	rm -rf out site build dist .mypy_cache .ruff_cache .pytest_cache
