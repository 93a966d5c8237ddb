# Two commands: `make demo` and `make test`. Each creates .venv if it is not there, installs what
# it needs, and reuses it afterwards. pip compiles nothing in advance: most modules of PyTorch are
# never imported.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test clean

demo: .venv/demo
	$(BIN)/asg train digits-demo --out $(DEMO) --overwrite
	$(BIN)/asg fit ASG/Digits-v0 --controller $(DEMO) --out $(DEMO)/fit-controller --overwrite
	$(BIN)/asg fit ASG/Digits-v0 --schedule $(DEMO)/schedule.json --out $(DEMO)/fit-schedule --overwrite

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

.venv/demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --editable .
	touch $@

.venv/dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
