"""Times analyze against torch.export alone: a Llama of 70B width at several depths, ResNet-50, GPT-2.

Run ``python benchmarks/analyze_scaling.py [layers ...]``; every row is a process of its own, so that peak
memory is its own too. Models live on the meta device. Needs transformers and torchvision.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from torch import nn

LAYERS = (10, 20, 40, 80)


def llama(layers: int, vocabulary: int = 128256) -> tuple[nn.Module, dict[str, Any]]:
    """Return a Llama with the width of the 70B model, and its inputs."""
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    return hf.LlamaForCausalLM(config), {"input_ids": ids, "use_cache": False}


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    """Return GPT-2 small and its inputs."""
    import transformers as hf

    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    return hf.GPT2LMHeadModel(hf.GPT2Config()), {"input_ids": ids, "use_cache": False}


def resnet50() -> tuple[nn.Module, dict[str, Any]]:
    """Return ResNet-50 and its inputs."""
    import torchvision

    return torchvision.models.resnet50(), {"x": torch.zeros(2, 3, 224, 224, device="meta")}


def measure(name: str) -> str:
    """Return one row of the table."""
    import mupass

    warnings.simplefilter("ignore")
    with torch.device("meta"):
        model, inputs = llama(int(name)) if name.isdigit() else {"gpt2": gpt2, "resnet50": resnet50}[name]()
    with torch.device("meta"):
        torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),), strict=False)  # imports what export needs
    start = time.perf_counter()
    torch.export.export(model, (), inputs, strict=False)
    export = time.perf_counter() - start
    start = time.perf_counter()
    analysis = mupass.analyze(model, inputs)
    analyze = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    label = f"llama, {name} layers" if name.isdigit() else name
    numbers = f"{export:>10.1f}{analyze:>10.1f}{analyze / export:>8.2f}{peak:>10.2f}"
    return f"{label:<18}{len(analysis.geometries):>8}{numbers}"


def main() -> None:
    """Print the table, one process a row."""
    print(
        f"{'model':<18}{'params':>8}{'export s':>10}{'analyze s':>10}{'ratio':>8}{'peak GiB':>10}", flush=True
    )
    for name in sys.argv[1:] or ["resnet50", "gpt2", *map(str, LAYERS)]:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "ANALYZE_SCALING_ROW": name}
        subprocess.run([sys.executable, __file__], env=environment, check=True)


if __name__ == "__main__":
    if "ANALYZE_SCALING_ROW" in os.environ:
        print(measure(os.environ["ANALYZE_SCALING_ROW"]), flush=True)
    else:
        main()
