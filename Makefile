.PHONY: test full bench lint build

test:  ## what a user runs
	pytest tests/

full:  ## the whole grid
	OMP_NUM_THREADS=1 pytest tests/ --full -n auto

bench:  ## every op, every backend and peer on this machine
	for op in attention layer_norm gelu cross_entropy; do python benchmarks/$$op.py || exit 1; done

lint:
	ruff check . && ruff format --check .

build:
	python -m pip wheel --no-deps -w dist .
