"""Seconds to load a model on a CPU, and what it then takes: the original, the packed one, the packed one undecoded.

    python -m benchmarks.kernels.loading resources/models/NAME data/checkpoints/NAME/quantized

Every load is a process of its own; the libraries are imported before its clock starts.
"""

import json
import subprocess
import sys

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
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
seconds = time.perf_counter() - start
ids = torch.arange(64)[None] + 100
with torch.no_grad():
    loss = model(ids, labels=ids).loss.item()
gc.collect()
print(json.dumps({"seconds": seconds, "resident": psutil.Process().memory_info().rss - before, "loss": loss}))
"""


def main(original: str, packed: str, repeats: int = 5) -> None:
    for dtype in ("float16", "float32"):
        print(f"{dtype}: median seconds to load, resident bytes with the model, loss of 64 fixed tokens")
        for what, folder in (("original", original), ("packed", packed), ("low_memory", packed)):
            runs = []
            for _ in range(repeats):
                command = [sys.executable, "-W", "ignore", "-c", PROBE, folder, what, dtype]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
            print(f"{what:<12}{middle['seconds']:8.2f}{middle['resident']:16,}{middle['loss']:12.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
