# What results look like: the plan of each as a picture, and one page of all of them.


rule plan_picture:
    input:
        plan=of_plan("data/plans/{model}_{bits}bits.{plan}.json"),
        bank=bank_of,
    output:
        picture=report(
            "results/{model}_{bits}bits{baseline}.plan.svg",
            category="Pictures",
            labels={"model": "{model}", "bits": "{bits}", "allocator": "{baseline}"},
            caption="../report/plan_picture.rst",
        ),
        manifest="results/{model}_{bits}bits{baseline}.plan.svg.manifest.json",
    log:
        "logs/plan_picture/{model}_{bits}bits{baseline}.log",
    benchmark:
        "logs/plan_picture/{model}_{bits}bits{baseline}.benchmark.jsonl"
    localrule: True
    conda:
        "../envs/windquant.yaml"
    params:
        code=code("report.plan_picture"),
        lock=LOCK,
    message:
        "plan_picture: {wildcards.model} at {wildcards.bits} bits"
    shell:
        "python -m windquant.report.plan_picture --plan {input.plan} --bank {input.bank} --output {output.picture}"
        " --code={params.code} --lock={params.lock} 2>&1 | tee {log}"


# The page shows every result that is in results/ when it is asked for, as it stands: these are `params`, by their
# digests, so that a report never makes them again. Only the default result is an input, where the configuration has its
# model and no other result takes its place; so a new clone makes it first.
rule report:
    input:
        results=something_to_report,
        peers=existing("benchmarks/peers/results.json"),
    output:
        page=report("results/report.html", category="Report", caption="../report/report.rst"),
        manifest="results/report.html.manifest.json",
    log:
        "logs/report/report.log",
    benchmark:
        "logs/report/report.benchmark.jsonl"
    localrule: True
    conda:
        "../envs/windquant.yaml"
    params:
        code=code("report"),
        lock=LOCK,
        others=other_results(),
        digests=result_digests(),
        peers=lambda wildcards, input: f"--peers {input.peers}" if input.peers else "",
    message:
        "report: {input.results} {params.others}"
    shell:
        "python -m windquant.report --results {input.results} {params.others} {params.peers} --output {output.page}"
        " --code={params.code} --lock={params.lock} 2>&1 | tee {log}"
