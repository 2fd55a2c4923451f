# Every target sets itself up in $(VENV); the second time that takes no time.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ffvt-ready
OLD_TRITON := $(VENV)/triton-3.6.0
GPU_PYTHON ?= python3
OUT ?= runs/gpu-report
CPP := $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: demo test test-all test-asan lint format bench static-report gpu-report setup

demo: setup  ## train on PartBirds from scratch, write runs/demo/report.html
	$(BIN)/python -m ffvt demo --output runs/demo

test: setup  ## every module and every kernel, in a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-all: setup $(OLD_TRITON)  ## the rest too: all ahead-of-time compilations, all launches, kill-and-resume campaigns
	$(BIN)/python -m pytest -q

test-asan: setup  ## the C++ kernels' tests with AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer
	tests/asan.sh $(BIN) $(VENV)/asan

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

static-report: setup $(OLD_TRITON)  ## compile the Triton kernels ahead of time, record registers and spills
	PYTHONPATH=$(OLD_TRITON):. $(BIN)/python -m benchmarks.static_report
	$(BIN)/python -m benchmarks.static_report

gpu-report:  ## test and measure the kernels on this machine's GPU, into OUT; needs torch, triton, numpy, safetensors, pillow, pytest
	PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu_report --out $(OUT)

setup: $(READY)

# The oldest Triton that is supported, beside the environment. Where it cannot be fetched its test is skipped.
$(OLD_TRITON): $(READY)
	-$(BIN)/pip install --quiet --no-deps --target $(OLD_TRITON) triton==3.6.0

$(READY): pyproject.toml setup.py constraints.txt $(CPP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch torchvision "setuptools>=77" pybind11 ninja
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[train,timm,hf,onnx,dev]'
	touch $(READY)
