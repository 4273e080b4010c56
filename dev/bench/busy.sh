#!/usr/bin/env bash
# How fast does ./loopmdm train beside other programs? From the root, after make train, on a machine
# that nobody else uses:
#     bash dev/bench/busy.sh [PROGRAM]
# Prints tokens per second, the best of three: alone; beside a loop that keeps a core busy, one for
# each core; each of two trainings at a time. With others at work half of the speed is the most that
# is possible.
set -euo pipefail
program=${1:-./loopmdm}
cores=$(nproc)
folder=$(mktemp -d)
others=()
trap 'kill "${others[@]}" 2>/dev/null || true; rm -rf "$folder"' EXIT

# train NAME: a training of the shape of make train. Its speed goes into the file NAME.
train() {
    rm -rf "$folder/run_$1"
    env -u GOMP_SPINCOUNT -u OMP_PROC_BIND "$program" train --data build/stories_train.bin \
        --tokenizer dev/data/stories.tok --fixed-rows --layers 4 --channels 64 --heads 4 \
        --seq-len 96 --loop 1:3 --max-loops 4 --batch 4 --steps 100 --out "$folder/run_$1" |
        sed -n 's/.* \([0-9]*\) tokens\/s.*/\1/p' | tail -n 1 >"$folder/$1"
}

best() { sort -n "$folder/$1".* | tail -n 1; }

for turn in 1 2 3; do
    train "alone.$turn"
    for ((i = 0; i < cores; i++)); do
        while :; do :; done &
        others+=($!)
    done
    train "loops.$turn"
    kill "${others[@]}"
    wait "${others[@]}" 2>/dev/null || true
    others=()
    train "first.$turn" &
    train "second.$turn"
    wait
done
echo "tokens/s on $cores cores        alone  beside $cores loops  two trainings"
printf '%-22s %10d %15d %9d, %d\n' "$program" "$(best alone)" "$(best loops)" "$(best first)" \
    "$(best second)"
