# Which files belong to what is asked for: functions of a rule's wildcards, that rules take as inputs, and lists of results.

from windquant.errors import did_you_mean
from windquant.evaluation import local
from windquant.manifest import Manifest


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
    bits = naming.named_bits(wildcards.bits)
    allocator = variant(wildcards).allocator
    finished = Path(result_of(wildcards.model, wildcards.bits, wildcards.allocator)).exists()
    if workflow.is_main_process and workflow.local_exec and not workflow.dryrun and not finished:
        estimate.check_lowest(holds(wildcards), bits)
        estimate.check_room(holds(wildcards), bits, allocator, CORES, bool(GPUS), made(wildcards))
    return bank_of(wildcards)


#: The steps between a model's statistics and a checkpoint, and the allocators for whose plans some of them are.
CHAIN = ("bank", "search", "allocation", "quantize")
READERS = {"search": naming.LEARNED, "allocation": naming.MEASURING}


def shared(wildcards, last):
    """The variant under whose name a step makes something: without a change or a seed that no step so far notices."""
    own = variant(wildcards)
    steps = [step for step in CHAIN[: CHAIN.index(last) + 1] if own.allocator in READERS.get(step, [own.allocator])]
    noticed = any(alters(wildcards.model, own.change, step) for step in steps)
    seeded = own.allocator not in naming.SEEDLESS
    return naming.Variant(own.allocator, own.change if noticed else "", own.seed if seeded else None).name


def search_of(wildcards):
    """The search whose policy makes a plan, where one does: all budgets share it, and changes that it does not notice."""
    if variant(wildcards).allocator not in naming.LEARNED:
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
    return f"results/{naming.result_name(model, bits, name)}"


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
        for name in naming.ALLOCATORS
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
        hint = did_you_mean(wildcards.ablation, known)
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
