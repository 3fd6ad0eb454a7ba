# What all rules share. Two things hold everywhere:
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

from windquant import configuration, control_groups, dependencies, estimate, gpus, local_files, progress, tracking_store
from windquant.errors import WindquantError
from windquant.evaluation import local
from windquant.manifest import Manifest

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


SCHEMA = one_line(configuration.load)(ROOT / "workflow" / "schemas" / "config.schema.yaml")
CONFIG = one_line(configuration.validate)(configuration.overruled(config, workflow.config_settings.config), SCHEMA)


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
    return configuration.variant(name or "ppo", changes(wildcards.model))


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
    return settings("allocation")(wildcards) if variant(wildcards).allocator in configuration.MEASURING else ""


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
    return configuration.local_files(f"models.{wildcards.model}", entry, {"source": "path"})


def content(function):
    """Digest of the local files that an input function names: Snakemake does not read those that are older."""
    return lambda wildcards: local_files.digest(function(wildcards))


@one_line
def text_files(wildcards):
    """The files of local texts."""
    entry = resolved(wildcards.model)["calibration"]
    return configuration.local_files("calibration", entry, {"source": "path", "test_source": "test_path"})


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


@one_line
def task_files(wildcards):
    """The files of a local zero-shot task."""
    return local.of_tasks([wildcards.task], resolved(wildcards.model)["evaluation"]["data_dir"])


def of_tasks(pattern):
    """The files of a result's zero-shot tasks; a job measures one task of one checkpoint."""

    def files(wildcards):
        tasks = holds(wildcards)["evaluation"]["tasks"]
        return [file for task in tasks for file in of_plan(pattern.replace("{task}", task))(wildcards)]

    return files


def alters(model, change, step):
    """Whether a change gives a step other settings."""
    one, other = (configuration.step_settings(entry, step) for entry in (resolved(model), resolved(model, change)))
    return one != other


def bank_of(wildcards):
    """The bank of a plan or search: of the model, or one of its own where a change cuts the units otherwise."""
    change = variant(wildcards).change
    own = f"_{change}" if alters(wildcards.model, change, "bank") else ""
    return f"data/bank/{wildcards.model}{own}.safetensors"


def bank_parts(wildcards):
    """The parts of a bank that several jobs make together."""
    jobs = holds(wildcards)["units"]["jobs"]
    name = f"{wildcards.model}{wildcards.change}"
    return [f"data/bank/{name}/{part}.safetensors" for part in range(1, jobs + 1)] if jobs > 1 else []


def made(wildcards):
    """The steps on the way to a result that have been made, as far as its room is concerned."""
    steps = {
        "model": "resources/models/{model}",
        "calibration": "data/calibration/{model}",
        "statistics": "data/statistics/{model}.safetensors",
        "allocation": "data/plans/{model}_{bits}bits.{plan}.json",
        "quantize": "data/checkpoints/{model}_{bits}bits.{codes}/before_recovery",
        "recovery": "data/checkpoints/{model}_{bits}bits.{allocator}/quantized",
    }
    outputs = dict(zip(steps, of_plan(*steps.values())(wildcards), strict=True)) | {"bank": bank_of(wildcards)}
    outputs |= {"search": path for path in search_of(wildcards)}
    return {step for step, path in outputs.items() if Path(path).exists()}


@one_line
def bank_of_plan(wildcards):
    """The bank that a plan is made from; bits, allocator and, on this machine, memory and disk are checked on the way."""
    bits = configuration.named_bits(wildcards.bits)
    allocator = variant(wildcards).allocator
    finished = Path(result_of(wildcards.model, wildcards.bits, wildcards.allocator)).exists()
    if workflow.is_main_process and workflow.local_exec and not workflow.dryrun and not finished:
        estimate.check_lowest(holds(wildcards), bits)
        estimate.check_room(holds(wildcards), bits, allocator, CORES, bool(GPUS), made(wildcards))
    return bank_of(wildcards)


#: The steps between a model's statistics and a checkpoint, and the allocators for whose plans some of them are.
CHAIN = ("bank", "search", "allocation", "quantize")
READERS = {"search": configuration.LEARNED, "allocation": configuration.MEASURING}


