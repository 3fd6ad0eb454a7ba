"""Zero-shot accuracy of a checkpoint through lm-eval.

    python -m windquant.evaluation.zero_shot --checkpoint DIR --calibration DIR --output FILE.json
    python -m windquant.evaluation.zero_shot ... --tasks arc_easy,boolq --data-dir DIR

`cloze` and `next_sentence` are made from held-out articles and need no network. Any other name is a task of lm-eval by
its own definition, read from the Hub or from `data_dir`: files `<task>.<split>.jsonl` in the columns of the Hub.
"""

import json
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import windquant.checkpoint.linear  # noqa: F401  # loads packed checkpoints, so it belongs to the step's code
from windquant import compute, kernels, memory, models, sources, step, streaming
from windquant.errors import WindquantError
from windquant.evaluation import local, tasks as embedded
from windquant.evaluation.local import EMBEDDED, SPLITS
from windquant.settings import Count, Natural

STREAMED = 4  # times the batch where every batch reads the model from its files


@dataclass(frozen=True)
class Settings:
    tasks: tuple[str, ...] = EMBEDDED  # names of lm-eval, or cloze and next_sentence
    metric: Literal["acc", "acc_norm"] = "acc"  # acc_norm (by length) where a task has it, else acc
    limit: Natural = 0  # samples per task, the first ones (0 = all)
    batch_size: Count = 8  # requests per forward pass
    data_dir: str = ""  # folder of <task>.<split>.jsonl in the columns of the Hub's data sets; empty: the Hub
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # auto: float32; as stored for a large model on a GPU
    )


def run(task: step.Task, settings: Settings) -> None:
    files = {name: data_files(name, task.inputs["calibration"], settings.data_dir) for name in settings.tasks}
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        random.seed(0)  # tasks that draw (gpqa) ask the same of every model, whatever the seed
        numpy.random.seed(1234)
        loaded = load_tasks(files, Path(scratch))  # before the model: an unknown task shows at once
        model, batch = load(task.inputs["checkpoint"], settings.device, settings.dtype, settings.batch_size)
        tokenizer = models.load_tokenizer(task.inputs["checkpoint"])
        if loaded and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise WindquantError(
                f"evaluation.tasks: the tokenizer of {task.inputs['checkpoint']} has neither BOS nor EOS, one of which "
                "lm-eval begins texts with; set evaluation.tasks: []"
            )
        results = compute.with_smaller_batches(
            batch, lambda batch: evaluate(model, tokenizer, loaded, settings.limit, batch, task.progress)
        )
    scores = {name: score(results, name, settings.metric) for name in settings.tasks}
    task.metrics({f"accuracy.{name}": entry["accuracy"] for name, entry in scores.items()})
    task.note("task_versions", {name: results["versions"].get(name) for name in settings.tasks} if scores else {})
    task.output.write_text(json.dumps(scores, indent=1) + "\n")


def load(folder: Path, device: str, dtype: str, batch: int) -> tuple[PreTrainedModel, int]:
    """A checkpoint for `evaluate` and its batch: whole where it fits into memory (memory.py), else streamed.

    A streamed model is read for every batch, so that is larger. A packed model stays packed where kernels compute.
    """
    source = streaming.open_source(folder)
    where, chosen = models.place(models.configuration(folder), device, dtype)
    packed = source.layouts and kernels.serve(where, chosen)
    size = sum(entry.size for entry in source.entries.values()) if packed else chosen.itemsize * source.parameters
    if memory.fits(size):
        return models.load_for(folder, device, dtype), batch
    return streaming.load(folder, device, str(chosen).removeprefix("torch.")), STREAMED * batch


def data_files(name: str, calibration: Path, data_dir: str = "") -> dict[str, Path]:
    """Local files of a task by split; none for a task that is read from the Hub.

    Raises WindquantError if there is no file of an embedded task, or `data_dir` has none of another.
    """
    if name in EMBEDDED:
        file = calibration / f"{name}.jsonl"
        if not file.is_file():
            raise WindquantError(
                f"evaluation.tasks: {name} needs held-out articles and {calibration} has none; set "
                "calibration.test_source to same or articles, or name other tasks"
            )
        return {"test": file}
    return local.of_task(name, data_dir) if data_dir else {}


