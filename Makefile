# Everything runs in VENV, which the first target that needs it creates.
# Any recipe field is an override: make train model.moe.top_k=4 optim.lr=0.01

RECIPE = recipes/mixtral.yaml
PROMPT = The
PORT = 6006
TO = hf
PYTHON ?= python3
TORCH_ARGS ?=
VENV = .venv

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NANO := $(BIN)/python -m nano_moe
# A file's tests stay in one process, for the fixtures they share; one thread for each process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
TORCH := torch==2.13.0
CPU_WHEELS := https://download.pytorch.org/whl/cpu

# What was given on make's command line and is no variable of this file goes to the recipe.
# (make takes `a.b=c` as a variable of its own, so a plain target would silently drop it.)
OWN := RECIPE RUN RUNS TO OUT QUANT FROM CONTEXT STUDY TIER DENSE SPARSE STEP_RATIO NAME PROMPT PORT PYTHON TORCH_ARGS VENV ARGS MINUTES LITGPT_PYTHON
# Only the command line counts: a NAME or PORT of the shell's environment is not meant for us.
given = $(if $(filter command,$(firstword $(origin $(1)))),$($(1)))
quote = '$(subst ','\'',$(1))'
OVERRIDES = $(foreach v,$(filter-out $(OWN) -%- MAKE%,$(.VARIABLES)),\
	$(if $(filter command,$(firstword $(origin $(v)))),$(call quote,$(v)=$(value $(v)))))
needs = $(if $(call given,$(1)),,$(error $(1) is missing: make $@ $(1)=…))
# Each target names what it takes (fields: a recipe's); anything else that was given stops it.
takes = $(if $(strip $(call surplus,$(1))),$(error make $@ does not take $(strip $(call surplus,$(1)))))
surplus = $(foreach v,$(filter-out $(1) PYTHON TORCH_ARGS VENV,$(OWN)),$(if $(call given,$(v)),$(v))) \
	$(if $(filter fields,$(1)),,$(OVERRIDES))

.DEFAULT_GOAL := help
.PHONY: help setup train resume eval sample count show compare break-even reproduce verify report \
	export import tasks explore report-html prepare tensorboard test test-all test-faults soak bench lint types format

help: ## list the targets
	$(call takes,RECIPE)@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14
	@printf '\nRECIPE=%s  any field as KEY=VALUE: make train RECIPE=recipes/dense.yaml optim.lr=0.01\n' $(call quote,$(RECIPE))

setup: $(STAMP) ## make .venv with all that training and `make test` need
	$(call takes)

train: $(STAMP) ## train RECIPE into checkpoints/ (NAME=… to name the run)
	$(call takes,RECIPE NAME ARGS fields)@$(NANO) train $(call quote,$(RECIPE)) $(OVERRIDES) $(if $(call given,NAME),--name $(call quote,$(NAME))) $(call given,ARGS)

resume: $(STAMP) ## go on with a stopped RUN, exactly where it was, or train an imported one (trainer.devices=4: on other processes)
	$(call takes,RUN ARGS fields)$(call needs,RUN)@$(NANO) resume $(call quote,$(RUN)) $(OVERRIDES) $(call given,ARGS)

eval: $(STAMP) ## score RUN on the whole validation split (ARGS=--quant-experts: in int8 and int4, too)
	$(call takes,RUN ARGS)$(call needs,RUN)@$(NANO) eval $(call quote,$(RUN)) $(call given,ARGS)

sample: $(STAMP) ## continue PROMPT with RUN
	$(call takes,RUN PROMPT ARGS)$(call needs,RUN)@$(NANO) sample $(call quote,$(RUN)) --prompt $(call quote,$(PROMPT)) $(call given,ARGS)

tasks: $(STAMP) ## score RUN on small tasks of the validation text (OUT=… for lm-evaluation-harness)
	$(call takes,RUN OUT ARGS)$(call needs,RUN)@$(NANO) eval $(call quote,$(RUN)) --tasks \
		$(if $(call given,OUT),--out $(call quote,$(OUT))) $(call given,ARGS)

export: $(STAMP) ## RUN as the Hugging Face folder OUT; TO=gguf (QUANT=q8_0 …): as a file of llama.cpp
	$(call takes,RUN OUT TO QUANT ARGS)$(call needs,RUN)$(call needs,OUT)@$(NANO) export $(call quote,$(RUN)) --to $(call quote,$(TO)) \
		$(call quote,$(OUT)) $(if $(call given,QUANT),--quant $(call quote,$(QUANT))) $(call given,ARGS)

import: $(STAMP) ## the Hugging Face folder FROM as a run (NAME=…, CONTEXT=…; RECIPE=… for text of a foreign one)
	$(call takes,FROM NAME RECIPE CONTEXT ARGS)$(call needs,FROM)@$(NANO) import $(call quote,$(FROM)) $(if $(call given,NAME),--name $(call quote,$(NAME))) \
		$(if $(call given,RECIPE),--recipe $(call quote,$(RECIPE))) \
		$(if $(call given,CONTEXT),--context $(call quote,$(CONTEXT))) $(call given,ARGS)

compare: $(STAMP) ## RUNS="a b" side by side at equal tokens, FLOPs and seconds
	$(call takes,RUNS ARGS)$(call needs,RUNS)@$(NANO) compare $(foreach r,$(RUNS),$(call quote,$(r))) $(call given,ARGS)

