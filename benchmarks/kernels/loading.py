"""Seconds to load a model on a CPU, and what it then takes: the original, the packed one, the packed one undecoded.

    python -m benchmarks.kernels.loading resources/models/NAME data/checkpoints/NAME/quantized

Every load is a process of its own; the libraries are imported before its clock starts.
"""

import json
import subprocess
import sys
from statistics import median

PROBE = """
import gc, json, sys, time
import psutil, torch, windquant
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from windquant.checkpoint.huggingface import WindquantConfig
logging.disable_progress_bar(); logging.set_verbosity_error()
folder, sparse, dtype = sys.argv[1], sys.argv[2] == "low_memory", getattr(torch, sys.argv[3])
before = psutil.Process().memory_info().rss
options = {"quantization_config": WindquantConfig(low_memory=True)} if sparse else {}
start, busy = time.perf_counter(), time.process_time()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
seconds, busy = time.perf_counter() - start, time.process_time() - busy
ids = torch.arange(64)[None] + 100
with torch.no_grad():
    loss = model(ids, labels=ids).loss.item()
gc.collect()
resident = psutil.Process().memory_info().rss - before
print(json.dumps({"seconds": seconds, "busy": busy, "resident": resident, "loss": loss}))
"""


def main(original: str, packed: str, repeats: int = 5) -> None:
    for dtype in ("float16", "float32"):
        print(f"{dtype}: median seconds to load, of all processors, resident bytes with the model, loss of 64 tokens")
        runs: dict[str, list[dict[str, float]]] = {"original": [], "packed": [], "low_memory": []}
        for _ in range(repeats):  # in turn, so that what else the machine does falls on all of them
            for what, found in runs.items():
                folder = original if what == "original" else packed
                command = [sys.executable, "-W", "ignore", "-c", PROBE, folder, what, dtype]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        for what, found in runs.items():
            seconds, busy = (median(run[key] for run in found) for key in ("seconds", "busy"))
            print(f"{what:<12}{seconds:8.2f}{busy:8.2f}{found[0]['resident']:16,}{found[0]['loss']:12.6f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
