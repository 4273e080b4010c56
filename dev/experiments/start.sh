#!/usr/bin/env bash
# How should the parameters start? LoopMDM, 2000 steps on stories as in `make train` and 1500 on boards of Sudoku as in flops.py, with three seeds: as
# loopmdm.c starts it; with wte from GPT-2's standard deviation 0.02; with the biases of q and k from 0, so that no head begins with a preference for
# certain distances; and with a final gain of 1/4, so that the first logits are a quarter as large.
# Writes dev/results/start.csv: start, task, seed, step, validation NELBO (nats per token) at S = 1, 2 and 4. 11 minutes on 2 cores.
#
#     make build/stories_train.bin build/stories_val.bin build/sudoku_train.bin build/sudoku_val.bin && bash dev/experiments/start.sh
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f $out.tmp' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
out=dev/results/start.csv
mkdir -p build/start dev/results
echo "start,task,seed,step,nelbo_s1,nelbo_s2,nelbo_s4" >$out.tmp

train() { # in the background: task, seed, and options of train
    local folder=build/start/$1_$2
    rm -rf $folder
    exec build/start/loopmdm train --data build/$1_train.bin --val-data build/$1_val.bin --out $folder --seed $2 --layers 4 --channels 64 --heads 4 --loop 1:3 --max-loops 4 \
        --clip 0.5 --weight-decay 0.01 "${@:3}" >/dev/null
}

try() { # its name, the expression in init_parameters, and what it becomes
    sed "s#$2#$3#" loopmdm.c >build/start/loopmdm.c
    grep -qF "$3" build/start/loopmdm.c || { echo "start.sh: init_parameters in loopmdm.c no longer has '$2'" >&2; exit 1; }
    ${CC:-cc} -std=c11 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -I. build/start/loopmdm.c -o build/start/loopmdm -lm
    for task in stories sudoku; do
        local running=()
        for seed in 1 2 3; do
            case $task in
            stories) train $task $seed --tokenizer dev/data/stories.tok --fixed-rows --seq-len 96 --batch 4 --lr 3e-3 --warmup 300 --steps 2000 --val-every 500 & ;;
            sudoku) train $task $seed --tokenizer build/sudoku_train.tok --fixed-rows --seq-len 36 --batch 32 --lr 2e-3 --warmup 75 --steps 1500 --val-every 500 --val-rows 1024 & ;;
            esac
            running+=($!)
        done
        for process in "${running[@]}"; do wait $process; done
        for seed in 1 2 3; do
            awk -F, -v what="$1,$task,$seed" 'NR > 1 && $9 != "" { print what "," $1 "," $9 "," $10 "," $11 }' build/start/${task}_$seed/log.csv | tee -a $out.tmp
        done
    done
}
try "loopmdm.c" "i == WTE ? 2" "i == WTE ? 2"
try "wte from 0.02" "i == WTE ? 2 / sqrt(c.channels)" "i == WTE ? 0.02"
try "biases from 0" "i == QKVB ? 1" "i == QKVB ? 0"
try "final gain 1/4" "is_gain ? 1" "i == LNFW ? 0.25f : is_gain ? 1"
mv $out.tmp $out
