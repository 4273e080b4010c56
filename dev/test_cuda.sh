#!/usr/bin/env bash
# Checks of loopmdm.cu against PyTorch and the CPU program: "cuda" on a GPU, "on_cpu" on the CPU emulation (dev/cuda_on_cpu.h), which has more. From the repository root, after make has
# built build/{loopmdm,test}_{on_cpu,cuda}_{fp32,bf16}. On a GPU with the large reference files too, if PYTHON has PyTorch to write them
# (the emulation would take minutes for these).
set -uo pipefail
where=$1
. dev/parts.sh
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000} # see Makefile
: "${CXX:=g++}" "${NVCC:=nvcc}" "${ARCH:=}" "${OPENMP:=}" "${PYTHON:=.venv/bin/python}"
work=build/test/$where
rm -rf "$work" && mkdir -p "$work"

# CHECK NAME STATUS: counts inside a part, whose last line is then "$ok passed, $bad failed"
check() { if [ "$2" -eq 0 ]; then ok=$((ok + 1)); echo "ok    $1"; else bad=$((bad + 1)); echo "FAIL  $1"; fi; }
differs() { awk -v a="$1" -v b="$2" -v most="$3" 'BEGIN { d = a > b ? a - b : b - a; exit !(a != "" && b != "" && d <= most) }'; } # status 0 if by no more than most; what is missing differs

# The same training, evaluation and samples as the CPU program's.
beside_the_cpu_program() {
    local ok=0 bad=0 options="--data build/stories_train.bin --val-data build/stories_val.bin --val-rows 16 --tokenizer dev/data/stories.tok --model d2
        --layers 3 --loop 1:2 --batch 4 --warmup 5 --lr 3e-3 --steps 20"
    ./loopmdm train $options --out "$work/cpu" >/dev/null
    check "the CPU program trains" $?
    for precision in fp32 bf16; do
        local program=build/loopmdm_${where}_$precision tolerance=1e-4
        [ $precision = bf16 ] && tolerance=3e-2 # 2e-3 of a loss of 7, as derived in test_loopmdm.c, and as much for the steps taken apart
        $program train $options --out "$work/$precision" >/dev/null
        check "$precision: trains" $?
        check "$precision: loops, t and learning rate of 20 steps" "$(paste -d' ' <(cut -d, -f1-3,5 "$work/cpu/log.csv") <(cut -d, -f1-3,5 "$work/$precision/log.csv") | awk '$1 != $2 {n++} END {print NR == 21 ? n + 0 : 1}')"
        local largest
        largest=$(paste -d, <(cut -d, -f4 "$work/cpu/log.csv") <(cut -d, -f4 "$work/$precision/log.csv") | awk -F, 'NR > 1 {d = $1 > $2 ? $1 - $2 : $2 - $1; if (d > m) m = d} END {if (NR == 21) printf "%.2g", m}')
        differs 0 "$largest" $tolerance
        check "$precision: losses of 20 steps, largest difference $largest, tolerance $tolerance" $?
        ./loopmdm eval --model "$work/$precision" --data build/stories_val.bin --rows 4 --loops 1 >/dev/null
        check "$precision: the CPU program reads the checkpoint" $?
        for S in 1 3; do # the CPU program's model, by both
            nelbo() { "$1" eval --model "$work/cpu" --data build/stories_val.bin --rows 32 --loops $S | tail -n 1 | awk '{print $3}'; }
            local want got
            want=$(nelbo ./loopmdm) got=$(nelbo $program)
            differs "$want" "$got" $tolerance
            check "$precision: NELBO at S=$S: $got, CPU $want" $?
        done
    done
    ./loopmdm tokenize --tokenizer dev/data/stories.tok --input build/stories_val.txt --output "$work/text.bin" >/dev/null # one story after the other: no rows full of end-of-text
    ./loopmdm train ${options/steps 20/steps 300} --data "$work/text.bin" --out "$work/longer" >/dev/null
    same_text() { # ARGUMENTS of sample
        local want got
        want=$(./loopmdm sample --model "$work/longer" --temperature 1 "$@") got=$("build/loopmdm_${where}_fp32" sample --model "$work/longer" --temperature 1 "$@")
        [ -n "$want" ] && [ "$want" = "$got" ]
        check "samples: $*" $?
    }
    same_text --steps 8 -n 3
    same_text --steps 32 --order random
    same_text --steps 3 --fill "Tim had a red ____ and lost ____."
    same_text --steps 5 --prompt Lily --loops 7
    echo "$ok passed, $bad failed"
}

# Barriers: threads in any order give the same bits; and without any one of the barriers they do not.
barriers() {
    local ok=0 bad=0 list=$work/barriers precision line order changed
    declare -A want
    rm -f "$list"
    for precision in fp32 bf16; do
        want[$precision]=$(CUDA_ON_CPU_LIST=$list build/test_on_cpu_$precision --digest)
        for order in descending random; do
            [ "$(CUDA_ON_CPU_ORDER=$order build/test_on_cpu_$precision --digest)" = "${want[$precision]}" ]
            check "$precision: threads in $order order give the same bits" $?
        done
    done
    [ "$(cut -d' ' -f1 "$list" | sort -u | wc -l)" -eq "$(grep -c '__syncthreads' loopmdm.cu)" ]
    check "every barrier in loopmdm.cu was met" $?
    while read -r line; do
        changed=1
        for run in "ascending bf16" "descending bf16" "descending fp32"; do
            read -r order precision <<<"$run"
            [ $changed -eq 0 ] || [ "$(CUDA_ON_CPU_ORDER=$order CUDA_ON_CPU_SKIP=$line build/test_on_cpu_$precision --digest 2>/dev/null)" = "${want[$precision]}" ] || changed=0
        done
        check "without the barrier in line $line, in $(grep -E "^$line " "$list" | cut -d' ' -f2 | sort -u | paste -sd' '), results change" $changed
    done < <(cut -d' ' -f1 "$list" | sort -nu)
    for line in $(grep -n '__syncthreads' loopmdm.cu | cut -d: -f1); do # and the checks of layers notice it, in matmul and attention
        grep -qE "^$line (matmul|attention)$" "$list" || continue
        ! CUDA_ON_CPU_SKIP=$line build/test_on_cpu_bf16 --layers >/dev/null 2>&1
        check "without the barrier in line $line the checks of layers fail" $?
    done
    echo "$ok passed, $bad failed"
}

