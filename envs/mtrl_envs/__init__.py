"""Suites of tasks, one module each."""
