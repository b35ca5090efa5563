# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Bytecode is written when a module is first imported: most of torch's, Ray's and transformers' never are.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-quick check docs benchmarks gpu-check tiny-model clean

demo: $(VENV)/.installed
	$(BIN)/shoal demo

# Threads that wait must not spin: the processes share the cores.
TEST_PROCESSES ?= 2
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -q -n $(TEST_PROCESSES) --dist loadscope

test: $(VENV)/.installed-test
	$(MAKE) --no-print-directory check

# Three minutes on two quiet cores: what neither starts Ray nor takes long.
test-quick: $(VENV)/.installed-test
	$(PYTEST) -m 'not (gpu or ray or slow or docs)'

check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) --durations=15

# The bundled model from nothing: 90 minutes of training on two cores; an interrupted run goes on where it was.
TINY := examples/tiny_model
TINY_RUN := build/tiny-model
TINY_MODEL := shoal/bundled/shoal-tiny
tiny-model: $(VENV)/.installed
	$(BIN)/python $(TINY)/train.py --output $(TINY_RUN)
	$(BIN)/python $(TINY)/held_out.py shoal/bundled/eval.jsonl
	$(BIN)/python $(TINY)/export.py $(TINY_RUN)/state.pt $(TINY_MODEL)
	$(BIN)/python $(TINY)/evaluate.py $(TINY_MODEL) --output $(TINY_RUN)/evaluation.json
	$(BIN)/shoal eval -dp 2 --output $(TINY_RUN)/scores.json
	$(BIN)/python $(TINY)/model_card.py --model $(TINY_MODEL) --log $(TINY_RUN)/log.jsonl \
	    --scores $(TINY_RUN)/scores.json --evaluation $(TINY_RUN)/evaluation.json \
	    --results benchmarks/results/tiny-model.json

# Cost against context length, batch and ranks; an interrupted run goes on where it was. `make benchmarks AGAIN=1`
# measures all points anew, CURVES=ranks one curve.
CURVES ?= context,batch,ranks
benchmarks: $(VENV)/.installed-bench
	PYTHONPATH=.src $(BIN)/python benchmarks/scaling.py --curves $(CURVES) $(if $(AGAIN),--again) --output benchmarks/results/scaling.json

# What only a GPU can show, from a bare checkout: nothing is installed.
gpu-check:
	PYTHONPATH=.src $(PYTHON) benchmarks/gpu_check.py

# Tables in docs/ are written by the tests that prove them.
docs: $(VENV)/.installed-test
	SHOAL_WRITE_DOCS=1 $(BIN)/pytest -q -m docs

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Shoal needs Python 3.11 or newer; call make with PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(INSTALL) -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-output
