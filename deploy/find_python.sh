#!/bin/sh
# Make the virtual environment "$1" with the first Python that is 3.11 or later.
set -eu
[ -x "$1/bin/python" ] && exit 0
for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        "$candidate" -m venv "$1"
        exit 0
    fi
done
echo "oncepay needs Python 3.11 or later; name it with PYTHON=/path/to/python3.11 make ..." >&2
exit 1
