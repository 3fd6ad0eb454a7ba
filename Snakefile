# Quantize language models with one width per column chunk.
#
#     snakemake --cores all results/smollm2-135m_2.0bits.json
#
# config/config.yaml names the models; results/{model}_{bits}bits.{allocator}.json runs another allocator than PPO, and
# results/{model}_{bits}bits.{allocator}-{change}-{seed}.json a change of an ablation and another seed.

from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


# Before the rules: files in a bucket (--default-storage-prefix) know only the constraints that stand above them.
wildcard_constraints:
    model=r"[^/_]+",
    bits=r"-?\d+(\.\d+)?",
    allocator=r"[a-z]+(-[a-z][a-z0-9]*)?(-\d+)?",
    baseline=r"(\.[a-z]+(-[a-z][a-z0-9]*)?(-\d+)?)?",
    change=r"(_[a-z][a-z0-9]*)?",
    ablation=r"[a-z0-9]+",
    stage="before_recovery|quantized",
    task=r"((?!\.json)[^/])+",
    part=r"[1-9]\d*",


include: "workflow/rules/common.smk"
include: "workflow/rules/files.smk"


# One run at a time. What a killed or failed run has left, and what has been damaged since it was made, goes out of its way.
if workflow.is_main_process:
    from windquant import exclusive, integrity, provenance

    alone = not exclusive.looks(sys.argv[1:]) and one_line(exclusive.claim)()
    provenance.mend(alone)
    integrity.check(set_aside=alone)


include: "workflow/rules/model.smk"
include: "workflow/rules/calibration.smk"
include: "workflow/rules/statistics.smk"
include: "workflow/rules/bank.smk"
include: "workflow/rules/allocation.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/recovery.smk"
include: "workflow/rules/perplexity.smk"
include: "workflow/rules/zero_shot.smk"
include: "workflow/rules/result.smk"
include: "workflow/rules/comparison.smk"
include: "workflow/rules/pareto.smk"
include: "workflow/rules/ablation.smk"
include: "workflow/rules/report.smk"


localrules:
    default,


rule default:
    default_target: True
    input:
        DEFAULT,