break-even: $(STAMP) ## what SPARSE="a b" need of the tokens of DENSE="c d" (STEP_RATIO=… for time)
	$(call takes,DENSE SPARSE STEP_RATIO ARGS)$(call needs,DENSE)$(call needs,SPARSE)@$(NANO) break-even --dense $(foreach r,$(DENSE),$(call quote,$(r))) \
		--sparse $(foreach r,$(SPARSE),$(call quote,$(r))) $(if $(call given,STEP_RATIO),--step-ratio $(call quote,$(STEP_RATIO))) $(call given,ARGS)

explore: $(STAMP) ## see RUN, or RUNS="a b" side by side, at work in a browser (PORT=…)
	$(call takes,RUN RUNS PORT ARGS)$(call needs,$(if $(call given,RUNS),RUNS,RUN))@$(NANO) explore $(foreach r,$(call given,RUNS) $(call given,RUN),$(call quote,$(r))) \
		$(if $(call given,PORT),--port $(call quote,$(PORT))) $(call given,ARGS)

report-html: $(STAMP) ## the same page as one file: RUN or RUNS, OUT=file.html
	$(call takes,RUN RUNS OUT ARGS)$(call needs,OUT)$(call needs,$(if $(call given,RUNS),RUNS,RUN))@$(NANO) report-html --out $(call quote,$(OUT)) \
		$(foreach r,$(call given,RUNS) $(call given,RUN),$(call quote,$(r))) $(call given,ARGS)

reproduce: $(STAMP) ## run STUDY=name, or every study; goes on where it stopped (TIER=smoke: in seconds, gpu: larger)
	$(call takes,STUDY TIER ARGS)@$(NANO) study run $(foreach s,$(call given,STUDY),$(call quote,$(s))) \
		$(if $(call given,TIER),--tier $(call quote,$(TIER))) $(call given,ARGS)

verify: $(STAMP) ## train a run of STUDY again, drawn at random, and compare
	$(call takes,STUDY ARGS)@$(NANO) study verify $(foreach s,$(call given,STUDY),$(call quote,$(s))) $(call given,ARGS)

report: $(STAMP) ## rebuild figures, RESULTS.md and the README's verdicts from finished studies
	$(call takes,ARGS)@$(NANO) study report $(call given,ARGS)

count: $(STAMP) ## parameters, FLOPs and bytes of RECIPE
	$(call takes,RECIPE ARGS fields)@$(NANO) count $(call quote,$(RECIPE)) $(OVERRIDES) $(call given,ARGS)

show: $(STAMP) ## the resolved RECIPE
	$(call takes,RECIPE fields)@$(NANO) show $(call quote,$(RECIPE)) $(OVERRIDES)

prepare: $(STAMP) ## tokenize RECIPE's text once
	$(call takes,RECIPE ARGS fields)@$(NANO) prepare $(call quote,$(RECIPE)) $(OVERRIDES) $(call given,ARGS)

tensorboard: $(STAMP) ## compare all runs in the browser, or RUNS="a b", or those of STUDY=name (PORT=6006)
	$(call takes,RUNS STUDY PORT)@$(NANO) tensorboard $(foreach r,$(call given,RUNS),$(call quote,$(r))) \
		$(if $(call given,STUDY),--study $(call quote,$(STUDY))) --port $(call quote,$(PORT))

test: $(STAMP) ## the fast tests
	$(call takes,ARGS)@$(PYTEST) $(call given,ARGS)

test-all: $(STAMP) ## all tests, slow ones too
	$(call takes,ARGS)@$(PYTEST) -m 'not gpu' $(call given,ARGS)

test-faults: $(STAMP) ## kills, full disks, fuzzing, … in full counts; writes the table of tests/README.md
	$(call takes,ARGS)@NANO_MOE_FAULTS=full $(BIN)/pytest -m 'not gpu' tests/faults $(call given,ARGS)

soak: $(STAMP) ## two hours of training, watched for leaks (MINUTES=1 to try it)
	$(call takes,MINUTES)@PYTHONPATH=tests $(BIN)/python tests/faults/soak.py $(if $(call given,MINUTES),--minutes $(call quote,$(MINUTES)))

bench: $(STAMP) ## time layers, steps, other libraries, optimizer and input here (15 minutes)
	$(call takes,ARGS LITGPT_PYTHON)@for name in layer step optimizer data; do $(NANO) bench $$name $(call given,ARGS) || exit; done
	@$(NANO) bench peers $(call given,ARGS) $(if $(call given,LITGPT_PYTHON),--litgpt-python $(call quote,$(LITGPT_PYTHON)))

lint: $(STAMP) ## ruff and the format
	$(call takes)@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP) ## mypy over the package
	$(call takes)@$(BIN)/mypy

format: $(STAMP) ## rewrite the sources in the house's format
	$(call takes)@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# torch first and alone: anything else would let pip choose its build. Corpus packages one by one:
# a package that is gone costs its domain, not the set-up.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; make setup PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python .ci/torch_build.py '$(TORCH)' '$(CPU_WHEELS)' $(call quote,$(TORCH_ARGS))
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@$(BIN)/python .ci/corpora.py
	@touch $@
