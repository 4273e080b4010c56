#!/usr/bin/env bash
# Tests dev/cuda_on_cpu/cuda_on_cpu.h. From the root of the repository, in less than a minute:
#     bash dev/cuda_on_cpu/test_cuda_on_cpu.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
export UBSAN_OPTIONS=halt_on_error=1
here=dev/cuda_on_cpu dir=build/cuda_on_cpu passed=0 failed=0
source=$here/test_cuda_on_cpu.cu
mkdir -p $dir

ok() { # ok STATUS WHAT
    if [ "$1" = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $2"
    fi
}

run() { # run PROGRAM [N]: sets out and status
    out=$("$@" 2>&1)
    status=$?
}

checks() { # checks PROGRAM: each line that it prints is a check
    run "$@"
    ok $status "$*, order $CUDA_ON_CPU_ORDER"
    passed=$((passed + $(grep -c '^ok' <<<"$out")))
    failed=$((failed + $(grep -c '^FAILED' <<<"$out")))
    grep -v '^ok' <<<"$out"
}

says() { # says STATUS PATTERN PROGRAM N
    run "${@:3}"
    [ $status = "$1" ] && grep -qE "$2" <<<"$out"
    ok $? "${*:3}: status $status and '$out' instead of $1 and '$2'"
}

line() { grep -nF "$1" $source | head -1 | cut -d: -f1; } # where the test does that

prepare() { # prepare FILE: what launches.sed makes of it
    echo "#line 1 \"$1\""
    sed -E -f $here/launches.sed "$1"
}
build() { # build PROGRAM OPTIONS
    ${CXX:-g++} -std=c++17 -Wall -Wextra -Werror "${@:2}" -I. $dir/test.cpp -o $dir/$1
}
prepare $source >$dir/test.cpp
prepare $here/softmax.cu >$dir/softmax.cpp
build test -O1 -fopenmp
ok $? "build with OpenMP"
build serial -O3
ok $? "build without OpenMP"
build ucontext -O0 -DCUDA_ON_CPU_UCONTEXT=1
ok $? "build with ucontext"
build asan -O1 -g1 -fopenmp -fsanitize=address,undefined
ok $? "build with sanitizers"
${CXX:-g++} -std=c++17 -Wall -Wextra -Werror -O1 -fopenmp -I. $dir/softmax.cpp -o $dir/softmax
ok $? "build softmax"

for CUDA_ON_CPU_ORDER in ascending descending random; do
    export CUDA_ON_CPU_ORDER
    checks $dir/test
    checks $dir/asan
    checks $dir/serial
    CUDA_ON_CPU_SEED=7 $dir/test >/dev/null
    ok $? "another seed"
    $dir/softmax >/dev/null
    ok $? "softmax"
    # Every barrier is needed: without it the result is wrong.
    for program in "$dir/test 26" $dir/softmax; do
        rm -f $dir/list
        CUDA_ON_CPU_LIST=$dir/list $program >/dev/null
        [ "$(wc -l <$dir/list)" = 2 ]
        ok $? "$program has two barriers: $(cat $dir/list)"
        while read -r skip kernel; do
            ! CUDA_ON_CPU_SKIP=$skip $program >/dev/null
            ok $? "$program without the barrier in $skip, in $kernel, order $CUDA_ON_CPU_ORDER"
        done <$dir/list
    done
done
unset CUDA_ON_CPU_ORDER

# The order in which the threads of a block come by: a line for each of 3 barriers and each block
arrivals() { # arrivals ORDER SEED CORES
    CUDA_ON_CPU_ORDER=$1 CUDA_ON_CPU_SEED=$2 OMP_NUM_THREADS=$3 $dir/test 27 | head -12
}
[ "$(arrivals ascending 0 2 | uniq)" = "$(seq -s ' ' 0 63)" ]
ok $? "ascending order"
[ "$(arrivals descending 0 2 | uniq)" = "$(seq -s ' ' 63 -1 0)" ]
ok $? "descending order"
[ "$(arrivals random 1 1 | sort -u | wc -l)" = 12 ]
ok $? "random order: another one after each barrier and in each block"
[ "$(arrivals random 1 1)" = "$(arrivals random 1 2)" ]
ok $? "random order: the same on any number of cores"
[ "$(arrivals random 1 1)" != "$(arrivals random 2 1)" ]
ok $? "random order: another one with another seed"
checks $dir/ucontext

# Mistakes
where() { # where THREAD CODE: the place that an error names, as a pattern
    echo "kernel mistake, block \([01],0,0\), thread $1 .*line $(line "$2"):"
}
waits="waits at __syncthreads"
in0=$(line 'which == 0')
says 1 "$(where '[0-9]+ \(lane 5 of warp 1\),' 'which == 0') waits at __syncwarp while other lanes \
of its warp wait at __syncthreads in line $in0" $dir/test 0
in1=$(line 'which == 1')
says 1 "$(where '[0-9]+' 'which == 1') waits at __any_sync while other lanes of its warp wait at \
__syncwarp in line $in1" $dir/test 1
says 1 "$(where 32 'else __syncthreads(); // 2') $waits while thread 0 $waits in line \
$(line 'if (t < 32)')" $dir/test 2
says 1 "$(where 0 'which == 3') ldmatrix_x4: 0x.* is not a multiple of 16" $dir/test 3
says 1 "$(where 0 'which == 4') cp_async_16 from global memory: 0x.* is not a multiple of 16" \
    $dir/test 4
says 1 "$(where '[0-9]+' 'which == 5') mma_16x8x16 .* needs all 32 lanes" $dir/test 5
says 1 "$(where 0 'which == 6') __shfl_xor_sync with width 16" $dir/test 6
says 1 "$(where '[0-9]+' 'which == 7') __syncwarp with mask 0000ffff leaves out lanes" $dir/test 7
says 1 "$(where 0 'which == 11') more than 64 cp_async_16" $dir/test 11
says 1 "$(where 1 'which == 12') lanes of a warp wait for different mbarriers" $dir/test 12
says 1 "$(where '[0-9]+' 'which == 13') a deadlock: all wait, and nothing is" $dir/test 13
says 1 "$(where 0 'which == 14') tma_load: the target is no multiple of 1024" $dir/test 14
says 1 "kernel mistake: a block ended before its tma_load" $dir/test 15
says 1 "$(where 0 'which == 16') more threads arrive at an mbarrier than it expects" $dir/test 16
says 1 "$(where '[0-9]+' 'which == 17') wgmma: lanes have different descriptors" $dir/test 17
says 1 "kernel mistake: a warp ended before its wgmma" $dir/test 18
says 1 "$(where '[0-9]+' 'which == 39 &&') more bytes arrive at an mbarrier" $dir/test 39
says 1 "$(where '[0-9]+' 'which == 40') more than 64 wgmma without a wait" $dir/test 40
says 1 "$(where '[0-9]+' 'which == 41') more than 8 results of wgmma" $dir/test 41
says 1 "$(where 0 'which == 42') bulk_load: an address, or the number of bytes, is no multiple" \
    $dir/test 42
says 1 "$(where 0 'which == 43') bulk_prefetch: the address, or the number of bytes, is no" \
    $dir/test 43
says 1 "kernel add_one: its first launch is recorded, not run" $dir/test 44
says 1 "kernel mistake: argument 3, 0x.*, is not device memory" $dir/test 20
says 1 "cudaMemcpy to: .* not \(all\) device memory" $dir/test 21
says 1 "cudaMemcpy to: .* not \(all\) device memory" $dir/test 22
says 1 "cudaMemcpy to: .* device memory, not the host's" $dir/test 23
says 1 "cudaFree: 0x.* did not come from cudaMalloc" $dir/test 24
says 1 "cudaMemcpyToSymbol to: .* 256 bytes .* not \(all\) device memory" $dir/test 31
says 1 "cudaMemcpyFromSymbol from: .* 8 bytes .* not \(all\) device memory" $dir/test 32
says 1 "cudaMemcpyToSymbol to: .* device memory, not the host's" $dir/test 33
says 1 "kernel add_one: argument 1, 0x.*, is not device memory" $dir/test 34
says 1 "cudaFree: 0x.* did not come from cudaMalloc" $dir/test 35
says 1 "cudaMemcpy to: .* not \(all\) device memory" $dir/test 36
says 1 "cudaMemcpy from: .* not \(all\) device memory" $dir/test 37
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
CUDA_ON_CPU_DEVICES=0 says 0 "no CUDA-capable device" $dir/test 38
CUDA_ON_CPU_DEVICES=-1 says 0 "driver version is insufficient" $dir/test 30
CUDA_ON_CPU_CAPABILITY=70 says 0 "no kernel image" $dir/test 19
CUDA_ON_CPU_MEMORY=300 says 0 "out of memory" $dir/test 30
CUDA_ON_CPU_ORDER=reverse says 1 "choose ascending, descending or random" $dir/test 30

echo "$passed passed, $failed failed"
[ $failed = 0 ]
