#!/usr/bin/env bash
# A disk that becomes full, at each operation by which a command writes files. From the root of the
# repository, after make:
#     bash dev/test/full_disk.sh
# full_disk.c counts the operations. In run n the n-th fails, and all that follow; then the same
# with only this one, as when another program makes room. Each time the command must end with one
# clear line and leave what was there, without a .tmp file. With room again it must give what it
# gives without a break: train from its last checkpoint.
set -uo pipefail
if ! getconf GNU_LIBC_VERSION >/dev/null 2>&1; then
    echo "full_disk.c needs glibc: not checked"
    echo "0 passed, 0 failed"
    exit
fi
. dev/test/resumed.sh
"${CC:-cc}" -std=c11 -O2 -Wall -Wextra -Werror -shared -fPIC dev/test/full_disk.c \
    -o "$folder/full_disk.so" || exit
export OMP_NUM_THREADS=1
old=$folder/old whole=$folder/whole

# on_disk OPERATION ONCE COMMAND...: runs it on a disk that is full at this operation, or never at
# 0. Sets status and operations.
on_disk() {
    local once=()
    echo 0 >"$folder/count"
    [ "$2" -eq 0 ] || once=(FULL_DISK_ONCE=1)
    env LD_PRELOAD="$folder/full_disk.so" FULL_DISK_COUNT="$folder/count" FULL_DISK_AT="$1" \
        "${once[@]}" "${@:3}" >/dev/null 2>"$folder/said"
    status=$?
    operations=$(cat "$folder/count")
}

# What is wrong after a command that had no room: prints nothing if all is well.
wrong_after() {
    local said name step
    said=$(cat "$folder/said")
    [ "$status" -eq 1 ] || echo -n "status $status; "
    [[ $said == "loopmdm: "* && $said != *$'\n'* ]] || echo -n "it said '$said'; "
    ls "$run" 2>/dev/null | sed -n 's/\.tmp$/& was left; /p' | tr -d '\n'
    if [ ! -f "$whole/state.bin" ]; then
        difference "$old" "$run"
        return
    fi
    # What train writes may be newer. Each file must be as a run that ended at its step left it.
    for name in model.bin state.bin; do
        if [ -f "$run/$name" ]; then
            step=$(step_of "$run/$name")
            cmp -s "$folder/step$step/$name" "$run/$name" || echo -n "$name is not whole; "
        elif [ -f "$old/$name" ]; then
            echo -n "$name is gone; "
        fi
    done
    [ ! -f "$old/log.csv" ] ||
        cmp -s -n "$(wc -c <"$old/log.csv")" "$old/log.csv" "$run/log.csv" ||
        echo -n "lines of log.csv are gone; "
}

# every_operation NAME COMMAND...: the check of a command that writes into $run, where it finds the
# files of $old. It goes on with --resume where a checkpoint is.
every_operation() {
    local name=$1 tried=0 once n problem=
    shift
    resume() { [ ! -f "$run/state.bin" ] || echo --resume; }
    for once in 0 1; do
        for ((n = 1; ; n++)); do
            rm -rf "$run"
            [ ! -d "$old" ] || cp -r "$old" "$run"
            on_disk $n $once "$@" $(resume)
            if [ "$operations" -lt $n ]; then # there was room for all of them
                [ $status -eq 0 ] && break
                problem="status $status: $(cat "$folder/said")"
                break 2
            fi
            tried=$((tried + 1))
            problem=$(wrong_after)
            [ -z "$problem" ] || break 2
            on_disk 0 0 "$@" $(resume)
            [ $status -eq 0 ] || problem="with room again: $(cat "$folder/said"); "
            problem+=$(difference "$whole" "$run")
            [ -z "$problem" ] || break 2
        done
    done
    if [ -n "$problem" ]; then problem="operation $n, once=$once: $problem"
    # To create, write, sync and rename a file are four, which fail in two ways.
    elif [ $tried -lt 8 ]; then problem="so few that full_disk.c does not count them"
    fi
    check "$name: $tried failures of writing" "$problem"
}

# table NAME COMMAND...: every_operation() of a command that writes $run/table, where an old one is.
table() {
    rm -rf "$run" "$old" "$whole"
    mkdir "$run" "$old"
    "${@:2}" >/dev/null
    mv "$run" "$whole"
    echo old >"$old/table"
    every_operation "$@"
}

# With --floor 1 the learning rate does not depend on --steps: so a run to step 8 is the beginning
# of one to step 12. In log.csv a step of two digits can be cut off after the first.
train="./loopmdm train $tiny --channels 16 --ema 0.9 --save-every 4 --floor 1 $validation
    --val-every 4"
problem=
for step in 4 8 12; do
    on_disk 0 0 $train --steps $step --out "$folder/step$step"
    problem+=$(cat "$folder/said")
done
check "there is room for everything" "$problem"
cp -r "$folder/step12" "$whole"
every_operation "train" $train --steps 12 --out "$run"
cp -r "$folder/step8" "$old"
every_operation "train --resume" $train --steps 12 --out "$run"

model="--model $folder/step12 --data $folder/LICENSE.bin --rows 4"
table "eval --by-t" ./loopmdm eval $model --loops 1 --by-t "$run/table"
table "eval --by-loop" ./loopmdm eval $model --loops 2 --by-loop "$run/table"
table "attention --csv" ./loopmdm attention $model --csv "$run/table"
table "tokenize --output" ./loopmdm tokenize --tokenizer $tokenizer --input README.md \
    --output "$run/table"

# What the program has from libraries. The rest of the functions that write files must not be there.
# With write() it only says that the CPU is another one.
used=$(nm -D --undefined-only ./loopmdm | sed 's/.* //; s/@.*//')
never='pwrite|p?writev|creat|fdopen|freopen|f?truncate|mkstemp|v?dprintf|fopen64|open64'
others=$(grep -xE "$never" <<<"$used")
grep -qx fopen <<<"$used" || others="fopen is not found"
check "the program writes files by no other functions" "$others"
counted
