"""Benchmarks: one script per claim; each prints its table and writes numbers and pictures to `results/`.

A script is a module, or a package with a `__main__`, that `python -m benchmarks.NAME` runs; it is imported by nothing.
What scripts share lies in rooms, each of which imports those before it alone (`tests/benchmarks/test_rooms.py`):

    problems    data sets, networks, batches
    report      numbers as JSON, pictures, tables, tracking, and how well two columns agree
    cost        time and peak memory of a call, and the calls that are compared
    reference   exact refits, Newton steps, laplace-torch, the published estimates
    training    training loops with their checkpoints, and what is asked of the trained network
"""
