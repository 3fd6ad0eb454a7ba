# A plan, one action per unit, within the budget: by PPO or by a baseline allocator from the same bank. What PPO learns
# serves all budgets, so the search is a step of its own.


rule search:
    input:
        model=ancient("resources/models/{model}"),
        model_manifest="resources/models/{model}.manifest.json",
        calibration=ancient("data/calibration/{model}"),
        calibration_manifest="data/calibration/{model}.manifest.json",
        statistics="data/statistics/{model}.safetensors",
        bank=bank_of,
    output:
        search="data/search/{model}_{allocator}.safetensors",
        manifest="data/search/{model}_{allocator}.safetensors.manifest.json",
    log:
        "logs/search/{model}_{allocator}.log",
    benchmark:
        "logs/search/{model}_{allocator}.benchmark.jsonl"
    conda:
        "../envs/windquant.yaml"
    threads: ALL_CORES
    resources:
        mem_mb=ask("search", "mem_mb"),
        runtime=ask("search", "runtime"),
        disk_mb=ask("search", "disk_mb"),
        gpu=ask("search", "gpu"),
    params:
        code=code("search"),
        lock=LOCK,
        experiment=experiment,
        seed=seed,
        settings=settings("search"),
        per=lambda wildcards: "layer" if variant(wildcards).allocator == "layer" else "chunk",
    message:
        "search: {wildcards.allocator} policy for all budgets of {wildcards.model}"
    shell:
        "python -m windquant.search --model {input.model} --calibration {input.calibration}"
        " --statistics {input.statistics} --bank {input.bank} --per {params.per}"
        " --output {output.search} --experiment {params.experiment} --seed {params.seed} --threads {threads}"
        " {params.settings} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"


rule allocation:
    input:
        model=ancient("resources/models/{model}"),
        model_manifest="resources/models/{model}.manifest.json",
        calibration=ancient("data/calibration/{model}"),
        calibration_manifest="data/calibration/{model}.manifest.json",
        statistics="data/statistics/{model}.safetensors",
        bank=bank_of_plan,
        search=search_of,
    output:
        plan="data/plans/{model}_{bits}bits.{allocator}.json",
        manifest="data/plans/{model}_{bits}bits.{allocator}.json.manifest.json",
    log:
        "logs/allocation/{model}_{bits}bits.{allocator}.log",
    benchmark:
        "logs/allocation/{model}_{bits}bits.{allocator}.benchmark.jsonl"
    conda:
        "../envs/windquant.yaml"
    threads: ALL_CORES
    resources:
        mem_mb=ask("allocation", "mem_mb"),
        runtime=ask("allocation", "runtime"),
        disk_mb=ask("allocation", "disk_mb"),
        gpu=ask("allocation", "gpu"),
    params:
        code=code("allocation"),
        lock=LOCK,
        experiment=experiment,
        seed=seed,
        settings=search_settings,
        allocator=lambda wildcards: variant(wildcards).allocator,
        search=lambda wildcards, input: f"--search {input.search}" if input.search else "",
    message:
        "allocation: {wildcards.allocator} plan for {wildcards.model} at {wildcards.bits} bits"
    shell:
        "python -m windquant.allocation --model {input.model} --calibration {input.calibration}"
        " --statistics {input.statistics} --bank {input.bank} --target-bits {wildcards.bits} --allocator {params.allocator}"
        " {params.search} --output {output.plan} --experiment {params.experiment} --seed {params.seed} --threads {threads}"
        " {params.settings} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
