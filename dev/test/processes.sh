#!/usr/bin/env bash
# Several processes train one model as one process does: on the CPU, and with loopmdm.cu on the
# emulation. From the root of the repository:
#     make loopmdm build/loopmdm_on_cpu.cpp build/stories_train.bin build/stories_val.bin
#     bash dev/test/processes.sh
set -uo pipefail
if ! command -v mpicc >/dev/null || [[ $(mpirun --version 2>/dev/null) != *"Open MPI"* ]]; then
    echo "no Open MPI (on Debian: apt install libopenmpi-dev openmpi-bin): several processes are"
    echo "not checked"
    echo "0 passed, 0 failed"
    exit
fi
: "${ARCH:=}" "${OPENMP:=}"
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1 OMPI_CC=${CC:=cc} OMPI_CXX=${CXX:=g++}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 # in a container
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
. dev/test/checks.sh
ok=0 bad=0

floats="-ffp-contract=fast -fno-math-errno -fno-trapping-math"
options="-I. $ARCH $OPENMP $floats -Wall -Wextra -Werror"
mkdir "$folder/source"
cp -r Makefile loopmdm.c dev "$folder/source"
make -s -C "$folder/source" loopmdm MPI=1 && cp "$folder/source/loopmdm" "$folder/loopmdm"
check "make loopmdm MPI=1" $?
mpicxx -x c++ -std=c++17 -O1 $options -DMPI=1 -DBF16=0 \
    -DBACKEND='"build/loopmdm_on_cpu.cpp"' dev/tools.c -o "$folder/loopmdm_on_cpu"
check "loopmdm.cu for the CPU is built with mpicxx" $?

recipe="--data build/stories_train.bin --tokenizer dev/data/stories.tok --model d2 --layers 3
    --loop 1:2 --ema 0.9 --warmup 20 --noise-warmup 60"
validates="--val-data build/stories_val.bin --val-rows 37"

wait_until() { # COMMAND: a minute at most
    local i
    for ((i = 0; i < 600; i++)); do "$@" && return || sleep 0.1; done
}

# train N PROGRAM ARGUMENTS...: by N processes
train() { mpirun -n "$1" "$folder/$2" train $recipe "${@:3}" >"$folder/said" 2>&1; }

# differences STEPS A B: the largest of two logs, of losses and of validations
differences() {
    paste -d, "$folder/$2/log.csv" "$folder/$3/log.csv" | awk -F, -v steps="$1" '
        function distance(a, b) { return a > b ? a - b : b - a }
        NR > 1 && distance($4, $15) > loss { loss = distance($4, $15) }
        NR > 1 && $9 != "" {
            validations++
            for (i = 9; i <= 11; i++)
                if (distance($i, $(i + 11)) > nelbo) nelbo = distance($i, $(i + 11))
        }
        END { if (NR == steps + 1 && validations == 2) printf "%.2g %.2g", loss, nelbo }'
}
close() { # NAME TOLERANCE STEPS A B: only the order of sums differs, but rounding errors grow
    local loss nelbo
    read -r loss nelbo <<<"$(differences "${@:3}")"
    [ -n "$nelbo" ] && awk -v a="$loss" -v b="$nelbo" -v most="$2" 'BEGIN {
        exit !(a < most && b < most) }'
    check "$1: losses of $3 steps differ by $loss, validations by $nelbo; tolerance $2" $?
}
same() { # NAME A B: the same files, bit for bit
    cmp "$folder/$2/model.bin" "$folder/$3/model.bin" &&
        cmp "$folder/$2/state.bin" "$folder/$3/state.bin"
    check "$1" $?
}

fifty="$validates --val-every 25 --steps 50"
./loopmdm train $recipe $fifty --batch 8 --out "$folder/whole" >/dev/null
train 1 loopmdm $fifty --batch 8 --out "$folder/one"
same "one process gives the bits of a build without MPI" whole one
train 2 loopmdm $fifty --batch 4 --out "$folder/two"
close "2 processes of 4 sequences, and 8 sequences" 1e-5 50 whole two
train 4 loopmdm $fifty --batch 2 --out "$folder/four"
close "4 processes of 2 sequences" 1e-5 50 whole four
train 2 loopmdm $fifty --batch 2 --accum 2 --out "$folder/accum"
close "2 processes of 2 times 2 sequences" 1e-5 50 whole accum
train 1 loopmdm_on_cpu $fifty --batch 4 --out "$folder/gpu_one"
train 2 loopmdm_on_cpu $fifty --batch 2 --out "$folder/gpu_two"
close "loopmdm.cu: 2 processes of 2 sequences, and 4 sequences" 1e-5 50 gpu_one gpu_two

# NCCL without MPI, as torchrun starts it; dev/cuda_on_cpu/nccl.h stands for NCCL
$CXX -x c++ -std=c++17 -O1 $options -DNCCL=1 -Idev/cuda_on_cpu -DBF16=0 \
    -DBACKEND='"build/loopmdm_on_cpu.cpp"' dev/tools.c -o "$folder/loopmdm_nccl"
