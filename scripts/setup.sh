#!/usr/bin/env bash
# Makes .venv from requirements/cpu.lock and puts this checkout into it. Safe to run again: when nothing that it reads
# has changed, it does nothing. See docs/troubleshooting.md for the settings it respects.
#
#   PYTHON=...            the interpreter to use (default: the first 3.11 or 3.12 found)
#   ATTUNE_LOCK=...       another lock, e.g. requirements/gpu.lock
#   PIP_FIND_LINKS,       or pip's own `global.find-links`: a folder that holds a torch wheel is used for torch
#   PIP_INDEX_URL         or pip's own `global.index-url`: the package index to use, where UV_DEFAULT_INDEX is not set
#   TORCH_INDEX=...       where torch's CPU build comes from otherwise (default: PyTorch's own CPU index)
#   SSL_CERT_FILE=...     certificates to trust, read by uv and pip alike
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV_VERSION=0.13.8
LOCK=${ATTUNE_LOCK:-requirements/cpu.lock}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
VENV=.venv
STAMP=$VENV/.attune-setup

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
say() { printf 'setup: %s\n' "$*"; }

[[ "$(uname -s)" == Linux ]] || die "Attune runs on Linux; this is $(uname -s)"
[[ "$(uname -m)" == x86_64 || "$LOCK" != requirements/cpu.lock ]] \
    || die "requirements/cpu.lock is for x86_64, this is $(uname -m): resolve another lock and name it in ATTUNE_LOCK"
[[ -f "$LOCK" ]] || die "no lock at $LOCK"

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
python=
for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3; do
    # Run it, for a name on the path may be a launcher whose Python is not there.
    if "$candidate" -c "$supported" >/dev/null 2>&1; then
        python=$candidate
        break
    fi
    [[ "$candidate" != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON is not a Python 3.11 or 3.12"
done
[[ -n "$python" ]] || die "no Python 3.11 or 3.12 found (looked for python3.11, python3.12, python3); install one or set PYTHON"

# The place is part of the stamp: console scripts hold absolute paths, so a moved checkout is set up anew.
state=$({ "$python" -c 'import sys; print(sys.version, sys.base_prefix)'; pwd; cat "$LOCK" pyproject.toml scripts/setup.sh; } | sha256sum)
if [[ -f "$STAMP" && "$(cat "$STAMP")" == "$state" ]] && "$VENV/bin/python" -c '' 2>/dev/null; then
    say "$VENV is up to date"
    exit 0
fi

started=$SECONDS
same_python='import sys; print(sys.version_info[:2], sys.base_prefix)'
if ! [[ "$("$VENV/bin/python" -c "$same_python" 2>/dev/null)" == "$("$python" -c "$same_python")" ]] \
    || [[ "$(sed -n 1p "$VENV/bin/pip" 2>/dev/null)" != "#!$PWD/$VENV/bin/python"* ]]; then
    say "making $VENV with $("$python" --version)"
    rm -rf "$VENV"
    "$python" -m venv "$VENV" || {
        rm -rf "$VENV"
        die "'$python -m venv' failed; on Debian and Ubuntu the package python3-venv (and python3-dev) provides it"
    }
fi
rm -f "$STAMP"

if [[ "$("$VENV/bin/uv" --version 2>/dev/null)" != "uv $UV_VERSION"* ]]; then
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
fi
uv="$VENV/bin/uv"
export VIRTUAL_ENV="$PWD/$VENV" UV_LINK_MODE="${UV_LINK_MODE:-copy}"

# uv does not read pip's configuration. An index of one's own is handed on; so is, below, a folder with a torch wheel.
pip_setting() { "$VENV/bin/python" -m pip config get "global.$1" 2>/dev/null || true; }
if [[ -z "${UV_DEFAULT_INDEX:-}" ]]; then
    index=${PIP_INDEX_URL:-$(pip_setting index-url)}
    [[ -z "$index" ]] || export UV_DEFAULT_INDEX="$index"
fi

# torch's CPU build is on no general index, so it is fetched on its own first: neither a folder of wheels nor another
# index then has a say in where anything else comes from. The sync that follows finds it in place.
torch=$(sed -n 's/^\(torch==[^ ;]*+cpu\).*/\1/p' "$LOCK")
if [[ -n "$torch" ]]; then
    tag=$("$VENV/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    from=()
    for place in ${UV_FIND_LINKS:-} ${PIP_FIND_LINKS:-$(pip_setting find-links)}; do
        place=${place#file://}
        if compgen -G "$place/torch-${torch#torch==}-$tag-*.whl" >/dev/null; then
            from=(--find-links "$place" --offline)
            break
        fi
    done
    if [[ ${#from[@]} -eq 0 ]]; then
        from=(--index-url "$TORCH_INDEX")
    fi
    "$uv" pip install --quiet --no-deps "${from[@]}" "$torch" \
        || die "could not install $torch from ${from[1]}; PIP_FIND_LINKS=FOLDER uses a wheel that is already here"
fi

say "installing $LOCK"
"$uv" pip sync --quiet "$LOCK"
"$uv" pip install --quiet --no-deps -e .

# A run is a dozen processes that import the same thousands of modules at the same time. Their byte code is written now,
# once: where PYTHONDONTWRITEBYTECODE is set, each of them would compile all of it anew, at every start. Importing
# compiles what is needed (some 4,000 files) where compiling whole packages takes 30,000, and shows that they load.
say "compiling what every process imports"
OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu "$VENV/bin/python" - <<'PYTHON' || die "what was installed cannot be imported"
import importlib
import importlib.util
import sys

sys.dont_write_bytecode = False
for name in (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "deepspeed",
    "ray",
    "datasets",
    "redis",
    "fastapi",
    "uvicorn",
    "httpx",
    "rich.progress",
    "typer",
):
    if importlib.util.find_spec(name.partition(".")[0]) is not None:  # a lock of one's own may do without
        importlib.import_module(name)
PYTHON
printf '%s\n' "$state" >"$STAMP"
say "$VENV is ready after $((SECONDS - started)) s"
