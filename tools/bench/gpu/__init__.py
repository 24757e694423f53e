"""`gpu`: the table of what the CUDA backend has to reach, measured; see `tools/bench/results/README.md`.

Models have random weights, made on the device. What runs in this process's stead runs in processes of
its own: engines one model at a time, servers as they are served. So one fault costs one row.
"""
