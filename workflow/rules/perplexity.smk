# Perplexity on the test text: of the original model, shared by all its plans, and of the quantized one.


rule perplexity_original:
    input:
        checkpoint=ancient("resources/models/{model}"),
        checkpoint_manifest="resources/models/{model}.manifest.json",
        calibration=ancient("data/calibration/{model}"),
        calibration_manifest="data/calibration/{model}.manifest.json",
    output:
        evaluation="data/evaluation/{model}.original.perplexity.json",
        manifest="data/evaluation/{model}.original.perplexity.json.manifest.json",
    log:
        "logs/perplexity/{model}.original.log",
    benchmark:
        "logs/perplexity/{model}.original.benchmark.jsonl"
    priority: 1  # before the zero-shot tasks, which are shorter: so both cores are busy to the end
    conda:
        "../envs/windquant.yaml"
    threads: share("perplexity_original")
    resources:
        mem_mb=ask("perplexity_original", "mem_mb"),
        runtime=ask("perplexity_original", "runtime"),
        disk_mb=ask("perplexity_original", "disk_mb"),
        gpu=ask("perplexity_original", "gpu"),
    params:
        code=code("evaluation.perplexity"),
        lock=LOCK,
        experiment=experiment,
        seed=seed,
        settings=settings("perplexity"),
    message:
        "perplexity: original {wildcards.model}"
    shell:
        "python -m windquant.evaluation.perplexity --checkpoint {input.checkpoint}"
        " --calibration {input.calibration}"
        " --output {output.evaluation} --experiment {params.experiment} --seed {params.seed} --threads {threads}"
        " {params.settings} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"


use rule perplexity_original as perplexity with:
    input:
        checkpoint=ancient("data/checkpoints/{model}_{bits}bits.{allocator}/{stage}"),
        checkpoint_manifest="data/checkpoints/{model}_{bits}bits.{allocator}/{stage}.manifest.json",
        calibration=ancient("data/calibration/{model}"),
        calibration_manifest="data/calibration/{model}.manifest.json",
    output:
        evaluation="data/evaluation/{model}_{bits}bits.{allocator}.{stage}.perplexity.json",
        manifest="data/evaluation/{model}_{bits}bits.{allocator}.{stage}.perplexity.json.manifest.json",
    log:
        "logs/perplexity/{model}_{bits}bits.{allocator}.{stage}.log",
    benchmark:
        "logs/perplexity/{model}_{bits}bits.{allocator}.{stage}.benchmark.jsonl"
    priority: 1
    threads: share("perplexity")
    resources:
        mem_mb=ask("perplexity", "mem_mb"),
        runtime=ask("perplexity", "runtime"),
        disk_mb=ask("perplexity", "disk_mb"),
        gpu=ask("perplexity", "gpu"),
    params:
        code=code("evaluation.perplexity", "checkpoint.huggingface"),
        lock=LOCK,
        experiment=experiment,
        seed=seed,
        settings=settings("perplexity"),
    message:
        "perplexity: {wildcards.model} at {wildcards.bits} bits ({wildcards.allocator}, {wildcards.stage})"
