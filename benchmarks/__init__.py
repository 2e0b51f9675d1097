"""Holds measurements that are too slow or too machine-dependent for the tests.

They run from the repository root with `-m`.
"""
