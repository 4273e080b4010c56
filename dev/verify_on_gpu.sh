#!/usr/bin/env bash
# Builds, checks and measures everything on a GPU, the most valuable first: made for a machine that
# is rented for minutes. From the root of the repository:
#
#     bash dev/verify_on_gpu.sh
#
# It needs nvcc and no network. PyTorch (PYTHON=python3) and compute-sanitizer are used where they
# are. The results go into OUT (dev/results), as they come: gpu_NAME.txt is a table and every FAIL,
# gpu_NAME_logs.tar.gz has all that was printed. After LIMIT seconds (480) it does no more, and says
# what is missing. If a layer is wrong it ends at once: a wrong kernel's speed says nothing.
# COMMIT=... names the commit where there is no git. Status 1: something failed.
set -uo pipefail
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$name" ] || { echo "no GPU: nvidia-smi names none"; exit 1; }
: "${OUT:=dev/results}" "${LIMIT:=480}" "${PYTHON:=python3}" "${NVCC:=nvcc}"
: "${COMMIT:=$(git rev-parse --short HEAD 2>/dev/null)}"
export PYTHON
large=build/test/large
# Checkpoints of d12 have gigabytes. They go into memory where there are 16 GiB of it.
fast=${TMPDIR:-/tmp}
[ "$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 16777216 ] 2>/dev/null &&
    fast=/dev/shm
fast=$(mktemp -d -p "$fast")
result=$OUT/gpu_$(echo "$name" | tr -c 'A-Za-z0-9\n' '_')
logs=build/test/gpu_logs
rm -rf $logs $large
mkdir -p "$OUT" $logs
failed=0

say() { echo "$@" | tee -a "$result.txt"; }

# step SECONDS NAME WORDS COMMAND...: runs a command for so many seconds at most. Of what it prints
# the lines with one of the WORDS, a regular expression, go into the table.
step() {
    local limit=$1 title=$2 words=$3 began=$SECONDS code left=$((LIMIT - SECONDS))
    shift 3
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        say "---- $title: no time is left"
        failed=1
        return
    fi
    timeout -k 5 "$limit" "$@" >"$logs/$title.log" 2>&1
    code=$?
    say "---- $title ($((SECONDS - began)) s)"
    grep -aE "$words" "$logs/$title.log" | tee -a "$result.txt"
    if [ $code -ne 0 ]; then
        say "FAIL  $title ended with status $code"
        failed=1
    fi
    tar -czf "${result}_logs.tar.gz" -C build/test gpu_logs
}

# Two runs give the same bits.
digests() {
    local precision
    for precision in fp32 bf16; do
        build/test_cuda_$precision --digest >$logs/digest_$precision
        build/test_cuda_$precision --digest | cmp - $logs/digest_$precision || return 1
        echo "$precision: digest $(cksum <$logs/digest_$precision)"
    done
}

layers() {
    local code
    build/test_cuda_fp32 --layers
    code=$?
    build/test_cuda_bf16 --layers && return $code
}

end() {
    say "---- $SECONDS s in all; $(grep -c '^FAIL' "$result.txt") failures"
    grep '^FAIL' "$result.txt"
    exit $failed
}

trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$fast"' EXIT
export -f digests layers
export logs
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
echo "$name, driver $driver, $($NVCC --version | grep -o 'release [0-9.]*'), commit $COMMIT" |
    tee "$result.txt"
if $PYTHON -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    torch=1
    # A driver without a client is loaded anew by each program, which takes seconds.
    $PYTHON -c 'import time, torch; torch.zeros(1, device="cuda"); time.sleep(3600)' &
    $PYTHON dev/reference/dump.py --large --out $large >$logs/dump.log 2>&1 &
    dump=$!
else
    torch=0
    say "no PyTorch with CUDA in $PYTHON: no speeds beside it, no large reference files"
fi

gpu=native # or with the kernels of dev/hopper*.h
[ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)" = 9.0 ] && gpu=sm_90a
# C75..: ptxas says that products of wgmma will wait for each other, or that setmaxnreg is ignored
step 150 build 'error|warning|C75' make -j"$(nproc)" WARNINGS= GPU=$gpu loopmdm \
    build/{loopmdm,test}_cuda_{fp32,bf16} build/loopmdm_cuda_profile \
    build/study_{matmul,attention,head}_cuda \
    build/stories_{train,val}.bin
step 30 layers 'passed|FAIL' bash -c layers
grep -q '^FAIL  layers' "$result.txt" && end
step 30 digests digest bash -c digests
step 60 profile '^(matmul|[a-z_]+ )|launches|step' env CUDA_MODULE_LOADING=EAGER \
    build/loopmdm_cuda_profile train --data build/stories_train.bin --vocab 50257 --model d12 \
    --batch 16 --max-loops 1 --steps 6 --out $fast/profile
if [ $torch = 1 ]; then
    step 30 libraries . $PYTHON dev/bench/libraries.py $logs/profile.log --batch 16 \
        --seq-len 1024 --heads 12 --channels 768
    # Models go into $fast. torch.compile makes programs, and not every /dev/shm may run any.
    bench="env TMPDIR=$fast TORCHINDUCTOR_CACHE_DIR=$PWD/build/test/inductor
        $PYTHON dev/bench/bench.py --device cuda"
    step 60 d6 '^(train|d6)' $bench
    step 90 d12 '^(train|d12)' $bench --model d12 \
        --vocab 50257 --batch 16 --steps 10 --turns 2
    step 90 d12_padded '^(train|d12)' $bench --model d12 \
        --vocab 50304 --batch 16 --steps 10 --turns 2
    for model in nano d2; do
        step 60 $model '^(train|nano|d2)' $bench --model $model
    done
    wait $dump && export LARGE=$large # for the tests
fi
step 150 tests 'passed|FAIL' bash dev/test/test_cuda.sh cuda
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step 40 $tool 'ERROR SUMMARY|RACECHECK SUMMARY' \
            compute-sanitizer --tool $tool --error-exitcode 1 build/test_cuda_bf16 --digest
        # Passes that are replayed as graphs
        step 40 ${tool}_graphs 'ERROR SUMMARY|RACECHECK SUMMARY' \
            compute-sanitizer --tool $tool --error-exitcode 1 build/loopmdm_cuda_bf16 train \
            --data build/stories_train.bin --vocab 703 --model d2 --max-loops 3 --batch 4 \
            --steps 8 --out $fast/graphs
    done
else
    say "no compute-sanitizer"
fi
if [ $torch = 1 ]; then # last, since its compilation takes longest
    for model in nano d2; do
        step 60 ${model}_graphs '^(train|nano|d2)' $bench --model $model --cuda-graphs
    done
fi
step 60 studies '.' make WARNINGS= GPU=$gpu studies_cuda
end
