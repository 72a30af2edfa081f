PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SYSTEM := $(and $(wildcard /usr/bin/chromium),$(wildcard /usr/bin/espeak-ng))

.PHONY: demo test check style

demo: $(READY)
	$(BIN)/python -m tools.transcribe examples/*.flac

test: $(READY)
	$(BIN)/python -m pytest $(if $(SYSTEM),,-m "not system")

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
