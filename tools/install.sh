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
readonly STAMP=$VENV_DIR/.satformer-stamp    # what is installed, written when everything is
readonly MODE_FILE=$VENV_DIR/.satformer-mode # own or system, then "half" until .venv can be used; we made it
readonly LOG=$VENV_DIR/install.log
readonly EXTRAS=data,dev,eval,hf,logging,muon
readonly HOW_TO_GET="apt-get install python3.12 python3.12-venv, pyenv install 3.12 or uv python install 3.12"

say() { printf '%s\n' "$*"; }
die() { printf 'install: %s\n' "$*" >&2 && exit 1; }

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
    [[ -z ${PYTHON:-} ]] || { say "$PYTHON" && return; }
    type -aP python3.12 python3.13 python3 python || true
    printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3.1[23]
    uv python find --system 3.12 2>/dev/null || true
    uv python find --system 3.13 2>/dev/null || true
}

# Sets PYTHON_FOUND and, when that interpreter has no ensurepip, SEED_WITH_UV. Megatron Core 0.19.2
# has wheels for 3.12 and 3.13; the first is the tested one.
find_python() {
    local found wanted path version='' state what="does not run"
    SEED_WITH_UV=''
    found=$(list_candidates | while read -r path; do probe "$path" || true; done)
    for wanted in "3.12 ok" "3.13 ok" "3.12 no-ensurepip" "3.13 no-ensurepip"; do
        while read -r version state PYTHON_FOUND; do
            [[ "$version $state" == "$wanted" ]] || continue
            [[ $state != ok ]] || return 0
            SEED_WITH_UV=1
            ! command -v uv >/dev/null || return 0
            die "Python $version at $PYTHON_FOUND cannot make virtual environments; apt-get install" \
                "python$version-venv, then run the same command again."
        done <<<"$found"
    done
    if [[ -n ${PYTHON:-} ]]; then
        [[ -z $found ]] || { read -r version state _ <<<"$found" && what="is Python $version ($state)"; }
        die "PYTHON ($PYTHON) $what; it must be a complete CPython 3.12 or 3.13: $HOW_TO_GET."
    fi
    if command -v uv >/dev/null && say "No Python 3.12 or 3.13 found: uv installs one." &&
        uv python install 3.12 >&2; then
        PYTHON_FOUND=$(uv python find --system 3.12) && return
    fi
    die "No CPython 3.12 or 3.13 was found (Megatron Core has wheels for no other): $HOW_TO_GET," \
        "then run the same command again."
}

