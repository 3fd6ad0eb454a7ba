"""What error feedback should add to a covariance's diagonal: judged on text that the covariance is not of.

    python -m benchmarks.damping                            # after `make run`; some minutes of two cores
    python -m benchmarks.damping --other data/calibration/smollm2-135m-web   # and by another calibration set's text

Every linear of a plan is quantized on the covariances of the original's inputs on the first calibration windows. Its
errors e are judged by the covariances H of these windows, of the following ones, and of other text:
1/2 sum_r f_r e_r^T H e_r, in nats per token, with the Fisher weights f. Unlike a model's perplexity this tells dampings
apart that differ by a tenth of a per cent.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir
from unittest.mock import patch

import torch
from torch import Tensor

from windquant import calibration, decoder, feedback, streaming
from windquant.flow import Flow
from windquant.plan import Plan
from windquant.quantize import layouts_of, quantized
from windquant.statistics import Covariance, Statistics, owners

OWN = feedback.damping
#: What is added to every channel's energy, of the energies [columns].
RULES: dict[str, Callable[[Tensor], float]] = {
    "1 % of the mean": lambda energy: 0.01 * energy.mean().item(),
    "10 % of the mean": lambda energy: 0.1 * energy.mean().item(),
    "windquant: 10 % of the median": OWN,
    "20 % of the median": lambda energy: 2 * OWN(energy),
}


@torch.no_grad()
def errors(root: Path, model: str, plan: Plan, others: list[Path], windows: int) -> dict[str, dict[str, float]]:
    """Nats per token by rule and text."""
    statistics = Statistics.load(root / "data" / "statistics" / f"{model}.safetensors")
    own = calibration.load(root / "data" / "calibration" / model).calibration
    texts = {"own windows": own[:windows], "following windows": own[windows : 2 * windows]}
    texts |= {str(folder): calibration.load(folder).calibration[:windows] for folder in others}
    original = streaming.load(root / "resources" / "models" / model)
    prefix, _ = decoder.decoder_layers(original)
    flows = {name: Flow(original, ids.long(), 16, Path(gettempdir())) for name, ids in texts.items()}
    layouts = layouts_of(plan, statistics.linears)
    result: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for index, layer in streaming.walk(original):
        matrices = {}
        for name, flow in flows.items():
            covariance = Covariance(owners(statistics.linears, index, prefix))
            with decoder.watch(layer, covariance.see):
                flow.through(layer, index)
            matrices[name] = covariance.means()
        here = [layout for layout in layouts.values() if layout.linear.layer == index]
        for rule, added in RULES.items():
            with patch.object(feedback, "damping", added):
                found = list(quantized(original, here, plan.units.order, statistics, matrices["own windows"]))
            for layout, (_, decoded) in zip(here, found, strict=True):
                linear = layout.linear
                error = original.get_parameter(f"{linear.name}.weight") - decoded
                for name, by_group in matrices.items():
                    lost = ((error @ by_group[linear.group]) * error).sum(1)
                    result[rule][name] += 0.5 * (statistics.fisher[linear.name] * lost).sum().item()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the project")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--plan", type=Path, help="of that model; default: the main job's")
    parser.add_argument("--other", type=Path, nargs="*", default=[], help="calibration sets of other text")
    parser.add_argument("--windows", type=int, default=128, help="of a calibration split")
    given = parser.parse_args()
    torch.set_num_threads(2)
    plan = Plan.load(given.plan or given.root / "data" / "plans" / f"{given.model}_2.0bits.ppo.json")
    found = errors(given.root, given.model, plan, given.other, given.windows)
    names = list(next(iter(found.values())))
    print(f"| added to the diagonal | {' | '.join(names)} |")
    print(f"|---{'|---' * len(names)}|")
    for rule, by_text in found.items():
        print(f"| {rule} | {' | '.join(f'{by_text[name]:.4f}' for name in names)} |")


if __name__ == "__main__":
    main()
