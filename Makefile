# make demo         train with SFW and with SGD on two ranks, prune, and draw one report
# make test         the whole test suite
# make test-quick   its quick part, for use while editing: under two minutes on two cores
# make lint         style and types; make format mends the style
# make docs         the manual, in site/
# make bench        the benchmarks
# All set up first. PYTHON picks the interpreter, VENV the virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs
# Processes that run the tests; many tests start two or more of their own.
WORKERS ?= 2
DATA ?= data

# What FFCV compiles against and with, and what a virtual environment needs.
SYSTEM_PACKAGES := build-essential pkg-config libopencv-dev libturbojpeg0-dev python3-dev python3-venv
# For slurm/local_cluster and tests/slurm; the tests there are skipped without.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge slurmdbd mariadb-server slurm-wlm-mysql-plugin bc procps
READY := $(VENV)/.sfw-dist-ready

export PATH := $(abspath $(VENV))/bin:$(PATH):/usr/sbin

.PHONY: setup system-packages slurm-packages demo test test-quick test-dist lint format docs bench bench-hosts clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory system-packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --upgrade pip
	python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

system-packages:
	@if pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v c++ >/dev/null; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
	  echo "error: install a C++ compiler, pkg-config and the development files of OpenCV 4 and libturbojpeg" >&2; exit 1; fi; \
	if [ "$$(id -u)" = 0 ]; then as_root=; elif sudo -n true 2>/dev/null; then as_root=sudo; else \
	  echo "error: run once: sudo apt-get install $(SYSTEM_PACKAGES)" >&2; exit 1; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	$$as_root apt-get update -qq && $$as_root apt-get install -qq --no-install-recommends $(SYSTEM_PACKAGES) >/dev/null

slurm-packages:
	@if command -v slurmctld && command -v slurmdbd && command -v mariadbd && command -v munged; then exit 0; fi >/dev/null; \
	if ! command -v apt-get >/dev/null; then \
	  echo "error: install Slurm 22.05 or newer with slurmdbd, munge and MariaDB" >&2; exit 1; fi; \
	if [ "$$(id -u)" = 0 ]; then as_root=; elif sudo -n true 2>/dev/null; then as_root=sudo; else \
	  echo "error: run once: sudo apt-get install --no-install-recommends $(SLURM_PACKAGES)" >&2; exit 1; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	$$as_root apt-get update -qq && $$as_root apt-get install -qq --no-install-recommends $(SLURM_PACKAGES) >/dev/null

demo: setup
	python -m sfw_dist.data prepare digits --root $(DATA)
	@for name in sfw sgd; do \
	  python -m launch.local --config configs/digits/$$name.yaml --nproc 2 --resume auto --runs_dir $(RUNS) --data.root $(DATA) || exit $$?; \
	  python -m sfw_dist.evaluate $(RUNS)/digits_$$name || exit $$?; \
	done
	@python -m sfw_dist.report $(RUNS)/digits_sfw $(RUNS)/digits_sgd

test: setup
	python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

test-quick: setup
	python -m pytest -m "not slow"

test-dist: setup
	python -m pytest tests/multiprocess

lint: setup
	ruff check .
	ruff format --check .
	mypy

format: setup
	ruff check --fix .
	ruff format .

docs: setup
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

BENCHMARKS := step vertex_codec balance loader loader_jpeg loader_memory training scaling.model
# These make network namespaces: as root, or with sudo.
HOST_BENCHMARKS := hosts.step

bench: setup
	@for name in $(BENCHMARKS); do python -m benchmarks.$$name || exit $$?; done

bench-hosts: setup
	@if [ "$$(id -u)" = 0 ]; then as_root=; else as_root=sudo; fi; \
	for name in $(HOST_BENCHMARKS); do $$as_root "$(abspath $(BIN))/python" -m benchmarks.$$name || exit $$?; done

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
