"""Time and memory of making a small proxy from a giant that is never built.

``python -m benchmarks.resize_meta --layers 80``: a Llama of 70 billion parameters on the meta device (hidden
size 8192, 64 heads, 8 key/value heads, 80 layers) becomes a copy of the same depth on the CPU. Most of what
is left are the tables of its 32 000 tokens.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

import mupass
from benchmarks.analyze_scaling import llama

PROXY = {"d_model": 16, "heads": 8, "kv_heads": 1, "head_dim": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[80])
    options = parser.parse_args()
    ids = torch.randint(100, (1, 16))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| layers | source parameters | proxy parameters | seconds | peak memory |")
    print("|---|---|---|---|---|")
    for layers in options.layers:
        with torch.device("meta"):
            model, _ = llama(layers, 32000)
        started = time.perf_counter()
        proxy = mupass.resize(model, PROXY, example_inputs={"input_ids": ids, "use_cache": False}, seed=0)
        seconds = time.perf_counter() - started
        assert proxy(ids).logits.isfinite().all()
        counts = [sum(p.numel() for p in m.parameters()) for m in (model, proxy)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        print(f"| {layers} | {counts[0]:,} | {counts[1]:,} | {seconds:.0f} | {peak:.1f} GiB |", flush=True)


if __name__ == "__main__":
    main()
