# make run    build the environment, run the main job, print its table    make test   run all tests
# make report all results in one page: results/report.html                make ui     open the MLflow pages
# make lint   check the style of everything                               make docs   generate what is generated
# make push   version data/ and the results, send them to the DVC remote  make pull   get them back
# make verify make the result again elsewhere and compare it with data/   make clean  remove what `make run` made
# make lock   resolve the dependencies anew                             make peers  compare with other quantizers

PYTHON ?= python3.11
CORES ?= all
TARGET ?= results/smollm2-135m_2.0bits.json
TORCH := torch==2.13.0
MLFLOW_DB := sqlite:///mlflow.db

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: run report peers docs test lint ui push pull verify lock clean env env-dev

# Rules and tests call `python`: it is the environment's.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Snakemake keeps a cache in the home folder, which some containers do not let us write to.
ifneq ($(shell test -w "$$HOME" && echo yes), yes)
export XDG_CACHE_HOME := $(CURDIR)/.cache
endif

run: env
	snakemake --cores $(CORES) $(TARGET)
	python -m windquant.summary $(TARGET)
	@echo 'Pictures of all results: make report'

report: env
	snakemake --cores $(CORES) results/report.html

# The peers need the model, the text and the result of `make run`; each installs its own environment: docs/peers.md.
peers: run
	snakemake --snakefile benchmarks/peers/Snakefile --cores $(CORES)

# The configuration's schema and help, and the Python API; tests check that they are current.
docs: env
	python -m windquant.schema
	python -m windquant.api

# Stamps: a second call costs nothing. Torch comes first and alone: another spelling may fetch gigabytes of CUDA.
env: .venv/env.stamp
env-dev: .venv/env-dev.stamp

.venv/env.stamp: requirements.lock pyproject.toml
	@echo 'Building the environment in .venv: a few minutes, once.'
	.venv/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	python -m pip install -qq $(TORCH)
	python -m pip install -qq --requirement requirements.lock
	python -m pip install -qq --no-deps --editable .
	touch $@

.venv/env-dev.stamp: .venv/env.stamp requirements-dev.lock
	python -m pip install -qq --requirement requirements-dev.lock
	touch $@

# One process per core, so one thread each; the tests of one file share their fixtures in one process. The files start in
# the order of tests/conftest.py, the slow ones first.
test: env-dev
	OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: env-dev
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflow benchmarks
	snakemake --lint
	snakemake --lint --snakefile benchmarks/peers/Snakefile

ui: env
	mlflow ui --backend-store-uri $(MLFLOW_DB)

# To the DVC remote and back: docs/reproduce.md.
push: env
	python -m windquant push

pull: env
	python -m windquant pull

verify: env
	python -m windquant verify --cores $(CORES) $(TARGET)

lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install $(TORCH)
	.venv-lock/bin/pip install .
	@# the CUDA packages are torch's own business; nvidia-ml-py is not one of them
	freeze() { .venv-lock/bin/pip freeze --all --exclude pip --exclude windquant \
	    | sed 's/+.*//' | grep -vE '^(cuda-|nvidia-(cu|nv|nccl))'; }; \
	{ echo '# Made by `make lock`: every package that the steps need, with the versions of those packages too.'; \
	  echo "# No digests: torch's CPU and CUDA builds bear one version."; freeze; } > requirements.lock; \
	.venv-lock/bin/pip install '.[dev]'; \
	{ echo '# Made by `make lock`: what the tests and `make lint` need on top of requirements.lock.'; \
	  freeze | grep --invert-match --line-regexp --fixed-strings --file requirements.lock; } > requirements-dev.lock; \
	{ echo '# Made by `make lock` from requirements.lock, for `snakemake --software-deployment-method conda`.'; \
	  printf '%s\n' 'channels:' '  - conda-forge' 'dependencies:' '  - python=3.11' '  - pip' '  - pip:'; \
	  sed -n 's/^[^#]/      - &/p' requirements.lock; } > workflow/envs/windquant.yaml
	rm -rf .venv-lock

clean:
	rm -rf resources data results logs mlflow.db mlartifacts .cache .snakemake .verify
