# `make demo` and `make test` need Python 3.11 or newer and g++ 11 or newer; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: demo test lint wheel tables drawings clean
demo: .venv/installed
	$(BIN)/sparsebert demo --overwrite  # of what an older version of the code has left

test: .venv/installed
	$(BIN)/ruff check .
	@# Tests of a file share its models, so one worker runs them; tests/conftest.py says which files begin.
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

wheel: .venv/installed  # into dist/
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir dist .

tables: .venv/installed  # which machine, command and environment made each of bench/results
	@$(BIN)/python -m bench.tables

drawings: .venv/installed  # docs/flow.svg and docs/pass.svg
	$(BIN)/python -m pip install -q 'matplotlib>=3.9,<4'
	$(BIN)/python docs/draw.py

clean:
	rm -rf .venv build sparsebert-demo *.egg-info sparsebert/*.so

# torch first and by its exact version, so that nothing else can choose another one.
.venv/installed: pyproject.toml constraints.txt setup.py $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found %d.%d; set PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,dev]'
	@touch $@

# An hour or more: how many of a sample of small faults in the code the tests notice. Python 3.11; SPARSEBERT_DATA set.
.PHONY: mutants
mutants: .venv/installed
	$(BIN)/python -m pip install -q 'mutmut>=3.8,<4'
	$(BIN)/python -m tests.mutants --sample 300 --seed 2 --survivors

# The kernels and packers under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own; where memory
# runs out, the sanitizer ends the process. tests/test_pool.py runs the pool of threads under ThreadSanitizer.
SANITIZED := build/sanitized
.PHONY: sanitize
sanitize: .venv/installed
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r sparsebert tests bench kernels csrc setup.py pyproject.toml README.md LICENSE $(SANITIZED)/ && rm -f $(SANITIZED)/sparsebert/*.so
	cd $(SANITIZED) && NVCC= CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g" LDFLAGS="-fsanitize=address,undefined" \
		$(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && PYTHONPATH=. LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(CURDIR)/$(BIN)/python -m pytest -q -p no:cacheprovider \
		--deselect tests/test_masked_lstsq.py::test_memory_that_a_thread_cannot_have_is_an_error_of_the_call \
		tests/test_sparse_matmul.py tests/test_sparse_encoder.py tests/test_gram.py \
		tests/test_masked_lstsq.py tests/test_obs_prune.py tests/test_admm_prune.py tests/test_topk_mask.py tests/test_masked_matmul.py

# Up to eight minutes: the engine on this processor against its rivals. The table goes to bench/results/cpu/. Without
# a network the rivals cannot be installed; the table then names those that are missing.
.PHONY: cpu-report
cpu-report: .venv/installed
	-$(BIN)/python -c 'import nncf, onnxruntime, openvino' 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e '.[rivals]'
	$(BIN)/python -m bench.cpu_report

# Up to eight minutes, without a network: every kernel checked and timed on the GPU. The table goes to
# bench/results/gpu/, all figures to gpu_report.json. `python -m bench.gpu_report --interpret` rehearses it without one.
# Without .venv, which needs a network, by the Python that has torch.
.PHONY: gpu-report
gpu-report:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m bench.gpu_report
