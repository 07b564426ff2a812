# make quickstart   train six schemes at four batch sizes, then show the table and the figure
# make test         the test suite
# make soak         random kills, keys, damage and images: LENGTH=1 is about an hour on two cores, SEED=0
# make lint         formatting, lint and types
# make bench        the benchmarks, at sizes for minutes on two CPU cores; nothing compiled
# make setup        the environment in .venv (the others do this too)

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test soak lint bench
setup: .venv/done

# A second call finds the stamp and is quick; another pyproject or constraints renews it.
.venv/done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, and $(PYTHON) is older; make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@rm -rf build  # of an earlier installation, whose files would be installed too
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[dev]'
	@rm -rf build smallbatch.egg-info
	@touch $@

quickstart: setup
	$(BIN)/python train.py -m experiment=quickstart
	$(BIN)/python scripts/table.py runs/quickstart
	@echo
	@echo "The figure is runs/quickstart/accuracy_vs_batch.png. What next:"
	@echo "  $(BIN)/tensorboard --logdir runs                  the curves, at http://localhost:6006"
	@echo "  $(BIN)/python train.py norm=pws batch=2           one run; --help lists all keys"
	@echo "  $(BIN)/python train.py -m experiment=cifar10_small  where small batches really hurt"

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

LENGTH ?= 1
SEED ?= 0
soak: setup
	$(BIN)/python -m tests.soak --length $(LENGTH) --seed $(SEED)

# Into runs/benchmarks; without --out they renew results/.
bench: setup
	$(BIN)/python -m benchmarks.layers --quick --eager --rounds 5 --out runs/benchmarks/layers
	$(BIN)/python -m benchmarks.training --quick --ways eager --rounds 5 --out runs/benchmarks/training
	$(BIN)/python -m benchmarks.inference --quick --out runs/benchmarks/inference

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
