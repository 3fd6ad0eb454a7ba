# A plan, one action per unit, within the budget: by PPO or by a baseline allocator from the same bank.


rule allocation:
    input:
        model=ancient("resources/models/{model}"),
        model_manifest="resources/models/{model}.manifest.json",
        calibration=ancient("data/calibration/{model}"),
        calibration_manifest="data/calibration/{model}.manifest.json",
        statistics="data/statistics/{model}.safetensors",
        bank=bank_of_plan,
        experiment=ancient("data/experiments/{model}_{bits}bits.{allocator}.json"),
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
        seed=seed,
        settings=search_settings,
    message:
        "allocation: {wildcards.allocator} plan for {wildcards.model} at {wildcards.bits} bits"
    shell:
        "python -m windquant.allocation --model {input.model} --calibration {input.calibration}"
        " --statistics {input.statistics} --bank {input.bank} --target-bits {wildcards.bits} --allocator {wildcards.allocator}"
        " --output {output.plan} --experiment {input.experiment} --seed {params.seed} --threads {threads}"
        " {params.settings} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