check "loopmdm.cu for the CPU is built with NCCL's functions" $?
start_two() { # GPUS ARGUMENTS...: 2 processes
    local i
    export WORLD_SIZE=2 MASTER_PORT=1234 CUDA_ON_CPU_DEVICES=$1
    for i in 1 0; do
        RANK=$i LOCAL_RANK=$i "$folder/loopmdm_nccl" train $recipe "${@:2}" >"$folder/said_$i" \
            2>&1 &
    done
    wait
    unset WORLD_SIZE MASTER_PORT CUDA_ON_CPU_DEVICES
}
start_two 2 $fifty --batch 2 --out "$folder/new/nccl"
close "NCCL: 2 processes of 2 sequences, and 4 sequences" 1e-5 50 gpu_one new/nccl
[ ! -s "$folder/said_1" ] && [ "$(ls "$folder/new/nccl" | grep -c nccl_id)" = 0 ]
check "rank 1 prints nothing, and no file is left" $?
mkdir -p "$folder/stale"
head -c 128 /dev/zero >"$folder/stale/nccl_id-1234"
start_two 2 --steps 2 --batch 2 --out "$folder/stale"
grep -q "^step 2 of 2 is done" "$folder/said_0"
check "a file that a dead process left does no harm" $?
start_two 2 --steps 2 --batch 2 --out "$folder/stale"
[ "$(cat "$folder"/said_[01] | grep -c '^loopmdm: ')" = 2 ]
check "without a launcher each process says what is wrong" $?
same "NCCL and MPI give the same bits" gpu_two new/nccl

# A process is killed, the run goes on, is stopped, and goes on: nothing shows it in the end.
long="$validates --val-every 600 --steps 1200 --save-every 200 --batch 4"
train 2 loopmdm $long --out "$folder/unbroken"
train 2 loopmdm $long --out "$folder/broken" &
wait_until [ -s "$folder/broken/model.bin" ]
kill -9 "$(pgrep -f "^$folder/loopmdm train .*/broken" | tail -n 1)"
SECONDS=0
wait $!
status=$?
[ $status -ne 0 ] && [ $SECONDS -le 10 ] && ! pgrep -f "^$folder/loopmdm train" >/dev/null
check "kill -9 of one process ends all in 10 s: status $status after $SECONDS s" $?
grep -q 'process rank [01] .* exited on signal 9' "$folder/said"
check "mpirun says which" $?
cp -r "$folder/broken" "$folder/other"
before=$(step_of "$folder/broken/state.bin")

mpirun -n 2 "$folder/loopmdm" train $recipe $long --out "$folder/broken" --resume \
    >"$folder/said" 2>&1 &
later() { [ "$(step_of "$folder/broken/state.bin")" -gt "$before" ]; }
wait_until later
kill -USR1 $!
wait $!
status=$?
stopped=$(step_of "$folder/broken/state.bin")
[ $status -eq 138 ] && grep -q "^stopped after step $stopped;" "$folder/said"
check "a signal stops all processes at one step: $stopped" $?
train 2 loopmdm $long --out "$folder/broken" --resume
same "a run that was killed at step $before and stopped at $stopped ends as an unbroken one" \
    unbroken broken
train 1 loopmdm $long --batch 8 --out "$folder/other" --resume
close "1 process goes on where 2 were killed" 1e-2 1200 unbroken other

SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0 "$folder/loopmdm" eval --model "$folder/two" \
    --data build/stories_val.bin --rows 4 --loops 1 >/dev/null
check "other commands have one process, whatever the environment says" $?

# Errors are one line.
said() { # WORDS: the only line that is loopmdm's
    local status=$? lines
    lines=$(grep -a '^loopmdm: ' "$folder/said")
    [ $status -ne 0 ] && [ "$(echo "$lines" | wc -l)" -eq 1 ] && [[ $lines == *$1* ]]
    check "status $status: $lines" $?
}
train 2 loopmdm --stepz 3 --out "$folder/none"
said "rank 0: train has no option --stepz"
train 2 loopmdm $long --out "$folder/two"
said "rank 0: $folder/two/model.bin is already there"
train 2 loopmdm $long --out "$folder/unbroken" --resume --batch 5
said "rank 0: --resume: this run was begun with --seed 1 and --batch times --accum times processes"
PMI_RANK=0 PMI_SIZE=2 "$folder/loopmdm" train $recipe --steps 2 --out "$folder/none" \
    >"$folder/said" 2>&1
said "rank 0: the launcher starts 2 processes, but MPI does not know them"
RANK=2 WORLD_SIZE=2 "$folder/loopmdm" train $recipe --steps 2 --out "$folder/none" \
    >"$folder/said" 2>&1
said "the environment says that this is process 2 of 2"
train 2 loopmdm --steps 50 --lr 1e30 --batch 2 --out "$folder/none"
said "rank 0: step "
differ() { # ARGUMENTS of process 0 : ARGUMENTS of process 1
    mpirun -n 1 "$folder/loopmdm" train $recipe --steps 5 --batch 2 --out "$folder/differ" $1 : \
        -n 1 "$folder/loopmdm" train $recipe --steps 5 --batch 2 --out "$folder/differ" $2 \
        >"$folder/said" 2>&1
}
differ "" "--lr 1e-3"
said "rank 0: rank 1 differs from rank 0 in its --lr"
differ "" "--seed 2"
said "rank 0: rank 1 differs from rank 0 in its --seed"
differ "$validates" "--val-data build/stories_train.bin --val-rows 37"
said "rank 0: rank 1 differs from rank 0 in its text in --val-data"
differ "--init $folder/two" "--init $folder/four"
said "rank 0: rank 1 differs from rank 0 in its parameters"
[ ! -e "$folder/differ/model.bin" ]
check "no model was written" $?

counted
[ $bad -eq 0 ]
