# Both targets set up all they need in a virtual environment of their own.
PYTHON ?= python3
BIN := .venv/bin
OUT := quickstart-output

.PHONY: quickstart test lint lock clean

quickstart: .venv/installed  ## search the ranks of a small model, draw its front, choose its knee
	$(BIN)/rank-search run studies/quickstart/study.toml
	mkdir -p $(OUT)
	$(BIN)/rank-search front studies/quickstart/study.toml --plot $(OUT)/front.png
	$(BIN)/rank-search export studies/quickstart/study.toml --knee -o $(OUT)/rank_map.json

test: .venv/installed-dev lint  ## everything that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not gpu"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("rank-search needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

lock:  ## pin what is installed now
	$(BIN)/python scripts/lock.py

clean:
	rm -rf .venv $(OUT) studies/*/work studies/*/*.db studies/*/*.db-* studies/*/*.db.lock