# Sets PYTHON_FOUND to an interpreter whose torch is to be kept.
find_system_python() {
    local candidate answer='' why=''
    for candidate in ${PYTHON:-python3 python python3.12 python3.13}; do
        if answer=$("$candidate" tools/system_torch.py check "$VENV_DIR" 2>&1); then
            PYTHON_FOUND=$("$candidate" -c 'import sys; print(sys.executable)')
            say "      $answer" && return
        fi
        why=${why:-$candidate: ${answer##*$'\n'}}
    done
    die "VENV=system needs a Python 3.12 or 3.13 with torch 2.6 or newer ($why);" \
        "name it with PYTHON=..., or leave VENV=system out to install torch."
}

wanted_stamp() {
    # The path is part of it: scripts such as torchrun carry it, so a moved .venv must be rebuilt.
    printf '%s\n%s\n' "$MODE" "$PWD/$VENV_DIR"
    cat constraints.txt pyproject.toml setup.py tools/install.sh | sha256sum
}

venv_works() { "$VENV_DIR/bin/python" -m pip --version >/dev/null 2>&1; }

# Sets UNFIT to why .venv cannot be used as it is: half made, moved, of another kind than asked for.
judge_venv() {
    local made base='import os, sys; print(os.path.realpath(sys.base_prefix), sys.version)'
    made=$(cat "$MODE_FILE" 2>/dev/null || true)
    UNFIT=''
    if [[ ! -e $VENV_DIR ]]; then
        UNFIT="there is none"
    elif [[ $made == *half ]] || ! venv_works; then
        UNFIT="it is incomplete"
    elif [[ -e $STAMP && $(sed -n 2p "$STAMP") != "$PWD/$VENV_DIR" ]]; then
        UNFIT="it was moved or copied"
    elif [[ ${made:-own} != "$MODE" ]]; then
        UNFIT="it was made with VENV=${made:-own}"
    elif [[ -n ${PYTHON:-} && $("$VENV_DIR/bin/python" -c "$base") != $("$PYTHON" -c "$base" 2>&1) ]]; then
        UNFIT="it was built on another Python than $PYTHON"
    elif [[ $(probe "$VENV_DIR/bin/python") != 3.1[23]\ * ]]; then
        die "$VENV_DIR holds another Python than 3.12 or 3.13; remove it: rm -rf $VENV_DIR"
    fi
    [[ -z $UNFIT || -n $made ]] || ! venv_works ||
        die "$VENV_DIR was not made by this script and does not fit ($UNFIT); move it away."
}

create_venv() {
    # Renamed first: a kill in the middle of rm cannot leave something that looks usable.
    [[ ! -e $VENV_DIR ]] || { say "      replacing $VENV_DIR: $UNFIT" && mv "$VENV_DIR" "$VENV_DIR.old.$$"; }
    rm -rf "$VENV_DIR".old.*
    mkdir "$VENV_DIR"
    say "$MODE half" >"$MODE_FILE"
    if [[ $MODE == system ]]; then
        # Without its own pip: the system's works here too, and Debian's Python may lack ensurepip.
        "$PYTHON_FOUND" -m venv --system-site-packages --without-pip "$VENV_DIR"
        "$PYTHON_FOUND" tools/system_torch.py link "$VENV_DIR"
    elif [[ -n $SEED_WITH_UV ]]; then
        uv venv --quiet --allow-existing --seed --python "$PYTHON_FOUND" "$VENV_DIR"
    else
        "$PYTHON_FOUND" -m venv "$VENV_DIR"
    fi
    say "$MODE" >"$MODE_FILE"
}

# One line every ten seconds while pip works: for how long, how much lies in .venv, what it is at.
heartbeat() {
    while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        say "      $SECONDS s, $(du -sh "$VENV_DIR" 2>/dev/null | cut -f1) in $VENV_DIR:" \
            "$(tail -n 1 "$LOG" | cut -c 1-60)"
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
    [[ $status -ne 0 ]] || return 0
    grep -v '^WARNING: Location' "$LOG" | tail -n 15 >&2
    die "pip failed (the whole log is $LOG). Run the same command again to continue from here."
}

install_packages() {
    local dist_info
    unset PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
    # pip writes RECORD last, and takes a package without one for installed: killed there, it is not.
    for dist_info in "$VENV_DIR"/lib/python*/site-packages/*.dist-info; do
        [[ ! -d $dist_info || -e $dist_info/RECORD ]] || rm -rf "$dist_info"
    done
    CONSTRAINTS=constraints.txt
    if [[ $MODE == system ]]; then
        CONSTRAINTS=$VENV_DIR/constraints.txt
        "$VENV_DIR/bin/python" tools/system_torch.py constraints constraints.txt >"$CONSTRAINTS"
        unset PIP_CONSTRAINT # a container's own would forbid even what is installed into .venv alone
    fi
    # setuptools comes first so that the project itself builds with the pinned one.
    pip_install 'setuptools>=77'
    pip_install --no-build-isolation --editable ".[$EXTRAS]"
}

# megatron.training is not imported: that takes many seconds.
check_installation() {
    "$VENV_DIR/bin/python" - 2>>"$LOG" <<'PY'
import importlib.util, platform, torch, megatron_satformer
from importlib.metadata import version

assert importlib.util.find_spec("megatron.training"), "megatron-core lacks megatron.training"
print(f"      Python {platform.python_version()}, torch {torch.__version__}, megatron-core",
      f"{version('megatron-core')}, {torch.cuda.device_count()} CUDA device(s)")
PY
}

main() {
    MODE=$(cat "$MODE_FILE" 2>/dev/null || echo own)
    MODE=${VENV:-${MODE% half}}
    [[ $MODE == own || $MODE == system ]] || die "VENV ($MODE) must be own or system."
    if [[ ${1:-} == --find-python ]]; then
        find_python
        say "$PYTHON_FOUND" && return
    fi
    if [[ -z ${PYTHON:-} && $(cat "$STAMP" 2>/dev/null) == "$(wanted_stamp)" ]] && venv_works; then
        return
    fi
    if command -v flock >/dev/null; then
        exec 9>.venv.lock
        flock --nonblock 9 || { say "Another installation is running: waiting for it." && flock 9; }
    fi
    say "[1/4] Python"
    judge_venv
    if [[ -n $UNFIT ]]; then
        if [[ $MODE == system ]]; then find_system_python; else find_python; fi
        say "      $PYTHON_FOUND"
        say "[2/4] Environment ($SECONDS s)"
        create_venv
    else
        say "[2/4] Environment: continuing in $VENV_DIR"
    fi
    if [[ $(cat "$STAMP" 2>/dev/null) != "$(wanted_stamp)" ]]; then
        rm -f "$STAMP"
        say "[3/4] Packages ($SECONDS s): up to 6 GB, some minutes; the log is $LOG"
        : >"$LOG"
        install_packages
    fi
    say "[4/4] Check ($SECONDS s)"
    check_installation || { tail -n 5 "$LOG" >&2 && die "the installation does not work (see above);" \
        "make distclean removes it, then run the same command again."; }
    wanted_stamp >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    say "Installed in $SECONDS s."
}

main "$@" # a function: bash has read all of this file before it begins
