# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
#   make test PYTHON=python3.12     another interpreter for the environment
#   make bench-gpu PY=python        an environment of your own in which musicgen-fast is installed; nothing is set up
PYTHON ?= python3
JOBS ?= 2

ifdef PY
READY :=
else
PY := .venv/bin/python
READY := .venv/.ready
endif

PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check
# Wanted without their requirements. audiocraft, whose tokens the tests compare with, pins numpy<2, xformers and others
# that no current torch fits; of diffsynth the tests use one file, the sentencepiece model of T5.
BARE_PACKAGES := tts-webui-audiocraft==1.4.0a2 diffsynth==1.1.9
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest
GPU_RESULTS ?= benchmarks/results/$(shell date +%Y-%m-%d-%H%M)-gpu.json

.PHONY: help demo test test-all test-transformers-4 lint coverage docs bench bench-gpu sanitize-gpu clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(READY) ## music from the small demo model, into out/
	$(PY) examples/demo.py -o out/

test: $(READY) ## the quick tests: no GPU, no weights
	$(PYTEST) -m "not slow and not gpu" -n $(JOBS) --dist loadfile --benchmark-disable

test-all: $(READY) ## every test that needs no GPU
	$(PYTEST) -m "not gpu" -n $(JOBS) --dist loadfile --benchmark-disable --durations=15

test-transformers-4: $(READY) .venv-transformers-4/.ready ## accelerate() with the 4.57 line of transformers
	MUSICGEN_FAST_TRANSFORMERS_457=$(CURDIR)/.venv-transformers-4/bin/python $(PYTEST) tests/test_accelerate_versions.py

lint: $(READY) ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@export PATH="$(dir $(PY)):$$PATH"; if command -v clang-format >/dev/null; then \
	  find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs clang-format --dry-run --Werror; \
	else echo "clang-format is not installed: csrc/ unchecked"; fi

coverage: $(READY) ## line coverage by the quick tests; pages in out/coverage
	@mkdir -p out
	$(PYTEST) -m "not slow and not gpu" -n $(JOBS) --dist loadfile --benchmark-disable --cov --cov-report=term --cov-report=html

# The reference is read from the source, so the site's tools need neither torch nor this package: an environment alone.
docs: ## guides and reference as a site, in out/site
	@test -x out/.venv-docs/bin/mkdocs || { $(PYTHON) -m venv --clear out/.venv-docs; \
	if out/.venv-docs/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then pins="-c constraints.txt"; fi; \
	out/.venv-docs/bin/python -m pip install -qq --disable-pip-version-check $$pins \
	  $$(sed -n '/^docs = \[/,/^\]/s/^ *"\([^"]*\)",.*/\1/p' pyproject.toml); }
	NO_MKDOCS_2_WARNING=1 out/.venv-docs/bin/python -m mkdocs build --strict

# The suites of pytest-benchmark, then every kind of `musicgen-fast bench` at settings that fit into 15 minutes on two cores.
bench: $(READY) ## the CPU beside what is installed, under 15 minutes: tables, JSON lines and plots in out/bench
	@rm -rf out/bench && mkdir -p out/bench
	$(PY) -m pytest benchmarks -o python_files='bench_*.py test_*.py' -m "not gpu" --benchmark-only --benchmark-json=out/bench/suites.json -q
	@set -e; run() { \
	  kind=$$1; shift; printf '\n== musicgen-fast bench %s %s\n' $$kind "$$*"; \
	  $(PY) -m musicgen_fast bench $$kind "$$@" --device cpu --json out/bench/cpu.jsonl > out/bench/$$kind.md; cat out/bench/$$kind.md; }; \
	run latency -m random:small --precision int8,float32 --positions 16,768,1480 --steps 40 --rounds 1; \
	run throughput -m demo --pieces 24 --batches 8 --peer-batches 8 --rounds 1; \
	run stream -m demo --duration 10 --rounds 1; \
	run sampler --batch 1,16 --rounds 2 --providers audiocraft,transformers,sample:cpu,draw:cpu,noise:cpu,sample:torch; \
	run quality -m demo --count 8 --duration 5
	$(PY) -m musicgen_fast bench plot out/bench/cpu.jsonl -o out/bench/plots

bench-gpu: $(READY) ## on a GPU, under ten minutes: every check, then all figures; JSON and plots in benchmarks/results/
	PYTHONPATH=. $(PY) benchmarks/gpu_report.py --json $(GPU_RESULTS)

sanitize-gpu: $(READY) ## compute-sanitizer over a short run of the decoder on a GPU; some minutes
	@set -e; for tool in memcheck racecheck synccheck; do echo "== $$tool"; \
	  PYTHONPATH=. compute-sanitizer --tool $$tool --error-exitcode 9 $(PY) benchmarks/gpu_checks.py --part short --tiny; done

clean: ## remove everything that make has made
	rm -rf .venv .venv-transformers-4 build out *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks musicgen_fast/_C*.so musicgen_fast/_cuda.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first, so that nothing after it asks for another one. The build runs in this environment, not in an
# isolated one: that would download setuptools and nanobind again, unpinned, at every call.
# Python 3.10 takes the newest versions that still support it: constraints.txt is for 3.11 and later.
.venv/.ready: setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "musicgen_fast needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),test) PYTHON=python3.11" >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { \
	  rm -rf .venv; echo "No virtual environment: install Python's venv (Debian: apt install python3-venv)." >&2; exit 1; }
	@echo "Setting up .venv (a minute or two the first time)"
	@set -e; \
	if .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then pins="-c constraints.txt"; fi; \
	$(PIP) $$pins $$(grep '^torch==' constraints.txt) 'setuptools>=77' wheel nanobind; \
	$(PIP) $$pins --no-build-isolation -e '.[test]'; \
	$(PIP) --no-deps $(BARE_PACKAGES)
	@.venv/bin/python -c "from musicgen_fast import native; print('C++ extension:', native.why_not() or 'built')"
	@touch $@

# Another transformers beside everything else of .venv: a path file, and its own folder in front of it.
.venv-transformers-4/.ready: $(READY)
	@$(PY) -m venv --clear .venv-transformers-4
	@$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$(.venv-transformers-4/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz_base.pth"
	@.venv-transformers-4/bin/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts transformers==4.57.1
	@touch $@
