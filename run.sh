#!/usr/bin/env bash
# From a fresh clone to a trained model: environment, data, training, a sample, a loss plot, a summary. What is already
# there is not made again; each call trains one more run. Relative paths start in this folder.
#
#   ./run.sh                                               all GPUs of this machine, or its CPU
#   ./run.sh --iterations 100 --experiment_name try        arguments go to train_gpt.py
#   ./run.sh --setup-only                                  only the environment, in .venv
#   PYTHON=python3.12 ./run.sh                             .venv from this Python
#
# .venv is made by uv where that is installed, else by venv and pip; both install what requirements.txt pins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly CPU_WHEELS=https://download.pytorch.org/whl/cpu
case $(uname -s) in
    MINGW* | MSYS* | CYGWIN*) bin=.venv/Scripts ;;  # Git Bash
    *) bin=.venv/bin ;;
esac

fail() {
    echo "error: $*" >&2
    exit 1
}

reachable() {  # url
    "$bin/python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null
}

make_environment() {
    local python=${PYTHON:-python3}
    if command -v uv >/dev/null; then
        [[ -x $bin/python ]] || uv venv --quiet --clear --python "${PYTHON:->=3.11}" .venv ||
            fail "uv cannot make .venv from Python ${PYTHON:-3.11 or later}: see above"
        return
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "'$python' is not Python 3.11 or later: install one, or name it: PYTHON=python3.12 $0"
    [[ -x $bin/pip ]] || "$python" -m venv --clear .venv ||
        fail "'$python' cannot make .venv: install its venv module (on Debian and Ubuntu: apt install python3-venv)"
}

# Makes .venv, and installs requirements.txt where it differs from what was installed last.
setup() {
    make_environment
    if cmp -s requirements.txt .venv/installed.txt; then
        return
    fi
    local installer=pip
    local install=("$bin/python" -m pip install --quiet --disable-pip-version-check) cpu=(--extra-index-url "$CPU_WHEELS")
    if command -v uv >/dev/null; then
        installer=uv
        install=(uv pip install --quiet --python "$bin/python")
        cpu=(--index "$CPU_WHEELS" --index-strategy unsafe-best-match)  # the newest of all indexes, as pip takes it
    fi
    # PyPI's torch for Linux brings gigabytes of CUDA. The same version with the label +cpu, on torch's own index, counts
    # as newer: it is taken where it is found.
    if [[ $(uname -s) == Linux ]] && ! command -v nvidia-smi >/dev/null && reachable "$CPU_WHEELS/torch/"; then
        install+=("${cpu[@]}")
    fi
    echo "installing requirements.txt into .venv with $installer"
    "${install[@]}" --requirement requirements.txt ||
        fail "$installer could not install requirements.txt: see above; the next call goes on from here"
    cp requirements.txt .venv/installed.txt
}

setup
if [[ ${1-} == --setup-only ]]; then
    exit
fi

python=$bin/python
"$python" data/stdlib.py
launch=("$python")
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if ((gpus > 1)); then  # a power of two of them: the rows of a step are shared evenly
    processes=1
    while ((processes * 2 <= gpus)); do ((processes *= 2)); done
    launch=("$bin/torchrun" --standalone --nproc_per_node="$processes")
fi
arguments=(--experiment_name quickstart --save_last)
if ((gpus > 0)) && [[ ! -d data/fineweb10B ]]; then
    arguments+=(--iterations 500)  # the embedded data set is small: 500 steps are 3.5 times all of it
fi
console=$(mktemp)
trap 'rm -f "$console"' EXIT
"${launch[@]}" train_gpt.py "${arguments[@]}" "$@" | tee -i "$console"  # -i: outlives Ctrl-C

last() {  # what follows a word at the start of train_gpt.py's lines, the last time
    sed -n "s/^$1 //p" "$console" | tail -n 1
}

folder=$(last "run folder:")
if [[ -z $folder ]]; then  # --help
    exit
fi
checkpoint=$(last checkpoint)
experiment=$(basename "$(dirname "$folder")")
loss=$(sed -n 's/^step .*  val loss \(.*\)  train time .*/\1/p' "$console" | tail -n 1)
if [[ -n $checkpoint ]]; then
    echo
    "$python" generate.py --checkpoint "$checkpoint" --max-tokens 300
fi
echo
"$python" logger.py --experiment_name "$experiment" --log_dir "$(dirname "$(dirname "$folder")")"
cat <<SUMMARY

final validation loss: ${loss:-none}
log:        $folder/log.txt
metrics:    $folder/metrics.jsonl
loss plot:  images/$experiment/loss.png
checkpoint: ${checkpoint:-none}
SUMMARY
