# Every target makes the environment it needs. Nothing but Python >= 3.11 has to be there before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
SEEDS ?= 100
FIRST_SEED ?= 1
FAULT ?=
SEED ?= 1
MINUTES ?= 5
ROUNDS ?= 12
PRODUCT := protocol storage runtime mobility_agent process_server config_server recovery farpoint deploy

.PHONY: environment demo test lint audit simulate simulate-planted torture fuzz live live-guest bench tracking-cost azurite bpf openapi dist guest lock clean

environment: $(STAMP)

# The lock file holds hashes and no index addresses: pip and uv both take it, from whatever index the machine is set up for.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Farpoint needs Python 3.11 or newer; call make PYTHON=python3.11")' 1>&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 1>&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock 1>&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . 1>&2
	@touch $(STAMP)

demo: $(STAMP) $(if $(findstring --azurite,$(ARGS)),.node/.installed)
	@$(BIN)/farpoint demo $(ARGS)

test: $(STAMP)
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet -c pyproject.toml -r $(PRODUCT)

# Whether a locked dependency has a known vulnerability; exits 3 (make: 2) where the service cannot be asked.
audit: $(STAMP)
	@$(BIN)/python -m deploy.audit

simulate: $(STAMP)
	@$(BIN)/python -m tests.simulation --seeds $(SEEDS) --first-seed $(FIRST_SEED) $(if $(FAULT),--fault $(FAULT)) $(ARGS)

# Every planted fault, over at most SEEDS seeds each, until a violation names the invariant that it breaks.
simulate-planted: $(STAMP)
	@$(BIN)/python -m tests.simulation --planted --seeds $(SEEDS) $(if $(FAULT),--planted-name $(FAULT)) $(ARGS)

# Real processes under kills, I/O errors, power cuts and bad networks; as root, with strace and xfsprogs.
torture: $(STAMP)
	@$(BIN)/python -m tests.torture --seed $(SEED) --minutes $(MINUTES) $(if $(FAULT),--fault $(FAULT)) $(ARGS)

# atheris has a wheel for some platforms only; where it has none, the same targets are fuzzed without coverage.
fuzz: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: \
		-r tests/fuzz/requirements.txt 1>&2
	@$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(ARGS)

# Hunts for lost updates on live block devices (root, loop devices, BPF), and the planted faults that it must catch.
live: $(STAMP)
	@$(BIN)/python -m tests.live --rounds $(ROUNDS) $(ARGS)

# The same programs in the kernel of Debian 12, in an emulated machine (qemu-system-x86, cpio; the kernel comes by apt-get download).
live-guest: $(STAMP)
	@$(BIN)/python -m tests.live.guest

# The description of the configuration server's interface, as it is kept.
openapi: $(STAMP)
	@$(BIN)/config-server openapi > docs/openapi.json

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.line $(ARGS)

# What following a live disk costs, beside what is asked (root, fio, loop devices, BPF); exit code 1 (make: 2) above it.
tracking-cost: $(STAMP)
	@$(BIN)/python -m benchmarks.tracking_cost $(ARGS)

# The Azure Blob emulator for the tests and the demo, into the ignored folder .node/ by its lock file.
azurite: .node/.installed

.node/.installed: tests/azurite/package.json tests/azurite/package-lock.json
	@mkdir -p .node
	@cp tests/azurite/package.json tests/azurite/package-lock.json .node/
	@cd .node && npm ci --silent --no-audit --no-fund 1>&2
	@touch .node/.installed

# The agent's tracing programs, into mobility_agent/tracking/bpf/, where they are committed (needs Debian 12's clang-14, llvm-14, bpftool).
bpf: $(STAMP)
	@$(BIN)/python -m deploy.compile_bpf

# The wheel, the Debian packages, the offline bundle, checksums and the bill of materials, into dist/; docs/installation.md.
dist: $(STAMP)
	@$(BIN)/python -m deploy.packages $(ARGS)

# The agent on a Debian with a real systemd, in QEMU: installed over SSH, protected, restarted, recovered outside, uninstalled. Needs
# root and the tools that it names; keeps the image that it makes in .guest/. dist/ is made anew unless it is of this commit.
guest: $(STAMP)
	@test "$$(cat dist/COMMIT 2>/dev/null)" = "$$(git rev-parse HEAD)" || $(MAKE) --no-print-directory dist ARGS= 1>&2
	@$(BIN)/python -m tests.guest $(ARGS)

# Rewrites requirements.lock from pyproject.toml; needs uv.
lock:
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--extra development pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .node .guest build dist *.egg-info
