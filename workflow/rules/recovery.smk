# Codes and bits frozen, scales and norms tuned by distillation from the original model.


rule recovery:
    input:
        model=ancient("resources/models/{model}"),
        model_manifest="resources/models/{model}.manifest.json",
        calibration=ancient("data/calibration/{model}"),
        calibration_manifest="data/calibration/{model}.manifest.json",
        checkpoint=ancient(of_plan("data/checkpoints/{model}_{bits}bits.{codes}/before_recovery")),
        checkpoint_manifest=of_plan("data/checkpoints/{model}_{bits}bits.{codes}/before_recovery.manifest.json"),
    output:
        checkpoint=directory("data/checkpoints/{model}_{bits}bits.{allocator}/quantized"),
        manifest="data/checkpoints/{model}_{bits}bits.{allocator}/quantized.manifest.json",
    log:
        "logs/recovery/{model}_{bits}bits.{allocator}.log",
    benchmark:
        "logs/recovery/{model}_{bits}bits.{allocator}.benchmark.jsonl"
    priority: 2  # before the perplexity of what it recovers, beside which a core would wait
    conda:
        "../envs/windquant.yaml"
    threads: ALL_CORES
    resources:
        mem_mb=ask("recovery", "mem_mb"),
        runtime=ask("recovery", "runtime"),
        disk_mb=ask("recovery", "disk_mb"),
        gpu=ask("recovery", "gpu"),
    params:
        code=code("recovery", "checkpoint.huggingface"),
        lock=LOCK,
        experiment=experiment,
        seed=seed,
        settings=settings("recovery"),
    message:
        "recovery: {wildcards.model} at {wildcards.bits} bits ({wildcards.allocator})"
    shell:
        "python -m windquant.recovery --model {input.model} --calibration {input.calibration}"
        " --checkpoint {input.checkpoint}"
        " --output {output.checkpoint} --experiment {params.experiment} --seed {params.seed} --threads {threads}"
        " {params.settings} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
