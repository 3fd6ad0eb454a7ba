# The parent MLflow run of an experiment, made before anything runs in parallel: the first use of a store by several
# processes at once would break it. Steps that all plans of a model share log to the model's own experiment. There are
# no `params` here on purpose: the file is made once and never again, so it never makes other steps run.


rule experiment_of_model:
    output:
        experiment="data/experiments/{model}.json",
        manifest="data/experiments/{model}.json.manifest.json",
    log:
        "logs/experiment/{model}.log",
    benchmark:
        "logs/experiment/{model}.benchmark.jsonl"
    localrule: True
    conda:
        "../envs/windquant.yaml"
    message:
        "experiment: MLflow run for {wildcards.model}"
    shell:
        "python -m windquant.tracking --model {wildcards.model} --output {output.experiment} 2>&1 | tee {log}"


rule experiment_of_plan:
    output:
        experiment="data/experiments/{model}_{bits}bits.{allocator}.json",
        manifest="data/experiments/{model}_{bits}bits.{allocator}.json.manifest.json",
    log:
        "logs/experiment/{model}_{bits}bits.{allocator}.log",
    benchmark:
        "logs/experiment/{model}_{bits}bits.{allocator}.benchmark.jsonl"
    localrule: True
    conda:
        "../envs/windquant.yaml"
    message:
        "experiment: MLflow run for {wildcards.model} at {wildcards.bits} bits ({wildcards.allocator})"
    shell:
        "python -m windquant.tracking --model {wildcards.model} --bits {wildcards.bits}"
        " --allocator {wildcards.allocator} --output {output.experiment} 2>&1 | tee {log}"
