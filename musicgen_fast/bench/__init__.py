"""Times of this project and of its peers on the machine at hand: what `musicgen-fast bench` and `benchmarks/` run.

    latency (rounds, rows, tables) -> worker (one job in a process of its own) -> providers, openvino_peer, parity

`machine.py` says what the machine is and how fast it reads memory. Nothing here is imported by the rest of the package.
"""
