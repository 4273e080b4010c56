#!/usr/bin/env bash
# For a machine with a GPU. It builds for it, runs every test, compute-sanitizer, training of d6 and
# d12, the kernel studies, and whole steps beside PyTorch's. All results go into
# dev/results/gpu_NAME.txt. From the root of the repository; within 8 minutes. compute-sanitizer and
# PyTorch (PYTHON=...) are used where they are installed.
set -uo pipefail
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$name" ] || { echo "no GPU: nvidia-smi names none"; exit 1; }
export PYTHON=${PYTHON:-python3}
result=dev/results/gpu_$(echo "$name" | tr -c 'A-Za-z0-9\n' '_').txt
mkdir -p dev/results build/test
began=$SECONDS status=0

# step SECONDS NAME LINES COMMAND...: runs a command for so many seconds at most. Its last LINES
# lines go into the result.
step() {
    local limit=$1 title=$2 lines=$3 code left=$((470 - SECONDS + began))
    shift 3
    [ "$left" -lt "$limit" ] && limit=$left
    echo "---- $title"
    if [ "$limit" -le 5 ]; then
        echo "no time is left for this"
        status=1
        return
    fi
    timeout "$limit" "$@" >build/test/gpu_step.log 2>&1
    code=$?
    tail -n "$lines" build/test/gpu_step.log
    [ $code -eq 0 ] || { echo "ended with status $code"; status=1; }
}

all() {
    local driver release commit tool
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
    release=$(${NVCC:-nvcc} --version | grep -o 'release [0-9.]*')
    commit=$(git rev-parse --short HEAD 2>/dev/null)
    echo "$name, driver $driver, $release, commit $commit"
    step 150 "build" 1 make -j"$(nproc)" loopmdm build/{loopmdm,test}_cuda_{fp32,bf16} \
        build/study_{matmul,attention,head}_cuda build/stories_{train,val}.bin
    step 120 "tests" 90 make test_cuda
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            step 40 "compute-sanitizer $tool" 3 \
                compute-sanitizer --tool $tool --error-exitcode 1 build/test_cuda_bf16 --digest
        done
    else
        echo "---- no compute-sanitizer"
    fi

    rm -rf build/test/gpu_run
    local data="--data build/stories_train.bin --tokenizer dev/data/stories.tok"
    data+=" --val-data build/stories_val.bin --val-rows 64"
    step 40 "d6: 200 steps" 4 build/loopmdm_cuda_bf16 train $data --model d6 --batch 64 \
        --steps 200 --warmup 50 --out build/test/gpu_run/d6
    step 60 "d12: 30 steps" 4 build/loopmdm_cuda_bf16 train $data --model d12 --batch 8 \
        --accum 1 --ema 0 --steps 30 --warmup 10 --loops 1,12 --out build/test/gpu_run/d12
    step 60 "kernel studies" 60 make studies_cuda
    if $PYTHON -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        step 100 "d6 beside PyTorch" 4 $PYTHON dev/bench/bench.py --device cuda
        step 140 "d12 beside PyTorch" 4 $PYTHON dev/bench/bench.py --device cuda \
            --model d12 --vocab 50257 --batch 8 --steps 10 --turns 2
    else
        echo "---- no PyTorch with CUDA"
    fi
    echo "---- $((SECONDS - began)) s in all"
    return $status
}
all | tee "$result"
exit "${PIPESTATUS[0]}"
