# To be sourced: how a part of a test counts its checks.

# check NAME STATUS: one check. The part sets ok=0 bad=0 at its start and ends with counted.
check() {
    if [ "$2" -eq 0 ]; then
        ok=$((ok + 1))
        echo "ok    $1"
    else
        bad=$((bad + 1))
        echo "FAIL  $1"
    fi
}
counted() { echo "$ok passed, $bad failed"; }

# step_of FILE: the step in the header of model.bin or state.bin, 0 if the file is too short.
step_of() { echo $(($(od -An -td4 -j44 -N4 "$1" 2>/dev/null))); }
