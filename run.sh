#!/usr/bin/env bash
# Concord in one command, on a machine with nothing but Python >= 3.10.
#
#   ./run.sh [FLAGS...]           train ScaleDet on two generated datasets, evaluate both and one never trained on
#   ./run.sh METHOD [FLAGS...]    the demonstration of a method on generated data, with further flags
#   ./run.sh METHOD ARGS...       run a method on your data: ./run.sh scaledet --datasets coco,o365 --data-root DATA
#   ./run.sh test [ARGS...]       run all tests (ARGS go to pytest)
#
# The first call makes .venv and installs into it; an interrupted installation is repaired by the next call.
set -euo pipefail
cd "$(dirname "$0")"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3.10 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python >= 3.10 is needed; install it, or point PYTHON at one: PYTHON=/path/to/python3 ./run.sh" >&2
    exit 2
}

# .venv/installed holds the checksum of what it was made from; it is written last, so its absence means "unfinished"
wanted=$(cksum < pyproject.toml)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    python=$(find_python)
    echo "installing into .venv (once; PyTorch takes a few minutes and several GB)"
    [ -x .venv/bin/pip ] && .venv/bin/python -c '' 2>/dev/null || "$python" -m venv --clear .venv
    .venv/bin/pip install --disable-pip-version-check -e '.[log,tiny,test]'
    echo "$wanted" > .venv/installed
fi

case "${1:-}" in
    "") exec .venv/bin/python -m common.demo scaledet ;;
    test) shift; exec .venv/bin/python -m pytest -n auto "$@" ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0" ;;
    -*) exec .venv/bin/python -m common.demo scaledet "$@" ;;
    *)
        if [ ! -f "$1.py" ] || ! grep -q '^class Args' "$1.py"; then
            echo "error: there is no method '$1'; there are: $(grep -l '^class Args' ./*.py | sed 's|./||; s|\.py||' | xargs)" >&2
            exit 2
        fi
        exec .venv/bin/python -m common.demo "$@"
        ;;
esac
