# make              builds loopmdm, after it has found out what the compiler can do
# make train        builds, writes stories, trains, evaluates, samples: 2 to 4 minutes on 2 cores
# make demo         builds, and shows what the trained models of dev/models can do: ten seconds
# make check        checks the program against the reference files here: needs only cc
# make test         every check, with PyTorch and Hugging Face tokenizers, installed into .venv
# make style        figures of how readable loopmdm.c is, and their limits (python3)
# make experiments  what looping gains, with tables and plots: hours. QUICK=1 shows in a minute
#                   that they work. TINYSTORIES=FILES adds real text, PUZZLES=FILES hard Sudoku
# make bench        speed and memory beside PyTorch: an hour and more. QUICK=1: the main table
# make models       trains the models of dev/models anew: about an hour with IN=bf16
# make web          builds the page in dev/demo/web again (clang, lld and wasi-libc)
# make clean        removes what was built, the trained model too
#
# make loopmdm_cuda         builds for this machine's GPU with nvcc. PRECISION=fp32 for checks
# make loopmdm_cuda_on_cpu  builds the same kernels for the CPU (dev/cuda_on_cpu)
# make test_cuda            checks loopmdm.cu on a GPU; make test_cuda_on_cpu on any computer
# make studies              kernels from naive to fast (dev/cuda), checked on the CPU
# make studies_cuda         the same, checked and timed on a GPU
#
# MPI=1 builds for several processes, with mpicc; NCCL=1 for several GPUs: dev/COMMANDS.md says how.
# OPENMP= builds for one thread. ARCH= builds for any CPU of this kind, not just this one.
# GPU=sm_80 builds for another GPU than the one that is here, GPU=sm_90a for an H100 or H200.

CC ?= cc
CXX ?= g++
NVCC ?= nvcc
ifeq ($(MPI),1)
CC = mpicc
CXX = mpicxx
PROCESSES = -DMPI=1
NVCC_PROCESSES = -ccbin mpicxx
endif
ifeq ($(NCCL),1)
NVCC_PROCESSES += -DNCCL=1 $(NCCL_HOME:%=-I%/include -L%/lib -Xlinker -rpath=%/lib) -lnccl
endif
WARNINGS = -Wall -Wextra -Werror
# -ffp-contract=fast makes a*b+c one instruction. The other two let the compiler use vectors for
# square roots and comparisons.
FLOATS = -ffp-contract=fast -fno-math-errno -fno-trapping-math
HASH := \#
# works COMPILER,OPTION,PROGRAM: the option, if the program can be built with it.
works = $(shell mkdir -p build && echo '$(3)' | tr '@' '\n' | \
	$(1) $(2) -o build/probe - >build/probe.log 2>&1 && echo $(2))
MAIN := int main(void) { return 0; }
OMP_MAIN := $(HASH)include <omp.h>@int main(void) { return omp_get_max_threads(); }
# gcc and clang use vectors of half AVX-512's width unless told: the first such CPUs slowed down.
ARCH := $(call works,$(CC) -x c,-march=native,$(MAIN)) \
	$(call works,$(CC) -x c,-mprefer-vector-width=512,$(MAIN))
OPENMP := $(call works,$(CC) -x c,-fopenmp,$(OMP_MAIN))
OPENMP_CXX := $(if $(OPENMP),$(call works,$(CXX) -x c++,-fopenmp,$(OMP_MAIN)))
CFLAGS = -std=c11 -I. -O3 $(FLOATS) $(ARCH) $(OPENMP) $(WARNINGS) $(PROCESSES)
CXXFLAGS = -std=c++17 -I. -O3 $(FLOATS) $(ARCH) $(OPENMP_CXX) $(WARNINGS) $(PROCESSES)
PRECISION = bf16
BF16_fp32 = 0
BF16_bf16 = 1
$(if $(BF16_$(PRECISION)),,$(error PRECISION=$(PRECISION): choose bf16 or fp32))
# GPU=sm_90a takes the kernels of dev/hopper*.h. A build on an H100 does not do so by itself yet: no
# card has run them since commit 2a2b8ba.
GPU = native
PRECISION_fp32 = -DBF16=0
PRECISION_bf16 = -DBF16=1 -DHOPPER=$(if $(filter sm_90a,$(GPU)),1,0)
PRECISION_profile = $(PRECISION_bf16) -DPROFILE=1
ARCH_sm_90a = -gencode=arch=compute_90a,code=sm_90a
NVCCFLAGS = -O3 -std=c++17 -I. -default-stream=per-thread $(or $(ARCH_$(GPU)),-arch=$(GPU)) \
	--Werror all-warnings -Xcompiler "$(WARNINGS) -Wno-unknown-pragmas" \
	$(PROCESSES) $(NVCC_PROCESSES)

