# One virtual environment, made on first use: `make demo`, `make test`. PYTHON=python3.12 make demo takes another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Threads that wait by spinning take the processor from those that work when a machine is shared.
export OMP_WAIT_POLICY ?= passive
SOURCES := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test test-vllm test-browser lint docs reference format embedded bench bench-smoke adaptive gate spline codegen roofline sanitize neon cuda wheel test-wheel clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev,docs]'
	touch $@

$(VENV)/installed-cross: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cross]'
	touch $@

$(VENV)/installed-package: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[package]'
	touch $@

# All of these at once: each builds the extension again.
$(VENV)/installed-all: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev,docs,cross,package]'
	touch $(VENV)/installed-test $(VENV)/installed-cross $(VENV)/installed-package $@

demo: $(VENV)/installed
	$(BIN)/spectral-fast demo --out_dir demo-output --overwrite

test: $(VENV)/installed-test
	$(BIN)/pytest

# The report of a sweep in headless Chromium (Debian's package chromium); skipped where there is none.
test-browser: $(VENV)/installed-test
	$(BIN)/pytest tests/browser

# Evaluation and sweeps with the real vLLM on a CPU, in an environment of its own: vLLM wants its own numpy, and the
# torchvision, torchaudio and torchcodec that come with it do not fit this torch. It would bind itself to the first core, where
# others may be at work. Its LoRA gathers an adapter per token on a CPU: glibc shall keep that memory, page faults are slow.
test-vllm: export MALLOC_MMAP_THRESHOLD_ = 2000000000
test-vllm: export MALLOC_TRIM_THRESHOLD_ = 20000000000
test-vllm: export MALLOC_TOP_PAD_ = 200000000
test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind .venv-vllm/bin/python -m pytest tests/vllm -s -W default -o timeout=800

