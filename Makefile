# make          builds loopmdm (and finds out what the compiler can do)
# make train    builds, writes stories, trains, evaluates, samples: 2 to 4 minutes on 2 cores, cc and make alone
# make check    checks the C program against the reference files in the repository: cc alone
# make test     every check, with PyTorch and Hugging Face tokenizers, which it installs into .venv
# make experiments  what looping gains, with tables and plots (dev/experiments): hours; QUICK=1 shows in a minute that they work; TINYSTORIES=FILE adds real text
# make bench    speed and memory beside PyTorch: an hour and more (dev/bench)
# make clean    removes what was built, the trained model too
#
# make loopmdm_cuda         builds loopmdm.cu for this machine's GPU with nvcc; PRECISION=fp32 for verification (bf16 if not said)
# make loopmdm_cuda_on_cpu  builds loopmdm.cu with a C++ compiler, its kernels running on the CPU (dev/cuda_on_cpu.h)
# make test_cuda            checks loopmdm.cu on a GPU;  make test_cuda_on_cpu  anywhere, and more closely, a part of make test
# make studies              dev/cuda: kernels from naive to fast, checked on the CPU emulation;  make studies_cuda  and measured on a GPU
#
# OPENMP= builds for one thread; ARCH= builds for any CPU of this kind, not just this one; GPU=sm_90 for another GPU than this one.

CC ?= cc
CXX ?= g++
NVCC ?= nvcc
WARNINGS = -Wall -Wextra -Werror
# -ffp-contract=fast joins a*b+c into one instruction; the other two let square roots and comparisons be vectorized.
OPTIMIZE = -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math
HASH := \#
works = $(shell mkdir -p build && echo '$(2) int main(void) { return 0; }' | tr '@' '\n' | $(CC) -x c $(1) -o build/probe - >build/probe.log 2>&1 && echo $(1))
ARCH := $(call works,-march=native,)
OPENMP := $(call works,-fopenmp,$(HASH)include <omp.h>@)
CFLAGS = -std=c11 $(OPTIMIZE) $(ARCH) $(OPENMP) $(WARNINGS)
CXXFLAGS = -std=c++17 -I. $(OPTIMIZE) $(ARCH) $(OPENMP) $(WARNINGS)
PRECISION = bf16
BF16_fp32 = 0
BF16_bf16 = 1
$(if $(BF16_$(PRECISION)),,$(error PRECISION=$(PRECISION): choose bf16 or fp32))
GPU = native
NVCCFLAGS = -O3 -std=c++17 -I. -arch=$(GPU) --Werror all-warnings -Xcompiler "$(WARNINGS) -Wno-unknown-pragmas"

# A waiting thread of GCC's OpenMP spins for milliseconds before it sleeps. On a machine with other work to do that can cost nearly
# all the speed, so it sleeps sooner; nothing is lost on an idle one.
export GOMP_SPINCOUNT ?= 3000

HEADERS = dev/analysis.h dev/watch.h dev/data/tokenizer.h dev/data/unicode.h

all: loopmdm

# Built again when the compiler or its options change.
build/flags: FORCE
	@mkdir -p build && echo '$(CC) $(CFLAGS)' | cmp -s - $@ || echo '$(CC) $(CFLAGS)' >$@
build/cxx_flags: FORCE
	@mkdir -p build && echo '$(CXX) $(CXXFLAGS)' | cmp -s - $@ || echo '$(CXX) $(CXXFLAGS)' >$@
build/precision: FORCE
	@mkdir -p build && echo '$(PRECISION)' | cmp -s - $@ || echo '$(PRECISION)' >$@
build/nvcc_flags: FORCE
	@mkdir -p build && echo '$(NVCC) $(NVCCFLAGS)' | cmp -s - $@ || echo '$(NVCC) $(NVCCFLAGS)' >$@
FORCE:

loopmdm: loopmdm.c $(HEADERS) build/flags
	$(CC) $(CFLAGS) $< -o $@ -lm

# loopmdm.cu: program and test, in both precisions, for the GPU and for the CPU. sed turns launches into calls; see dev/cuda_on_cpu.h.
SOURCES = loopmdm.cu loopmdm.c $(HEADERS)
PREPARE = (echo '$(HASH)line 1 "$<"'; grep '^        s/' dev/cuda_on_cpu.h | sed -E -f /dev/stdin $<) >$@
build/loopmdm_on_cpu.cpp: loopmdm.cu dev/cuda_on_cpu.h
	@mkdir -p build
	$(PREPARE)

