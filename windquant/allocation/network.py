"""The policy's network: a softened Lagrangian plan, and what is learned on top of it.

    logits_a = -SHARPNESS (exp(m + log x_a) + y_a) + b_a

x_a is action a's predicted error and y_a its cost, both in bits at the current price: with m = b = 0 this is the
Lagrangian plan, softened. A small network that starts at zero learns from the unit's features m, the logarithm of the
factor by which the bank misjudges the unit, and b, what it misjudges about single actions. Without a warm start the
Lagrangian part is left out, and b has to learn everything.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from windquant.allocation.walk import Layout, Walk

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

    def __init__(self, hidden: int, layout: Layout, warm: bool = True) -> None:
        super().__init__()
        self.hidden, self.layout, self.warm = hidden, layout, warm
        self.head = nn.Linear(hidden + layout.unit, 1 + layout.actions)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, latent: Tensor) -> Tensor:
        learned = GAIN * self.head(latent[:, : self.hidden + self.layout.unit])
        if not self.warm:
            return learned[:, 1:]
        observation = latent[:, self.hidden :]
        errors = torch.exp(observation[:, self.layout.errors] + learned[:, :1])
        return learned[:, 1:] - SHARPNESS * (errors + observation[:, self.layout.costs])


class Actor(nn.Module):
    """Observation [N, layout.size] -> logits [N, A]; its tensors have the names that they have in the policy."""

    def __init__(self, layout: Layout, hidden: int, warm: bool) -> None:
        super().__init__()
        self.mlp_extractor = Extractor(layout.size, hidden)
        self.action_net = CorrectedLagrangian(hidden, layout, warm)

    def forward(self, observation: Tensor) -> Tensor:
        logits: Tensor = self.action_net(self.mlp_extractor.forward_actor(observation))
        return logits


def actor(tensors: Mapping[str, Tensor], layout: Layout, hidden: int, warm: bool) -> Actor:
    """The actor of a policy's tensors, without the critic's. Raises KeyError or RuntimeError if they do not fit."""
    network = Actor(layout, hidden, warm)
    network.load_state_dict({name: tensors[name] for name in network.state_dict()})
    return network


def deterministic(network: Actor, walk: Walk) -> NDArray[np.int64]:
    """The plans [E, U] of the best actions that the mask allows, for a walk that has begun."""
    over = False
    while not over:
        with torch.no_grad():
            logits = network(torch.as_tensor(walk.observe())).numpy()
        _, over = walk.step(np.where(walk.mask(), logits, -np.inf).argmax(axis=1))
    return walk.choice
