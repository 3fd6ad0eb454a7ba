"""The NVIDIA GPUs of this machine, without importing torch: the workflow asks too."""

import os
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder per GPU


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; a scheduler may have set it."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    return [str(index) for index in range(len(list(DRIVER.glob("*"))))]
