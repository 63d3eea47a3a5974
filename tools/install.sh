#!/usr/bin/env bash
# Makes .venv and installs the project into it with the versions of constraints.txt. `make` calls it.
#
#   tools/install.sh                 install, or continue, or do nothing when all is there
#   tools/install.sh --find-python   only print the interpreter that would be used
#
# Environment:
#   PYTHON  the interpreter to build on (default: the best one on PATH, under pyenv or known to uv)
#   VENV    own (default): everything comes from constraints.txt
#           system: keep the torch that PYTHON already has, as in an NGC container
#
# It may be killed at any moment: the stamp is written last, and the next run picks up from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV_DIR=.venv
readonly STAMP=$VENV_DIR/.satformer-stamp        # what is installed, written when everything is
readonly MODE_FILE=$VENV_DIR/.satformer-mode     # own or system; its presence says that we made .venv
readonly CREATING=$VENV_DIR/.satformer-creating  # there while the empty environment is being made
readonly LOG=$VENV_DIR/install.log
readonly EXTRAS=data,dev,eval,hf,logging
readonly SUPPORTED="3.12 3.13" # what megatron-core 0.19.2 has wheels for, the tested one first
readonly HOW_TO_GET="apt-get install python3.12 python3.12-venv, pyenv install 3.12 or uv python install 3.12"

say() { printf '%s\n' "$*"; }
die() {
    printf 'install: %s\n' "$*" >&2
    exit 1
}

# ---- finding Python ------------------------------------------------------------------------------

# Prints "3.12 ok /path/python": only running an interpreter tells the truth, because pyenv's shims
# exist on PATH for versions that are not active.
probe() {
    "$1" - 2>/dev/null <<'PY'
import sys
state = "ok"
try:
    import ctypes, ssl, sysconfig, venv
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        state = "no-wheels"
    else:
        import ensurepip
except ImportError as error:
    state = "no-" + error.name
print("%d.%d" % sys.version_info[:2], state, getattr(sys, "_base_executable", sys.executable))
PY
}

list_candidates() {
    local name directory
    for name in python3.12 python3.13 python3 python; do
        type -aP "$name" || true
    done
    for directory in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin; do
        for name in python3.12 python3.13; do
            [[ -x $directory/$name ]] && say "$directory/$name"
        done
    done
    if command -v uv >/dev/null; then
        for name in $SUPPORTED; do
            uv python find --system "$name" 2>/dev/null || true
        done
    fi
}

# Sets PYTHON_FOUND and, when that interpreter has no ensurepip, SEED_WITH_UV.
find_python() {
    local found candidates wanted version state path what without_pip=
    PYTHON_FOUND='' SEED_WITH_UV=''
    if [[ -n ${PYTHON:-} ]]; then
        candidates=$PYTHON
    else
        candidates=$(list_candidates)
    fi
    found=$(while read -r path; do probe "$path" || true; done <<<"$candidates")
    for wanted in $SUPPORTED; do
        while read -r version state path; do
            [[ $version == "$wanted" ]] || continue
            case $state in
                ok) PYTHON_FOUND=$path && return ;;
                no-ensurepip) without_pip=${without_pip:-$version $path} ;;
            esac
        done <<<"$found"
    done
    if [[ -n ${PYTHON:-} && -z $without_pip ]]; then
        read -r version state path <<<"$found" || true
        what="does not run"
        [[ -z $version ]] || what="is Python $version ($state)"
        die "PYTHON ($PYTHON) $what; it must be a" \
            "complete CPython 3.12 or 3.13: $HOW_TO_GET."
    fi
    if command -v uv >/dev/null; then
        if [[ -n $without_pip ]]; then
            PYTHON_FOUND=${without_pip#* } SEED_WITH_UV=1 && return
        fi
        say "No Python 3.12 or 3.13 found: uv installs one."
        if uv python install 3.12 >&2; then
            PYTHON_FOUND=$(uv python find --system 3.12) && return
        fi
    fi
    [[ -z $without_pip ]] || die "Python ${without_pip% *} at ${without_pip#* } cannot make virtual" \
        "environments; apt-get install python${without_pip% *}-venv, then run the same command again."
    die "No CPython 3.12 or 3.13 was found (Megatron Core has wheels for no other): $HOW_TO_GET," \
        "then run the same command again."
}

