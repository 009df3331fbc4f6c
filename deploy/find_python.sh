#!/bin/sh
# Make the virtual environment "$1" with $PYTHON, else with the fastest Python 3.11 in PATH, else with a later one.
# Builds of one version differ, by an eighth of what a settled payment takes (docs/decisions/0124-fastest-python.md).
set -euf
"$1/bin/python" -m pip --version >/dev/null 2>&1 && exit 0
can='import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))'
is_311='import sys, ensurepip, venv; sys.exit(sys.version_info[:2] != (3, 11))'
help="(Debian: apt install python3-venv); name it with PYTHON=/path/to/python3.11 make ..."

if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" -c "$can" 2>/dev/null || { echo "$PYTHON is no Python 3.11 or later with venv and pip $help" >&2; exit 1; }
    exec "$PYTHON" -m venv --clear "$1"
fi

best= least_us= tried=
IFS=:
for folder in $PATH; do
    folder=$(cd -P -- "$folder" 2>/dev/null && pwd) || continue # /bin is mostly /usr/bin
    for name in python3 python3.11; do
        candidate="$folder/$name"
        case "$tried " in *" $candidate "*) continue ;; esac
        [ -x "$candidate" ] && "$candidate" -c "$is_311" 2>/dev/null || continue
        used_us=$("$candidate" "${0%/*}/python_speed.py") || continue
        tried="$tried $candidate ${used_us}us"
        if [ -z "$best" ] || [ "$used_us" -lt "$least_us" ]; then best=$candidate least_us=$used_us; fi
    done
done
unset IFS
[ -n "$tried" ] && echo "Python:$tried; $best it is."
for candidate in "$best" python3 python3.13 python3.12; do
    if [ -n "$candidate" ] && "$candidate" -c "$can" 2>/dev/null; then
        exec "$candidate" -m venv --clear "$1"
    fi
done
echo "oncepay needs Python 3.11 or later, with venv $help" >&2
exit 1
