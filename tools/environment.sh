# Sourced by tools/demo and tools/test: finds a Python and keeps an environment for them in the checkout.
#
# Nothing but a POSIX shell, a Python of at least 3.11 with venv, and pip's usual configuration (index,
# proxy, certificates) is assumed. PYTHON names the interpreter to use; else the usual names are tried.

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
environment="$root/.cache/venv"
minimum="3.11"

fail() {
    printf '%s: %s\n' "$(basename -- "$0")" "$1" >&2
    exit 1
}

# A name on PATH proves little: version managers leave shims for versions that are not active.
is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    without_venv=""
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3.13 python3.12 python3.11 python3 python
    fi
    for candidate in "$@"; do
        is_recent "$candidate" || continue
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
        without_venv="$candidate"
    done
    if [ -n "$without_venv" ]; then
        version=$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        fail "$without_venv has no venv module; on Debian and Ubuntu: apt install python$version-venv"
    fi
    if [ -n "${PYTHON:-}" ]; then
        fail "PYTHON=$PYTHON is not a Python of at least $minimum"
    fi
    fail "no Python of at least $minimum was found; set PYTHON to one"
}

# What the environment was made from. Another checkout folder makes the editable install stale.
fingerprint() {
    "$1" -c '
import hashlib, sys
digest = hashlib.sha256(repr(sys.argv[1:3]).encode() + sys.version.encode())
for name in sys.argv[3:]:
    digest.update(open(name, "rb").read())
print(digest.hexdigest())
' "$root" "$2" "$root/pyproject.toml" "$root/tools/constraints.txt"
}

# ensure_environment "" | "[dev]": sets $python to an interpreter that has the package and the extras.
# An environment with [dev] serves both; the stamp is written last, so an interrupted run is repeated.
ensure_environment() {
    extras=$1
    unset PYTHONHOME PYTHONPATH
    cd "$root" || fail "cannot enter $root"
    base=$(find_python) || exit 1
    python="$environment/bin/python"
    for stamped in "[dev]" "$extras"; do
        if [ -x "$python" ] && [ "$(cat "$environment/stamp$stamped" 2>/dev/null)" = "$(fingerprint "$base" "$stamped")" ]; then
            return
        fi
    done
    printf 'Preparing %s with %s; the first time takes a few minutes.\n' ".cache/venv" "$base" >&2
    if ! "$python" -m pip --version >/dev/null 2>&1 || [ "$(version_of "$python")" != "$(version_of "$base")" ]; then
        "$base" -m venv --clear "$environment" || fail "cannot create $environment"
    fi
    rm -f "$environment"/stamp*
    "$python" -m pip install --quiet --quiet --disable-pip-version-check \
        --constraint tools/constraints.txt --editable ".$extras" || fail "pip could not install the package"
    fingerprint "$base" "$extras" >"$environment/stamp$extras"
}

version_of() {
    "$1" -c 'import sys; print(sys.version)'
}
