PYTHON = python3
BIN = .venv/bin
export PYTHONDONTWRITEBYTECODE = # empty: pytest keeps the test modules that it has rewritten

qvm.pyz: qvm.py build_zipapp.py
	$(PYTHON) build_zipapp.py $@

qvm.1: qvm.py build_zipapp.py
	$(PYTHON) build_zipapp.py $@

# Install what the tests need and run all of them.
test: .venv/installed
	@$(BIN)/python -m pytest --collect-only >/dev/null || : # once, not in each of the eight
	$(BIN)/python -m pytest -n 8 --dist loadgroup # most of what a test takes is waiting

# What shows most mistakes, in half a minute.
check: .venv/installed lint
	$(BIN)/python -m pytest -n 2 -m "(pure and not slow) or smoke"

# qvm in front of you, without GitHub.
demo: .venv/installed
	$(BIN)/python tests/demo.py

# What qvm costs; BENCH="start sync" measures some of it.
bench: .venv/installed
	$(BIN)/python tests/bench.py $(BENCH)

# Faults at random; TORTURE="--seed 7 network 50" chooses.
torture: .venv/installed
	$(BIN)/python tests/torture.py $(TORTURE)

lint: .venv/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin
	$(BIN)/python tests/check_schemas.py

.venv/installed: tests/requirements.txt tests/install tests/linux_packages
	tests/install
	$(PYTHON) -m venv .venv
	tests/linux_packages .venv/linux
	$(BIN)/python -m pip install -q -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv qvm.pyz qvm.1

.PHONY: test check demo bench torture lint clean
