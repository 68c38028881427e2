# Every target does its own set-up: a fresh machine needs Python >= 3.11 and git.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers

# Two test processes share the cores: threads of their own would only wait for each other.
test test-slow test-peers: export OMP_NUM_THREADS = 1
test test-slow test-peers: export OPENBLAS_NUM_THREADS = 1

.PHONY: demo test test-slow test-peers check clean

demo: $(READY)            ## train on phantoms, predict, evaluate, report (under 10 minutes on 2 cores)
	$(BIN)/medmom demo

test: $(READY)            ## the suite that guards every change (under 8 minutes on 2 cores)
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not peers and not gpu"

test-slow: $(READY)       ## long tests: training, killing, resuming, many processes
	$(BIN)/python -m pytest -q -m "slow and not peers" --durations=10

test-peers: $(PEERS)      ## comparisons with other people's packages
	$(BIN)/python -m pytest -q -m peers

check: $(READY)           ## format, lint, types, tests
	scripts/check.sh

clean:                    ## forget the environment; data and runs stay
	rm -rf .venv

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

$(PEERS): $(READY) Makefile
	# Without what they ask for: it would bring a torchvision that may not fit the torch that is here.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    dynamic-network-architectures==0.4.4 momentumnet==0.10 memcnn==1.5.2 revtorch==0.2.4 \
	    momo-opt==0.1.0 schedulefree==1.4.1 fsgdm==1.0 lion-pytorch==0.2.5 qhoptim==1.1.0 pytorch-optimizer==4.1.0 \
	    fire==0.7.1 termcolor==3.3.0 pytorch-ignite==0.5.5
	touch $@
