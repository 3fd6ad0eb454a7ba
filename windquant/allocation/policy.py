"""The policy as stable-baselines3 trains it: the network's actor and critic (`network.py`), and one optimizer."""

from typing import Any

from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from torch import nn

from windquant.allocation.network import CorrectedLagrangian, Extractor
from windquant.allocation.walk import Layout


class AllocationPolicy(MaskableActorCriticPolicy):
    """MaskablePPO's actor and critic with the parts of network.py."""

    def __init__(self, *args: Any, layout: Layout, hidden: int = 64, warm: bool = True, **kwargs: Any) -> None:
        self.layout, self.hidden, self.warm = layout, hidden, warm
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Extractor(self.features_dim, self.hidden)  # type: ignore[assignment]  # duck-typed

    def _build(self, lr_schedule: Any) -> None:
        self._build_mlp_extractor()
        self.value_net = nn.Linear(self.hidden, 1)
        self.action_net = CorrectedLagrangian(self.hidden, self.layout, self.warm)
        for module, gain in ((self.mlp_extractor, 2**0.5), (self.value_net, 1.0)):
            for part in module.modules():
                self.init_weights(part, gain)
        options = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(self.parameters(), **options)
