# `make train` and `make test` need Python 3.11 or newer and a package registry; a C++ compiler if
# the CPU kernels are to be built. Everything lands in .venv, runs/ and the dataset folder.
.PHONY: all locked train reproduce-cifar10 test coverage test-all test-gpu gpu-check gpu-wheels gpu-showcase matrix bench-gpu docs tables pictures soak rivals check types bench clean help

PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard kernels/csrc/*/* kernels/csrc/*)
# An editable install knows the packages that were there when it was made.
PACKAGES := $(wildcard engine/__init__.py engine/*/__init__.py engine/*/*/__init__.py kernels/*/__init__.py)
# Where there is a GPU-less machine and a choice, PyTorch's CPU wheels are far smaller:
#   make train PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# What builds the C++ kernels; pinned like everything else, so not in pip's isolated environment.
BUILD := scikit-build-core nanobind cmake ninja
# The loader's extra: `make DALI=dali-cuda120` for a CUDA 12 driver.
DALI ?= dali

help: ## show the commands
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | sed -e 's/:.*## /\t/' | expand -t 20

all: .venv/ready ## set up .venv with the engine and everything it needs

.venv/ready: pyproject.toml constraints.txt CMakeLists.txt $(NATIVE) $(PACKAGES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'engine: Python 3.11 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt $(BUILD)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[gpu,$(DALI),export,tensorboard,test,check]'
	@touch .venv/ready

# pip holds every download against its SHA-256, or refuses to hold any: an editable install has none,
# and requirements.lock has those of the default index alone. Hence a target of its own.
locked: ## the same as `all`, every download checked by requirements.lock (Linux, x86-64)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch .venv/ready .venv/docs-ready

train: .venv/ready ## get Fashion-MNIST, train with the local-ball method, evaluate, report
	@$(BIN)/python -m engine data fetch fashion-mnist
	@$(BIN)/python -m engine train fashion-mnist

reproduce-cifar10: .venv/ready ## the claim at full scale; needs a GPU, can be stopped and gone on with
	@$(BIN)/python -m engine data fetch cifar10
	@$(BIN)/python -m engine compare benchmarks/studies/cifar10.toml --out runs/reproduce-cifar10

test: .venv/ready ## the whole test suite but its slow forms
	@$(BIN)/python -m engine data fetch fashion-mnist || echo 'engine: tests on Fashion-MNIST will be skipped'
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

coverage: .venv/ready ## lines that the fast tests reach
	@$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt pytest-cov
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' --cov=engine --cov=kernels --cov=benchmarks --cov-report=term

test-all: .venv/ready ## the slow forms too
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-gpu: .venv/ready ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu -rs

gpu-check: ## prove the CUDA path on a machine with a GPU: one call, no install, under 8 minutes
	@$(if $(wildcard .venv/ready),$(BIN)/python,$(PYTHON)) -m tests.device.gpu_check $(WORDS)

# What a machine with PyTorch, pytest, NumPy, SciPy and matplotlib still lacks.
GPU_PYTHON ?= 3.12
GPU_WHEELS ?= pydantic pydantic-core annotated-types typing-inspection typing-extensions tomli-w pyautoattack
gpu-wheels: ## download what `make gpu-check` needs there into .whl: make gpu-wheels GPU_PYTHON=3.12
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  -c constraints.txt -d .whl $(GPU_WHEELS)

gpu-showcase: .venv/ready ## CIFAR-10 on a GPU, measured beside the plan: make gpu-showcase DATA=FOLDER_OF_IMAGES
	@$(if $(DATA),,$(BIN)/python -m engine data fetch cifar10)
	@$(BIN)/python -m engine compare benchmarks/studies/showcase.toml --out runs/showcase $(if $(DATA),--data.name $(DATA))
	@$(BIN)/python -m engine.benchmarks.showcase runs/showcase

matrix: .venv/ready ## the fast tests with every supported PyTorch: make matrix WORDS="--torch 2.11.0 tests/training"
	@$(BIN)/python -m tests.matrix $(WORDS)

docs: .venv/docs-ready ## the site, into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict && echo build/site/index.html

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch .venv/docs-ready

tables: .venv/ready ## every table of the docs, from benchmarks/results and `engine plan`
	@$(BIN)/python -m benchmarks.tables

pictures: .venv/docs-ready ## the picture of a live run, from a live run; one or two minutes
	@$(BIN)/python -m benchmarks.pictures

soak: .venv/ready ## break and resume real runs: make soak KILLS=50, or make soak POWER_CUTS=20
	@$(BIN)/python -m tests.runs.soak $(if $(POWER_CUTS),--power-cuts $(POWER_CUTS),--kills $(or $(KILLS),50))

rivals: .venv/ready ## packages that `engine bench step` compares with; they pin what they do not need
	@$(BIN)/pip install -q --no-deps torchattacks==3.5.1 adversarial-robustness-toolbox==1.20.1 robustbench==1.1.1 six tqdm \
	  foolbox==3.3.4 eagerpy==0.30.0 GitPython==3.2.1 gitdb==4.0.12 smmap==5.0.3

bench: .venv/ready ## every benchmark, in short; `make bench AGAINST=COMMIT` compares
	@for what in ops step loaders scaling end-to-end accuracy; do $(BIN)/python -m engine bench $$what --quick $(if $(AGAINST),--against $(AGAINST)) || exit; done

bench-gpu: .venv/ready ## every benchmark in full on this machine's GPU, rows in build/bench
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "engine: no CUDA device here")'
	@mkdir -p build/bench
	@for what in ops step loaders scaling end-to-end accuracy; do $(BIN)/python -m engine bench $$what --json > build/bench/$$what.json || exit; done

check: .venv/ready ## lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(MAKE) -s types

# mypy needs the layout of a wheel: kernels/ and benchmarks/ inside engine/.
types: .venv/ready ## types of engine/, kernels/ and benchmarks/
	@rm -rf build/typing/engine && mkdir -p build/typing/engine
	@cd build/typing/engine && ln -s ../../../engine/* ../../../kernels ../../../benchmarks .
	@cd build/typing && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml

clean: ## remove what a build leaves
	rm -rf build dist .venv .mypy_cache .ruff_cache .pytest_cache