# Sets PYTHON_FOUND to an interpreter whose torch is to be kept.
find_system_python() {
    local candidate answer why=
    for candidate in ${PYTHON:-python3 python python3.12 python3.13}; do
        if ! command -v "$candidate" >/dev/null; then
            why=${why:-there is no $candidate}
            continue
        fi
        if answer=$("$candidate" tools/system_torch.py check "$VENV_DIR" 2>&1); then
            PYTHON_FOUND=$("$candidate" -c 'import sys; print(sys.executable)')
            say "      $answer"
            return
        fi
        why=${why:-$candidate: $(tail -n 1 <<<"$answer")}
    done
    die "VENV=system needs a Python 3.12 or 3.13 with torch 2.6 or newer ($why);" \
        "name it with PYTHON=..., or leave VENV=system out to install torch."
}

# ---- the environment -----------------------------------------------------------------------------

wanted_stamp() {
    # The path is part of it: scripts such as torchrun carry it, so a moved .venv must be rebuilt.
    printf '%s\n%s\n' "$MODE" "$PWD/$VENV_DIR"
    cat constraints.txt pyproject.toml setup.py tools/install.sh | sha256sum
}

venv_works() {
    [[ ! -e $CREATING ]] && "$VENV_DIR/bin/python" -m pip --version >/dev/null 2>&1
}

# Sets UNFIT to why .venv cannot be used as it is: half made, moved, of another kind than asked for.
judge_venv() {
    local base version
    UNFIT=''
    if [[ ! -e $VENV_DIR ]]; then
        UNFIT="there is none"
    elif ! venv_works; then
        UNFIT="it is incomplete"
    elif [[ -e $STAMP && $(sed -n 2p "$STAMP") != "$PWD/$VENV_DIR" ]]; then
        UNFIT="it was moved or copied"
    elif [[ -e $MODE_FILE && $(<"$MODE_FILE") != "$MODE" ]]; then
        UNFIT="it was made with VENV=$(<"$MODE_FILE")"
    elif [[ -n ${PYTHON:-} ]]; then
        base='import os, sys; print(os.path.realpath(sys.base_prefix), sys.version)'
        [[ $("$VENV_DIR/bin/python" -c "$base") == $("$PYTHON" -c "$base" 2>&1) ]] ||
            UNFIT="it was built on another Python than $PYTHON"
    fi
    if [[ ! -e $MODE_FILE ]] && venv_works && [[ -n $UNFIT || $MODE == system ]]; then
        die "$VENV_DIR was not made by this script and does not fit (${UNFIT:-VENV=system}); move it away."
    fi
    [[ -z $UNFIT ]] || return 0
    read -r version _ < <(probe "$VENV_DIR/bin/python") || true
    [[ " $SUPPORTED " == *" $version "* ]] ||
        die "$VENV_DIR holds Python $version, but 3.12 or 3.13 is needed; remove it: rm -rf $VENV_DIR"
}

create_venv() {
    rm -rf "$VENV_DIR".old.*
    mkdir -p "$VENV_DIR"
    touch "$CREATING"
    say "$MODE" >"$MODE_FILE"
    if [[ $MODE == system ]]; then
        # Without its own pip: the system's works here too, and Debian's Python may lack ensurepip.
        "$PYTHON_FOUND" -m venv --system-site-packages --without-pip "$VENV_DIR"
        "$PYTHON_FOUND" tools/system_torch.py link "$VENV_DIR"
    elif [[ -n $SEED_WITH_UV ]]; then
        uv venv --quiet --allow-existing --seed --python "$PYTHON_FOUND" "$VENV_DIR"
    else
        "$PYTHON_FOUND" -m venv "$VENV_DIR"
    fi
    rm "$CREATING"
}

# ---- the packages --------------------------------------------------------------------------------

