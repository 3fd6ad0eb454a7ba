# All allocators at one budget, side by side, each with every seed.


rule comparison:
    input:
        results=all_allocators,
    output:
        comparison=report(
            "results/{model}_{bits}bits.comparison.csv",
            category="Comparisons",
            labels={"model": "{model}", "bits": "{bits}"},
            caption="../report/comparison.rst",
        ),
        manifest="results/{model}_{bits}bits.comparison.csv.manifest.json",
    log:
        "logs/comparison/{model}_{bits}bits.log",
    benchmark:
        "logs/comparison/{model}_{bits}bits.benchmark.jsonl"
    localrule: True
    conda:
        "../envs/windquant.yaml"
    params:
        code=code("comparison"),
        lock=LOCK,
    message:
        "comparison: allocators for {wildcards.model} at {wildcards.bits} bits"
    shell:
        "python -m windquant.comparison --results {input.results} --output {output.comparison}"
        " --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
