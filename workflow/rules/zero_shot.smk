# Zero-shot accuracy, through lm-eval: of the original model, shared by all its plans, and of the quantized one. Each task
# is a job of its own, so that nodes and GPUs share them.


rule zero_shot_original:
    input:
        checkpoint=ancient("resources/models/{model}"),
        checkpoint_manifest="resources/models/{model}.manifest.json",
        calibration=ancient("data/calibration/{model}"),
        calibration_manifest="data/calibration/{model}.manifest.json",
        files=task_files,
    output:
        evaluation="data/evaluation/{model}.original.zero_shot.{task}.json",
        manifest="data/evaluation/{model}.original.zero_shot.{task}.json.manifest.json",
    log:
        "logs/zero_shot/{model}.original.{task}.log",
    benchmark:
        "logs/zero_shot/{model}.original.{task}.benchmark.jsonl"
    conda:
        "../envs/windquant.yaml"
    threads: share("zero_shot_original")
    resources:
        mem_mb=ask("zero_shot_original", "mem_mb"),
        runtime=ask("zero_shot_original", "runtime"),
        disk_mb=ask("zero_shot_original", "disk_mb"),
        gpu=ask("zero_shot_original", "gpu"),
    params:
        code=code("evaluation.zero_shot"),
        lock=LOCK,
        experiment=experiment,
        content=content(task_files),
        seed=seed,
        settings=settings("zero_shot"),
    message:
        "zero_shot: {wildcards.task}, original {wildcards.model}"
    shell:
        "python -m windquant.evaluation.zero_shot --checkpoint {input.checkpoint}"
        " --calibration {input.calibration}"
        " --output {output.evaluation} --experiment {params.experiment} --seed {params.seed} --threads {threads}"
        " {params.settings} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"


use rule zero_shot_original as zero_shot with:
    input:
        checkpoint=ancient("data/checkpoints/{model}_{bits}bits.{allocator}/{stage}"),
        checkpoint_manifest="data/checkpoints/{model}_{bits}bits.{allocator}/{stage}.manifest.json",
        calibration=ancient("data/calibration/{model}"),
        calibration_manifest="data/calibration/{model}.manifest.json",
        files=task_files,
    output:
        evaluation="data/evaluation/{model}_{bits}bits.{allocator}.{stage}.zero_shot.{task}.json",
        manifest="data/evaluation/{model}_{bits}bits.{allocator}.{stage}.zero_shot.{task}.json.manifest.json",
    log:
        "logs/zero_shot/{model}_{bits}bits.{allocator}.{stage}.{task}.log",
    benchmark:
        "logs/zero_shot/{model}_{bits}bits.{allocator}.{stage}.{task}.benchmark.jsonl"
    threads: share("zero_shot")
    resources:
        mem_mb=ask("zero_shot", "mem_mb"),
        runtime=ask("zero_shot", "runtime"),
        disk_mb=ask("zero_shot", "disk_mb"),
        gpu=ask("zero_shot", "gpu"),
    params:
        code=code("evaluation.zero_shot", "checkpoint.huggingface"),
        lock=LOCK,
        experiment=experiment,
        content=content(task_files),
        seed=seed,
        settings=settings("zero_shot"),
    message:
        "zero_shot: {wildcards.task}, {wildcards.model} at {wildcards.bits} bits ({wildcards.allocator}, {wildcards.stage})"
