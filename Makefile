# `make demo` and `make test` do everything on a fresh Linux machine with Python 3.11 or newer; `make help` lists the rest.
# scripts/environment.sh says what PYTHON and CUDA take.

export PYTHON CUDA
VENV ?= .venv
PROMPT ?= 이 영화를 처음 봤을 때는
SAMPLING ?= --temperature 0.6 --top-p 0.9 --seed 8
# More arguments for pytest: make test ARGS="-k tokenizer -x"
ARGS ?=

BIN := $(VENV)/bin
ENVIRONMENT := sh scripts/environment.sh

.DEFAULT_GOAL := help
.PHONY: help demo test lint typecheck oracle test-gpu test-multigpu lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 20

demo: ## install, and stream Korean text from the shipped model on whatever device there is
	@$(ENVIRONMENT) $(VENV) runtime cuda
	$(BIN)/kogpt generate --model demo --prompt "$(PROMPT)" $(SAMPLING) --echo --stream --stats

test: ## install, and run the tests (CPU; no PyTorch, no compiler)
	@$(ENVIRONMENT) $(VENV) dev
	$(BIN)/python -m pytest $(ARGS)

lint: ## check style and format
	@$(ENVIRONMENT) $(VENV) dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: ## check types
	@$(ENVIRONMENT) $(VENV) dev
	$(BIN)/mypy

oracle: ## compare live against Hugging Face transformers (Python 3.11, PyTorch; own environment)
	@PYTHON_VERSION=3.11 $(ENVIRONMENT) $(VENV)-oracle oracle
	$(VENV)-oracle/bin/python -m pytest -m oracle $(ARGS)

test-gpu: ## run the tests that need one NVIDIA GPU
	@$(ENVIRONMENT) $(VENV) test cuda
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-multigpu: ## run the tests that need several NVIDIA GPUs
	@$(ENVIRONMENT) $(VENV) test cuda
	$(BIN)/python -m pytest -m multigpu $(ARGS)

lock: ## write constraints/ anew for the interpreter PYTHON
	@sh scripts/lock.sh

clean: ## remove the environments and what tools left behind
	rm -rf $(VENV) $(VENV)-oracle build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