# A waiting thread of GCC's OpenMP spins for milliseconds before it sleeps. That can cost nearly
# all speed when other programs need the cores, so it sleeps sooner. ./loopmdm sees to that itself;
# this is for the other programs here.
export GOMP_SPINCOUNT ?= 3000

# dev/tools.c includes the others.
PROGRAM = dev/tools.c loopmdm.c $(wildcard dev/*.h dev/tokenizer/*.h)

all: loopmdm

# These files change with the compiler or its options, and what depends on them is built again.
remember = @mkdir -p build && echo '$(1)' | cmp -s - $@ || echo '$(1)' >$@
build/flags: FORCE
	$(call remember,$(CC) $(CFLAGS))
build/cxx_flags: FORCE
	$(call remember,$(CXX) $(CXXFLAGS))
build/nvcc_flags: FORCE
	$(call remember,$(NVCC) $(NVCCFLAGS))
build/precision: FORCE
	$(call remember,$(PRECISION))
FORCE:

# ---- the program and its test ----

loopmdm: $(PROGRAM) build/flags
	$(CC) $(CFLAGS) $< -o $@ -lm
	@$(if $(OPENMP),,echo 'Built without OpenMP: $@ uses one thread.')
	@$(if $(filter 1,$(NCCL)),echo 'NCCL=1 is for loopmdm_cuda. On CPUs MPI=1 does it.')

build/test_loopmdm: test_loopmdm.c $(PROGRAM) build/flags
	$(CC) $(CFLAGS) $< -o $@ -lm

# A process without a library for the sanitizer is forked faster.
SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=all
build/fuzz: dev/test/fuzz.c $(PROGRAM) build/flags
	$(CC) -std=c11 -I. -O1 -g1 $(SANITIZERS) $(FLOATS) $(ARCH) $(WARNINGS) $< -o $@ -lm \
		$(call works,$(CC) -x c,$(SANITIZERS) -static-libasan,$(MAIN))

# ---- loopmdm.cu: program and test in both precisions, for the GPU and for the CPU ----

FOR_CPU = mkdir -p build && (echo '$(HASH)line 1 "$<"'; sed -E -f dev/cuda_on_cpu/launches.sed \
	-e 's|include "dev/(hopper.*)\.h"|include "build/\1_on_cpu.h"|' $<) >$@
HOPPER_ON_CPU = build/hopper_on_cpu.h build/hopper_attention_on_cpu.h
build/loopmdm_on_cpu.cpp: loopmdm.cu dev/cuda_on_cpu/launches.sed $(HOPPER_ON_CPU)
	$(FOR_CPU)
$(HOPPER_ON_CPU): build/%_on_cpu.h: dev/%.h dev/cuda_on_cpu/launches.sed
	$(FOR_CPU)

ON_CPU = $(CXX) -x c++ $(CXXFLAGS) -DBACKEND='"build/loopmdm_on_cpu.cpp"'
EMULATION = build/loopmdm_on_cpu.cpp dev/cuda_on_cpu/cuda_on_cpu.h build/cxx_flags
build/loopmdm_on_cpu_%: $(PROGRAM) $(EMULATION)
	$(ON_CPU) -DBF16=$(BF16_$*) $< -o $@
build/test_on_cpu_%: test_loopmdm.c $(PROGRAM) $(EMULATION)
	$(ON_CPU) -DBF16=$(BF16_$*) $< -o $@

ON_GPU = $(NVCC) -x cu $(NVCCFLAGS) -DBACKEND='"loopmdm.cu"'
build/loopmdm_cuda_%: $(PROGRAM) loopmdm.cu build/nvcc_flags
	$(ON_GPU) $(PRECISION_$*) $< -o $@
build/test_cuda_%: test_loopmdm.c $(PROGRAM) loopmdm.cu build/nvcc_flags
	$(ON_GPU) $(PRECISION_$*) $< -o $@

loopmdm_cuda: build/loopmdm_cuda_$(PRECISION) FORCE
	cp $< $@
loopmdm_cuda_on_cpu: build/loopmdm_on_cpu_$(PRECISION) FORCE
	cp $< $@

# ---- dev/cuda: studies of three kernels. loopmdm.c's functions say what is right ----

STUDIES = matmul attention head
.SECONDARY:
build/study_cpu.o: dev/cuda/cpu.c $(PROGRAM) build/flags
	$(CC) $(CFLAGS) -c $< -o $@

build/study_%.cpp: dev/cuda/%.cu dev/cuda_on_cpu/launches.sed
	$(FOR_CPU)

STUDY = build/study_cpu.o dev/cuda/study.h $(PROGRAM) loopmdm.cu build/precision
# -O1: they take a second to run, but with -O3 fourteen to compile.
build/study_%_on_cpu: build/study_%.cpp $(STUDY) $(EMULATION)
	$(CXX) $(CXXFLAGS) -O1 -DBACKEND='"build/loopmdm_on_cpu.cpp"' -DBF16=$(BF16_$(PRECISION)) $< \
		build/study_cpu.o -o $@ -lm
build/study_%_cuda: dev/cuda/%.cu $(STUDY) build/nvcc_flags
	$(NVCC) $(NVCCFLAGS) $(if $(OPENMP),-Xcompiler $(OPENMP)) -DBACKEND='"loopmdm.cu"' \
		$(PRECISION_$(PRECISION)) $< build/study_cpu.o -o $@

studies: $(STUDIES:%=build/study_%_on_cpu)
	for study in $(STUDIES); do build/study_$${study}_on_cpu || exit 1; done
studies_cuda: $(STUDIES:%=build/study_%_cuda)
	for study in $(STUDIES); do build/study_$${study}_cuda || exit 1; done

# ---- make train. It goes on where an interrupted one stopped; make clean begins anew ----

build/stories build/arithmetic build/sudoku: build/%: dev/data/%.c dev/data/generator.h
	@mkdir -p build
	$(CC) -std=c11 -O2 $(WARNINGS) $< -o $@

TOKENIZER = dev/data/stories.tok
STORIES = build/stories_train.bin build/stories_val.bin
SEED = $(if $(filter val,$*),2,1)
STORIES_train = 100000
STORIES_more = 800000
STORIES_val = 4200

build/stories_%.bin: build/stories $(TOKENIZER) | loopmdm
	build/stories --seed $(SEED) --count $(STORIES_$*) --output build/stories_$*.txt
	./loopmdm tokenize --tokenizer $(TOKENIZER) --rows-of 96 \
		--input build/stories_$*.txt --output $@

TRAIN = --fixed-rows --layers 4 --channels 64 --heads 4 --seq-len 96 --loop 1:3 --max-loops 4 \
	--batch 8 --steps 5000 --lr 5e-3 --warmup 400 --val-every 1000
FILL = 'Kate had a small ____ to eat in the field. Then Tom came ____, but he had nothing to ____.'
train: loopmdm $(STORIES)
	./loopmdm train --data build/stories_train.bin --val-data build/stories_val.bin \
		--tokenizer $(TOKENIZER) --out build/run $(TRAIN) \
		$(if $(wildcard build/run/state.bin),--resume)
	./loopmdm eval --model build/run --data build/stories_val.bin --loops 1,2,3,4,6,8 --rows 1024
	./loopmdm sample --model build/run -n 3 --steps 96 --temperature 0.7 --block 8
	./loopmdm sample --model build/run --fill $(FILL) --temperature 0

# ---- dev/models: trained models, and dev/demo: what they can do ----

HARD = ....8..6...367.4.86..1.3.57..8.5..311........5....29..3.4..7..................142
demo: loopmdm
	@echo 'Three stories, from nothing but masks:'
	./loopmdm sample --model dev/models/stories -n 3 --steps 96 --temperature 0.7 --block 8 \
		--order margin --seed 9
	@echo 'A text with blanks, filled in step by step:'
	./loopmdm sample --model dev/models/stories --fill $(FILL) --temperature 0 --watch
	@echo 'A hard Sudoku in four denoising steps: what the model sees after each loop of each step:'
	./loopmdm sample --model dev/models/sudoku --puzzle $(HARD) --temperature 0 --steps 4 \
		--loops 12 --watch --show-loops

# What they were trained with: dev/models/README.md. IN=bf16 is faster where the CPU has it.
models: loopmdm build/stories_more.bin build/sudoku9_train.bin
	./loopmdm train --data build/stories_more.bin --tokenizer $(TOKENIZER) \
		--out build/stories_run $(STORY) $(if $(IN),--precision $(IN)) \
		$(if $(wildcard build/stories_run/state.bin),--resume)
	./loopmdm train --data build/sudoku9_train.bin --tokenizer build/sudoku9_train.tok \
		--out build/sudoku9_run $(SUDOKU) $(if $(IN),--precision $(IN)) \
		$(if $(wildcard build/sudoku9_run/state.bin),--resume)
	cp build/stories_run/model.bin build/stories_run/tokenizer.bin dev/models/stories
	cp build/sudoku9_run/model.bin build/sudoku9_run/tokenizer.bin dev/models/sudoku
STORY = --fixed-rows --layers 4 --channels 76 --heads 2 --seq-len 96 --loop 1:3 --max-loops 4 \
	--batch 16 --steps 32000 --lr 2e-3 --warmup 1000 --noise-warmup 16000 --ema 0.999 \
	--floor 0.01
SUDOKU = --fixed-rows --layers 3 --channels 96 --heads 4 --seq-len 81 --loop 1:3 --max-loops 8 \
	--batch 32 --steps 25000 --lr 2e-3 --warmup 1000 --ema 0.999 --floor 0.01

# wasm32-wasi is a system with files and no more, and of its files the page has none. clang would
# keep thread-local variables if bulk-memory was on, and then it needs threads.
web: dev/demo/web/loopmdm.wasm
	for model in stories sudoku; do mkdir -p dev/demo/web/models/$$model; \
		cp dev/models/$$model/model.bin dev/models/$$model/tokenizer.bin \
			dev/demo/web/models/$$model || exit 1; done
dev/demo/web/loopmdm.wasm: dev/demo/web/web.c $(PROGRAM)
	clang --target=wasm32-wasi --sysroot=/usr -mexec-model=reactor -std=c11 -O3 -msimd128 \
		$(WARNINGS) -Wno-unused-function -D_WASI_EMULATED_MMAN -I. \
		-Wl,--export=malloc,--export=free,--strip-debug $< -o $@

# ---- checks ----

check: loopmdm build/test_loopmdm
	build/test_loopmdm ./loopmdm dev/reference/*.bin

style:
	python3 dev/test/style.py

# With a Python that has all of dev/requirements.txt already: make -o .venv/ready PYTHON=python3 ..
PYTHON = .venv/bin/python
.venv/ready: dev/requirements.txt
	python3 -m venv .venv || { echo 'make test needs python3 with its venv module' \
		'(on Debian: apt install python3-venv)'; exit 1; }
	.venv/bin/pip install -q -r dev/requirements.txt
	touch $@

BOTH = $(1)_fp32 $(1)_bf16
TEST_ON_CPU = $(call BOTH,build/loopmdm_on_cpu) $(call BOTH,build/test_on_cpu) \
	$(STUDIES:%=build/study_%_on_cpu)
TOOLS = CC='$(CC)' CXX='$(CXX)' NVCC='$(NVCC)' ARCH='$(ARCH)' OPENMP='$(OPENMP)'

test_cuda: loopmdm $(call BOTH,build/loopmdm_cuda) $(call BOTH,build/test_cuda) $(STORIES)
	$(TOOLS) bash dev/test/test_cuda.sh cuda
test_cuda_on_cpu: loopmdm $(TEST_ON_CPU) $(STORIES)
	$(TOOLS) bash dev/test/test_cuda.sh on_cpu

test:
	$(MAKE) -j2 .venv/ready loopmdm build/test_loopmdm build/arithmetic build/sudoku \
		$(TEST_ON_CPU) $(EXPERIMENT_DATA)
	$(TOOLS) bash dev/test/test.sh

# ---- dev/bench: where the time of a step goes, and what bench.py cannot time from outside ----

# Small functions are not timed: the hooks would take longer than they do.
SMALL = exp_and_sum,gelu_,_int,random_,noise_level,sequences,seconds,omp_fn
build/profile: dev/bench/profile.c $(PROGRAM) build/flags
	$(CC) $(CFLAGS) -finstrument-functions -finstrument-functions-exclude-file-list=dev/gemm \
		-finstrument-functions-exclude-function-list=$(SMALL) $< -o $@ -lm
build/profile.so: dev/bench/profile.c $(PROGRAM) build/flags
	$(CC) $(CFLAGS) -shared -fPIC $< -o $@ -lm

bench: .venv/ready loopmdm build/profile build/profile.so
	$(if $(filter 1,$(QUICK)),$(PYTHON) dev/bench/bench.py --suite --turns 2 --steps 2, \
		build/profile && $(PYTHON) dev/bench/bench.py \
		matmul train forward sample memory scaling --suite --csv dev/results/bench_cpu.csv)

# ---- dev/experiments: does looping pay? In order; each goes on where it was interrupted ----

EXPERIMENTS = flops where loops noise_levels few_steps adaptive attention distributions copying \
	recipes chains stopping text noise_warmup
EXPERIMENT_DATA = $(STORIES) build/sudoku_train.bin build/sudoku_val.bin build/puzzles10.bin \
	build/templates.txt build/problems_train.bin build/problems_val.bin \
	build/rule30_train.bin build/rule30_val.bin build/sudoku9_train.bin build/sudoku9_val.bin \
	build/puzzles9_46.bin build/puzzles9_36.bin build/puzzles9_30.bin build/puzzles9_26.bin \
	$(if $(TINYSTORIES),build/tinystories512/train.bin build/tinystories1024/train.bin \
		build/tinystories4096/train.bin)
experiments: .venv/ready loopmdm $(EXPERIMENT_DATA)
	for name in $(EXPERIMENTS); do $(PYTHON) dev/experiments/$$name.py \
		$(if $(filter 1,$(QUICK)),--quick) $(if $(PUZZLES),--puzzles $(PUZZLES)) || exit 1; done

build/sudoku_%.bin: build/sudoku
	build/sudoku --size 6 --seed $(SEED) --count $(if $(filter train,$*),300000,16384) \
		--output $@ --tokenizer build/sudoku_$*.tok
build/puzzles10.bin: build/sudoku
	build/sudoku --size 6 --givens 10 --seed 2 --count 1000 --output $@
build/sudoku9_%.bin: build/sudoku
	build/sudoku --size 9 --seed $(SEED) --count $(if $(filter train,$*),1000000,4096) \
		--output $@ --tokenizer build/sudoku9_$*.tok
build/puzzles9_%.bin: build/sudoku
	build/sudoku --size 9 --givens $* --seed 2 --count 1000 --output $@
build/rule30_%.bin: dev/data/rule30.py | .venv/ready
	$(PYTHON) dev/data/rule30.py --seed $(SEED) --output $@ --tokenizer build/rule30_$*.tok \
		$(if $(filter train,$*),--count 150000,--count 2048 --test)
build/templates.txt: build/stories
	build/stories --seed 3 --count 1000 --output build/templates_answers.txt
	build/stories --seed 3 --count 1000 --templates --output $@
# Problems of one, two and three calculations, each kind in a file of its own, and all of them.
build/problems_%.bin: build/arithmetic dev/data/arithmetic.tok | loopmdm
	for k in 1 2 3; do build/arithmetic --steps $$k --largest 20 --seed $(SEED) \
		--count $(if $(filter train,$*),100000,1000) \
		--output build/problems$${k}_$*.txt || exit 1; done
	cat build/problems[123]_$*.txt >build/problems_$*.txt
	for k in 1 2 3 ''; do ./loopmdm tokenize --tokenizer dev/data/arithmetic.tok --rows-of 96 \
		--input build/problems$${k}_$*.txt --output build/problems$${k}_$*.bin || exit 1; done
build/tinystories%/train.bin: $(TINYSTORIES) | .venv/ready
	$(PYTHON) dev/data/tinystories.py --input $(TINYSTORIES) --shuffle 1 --vocab $* \
		--out $(@D)

clean:
	rm -rf build loopmdm loopmdm_cuda loopmdm_cuda_on_cpu

.PHONY: all train demo models web check style test test_cuda test_cuda_on_cpu studies \
	studies_cuda bench experiments clean FORCE
