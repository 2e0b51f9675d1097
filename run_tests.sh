#!/usr/bin/env bash
# Creates .venv if there is none, then runs ruff, and pytest in two processes. Further arguments go
# to pytest:
# bash run_tests.sh -m slow    runs the slow tests
# bash run_tests.sh -n 0       runs all tests in one process
set -euo pipefail
cd "$(dirname "$0")"
source train_scripts/venv.sh
setup_venv dev

# A waiting OpenMP thread must sleep: when it spins, two processes on two cores slow each other down
# fifty-fold.
export OMP_WAIT_POLICY=PASSIVE
# The folder for screenshots of the demo, to look at.
export LTU_TEST_OUTPUT=${LTU_TEST_OUTPUT:-exp/test_output}
.venv/bin/python -m ruff check .
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
