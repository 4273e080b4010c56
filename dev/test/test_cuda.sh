#!/usr/bin/env bash
# Checks loopmdm.cu against PyTorch and against the CPU program. From the root of the repository,
# after make has built build/{loopmdm,test}_{on_cpu,cuda}_{fp32,bf16}:
#     bash dev/test/test_cuda.sh cuda      on a GPU; with the large reference files too, if PYTHON
#                                          has PyTorch to write them
#     bash dev/test/test_cuda.sh on_cpu    on the CPU emulation (dev/cuda_on_cpu), which checks more
# test.sh sources this file and runs the parts of on_cpu among its own.
set -uo pipefail
where=$1
[ "$(type -t start)" = function ] || . dev/test/parts.sh
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000} # see Makefile
: "${CXX:=g++}" "${NVCC:=nvcc}" "${OPENMP:=}" "${PYTHON:=.venv/bin/python}"
work=build/test/$where
rm -rf "$work" && mkdir -p "$work"

# differs A B MOST: status 0 if A and B are numbers that differ by MOST at the most.
differs() {
    awk -v a="$1" -v b="$2" -v most="$3" 'BEGIN {
        d = a > b ? a - b : b - a
        exit !(a != "" && b != "" && d <= most)
    }'
}

# Training, evaluation and samples give what the CPU program gives.
beside_the_cpu_program() {
    local ok=0 bad=0 precision program tolerance largest different S want got
    local recipe="--val-data build/stories_val.bin --val-rows 16 --tokenizer dev/data/stories.tok
        --model d2 --layers 3 --loop 1:2 --batch 4 --warmup 5 --noise-warmup 12 --lr 3e-3
        --steps 20"
    local options="--data build/stories_train.bin $recipe"
    ./loopmdm train $options --out "$work/cpu" >/dev/null
    check "the CPU program trains" $?
    nelbo() { # PROGRAM
        "$1" eval --model "$work/cpu" --data build/stories_val.bin --rows 32 --loops $S |
            tail -n 1 | awk '{print $3}'
    }
    for precision in fp32 bf16; do
        program=build/loopmdm_${where}_$precision
        tolerance=1e-4
        # 2e-3 of a loss of 7, as test_loopmdm.c derives it, and as much because the steps differ
        [ $precision = bf16 ] && tolerance=3e-2
        $program train $options --out "$work/$precision" >/dev/null
        check "$precision: trains" $?
        different=$(paste -d' ' <(cut -d, -f1-3,5 "$work/cpu/log.csv") \
            <(cut -d, -f1-3,5 "$work/$precision/log.csv") |
            awk '$1 != $2 {n++} END {print NR == 21 ? n + 0 : 1}')
        check "$precision: loops, t and learning rate of 20 steps" "$different"
        largest=$(paste -d, <(cut -d, -f4 "$work/cpu/log.csv") \
            <(cut -d, -f4 "$work/$precision/log.csv") |
            awk -F, 'NR > 1 {d = $1 > $2 ? $1 - $2 : $2 - $1; if (d > m) m = d}
                END {if (NR == 21) printf "%.2g", m}')
        differs 0 "$largest" $tolerance
        check "$precision: losses of 20 steps: difference $largest, tolerance $tolerance" $?
        ./loopmdm eval --model "$work/$precision" --data build/stories_val.bin --rows 4 --loops 1 \
            >/dev/null
        check "$precision: the CPU program reads the checkpoint" $?
        for S in 1 3; do # the CPU program's model, evaluated by both
            want=$(nelbo ./loopmdm)
            got=$(nelbo $program)
            differs "$want" "$got" $tolerance
            check "$precision: NELBO at S=$S: $got, CPU $want" $?
        done
    done
    # One story after the other: no sequences full of end-of-text
    ./loopmdm tokenize --tokenizer dev/data/stories.tok --input build/stories_val.txt \
        --output "$work/text.bin" >/dev/null
    ./loopmdm train $recipe --steps 300 --data "$work/text.bin" --out "$work/longer" >/dev/null
    same_text() { # ARGUMENTS of sample
        want=$(./loopmdm sample --model "$work/longer" --temperature 1 "$@")
        got=$("build/loopmdm_${where}_fp32" sample --model "$work/longer" --temperature 1 "$@")
        [ -n "$want" ] && [ "$want" = "$got" ]
        check "samples: $*" $?
    }
    same_text --steps 8 -n 3
    same_text --steps 32 --order random
    same_text --steps 3 --fill "Tim had a red ____ and lost ____."
    same_text --steps 5 --prompt Lily --loops 7
    counted
}

# Threads that run in any order give the same bits. Without any one of the barriers and waits they
# do not.
barriers() {
    local ok=0 bad=0 list=$work/barriers kind order line run changed waits
    rm -f "$list"
    for kind in fp32 bf16 hopper; do
        CUDA_ON_CPU_LIST=$list digest $kind >"$work/digest_$kind"
        for order in descending random; do
            same_digest $kind CUDA_ON_CPU_ORDER=$order
            check "$kind: threads in $order order give the same bits" $?
        done
    done
    waits='__syncthreads|cp_async_wait<|mbarrier_wait\(|wgmma_wait<'
    [ "$(cut -d' ' -f1 "$list" | sort -u | wc -l)" -eq \
        "$(cat loopmdm.cu dev/hopper*.h | grep -cE "$waits")" ]
    check "every barrier and wait in loopmdm.cu and dev/hopper*.h was met" $?
    while read -r line; do
        changed=1
        for run in "ascending bf16" "descending bf16" "descending fp32"; do
            read -r order kind <<<"$run"
            [ $changed -eq 0 ] && break
            same_digest "$kind" CUDA_ON_CPU_ORDER=$order CUDA_ON_CPU_SKIP=$line || changed=0
        done
        check "results change without the wait in $line, in $(kernels_of "$line")" $changed
    done < <(grep '^loopmdm.cu' "$list" | cut -d' ' -f1 | sort -u)
    # The checks of layers have longer sequences: enough to go round the rings of dev/hopper*.h
    for line in $(grep '^dev/hopper' "$list" | cut -d' ' -f1 | sort -u); do
        kind=--products
        [[ $line == *attention* ]] && kind=--attention
        ! layers_pass $kind ascending $line || ! layers_pass $kind descending $line
        check "the check of ${kind#--} fails without the wait in $line" $?
    done
    counted
}
kernels_of() { grep -F "$1 " "$list" | cut -d' ' -f2 | sort -u | paste -sd' '; }
layers_pass() { # --products or --attention, ORDER, WAIT to leave out
    env CUDA_ON_CPU_CAPABILITY=90 CUDA_ON_CPU_ORDER="$2" CUDA_ON_CPU_SKIP="$3" \
        build/test_on_cpu_bf16 "$1" >/dev/null 2>&1
}

# digest KIND VARIABLE=VALUE...: hopper is bf16 on a GPU that has dev/hopper.h's instructions.
digest() {
    if [ "$1" = hopper ]; then
        env CUDA_ON_CPU_CAPABILITY=90 "${@:2}" build/test_on_cpu_bf16 --digest
    else
        env "${@:2}" "build/test_on_cpu_$1" --digest
    fi
}

# same_digest KIND VARIABLE=VALUE...: whether the digest with these settings is the usual one. It
# ends at the first line that differs.
same_digest() {
    local line want=$work/digest_$1
    exec 3<"$want"
    while read -r line <&4; do
        if ! read -r want <&3 || [ "$line" != "$want" ]; then
            exec 3<&- 4<&-
            return 1
        fi
    done 4< <(digest "$@" 2>/dev/null)
    ! read -r want <&3
}

# AddressSanitizer: nothing is read or written out of bounds, and it would be noticed.
sanitized() { # PRECISION, BF16
    local ok=0 bad=0 status test=$work/test_sanitized_$1
    $CXX -x c++ -std=c++17 -I. -Og -g1 $OPENMP -fsanitize=address,undefined \
        -fno-sanitize-recover=all -Wall -Wextra -Werror -DBF16=$2 \
        -DBACKEND='"build/loopmdm_on_cpu.cpp"' test_loopmdm.c -o "$test"
    check "$1: build" $?
    "$test" --layers >"$work/layers_$1" 2>&1
    status=$?
    check "$1: layers: $(tail -n 1 "$work/layers_$1")" $status
    "$test" --digest >/dev/null
    check "$1: training steps and samples" $?
    if [ "$1" = bf16 ]; then
        env CUDA_ON_CPU_CAPABILITY=90 "$test" --layers >/dev/null
        check "Hopper: layers" $?
    fi
    "$test" --out-of-bounds >"$work/asan_$1" 2>&1
    grep -q 'heap-buffer-overflow' "$work/asan_$1"
    check "$1: a read one row beyond an array is noticed" $?
    counted
}

# Errors that can be tried without a GPU: one clear line, and exit status 1 (or $want).
errors() {
    local ok=0 bad=0 program=build/loopmdm_on_cpu_bf16 channels
    local train="train --data build/stories_train.bin --vocab 703 --model d2 --steps 1"
    train+=" --out $work/none"
    expect() { # WORDS ENVIRONMENT ARGUMENTS
        local words=$1 text status
        text=$(env $2 $program ${@:3} 2>&1 >/dev/null)
        status=$?
        [ $status -eq "${want:-1}" ] && [ "$(echo "$text" | wc -l)" -eq 1 ] &&
            [[ $text == loopmdm:*$words* ]]
        check "$text" $?
    }
    expect 'no GPU' CUDA_ON_CPU_DEVICES=0 $train
    expect 'no GPU' CUDA_ON_CPU_DEVICES=-1 $train
    expect 'compute capability 7.0' CUDA_ON_CPU_CAPABILITY=70 $train
    expect 'fit (--batch); --recompute takes less' CUDA_ON_CPU_MEMORY=40000000 $train --batch 400
    expect 'choose a smaller model' CUDA_ON_CPU_MEMORY=400000 $train --batch 400
    expect '128 at most' A=1 $train --channels 512 --heads 2
    want=2 expect 'built for bf16; make loopmdm_cuda PRECISION=fp32' A=1 $train --precision fp32
    # Every kind of attention fits into the shared memory of the smallest GPUs
    for channels in 64 96 128 256; do
        env CUDA_ON_CPU_CAPABILITY=86 build/loopmdm_on_cpu_fp32 ${train/none/small_$channels} \
            --layers 1 --loop 0:1 --channels $channels --heads 2 --batch 1 >/dev/null
        check "fp32, heads of $((channels / 2)) channels, compute capability 8.6" $?
    done
    env CUDA_ON_CPU_DEVICES=0 $program info --model d12 >/dev/null
    check "info needs no GPU" $?
    env CUDA_ON_CPU_PROTECT=1 build/test_on_cpu_fp32 --digest >/dev/null
    check "the host does not touch the GPU's memory" $?
    counted
}

# nvcc_compiles BF16 GENERATION...: nvcc compiles for these generations of GPUs without a warning.
# For 80 with NCCL, where its header is.
nvcc_compiles() {
    local ok=0 bad=0 arch gpus=() folder with=""
    for arch in "${@:2}"; do
        gpus+=(-gencode "arch=compute_$arch,code=sm_$arch")
    done
    local hopper=0 log=$work/nvcc_$1_$2.log
    [ "$2" = 90a ] && hopper=1
    for folder in ${NCCL_HOME:-} .venv/lib/python3*/site-packages/nvidia/nccl; do
        [ "$2" = 80 ] && [ -f "$folder/include/nccl.h" ] && with="-DNCCL=1 -I$folder/include"
    done
    [ "$2" = 80 ] && [ -z "$with" ] && echo "no nccl.h in NCCL_HOME or .venv: without NCCL"
    $NVCC -x cu -O3 -std=c++17 -I. -default-stream=per-thread "${gpus[@]}" --Werror all-warnings \
        -Xcompiler "-Wall -Wextra -Werror -Wno-unknown-pragmas" -DBF16=$1 -DHOPPER=$hopper $with \
        -Xptxas -v -DBACKEND='"loopmdm.cu"' -c dev/tools.c -o "$work/loopmdm_$1_$2.o" >"$log" 2>&1
    check "$NVCC for sm_${*:2}, BF16=$1 ${with%% *}" $?
    python3 dev/cuda/resources.py "$log" >/dev/null
    check "resources.py makes a table of it" $?
    if [ $hopper = 1 ]; then # ptxas says it if products of wgmma will wait for each other
        ! grep -E 'C75|Performance Loss' "$log"
        check "nothing that makes wgmma slow" $?
    fi
    counted
}

references=(dev/reference/*.bin)
both() { # start NAME_PRECISION for both precisions
    local precision
    for precision in fp32 bf16; do
        start "${where}_$precision" "build/test_${where}_$precision" \
            "build/loopmdm_${where}_$precision" "${references[@]}"
    done
}

if [ "$where" = cuda ]; then
    jobs=1 # a part has the GPU for itself
    large=${LARGE:-$work/reference} # LARGE: a folder that has them already
    if [ -n "${LARGE:-}" ] || $PYTHON dev/reference/dump.py --large --out "$large" >/dev/null 2>&1
    then
        references+=("$large"/*.bin)
    else
        echo "no PyTorch in $PYTHON: without the large reference files"
    fi
    both
    start beside_the_cpu_program beside_the_cpu_program
    finish
fi

export OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0
both
start on_cpu_hopper env CUDA_ON_CPU_CAPABILITY=90 CUDA_ON_CPU_ORDER=random \
    build/test_on_cpu_bf16 --layers "${references[@]}"
if command -v "$NVCC" >/dev/null; then
    start nvcc_bf16 nvcc_compiles 1 80
    start nvcc_hopper nvcc_compiles 1 90a
    start nvcc_fp32 nvcc_compiles 0 90 # for checks only, and it takes long
else
    echo "no nvcc: not compiled for GPUs"
fi
start barriers barriers
start sanitized_fp32 sanitized fp32 0
start sanitized_bf16 sanitized bf16 1
start emulation bash dev/cuda_on_cpu/test_cuda_on_cpu.sh
start beside_the_cpu_program beside_the_cpu_program
start errors errors
start study_matmul env CUDA_ON_CPU_CAPABILITY=90 build/study_matmul_on_cpu
start study_attention build/study_attention_on_cpu
start study_head build/study_head_on_cpu
[ "${BASH_SOURCE[0]}" != "$0" ] || finish
