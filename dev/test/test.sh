#!/usr/bin/env bash
# make test: every check, from the root of the repository, after make has built what it needs.
# TINYSTORIES=FILE uses that text for the tokenizer and training checks, not the generated stories.
# JOBS=4 runs four parts at a time, not two.
set -uo pipefail
. dev/test/parts.sh
python=.venv/bin/python
floats="-ffp-contract=fast -fno-math-errno -fno-trapping-math"
warnings="-Wall -Wextra -Werror"
: "${CC:=cc}" "${ARCH:=}"
small=(dev/reference/*.bin)
large=build/test/reference
export ASAN_OPTIONS=detect_leaks=0 # the program leaves memory to the end of the process on purpose
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000} # see Makefile
export OMP_WAIT_POLICY=PASSIVE # PyTorch's OpenMP does not know GOMP_SPINCOUNT

# Every compiler that is here takes the program as C11 and as C++17 without a warning. The parts
# below compile it in other ways.
compilers() {
    local ok=0 bad=0 compiler options
    for compiler in "gcc -std=c11" "clang -std=c11" "g++ -x c++ -std=c++17" \
        "clang++ -x c++ -std=c++17"; do
        command -v "${compiler%% *}" >/dev/null || continue
        for options in "-O3 $ARCH -fopenmp" "-O2"; do
            if [[ $options == *openmp* ]]; then
                echo '#include <omp.h>' | $compiler -fopenmp -E - >/dev/null 2>&1 || continue
            fi
            $compiler $options $floats $warnings -I. dev/tools.c -o build/test/compiled -lm
            check "$compiler $options" $?
        done
    done
    [ $ok -gt 0 ] || check "a compiler is here" 1
    counted
}

# -Ofast and the like make results wrong, so they must not compile. Without OpenMP make says so.
refused() {
    local ok=0 bad=0 options
    for options in -Ofast "-O2 -ffast-math" "-O2 -ffinite-math-only" \
        "-O2 -funsafe-math-optimizations"; do
        # clang defines no macro for this option
        [[ $options == *unsafe* && $($CC --version) == *clang* ]] && continue
        ! $CC -std=c11 $options $ARCH loopmdm.c -o build/test/fast -lm 2>build/test/fast.log &&
            grep -q 'compile loopmdm without -Ofast and -ffast-math' build/test/fast.log
        check "$options: refused with a sentence" $?
    done
    [[ $(make -n OPENMP=) == *"Built without OpenMP: loopmdm uses one thread"* ]]
    check "make OPENMP= says that there is one thread" $?
    counted
}

# README's first command, with a smaller model and fewer steps, in a copy of the files that has the
# stories, but no program. Called again with more steps it goes on.
make_train() {
    local ok=0 bad=0 folder options
    options="--fixed-rows --layers 4 --channels 16 --heads 2 --seq-len 96 --batch 4 --steps"
    folder=$(mktemp -d)
    mkdir "$folder/build"
    cp -a Makefile loopmdm.c dev "$folder"
    cp -a build/stories* "$folder/build"
    cd "$folder" || return
    make train TRAIN="$options 3" >first.log 2>&1
    check "make train" $? || tail -n 3 first.log
    make train TRAIN="$options 5" >second.log 2>&1
    check "make train, called again" $? || tail -n 3 second.log
    [ "$(cut -d, -f1 build/run/log.csv | tr '\n' ' ')" = "step 1 2 3 4 5 " ]
    check "make train goes on where it was" $?
    [ "$(grep -caE '^ +[123468] +[0-9]+ +[0-9.]+ \+- ' second.log)" -eq 6 ] &&
        tr '\n' ' ' <second.log |
        grep -qa "Kate had a small.* to eat in the field. Then Tom came.*, but he had nothing"
    check "make train ends with the NELBO of six numbers of loops, and with samples" $?
    make demo >demo.log 2>&1
    check "make demo" $?
    python3 -c 'import re
board = [re.findall("[1-9]", line) for line in open("demo.log") if re.match("([1-9] ){3}[|]", line)]
boxes = [[board[i // 3 * 3 + j // 3][i % 3 * 3 + j % 3] for j in range(9)] for i in range(9)]
raise SystemExit(any(sorted(unit) != list("123456789") for unit in [*board, *zip(*board), *boxes]))'
    check "make demo solves its Sudoku" $?
    cd - >/dev/null
    rm -rf "$folder"
    counted
}

# bench.py builds what it needs, in a copy of the files in which nothing was built.
bench() {
    local ok=0 bad=0 folder here=$PWD
    folder=$(mktemp -d)
    cp -r Makefile loopmdm.c train_gpt2style.py dev "$folder"
    cd "$folder" || return
    "$here/$python" dev/bench/bench.py sample --model d2 --vocab 64 --csv bench.csv >bench.log 2>&1
    check "bench.py in a fresh clone" $? || tail -n 3 bench.log
    [ "$(grep -c '^sample,.*,tokens/s,loopmdm fp32,[0-9]' bench.csv)" -eq 2 ]
    check "bench.py: the table of two batches" $?
    cd - >/dev/null
    rm -rf "$folder"
    counted
}

# loopmdm.c in an empty folder: it compiles as C and C++, trains, evaluates and samples token ids.
alone() {
    local ok=0 bad=0 folder language said
    folder=$(mktemp -d)
    cp loopmdm.c "$folder"
    cd "$folder" || return
    # A shard: a header of 256 ints (magic, version, number of tokens), then the tokens
    python3 - <<'END'
import array
header = array.array("i", [20240520, 1, 20000] + [0] * 253)
tokens = array.array("H", [i % 10 for i in range(20000)])
open("tokens.bin", "wb").write(header.tobytes() + tokens.tobytes())
END
    for language in "c -std=c11" "c++ -std=c++17"; do
        $CC -x $language -O3 $warnings loopmdm.c -o loopmdm -lm
        check "$language: compiles without a warning" $?
        rm -rf run
        ./loopmdm train --data tokens.bin --vocab 10 --model d2 --batch 4 --steps 200 \
            --noise-warmup 100 --out run |
            tail -n 1 | grep -q '^step 200/200 '
        check "$language: trains d2" $?
        said=$(./loopmdm eval --model run --data tokens.bin --rows 64 --loops 4)
        check "$language: evaluates" $?
        # log(10) = 2.303 nats for a model that knows nothing
        echo "$said" | awk '{ exit !($5 > 0 && $5 < 1.5) }'
        check "$language: has learned: $said" $?
        said=$(./loopmdm sample --model run --steps 8)
        check "$language: samples" $?
        echo "$said" | grep -qE '^[0-9]( [0-9]){31}$'
        check "$language: prints token ids: $said" $?
        said=$(./loopmdm sample --model nowhere 2>&1)
        [ $? -eq 1 ] && [ "$(echo "$said" | wc -l)" -eq 1 ]
        check "$language: an error is one line: $said" $?
    done
    cd - >/dev/null
    rm -rf "$folder"
    counted
}

# build_and_run NAME OPTIONS: builds program and test with these options and runs the small
# reference files.
build_and_run() {
    local name=$1 options=$2
    $CC -std=c11 -I. $options $floats $warnings dev/tools.c -o "build/test/loopmdm_$name" -lm &&
        $CC -std=c11 -I. $options $floats $warnings test_loopmdm.c -o "build/test/test_$name" -lm &&
        "build/test/test_$name" "build/test/loopmdm_$name" "${small[@]}"
}

# test_in NAME OPTIONS ARGUMENTS...: builds the test with these options, and runs it.
test_in() {
    $CC -std=c11 -I. $2 $floats $warnings test_loopmdm.c -o "build/test/test_$1" -lm &&
        "build/test/test_$1" "${@:3}"
}

# --precision bf16: 200 steps beside fp32 (the tolerance is that of test_cuda.sh), other threads.
precision() {
    local ok=0 bad=0 largest command said folder=build/test/precision
    local recipe="--data build/stories_train.bin --val-data build/stories_val.bin --val-rows 64
        --tokenizer dev/data/stories.tok --model d2 --layers 3 --loop 1:2 --lr 3e-3 --steps 200"
    rm -rf $folder
    ./loopmdm train $recipe --threads 1 --out $folder/fp32 >/dev/null
    ./loopmdm train $recipe --threads 1 --precision bf16 --out $folder/bf16 >$folder.log
    check "trains in bf16" $?
    said=$(grep '^matrix products: bf16' $folder.log)
    check "says so: $said" $?
    largest=$(paste -d, <(cut -d, -f4 $folder/fp32/log.csv) <(cut -d, -f4 $folder/bf16/log.csv) |
        awk -F, 'NR > 1 {d = $1 > $2 ? $1 - $2 : $2 - $1; if (d > m) m = d}
            END {print NR == 201 ? m : 9}')
    awk -v d="$largest" 'BEGIN { exit !(d > 0 && d < 0.03) }'
    check "losses of 200 steps: largest difference to fp32 $largest, tolerance 0.03" $?
    ./loopmdm train $recipe --threads 2 --precision bf16 --out $folder/two >/dev/null
    cmp -s $folder/bf16/model.bin $folder/two/model.bin
    check "two threads give the same bits as one" $?
    for command in "eval --data build/stories_val.bin --rows 64 --loops 2" "sample --steps 4"; do
        said=$(./loopmdm $command --model $folder/bf16 --precision bf16 2>&1 >/dev/null)
        [[ $said == "matrix products: bf16"* ]]
        check "${command%% *} says so" $?
    done
    counted
}

# Each experiment in small leaves a table and a figure. A second run has nothing to train.
experiments() {
    local ok=0 bad=0 name script sum log=build/test/experiment.log folder=build/experiments_quick
    rm -rf $folder
    for script in dev/experiments/[a-z]*.py; do
        name=$(basename "$script" .py)
        [[ $name = common || $name = starts ]] && continue
        $python "$script" --quick >$log 2>&1 &&
            ls $folder/"$name"*.csv $folder/"$name"*.png >/dev/null
        check "$name: table and figure" $? || tail -n 1 $log
    done
    sum=$(cat $folder/*.csv $folder/*.png | cksum)
    $python dev/experiments/flops.py --quick >$log 2>&1 && ! grep -q training: $log &&
        [ "$(cat $folder/*.csv $folder/*.png | cksum)" = "$sum" ]
    check "flops: a second run trains nothing and gives the same tables and figures" $?
    echo 'seed 9' >>$folder/sudoku_12T_seed=1/made_of
    ! $python dev/experiments/flops.py --quick 2>$log >/dev/null && [ "$(wc -l <$log)" = 1 ] &&
        grep -q "was begun with other options" $log
    check "flops: a model with other options ends it with one line" $?
    $python dev/experiments/starts.py --check --table >$log && grep -q '^tiny12_loop' $log
    check "starts: its models are train_gpt2style.py's; its table" $? || tail -n 1 $log
    counted
}

# The presets nano and d6 against PyTorch, whose files are too large for the repository.
large_reference() {
    $python dev/reference/dump.py --large --out $large &&
        build/test_loopmdm ./loopmdm $large/*.bin
    local status=$?
    rm -rf $large
    return $status
}

sanitizers="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
export OMP_NUM_THREADS=1 # each part has one core. Checks of several threads set their number
start python $python dev/test/test_python.py # the longest parts first
start reference large_reference
start web $python dev/test/test_web.py
. dev/test/test_cuda.sh on_cpu
start sanitizers build_and_run sanitized "$sanitizers"
start experiments experiments
start compilers compilers
start portable build_and_run portable "-O2"
start plain_gemm build_and_run plain_gemm "-O3 $ARCH -DPLAIN_GEMM"
start bf16 test_in bf16 "-O3 $ARCH $OPENMP -DBF16=1" ./loopmdm "${small[@]}"
OMP_NUM_THREADS=3 start bf16_kernels test_in bf16_kernels \
    "-O2 $ARCH $OPENMP -DBF16=1 -DBF16_ON_CPU" --layers
start bf16_sanitized test_in bf16_sanitized "$sanitizers -DBF16=1 -DBF16_ON_CPU" --layers
start precision precision
start alone alone
start refused refused
start fuzz sh -c 'make -s build/fuzz && build/fuzz 4000'
start kill bash dev/test/kill.sh 20
start processes env ARCH="$ARCH" OPENMP="$OPENMP" bash dev/test/processes.sh
start full_disk bash dev/test/full_disk.sh
start make_train make_train
start bench bench
start threads env -u OMP_NUM_THREADS build/test_loopmdm ./loopmdm "${small[@]}"
start style python3 dev/test/style.py
finish
