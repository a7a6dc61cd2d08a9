# make demo | test | setup | style | docs | bench | sanitize. A virtual environment in .venv holds everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A CPU build is enough without a GPU, and small; on a GPU machine give your own: make TORCH="torch>=2.11,<2.14"
TORCH ?= torch==2.13.0

.PHONY: setup demo test style docs bench sanitize kernels-compile clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.done

# torch first and by itself, so that nothing that depends on it picks another build.
$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev,eval,train]" "$(TORCH)"
	touch $@

demo: setup
	$(BIN)/hf-fuse demo

# A worker for each core, of one thread: threads that wait for a busy core lose much.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

# The pages of docs/ as a site, in build/site; a warning is an error.
docs: setup
	$(BIN)/mkdocs build --strict

# On a GPU: every op against its ceiling, torch, torch.compile and (if installed) liger-kernel.
bench: setup
	$(BIN)/hf-fuse kernels --json results/kernels.json

# On a GPU that nothing else uses: every kernel of a decoding step at small shapes, each tensor in memory of its own.
sanitize: setup
	@for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --kernel-name kns=decode_ \
	    $(BIN)/python tests/sanitize.py || exit 1; \
	done

# Without a GPU: every CUDA source for the oldest and the newest supported architecture, warnings as errors.
kernels-compile:
	@mkdir -p build
	@for source in csrc/cuda/*.cu; do \
	  echo "nvcc $$source"; \
	  for arch in 80 90a; do \
	    nvcc -std=c++17 -O3 -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Icsrc/include \
	      -gencode=arch=compute_$$arch,code=sm_$$arch -c $$source -o build/$$(basename $$source).$$arch.o || exit 1; \
	  done; \
	done

clean:
	rm -rf $(VENV) build results *.egg-info
