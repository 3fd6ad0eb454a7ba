# What a change of the settings does to a result: a table per ablation of the configuration.


rule ablation:
    input:
        results=all_changes,
    output:
        table=report(
            "results/{model}_{bits}bits.ablation.{ablation}.csv",
            category="Ablations",
            labels={"model": "{model}", "bits": "{bits}", "ablation": "{ablation}"},
            caption="../report/ablation.rst",
        ),
        manifest="results/{model}_{bits}bits.ablation.{ablation}.csv.manifest.json",
    log:
        "logs/ablation/{model}_{bits}bits.{ablation}.log",
    benchmark:
        "logs/ablation/{model}_{bits}bits.{ablation}.benchmark.jsonl"
    localrule: True
    conda:
        "../envs/windquant.yaml"
    params:
        code=code("comparison"),
        lock=LOCK,
    message:
        "ablation: {wildcards.ablation} of {wildcards.model} at {wildcards.bits} bits"
    shell:
        "python -m windquant.comparison --results {input.results} --output {output.table}"
        " --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
