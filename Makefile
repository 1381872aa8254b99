# Every target works in a fresh clone with no environment active: it makes .venv first.
#
#   PYTHON=python3.12 make test     another interpreter for .venv
#   TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu" make test
#                                   where torch comes from; PyPI's wheel brings CUDA along
PYTHON ?= python3
TORCH_ARGS ?=
PIP_INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Nothing of the caller's environment decides which modules are found.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help sweep test test-without-torch explore test-sanitize check soak soak-server bench \
	bench-serving interop interop-llama-cpp peers release clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

# torch first and alone: it is large, and the rest changes more often.
.venv/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, set PYTHON=")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) $(TORCH_ARGS) torch
	touch $@

# Editable: changed Python files count at once. What is compiled is installed again when one of
# these changes. The build tools come from .venv, so they are the pinned ones. The define goes by
# the environment, as pip before 23.1 has no option -C.
.venv/.installed: .venv/.torch .venv/.modules pyproject.toml kernels/CMakeLists.txt \
		kernels/build_info.py.in $(wildcard kernels/csrc/*.* kernels/csrc/*/*.*)
	$(PIP_INSTALL) cmake nanobind ninja scikit-build-core
	SKBUILD_CMAKE_DEFINE=ELASTIC_MOE_WERROR=ON $(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@

# Which modules there are: an editable install finds those that it knew of. Written when it changes.
.venv/.modules: FORCE | .venv/.torch
	@find elastic_moe kernels/elastic_moe_kernels -name '*.py' | sort > $@.now
	@cmp -s $@.now $@ || cp $@.now $@
FORCE:

sweep: .venv/.installed  ## measure quality against cost on the bundled model, into sweep-out/
	.venv/bin/elastic-moe sweep $(ARGS)

# A file stays in one process, since its tests share what it made; ARGS="-n 0" takes one for all.
test: .venv/.installed  ## run the tests in up to 4 processes; ARGS="-m 'not slow'" for the quick ones
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		--durations 15 $(ARGS)

# What the CPU runs, in an install without torch.
NO_TORCH := build/no-torch/bin/python
build/no-torch/.installed: constraints.txt pyproject.toml kernels/CMakeLists.txt \
		kernels/build_info.py.in $(wildcard kernels/csrc/*.* kernels/csrc/*/*.*) \
		$(wildcard kernels/elastic_moe_kernels/*.py kernels/elastic_moe_kernels/*/*.py)
	test -x $(NO_TORCH) || $(PYTHON) -m venv build/no-torch
	$(NO_TORCH) -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		. httpx2 hypothesis openai pytest pytest-xdist
	! $(NO_TORCH) -c 'import torch' 2>/dev/null
	touch $@

test-without-torch: build/no-torch/.installed  ## run what needs no torch in an install that has none
	$(NO_TORCH) -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'not slow' \
		tests/test_without_torch.py tests/test_pytest_plugin.py tests/engine tests/server \
		tests/testing tests/lab/sweeps tests/model/checkpoints $(ARGS)

explore: .venv/.installed  ## run the property tests on other examples than those of `make test`
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m hypothesis \
		--hypothesis-profile explore $(ARGS)

# Built beside the installed extension, which stays as it is.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
build/sanitize/.built: .venv/.installed
	.venv/bin/cmake -S kernels -B build/sanitize -G Ninja -DSKBUILD=1 -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DCMAKE_MAKE_PROGRAM="$$PWD/.venv/bin/ninja" -DPython_EXECUTABLE="$$PWD/.venv/bin/python" \
		-DCMAKE_CXX_FLAGS="$(SANITIZERS)" -DELASTIC_MOE_WERROR=ON
	.venv/bin/cmake --build build/sanitize
	touch $@

# The sanitizers' library must be the first that a process loads. Python itself never frees all.
# --capture=sys: what they report goes to stderr past pytest, which does not outlive it.
test-sanitize: build/sanitize/.built  ## run the kernels' tests with address and undefined-behaviour checks
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
		.venv/bin/python -m pytest -p tests.kernels.sanitize tests/kernels \
		--ignore tests/kernels/test_backends.py --capture=sys $(ARGS)

check: .venv/.installed  ## lint, formatting, types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/clang-format --dry-run -Werror $(wildcard kernels/csrc/*.* kernels/csrc/*/*.*)
	.venv/bin/mypy --strict

soak: .venv/.installed  ## drive 2,000 random requests through the engine and compare each with its solo run
	.venv/bin/python -m tests.engine.soak $(ARGS)

soak-server: .venv/.installed  ## send 5 waves of 200 streaming clients, of which 30 % leave, and see what is left
	.venv/bin/python -m tests.server.soak --out benchmarks/results/serving.jsonl $(ARGS)

bench: .venv/.installed  ## time the kernels beside their reference and the machine's limit
	.venv/bin/python -m pytest benchmarks --benchmark-only $(ARGS)

bench-serving: .venv/.installed  ## time what the server costs beyond its engine, and its first token
	.venv/bin/python -m benchmarks.serving.run --out benchmarks/results/serving.jsonl $(ARGS)

# Makes an environment in build/interop for each peer, from tests/interop/requirements.
interop: .venv/.installed  ## have openai's clients, lm-eval and schemathesis ask the server
	.venv/bin/python -m tests.interop.run --out benchmarks/results/interop.jsonl $(ARGS)

# llama.cpp, built from the source package that also holds its converter.
LLAMA_CPP := llama-cpp-python==0.3.36
LLAMA_DIR := build/interop/llama-cpp
$(LLAMA_DIR)/.installed: constraints.txt
	rm -rf $(LLAMA_DIR)
	$(PYTHON) -m venv $(LLAMA_DIR)/venv
	$(LLAMA_DIR)/venv/bin/python -m pip install --quiet -c constraints.txt $(TORCH_ARGS) torch
	$(LLAMA_DIR)/venv/bin/python -m pip install --quiet -c constraints.txt \
		transformers numpy safetensors sentencepiece protobuf pyyaml
	$(LLAMA_DIR)/venv/bin/python -m pip download --quiet --no-deps \
		--no-binary llama-cpp-python -d $(LLAMA_DIR) $(LLAMA_CPP)
	tar -xzf $(LLAMA_DIR)/llama_cpp_python-*.tar.gz -C $(LLAMA_DIR)
	CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) CMAKE_ARGS=-DGGML_NATIVE=ON \
		$(LLAMA_DIR)/venv/bin/python -m pip install --quiet $(LLAMA_DIR)/llama_cpp_python-*.tar.gz
	touch $@

