"""Parts of `tools.bench_peers`: other servers on the same checkpoint, beside ours.

`adapters.py` knows how each server is started and asked, `serving.py` starts and ends one, `usage.py` tells
who used the cores and what memory is held, `load.py` measures, `report.py` writes the table and the plot.
`openvino_server.py` and `convert_gguf.py` are programs for the Python of a peer, and import nothing of ours.
"""
