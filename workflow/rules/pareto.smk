# Quality against size: the results at a list of budgets, whose plans come from one search, as a table and a picture.


rule pareto:
    input:
        results=all_budgets,
    output:
        table=report(
            "results/{model}.pareto.csv",
            category="Comparisons",
            labels={"model": "{model}", "bits": "all"},
            caption="../report/pareto.rst",
        ),
        manifest="results/{model}.pareto.csv.manifest.json",
    log:
        "logs/pareto/{model}.log",
    benchmark:
        "logs/pareto/{model}.benchmark.jsonl"
    localrule: True
    conda:
        "../envs/windquant.yaml"
    params:
        code=code("comparison"),
        lock=LOCK,
    message:
        "pareto: all budgets of {wildcards.model}"
    shell:
        "python -m windquant.comparison --results {input.results} --output {output.table}"
        " --code={params.code} --lock={params.lock} 2>&1 | tee {log}"


rule pareto_picture:
    input:
        results=all_budgets,
    output:
        picture=report(
            "results/{model}.pareto.svg",
            category="Pictures",
            labels={"model": "{model}", "bits": "all", "allocator": "ppo"},
            caption="../report/pareto.rst",
        ),
        manifest="results/{model}.pareto.svg.manifest.json",
    log:
        "logs/pareto_picture/{model}.log",
    benchmark:
        "logs/pareto_picture/{model}.benchmark.jsonl"
    localrule: True
    conda:
        "../envs/windquant.yaml"
    params:
        code=code("report.pareto_picture"),
        lock=LOCK,
    message:
        "pareto_picture: all budgets of {wildcards.model}"
    shell:
        "python -m windquant.report.pareto_picture --results {input.results} --output {output.picture}"
        " --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
