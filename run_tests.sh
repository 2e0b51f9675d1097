#!/usr/bin/env bash
# Makes the environment if there is none, then ruff and pytest in two processes. Further arguments
# go to pytest: bash run_tests.sh -m slow; bash run_tests.sh -n 0 runs all in one process.
set -euo pipefail
cd "$(dirname "$0")"
source train_scripts/venv.sh
setup_venv dev

# A waiting OpenMP thread must sleep: when it spins, two processes on two cores slow each other down fifty-fold.
export OMP_WAIT_POLICY=PASSIVE
# Screenshots of the demo, to be looked at.
export LTU_TEST_OUTPUT=${LTU_TEST_OUTPUT:-exp/test_output}
.venv/bin/python -m ruff check .
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
