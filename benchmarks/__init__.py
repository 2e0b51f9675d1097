"""Measurements that are too slow or too machine-dependent for the tests; run from the repository root with `-m`."""