.venv-vllm/installed: $(SOURCES)
	$(PYTHON) -m venv .venv-vllm
	grep -v '^numpy' constraints.txt > .venv-vllm/constraints.txt
	.venv-vllm/bin/pip install --quiet --constraint .venv-vllm/constraints.txt --editable '.[eval-cpu,test]'
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: $(VENV)/installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy && $(BIN)/mypy examples/*.py
	$(BIN)/clang-format --dry-run --Werror csrc/*.* csrc/cuda/* tests/*.cpp

# The site, build/site/index.html; without a network. With --quiet, --strict would count no warnings. Material's authors would tell us
# of their next product.
docs: $(VENV)/installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . && $(BIN)/clang-format -i csrc/*.* csrc/cuda/* tests/*.cpp

embedded: $(VENV)/installed
	$(BIN)/python -m spectral_fast.embedded.make --out_dir embedded-output

# docs/reference, from the parser, the dataclasses of settings and what commands say that they write.
reference: $(VENV)/installed
	$(BIN)/python docs/make_reference.py

# Tables against peers and floors, results/<machine>.csv; bench-smoke runs the same code on tiny sizes.
bench: $(VENV)/installed-test
	$(BIN)/python -m benchmarks

bench-smoke: $(VENV)/installed-test
	$(BIN)/python -m benchmarks --quick --cores 2

# Experiments on the embedded model, over three seeds: adaptive ranks against one rank (13 minutes of one core), gated training
# against random skipping, and a gate watched (25), LS-LoRA against LoRA (20).
adaptive gate spline: export MALLOC_MMAP_THRESHOLD_ = 2000000000
adaptive gate spline: export MALLOC_TRIM_THRESHOLD_ = 20000000000
adaptive gate spline: export MALLOC_TOP_PAD_ = 200000000
adaptive gate spline: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$@
	$(if $(filter gate,$@),OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.novelty)

# Every Triton and CUDA kernel that changed since results/codegen.csv, and a fifth of the others, compiled for every architecture without a GPU.
codegen: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.codegen --again 5

# Bytes and flops of every kernel beside the least possible, and the bound that public peaks give; results/roofline.csv.
roofline: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.roofline

NATIVE := csrc/batch.cpp csrc/dispatch.cpp $(wildcard csrc/isa_*.cpp)
STRESS := -std=c++17 -g -O1 -ffp-contract=fast -Wno-psabi tests/native_stress.cpp $(NATIVE) -pthread

# Every kernel of every instruction set under the address, undefined-behaviour and thread sanitizers.
sanitize: build/stress-address build/stress-thread
	for isa in $$(build/stress-address --isas); do \
		SPECTRAL_FAST_ISA=$$isa build/stress-address && SPECTRAL_FAST_ISA=$$isa build/stress-thread || exit 1; done

SANITIZERS_address := address,undefined
SANITIZERS_thread := thread
build/stress-%: tests/native_stress.cpp $(wildcard csrc/*)
	mkdir -p build
	$(CXX) -fsanitize=$(SANITIZERS_$*) -fno-sanitize-recover=all $(STRESS) -o $@

# The same program for 64-bit Arm, by Clang; it is run where qemu-aarch64 is installed.
neon: $(VENV)/installed-cross
	mkdir -p build
	$(BIN)/python -m ziglang c++ -target aarch64-linux-musl -static $(STRESS) -o build/stress-neon
	if command -v qemu-aarch64 > /dev/null; then qemu-aarch64 build/stress-neon; fi

# The Jacobi in CUDA, by nvcc, for who wants it in place of the Triton one: SPECTRAL_FAST_CUDA=build/libspectral_fast_cuda.so
cuda: build/libspectral_fast_cuda.so

CUDA_ARCHITECTURES := 80 90a 100
build/libspectral_fast_cuda.so: csrc/cuda/jacobi.cu
	mkdir -p build
	nvcc -std=c++17 -O3 -shared -Xcompiler -fPIC $(foreach a,$(CUDA_ARCHITECTURES),-gencode arch=compute_$(a),code=sm_$(a)) $< -o $@

# The files to publish: dist/*.tar.gz, and the wheel that is built from it in isolation. Zig is a Clang that links with any glibc: the
# wheel runs where torch's does, from glibc 2.28 on, whatever the system that builds it.
GLIBC := 2.28
ARCHITECTURE := $(shell uname -m)
ZIG = $(BIN)/python -c 'import os, ziglang; print(os.path.join(os.path.dirname(ziglang.__file__), "zig"))'
wheel: $(VENV)/installed-package
	rm -rf dist build/wheel
	CXX="$$($(ZIG)) c++ -target $(ARCHITECTURE)-linux-gnu.$(GLIBC)" $(BIN)/python -m build --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat manylinux_$(subst .,_,$(GLIBC))_$(ARCHITECTURE) --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	$(BIN)/twine check --strict dist/*

# The wheel, installed, by the tests of the kernels, under every instruction set that the processor has. Its environment is fresh, but
# for the other one's packages, which it sees behind its own. From another folder: not the checkout shall be found. Where qemu-x86_64 is
# installed, also on a processor without AVX.
test-wheel: $(VENV)/installed-test
	rm -rf build/wheel-environment
	$(PYTHON) -m venv build/wheel-environment
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo build/wheel-environment/lib/python*/site-packages)/behind.pth"
	build/wheel-environment/bin/pip install --quiet --no-index --no-deps --ignore-installed dist/*.whl
	cd build/wheel-environment && bin/python -c 'import sys, spectral_fast as s; sys.exit(not s.__file__.startswith(sys.prefix))'
	cd build/wheel-environment && bin/python -m pytest -q --config-file "$(CURDIR)/pyproject.toml" $(addprefix "$(CURDIR)"/tests/test_,$(WHEEL_TESTS:=.py))
	cd build/wheel-environment && if command -v qemu-x86_64 > /dev/null; then qemu-x86_64 -cpu Nehalem bin/python -c $(WITHOUT_AVX); fi
WITHOUT_AVX := 'import torch; from spectral_fast.spectrum import Spectrum; assert Spectrum.of(torch.ones(3, 1), torch.ones(1, 3)).s[0].sub(3).abs() < 1e-6'
WHEEL_TESTS := native lowrank_svd recompose spline_kernel isa cli embedded

clean:
	rm -rf build dist *.egg-info demo-output embedded-output $(VENV) .venv-vllm
