# Every target sets itself up in $(VENV); the second time that takes no time.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ffvt-ready
CPP := $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: demo test lint format bench setup

demo: setup  ## train on PartBirds from scratch, write runs/demo/report.html
	$(BIN)/python -m ffvt demo --output runs/demo

test: setup
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: setup  ## measure the whole model against its rivals, append to benchmarks/results
	$(BIN)/python -m benchmarks.bench_model

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt $(CPP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch torchvision "setuptools>=77" pybind11 ninja
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[train,timm,dev]'
	touch $(READY)
