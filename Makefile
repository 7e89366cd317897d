# Every need has one command; `make` alone lists them. Variables can be set on the command line: make run VENV=/tmp/venv

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
#: the virtual environment's folder
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$python && break; done)
#: the Python that makes it, 3.11 or 3.12; by default the first of python3, python3.12 and python3.11 that is
TORCH ?= torch==$(TORCH_VERSION)$(shell nvidia-smi -L >/dev/null 2>&1 || [ "$$(uname)" = Darwin ] || echo +cpu)
#: what pip installs as torch: with a GPU the plain build, which brings CUDA; without one the CPU build
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
#: where the CPU build is looked for when pip, as it is set up, does not find it
SPEC ?= pipelines/examples/quickstart.yaml
#: what `make run` runs
PACK_FOLDER ?= out/pack
#: where `make pack` keeps its states, from which it goes on
PACK_MINUTES ?=
#: most minutes for each part of `make pack`; left out, each is trained to its end
PACK_SAMPLES ?= 1000
#: prompts on which `make pack` measures what it made
THREADS ?= 1
#: threads of torch in `make pack`; while others use the machine one is best
PACK_FLAGS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo --compile || ! grep -qs avx512_bf16 /proc/cpuinfo || echo --bfloat16)
#: how `make pack` computes: --compile with a GPU, --bfloat16 on a CPU that has it

TORCH_VERSION := $(shell sed -n 's/^torch==//p' requirements.lock)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
CORE := $(VENV)/.installed-core-$(shell (cat requirements.lock pyproject.toml; echo "$(TORCH)") | cksum | cut -d' ' -f1)
TELEMETRY := $(VENV)/telemetry/.installed-$(shell cat requirements-telemetry.lock | cksum | cut -d' ' -f1)
TEST := $(VENV)/.installed-test-$(shell cat requirements-test.lock | cksum | cut -d' ' -f1)
step = @printf '==> %s\n' "$(1)"

.PHONY: help
help: ## list the commands and the variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@printf '\nVariables:\n'
	@awk '/^[A-Z_]+ \?=/ { name = $$1 } /^#: / { printf "  %-14s %s\n", name, substr($$0, 4) }' Makefile

.PHONY: run
run: $(CORE) ## install what ditmill needs and make the quickstart dataset; running it again resumes
	$(call step,ditmill run $(SPEC))
	@$(BIN)/ditmill run $(SPEC)

.PHONY: install
install: $(CORE) ## install what ditmill needs into a virtual environment, and nothing else

.PHONY: test
test: lint chromium $(TELEMETRY) ## lint and every test but the soak
	$(call step,Tests without Ray)
	@$(BIN)/python -m pytest -n 2 -m "not soak and not ray"
	$(call step,Tests with Ray)
	@$(BIN)/python -m pytest -m "ray and not soak" --durations=15

.PHONY: check
check: lint chromium ## lint and the tests that need no Ray, in under three minutes
	$(call step,Tests without Ray)
	@$(BIN)/python -m pytest -n 2 -m "not soak and not ray" --durations=5

.PHONY: lint
lint: $(CORE) $(TEST) ## ruff, the arrows between the folders, types
	$(call step,ruff)
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . || \
		{ echo "mend with: $(BIN)/ruff check --fix . && $(BIN)/ruff format ."; exit 1; }
	$(call step,import-linter)
	@$(BIN)/lint-imports --no-logo
	$(call step,mypy)
	@$(BIN)/mypy

.PHONY: soak
soak: $(CORE) $(TEST) ## the long tests: a hundred kills at random moments, 10,000 spoilt files; the tests on S3 again, on Ceph
	$(call step,Soak)
	@$(BIN)/python -m pytest -m soak --timeout=0 --durations=0 -s
	$(call step,S3 on Ceph)
	@if command -v ceph-mon >/dev/null && command -v ceph-osd >/dev/null && command -v radosgw >/dev/null; then \
		DITMILL_TEST_S3=ceph $(BIN)/python -m pytest --durations=5 -s; \
	else echo "Ceph not found, left out: $$(sed -n 's/^ *\(apt-get install .*\)/\1/p' infra/ceph.py) (as root)"; \
	fi

.PHONY: bench
bench: $(CORE) ## the benchmarks, each beside its baseline
	$(call step,Overhead against a single-process loop)
	@$(BIN)/ditmill bench overhead
	$(call step,Data plane against a bare Ray Data pipeline)
	@$(BIN)/ditmill bench dataplane
	$(call step,Planning a resume over ten million samples)
	@$(BIN)/ditmill bench planning