def load_tasks(files: dict[str, dict[str, Path]], scratch: Path) -> list[Any]:
    """lm-eval's task objects with their data, from local files where `files[task][split]` names some.

    Raises WindquantError for an unknown task, and for one whose data cannot be had.
    """
    import yaml
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager

    if all(name in EMBEDDED for name in files):
        definitions = {name: embedded.DEFINITIONS / f"{name}.yaml" for name in files}
    else:  # reading lm-eval's own thousands takes seconds
        definitions = _definitions()
    for name, splits in files.items():
        if name not in definitions:
            raise WindquantError(f"evaluation.tasks: lm-eval has no task {name}; name single tasks, no groups of them")
        # A definition of the same name that includes the original one and says where the data are.
        text = yaml.safe_dump({"include": str(definitions[name]), "task": name, **_local(splits, scratch)})
        (scratch / f"{name}.yaml").write_text(text)
    if not all(files.values()):
        sources.cached_only_if_offline()
    manager = TaskManager(include_path=str(scratch), include_defaults=False)
    loaded = []
    for name, splits in files.items():
        try:
            (task,) = manager.load(name)["tasks"].values()
        except (OSError, ValueError, LookupError, TemplateError) as error:
            where = "evaluation.data_dir" if splits else "evaluation.tasks"
            raise WindquantError(
                f"{where}: the data of {name} cannot be read ({models.first_line(error)}); evaluation.data_dir takes a "
                f"folder with {name}.<split>.jsonl in the columns of the Hub's data set"
            ) from error
        if "acc" not in (metrics := task.aggregation()):
            raise WindquantError(f"evaluation.tasks: {name} measures no accuracy (acc) but {', '.join(metrics)}")
        loaded.append(task)
    return loaded


@cache
def _definitions() -> dict[str, Path]:
    """File of every single task that lm-eval knows, and of ours."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=str(embedded.DEFINITIONS)).task_index
    return {
        name: Path(entry.yaml_path) for name, entry in index.items() if entry.yaml_path and entry.kind.name == "TASK"
    }


def _local(splits: dict[str, Path], scratch: Path) -> dict[str, Any]:
    """What turns a task's data set into local files; splits without a file are taken away from the task."""
    if not splits:
        return {}
    named = {f"{key}_split": split if split in splits else None for key, split in SPLITS.items()}
    paths = {split: str(file.resolve()) for split, file in splits.items()}
    data = {"data_files": paths, "cache_dir": str(scratch / "cache")}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": data, **named}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    limit: int = 0,
    batch_size: int = 8,
    progress: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """lm-eval's results of a loaded model on task objects; `limit` samples per task (0 = all).

    `progress(total=, label=)` makes what shows how many requests are done (step.Task.progress).
    """
    from lm_eval import evaluate as run_tasks
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        def _loglikelihood_tokens(self, requests: list[Any], *_: Any, **options: Any) -> Any:
            options["disable_tqdm"] = True
            if progress is None:
                return super()._loglikelihood_tokens(requests, **options)
            with progress(total=len(requests), label="zero-shot requests") as self.bar:
                answers = super()._loglikelihood_tokens(requests, **options)
                self.bar.update(len(requests) - self.bar.done)  # answers of one token share a forward pass
                return answers

        def _model_call(self, inps: Tensor, **options: Any) -> Tensor:
            logits: Tensor = super()._model_call(inps, **options)
            if progress is not None:
                self.bar.update(len(inps))
            return logits

    if not tasks:
        return {}
    for task in tasks:
        task.set_config(key="num_fewshot", value=0)
    # Not `simple_evaluate`, which adds a report of the machine (pip list and more) that takes as long as small tasks.
    # One bootstrap iteration is none: the mean's standard error has a formula, and 0 would leave it out.
    with streaming.on_call(model):
        results: dict[str, Any] = run_tasks(
            Harness(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                # Answers are compared with each other: BF16 products are enough. HFLM would turn off our autocast.
                mixed_precision_dtype="bfloat16" if compute.native_bfloat16() else None,
                softmax_dtype="float32",
            ),
            {"tasks": {task.task_name: task for task in tasks}},
            limit=limit or None,
            bootstrap_iters=1,
            log_samples=False,
        )
    return results


def score(results: dict[str, Any], name: str, metric: str) -> dict[str, Any]:
    """One task's {"accuracy", "stderr", "samples", "metric"} out of lm-eval's results."""
    found = results["results"][name]
    chosen = metric if f"{metric},none" in found else "acc"
    error = found[f"{chosen}_stderr,none"]
    return {
        "accuracy": float(found[f"{chosen},none"]),
        "stderr": 0.0 if error == "N/A" else float(error),  # of a single sample
        "samples": int(results["n-samples"][name]["effective"]),
        "metric": chosen,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the chatter of lm-eval and the bars of datasets and, in a log, without lm-eval's bars."""
    import datasets
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    bar = tqdm.__init__

    def hidden(self: tqdm, *args: Any, **options: Any) -> None:  # lm-eval has no switch
        bar(self, *args, **({**options, "disable": True} if "file" not in options else options))  # ours has a file

    if not sys.stderr.isatty():
        tqdm.__init__ = hidden
    try:
        yield
    finally:
        logger.setLevel(level)
        datasets.enable_progress_bars()
        tqdm.__init__ = bar


if __name__ == "__main__":
    step.main("zero_shot", run, Settings, inputs=("checkpoint", "calibration"))
