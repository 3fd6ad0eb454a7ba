# For every unit and action the predicted loss increase and the exact storage cost; where `units.jobs` says so, from parts
# that jobs of their own have made.


rule bank:
    input:
        model=ancient("resources/models/{model}"),
        model_manifest="resources/models/{model}.manifest.json",
        statistics="data/statistics/{model}.safetensors",
        parts=bank_parts,
        part_manifests=manifest_of(bank_parts),
    output:
        bank="data/bank/{model}{change}.safetensors",
        manifest="data/bank/{model}{change}.safetensors.manifest.json",
    log:
        "logs/bank/{model}{change}.log",
    benchmark:
        "logs/bank/{model}{change}.benchmark.jsonl"
    conda:
        "../envs/windquant.yaml"
    threads: ALL_CORES
    resources:
        mem_mb=ask("bank", "mem_mb"),
        runtime=ask("bank", "runtime"),
        disk_mb=ask("bank", "disk_mb"),
    params:
        code=code("bank"),
        lock=LOCK,
        experiment=experiment,
        seed=seed,
        settings=settings("bank"),
        part=lambda wildcards, input: f"--parts {input.parts}" if input.parts else "",
    message:
        "bank: errors and costs of every action for {wildcards.model}{wildcards.change}"
    shell:
        "python -m windquant.bank --model {input.model} --statistics {input.statistics}"
        " --output {output.bank} --experiment {params.experiment} --seed {params.seed} --threads {threads}"
        " {params.settings} {params.part} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"


use rule bank as bank_part with:
    input:
        model=ancient("resources/models/{model}"),
        model_manifest="resources/models/{model}.manifest.json",
        statistics="data/statistics/{model}.safetensors",
    output:
        bank="data/bank/{model}{change}/{part}.safetensors",
        manifest="data/bank/{model}{change}/{part}.safetensors.manifest.json",
    log:
        "logs/bank/{model}{change}.{part}.log",
    benchmark:
        "logs/bank/{model}{change}.{part}.benchmark.jsonl"
    params:
        code=code("bank"),
        lock=LOCK,
        experiment=experiment,
        seed=seed,
        settings=settings("bank"),
        part=lambda wildcards: f"--part={wildcards.part}",
    message:
        "bank: part {wildcards.part} of {wildcards.model}{wildcards.change}"
