# The packed checkpoint of a plan, before recovery.


rule quantize:
    input:
        model=ancient("resources/models/{model}"),
        model_manifest="resources/models/{model}.manifest.json",
        calibration=ancient("data/calibration/{model}"),
        calibration_manifest="data/calibration/{model}.manifest.json",
        statistics="data/statistics/{model}.safetensors",
        plan=of_plan("data/plans/{model}_{bits}bits.{plan}.json"),
    output:
        checkpoint=directory("data/checkpoints/{model}_{bits}bits.{allocator}/before_recovery"),
        manifest="data/checkpoints/{model}_{bits}bits.{allocator}/before_recovery.manifest.json",
    log:
        "logs/quantize/{model}_{bits}bits.{allocator}.log",
    benchmark:
        "logs/quantize/{model}_{bits}bits.{allocator}.benchmark.jsonl"
    conda:
        "../envs/windquant.yaml"
    threads: ALL_CORES
    resources:
        mem_mb=ask("quantize", "mem_mb"),
        runtime=ask("quantize", "runtime"),
        disk_mb=ask("quantize", "disk_mb"),
        gpu=ask("quantize", "gpu"),
    params:
        code=code("quantize"),
        lock=LOCK,
        experiment=experiment,
        seed=seed,
        settings=settings("quantize"),
    message:
        "quantize: {wildcards.model} at {wildcards.bits} bits ({wildcards.allocator})"
    shell:
        "python -m windquant.quantize --model {input.model} --calibration {input.calibration}"
        " --statistics {input.statistics} --plan {input.plan}"
        " --output {output.checkpoint} --experiment {params.experiment} --seed {params.seed} --threads {threads}"
        " {params.settings} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
