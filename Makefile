PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SYSTEM := $(and $(wildcard /usr/bin/chromium),$(wildcard /usr/bin/espeak-ng))

OLDEST := 5.10.4

.PHONY: demo test oldest check style

demo: $(READY)
	$(BIN)/python -m tools.transcribe examples/*.flac

test: $(READY)
	$(BIN)/python -m pytest $(if $(SYSTEM),,-m "not system")

# The same tests with the oldest transformers that requirements.txt allows; and with bitsandbytes, which takes seconds to
# import in every process and which the tests of 4 bits need.
oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest $(if $(SYSTEM),,-m "not system")

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

style: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(READY): requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@

.venv-oldest/.ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv-oldest
	grep -viE "^(transformers|huggingface_hub|tokenizers)==" constraints.txt >.venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --requirement requirements-dev.txt \
		--constraint .venv-oldest/constraints.txt transformers==$(OLDEST) bitsandbytes
	touch $@
