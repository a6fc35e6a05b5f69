# The commands of the project; README.md says what each prints. MODE is the proxy's mode in the lab.
MODE ?= iptables
PY = .venv/bin/python
JOBS ?= 4
# what is compiled is kept: each start of a program would compile a fresh clone anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: lab lab-down test test-unit test-vm try-image lint format bench golden setup lock clean

# a kernel without IPVS plays it in a virtual machine
ON = $(if $(filter ipvs,$(MODE)),tools/with-ipvs)

lab: setup
	$(ON) sh -c '$(PY) netns-lab/lab up --mode $(MODE) && $(PY) netns-lab/lab check'

lab-down:
	@[ ! -x $(PY) ] || $(PY) netns-lab/lab down

test: setup
	$(PY) -m pytest -n $(JOBS)

test-unit:
	$(PY) -m pytest -n $(JOBS) -m "not root and not vm and not lab"

try-image: setup
	deploy/try

test-vm: setup
	$(PY) -m pytest -m vm

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/mypy netns-lab/netnslab netns-lab/apiserver bench
	.venv/bin/lint-imports

format:
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

bench: setup
	$(PY) bench/run.py

golden: setup
	$(PY) -m pytest -q -m "not root" -k golden --update-goldens

setup:
	@tools/setup

lock:
	tools/lock

clean: lab-down
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis bench/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
