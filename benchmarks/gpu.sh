#!/usr/bin/env bash
# Measures on one GPU what docs/benchmarks.md promises of it, in eight minutes:
#   bash benchmarks/gpu.sh                             prints a table and writes JSON
#   bash benchmarks/gpu.sh --size tiny --device cpu    tests the program itself
# All flags go to `python -m benchmarks.gpu_report`.
#
# torch, transformers, accelerate and the like must be there. The other packages may be carried: the
# wheels in the folder wheels are installed, without a network, into a folder that this command
# alone uses. Several versions of Python may be among them.
#   PYTHON    the interpreter; the default is that of .venv, or python3
#   WHEELS    another folder of wheels
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$python" ]; then
    python=python3
fi
wheels=${WHEELS:-wheels}
# Not a virtual environment: one that is made by the interpreter of another one does not see the
# packages of that.
site=exp/gpu_site

if compgen -G "$wheels/*.whl" > /dev/null; then
    names=$(cd "$wheels" && for file in *.whl; do echo "${file%%-*}"; done | sort -u)
    rm -rf "$site"
    # Without dependencies: pip would look for torch too. A name selects the wheel of this Python.
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
        --no-compile --find-links "$wheels" --target "$site" $names
    export PYTHONPATH="$PWD/$site${PYTHONPATH:+:$PYTHONPATH}"
fi

"$python" - << 'END'
import importlib
import sys

# Module, what it must have, and its package.
NEEDED = """
torch torch torch
torchaudio functional torchaudio
transformers Trainer transformers
accelerate Accelerator accelerate
peft LoraConfig peft
safetensors safe_open safetensors
sentencepiece SentencePieceProcessor sentencepiece
google.protobuf message protobuf
numpy ndarray numpy
tqdm tqdm tqdm
packaging version packaging
jinja2 Template jinja2
filelock lock_descriptor filelock>=3.30
msgspec json msgspec
pydantic ConfigDict pydantic>=2
_cffi_backend FFI cffi
soundfile write soundfile
pytest main pytest
"""
missing = []
for line in NEEDED.split("\n"):
    if not line:
        continue
    module, attribute, package = line.split()
    try:
        found = importlib.import_module(module)
        if not hasattr(found, attribute):
            importlib.import_module(f"{module}.{attribute}")
    except (ImportError, OSError) as error:
        missing.append(f"{package} ({error})")
if missing:
    version = ".".join(map(str, sys.version_info[:2]))
    print(f"error: Python {version} ({sys.executable}) lacks:", file=sys.stderr)
    print(*[f"  {line}" for line in missing], sep="\n", file=sys.stderr)
    print("Put their wheels for this Python into the folder wheels, or set WHEELS", file=sys.stderr)
    sys.exit(1)
END
exec "$python" -m benchmarks.gpu_report "$@"
