# Every command of this repository. `make` alone prints them.
# A target that needs packages sets them up first, once, in .venv.

PYTHON ?= python3
ARGS ?=
# How many devices, on how many machines, and where these meet: DEVICES=2 NODES=2 RDZV=10.0.0.1:29400
DEVICES ?=
NODES ?=
RDZV ?=
MACHINES = $(DEVICES:%=--devices %) $(NODES:%=--num-nodes %) $(RDZV:%=--rdzv-endpoint %)
BIN := .venv/bin
# Tests run in as many processes as there are cores; those of a file in one, which share trainings.
WORKERS := -n auto --maxprocesses 4 --dist loadfile
LESSONS := $(basename $(notdir $(wildcard plain/*.py)))
# uv must take the Python of this machine, never fetch one of its own.
export UV_PYTHON_DOWNLOADS := never

# The name of a lesson that is not there is refused before anything is set up.
NAMED := $(filter plain-% lightning-% parity-% diff-%,$(MAKECMDGOALS))
UNKNOWN := $(filter-out $(foreach side,plain lightning parity diff,$(LESSONS:%=$(side)-%)),$(NAMED))
ifneq ($(UNKNOWN),)
$(error there is no lesson for '$(UNKNOWN)'; there are: $(LESSONS))
endif

.DEFAULT_GOAL := help
.PHONY: help setup parity doctor controls cases pitfalls ledger bench bench-speed bench-parallel bench-trace bench-evidence bench-startup order predict test test-slow lint format lock clean FORCE

help: ## print these lines
	@echo "usage: make TARGET [ARGS=\"--max-epochs 5\"]"
	@awk -F ':.*## ' -v lessons="$(LESSONS)" ' \
		/^[a-z%-]+:.*## / { \
			if ($$1 !~ /%/) { printf "  make %-20s %s\n", $$1, $$2; next } \
			n = split(lessons, names, " "); \
			for (i = 1; i <= n; i++) { \
				target = $$1; text = $$2; gsub(/%/, names[i], target); gsub(/NAME/, names[i], text); \
				printf "  make %-20s %s\n", target, text } }' Makefile

plain-%: .venv/ready FORCE ## train NAME with the loop written by hand; ARGS="--help" lists its options
	@$(BIN)/python plain/$*.py $(MACHINES) $(ARGS)

lightning-%: .venv/ready FORCE ## train NAME with Lightning's Trainer; the same options
	@$(BIN)/python lightning/$*.py $(MACHINES) $(ARGS)

parity-%: .venv/ready FORCE ## prove that both sides of NAME do the same; the same options
	@$(BIN)/python -m common.proof.parity $* $(MACHINES) $(ARGS)

parity-parallel: .venv/ready FORCE # also one process against several, and FSDP against DDP
	@$(BIN)/python -m common.proof.devices $(MACHINES) $(ARGS)

bench-parallel: .venv/ready ## measure the steps of 1, 2 and 4 processes, and draw them
	@$(BIN)/python -m bench.parallel $(ARGS)

bench: .venv/ready ## measure what the Trainer costs in a step, and what a loop can waste; ten minutes
	@$(BIN)/python -m bench.overhead $(ARGS)

bench-speed: .venv/ready ## hold speed against cifar for five seeds, and measure what each of its means gives
	@$(BIN)/python -m bench.seeds $(ARGS)

bench-trace: .venv/ready ## measure what a trace costs
	@$(BIN)/python -m bench.trace $(ARGS)

bench-evidence: .venv/ready ## measure what it costs that a run is watched
	@$(BIN)/python -m bench.evidence $(ARGS)

bench-startup: .venv/ready ## measure what a whole command takes beside the import of its library
	@$(BIN)/python -m bench.startup $(ARGS)

parity: .venv/ready ## prove it for every lesson, and print one table; only options that all have
	@$(BIN)/python -m common.proof.parity $(ARGS)

doctor: .venv/ready ## name the first difference of two traced runs: make doctor A=loop.trace B=port.trace
	@test -n "$(A)" && test -n "$(B)" || { \
		echo "error: doctor needs two traces: make doctor A=loop.trace B=port.trace; docs/doctor.md says how to make them" >&2; exit 2; }
	@$(BIN)/python -m samebits "$(A)" "$(B)"

controls: .venv/ready ## try the doctor on single changes and on equal runs; write the tables of docs/doctor.md
	@$(BIN)/python tests/controls.py

cases: .venv/ready ## try the doctor on mistakes from public reports; write their table in docs/doctor.md
	@$(BIN)/python tests/case_table.py

pitfalls: .venv/ready ## run the code of docs/pitfalls.md and docs/sameness.md, and write its numbers anew
	@$(BIN)/python tests/pages.py

ledger: .venv/ready ## write docs/ledger.md anew: the line numbers of what the Trainer does
	@$(BIN)/python -m common.proof.ledger

diff-%: .venv/ready FORCE ## show both sides of NAME side by side; ARGS='--cell "Training"' one cell of them
	@$(BIN)/python -m common.proof.sidebyside $* $(ARGS)

order: .venv/ready ## record the order of one optimizer step on both sides of optimize, and compare
	@$(BIN)/python -m common.proof.order $(ARGS)

predict: .venv/ready ## classify a picture: make predict CHECKPOINT=runs/cifar/plain/weights.pt IMAGE=photo.jpg
	@test -n "$(CHECKPOINT)" && test -n "$(IMAGE)" || { \
		echo "error: predict needs both names: make predict CHECKPOINT=runs/cifar/plain/weights.pt IMAGE=photo.jpg" >&2; exit 2; }
	@$(BIN)/python -m common.predict "$(CHECKPOINT)" "$(IMAGE)"

test: .venv/ready ## run the tests (without network; with the real images where DATA_DIR names them)
	@$(BIN)/python -m pytest $(WORKERS) $(ARGS)

test-slow: .venv/ready ## run also the tests that take long
	@$(BIN)/python -m pytest $(WORKERS) -m "slow or not slow" $(ARGS)

lint: .venv/ready ## check format, rules and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: .venv/ready ## put the code into ruff's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: .venv/ready ## write requirements.lock anew from pyproject.toml, for every platform
	@$(BIN)/uv pip compile --quiet --universal --generate-hashes --all-extras --upgrade \
		--python-version 3.11 --custom-compile-command "make lock" \
		--output-file .venv/lock pyproject.toml
	@cmp -s .venv/lock requirements.lock || mv .venv/lock requirements.lock

setup: .venv/ready ## set up .venv; the others do it by themselves

clean: ## remove .venv and what the tools left; runs/ and data/ stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

# `ready` is written last, so that an interrupted set-up begins again.
.venv/ready: requirements.lock
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: there is no '$(PYTHON)' on this machine; install Python 3.11 to 3.15, or name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 16))' || { \
		echo "error: '$(PYTHON)' is $$($(PYTHON) -V 2>&1), but PyTorch and this code need 3.11 to 3.15; install one of these, or name it: make PYTHON=python3.12 ..." >&2; exit 2; }
	@command -v uv >/dev/null || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: '$(PYTHON)' lacks its modules venv and ensurepip; install them (Debian, Ubuntu: apt install python3-venv)." >&2; exit 2; }
	@echo "Setting up .venv, once. It takes some minutes, and on Linux 6 GB for PyTorch with CUDA."
	@rm -rf .venv
# Without uv on the path, pip fetches the one that the lock names, by its hash.
	@if command -v uv >/dev/null; then uv venv --quiet --python $(PYTHON) .venv; else \
		$(PYTHON) -m venv .venv && sed -n '/^uv==/,/# via/p' requirements.lock >.venv/uv.txt && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt; fi
# On a terminal uv shows how far it is.
	@uv=$$(command -v uv || echo $(BIN)/uv) && \
		$$uv pip sync $$(test -t 2 || echo --quiet) --python $(BIN)/python --require-hashes requirements.lock && \
		$$uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
# Only samebits is installed. `common` is found by the path: its name is too common for others.
	@pwd >"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/repository.pth"
	@touch $@
