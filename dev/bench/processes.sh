#!/usr/bin/env bash
# Training by one process of 2 threads beside 2 processes of one thread: the same step, in turns,
# best of three. Prints a table, also of what adding up the gradients takes. Needs mpicc and mpirun;
# from the root of the repository:
#     bash dev/bench/processes.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
make -s loopmdm MPI=1
cp loopmdm "$folder/loopmdm"
make -s loopmdm
python3 - "$folder/tokens.bin" <<'END' # random tokens
import array, random, sys
header = array.array("i", [20240520, 1, 1000000] + [0] * 253)
tokens = array.array("H", [random.randrange(4096) for _ in range(1000000)])
open(sys.argv[1], "wb").write(header.tobytes() + tokens.tobytes())
END

# run N BATCH THREADS ARGUMENTS...: prints tokens/s, then ms of summing a step
run() {
    rm -rf "$folder/run"
    mpirun -q --bind-to none -n "$1" "$folder/loopmdm" train --data "$folder/tokens.bin" \
        --batch "$2" --threads "$3" "${@:4}" --out "$folder/run" >"$folder/said"
    grep 'tokens/s' "$folder/said" | tail -n 1 | sed 's/.*| *\([0-9]*\) tokens.*/\1/'
    sed -n 's/^sums over processes: \([0-9.]*\) ms.*/\1/p' "$folder/said"
}

compare() { # NAME BATCH ARGUMENTS...
    local name=$1 batch=$2 turn best_one=0 best_two=0 least=1e9 sum one two
    shift 2
    for turn in 1 2 3; do
        one=$(run 1 "$batch" 2 "$@")
        { read -r two; read -r sum; } < <(run 2 $((batch / 2)) 1 "$@")
        best_one=$((one > best_one ? one : best_one))
        best_two=$((two > best_two ? two : best_two))
        least=$(awk -v a="$least" -v b="$sum" 'BEGIN { print (b < a ? b : a) }')
    done
    printf '| %s | %d | %d | %.2f | %.1f |\n' "$name" "$best_one" "$best_two" \
        "$(awk -v a="$best_two" -v b="$best_one" 'BEGIN { print a / b }')" "$least"
}

echo "| | 1 process, 2 threads: tokens/s | 2 processes, 1 thread | ratio | summing, ms a step |"
echo "|---|---|---|---|---|"
compare "nano, V=4096, T=128, B=32" 32 --model nano --vocab 4096 --steps 20 --max-loops 1
compare "d6, V=4096, T=256, B=16" 16 --model d6 --vocab 4096 --steps 4 --max-loops 1
compare "d12, V=50257, T=256, B=2" 2 --model d12 --vocab 50257 --seq-len 256 --steps 2 --max-loops 1
