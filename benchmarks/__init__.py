"""Benchmarks of ckptd beside other ways to save the same training state: `python -m benchmarks`, or `make bench`.

`workload` is what trains, `contender` what a way of saving has to be able to do, `ours` and `peers/` the ways (some in
environments of their own), `worker` the measurement on one rank, `launch` the processes of one trial, `memory` what
they occupy, `report` the tables.
"""
