#!/usr/bin/env bash
# The experiments chains.py and text.py on a GPU. Each model has TIMES (4) times the FLOPs that it
# has on a CPU. From the root of the repository:
#
#     TINYSTORIES="FILE ..." PUZZLES="FILE ..." bash dev/experiments/gpu.sh [TASK ...]
#
# TASK is rule30, problems, sudoku9, text12, text4 or text64; without one they come in this order.
# The last three need TINYSTORIES. The script needs nvcc, no network, and a PYTHON (python3) that
# has numpy, matplotlib and tokenizers. JOBS (4) models are trained at a time.
#
# After LIMIT seconds (480) it stops. The same command goes on from there: all models are in
# build/experiments_bf16_cuda_x4. CSV files and figures go into OUT (dev/results), and tables are
# added to gpu_experiments_NAME.txt there, where NAME is the card. Status 1: not all is done.
#
# QUICK=1 PROGRAM=loopmdm_cuda_on_cpu OUT=build tries all of it without a GPU.
set -uo pipefail
: "${TIMES:=4}" "${JOBS:=4}" "${LIMIT:=480}" "${PYTHON:=python3}" "${OUT:=dev/results}"
: "${PROGRAM:=loopmdm_cuda}" "${TINYSTORIES:=}" "${PUZZLES:=}" "${QUICK:=}"
log=build/gpu_experiments.log
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
table=$OUT/gpu_experiments_$(echo "${name:-no GPU}" | tr -c 'A-Za-z0-9\n' '_').txt
mkdir -p "$OUT" build
say() { echo "$@" | tee -a "$table"; }

tasks=("$@")
text="text12 text4 text64"
[ $# -gt 0 ] || tasks=(rule30 problems sudoku9 ${TINYSTORIES:+$text} ${QUICK:+$text})
data=(build/stories_{train,val}.bin) # what the tasks need; with QUICK text is stories too
for task in "${tasks[@]}"; do
    case $task in
    rule30 | problems) data+=(build/${task}_{train,val}.bin) ;;
    sudoku9) data+=(build/sudoku9_{train,val}.bin build/puzzles9_{46,36,30,26}.bin) ;;
    text64 | text4 | text12) [ "$QUICK" ] || data+=(build/tinystories1024/train.bin) ;;
    *) echo "gpu.sh: no task '$task'" >&2 && exit 2 ;;
    esac
done
if ! make -o .venv/ready PYTHON="$PYTHON" -j"$(nproc)" WARNINGS= TINYSTORIES="$TINYSTORIES" \
    loopmdm "$PROGRAM" "${data[@]}" >$log 2>&1; then
    tail $log
    exit 1
fi
say "==== ${name:-no GPU}, TIMES=$TIMES; prepared in $SECONDS s"

failed=0
for task in "${tasks[@]}"; do
    began=$SECONDS
    if [ "$SECONDS" -ge "$LIMIT" ]; then
        say "---- $task: no time is left"
        failed=1
        continue
    fi
    case $task in text*) program=text ;; *) program=chains ;; esac
    # Only Python gets the signal at the end; it asks the trainings to save, and waits for them.
    timeout --foreground -k 60 $((LIMIT - SECONDS)) "$PYTHON" dev/experiments/$program.py \
        --task "$task" --program "./$PROGRAM" --precision bf16 --times "$TIMES" --jobs "$JOBS" \
        ${QUICK:+--quick} ${PUZZLES:+--puzzles $PUZZLES} >$log 2>&1
    code=$?
    say "---- $task ended with status $code after $((SECONDS - began)) s"
    [ $code -eq 0 ] || grep '^training\|^evaluating\|^solving' $log | tail -n 1 | tee -a "$table"
    grep -v '^training\|^evaluating\|^solving' $log >>"$table"
    [ $code -eq 0 ] || failed=1
    [ "$OUT" = dev/results ] ||
        cp dev/results/{chains,text}_"$task"_*_x"$TIMES".* "$OUT" 2>/dev/null
done
exit $failed
