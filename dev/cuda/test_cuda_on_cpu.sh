#!/bin/bash
# Self-test of dev/cuda_on_cpu.h. From the root of the repository: bash dev/cuda/test_cuda_on_cpu.sh   (less than a minute)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000} UBSAN_OPTIONS=halt_on_error=1
source=dev/cuda/test_cuda_on_cpu.cu dir=build/cuda_on_cpu passed=0 failed=0
mkdir -p $dir/ucontext_header/dev

ok() { # ok STATUS WHAT
    if [ "$1" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED $2"; fi
}

run() { # run PROGRAM [N]: sets out and status
    out=$("$@" 2>&1)
    status=$?
}

checks() { # checks PROGRAM: every line of it is a check
    run "$@"
    ok $status "$*, order $CUDA_ON_CPU_ORDER"
    passed=$((passed + $(grep -c '^ok' <<<"$out"))) failed=$((failed + $(grep -c '^FAILED' <<<"$out")))
    grep -v '^ok' <<<"$out"
}

says() { # says STATUS PATTERN PROGRAM N
    run "${@:3}"
    [ $status = "$1" ] && grep -qE "$2" <<<"$out"
    ok $? "${*:3}: status $status and '$out' instead of $1 and '$2'"
}

line() { grep -nF "$1" $source | head -1 | cut -d: -f1; } # where the test does that

# Builds, two at a time. Processors without assembly of their own use ucontext: the header as if this were one.
prepare() { (echo "#line 1 \"$1\""; grep '^        s/' dev/cuda_on_cpu.h | sed -E -f /dev/stdin "$1"); }
build() { ${CXX:-g++} -std=c++17 -Wall -Wextra -Werror "${@:2}" -I. $dir/test.cpp -o $dir/$1; }
prepare $source >$dir/test.cpp
prepare dev/cuda/softmax.cu >$dir/softmax.cpp
sed -E 's/defined\(__(x86_64|aarch64)__\)/0/' dev/cuda_on_cpu.h >$dir/ucontext_header/dev/cuda_on_cpu.h
build asan -O1 -g -fopenmp -fsanitize=address,undefined & asan=$!
build test -O2 -fopenmp
ok $? "build with OpenMP"
build serial -O3
ok $? "build without OpenMP"
build ucontext -O1 -I$dir/ucontext_header
ok $? "build with ucontext"
${CXX:-g++} -std=c++17 -Wall -Wextra -Werror -O2 -fopenmp -I. $dir/softmax.cpp -o $dir/softmax
ok $? "build softmax"
wait $asan
ok $? "build with sanitizers"

for CUDA_ON_CPU_ORDER in ascending descending random; do
    export CUDA_ON_CPU_ORDER
    checks $dir/test
    checks $dir/asan
    checks $dir/serial
    ok "$(CUDA_ON_CPU_SEED=7 $dir/test >/dev/null; echo $?)" "another seed"
    ok "$($dir/softmax >/dev/null; echo $?)" "softmax"
    # Every barrier that was executed is needed: without it, the result is wrong.
    for program in "$dir/test 26" $dir/softmax; do
        rm -f $dir/list
        CUDA_ON_CPU_LIST=$dir/list $program >/dev/null
        ok "$([ "$(wc -l <$dir/list)" = 2 ]; echo $?)" "$program has two barriers: $(cat $dir/list)"
        while read -r skip kernel; do
            CUDA_ON_CPU_SKIP=$skip $program >/dev/null
            ok $((!$?)) "$program without the barrier in line $skip of $kernel, order $CUDA_ON_CPU_ORDER"
        done <$dir/list
    done
done
unset CUDA_ON_CPU_ORDER

arrivals() { CUDA_ON_CPU_ORDER=$1 CUDA_ON_CPU_SEED=$2 OMP_NUM_THREADS=$3 $dir/test 27 | head -12; }
ok "$([ "$(arrivals ascending 0 2 | uniq)" = "$(seq -s ' ' 0 63)" ]; echo $?)" "ascending order"
ok "$([ "$(arrivals descending 0 2 | uniq)" = "$(seq -s ' ' 63 -1 0)" ]; echo $?)" "descending order"
ok "$([ "$(arrivals random 1 1 | sort -u | wc -l)" = 12 ]; echo $?)" "random order: another one after each barrier and in each block"
ok "$([ "$(arrivals random 1 1)" = "$(arrivals random 1 2)" ]; echo $?)" "random order: the same on any number of cores"
ok "$([ "$(arrivals random 1 1)" != "$(arrivals random 2 1)" ]; echo $?)" "random order: another one with another seed"
checks $dir/ucontext

# Mistakes
kernel='kernel mistake, block \([01],0,0\)'
says 1 "$kernel, thread [0-9]+ \(lane 5 of warp 1\), line $(line 'which == 0'): waits at __syncwarp while other lanes of its warp wait at __syncthreads in line" $dir/test 0
says 1 "$kernel.*line $(line 'which == 1'): waits at __any_sync while other lanes of its warp wait at __syncwarp in line $(line 'which == 1')" $dir/test 1
says 1 "$kernel, thread 32 .*line $(($(line 'if (t < 32)') + 1)): waits at __syncthreads while thread 0 waits at __syncthreads in line $(line 'if (t < 32)')" $dir/test 2
says 1 "$kernel, thread 0 .*line $(line 'which == 3'): ldmatrix_x4: 0x.* is not a multiple of 16" $dir/test 3
says 1 "$kernel, thread 0 .*line $(line 'which == 4'): cp_async_16 from global memory: 0x.* is not a multiple of 16" $dir/test 4
says 1 "$kernel.*line $(line 'which == 5'): mma_16x8x16 .* needs all 32 lanes" $dir/test 5
says 1 "$kernel, thread 0 .*line $(line 'which == 6'): __shfl_xor_sync with width 16" $dir/test 6
says 1 "$kernel.*line $(line 'which == 7'): __syncwarp with mask 0000ffff leaves out lanes" $dir/test 7
says 1 "$kernel, thread 0 .*line $(line 'which == 11'): more than 64 cp_async_16" $dir/test 11
says 1 "kernel mistake: argument 3, 0x.*, is not device memory" $dir/test 20
says 1 "cudaMemcpy to: .* not \(all\) device memory" $dir/test 21
says 1 "cudaMemcpy to: .* not \(all\) device memory" $dir/test 22
says 1 "cudaMemcpy to: .* device memory, not the host's" $dir/test 23
says 1 "cudaFree: 0x.* did not come from cudaMalloc" $dir/test 24
says 1 "ERROR: AddressSanitizer: heap-buffer-overflow" $dir/asan 8
says 1 "test_cuda_on_cpu.cu:$(line 'which == 8')" $dir/asan 8
says 1 "test_cuda_on_cpu.cu:$(line 'which == 9')" $dir/asan 9
says 1 "test_cuda_on_cpu.cu:$(line 'which == 10')" $dir/asan 10
says 0 "no error" $dir/test 25
export CUDA_ON_CPU_PROTECT=1
says 139 "" $dir/test 25
says 1 "AddressSanitizer: use-after-poison" $dir/asan 25
checks $dir/test
checks $dir/asan
unset CUDA_ON_CPU_PROTECT
CUDA_ON_CPU_DEVICES=0 says 0 "no CUDA-capable device" $dir/test 30
CUDA_ON_CPU_DEVICES=-1 says 0 "driver version is insufficient" $dir/test 30
CUDA_ON_CPU_CAPABILITY=70 says 0 "no kernel image" $dir/test 19
CUDA_ON_CPU_MEMORY=300 says 0 "out of memory" $dir/test 30
CUDA_ON_CPU_ORDER=reverse says 1 "choose ascending, descending or random" $dir/test 30

echo "$passed passed, $failed failed"
[ $failed = 0 ]
