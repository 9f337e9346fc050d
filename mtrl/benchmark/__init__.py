"""Agents x suites x seeds -> runs -> statistics -> report.

Arrows point down: ``report``, ``paper``, ``dashboard``, ``sweep`` -> ``analysis`` -> ``store``, ``stats``; ``engine``,
``cluster`` -> ``attempt`` -> ``spec``. See docs/benchmark.md.
"""
