#!/usr/bin/env bash
# What a change gained: a training step of each of these commits' loopmdm.c, in turns on this machine. From the repository root:
#     bash dev/bench/compare.sh COMMIT COMMIT...        e.g. HEAD~1 HEAD; "." is the working tree
# TURNS=9 and SHAPE="d6 4096 16 1" (preset, V, B, S, and T where it is another) if not said. A turn is the best of five steps, and each turn begins with another commit.
# Prints the best turn and the median in milliseconds, and both as speeds relative to the first commit's: where they disagree, there was noise.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: bash dev/bench/compare.sh COMMIT COMMIT..."; exit 2; }
turns=${TURNS:-9} shape=${SHAPE:-d6 4096 16 1} work=build/compare
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
declare -A times
count=${#programs[@]}
for ((turn = 0; turn < turns; turn++)); do
    for ((i = 0; i < count; i++)); do
        program=${programs[$(((turn + i) % count))]}
        times[$program]+="$($program $shape | head -n 1 | grep -o 'takes [0-9.]*' | cut -d' ' -f2) "
    done
done
printf '%-10s %-60s %8s %8s  %s\n' "" "training step, $shape, $turns turns" best median "relative"
first=()
for ((i = 0; i < count; i++)); do
    commit=${*:$((i + 1)):1} title="working tree"
    [ "$commit" = . ] || title=$(git log -1 --format=%s "$commit")
    sorted=($(printf '%s\n' ${times[${programs[$i]}]} | sort -n)) # best first
    figures=(${sorted[0]} ${sorted[$((turns / 2))]})
    [ $i -gt 0 ] || first=(${figures[@]})
    printf '%-10s %-60.60s %8s %8s  %s\n' "$commit" "$title" ${figures[@]} "$(awk -v a=${first[0]} -v b=${figures[0]} -v c=${first[1]} -v d=${figures[1]} 'BEGIN {printf "%.2f %.2f", a / b, c / d}')"
done
