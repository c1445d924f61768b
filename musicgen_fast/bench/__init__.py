"""Times of this project and of its peers on the machine at hand: what `musicgen-fast bench` and `benchmarks/` run.

    latency (rounds, rows, tables) -> worker (one job in a process of its own) -> providers, *_peer, parity
    throughput (rounds), throughput_lines (tables) -> throughput_worker (one way in a process of its own)
    stream (rounds, tables) -> stream_worker, stream_peer
    sampler (rounds, parity, tables) -> sampler_peers, sampler_device -> sampler_case
    quality (rounds, sums), quality_lines (tables) -> quality_clips, parity
    plot, plot_bars (drawing) -> plot_style; plot_data -> plot_steps pick the numbers
    compare (two files of results); result_lines (what compare and plot read)

`transformers_folder.py` is the model that peers load, `job.py` says what a process is asked, `machine.py` what the
machine is and how fast it reads memory. Nothing here is imported by the rest of the package.
"""
