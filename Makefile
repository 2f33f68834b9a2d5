# Every target is a thin line over `mmfusion <verb>`. ARGS takes any --dotted.option.
PYTHON    ?= python3
ENCODERS_GIVEN := $(ENCODERS)
ENCODERS  ?= tiny
DATA_GIVEN := $(DATA)
DATA      ?= data/demo
FROM      ?= catalogue
EXP       ?=
RUN       ?=
RESUME    :=
CLUSTER   :=
NODES     :=
GPUS      :=
RUNS      ?=
SRC       ?=
OUT       ?=
JOBS      ?=
MAX_SIDE  ?=
SPLIT     ?=
STUDY     := demo
SEEDS     :=
STEPS     :=
STAGES    :=
SWEEP     := fusion
TRIALS    :=
KEEP      :=
NAME      :=
K         :=
RANKS     :=
MARGIN    :=
ARGS      ?=
BIN       := .venv/bin
MMFUSION  := $(BIN)/mmfusion

.DEFAULT_GOAL := help
.PHONY: help setup train data eval profile mine compare study sweep runs sync clean-runs bench bench-eval bench-stream bench-import bench-loss bench-cache bench-chaos test test-all lint format clean

help:            ## list every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready  ## make .venv and install the pinned dependencies

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv || echo "uv cannot be installed: using pip"
	$(BIN)/python -m uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]' \
	  || $(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

train: setup     ## EXP=fusion_gated [ENCODERS=tiny|minilm|dual] [DATA=shards] [RESUME=auto|checkpoint] [GPUS=8] [CLUSTER=slurm NODES=4] [ARGS="--..."]: train, then evaluate val and test; with CLUSTER as a job
	@$(MMFUSION) train --exp '$(EXP)' --encoders '$(ENCODERS)' --data '$(DATA)' $(if $(RESUME),--resume='$(RESUME)') $(if $(CLUSTER),--cluster '$(CLUSTER)') $(if $(NODES),--nodes '$(NODES)') $(if $(GPUS),--gpus '$(GPUS)') $(ARGS)

data: setup      ## FROM=catalogue|esci|fashion|marqo_gs|wands SRC=folder OUT=folder [JOBS=4] [MAX_SIDE=512] [ARGS="--..."]: data into shards; FROM=scores|negatives SRC=file OUT=shards [NAME=teacher]: pairs beside them
	@$(MMFUSION) data --from '$(FROM)' --src='$(SRC)' --out='$(OUT)' $(if $(JOBS),--jobs='$(JOBS)') $(if $(MAX_SIDE),--photos.max_side='$(MAX_SIDE)') $(if $(NAME),--name='$(NAME)') $(ARGS)

eval: setup      ## RUN=runs/... [DATA=shards] [SPLIT=test] [OUT=folder] [ARGS="--..."]: evaluate a run again
	@$(MMFUSION) eval --run '$(RUN)' $(if $(DATA_GIVEN),--data '$(DATA)') $(if $(SPLIT),--split '$(SPLIT)') $(if $(OUT),--out '$(OUT)') $(ARGS)

profile: setup   ## EXP=fusion_gated [ENCODERS=...] [DATA=shards] [STEPS=20] [STAGES=align,fuse] [ARGS="--..."]: trace some steps of stages (the first without STAGES), to open in a browser
	@$(MMFUSION) profile --exp '$(EXP)' --encoders '$(ENCODERS)' --data '$(DATA)' $(if $(STEPS),--steps='$(STEPS)') $(if $(STAGES),--stages='$(STAGES)') $(ARGS)

mine: setup      ## RUN=runs/... [DATA=shards] [NAME=mined-1] [K=20] [RANKS=10:100] [MARGIN=0.05|none] [ARGS="--..."]: hard negatives from a run's own ranking
	@$(MMFUSION) mine --run '$(RUN)' $(if $(DATA_GIVEN),--data '$(DATA)') $(if $(NAME),--name '$(NAME)') $(if $(K),--k='$(K)') $(if $(RANKS),--ranks='$(RANKS)') $(if $(MARGIN),--margin='$(MARGIN)') $(ARGS)

