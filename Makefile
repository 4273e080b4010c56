# make          builds loopmdm (and finds out what the compiler can do)
# make train    builds, writes stories, trains, evaluates, samples: about 3 minutes on 2 cores, cc and make alone
# make check    checks the C program against the reference files in the repository: cc alone
# make test     every check, with PyTorch and Hugging Face tokenizers, which it installs into .venv
# make clean    removes what was built, the trained model too
#
# OPENMP= builds for one thread; ARCH= builds for any CPU of this kind, not just this one.

CC ?= cc
WARNINGS = -Wall -Wextra -Werror
# -ffp-contract=fast joins a*b+c into one instruction; the other two let square roots and comparisons be vectorized.
OPTIMIZE = -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math
HASH := \#
works = $(shell mkdir -p build && echo '$(2) int main(void) { return 0; }' | tr '@' '\n' | $(CC) -x c $(1) -o build/probe - >build/probe.log 2>&1 && echo $(1))
ARCH := $(call works,-march=native,)
OPENMP := $(call works,-fopenmp,$(HASH)include <omp.h>@)
CFLAGS = -std=c11 $(OPTIMIZE) $(ARCH) $(OPENMP) $(WARNINGS)

# A waiting thread of GCC's OpenMP spins for milliseconds before it sleeps. On a machine with other work to do that can cost nearly
# all the speed, so it sleeps sooner; nothing is lost on an idle one.
export GOMP_SPINCOUNT ?= 3000

all: loopmdm

# Built again when the compiler or its options change.
build/flags: FORCE
	@mkdir -p build && echo '$(CC) $(CFLAGS)' | cmp -s - $@ || echo '$(CC) $(CFLAGS)' >$@
FORCE:

loopmdm: loopmdm.c dev/data/unicode.h build/flags
	$(CC) $(CFLAGS) $< -o $@ -lm

build/stories: dev/data/stories.c
	mkdir -p build
	$(CC) -std=c11 -O2 $(WARNINGS) $< -o $@

build/test_loopmdm: test_loopmdm.c loopmdm.c dev/data/unicode.h build/flags
	$(CC) $(CFLAGS) $< -o $@ -lm

# The main job. It continues where an interrupted one stopped; make clean begins anew.
TOKENIZER = dev/data/stories.tok
STORIES = build/stories_train.bin build/stories_val.bin

build/stories_%.bin: build/stories $(TOKENIZER) | loopmdm
	build/stories --seed $(if $(filter train,$*),1,2) --count $(if $(filter train,$*),40000,1000) --output build/stories_$*.txt
	./loopmdm tokenize --tokenizer $(TOKENIZER) --input build/stories_$*.txt --output $@

TRAIN = --layers 4 --channels 64 --heads 4 --seq-len 96 --loop 1:3 --max-loops 4 --batch 4 --steps 10000 --lr 3e-3 --warmup 300 --clip 0.5 \
	--weight-decay 0.01 --val-every 2000 --save-every 1000
FILL = 'Lily had a blue ____ and played with it every day. One day, she could not ____ it. She looked under the ____, but it was not ____.'
train: loopmdm $(STORIES)
	./loopmdm train --data build/stories_train.bin --val-data build/stories_val.bin --tokenizer $(TOKENIZER) --out build/run \
		$(TRAIN) $(if $(wildcard build/run/model.bin),--resume)
	./loopmdm eval --model build/run --data build/stories_val.bin --loops 1,2,3,4,6,8
	./loopmdm sample --model build/run -n 3 --steps 96 --temperature 0.7
	./loopmdm sample --model build/run --fill $(FILL) --temperature 0

check: loopmdm build/test_loopmdm
	build/test_loopmdm ./loopmdm dev/reference/*.bin

.venv/ready: dev/requirements.txt
	python3 -m venv .venv || { echo 'make test needs python3 with its venv module (on Debian: apt install python3-venv)'; exit 1; }
	.venv/bin/pip install -q -r dev/requirements.txt
	touch $@

test: loopmdm build/test_loopmdm $(STORIES) .venv/ready
	CC='$(CC)' ARCH='$(ARCH)' OPENMP='$(OPENMP)' bash dev/test.sh

clean:
	rm -rf build loopmdm

.PHONY: all train check test clean FORCE
