# To be sourced: runs the parts of a test, several at a time, and adds up what they count.
# A part is a command or a function whose last line is "N passed, N failed".
. dev/test/checks.sh
jobs=${JOBS:-2} # parts at a time
logs=build/test/logs
passed=0 failed=0 running=0
rm -rf $logs && mkdir -p $logs
trap 'kill $(jobs -p) 2>/dev/null; exit 1' INT TERM # Ctrl-C ends the parts too

# start NAME COMMAND...: runs a part in the background, as soon as fewer than $jobs parts run.
start() {
    local name=$1
    shift
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do
        wait -n
        show_ended
    done
    {
        SECONDS=0
        ("$@") >"$logs/$name" 2>&1 # in a subshell, which a function may leave with exit
        echo "$? $SECONDS" >"$logs/$name.ended"
    } &
    running=$((running + 1))
}

# finish: waits for all parts, prints what failed, "PART:FAIL  CHECK", and the sums, and ends the
# script. Exit status 1 if a check failed.
finish() {
    wait
    show_ended
    if [ $running -ne 0 ]; then
        echo "FAIL  $running parts were killed"
        failed=$((failed + running))
    fi
    echo
    grep -ar '^FAIL' "$logs" | sed "s|^$logs/||"
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
    exit
}

# Prints what each part that has ended wrote, and adds up its last line. A part that ends without
# such a line, or with a status that does not fit it, counts as one failure more.
show_ended() {
    local ended name status seconds last
    for ended in "$logs"/*.ended; do
        [ -f "$ended" ] || continue
        name=$(basename "$ended" .ended)
        read -r status seconds <"$ended"
        rm "$ended"
        running=$((running - 1))
        echo "---- $name ($seconds s)"
        cat "$logs/$name"
        last=$(tail -n 1 "$logs/$name" | grep -E '^[0-9]+ passed, [0-9]+ failed$')
        if [ -z "$last" ] || { [ "$status" -ne 0 ] && [ "${last##*, }" = "0 failed" ]; }; then
            echo "FAIL  $name ended with status $status" | tee -a "$logs/$name"
            failed=$((failed + 1))
        fi
        [ -n "$last" ] || continue
        passed=$((passed + $(echo "$last" | cut -d' ' -f1)))
        failed=$((failed + $(echo "$last" | cut -d' ' -f3)))
    done
}
