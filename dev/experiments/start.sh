#!/usr/bin/env bash
# Do heads that begin with a preference for certain distances leave the unigram plateau sooner? Trains the model of `make train` for
# 2000 steps with the biases of q and k started at standard deviation 1, as loopmdm.c does, and at 0, with two seeds each.
# Writes dev/results/plateau.csv: start, seed, step, validation NELBO (nats per token) at S = 1, 2 and 4. About 3 minutes on 2 cores.
#
#     make build/stories_train.bin build/stories_val.bin && bash dev/experiments/plateau.sh
set -euo pipefail
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
out=dev/results/plateau.csv
mkdir -p build/plateau
echo "qk_bias_std,seed,step,nelbo_s1,nelbo_s2,nelbo_s4" >$out.tmp
for std in 1 0; do
    sed "s/i == QKVB ? 1 :/i == QKVB ? $std :/" loopmdm.c >build/plateau/loopmdm.c
    grep -q "i == QKVB ? $std :" build/plateau/loopmdm.c
    ${CC:-cc} -std=c11 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -I. build/plateau/loopmdm.c -o build/plateau/loopmdm -lm
    for seed in 1 2; do
        echo "biases of q and k from $std, seed $seed"
        rm -rf build/plateau/run
        build/plateau/loopmdm train --data build/stories_train.bin --val-data build/stories_val.bin --tokenizer dev/data/stories.tok --out build/plateau/run \
            --layers 4 --channels 64 --heads 4 --seq-len 96 --loop 1:3 --max-loops 4 --batch 4 --lr 3e-3 --warmup 300 --clip 0.5 --weight-decay 0.01 \
            --steps 2000 --val-every 500 --seed $seed >/dev/null
        awk -F, -v std=$std -v seed=$seed 'NR > 1 && $9 != "" { print std "," seed "," $1 "," $9 "," $10 "," $11 }' build/plateau/run/log.csv | tee -a $out.tmp
    done
done
mv $out.tmp $out