compare: setup   ## RUNS="runs/a runs/b [other.run]" [SPLIT=test] [OUT=page.html]: runs side by side, tested in pairs
	@$(MMFUSION) compare $(RUNS) $(if $(SPLIT),--split '$(SPLIT)') $(if $(OUT),--out '$(OUT)') $(ARGS)

study: setup     ## [STUDY=demo|paper|...] [DATA=shards] [SEEDS=3] [JOBS=1] [ENCODERS=...] [ARGS="--report-only"]: many arms and seeds, and what they show (demo without STUDY, the study's own seeds without SEEDS); goes on where it was stopped
	@$(MMFUSION) study --study '$(STUDY)' $(if $(DATA_GIVEN),--data '$(DATA)') $(if $(SEEDS),--seeds='$(SEEDS)') $(if $(JOBS),--jobs='$(JOBS)') $(if $(ENCODERS_GIVEN),--encoders '$(ENCODERS)') $(ARGS)

sweep: setup     ## [SWEEP=fusion|stages|losses] [DATA=shards] [TRIALS=20] [JOBS=1] [ENCODERS=...] [SEEDS=3] [ARGS="--report-only|--wandb|--..."]: many configurations of an experiment, and the best of them again under other seeds; goes on where it was stopped, on several machines at once
	@$(MMFUSION) sweep --sweep '$(SWEEP)' --data '$(DATA)' $(if $(TRIALS),--trials='$(TRIALS)') $(if $(JOBS),--jobs='$(JOBS)') $(if $(ENCODERS_GIVEN),--encoders '$(ENCODERS)') $(if $(SEEDS),--seeds='$(SEEDS)') $(ARGS)

runs: setup      ## [RUNS=folder] [ARGS="--experiment=... --all --json"]: list runs: stage, status, best val, test, age, commit
	@$(MMFUSION) runs $(if $(RUNS),--runs='$(RUNS)') $(ARGS)

sync: setup      ## [RUN=runs/...] [RUNS=folder]: send to W&B what runs logged offline, the parts of a resumed run in order
	@$(MMFUSION) sync $(if $(RUN),--run='$(RUN)') $(if $(RUNS),--runs='$(RUNS)') $(ARGS)

clean-runs: setup  ## KEEP=5 [RUNS=folder] [ARGS="--experiment=... --checkpoints-only --unfinished --yes"]: remove all but the newest runs of each experiment, after a question; what is running or needed stays
	@$(MMFUSION) clean-runs --keep='$(KEEP)' $(if $(RUNS),--runs='$(RUNS)') $(ARGS)

bench: bench-eval bench-stream bench-import bench-loss bench-cache bench-chaos  ## every benchmark

bench-eval: .venv/.bench  ## exact search and metrics against their peers (5 minutes)
	@$(BIN)/python experiments/bench/evaluation.py $(ARGS)

bench-stream: .venv/.bench  ## the stream of 512 px photos against its limit and open_clip's pipeline
	@$(BIN)/python experiments/bench/stream.py $(ARGS)

bench-import: setup  ## memory of an import of 10 million judgments (3 minutes)
	@$(BIN)/python experiments/bench/imports.py $(ARGS)

bench-loss: .venv/.bench  ## contrastive losses and micro-batches against their peers (5 minutes)
	@$(BIN)/python experiments/bench/losses.py $(ARGS)

bench-cache: setup  ## a frozen stage from the feature cache against encoding, on data/fashion (5 minutes)
	@$(BIN)/python experiments/bench/cache.py $(ARGS)

bench-chaos: setup  ## two ranks killed at 20 moments, resumed each time, against the straight run, bit for bit (8 minutes on two busy cores)
	@$(BIN)/python -m tests.chaos $(ARGS)

.venv/.bench: .venv/.ready
	$(BIN)/python -m uv pip install --python $(BIN)/python -c constraints.txt -e '.[bench]' \
	  || $(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	@touch $@

test: setup      ## the tests that CI runs
	$(BIN)/python -m pytest -n 3 --dist worksteal -m 'not slow' $(ARGS)

test-all: setup  ## the slow tests as well
	$(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

lint: setup      ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup    ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove caches (never runs or data)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
