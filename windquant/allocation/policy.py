"""The policy network: a softened Lagrangian plan, and what is learned on top of it.

    logits_a = -SHARPNESS (exp(m + log x_a) + y_a) + b_a

x_a is action a's predicted error and y_a its cost, both in bits at the current price: with m = b = 0 this is the
Lagrangian plan, softened. A small network that starts at zero learns from the unit's features m, the logarithm of the
factor by which the bank misjudges the unit, and b, what it misjudges about single actions.
"""

from typing import Any

import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from torch import Tensor, nn

from windquant.allocation.walk import Layout

SHARPNESS = 12.0  # logits per bit of reduced cost: sampled plans are a few percent worse than the best actions
GAIN = 5.0  # of the learned outputs: they move by tenths, the network's weights by hundredths


class Extractor(nn.Module):
    """Two small networks on the observation; the actor's also hands the observation on."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = hidden + size, hidden
        self.actor, self.critic = (
            nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()) for _ in range(2)
        )

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(observation), self.forward_critic(observation)

    def forward_actor(self, observation: Tensor) -> Tensor:
        return torch.cat([self.actor(observation / 4), observation], dim=1)

    def forward_critic(self, observation: Tensor) -> Tensor:
        return self.critic(observation / 4)


class CorrectedLagrangian(nn.Module):
    """[N, hidden + observation] -> logits [N, A].

    What is learned is a linear function of the network's output and, directly, of the unit's own features, which come
    first in the observation: most of what there is to learn is one number per kind of linear or direction.
    """

    def __init__(self, hidden: int, layout: Layout) -> None:
        super().__init__()
        self.hidden, self.layout = hidden, layout
        self.head = nn.Linear(hidden + layout.unit, 1 + layout.actions)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, latent: Tensor) -> Tensor:
        learned = GAIN * self.head(latent[:, : self.hidden + self.layout.unit])
        observation = latent[:, self.hidden :]
        errors = torch.exp(observation[:, self.layout.errors] + learned[:, :1])
        return learned[:, 1:] - SHARPNESS * (errors + observation[:, self.layout.costs])


class AllocationPolicy(MaskableActorCriticPolicy):
    """MaskablePPO's actor and critic with the parts above."""

    def __init__(self, *args: Any, layout: Layout, hidden: int = 64, **kwargs: Any) -> None:
        self.layout, self.hidden = layout, hidden
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Extractor(self.features_dim, self.hidden)  # type: ignore[assignment]  # duck-typed

    def _build(self, lr_schedule: Any) -> None:
        self._build_mlp_extractor()
        self.value_net = nn.Linear(self.hidden, 1)
        self.action_net = CorrectedLagrangian(self.hidden, self.layout)
        for module, gain in ((self.mlp_extractor, 2**0.5), (self.value_net, 1.0)):
            for part in module.modules():
                self.init_weights(part, gain)
        options = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(self.parameters(), **options)
