#!/bin/sh
# Make the virtual environment "$1" with the first Python that is 3.11 or later and can make one with pip.
set -eu
"$1/bin/python" -m pip --version >/dev/null 2>&1 && exit 0
for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        "$candidate" -m venv --clear "$1"
        exit 0
    fi
done
echo "oncepay needs Python 3.11 or later, with venv (Debian: apt install python3-venv); name it with PYTHON=/path/to/python3.11 make ..." >&2
exit 1
