#!/usr/bin/env bash
# What a change gained: training steps of several commits, in turns on this machine.
#     bash dev/bench/compare.sh COMMIT COMMIT...      e.g. HEAD~1 HEAD; "." is the working tree
# SHAPE="d6 4096 16 1" is the default: preset, V, B, S and, if not the preset's, T. SHAPE=train
# is the shape of make train. PRECISION=bf16 is for programs that have --precision. In each of
# TURNS=9 turns every program trains the same steps on the same tokens, and each turn begins with
# another program.
# Prints milliseconds of a step, and the speed relative to the first commit. "best" takes each step
# from its fastest turn, "median" from its median turn. Where the two disagree, there was noise.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: bash dev/bench/compare.sh COMMIT COMMIT..."; exit 2; }
turns=${TURNS:-9} shape=${SHAPE:-d6 4096 16 1} work=build/compare
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000} # see Makefile
flags="-O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp"
[ "$(uname -m)" != x86_64 ] || flags+=" -mprefer-vector-width=512" # see Makefile

if [ "$shape" = train ]; then
    V=703 B=4 T=96
    options="--fixed-rows --layers 4 --channels 64 --heads 4 --loop 1:3 --max-loops 4 --steps 200"
else
    read -r preset V B S T <<<"$shape"
    declare -A length=([d2]=32 [nano]=128 [d6]=256 [d12]=1024)
    T=${T:-${length[$preset]}}
    options="--model $preset --max-loops $S --loop-dist fixed --steps 6"
    # The present d12 would take 8 batches a step and keep an average. Old programs do not.
    if [ "$preset" = d12 ]; then options+=" --accum 1 --ema 0"; fi
fi
[ "${PRECISION:-fp32}" = fp32 ] || options+=" --precision $PRECISION"
options+=" --vocab $V --batch $B --seq-len $T --data $work/data.bin"

# Each commit's program. Before the tools became a file of their own, loopmdm.c was all of it.
mkdir -p $work
programs=()
for commit in "$@"; do
    folder=$work/$(echo "$commit" | tr -c 'A-Za-z0-9\n' '_')
    rm -rf "$folder" && mkdir -p "$folder"
    if [ "$commit" = . ]; then
        cp -r loopmdm.c dev "$folder"
    else
        git archive "$commit" loopmdm.c dev | tar -x -C "$folder"
    fi
    source=$folder/loopmdm.c
    [ -f "$folder/dev/tools.c" ] && source=$folder/dev/tools.c
    ${CC:-cc} -std=c11 $flags -I"$folder" "$source" -o "$folder/loopmdm" -lm
    programs+=("$folder/loopmdm")
done

# Random tokens as a shard: a header of 256 ints (magic, version, number of tokens), then the tokens
python3 - $work/data.bin "$V" <<'END'
import array, random, sys
n = 960000
header = array.array("i", [20240520, 1, n] + [0] * 253)
tokens = array.array("H", random.Random(1).choices(range(int(sys.argv[2])), k=n))
open(sys.argv[1], "wb").write(header.tobytes() + tokens.tobytes())
END

# times: program, turn, step, milliseconds. The first step touches the memory and does not count.
rm -f $work/times
for ((turn = 0; turn < turns; turn++)); do
    for ((i = 0; i < $#; i++)); do
        k=$(((turn + i) % $#))
        rm -rf $work/run
        "${programs[$k]}" train $options --out $work/run >/dev/null
        awk -F, -v k=$k -v turn=$turn -v tokens=$((B * T)) \
            'NR > 2 { print k, turn, $1, 1000 * tokens / $7 }' $work/run/log.csv >>$work/times
    done
done

printf '%-10s %-58s %8s %8s  %s\n' "" "training step, $shape, $turns turns" best median "relative"
for ((k = 0; k < $#; k++)); do
    commit=${*:$((k + 1)):1} title="working tree"
    [ "$commit" = . ] || title=$(git log -1 --format=%s "$commit")
    # Sorted by step and time, a step's first line is its fastest turn, its middle line the median.
    read -r best median <<<"$(grep "^$k " $work/times | sort -k3,3n -k4,4g | awk -v turns=$turns '
        { place = (NR - 1) % turns; steps += place == 0 }
        place == 0 { best += $4 }
        place == int(turns / 2) { median += $4 }
        END { print best / steps, median / steps }')"
    [ $k -gt 0 ] || first_best=$best first_median=$median
    awk -v commit="$commit" -v title="$title" -v a="$first_best" -v b="$best" -v c="$first_median" \
        -v d="$median" 'BEGIN {
            printf "%-10s %-58.58s %8.2f %8.2f  %.3f %.3f\n", commit, title, b, d, a / b, c / d
        }'
done
