"""What the machine does while a step runs, under the names that the MLflow UI shows as system metrics."""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

INTERVAL = 10.0  # seconds between two samples
MEGABYTE = 1e6


class Sampler:
    """Calls `report(values, sample number)` every INTERVAL seconds, and once more at the end, from a thread."""

    def __init__(self, report: Callable[[dict[str, float], int], None]) -> None:
        self._report = report
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        import psutil  # in the thread: the step does not wait for it

        process = psutil.Process(os.getpid())
        psutil.cpu_percent()  # the first call only starts the measurement
        number, last = 0, False
        with gpus() as handles:
            while not last:
                last = self._done.wait(INTERVAL)
                with contextlib.suppress(psutil.Error, OSError):
                    self._report(sample(process) | sample_gpus(handles), number)
                number += 1


def sample(process: Any) -> dict[str, float]:
    """Processors and memory of the machine, and the memory of this process."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_usage_megabytes": process.memory_info().rss / MEGABYTE,
        "system/disk_available_megabytes": psutil.disk_usage(".").free / MEGABYTE,
    }


@contextlib.contextmanager
def gpus() -> Any:
    """Handles of NVIDIA's GPUs; none without their driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []
        return
    try:
        yield [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def sample_gpus(handles: list[Any]) -> dict[str, float]:
    import pynvml

    values: dict[str, float] = {}
    for index, handle in enumerate(handles):
        with contextlib.suppress(pynvml.NVMLError):  # a partition of a GPU does not tell everything
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            values[f"system/gpu_{index}_memory_usage_megabytes"] = memory.used / MEGABYTE
            values[f"system/gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
            values[f"system/gpu_{index}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            values[f"system/gpu_{index}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    return values
