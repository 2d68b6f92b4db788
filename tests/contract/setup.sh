#!/bin/sh
# Make the environment of the contract suite in .venvs/contract, or bring it up to date; does nothing when it is.
# Usage: tests/contract/setup.sh [python]     (any Python >= 3.11; default: that of .venv, else python3)
set -eu
cd "$(dirname "$0")/../.."

venv=.venvs/contract
locked=tests/contract/requirements.txt
python=${1:-}
if [ -z "$python" ]; then
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi

state=$(cat "$locked" pyproject.toml "$0" | cksum)
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.installed" 2>/dev/null)" = "$state" ]; then
    exit 0
fi

echo "Installing the official client into $venv (two minutes, once) ..."
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# The lock is complete, so nothing is resolved: the official client's own requirements take a resolver minutes.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$locked"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
printf '%s' "$state" > "$venv/.installed"