# AddressSanitizer: nothing is read or written out of bounds, and it would be noticed.
sanitized() {
    local ok=0 bad=0 test=$work/test_sanitized
    export ASAN_OPTIONS=detect_leaks=0
    for bf16 in 0 1; do
        $CXX -x c++ -std=c++17 -I. -O1 -g $OPENMP -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Wextra -Werror -DBF16=$bf16 \
            -DTEST_CUDA='"build/loopmdm_on_cpu.cpp"' test_loopmdm.c -o "$test"
        check "BF16=$bf16: build" $?
        "$test" --layers >"$work/layers" 2>&1
        check "BF16=$bf16: layers: $(tail -n 1 "$work/layers")" $?
        "$test" --digest >/dev/null
        check "BF16=$bf16: training steps and samples" $?
        "$test" --out-of-bounds >"$work/asan" 2>&1
        grep -q 'heap-buffer-overflow' "$work/asan"
        check "BF16=$bf16: a read one row beyond an array is noticed" $?
    done
    echo "$ok passed, $bad failed"
}

# Errors that need no GPU to be tried: one clear line, and status 1.
errors() {
    local ok=0 bad=0 program=build/loopmdm_on_cpu_bf16
    expect() { # WORDS, ENVIRONMENT, ARGUMENTS
        local words=$1 text status
        text=$(env $2 $program ${@:3} 2>&1 >/dev/null)
        status=$?
        [ $status -eq 1 ] && [ "$(echo "$text" | wc -l)" -eq 1 ] && [[ $text == loopmdm:*$words* ]]
        check "$text" $?
    }
    local train="train --data build/stories_train.bin --vocab 703 --model d2 --out $work/none --steps 1"
    expect 'no GPU' CUDA_ON_CPU_DEVICES=0 $train
    expect 'no GPU' CUDA_ON_CPU_DEVICES=-1 $train
    expect 'compute capability 7.0' CUDA_ON_CPU_CAPABILITY=70 $train
    expect 'fit (--batch); --recompute takes less' CUDA_ON_CPU_MEMORY=40000000 $train --batch 400
    expect 'choose a smaller model' CUDA_ON_CPU_MEMORY=400000 $train --batch 400
    expect '128 at most' A=1 $train --channels 512 --heads 2
    for channels in 64 96 128 256; do # every kind of attention fits into the shared memory of the smallest GPUs
        env CUDA_ON_CPU_CAPABILITY=86 build/loopmdm_on_cpu_fp32 ${train/none/small_$channels} --layers 1 --loop 0:1 --channels $channels --heads 2 --batch 1 >/dev/null
        check "fp32, heads of $((channels / 2)) channels, compute capability 8.6" $?
    done
    env CUDA_ON_CPU_DEVICES=0 $program info --model d12 >/dev/null
    check "info needs no GPU" $?
    env CUDA_ON_CPU_PROTECT=1 build/test_on_cpu_fp32 --digest >/dev/null
    check "the host does not touch the GPU's memory" $?
    echo "$ok passed, $bad failed"
}

# nvcc compiles for three generations of GPUs without a warning, where it is installed.
nvcc_compiles() {
    local ok=0 bad=0 precision
    for bf16 in 0 1; do
        $NVCC -O3 -std=c++17 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -gencode arch=compute_100,code=sm_100 \
            --Werror all-warnings -Xcompiler "-Wall -Wextra -Werror -Wno-unknown-pragmas" -DBF16=$bf16 -c loopmdm.cu -o "$work/loopmdm.o"
        check "$NVCC for sm_80, sm_90 and sm_100, BF16=$bf16" $?
    done
    echo "$ok passed, $bad failed"
}

references=(dev/reference/*.bin)
if [ "$where" = cuda ]; then
    if $PYTHON train_gpt2style.py dump --large --out "$work/reference" >/dev/null 2>&1; then references+=("$work"/reference/*.bin)
    else echo "no PyTorch in $PYTHON: without the large reference files"; fi
fi
checks() { for precision in fp32 bf16; do part "${where}_$precision" "build/test_${where}_$precision" "build/loopmdm_${where}_$precision" "${references[@]}"; done; }
if [ "$where" = cuda ]; then
    checks
    part beside_the_cpu_program beside_the_cpu_program
    end_parts
    exit
fi

# What compiles, and what takes one thread, beside the rest
one_thread() {
    part sanitized sanitized
    part errors errors
    if command -v "$NVCC" >/dev/null; then part nvcc nvcc_compiles; else echo "no nvcc: not compiled for GPUs"; fi
    part barriers barriers
    end_parts
}
emulated() {
    checks
    part beside_the_cpu_program beside_the_cpu_program
    part emulation bash dev/cuda/test_cuda_on_cpu.sh
    for study in matmul attention head; do part "study_$study" "build/study_${study}_on_cpu"; done
}
export OMP_NUM_THREADS=1
beside one_thread emulated
end_parts
