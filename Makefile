# Each target sets itself up: a clean clone needs python3, a C++ compiler and make.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test test-long fuzz sanitize bench bench-normals profile matrix docs prove-gpu prove-cuda prove-hip prove-triton prove-races gpu-pack gpu-check clean

demo: .venv/demo
	$(BIN)/python examples/train_digits.py

test: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	@echo "make test: all checks passed"

# All tests, those too that are dear and show little beside the others: twice as long.
test-long: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --longer
	@echo "make test-long: all tests passed"

# Round after round of all its tests, until it finds something, or for as long as FUZZ says: FUZZ="8h", say. What it
# finds is kept, and tried first.
FUZZ ?= 1h
fuzz: .venv/test
	timeout $(FUZZ) sh -c 'while $(BIN)/python -m pytest tests/test_fuzz.py -n 2 --hypothesis-profile fuzz; do :; done; exit 1'; \
	  test $$? = 124

# With the sanitizers of addresses and of undefined behaviour; the kernels are built as they were afterwards.
SANITIZERS := -O1 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: .venv/test
	CXXFLAGS="$(SANITIZERS)" CUDACXX=none $(BIN)/python setup.py build_ext --inplace
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/python -m pytest -p no:cacheprovider \
	  tests/test_fuzz.py tests/test_ops.py tests/test_noise.py tests/test_reparameterisation.py tests/test_bad_input.py; \
	  status=$$?; CUDACXX=none $(BIN)/python setup.py build_ext --inplace; exit $$status

bench: .venv/test
	$(BIN)/python -m dae_fast bench
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.samplers
	$(BIN)/python -m benchmarks.readme_table

# Normals beside oneMKL's, numpy's, JAX's and randompack's, in an environment of their own.
bench-normals: build/normals-venv
	cd build && normals-venv/bin/python -m dae_fast.benchmarks.normals
	cd build && normals-venv/bin/python -m dae_fast.benchmarks.normals --isa avx2

build/normals-venv: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*) benchmarks/normals.py
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$@/bin/pip install --quiet --disable-pip-version-check . mkl mkl_random randompack numpy jax
	touch $@

# PROFILE="--task U-Net --steps 50", say. Nsight Systems where nsys is on the PATH, torch.profiler elsewhere.
profile: .venv/test
	$(BIN)/python -m benchmarks.profile $(PROFILE)

# Every compiler and Python that is here, aarch64 under qemu: a table in docs/matrix.md.
matrix: .venv/test
	$(BIN)/python -m tests.matrix

# The site, in build/site; broken links fail it.
docs: .venv/docs
	$(BIN)/python -m mkdocs build

# What can be shown of the GPUs' kernels without a GPU, beyond `make test`: nvcc's and Triton's PTX run on the CPU against
# its bits, what HIP has of its own in wavefronts of 64, hipcc's library where there is one, and races. Needs nvcc. Some
# fifteen minutes on two cores.
prove-gpu: .venv/test
	$(MAKE) --no-print-directory -j 2 prove-cuda prove-hip prove-triton prove-races

prove-cuda:
	$(BIN)/python -m pytest tests/test_cuda.py tests/test_chain.py --ptx
prove-hip:
	$(BIN)/python -m pytest tests/test_cuda.py tests/test_chain.py --hip
	$(BIN)/python -m pytest tests/test_hip.py tests/test_other_compilers.py --longer
prove-triton:
	$(BIN)/python -m pytest tests/test_triton_code.py --longer
	$(BIN)/python -m tests.triton_ptx
prove-races:
	$(BIN)/python -m tests.races

# On a machine with nvcc and the GPU machine's version of Python; then take build/gpu-pack there with the tree. The torch
# of that machine brings its Triton, which compiles for a GPU that is not here.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= torch==2.11.0
gpu-pack:
	$(GPU_PYTHON) -m venv build/gpu-venv
	build/gpu-venv/bin/pip install --quiet --disable-pip-version-check $(GPU_TORCH)
	build/gpu-venv/bin/pip install --quiet --disable-pip-version-check pybind11 ninja numpy tqdm setuptools "nvidia-nvtx>=13"
	build/gpu-venv/bin/python -m benchmarks.gpu_pack $(PACK)

# On a machine with a GPU, offline, with the Python that has torch. CALL="a --out FOLDER" or "b --out FOLDER"; by
# default both calls, one after the other.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(CALL)

# An environment with the extra of that name. torch first and by itself: a later "torch" requirement
# must find it installed.
.venv/%: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[$*]"
	$(BIN)/python -m dae_fast info
	touch $@

clean:
	rm -rf .venv build dist *.egg-info dae_fast/_core*.so dae_fast/_cuda.so dae_fast/_hip.so dae_fast/_build.json
