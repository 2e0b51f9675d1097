# Sourced by quickstart.sh and run_tests.sh, from the repository root.
# setup_venv [EXTRA]: makes .venv, installs requirements.txt (and an extra of pyproject.toml), skips what is installed.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.10 or newer is needed; python3 is $(python3 --version 2>&1 || true)." >&2
    echo "Install one (apt install python3.12 python3.12-venv, brew install python), or name it: PYTHON=/path/to/python3 bash $0" >&2
    return 1
}

# PyPI's torch for Linux brings CUDA; a machine without an NVIDIA GPU gets the small build where it can be reached.
wants_cpu_torch() { [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null; }

install_stamp() { { cat requirements.txt pyproject.toml; if [ -d ltu_as ]; then echo ltu_as; fi; } | cksum; }

setup_venv() {
    local extra=${1:-} stamp python
    stamp=$(install_stamp)
    if [ "$(cat ".venv/installed-${extra:-base}" 2> /dev/null)" = "$stamp" ]; then
        return
    fi
    if ! .venv/bin/python -c '' 2> /dev/null; then
        python=$(find_python) || return 1
        "$python" -m venv --clear .venv || {
            echo "error: $python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        }
    fi
    if wants_cpu_torch && ! .venv/bin/python -c 'import importlib.metadata as m; m.version("torch")' 2> /dev/null; then
        echo "No NVIDIA GPU here: trying torch's CPU build (about 460 MB of packages instead of 3,300 MB)"
        .venv/bin/python -m pip install --disable-pip-version-check --retries 0 --timeout 10 --quiet \
            --index-url https://download.pytorch.org/whl/cpu 'torch>=2.11' 'torchaudio>=2.11' 2> /dev/null \
            || echo "The CPU build cannot be had here: taking PyPI's"
    fi
    .venv/bin/python -m pip install --disable-pip-version-check --editable ".${extra:+[$extra]}" || return 1
    echo "$stamp" > .venv/installed-base
    echo "$stamp" > ".venv/installed-${extra:-base}"
}