# One line every ten seconds while pip works: what it is at, for how long, how much lies in .venv.
heartbeat() {
    local total now installed
    while sleep 10 && kill -0 $$ 2>/dev/null; do
        total=$(sed -n 's/^Installing collected packages: //p' "$LOG" | tail -n 1 | tr ',' '\n' | wc -l)
        now=$(grep -oE '^ *(Collecting|Downloading|Using cached|Processing) [^ ]+' "$LOG" | tail -n 1 || true)
        now=${now##*[ /]}
        if [[ $total -gt 1 ]]; then
            installed=("$VENV_DIR"/lib/python*/site-packages/*.dist-info/RECORD)
            now="${#installed[@]} of about $total packages"
        fi
        say "      $((SECONDS - STARTED)) s, $(du -sh "$VENV_DIR" 2>/dev/null | cut -f1) in $VENV_DIR: ${now:-starting}"
    done
}

pip_install() {
    local status=0 beat
    heartbeat 9>&- &
    beat=$!
    "$VENV_DIR/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off \
        --constraint "$CONSTRAINTS" "$@" >>"$LOG" 2>&1 || status=$?
    kill "$beat" 2>/dev/null || true
    wait "$beat" 2>/dev/null || true
    if [[ $status -ne 0 ]]; then
        grep -v '^WARNING: Location' "$LOG" | tail -n 15 >&2
        die "pip failed (the whole log is $LOG). Run the same command again to continue from here."
    fi
}

install_packages() {
    local dist_info
    unset PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
    : >"$LOG"
    # pip writes RECORD last, and takes a package without one for installed: killed there, it is not.
    for dist_info in "$VENV_DIR"/lib/python*/site-packages/*.dist-info; do
        [[ ! -d $dist_info || -e $dist_info/RECORD ]] || rm -rf "$dist_info"
    done
    if [[ $MODE == system ]]; then
        CONSTRAINTS=$VENV_DIR/constraints.txt
        "$VENV_DIR/bin/python" tools/system_torch.py constraints constraints.txt >"$CONSTRAINTS"
        # A container's own pins would forbid even what is installed into this environment alone.
        unset PIP_CONSTRAINT
    else
        CONSTRAINTS=constraints.txt
    fi
    # setuptools comes first so that the project itself builds with the pinned one.
    pip_install 'setuptools>=77'
    pip_install --no-build-isolation --editable ".[$EXTRAS]"
}

check_installation() {
    "$VENV_DIR/bin/python" - 2>>"$LOG" <<'PY'
import importlib.util
import platform
from importlib.metadata import version

import torch
import megatron_satformer

# Not imported: that takes many seconds.
assert importlib.util.find_spec("megatron.training"), "megatron-core lacks megatron.training"
print(
    f"      Python {platform.python_version()}, torch {torch.__version__},"
    f" megatron-core {version('megatron-core')}, {torch.cuda.device_count()} CUDA device(s)"
)
PY
}

main() {
    MODE=${VENV:-$(cat "$MODE_FILE" 2>/dev/null || echo own)}
    [[ $MODE == own || $MODE == system ]] || die "VENV ($MODE) must be own or system."
    if [[ ${1:-} == --find-python ]]; then
        find_python
        say "$PYTHON_FOUND"
        return
    fi
    if [[ -z ${PYTHON:-} && $(cat "$STAMP" 2>/dev/null) == "$(wanted_stamp)" ]] && venv_works; then
        return
    fi
    if command -v flock >/dev/null; then
        exec 9>.venv.lock
        flock --nonblock 9 || { say "Another installation is running: waiting for it." && flock 9; }
    fi

    STARTED=$SECONDS
    say "[1/4] Python"
    judge_venv
    if [[ -n $UNFIT ]]; then
        if [[ $MODE == system ]]; then find_system_python; else find_python; fi
        say "      $PYTHON_FOUND"
        say "[2/4] Environment ($((SECONDS - STARTED)) s)"
        if [[ -e $VENV_DIR ]]; then
            say "      replacing $VENV_DIR: $UNFIT"
            # Renamed first: a kill in the middle of rm cannot leave something that looks usable.
            mv "$VENV_DIR" "$VENV_DIR.old.$$"
        fi
        create_venv
    else
        say "[2/4] Environment: continuing in $VENV_DIR"
    fi
    if [[ $(cat "$STAMP" 2>/dev/null) != "$(wanted_stamp)" ]]; then
        rm -f "$STAMP"
        say "[3/4] Packages ($((SECONDS - STARTED)) s): up to 6 GB, some minutes; the log is $LOG"
        install_packages
    fi
    say "[4/4] Check ($((SECONDS - STARTED)) s)"
    check_installation || { tail -n 5 "$LOG" >&2 && die "the installation does not work (see above);" \
        "make distclean removes it, then run the same command again."; }
    wanted_stamp >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    say "Installed in $((SECONDS - STARTED)) s."
}

main "$@"
