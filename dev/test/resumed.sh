# To be sourced by kill.sh and full_disk.sh, which break trainings off and resume them: a folder
# with data, checks, and whether a run is the unbroken one.
. dev/test/checks.sh # step_of; check and counted are others here, since a failure keeps its files
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000} # see Makefile
ok=0 bad=0
folder=$(mktemp -d)
run=$folder/run # the run that is checked
trap '[ $bad -ne 0 ] || rm -rf "$folder"' EXIT # after a failure it stays
tokenizer=dev/data/stories.tok
for name in README.md LICENSE; do
    ./loopmdm tokenize --tokenizer $tokenizer --input $name --output "$folder/$name.bin" \
        >/dev/null || exit
done
tiny="--data $folder/README.md.bin --tokenizer $tokenizer --model d2 --batch 2 --seq-len 16
    --warmup 3"
validation="--val-data $folder/LICENSE.bin --val-rows 4"

# check NAME PROBLEM: one check. It passes if there is no problem; otherwise it keeps the run.
check() {
    if [ -z "$2" ]; then
        ok=$((ok + 1))
        echo "ok    $1"
    else
        bad=$((bad + 1))
        echo "FAIL  $1: ${2%; }"
        [ ! -d "$run" ] || cp -r "$run" "$folder/failed$bad"
    fi
}

# Ends the script.
counted() {
    [ $bad -eq 0 ] || echo "      the files of each failure are in $folder/failed*"
    echo "$ok passed, $bad failed"
    [ $bad -eq 0 ]
    exit
}

# difference WANTED GOT: prints which files differ in the two folders: nothing if all are the same.
# The speed in log.csv may differ.
difference() {
    local wanted name
    for wanted in "$1"/*; do
        name=${wanted##*/}
        if [ "$name" = log.csv ]; then
            cmp -s <(cut -d, -f1-6,8- "$wanted") <(cut -d, -f1-6,8- "$2/$name" 2>/dev/null)
        else
            cmp -s "$wanted" "$2/$name"
        fi || echo -n "$name is another; "
    done
    [ "$(ls "$1")" = "$(ls "$2")" ] || echo -n "there are $(ls "$2" | paste -sd' '); "
}
