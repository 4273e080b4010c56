#!/usr/bin/env bash
# How should the parameters start? Trains the model of `make train` for 2000 steps with three seeds: as loopmdm.c starts it; with wte from
# GPT-2's standard deviation 0.02; and with the biases of q and k from 0, so that no head begins with a preference for certain distances.
# Writes dev/results/start.csv: start, seed, step, validation NELBO (nats per token) at S = 1, 2 and 4. About 6 minutes on 2 cores.
#
#     make build/stories_train.bin build/stories_val.bin && bash dev/experiments/start.sh
set -euo pipefail
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
out=dev/results/start.csv
mkdir -p build/start dev/results
echo "start,seed,step,nelbo_s1,nelbo_s2,nelbo_s4" >$out.tmp

try() { # its name, the expression in init_parameters, and what it becomes
    sed "s#$2#$3#" loopmdm.c >build/start/loopmdm.c
    grep -qF "$3" build/start/loopmdm.c || { echo "start.sh: init_parameters in loopmdm.c no longer has '$2'" >&2; exit 1; }
    ${CC:-cc} -std=c11 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -I. build/start/loopmdm.c -o build/start/loopmdm -lm
    for seed in 1 2 3; do
        rm -rf build/start/run
        build/start/loopmdm train --data build/stories_train.bin --val-data build/stories_val.bin --tokenizer dev/data/stories.tok --out build/start/run \
            --layers 4 --channels 64 --heads 4 --seq-len 96 --loop 1:3 --max-loops 4 --batch 4 --lr 3e-3 --warmup 300 --clip 0.5 --weight-decay 0.01 \
            --steps 2000 --val-every 500 --seed $seed >/dev/null
        awk -F, -v name="$1" -v seed=$seed 'NR > 1 && $9 != "" { print name "," seed "," $1 "," $9 "," $10 "," $11 }' build/start/run/log.csv | tee -a $out.tmp
    done
}
try "loopmdm.c" "i == WTE ? 2" "i == WTE ? 2"
try "wte from 0.02" "i == WTE ? 2 / sqrt(c.channels)" "i == WTE ? 0.02"
try "biases from 0" "i == QKVB ? 1" "i == QKVB ? 0"
mv $out.tmp $out
