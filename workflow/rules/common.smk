# What all rules share: configuration, digests, resources. Two things hold everywhere:
#
# - A step reruns when its settings, its code or its inputs change, and only then. Settings and code are `params`:
#   the flags as they stand on the command line, and a digest of the step's modules without comments and docstrings.
# - Snakemake compares files by content but folders by time, and in a clone times mean nothing. So a folder is an
#   input for its path only (`ancient`), and its manifest, a small file that holds the folder's digest, stands for it.

import hashlib
import os
import sys
from functools import cache, wraps
from pathlib import Path

ROOT = Path(str(workflow.basedir))
ALL_CORES = workflow.cores or 1  # as a job's threads: no two jobs at once

# `python -m windquant` in the rules means the python that runs Snakemake, also where its environment is not
# activated, and the package beside this workflow, also where another clone is installed.
sys.path.insert(0, str(ROOT))
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *filter(None, [os.environ.get("PATH")])]),
    PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
)

from windquant import (
    configuration,
    control_groups,
    dependencies,
    estimate,
    gpus,
    local_files,
    memory,
    naming,
    progress,
    tracking_store,
    validation,
)
from windquant.errors import WindquantError

workflow.register_envvars(*tracking_store.hand_down())

#: What computes: a step takes no more than a container's share of the processors that Snakemake sees.
CORES = min(ALL_CORES, control_groups.cores()) if workflow.local_exec else ALL_CORES

if sys.stderr.isatty():  # the steps' bars go there, past the pipes into their logs
    os.environ[progress.TERMINAL] = "yes"


def one_line(function):
    """Bad input is one line for the user, not a traceback: nothing has been started yet."""

    @wraps(function)  # Snakemake asks for the arguments by name
    def wrapped(*arguments, **named):
        try:
            return function(*arguments, **named)
        except WindquantError as error:
            raise SystemExit(f"error: {error}") from None

    return wrapped


# Jobs side by side have to fit into the memory together.
if "mem_mb" not in workflow.global_resources and workflow.local_exec:
    workflow.global_resources["mem_mb"] = one_line(memory.total)() >> 20

SCHEMA = one_line(configuration.load)(ROOT / "workflow" / "schemas" / "config.schema.yaml")
CONFIG = one_line(validation.validate)(configuration.overruled(config, workflow.config_settings.config), SCHEMA)


@cache
@one_line
def resolved(model, change=""):
    """What the configuration says about a model, under a change of an ablation."""
    found = configuration.resolve(CONFIG, SCHEMA, model)
    return configuration.changed(found, changes(model)[change]) if change else found


@cache
@one_line
def changes(model):
    """The changes of all ablations of a model."""
    return configuration.changes(CONFIG, SCHEMA, model)


@one_line
def study(model, name):
    """What compares the results of a model: its budgets, seeds or ablations."""
    resolved(model)
    return configuration.study(CONFIG, SCHEMA, model, name)


@one_line
def variant(wildcards):
    """The allocator, change and seed that a file is about; an empty {baseline} is PPO."""
    name = getattr(wildcards, "allocator", None) or getattr(wildcards, "baseline", "").removeprefix(".")
    found = naming.variant(name or "ppo", changes(wildcards.model))
    if found.seed is not None and found.seed == resolved(wildcards.model)["seed"]:
        short = naming.Variant(found.allocator, found.change).name
        raise WindquantError(f"{name}: {found.seed} is the configuration's seed, which names leave out: {short}")
    return found


def holds(wildcards):
    """What holds for a file: the configuration of its model, under its change; of a zero-shot task, with it alone."""
    change = getattr(wildcards, "change", "").removeprefix("_")
    found = resolved(wildcards.model, change or variant(wildcards).change)
    task = getattr(wildcards, "task", None)
    return configuration.changed(found, {"evaluation": {"tasks": [task]}}) if task else found


def settings(step):
    """The settings of a step, as flags."""
    return lambda wildcards: configuration.flags(holds(wildcards), step)


def search_settings(wildcards):
    """The settings of a plan, as flags; allocators that measure nothing have none."""
    return settings("allocation")(wildcards) if variant(wildcards).allocator in naming.MEASURING else ""


def seed(wildcards):
    own = variant(wildcards).seed
    return resolved(wildcards.model)["seed"] if own is None else own


def experiment(wildcards):
    """Whose MLflow run a step belongs to: a plan's, or that of all plans of a model."""
    plan = f"_{wildcards.bits}bits.{variant(wildcards).name}" if hasattr(wildcards, "bits") else ""
    return f"{wildcards.model}{plan}"


def config_sha256(wildcards):
    return configuration.sha256(holds(wildcards))


def code(*modules):
    """Digest of a step's modules and all that they import."""
    return dependencies.digest(*(f"windquant.{module}" for module in modules))


def lock():
    """Digest of the locked packages; a comment in the lock file changes nothing."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return hashlib.sha256("\n".join(line for line in lines if not line.startswith("#")).encode()).hexdigest()[:16]


LOCK = lock()


@one_line
def model_files(wildcards):
    """The files of a local model, so that a changed one is noticed. Also the check that the model exists at all."""
    entry = resolved(wildcards.model)["model"]
    return local_files.of_entry(f"models.{wildcards.model}", entry, {"source": "path"})


def content(function):
    """Digest of the local files that an input function names: Snakemake does not read those that are older."""
    return lambda wildcards: local_files.digest(function(wildcards))


@one_line
def text_files(wildcards):
    """The files of local texts."""
    entry = resolved(wildcards.model)["calibration"]
    return local_files.of_entry("calibration", entry, {"source": "path", "test_source": "test_path"})


#: GPUs that jobs may use: those of `--resources gpu=` (a cluster's profile), or this machine's. A job that computes
#: with one takes one, so that each has one job at a time; compute.py says which.
if "gpu" not in workflow.global_resources and workflow.local_exec and gpus.visible():
    workflow.global_resources["gpu"] = len(gpus.visible())
GPUS = workflow.global_resources["gpu"].value if "gpu" in workflow.global_resources else 0


def ask(step, resource):
    """What a step's job asks for of a resource, from the model's configuration; `gpu`: one, where there are any."""

    @one_line
    def asked(wildcards, attempt):
        if resource == "gpu":
            return 1 if GPUS else None
        bits = float(getattr(wildcards, "bits", 16))
        found = estimate.resources(holds(wildcards), step, bits, CORES, bool(GPUS), attempt)
        return found[resource]

    return asked


def share(step):
    """Threads of an evaluation. Where two fit into the memory they run side by side: the start of one, which takes a
    single core, leaves the others to the other one.
    """

    def threads(wildcards):
        # a job on a node has it for itself; of a container that has less than the cores that Snakemake gives out, each
        # would take all
        alone = not workflow.local_exec or workflow.remote_exec or CORES < ALL_CORES
        return ALL_CORES if alone else max(1, ALL_CORES // ask(step, "beside")(wildcards, 1))

    return threads
