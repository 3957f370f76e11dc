# `make demo` and `make test` do everything on a fresh Linux machine with Python 3.11 or newer; `make help` lists the rest.
# scripts/environment.sh says what PYTHON and CUDA take.

export PYTHON CUDA
VENV ?= .venv
PROMPT ?= 이 영화를 처음 봤을 때는
SAMPLING ?= --temperature 0.6 --top-p 0.9 --seed 8
# More arguments for pytest: make test ARGS="-k tokenizer -x"
ARGS ?=

# Of decode_steps_driver, for the sanitizer.
SMALL_MODEL := rows=3 context=70 capacity=128 layers=2 model_dim=256 heads=4 head_dim=64 ffn_dim=1008 vocab=1002 steps=3 calls=2
# Blocks round one row themselves, attention more.
SMALL_INT8_MODEL := weight=int8 cache=int8 context=70 capacity=128 layers=2 model_dim=512 heads=2 head_dim=256 ffn_dim=1024 vocab=1024 steps=3 calls=2

BIN := $(VENV)/bin
ENVIRONMENT := sh scripts/environment.sh
BUILD_OPS := sh scripts/build_ops.sh
CPP_FILES := $(wildcard $(addprefix custom_ops/csrc/*.,h cc cu cuh inc))

.DEFAULT_GOAL := help
.PHONY: help demo ops ops-cuda test lint format typecheck oracle test-gpu check-kernels test-multigpu lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 20

demo: ## install, and stream Korean text from the shipped model on whatever device there is
	@$(ENVIRONMENT) $(VENV) runtime cuda
	@$(BUILD_OPS) $(VENV) host
	@$(BUILD_OPS) $(VENV) gpu
	$(BIN)/kogpt generate --model demo --prompt "$(PROMPT)" $(SAMPLING) --echo --stream --stats

ops: ## build the library of the ops for CPUs into custom_ops/, given a C++ compiler
	@$(ENVIRONMENT) $(VENV) runtime
	@$(BUILD_OPS) $(VENV) host

ops-cuda: ## build the library of the ops for NVIDIA GPUs into custom_ops/, with the system's nvcc or PyPI's
	@$(ENVIRONMENT) $(VENV) runtime
	@$(BUILD_OPS) $(VENV) cuda

test: ## install, and run the tests (CPU; no PyTorch; with a C++ compiler those of the compiled ops too)
	@$(ENVIRONMENT) $(VENV) dev
	@$(BUILD_OPS) $(VENV) host
	$(BIN)/python -m pytest $(ARGS)

lint: ## check style and format
	@$(ENVIRONMENT) $(VENV) dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: ## format the sources
	@$(ENVIRONMENT) $(VENV) dev
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

typecheck: ## check types
	@$(ENVIRONMENT) $(VENV) dev
	$(BIN)/mypy

oracle: ## compare live against Hugging Face transformers (Python 3.11, PyTorch; own environment)
	@PYTHON_VERSION=3.11 $(ENVIRONMENT) $(VENV)-oracle oracle
	$(VENV)-oracle/bin/python -m pytest -m oracle $(ARGS)

test-gpu: ## run the tests that need one NVIDIA GPU
	@$(ENVIRONMENT) $(VENV) test cuda
	@$(BUILD_OPS) $(VENV) cuda
	$(BIN)/python -m pytest -m gpu $(ARGS)

check-kernels: ## run the CUDA kernels without JAX over the tests' shapes, alone and under compute-sanitizer
	@$(ENVIRONMENT) $(VENV) runtime
	$(BIN)/python -m pip install --quiet --no-deps nvidia-cutlass==4.2.0.0
	cmake -S custom_ops/csrc -B build/driver -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DKOGPT_HOST=OFF -DKOGPT_CUDA=ON -DKOGPT_DRIVER=ON
	cmake --build build/driver --target ops_driver all_reduce_driver decode_steps_driver prefill_attention_driver gemm_driver
	build/driver/ops_driver check tests/op_shapes.txt
	build/driver/prefill_attention_driver check tests/prefill_attention_shapes.txt
	build/driver/all_reduce_driver check
	compute-sanitizer --tool memcheck --error-exitcode 1 build/driver/all_reduce_driver check
	compute-sanitizer --tool memcheck --error-exitcode 1 build/driver/decode_steps_driver $(SMALL_MODEL)
	compute-sanitizer --tool racecheck --error-exitcode 1 build/driver/decode_steps_driver $(SMALL_MODEL)
	compute-sanitizer --tool memcheck --error-exitcode 1 build/driver/decode_steps_driver 0 0 $(SMALL_MODEL)
	compute-sanitizer --tool memcheck --error-exitcode 1 build/driver/decode_steps_driver $(SMALL_INT8_MODEL) rows=1
	compute-sanitizer --tool memcheck --error-exitcode 1 build/driver/decode_steps_driver $(SMALL_INT8_MODEL) rows=40
	compute-sanitizer --tool racecheck --error-exitcode 1 build/driver/decode_steps_driver $(SMALL_INT8_MODEL) rows=1
	compute-sanitizer --tool racecheck --error-exitcode 1 build/driver/decode_steps_driver $(SMALL_INT8_MODEL) rows=40
	compute-sanitizer --tool memcheck --error-exitcode 1 build/driver/ops_driver check tests/op_shapes.txt
	compute-sanitizer --tool racecheck --error-exitcode 1 build/driver/ops_driver check tests/op_shapes.txt
	compute-sanitizer --tool memcheck --error-exitcode 1 build/driver/prefill_attention_driver check tests/prefill_attention_shapes.txt
	build/driver/gemm_driver check
	compute-sanitizer --tool memcheck --error-exitcode 1 build/driver/gemm_driver check
	compute-sanitizer --tool racecheck --error-exitcode 1 build/driver/gemm_driver check

test-multigpu: ## run the tests that need several NVIDIA GPUs
	@$(ENVIRONMENT) $(VENV) test cuda
	@$(BUILD_OPS) $(VENV) cuda
	$(BIN)/python -m pytest -m multigpu $(ARGS)

lock: ## write constraints/ anew for the interpreter PYTHON
	@sh scripts/lock.sh

clean: ## remove the environments and what tools left behind
	rm -rf $(VENV) $(VENV)-oracle build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis custom_ops/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
