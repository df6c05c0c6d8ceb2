# Two verbs matter: `make demo` (sets up, runs the main job) and `make test` (sets up, runs the tests).
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all check clean

setup: $(STAMP)

# torch is named first and alone, so that no other package's open range brings a larger build of it.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard mebp_compile/quant/kernels/*.c) $(wildcard mebp_compile/kernels/*.[ch]) $(wildcard mebp_compile/measure/*.c) $(wildcard solvers/*.[ch])
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch==2.13.0 setuptools wheel
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e ".[train,dev]"
	touch $(STAMP)

demo: setup
	$(PY) examples/demo.py

# Two workers with two OpenMP threads each: threads that wait must not spin, or each takes the core that another needs (half of the time).
test: setup
	OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n 2 -m "not slow"

test-all: setup
	OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n 2 --hypothesis-profile=explore

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info
