# Activation statistics of the original model: what a column and an output row are worth.


rule statistics:
    input:
        model=ancient("resources/models/{model}"),
        model_manifest="resources/models/{model}.manifest.json",
        calibration=ancient("data/calibration/{model}"),
        calibration_manifest="data/calibration/{model}.manifest.json",
    output:
        statistics="data/statistics/{model}.safetensors",
        manifest="data/statistics/{model}.safetensors.manifest.json",
    log:
        "logs/statistics/{model}.log",
    benchmark:
        "logs/statistics/{model}.benchmark.jsonl"
    conda:
        "../envs/windquant.yaml"
    threads: ALL_CORES
    resources:
        mem_mb=ask("statistics", "mem_mb"),
        runtime=ask("statistics", "runtime"),
        disk_mb=ask("statistics", "disk_mb"),
        gpu=ask("statistics", "gpu"),
    params:
        code=code("statistics"),
        lock=LOCK,
        experiment=experiment,
        seed=seed,
        settings=settings("statistics"),
    message:
        "statistics: activations of {wildcards.model}"
    shell:
        "python -m windquant.statistics --model {input.model} --calibration {input.calibration}"
        " --output {output.statistics} --experiment {params.experiment} --seed {params.seed} --threads {threads}"
        " {params.settings} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
