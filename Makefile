# What a person can do here. `make` alone lists it.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# With ARGS="-k name" one half of the suite may have no such test: pytest's exit code 5.
NONE_IS_FINE = $(if $(ARGS),|| [ $$? -eq 5 ])

WITH_PROCESSES := tests/deploy tests/keygen tests/sandbox

.DEFAULT_GOAL := help
.PHONY: help install demo test test-whole test-parts check check-code check-core check-processes fmt up down bench load faults soak docs clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

$(STAMP): requirements.txt pyproject.toml deploy/find_python.sh deploy/python_speed.py
	@PYTHON="$(PYTHON)" sh deploy/find_python.sh $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

install: $(STAMP) ## make .venv with all that the project needs

demo: $(STAMP) ## start a cluster, replay 6,919 real purchases, verify, stop (ARGS="--count 500 --keep")
	$(BIN)/oncepay demo $(ARGS)

test: $(STAMP) check ## the whole test suite, on real Postgres, etcd and Patroni (ARGS="-k name")
	@$(MAKE) --no-print-directory -j2 test-whole test-parts

# Side by side, since both wait more than they work: tests that share a whole cluster, and those that start the parts they need.
# The latter's output comes when they have ended.
test-whole: $(STAMP)
	$(BIN)/python -m pytest -q -m "cluster and whole and not faults" $(ARGS) $(NONE_IS_FINE)

test-parts: $(STAMP)
	@mkdir -p build
	@$(BIN)/python -m pytest -q -m "cluster and not whole and not faults" $(ARGS) >build/test-parts.log 2>&1; code=$$?; \
		cat build/test-parts.log; [ $$code -eq 0 ] $(if $(ARGS),|| [ $$code -eq 5 ])

check: $(STAMP) ## the fast part: lint, types, import rules, tests that need no cluster
	@$(MAKE) --no-print-directory -j3 --output-sync=target check-core check-code check-processes

check-code: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

# Side by side: tests that start processes and wait for them, and all others.
check-processes: $(STAMP)
	$(BIN)/python -m pytest -q -m "not cluster and not faults" $(WITH_PROCESSES) $(ARGS) $(NONE_IS_FINE)

check-core: $(STAMP)
	$(BIN)/python -m pytest -q -m "not cluster and not faults" $(WITH_PROCESSES:%=--ignore=%) $(ARGS) $(NONE_IS_FINE)

fmt: $(STAMP) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

up: $(STAMP) ## start the local cluster
	$(BIN)/oncepay up $(ARGS)

down: $(STAMP) ## stop the local cluster (ARGS=--purge deletes its data)
	$(BIN)/oncepay down $(ARGS)

bench: $(STAMP) ## the benchmarks; results go to docs/benchmarks.md
	$(BIN)/python -m loadtest.bench $(ARGS)

load: $(STAMP) ## locust for a minute against the local cluster (WEB=1 opens its page)
	$(BIN)/python -m loadtest.load $(if $(WEB),--web) $(ARGS)

faults: $(STAMP) ## the fault tests, all of them
	$(BIN)/python -m pytest -q -m faults $(ARGS) $(NONE_IS_FINE)
	$(BIN)/python -m pytest -q -m "cluster and not faults" tests/faults $(ARGS) $(NONE_IS_FINE)

soak: $(STAMP) ## replay the purchases again and again with faults, for an hour (ARGS="--minutes 10")
	$(BIN)/python -m loadtest.soak $(ARGS)

docs: $(STAMP) ## write the generated pages of docs/
	$(BIN)/python -m cli.docs $(ARGS)

clean: ## delete .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
