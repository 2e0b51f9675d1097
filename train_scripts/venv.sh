# Functions of quickstart.sh and run_tests.sh, which source this file from the repository root.
#
# setup_venv EXTRA creates .venv and installs requirements.txt and the extra EXTRA of pyproject.toml
# there, in the exact versions of constraints.txt. If they are already installed, it does nothing.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        echo "error: PYTHON=$PYTHON is not Python 3.10 or newer." >&2
    else
        echo "error: Python 3.10 or newer is needed, not $(python3 --version 2>&1 || true)." >&2
    fi
    echo "Install one (apt install python3.12 python3.12-venv, brew install python@3.12)," \
        "or name it: PYTHON=/path/to/python3 bash $0" >&2
    return 1
}

# PyPI's torch for Linux needs CUDA's packages. Without an NVIDIA GPU the small CPU build is enough.
wants_cpu_torch() { [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null; }

install_stamp() { cat requirements.txt constraints.txt pyproject.toml | cksum; }

setup_venv() {
    local extra=$1 stamp installed python
    if ! stamp=$(install_stamp); then
        echo "error: restore the file named above (git checkout), then run bash $0 again" >&2
        return 1
    fi

    # .venv/installed has the extra that was installed last and the stamp of the files it was
    # installed from. The extra dev includes every other extra that the two commands install.
    installed=$(cat .venv/installed 2> /dev/null || true)
    if [ "$installed" = "$extra $stamp" ] || [ "$installed" = "dev $stamp" ]; then
        return
    fi

    if ! .venv/bin/python -c '' 2> /dev/null; then
        python=$(find_python) || return 1
        "$python" -m venv --clear .venv || {
            rm -rf .venv
            echo "error: $python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        }
    fi

    # A failed or interrupted installation must not leave the old stamp.
    rm -f .venv/installed .venv/installed-*
    local install=(.venv/bin/python -m pip install --disable-pip-version-check)
    install+=(--constraint constraints.txt)
    if wants_cpu_torch && ! .venv/bin/python -m pip show --quiet torch 2> /dev/null; then
        # Without dependencies: the CPU index does not have all the versions of constraints.txt.
        echo "No NVIDIA GPU: trying torch's CPU build (500 MB of packages instead of 3,500 MB)"
        "${install[@]}" --retries 0 --timeout 10 --quiet --no-deps \
            --index-url https://download.pytorch.org/whl/cpu torch torchaudio 2> /dev/null \
            || echo "torch's CPU build cannot be downloaded: installing PyPI's"
    fi
    if ! "${install[@]}" --editable ".[$extra]"; then
        echo "error: pip could not install the packages; its message is above." >&2
        echo "If the network failed, run bash $0 again. If pip finds no version of a package," \
            "use Python 3.10 to 3.13 on Linux (glibc 2.28) or macOS (14, Apple silicon):" \
            "rm -r .venv; PYTHON=/path/to/python3.12 bash $0" >&2
        return 1
    fi
    echo "$extra $stamp" > .venv/installed
}
