# `make parity` and `make test` need only Python >= 3.11, pip and make: they build .venv on their first run.
PYTHON ?= python3
ARGS ?=
EVIDENCE := build/evidence.json
# A file's tests stay together, with their fixtures, until a worker is out of work: then it takes half of another's.
ALL_TESTS := -n logical --dist worksteal --benchmark-disable -p exactmoe.contracts.recorder --record-evidence $(EVIDENCE)

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: parity test check lint check-format check-lint check-types check-contracts check-status fix clean

parity: $(INSTALLED)  ## run the shipped model through kernels and reference, compare every stage bit for bit
	$(BIN)/exactmoe parity $(ARGS)

test: $(INSTALLED)  ## run the tests; all of them leave a record, which is what the contracts' statuses come from
	$(BIN)/pytest $(or $(ARGS),$(ALL_TESTS))

check: lint test check-status  ## format, lint, types, contracts, tests, what they show

check-status: $(INSTALLED)
	$(BIN)/exactmoe contracts status --evidence $(EVIDENCE) --readme README.md
	$(BIN)/exactmoe bench --readme README.md

lint: check-format check-lint check-types check-contracts

check-format: $(INSTALLED)
	$(BIN)/ruff format --check --diff .

check-lint: $(INSTALLED)
	$(BIN)/ruff check .

check-types: $(INSTALLED)
	$(BIN)/mypy

check-contracts: $(INSTALLED)
	$(BIN)/exactmoe contracts validate --dialect house --strict contracts
	$(BIN)/exactmoe contracts diff --rev HEAD~1 --if-any contracts

fix: $(INSTALLED)  ## rewrite what ruff can format and repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
