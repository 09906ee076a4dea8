#!/usr/bin/env bash
# Linter and tests in the environment of run.sh: ./test.sh [arguments of pytest, such as -k optimizer or -x]
# Without arguments all tests, four files beside four others till all are done: on two cores it takes half the time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./run.sh --setup-only
bin=.venv/bin
[[ -d $bin ]] || bin=.venv/Scripts  # Windows
"$bin/ruff" check .
if (($#)); then
    exec "$bin/python" -m pytest "$@"
fi

run_files() { # FILES...: what they say is shown when they are done
    local log code=0
    log=$(mktemp)
    "$bin/python" -m pytest "$@" >"$log" 2>&1 || code=$?
    cat "$log"
    rm -f "$log"
    return "$code"
}
export -f run_files
export bin OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
printf '%s\0' tests/test_*.py | xargs -0 -P 2 -n 4 bash -c 'run_files "$@"' _
