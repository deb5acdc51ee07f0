PYTHON ?= python3
VENV := .venv
CONSTRAINTS :=
BIN := $(VENV)/bin

.PHONY: install demo test test-examples lowest lint gpu-check

install: $(VENV)/.installed

# An editable install keeps copies of the metadata and of the start-up hook; the rest is read from src.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) $(wildcard src/anomalib_mvfa_hook.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev,docs,int8]'
	touch $@

demo: install
	$(BIN)/python -m anomalib_mvfa.demo

test: install
	$(BIN)/python -m pytest -n auto --dist loadfile

# Every command of the README and the site, and every config.
test-examples: install
	$(BIN)/python -m pytest -n auto --dist loadfile -m "slow or not slow" \
		tests/test_docs.py tests/test_configs.py tests/compare/test_compare_configs.py

# Warnings are errors, such as a name in a docstring that does not exist; nothing is read from the network.
.PHONY: docs
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

# In an environment of its own: the everyday one keeps its versions.
lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=tests/lowest.txt

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

gpu-check: install
	$(BIN)/python benchmarks/gpu_check.py --device cuda
