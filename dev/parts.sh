# To be sourced: runs the parts of a test, each of which ends with a line "N passed, N failed", and adds them up.
passed=0 failed=0
mkdir -p build/test

# part NAME COMMAND...: runs it, and adds up what its last line counts; a part that ends without one has failed
part() {
    local name=$1 log=build/test/$1.log
    shift
    echo "---- $name"
    "$@" 2>&1 | tee "$log"
    local status=${PIPESTATUS[0]} last
    last=$(tail -n 1 "$log" | grep -E '^[0-9]+ passed, [0-9]+ failed$')
    if [ -z "$last" ] || { [ "$status" -ne 0 ] && [ "${last##*, }" = "0 failed" ]; }; then last="0 passed, 1 failed"; echo "FAIL $name ended with status $status"; fi
    passed=$((passed + $(echo "$last" | cut -d' ' -f1)))
    failed=$((failed + $(echo "$last" | cut -d' ' -f3)))
}

# beside NAME COMMAND...: runs the function NAME, which has parts of its own and ends with end_parts, in the background while COMMAND runs here;
# when both have ended, shows what NAME wrote and adds up its sums
beside() {
    local name=$1 out=build/test/$1.out background status
    shift
    "$name" >"$out" 2>&1 &
    background=$!
    "$@"
    wait $background
    status=$?
    shown() { cat "$out"; return $status; } # one that died has a part's sums last, but not a status of 0
    part "$name" shown
}

end_parts() { # the sum, and the exit status
    echo
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}
