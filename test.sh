#!/usr/bin/env bash
# Linter and tests in the environment of run.sh: ./test.sh [arguments of pytest, such as -k optimizer or -x]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./run.sh --setup-only
.venv/bin/ruff check .
exec .venv/bin/python -m pytest "$@"
