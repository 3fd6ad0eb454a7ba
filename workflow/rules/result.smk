# Everything measured in one experiment, in one file. The PPO plan's has no allocator in its name.


rule result:
    input:
        model=ancient("resources/models/{model}"),
        calibration=ancient("data/calibration/{model}"),
        statistics="data/statistics/{model}.safetensors",
        bank=bank_of,
        search=search_of,
        plan=of_plan("data/plans/{model}_{bits}bits.{plan}.json"),
        before_recovery=ancient(of_plan("data/checkpoints/{model}_{bits}bits.{codes}/before_recovery")),
        quantized=ancient(of_plan("data/checkpoints/{model}_{bits}bits.{allocator}/quantized")),
        perplexity_original="data/evaluation/{model}.original.perplexity.json",
        perplexity_before_recovery=of_plan("data/evaluation/{model}_{bits}bits.{codes}.before_recovery.perplexity.json"),
        perplexity_quantized=of_plan("data/evaluation/{model}_{bits}bits.{allocator}.quantized.perplexity.json"),
        zero_shot_original=of_tasks("data/evaluation/{model}.original.zero_shot.{task}.json"),
        zero_shot_quantized=of_tasks("data/evaluation/{model}_{bits}bits.{allocator}.quantized.zero_shot.{task}.json"),
        manifests=of_plan(
            "resources/models/{model}.manifest.json",
            "data/calibration/{model}.manifest.json",
            "data/statistics/{model}.safetensors.manifest.json",
            "data/plans/{model}_{bits}bits.{plan}.json.manifest.json",
            "data/checkpoints/{model}_{bits}bits.{codes}/before_recovery.manifest.json",
            "data/checkpoints/{model}_{bits}bits.{allocator}/quantized.manifest.json",
            "data/evaluation/{model}.original.perplexity.json.manifest.json",
            "data/evaluation/{model}_{bits}bits.{codes}.before_recovery.perplexity.json.manifest.json",
            "data/evaluation/{model}_{bits}bits.{allocator}.quantized.perplexity.json.manifest.json",
        ),
        zero_shot_original_manifests=of_tasks("data/evaluation/{model}.original.zero_shot.{task}.json.manifest.json"),
        zero_shot_quantized_manifests=of_tasks(
            "data/evaluation/{model}_{bits}bits.{allocator}.quantized.zero_shot.{task}.json.manifest.json"
        ),
        bank_manifest=manifest_of(bank_of),
        search_manifest=manifest_of(search_of),
    output:
        result=report(
            "results/{model}_{bits}bits{baseline}.json",
            category="Results",
            labels={"model": "{model}", "bits": "{bits}", "allocator": "{baseline}"},
            caption="../report/result.rst",
        ),
        manifest="results/{model}_{bits}bits{baseline}.json.manifest.json",
    log:
        "logs/result/{model}_{bits}bits{baseline}.log",
    benchmark:
        "logs/result/{model}_{bits}bits{baseline}.benchmark.jsonl"
    localrule: True
    conda:
        "../envs/windquant.yaml"
    params:
        code=code("result"),
        lock=LOCK,
        experiment=experiment,
        seed=seed,
        config_sha256=config_sha256,
        search=lambda wildcards, input: f"--search {input.search}" if input.search else "",
        zero_shot=lambda wildcards, input: (
            f"--zero-shot-original {input.zero_shot_original} --zero-shot-quantized {input.zero_shot_quantized}"
            if input.zero_shot_original
            else ""
        ),
    message:
        "result: {wildcards.model} at {wildcards.bits} bits"
    shell:
        "python -m windquant.result --model {input.model} --calibration {input.calibration}"
        " --statistics {input.statistics} --bank {input.bank} {params.search} --plan {input.plan}"
        " --before-recovery {input.before_recovery} --quantized {input.quantized}"
        " --perplexity-original {input.perplexity_original}"
        " --perplexity-before-recovery {input.perplexity_before_recovery}"
        " --perplexity-quantized {input.perplexity_quantized}"
        " {params.zero_shot}"
        " --output {output.result} --experiment {params.experiment} --seed {params.seed}"
        " --config-sha256={params.config_sha256} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
