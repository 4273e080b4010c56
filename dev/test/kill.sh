#!/usr/bin/env bash
# Kills trainings N times in all at random moments, as kill -9 does, and resumes them. A run that
# reaches its last step must equal the unbroken run, byte for byte. From the root of the repository,
# after make:
#     bash dev/test/kill.sh N [SEED]       SEED chooses the moments
# 1,000 kills take some minutes. The moments are not the same in each run, as speed is not.
set -uo pipefail
if ! [[ $# -le 2 && ${1:-} =~ ^[0-9]+$ && $1 -ge 5 ]]; then
    echo "usage: bash dev/test/kill.sh N [SEED], with N = 5 or more"
    exit 2
fi
number=$1
RANDOM=${2:-1}
. dev/test/resumed.sh

threads="--threads 2"
if ./loopmdm train --help | grep -q "built without OpenMP"; then threads=; fi

# Most of them save in each step, so that many kills meet a checkpoint that is being written. The
# last one needs the log: it has steps after its checkpoints.
kinds=(
    "--channels 16 --steps 30 --save-every 1"
    "--channels 64 --steps 20 --save-every 1 --ema 0.9"
    "--channels 32 --steps 20 --save-every 1 --accum 2 $validation --val-every 3"
    "--channels 64 --steps 20 --save-every 1 $threads"
    "--channels 32 --steps 40 --save-every 4 --ema 0.9 $validation --val-every 2"
)
export OMP_NUM_THREADS=1 # where there is no --threads
killed=0 # in all
writing=0 # how many of these left a new .tmp file
declare -A hits # where they hit

# Where the process was when it was killed. It began when the file mark was touched.
place() {
    local temporary
    for temporary in "$run"/*.tmp; do # one that is older is from an earlier kill
        if [ "$temporary" -nt "$folder/mark" ]; then
            writing=$((writing + 1))
            where="while it wrote ${temporary##*/}"
            return
        fi
    done
    if [ ! -f "$run/state.bin" ]; then where="before the first checkpoint"
    elif [ ! "$run/log.csv" -nt "$folder/mark" ]; then where="while it read what to resume"
    elif [ ! -f "$run/model.bin" ]; then where="between state.bin and model.bin"
    elif [ "$(step_of "$run/state.bin")" -ne "$(step_of "$run/model.bin")" ]; then
        where="between state.bin and model.bin"
    elif [ "$(step_of "$run/state.bin")" -eq "$steps" ]; then where="after the last checkpoint"
    else where="between two checkpoints"
    fi
}

# Sets problem if model.bin is there, but is not whole, or newer than state.bin: then state.bin
# could not give what model.bin is.
inspect() {
    [ -f "$run/model.bin" ] || return
    if ! ./loopmdm info --model "$run" >/dev/null 2>"$folder/said"; then
        problem=$(cat "$folder/said")
    elif [ ! -f "$run/state.bin" ]; then
        problem="model.bin is there without state.bin"
    elif [ "$(step_of "$run/model.bin")" -gt "$(step_of "$run/state.bin")" ]; then
        problem="model.bin is newer than state.bin"
    fi
    [ -z "$problem" ] || problem="killed $where: $problem"
}

# One run with these $options. It is killed until it comes to its end, or there were $enough kills.
broken_run() {
    local u moment resume status=137
    rm -rf "$run"
    while [ $status -eq 137 ] && [ -z "$problem" ]; do
        # From its start to half of the time of the unbroken run, in microseconds. The square of a
        # uniform number: small ones are likelier, for the start of a process is short.
        u=$((RANDOM << 15 | RANDOM))
        moment=$((1 + (took / 2 * (u * u >> 30) >> 30)))
        [ $killed -lt $enough ] || moment=0 # never, to timeout
        resume=
        [ ! -f "$run/state.bin" ] || resume=--resume
        touch "$folder/mark"
        # timeout kills its own child, and no other process that got the same number after its end.
        printf -v moment '%d.%06d' $((moment / 1000000)) $((moment % 1000000))
        timeout --foreground --preserve-status -s KILL $moment ./loopmdm train $options \
            --out "$run" $resume >/dev/null 2>"$folder/said"
        status=$?
        [ $status -eq 137 ] || break
        killed=$((killed + 1))
        place
        hits[$where]=$((${hits[$where]:-0} + 1))
        inspect
    done
    [ -z "$problem" ] || return
    problem=$(difference "$folder/whole" "$run")
    [ $status -eq 0 ] || problem="status $status: $(cat "$folder/said")"
}

for ((i = 0; i < ${#kinds[@]}; i++)); do
    options="$tiny ${kinds[i]}"
    steps=$(sed 's/.*--steps \([0-9]*\).*/\1/' <<<"${kinds[i]}")
    before=$killed runs=0 problem= enough=$((number * (i + 1) / ${#kinds[@]}))
    rm -rf "$folder/whole"
    began=${EPOCHREALTIME/./}
    ./loopmdm train $options --out "$folder/whole" >/dev/null || problem="the unbroken run fails"
    took=$((${EPOCHREALTIME/./} - began))
    while [ $killed -lt $enough ] && [ -z "$problem" ]; do
        of_earlier=$killed
        broken_run
        runs=$((runs + 1))
        [ $killed -gt $of_earlier ] || took=$((took / 2)) # the unbroken run was a slow one
    done
    check "${kinds[i]//$folder\/}: $runs runs, $((killed - before)) kills" "$problem"
done

for where in "${!hits[@]}"; do
    echo "      killed $where: ${hits[$where]}"
done | sort
problem=
[ $writing -gt 0 ] || [ "$number" -lt 100 ] || problem="none, so this test does not test it"
check "$writing of $killed kills while a file was written" "$problem"
counted
