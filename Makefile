# Needs Python 3.11 or newer and make (GNU 3.81 as on macOS, or newer). Programs of the environment are run as
# `.venv/bin/python -m NAME` and every path is relative, so that a space in the path of this folder does no harm.

# An interpreter for the environment; `make PYTHON=/path/to/python3.12 demo` names another. One that is found but
# cannot run, is too old or cannot make environments (Debian without python3-venv) is passed over.
PYTHON ?=
VENV_PYTHON = .venv/bin/python
CAN_MAKE_VENV = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
# Finds the tools without importing them (torch alone takes seconds); fails where an interpreter was removed.
ENVIRONMENT_IS_WHOLE = import sys; from importlib.util import find_spec; \
	sys.exit(not all(map(find_spec, ("pip", "torch", "torchvision", "timm", "pytest", "ruff", "mypy"))))

.PHONY: demo notebooks test lint docs setup lock clean

demo: setup
	$(VENV_PYTHON) -m analysis demo --run runs/demo

# Runs every notebook on the demo, and writes each as a page into reports/notebooks.
notebooks: setup
	@test -e runs/demo/report/index.html || $(VENV_PYTHON) -m analysis demo --run runs/demo
	$(VENV_PYTHON) notebooks/render.py

# One thread a process: test files run side by side, on up to four cores.
test: lint
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy analysis quant

# The guide of docs/ and every function's documentation as one site, build/docs/guide.html; no network is needed.
docs: setup
	$(VENV_PYTHON) docs/build.py

# Makes .venv, completes it, or leaves it as it is.
setup:
	@if test -e .venv/.installed && ! $(VENV_PYTHON) -c '$(ENVIRONMENT_IS_WHOLE)' 2>/dev/null; then \
		echo "The environment in .venv is damaged: making it again."; \
		rm -rf .venv; \
	fi
	@$(MAKE) -s --no-print-directory .venv/.installed

# .installed is written last. .installing is there while the set-up works: if one is found, the last set-up was stopped
# half-way and pip may take a half-written package for a whole one, so all is made again (pip keeps its downloads).
.venv/.installed: pyproject.toml constraints.txt
	@if test -e .venv/.installing || ! $(VENV_PYTHON) -m pip --version >/dev/null 2>&1; then \
		found=; for python in "$(PYTHON)" python3.13 python3.12 python3.11 python3; do \
			if test -n "$$python" && "$$python" -c '$(CAN_MAKE_VENV)' >/dev/null 2>&1; then found=$$python; break; fi; \
			if test -n "$(PYTHON)"; then break; fi; \
		done; \
		if test -z "$$found"; then \
			echo "No Python 3.11 or newer with its venv module was found$(if $(PYTHON), as $(PYTHON))." >&2; \
			echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12" >&2; \
			exit 1; \
		fi; \
		echo "Making the environment in .venv with $$found (on Linux about 6 GB, most of it torch with CUDA)."; \
		rm -rf .venv && mkdir .venv && touch .venv/.installing && "$$found" -m venv .venv; \
	fi
	@rm -f .venv/.installed && touch .venv/.installing
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,notebooks]"
	$(VENV_PYTHON) -c "import torch, timm; print('torch', torch.__version__, 'and timm', timm.__version__, 'work')"
	@rm .venv/.installing && touch .venv/.installed

# Writes constraints.txt from the environment: upgrade there first, run the tests, then keep the new versions.
lock: setup
	@{ sed -n '/^#/p' constraints.txt; \
		$(VENV_PYTHON) -m pip freeze --all --exclude pip --exclude-editable | grep -Ev '^(nvidia-|cuda-|triton==)'; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt

# Results in runs/ stay.
clean:
	rm -rf .venv build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find analysis quant tests -name __pycache__ -type d -exec rm -rf {} +
