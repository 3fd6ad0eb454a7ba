"""The learning curve of a search: one point per update of the policy."""

from collections.abc import Callable
from typing import Any

from stable_baselines3.common.logger import KVWriter

Report = Callable[[dict[str, float], int], None]

#: What stable-baselines3 logs, and what it is called here.
CURVE = {
    "target": "target",  # bits: the curriculum's
    "reward": "reward",  # mean per decision, in bits of an average unit: 0 is the best under the hypothesis
    "train/entropy_loss": "negative_entropy",
    "train/policy_gradient_loss": "policy_loss",
    "train/value_loss": "value_loss",
    "train/explained_variance": "explained_variance",
    "train/approx_kl": "approx_kl",
}


class CurveWriter(KVWriter):
    """Takes the learning curve from stable-baselines3's logger."""

    def __init__(self, curve: list[dict[str, float]], report: Report) -> None:
        self.curve, self.report = curve, report

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        values = {name: round(float(key_values[key]), 6) for key, name in CURVE.items() if key in key_values}
        self.curve.append(values)
        self.report(values, step)

    def close(self) -> None:
        pass
