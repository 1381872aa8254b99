"""The limits of the machine: machine_limits.py THREADS. Runs under .venv."""

from __future__ import annotations

import sys

import torch

from benchmarks.peers.contestants.worker import serve
from elastic_moe.lab.bench.limits import LimitsProbe


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    probe = LimitsProbe()
    serve({"measure": lambda: probe.measure().to_json()}, {"torch": torch.__version__})


main()
