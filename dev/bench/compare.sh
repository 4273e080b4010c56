#!/usr/bin/env bash
# What a change gained: a training step of each of these commits' loopmdm.c, in turns on this machine, best of several. From the repository root:
#     bash dev/bench/compare.sh COMMIT COMMIT...        e.g. HEAD~1 HEAD; "." is the working tree
# TURNS=5 and SHAPE="d6 4096 16 1" (preset, V, B, S) if not said. Prints milliseconds, and the speed relative to the first.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: bash dev/bench/compare.sh COMMIT COMMIT..."; exit 2; }
turns=${TURNS:-5} shape=${SHAPE:-d6 4096 16 1} work=build/compare
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000} # see Makefile
flags="-O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp"
mkdir -p $work
programs=()
for commit in "$@"; do
    name=$(echo "$commit" | tr -c 'A-Za-z0-9\n' '_')
    rm -rf "${work:?}/$name" && mkdir -p "$work/$name"
    if [ "$commit" = . ]; then cp -r loopmdm.c dev "$work/$name"
    else git archive "$commit" loopmdm.c dev | tar -x -C "$work/$name"; fi
    mkdir -p "$work/$name/dev/bench" && cp dev/bench/profile.c "$work/$name/dev/bench"
    ${CC:-cc} -std=c11 $flags "$work/$name/dev/bench/profile.c" -o "$work/$name/profile" -lm
    programs+=("$work/$name/profile")
done
declare -A best
for ((turn = 0; turn < turns; turn++)); do
    for program in "${programs[@]}"; do
        ms=$($program $shape | head -n 1 | grep -o 'takes [0-9.]*' | cut -d' ' -f2)
        best[$program]=$(echo "$ms ${best[$program]:-$ms}" | awk '{print ($1 < $2) ? $1 : $2}')
    done
done
printf '%-10s %-70s %8s %9s\n' "" "training step, $shape, best of $turns" ms relative
for i in "${!programs[@]}"; do
    commit=${*:$((i + 1)):1} title="working tree"
    [ "$commit" = . ] || title=$(git log -1 --format=%s "$commit")
    printf '%-10s %-70.70s %8s %9.2f\n' "$commit" "$title" "${best[${programs[$i]}]}" "$(awk -v a="${best[${programs[0]}]}" -v b="${best[${programs[$i]}]}" 'BEGIN {print a / b}')"
done