# A part that was cut short is used as it is.
train = $(BIN)/python -m models.pack.train.$(1) --folder $(PACK_FOLDER) --threads $(THREADS) \
	$(if $(PACK_MINUTES),--minutes $(PACK_MINUTES)) $(PACK_FLAGS)

.PHONY: pack
pack: $(CORE) ## train pack://shapes anew, a day on two cores, and measure it; running it again goes on
	$(call step,Text encoder)
	@$(call train,text)
	$(call step,Denoiser)
	@$(call train,denoiser)
	$(call step,VAE)
	@$(call train,generated)
	@$(call train,vae)
	$(call step,Judge)
	@$(call train,eyes)
	@$(call train,flaws) --vae $(PACK_FOLDER)/vae
	@$(call train,flaws) --vae $(PACK_FOLDER)/vae --split held_out --clips 256
	@$(call train,judge)
	$(call step,Prompt expander)
	@$(call train,expander)
	$(call step,Assembling models/pack/shapes)
	@$(BIN)/python -m models.pack.train.assemble --folder $(PACK_FOLDER) --into models/pack/shapes
	$(call step,What it reaches)
	@$(BIN)/ditmill bench pack --samples $(PACK_SAMPLES) --sheet $(PACK_FOLDER)/sheet.png

.PHONY: lock
lock: $(CORE) ## resolve pyproject.toml anew, for the Pythons in PYTHONS (oldest first)
	@$(BIN)/python -m infra.lock $(or $(PYTHONS),python3.11 python3.12)

.PHONY: clean
clean: ## remove the virtual environment and the caches; datasets under out/ stay
	@if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	@rm -rf *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps carry a hash of what they stand for, so that a second `make` installs nothing and a changed lock installs again.
# The CPU build is looked for in two places that hold CPU builds, and nowhere else: no CUDA is downloaded unasked.
$(CORE):
	@[ -x $(BIN)/python ] || [ -n "$(PYTHON)" ] || \
		{ echo "No Python 3.11 or 3.12 on PATH: install one, or give it: make PYTHON=/path/to/python3.12"; exit 2; }
	@[ -x $(BIN)/python ] || { printf '==> %s\n' "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	$(call step,Installing $(TORCH))
	@$(BIN)/python -c "import importlib.metadata as m; assert 'torch==' + m.version('torch') == '$(TORCH)'" 2>/dev/null || \
	case "$(TORCH)" in \
	*+cpu) $(PIP) install --no-deps "$(TORCH)" 2>/dev/null || $(PIP) install --no-deps --index-url $(TORCH_INDEX) "$(TORCH)" || \
		{ echo "No CPU build of torch $(TORCH_VERSION) for this Python: see TORCH and TORCH_INDEX in 'make help'"; exit 1; };; \
	*) $(PIP) install --constraint requirements.lock "$(TORCH)";; \
	esac
	$(call step,Installing $$(grep -c == requirements.lock) packages)
	@$(PIP) install --no-deps -r <(grep -v '^torch==' requirements.lock)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@$(BIN)/python -m pip check >/dev/null || $(BIN)/python -m pip check
	@rm -f $(VENV)/.installed-core-* && touch $@

$(TEST): | $(CORE)
	$(call step,Installing $$(grep -c == requirements-test.lock) packages for the tests)
	@DS_BUILD_OPS=0 $(PIP) install --no-deps --no-build-isolation -r requirements-test.lock
	@rm -f $(VENV)/.installed-test-* && touch $@

# Apart, so that all but the tests that need it have the Ray that most users have: the whole one starts more for each session.
$(TELEMETRY): | $(CORE)
	$(call step,Installing $$(grep -c == requirements-telemetry.lock) packages for the tests of telemetry)
	@rm -rf $(VENV)/telemetry
	@$(PIP) install --no-deps --target $(VENV)/telemetry -r requirements-telemetry.lock
	@touch $@

# The tests of the report look at it in a browser.
.PHONY: chromium
chromium:
	@if [ -n "$${DITMILL_NO_BROWSER:-}" ] || command -v chromium chromium-browser google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		printf '==> %s\n' "Installing chromium, for the tests of the report"; \
		apt-get -qq update >/dev/null && DEBIAN_FRONTEND=noninteractive \
			apt-get -qq install --no-install-recommends chromium fonts-liberation >/dev/null; \
	else echo "No chromium found, in which tests look at the report: apt-get install chromium (as root), or add DITMILL_NO_BROWSER=1"; \
		exit 1; \
	fi
