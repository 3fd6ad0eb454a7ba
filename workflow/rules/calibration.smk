# Text -> tokens of the calibration, reward, recovery and test splits, and the zero-shot tasks.


rule calibration:
    input:
        model=ancient("resources/models/{model}"),
        model_manifest="resources/models/{model}.manifest.json",
        files=text_files,
    output:
        folder=directory("data/calibration/{model}"),
        manifest="data/calibration/{model}.manifest.json",
    log:
        "logs/calibration/{model}.log",
    benchmark:
        "logs/calibration/{model}.benchmark.jsonl"
    conda:
        "../envs/windquant.yaml"
    threads: ALL_CORES
    resources:
        mem_mb=ask("calibration", "mem_mb"),
        runtime=ask("calibration", "runtime"),
        disk_mb=ask("calibration", "disk_mb"),
    params:
        code=code("calibration"),
        lock=LOCK,
        experiment=experiment,
        content=content(text_files),
        seed=seed,
        settings=settings("calibration"),
    message:
        "calibration: text and tasks for {wildcards.model}"
    shell:
        "python -m windquant.calibration --model {input.model}"
        " --output {output.folder} --experiment {params.experiment} --seed {params.seed} --threads {threads}"
        " {params.settings} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
