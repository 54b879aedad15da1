# Every command of this repository. `make` alone prints them.
# A target that needs packages sets them up first, once, in .venv.

override PYTHON := $(or $(strip $(value PYTHON)),python3)
ARGS ?=
# Names go by the environment, as they were typed: what is in them is read by no make and no shell.
override IMAGE := $(value IMAGE)
override CHECKPOINT := $(value CHECKPOINT)
override A := $(value A)
override B := $(value B)
# Of the exercises; an N that is left over in the environment is none.
override N := $(if $(filter command,$(firstword $(origin N))),$(value N))
override WORKSPACE := $(if $(filter command,$(firstword $(origin WORKSPACE))),$(value WORKSPACE))
LEARNER = $(if $(N),"$$N") $(if $(WORKSPACE),--workspace "$$WORKSPACE")
export PYTHON IMAGE CHECKPOINT A B N WORKSPACE
ifneq ($(value DATA_DIR),)
override DATA_DIR := $(value DATA_DIR)
export DATA_DIR
endif
# How many devices, on how many machines, and where these meet: DEVICES=2 NODES=2 RDZV=10.0.0.1:29400
DEVICES ?=
NODES ?=
RDZV ?=
override DEVICES := $(value DEVICES)
override NODES := $(value NODES)
override RDZV := $(value RDZV)
SHELLS := ` $$ " ' ; & | < > ( ) { } [ ] * ? ! ~ \ \#
ifneq ($(strip $(foreach each,$(SHELLS),$(findstring $(each),$(DEVICES)$(NODES)$(RDZV)))),)
$(error DEVICES and NODES are numbers, and RDZV is HOST:PORT, such as RDZV=10.0.0.1:29400)
endif
MACHINES = $(DEVICES:%=--devices %) $(NODES:%=--num-nodes %) $(RDZV:%=--rdzv-endpoint %)
BIN := .venv/bin
# Tests run in as many processes as there are cores; those of a file in one, which share trainings.
WORKERS := -n auto --maxprocesses 4 --dist loadfile
# CPU_ONLY=1 sets up PyTorch without CUDA, from PyTorch's own index, which uv knows. There its two
# packages have other hashes than in the lock: they are taken by their version alone.
CPU_ONLY ?=
# The lessons, in the order in which they are learned; one that is new comes last.
FILES := $(basename $(notdir $(wildcard plain/*.py)))
ORDER := cifar fashion callbacks when resume optimize gan tokens parallel fabric predict speed finetune
LESSONS := $(strip $(filter $(FILES),$(ORDER)) $(filter-out $(ORDER),$(FILES)))
# uv must take the Python of this machine, never fetch one of its own.
export UV_PYTHON_DOWNLOADS := never
# What is started here ends with make, also where that is killed (common/signals.py).
export ENDS_WITH := make

# What cannot be meant as it was typed is refused before anything is set up.
NAMED := $(filter plain-% lightning-% parity-% diff-%,$(MAKECMDGOALS))
UNKNOWN := $(filter-out $(foreach side,plain lightning parity diff,$(LESSONS:%=$(side)-%)),$(NAMED))
ifneq ($(UNKNOWN),)
$(error there is no lesson for '$(UNKNOWN)'; there are: $(LESSONS))
endif
# `make plain cifar`, `make cifar`, `make cifar-plain`: the words in it say what was meant.
WORDS := $(subst -, ,$(subst _, ,$(MAKECMDGOALS)))
SIDE := $(or $(filter plain lightning parity diff,$(WORDS)),plain lightning parity diff)
LESSON := $(or $(filter $(LESSONS),$(WORDS)),$(if $(filter plain lightning diff,$(WORDS)),cifar))
MEANT := $(foreach lesson,$(LESSON),$(foreach side,$(SIDE),'make $(side)-$(lesson)'))
UNCLEAR = there is no command 'make $(MAKECMDGOALS)'$(if $(MEANT),; did you mean $(MEANT)?,.) `make` alone prints all commands
ifneq ($(filter plain lightning diff common docs tests $(filter-out predict,$(LESSONS)),$(MAKECMDGOALS)),)
$(error $(UNCLEAR))
endif
# A variable that nothing reads would be passed over in silence.
OPTIONS := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
OPTIONS := $(filter lr epochs max_epochs batch_size seed data args LR EPOCHS MAX_EPOCHS BATCH_SIZE SEED DATA,$(OPTIONS))
ifneq ($(OPTIONS),)
$(error '$(OPTIONS)' is no variable of make here; options go into ARGS: make plain-cifar ARGS="--max-epochs 5 --lr 0.01")
endif

.DEFAULT_GOAL := help
.DEFAULT:
	$(error $(UNCLEAR))
.PHONY: help setup quick trainer-fabric parity moments doctor controls cases page notebooks pitfalls ledger coverage hooks overview bench bench-speed bench-parallel bench-trace bench-evidence bench-startup order predict exercise check hint solution test test-slow lint format lock clean FORCE

help: # print the commands, in groups
	@echo "usage: make COMMAND [ARGS=\"--max-epochs 5\"]    NAME is a lesson:"
	@echo "  $(LESSONS)"
	@awk -F ':.*## ' '/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z%-]+:.*## / { sub(/%/, "NAME", $$1); printf "  make %-16s %s\n", $$1, $$2 }' Makefile

##@ Start
quick: .venv/ready ## both sides of cifar on drawn shapes, and the proof: under a minute
	@$(BIN)/python -m common.proof.parity cifar --data shapes --max-epochs 1 --batch-size 32 --lr 0.02 \
		--limit-train-batches 600 --runs-dir runs/quick $(ARGS)

setup: .venv/ready ## set up .venv; CPU_ONLY=1: without CUDA. All other commands do it by themselves

##@ Lessons
plain-%: .venv/ready FORCE ## train NAME with the loop written by hand; ARGS="--help" lists its options
	@$(BIN)/python plain/$*.py $(MACHINES) $(ARGS)

lightning-%: .venv/ready FORCE ## train NAME with Lightning's Trainer; the same options
	@$(BIN)/python lightning/$*.py $(MACHINES) $(ARGS)

trainer-fabric: .venv/ready FORCE ## train fabric on its third rung, the Trainer
	@$(BIN)/python lightning/fabric_trainer.py $(MACHINES) $(ARGS)

diff-%: .venv/ready FORCE ## show both sides of NAME side by side; ARGS='--cell "Training"' one cell of them
	@$(BIN)/python -m common.proof.sidebyside $* $(ARGS)

predict: .venv/ready ## classify a picture: make predict CHECKPOINT=runs/cifar/plain/weights.pt IMAGE=photo.jpg
	@test -n "$$CHECKPOINT" && test -n "$$IMAGE" || { \
		echo "error: predict needs both names: make predict CHECKPOINT=runs/cifar/plain/weights.pt IMAGE=photo.jpg" >&2; exit 2; }
	@$(BIN)/python -m common.predict -- "$$CHECKPOINT" "$$IMAGE"

##@ Practise
exercise: .venv/ready ## list the exercises; N=07 begins one; WATCH=1 checks at each save
	@$(BIN)/python -m common.exercises $(if $(WATCH),watch,$(if $(N),start,list)) $(LEARNER)

check: .venv/ready ## check an exercise beside its twin: make check N=07; ALL=1: all begun ones; JSON=1
	@$(BIN)/python -m common.exercises check $(LEARNER) $(if $(ALL),--all) $(if $(JSON),--json)

hint: .venv/ready ## show a hint for an exercise, and the next one when asked again: make hint N=07
	@$(BIN)/python -m common.exercises hint $(LEARNER)

solution: .venv/ready ## show the solution of an exercise that is solved, or when asked twice
	@$(BIN)/python -m common.exercises solution $(LEARNER)

##@ Prove
parity-%: .venv/ready FORCE ## prove that both sides of NAME do the same; the same options
	@$(BIN)/python -m common.proof.parity $* $(MACHINES) $(ARGS)

parity-parallel: .venv/ready FORCE # also one process against several, and FSDP against DDP
	@$(BIN)/python -m common.proof.devices $(MACHINES) $(ARGS)

parity: .venv/ready ## prove it for every lesson, and print one table; only options that all have
	@$(BIN)/python -m common.proof.parity $(ARGS)

order: .venv/ready ## record the order of one optimizer step on both sides of optimize, and compare
	@$(BIN)/python -m common.proof.order $(ARGS)

moments: .venv/ready ## record when both sides of when validate, look, save and end; write docs/when.md
	@$(BIN)/python -m common.proof.moments

##@ Doctor
doctor: .venv/ready ## name the first difference of two traced runs: make doctor A=loop.trace B=port.trace
	@test -n "$$A" && test -n "$$B" || { \
		echo "error: doctor needs two traces: make doctor A=loop.trace B=port.trace; docs/doctor.md says how to make them" >&2; exit 2; }
	@$(BIN)/python -m samebits -- "$$A" "$$B"

controls: .venv/ready ## try the doctor on single changes and on equal runs; write the tables of docs/doctor.md
	@$(BIN)/python tests/controls.py

cases: .venv/ready ## try the doctor on mistakes from public reports; write their table in docs/doctor.md
	@$(BIN)/python tests/case_table.py

##@ Measure
bench: .venv/ready ## measure what the Trainer costs in a step, and what a loop can waste; ten minutes
	@$(BIN)/python -m bench.overhead $(ARGS)

bench-speed: .venv/ready ## hold speed against cifar for five seeds, and measure what each of its means gives
	@$(BIN)/python -m bench.seeds $(ARGS)

bench-parallel: .venv/ready ## measure the steps of 1, 2 and 4 processes, and draw them
	@$(BIN)/python -m bench.parallel $(ARGS)

bench-trace: .venv/ready ## measure what a trace costs
	@$(BIN)/python -m bench.trace $(ARGS)

bench-evidence: .venv/ready ## measure what it costs that a run is watched
	@$(BIN)/python -m bench.evidence $(ARGS)

bench-startup: .venv/ready ## measure what a whole command takes beside the import of its library
	@$(BIN)/python -m bench.startup $(ARGS)

##@ Pages
page: .venv/ready ## build the website into site/: both sides of each lesson, aligned; slides; the ledger
	@$(BIN)/python -m docs.page.build $(ARGS)

notebooks: .venv/ready ## write docs/notebooks/ anew, from the scripts' own cells
	@$(BIN)/python -m docs.page.notebooks

ledger: .venv/ready ## write docs/ledger.md anew: the line numbers of what the Trainer does
	@$(BIN)/python -m common.proof.ledger

coverage: .venv/ready ## write docs/coverage.md anew: what of Lightning the lessons use, and what not
	@$(BIN)/python -m common.proof.coverage

hooks: .venv/ready ## write docs/hooks.md anew: each hook of one fit beside the plain lines
	@$(BIN)/python -m common.proof.hooks $(ARGS)

overview: .venv/ready ## draw the README's picture from the last make parity-cifar
	@$(BIN)/python -m common.proof.overview

pitfalls: .venv/ready ## run the code of docs/pitfalls.md, sameness.md and tuning.md, and write its numbers anew
	@$(BIN)/python tests/pages.py

##@ Test and change it
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

clean: ## remove .venv and what the tools left; runs/ and data/ stay
	rm -rf .venv .venv.* .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

# What is installed is compared with the lock, not its time: a change of branch writes it anew.
INSTALLED := cmp -s requirements.lock .venv/lock.installed && $(BIN)/python -c '' 2>/dev/null
# `ready` is written last, so that an interrupted set-up begins again. The new .venv is built beside
# the one that is there and takes its place when it is whole: without a network, nothing is lost.
# Hence relocatable: the programs in it find its Python by their own place.
.venv/ready: requirements.lock
	@$(INSTALLED) || command -v "$$PYTHON" >/dev/null || { \
		echo "error: there is no '$$PYTHON' on this machine; install Python 3.11 to 3.15, or name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(INSTALLED) || "$$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 16))' || { \
		echo "error: '$$PYTHON' is $$("$$PYTHON" -V 2>&1), but PyTorch and this code need 3.11 to 3.15; install one of these, or name it: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(INSTALLED) || command -v uv >/dev/null || "$$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: '$$PYTHON' lacks its modules venv and ensurepip; install them (Debian, Ubuntu: apt install python3-venv)." >&2; exit 2; }
	@$(INSTALLED) || echo "Setting up .venv, once. It takes some minutes$(if $(CPU_ONLY),.,; on Linux 6 GB for PyTorch with CUDA (make setup CPU_ONLY=1 leaves CUDA out).)"
# What a killed set-up left is removed, or put back. Without uv on the path, pip fetches the one that
# the lock names, by its hash. On a terminal uv shows how far it is.
# Only samebits is installed. `common` is found by the path: its name is too common for others.
	@$(INSTALLED) || { \
		for left in .venv.new.* .venv.uv.* .venv.old.*; do \
			kill -0 "$${left##*.}" 2>/dev/null && continue; \
			case $$left in .venv.old.*) test -e .venv || ! test -e "$$left" || mv "$$left" .venv;; esac; \
			rm -rf "$$left"; done; \
		new=.venv.new.$$$$ old=.venv.old.$$$$ uv=$$(command -v uv || echo .venv.uv.$$$$/bin/uv); \
		{ command -v uv >/dev/null || { \
			"$$PYTHON" -m venv .venv.uv.$$$$ && \
			sed -n '/^uv==/,/# via/p' requirements.lock >.venv.uv.$$$$/uv.txt && \
			.venv.uv.$$$$/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv.uv.$$$$/uv.txt; }; } && \
		$$uv venv --quiet --relocatable --python "$$PYTHON" $$new && \
		awk '/^[a-z]/ { skip = "$(CPU_ONLY)" && /^(nvidia-|cuda-|triton==|torch==|torchvision==)/ } !skip' \
			requirements.lock >$$new/lock && \
		$$uv pip sync $$(test -t 2 || echo --quiet) --python $$new/bin/python --require-hashes $$new/lock && \
		{ test -z "$(CPU_ONLY)" || $$uv pip install $$(test -t 2 || echo --quiet) --python $$new/bin/python --no-deps \
			--torch-backend cpu $$(sed -nE 's/^(torch(vision)?==[0-9.]+).*/\1/p' requirements.lock); } && \
		$$uv pip install --quiet --python $$new/bin/python --no-deps --no-build-isolation --editable . && \
		pwd >"$$($$new/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/repository.pth" && \
		cp requirements.lock $$new/lock.installed && touch $$new/ready && \
		{ ! test -e .venv || mv .venv $$old; } && mv $$new .venv; status=$$?; \
		test -e .venv || ! test -e $$old || mv $$old .venv; \
		rm -rf $$new $$old .venv.uv.$$$$; \
		test $$status = 0 || { \
			echo "error: .venv was not set up, for the reason above; what was there is as it was." >&2; exit 2; }; }
	@touch $@
