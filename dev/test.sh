#!/usr/bin/env bash
# make test: every check there is, from the repository root. Its parts each end with "N passed, N failed"; so does this, with the sums.
# TINYSTORIES=FILE uses that text (stories between <|endoftext|> lines) for the tokenizer and training checks, not the generated one.
set -uo pipefail
mkdir -p build/test
python=.venv/bin/python
flags="-ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror"
. dev/parts.sh
: "${CC:=cc}" "${ARCH:=}"

# Every compiler that is here, as C11 and C++17, with and without OpenMP: no warning.
compilers() {
    local ok=0 bad=0 cc
    for cc in "gcc -std=c11" "clang -std=c11" "g++ -x c++ -std=c++17" "clang++ -x c++ -std=c++17"; do
        command -v "${cc%% *}" >/dev/null || continue
        for options in "-O3 $ARCH -fopenmp" "-O3 $ARCH" "-O2"; do
            case "$options" in
                *openmp*) echo '#include <omp.h>' | $cc -fopenmp -E - >/dev/null 2>&1 || continue ;;
            esac
            if $cc $options $flags loopmdm.c -o build/test/compiled -lm; then ok=$((ok + 1)); echo "ok    $cc $options"; else bad=$((bad + 1)); echo "FAIL  $cc $options"; fi
        done
    done
    [ $ok -gt 0 ] || bad=$((bad + 1))
    echo "$ok passed, $bad failed"
}

build_and_run() { # NAME, compiler flags, reference files: builds program and test with these flags, and runs them
    local name=$1 options=$2
    shift 2
    $CC -std=c11 $options $flags loopmdm.c -o "build/test/loopmdm_$name" -lm &&
        $CC -std=c11 $options $flags test_loopmdm.c -o "build/test/test_$name" -lm && "build/test/test_$name" "build/test/loopmdm_$name" "$@"
}

# Each experiment in small: it leaves a table and a figure, and once more it has nothing to train
experiments() {
    local ok=0 bad=0 name script sum log=build/test/experiment.log small=build/experiments_quick
    rm -rf $small
    for script in dev/experiments/[a-z]*.py; do
        name=$(basename "$script" .py)
        [ "$name" = common ] && continue
        if $python "$script" --quick >$log 2>&1 && ls $small/"$name"*.csv $small/"$name"*.png >/dev/null; then
            ok=$((ok + 1)); echo "ok    $name: table and figure"
        else
            bad=$((bad + 1)); echo "FAIL  $name: $(tail -n 1 $log)"
        fi
    done
    sum=$(cat $small/*.csv $small/*.png | cksum)
    if $python dev/experiments/flops.py --quick >$log 2>&1 && ! grep -q training: $log && [ "$(cat $small/*.csv $small/*.png | cksum)" = "$sum" ]; then
        ok=$((ok + 1)); echo "ok    flops: once more it trains nothing, and its tables and figures are the same"
    else
        bad=$((bad + 1)); echo "FAIL  flops: once more it fails, trains again, or its tables or figures differ"
    fi
    echo 'seed 9' >>$small/sudoku_12T_seed=1/made_of
    if $python dev/experiments/flops.py --quick 2>$log >/dev/null || [ "$(wc -l <$log)" != 1 ] || ! grep -q "was begun with other options" $log; then
        bad=$((bad + 1)); echo "FAIL  flops: a model of other options does not end it with one line"
    else
        ok=$((ok + 1)); echo "ok    flops: a model of other options ends it with one line"
    fi
    echo "$ok passed, $bad failed"
}

# What uses one thread, beside the rest
export ASAN_OPTIONS=detect_leaks=0 # memory is left to the end of the process on purpose
one_thread() {
    part compilers compilers
    part without_openmp build_and_run plain "-O3 $ARCH" dev/reference/*.bin
    part portable build_and_run portable "-O2" dev/reference/*.bin
    part sanitizers build_and_run sanitized "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" dev/reference/*.bin
    end_parts
}
with_python() {
    export OMP_NUM_THREADS=1
    OMP_WAIT_POLICY=PASSIVE $python train_gpt2style.py dump --large --out build/test/reference || echo "FAIL: no large reference files"
    part python $python dev/test_python.py
    part experiments experiments
    unset OMP_NUM_THREADS
}
beside one_thread with_python
part reference build/test_loopmdm ./loopmdm dev/reference/*.bin build/test/reference/*.bin
part cuda_on_cpu bash dev/test_cuda.sh on_cpu
rm -rf build/test/reference
end_parts