build/loopmdm_on_cpu_%: build/loopmdm_on_cpu.cpp $(SOURCES) build/cxx_flags
	$(CXX) $(CXXFLAGS) -DBF16=$(BF16_$*) $< -o $@

build/test_on_cpu_%: test_loopmdm.c build/loopmdm_on_cpu.cpp $(SOURCES) build/cxx_flags
	$(CXX) -x c++ $(CXXFLAGS) -DBF16=$(BF16_$*) -DTEST_CUDA='"build/loopmdm_on_cpu.cpp"' $< -o $@

build/loopmdm_cuda_%: $(SOURCES) build/nvcc_flags
	$(NVCC) $(NVCCFLAGS) -DBF16=$(BF16_$*) $< -o $@

build/test_cuda_%: test_loopmdm.c $(SOURCES) build/nvcc_flags
	$(NVCC) -x cu $(NVCCFLAGS) -DBF16=$(BF16_$*) -DTEST_CUDA='"loopmdm.cu"' $< -o $@

# dev/cuda: studies of three kernels; loopmdm.c's functions say what is right
STUDIES = matmul attention head
.SECONDARY:
build/study_cpu.o: dev/cuda/cpu.c loopmdm.c $(HEADERS) build/flags
	$(CC) $(CFLAGS) -c $< -o $@

build/study_%.cpp: dev/cuda/%.cu dev/cuda_on_cpu.h
	@mkdir -p build
	$(PREPARE)

build/study_%_on_cpu: build/study_%.cpp build/study_cpu.o build/loopmdm_on_cpu.cpp dev/cuda/study.h $(SOURCES) build/cxx_flags build/precision
	$(CXX) $(CXXFLAGS) -Idev/cuda -DBF16=$(BF16_$(PRECISION)) -DLOOPMDM_PREPARED='"build/loopmdm_on_cpu.cpp"' $< build/study_cpu.o -o $@ -lm

build/study_%_cuda: dev/cuda/%.cu build/study_cpu.o dev/cuda/study.h $(SOURCES) build/nvcc_flags build/precision
	$(NVCC) $(NVCCFLAGS) $(if $(OPENMP),-Xcompiler $(OPENMP)) -DBF16=$(BF16_$(PRECISION)) $< build/study_cpu.o -o $@

studies: $(STUDIES:%=build/study_%_on_cpu)
	for study in $(STUDIES); do build/study_$${study}_on_cpu || exit 1; done

studies_cuda: $(STUDIES:%=build/study_%_cuda)
	for study in $(STUDIES); do build/study_$${study}_cuda || exit 1; done

loopmdm_cuda: build/loopmdm_cuda_$(PRECISION) FORCE
	cp $< $@

loopmdm_cuda_on_cpu: build/loopmdm_on_cpu_$(PRECISION) FORCE
	cp $< $@

build/stories build/arithmetic build/sudoku: build/%: dev/data/%.c dev/data/generator.h
	mkdir -p build
	$(CC) -std=c11 -O2 $(WARNINGS) $< -o $@

build/test_loopmdm: test_loopmdm.c loopmdm.c $(HEADERS) build/flags
	$(CC) $(CFLAGS) $< -o $@ -lm

# The main job. It continues where an interrupted one stopped; make clean begins anew.
TOKENIZER = dev/data/stories.tok
STORIES = build/stories_train.bin build/stories_val.bin

build/stories_%.bin: build/stories $(TOKENIZER) | loopmdm
	build/stories --seed $(if $(filter train,$*),1,2) --count $(if $(filter train,$*),100000,4200) --output build/stories_$*.txt
	./loopmdm tokenize --tokenizer $(TOKENIZER) --rows-of 96 --input build/stories_$*.txt --output $@

TRAIN = --fixed-rows --layers 4 --channels 64 --heads 4 --seq-len 96 --loop 1:3 --max-loops 4 --batch 4 --steps 10000 --lr 3e-3 --warmup 300 \
	--clip 0.5 --weight-decay 0.01 --val-every 2000 --save-every 1000
FILL = 'Lily had a blue ____ and played with it every day. One day, she could not ____ it. She looked under the ____, but it was not ____.'
train: loopmdm $(STORIES)
	./loopmdm train --data build/stories_train.bin --val-data build/stories_val.bin --tokenizer $(TOKENIZER) --out build/run \
		$(TRAIN) $(if $(wildcard build/run/model.bin),--resume)
	./loopmdm eval --model build/run --data build/stories_val.bin --loops 1,2,3,4,6,8 --rows 1024
	./loopmdm sample --model build/run -n 3 --steps 96 --temperature 0.7 --block 8
	./loopmdm sample --model build/run --fill $(FILL) --temperature 0

