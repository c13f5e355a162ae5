# Two commands: `make demo` and `make test`. Each makes what it needs; a second call starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test test-faults lint docs lock clean

install: $(READY)

# The lock pins every version; --no-deps keeps pip from choosing any other.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"wavemim needs Python 3.11 or newer, this is {v[0]}.{v[1]}: give another with PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)
	$(BIN)/wavemim demo out=wavemim-demo

test: $(READY)
	$(BIN)/python -m pytest -m "not faults"

# Kills Rays, workers, nodes and servers in the middle of their work; minutes each.
test-faults: $(READY)
	$(BIN)/python -m pytest -m faults -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation site, into site/; fails on broken links and where docs/settings.md is not current.
docs: $(READY)
	$(BIN)/python docs/generate_settings.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Chooses every version anew, for each supported Python, from the ranges in pyproject.toml.
lock: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --extra docs --extra onnx --no-emit-index-url \
		--no-emit-find-links --no-annotate --custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) wavemim-demo dist build site