def shared(wildcards, last):
    """The variant under whose name a step makes something: without a change or a seed that no step so far notices."""
    own = variant(wildcards)
    steps = [step for step in CHAIN[: CHAIN.index(last) + 1] if own.allocator in READERS.get(step, [own.allocator])]
    noticed = any(alters(wildcards.model, own.change, step) for step in steps)
    seeded = own.allocator not in configuration.SEEDLESS
    return configuration.Variant(own.allocator, own.change if noticed else "", own.seed if seeded else None).name


def search_of(wildcards):
    """The search whose policy makes a plan, where one does: all budgets share it, and changes that it does not notice."""
    if variant(wildcards).allocator not in configuration.LEARNED:
        return []
    return [f"data/search/{wildcards.model}_{shared(wildcards, 'search')}.safetensors"]


def manifest_of(function):
    """The manifests of what an input function names."""

    def files(wildcards):
        found = function(wildcards)
        return [f"{path}.manifest.json" for path in ([found] if isinstance(found, str) else found)]

    return files


def result_of(model, bits, name):
    """The result of an allocator, a change and a seed at a budget."""
    return f"results/{configuration.result_name(model, bits, name)}"


def of_plan(*patterns):
    """The files of the plan that a result is about: an empty {baseline} is PPO.

    {allocator} is what the result's own files are called; {plan} and {codes} what its plan and its checkpoint before
    recovery are, which results share that differ in later steps alone.
    """

    def files(wildcards):
        names = {
            "allocator": variant(wildcards).name,
            "plan": shared(wildcards, "allocation"),
            "codes": shared(wildcards, "quantize"),
        }
        return [pattern.format(**{**wildcards, **names}) for pattern in patterns]

    return files


def all_allocators(wildcards):
    """The results of all allocators, each with every seed; the usual seed has no name."""
    usual = resolved(wildcards.model)["seed"]
    names = [
        name if seed == usual else f"{name}-{seed}"
        for name in configuration.ALLOCATORS
        for seed in study(wildcards.model, "seeds")
    ]
    return [result_of(wildcards.model, wildcards.bits, name) for name in names]


def all_budgets(wildcards):
    """The results at all budgets of the Pareto table."""
    return [result_of(wildcards.model, float(bits), "ppo") for bits in study(wildcards.model, "budgets")]


@one_line
def all_changes(wildcards):
    """The results of an ablation: without any change, and under each of its changes."""
    known = study(wildcards.model, "ablations")
    if wildcards.ablation not in known:
        hint = configuration.did_you_mean(wildcards.ablation, known)
        raise WindquantError(f"unknown ablation {wildcards.ablation}{hint}; there are {', '.join(known) or 'none'}")
    names = ["ppo", *(f"ppo-{change}" for change in known[wildcards.ablation])]
    return [result_of(wildcards.model, wildcards.bits, name) for name in names]


DEFAULT = "results/smollm2-135m_2.0bits.json"


def finished_results():
    """The results that are here and whole, and their digests."""
    found = {}
    for path in sorted(Path("results").glob("*.json.manifest.json")):
        artifact = path.with_name(path.name.removesuffix(".manifest.json"))
        if artifact.exists():
            found[str(artifact)] = one_line(Manifest.load)(artifact).output["sha256"]
    return found


def default_result():
    """The default result, unless others are here without it, or its model is not configured."""
    there = finished_results()
    return [DEFAULT] if "smollm2-135m" in CONFIG["models"] and (DEFAULT in there or not there) else []


@one_line
def something_to_report(wildcards):
    """`default_result`, and the refusal of a report of nothing."""
    if not (found := default_result()) and not other_results():
        example = result_of(next(iter(CONFIG["models"])), 2.0, "ppo")
        raise WindquantError(f"results/report.html: no result is here yet; ask for one first, e.g. {example}")
    return found


def other_results():
    return [path for path in finished_results() if path not in default_result()]


def result_digests():
    """Of the other results: where one changes, the report does."""
    return {path: digest[:16] for path, digest in finished_results().items() if path not in default_result()}


def existing(path):
    """An input that may be missing."""
    return [path] if Path(path).exists() else []