check: loopmdm build/test_loopmdm
	build/test_loopmdm ./loopmdm dev/reference/*.bin

.venv/ready: dev/requirements.txt
	python3 -m venv .venv || { echo 'make test needs python3 with its venv module (on Debian: apt install python3-venv)'; exit 1; }
	.venv/bin/pip install -q -r dev/requirements.txt
	touch $@

PAIR = $(1)_fp32 $(1)_bf16
ON_CPU = $(call PAIR,build/loopmdm_on_cpu) $(call PAIR,build/test_on_cpu)
ON_GPU = $(call PAIR,build/loopmdm_cuda) $(call PAIR,build/test_cuda)
test_cuda: loopmdm $(ON_GPU) $(STORIES)
	bash dev/test_cuda.sh cuda

test_cuda_on_cpu: loopmdm $(ON_CPU) $(STUDIES:%=build/study_%_on_cpu) $(STORIES)
	CXX='$(CXX)' NVCC='$(NVCC)' ARCH='$(ARCH)' OPENMP='$(OPENMP)' bash dev/test_cuda.sh on_cpu

test:
	$(MAKE) -j2 .venv/ready loopmdm build/test_loopmdm build/arithmetic build/sudoku $(ON_CPU) $(STUDIES:%=build/study_%_on_cpu) $(EXPERIMENT_DATA)
	CC='$(CC)' CXX='$(CXX)' NVCC='$(NVCC)' ARCH='$(ARCH)' OPENMP='$(OPENMP)' bash dev/test.sh

# dev/bench: where the time of a step goes (a program), and what bench.py cannot time from outside (the same file as a library)
HELPERS = gemm,exp_fast,largest_of,scratch,_int,random,mix64,noise_level,becomes_mask,tensor,seconds,pass_acts,pass_input,data_row,data_given,float_order,omp_fn
build/profile: dev/bench/profile.c loopmdm.c $(HEADERS) build/flags
	$(CC) $(CFLAGS) -finstrument-functions -finstrument-functions-exclude-function-list=$(HELPERS) $< -o $@ -lm

build/profile.so: dev/bench/profile.c loopmdm.c $(HEADERS) build/flags
	$(CC) $(CFLAGS) -shared -fPIC $< -o $@ -lm

bench: .venv/ready loopmdm build/profile build/profile.so
	build/profile
	.venv/bin/python dev/bench/bench.py matmul train forward sample memory scaling --suite --loops 1,4,8 --compile --csv dev/results/bench_cpu.csv

# dev/experiments: does looping pay? In order; each goes on where it was interrupted. QUICK=1 shows that each works.
EXPERIMENTS = flops where loops noise_levels few_steps adaptive attention answers distributions copying
EXPERIMENT_DATA = $(STORIES) build/sudoku_train.bin build/sudoku_val.bin build/puzzles10.bin build/templates.txt build/problems1_train.bin build/problems1_val.bin \
	$(if $(TINYSTORIES),build/tinystories/train.bin)
experiments: .venv/ready loopmdm $(EXPERIMENT_DATA)
	for name in $(EXPERIMENTS); do .venv/bin/python dev/experiments/$$name.py $(if $(filter 1,$(QUICK)),--quick) || exit 1; done

build/sudoku_%.bin: build/sudoku
	build/sudoku --size 6 --seed $(if $(filter train,$*),1,2) --count $(if $(filter train,$*),300000,16384) --output $@ --tokenizer build/sudoku_$*.tok

build/puzzles10.bin: build/sudoku
	build/sudoku --size 6 --givens 10 --seed 2 --count 1000 --output $@

build/templates.txt: build/stories
	build/stories --seed 3 --count 1000 --output build/templates_answers.txt
	build/stories --seed 3 --count 1000 --templates --output $@

build/tinystories/train.bin: $(TINYSTORIES) | .venv/ready
	.venv/bin/python dev/data/tinystories.py --input $(TINYSTORIES) --vocab 512 --out build/tinystories

build/problems1_%.bin: build/arithmetic dev/data/arithmetic.tok | loopmdm
	build/arithmetic --steps 1 --largest 20 --seed $(if $(filter train,$*),1,2) --count $(if $(filter train,$*),100000,1000) --output build/problems1_$*.txt
	./loopmdm tokenize --tokenizer dev/data/arithmetic.tok --rows-of 72 --input build/problems1_$*.txt --output $@

clean:
	rm -rf build loopmdm loopmdm_cuda loopmdm_cuda_on_cpu

.PHONY: all train check bench experiments test test_cuda test_cuda_on_cpu studies studies_cuda clean FORCE