interop-llama-cpp: .venv/.installed $(LLAMA_DIR)/.installed  ## compare extracted checkpoints with llama.cpp
	.venv/bin/python tests/interop/llama_cpp/compare.py --python $(LLAMA_DIR)/venv/bin/python \
		--source "$$(echo $(LLAMA_DIR)/llama_cpp_python-*/vendor/llama.cpp)" \
		--out benchmarks/results/interop-llama-cpp.jsonl

# What users would pick instead, at fixed versions. zentorch wants an environment of its own.
PEERS_INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
build/peers/.installed: constraints.txt
	rm -rf build/peers
	$(PYTHON) -m venv build/peers/venv
	build/peers/venv/bin/python $(PEERS_INSTALL) $(TORCH_ARGS) torch
	build/peers/venv/bin/python $(PEERS_INSTALL) transformers numpy safetensors gguf==0.19.0
	CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) CMAKE_ARGS=-DGGML_NATIVE=ON \
		build/peers/venv/bin/python $(PEERS_INSTALL) --no-binary llama-cpp-python $(LLAMA_CPP)
	$(PYTHON) -m venv build/peers/zentorch
	build/peers/zentorch/bin/python $(PEERS_INSTALL) $(TORCH_ARGS) torch
	build/peers/zentorch/bin/python $(PEERS_INSTALL) numpy zentorch==2.13.0.2
	touch $@

build/peers/.checkpoints: build/peers/.installed benchmarks/peers/checkpoint.py \
		benchmarks/peers/to_gguf.py
	build/peers/venv/bin/python benchmarks/peers/checkpoint.py build/peers/standard standard
	build/peers/venv/bin/python benchmarks/peers/to_gguf.py build/peers/standard \
		build/peers/standard.gguf
	build/peers/venv/bin/python benchmarks/peers/checkpoint.py build/peers/awkward awkward
	touch $@

peers: .venv/.installed build/peers/.checkpoints  ## time ours and its peers in turns
	.venv/bin/python -m benchmarks.peers.run --peers build/peers/venv/bin/python \
		--zentorch build/peers/zentorch/bin/python --standard build/peers/standard \
		--gguf build/peers/standard.gguf --awkward build/peers/awkward \
		--out benchmarks/results/peers.jsonl $(ARGS)

release:  ## build and check the files of a release, in dist/
	PYTHON=$(PYTHON) .ci/release

clean:  ## remove .venv and everything that was built
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
