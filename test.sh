#!/usr/bin/env bash
# Linter and tests in the environment of run.sh: ./test.sh [arguments of pytest, such as -k optimizer or -x]
# Without arguments all tests, half of the files beside the other half: on two cores it takes half the time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./run.sh --setup-only
bin=.venv/bin
[[ -d $bin ]] || bin=.venv/Scripts  # Windows
"$bin/ruff" check .
if (($#)); then
    exec "$bin/python" -m pytest "$@"
fi

files=(tests/test_*.py) first=() second=()
for i in "${!files[@]}"; do
    if ((i % 2)); then second+=("${files[i]}"); else first+=("${files[i]}"); fi
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
log=$(mktemp) failed=0
"$bin/python" -m pytest "${second[@]}" >"$log" 2>&1 &
other=$!
trap 'kill "$other" 2>/dev/null || true; rm -f "$log"' EXIT
trap 'exit 130' INT TERM
"$bin/python" -m pytest "${first[@]}" || failed=$?
wait "$other" || failed=$?
cat "$log"
exit "$failed"
