"""PPO: one policy for every budget, which learns where the bank's loss model is wrong, from few measured plans.

A measurement of a plan's real loss costs seconds and is one number for thousands of decisions. So it does not pay them
directly: it refits the *loss model* (`loss_model.py`: a few multipliers of the predicted errors), and the model's
corrected errors pay every decision (`walk.py`). What is learned about an error holds at every budget, so every episode
draws a target of its own, and the policy sees it. The search goes round in a loop:

    1. Episodes walk through all units; the policy starts as the Lagrangian plan of whatever target (`policy.py`).
    2. A few of them, made under hypotheses drawn from the loss model's posterior (Thompson sampling), are measured:
       plans that differ in what is still unknown, none of them far from the best.
    3. The loss model is refitted; PPO trains on the rewards in its errors.

The Lagrangian plans of a few targets are measured first, and the policy's own plans of the same targets last: these
pairs say whether anything was learned.

The search's state is written after every update: a killed search goes on and ends with the same policy.
"""

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from stable_baselines3.common.logger import Logger

from windquant import compute
from windquant.allocation import checkpoint, features, lagrangian
from windquant.allocation.budget import Choice, fill, highest, limit
from windquant.allocation.curve import CurveWriter, Report
from windquant.allocation.environment import AllocationVecEnv
from windquant.allocation.learned import Learned
from windquant.allocation.loss_model import LossModel
from windquant.allocation.network import actor, deterministic
from windquant.allocation.policy import AllocationPolicy
from windquant.allocation.settings import SearchSettings
from windquant.allocation.trials import Measure, Trial, Trials, identity
from windquant.allocation.walk import Brief, Walk
from windquant.bank import Bank

UPDATES = 8  # of the policy per walk through all units
MINIBATCHES = 4  # per epoch
GAE_LAMBDA = 0.5  # the shaped rewards are local: far rewards would add noise only
TRAINING_SHARE = 2 / 3  # of the evaluations behind the first ones; the rest measures what the trained policy makes
ANCHORS = 3  # targets whose Lagrangian plans are measured first, where a range is asked for
FEW = 9  # evaluations below which one target has to do


def search(
    bank: Bank,
    seed: int,
    settings: SearchSettings,
    measure: Measure,
    cache: Path | None = None,
    report: Report | None = None,
    start: Learned | None = None,
) -> Learned:
    """Train a policy for all targets of `settings.targets` that the bank allows.

    `measure(choice [U])` is the loss gap in nats per token of a materialized plan; it is called at most
    `settings.evaluations` times. `cache` is a folder for the state; `report(values, update)` gets the learning curve.
    `start` is a policy of another bank that fits this one: the search begins with what it has learned. Same seed, same
    policy.
    """
    with compute.threads(1) as original:  # fastest for a small network

        def measured(choice: Choice) -> float:
            with compute.threads(original):
                return measure(choice)

        return Search(bank, seed, settings, measured, cache, report, start).run()


class Search:
    """One search. Its methods follow the loop above."""

    def __init__(
        self,
        bank: Bank,
        seed: int,
        settings: SearchSettings,
        measure: Measure,
        cache: Path | None,
        report: Report | None,
        start: Learned | None = None,
    ) -> None:
        self.start = start
        self.bank, self.seed, self.settings = bank, seed, settings
        self.cache, self.report = cache, report or (lambda values, update: None)
        self.span = (max(settings.targets[0], bank.lowest_bits()), min(settings.targets[-1], highest(bank)))
        self.random = np.random.default_rng(seed)
        self.model = LossModel(bank, start.weights if start else None)
        self.curve: list[dict[str, float]] = []
        self.walks = max(1, -(-settings.episodes // settings.n_envs))
        self.walked = 0  # finished walks (of n_envs episodes each)
        self.learned = self.model.weights  # the loss model that the policy was trained for last
        self.stages = [target for target in settings.curriculum if self.span[0] < target < highest(bank)]
        self.anchors = anchors(self.span, settings.evaluations)
        rest = max(0, settings.evaluations - len(self.anchors))
        rounds = max(1, round((1 - TRAINING_SHARE) * rest / len(self.anchors)))
        self.schedule = spread(max(0, rest - rounds * len(self.anchors)), self.walks)
        self.key = identity(bank, seed, settings) + (start.bank if start else "")
        record = cache / "measured.txt" if cache else None
        self.trials = Trials(self.model, measure, settings.evaluations, record, self.key)
        self.checks: dict[float, float] = {}  # measured losses of the policy's plans, by target

    def run(self) -> Learned:
        low = self.span[0]
        if low > self.settings.targets[-1]:
            return self.conclude({}, f"the lowest possible target of this bank is {low:g}")
        if low >= highest(self.bank):
            return self.conclude({}, "the budget takes the best of everything")
        env = AllocationVecEnv(Walk(self.bank, self.model), self.settings.n_envs, self.brief, self.finish)
        ppo = self.trainer(env)
        if not self.resume(ppo, env):
            for target in self.anchors[: self.settings.evaluations]:
                self.trials.run(lagrangian.allocate(self.bank, target), target, "lagrangian")
        steps = self.walks * len(self.bank.linear)
        for update in range(len(self.curve), -(-steps // ppo.n_steps)):
            self.save(ppo, env)
            ppo.logger.record("target", self.stage()[0])
            ppo.learn(1, reset_num_timesteps=False, log_interval=10**9)  # one rollout and its update
            ppo.logger.record("reward", float(ppo.rollout_buffer.rewards.mean()))
            ppo.logger.dump(update)
        self.check(ppo)
        return self.conclude(ppo.policy.state_dict())

    # 1. episodes

    def trainer(self, env: AllocationVecEnv) -> MaskablePPO:
        steps = -(-len(self.bank.linear) // UPDATES)
        samples = steps * env.num_envs
        batch = -(-samples // MINIBATCHES)
        kwargs = {"layout": env.walk.layout, "hidden": self.settings.hidden, "warm": self.settings.warm_start}
        ppo = MaskablePPO(
            AllocationPolicy,
            env,
            n_steps=steps,
            batch_size=batch,
            normalize_advantage=batch > 1 and samples % batch != 1,  # one sample has no deviation to divide by
            n_epochs=self.settings.epochs,
            learning_rate=self.settings.learning_rate,
            gamma=1.0,
            gae_lambda=GAE_LAMBDA,
            policy_kwargs=kwargs,
            device="cpu",
            seed=self.seed,
        )
        ppo.set_logger(Logger(None, [CurveWriter(self.curve, self.report)]))
        if self.start and self.start.tensors:
            ppo.policy.load_state_dict(self.start.tensors)
        return ppo

    def brief(self) -> Brief:
        """What the next walk is about: a target and a hypothesis per episode.

        The first episodes will be measured: their targets are of the whole range, those of the others of the
        curriculum's part of it. Every second one of the others follows the most probable loss model, which the policy
        has to learn; the rest is told how its hypothesis differs from that.
        """
        count = self.settings.n_envs
        measured = self.measurements()
        targets = np.concatenate([self.draw(measured, *self.span), self.draw(count - measured, *self.stage())])
        if self.walked < self.walks:
            self.learned = self.model.weights
        samples = np.stack([self.model.sample(self.random) for _ in range(count)])
        told = (np.arange(count) < measured) | (np.arange(count) % 2 == 1)
        offset = np.where(told[:, None], samples - self.learned, 0.0)
        return Brief(targets, self.learned + offset, offset)

    def draw(self, count: int, low: float, high: float) -> NDArray[np.float64]:
        """[count] targets from `low` to `high`, evenly spread on a logarithmic scale: most is lost at small budgets."""
        share = (self.random.permutation(count) + self.random.random(count)) / max(1, count)
        return low * (high / low) ** share

    def stage(self) -> tuple[float, float]:
        """The curriculum's lowest and highest target for this walk."""
        place = self.walked * (len(self.stages) + 2) // self.walks  # the whole range gets two shares
        floor = self.stages[place] if place < len(self.stages) else self.span[0]
        return floor, max(floor, self.span[1])

    def measurements(self) -> int:
        """How many episodes of this walk are measured."""
        planned = self.schedule[self.walked] if self.walked < self.walks else 0
        return min(planned, self.settings.n_envs, self.trials.left)

    # 2. measurements

    def finish(self, brief: Brief, choice: NDArray[np.int64]) -> NDArray[np.float64]:
        """Measure the first episodes of the finished walk [E, U], and pay them what their decisions were not yet paid.

        The decisions were paid in the loss model's errors, so that is what the model did not foresee, [E] nats.
        """
        reward = np.zeros(len(choice))
        for episode, plan in enumerate(choice[: self.measurements()]):
            target = float(brief.targets[episode])
            trial = self.trials.run(fill(self.bank, plan, limit(self.bank, target)), target, "sampled")
            reward[episode] = trial.corrected - min(trial.loss, 2 * trial.corrected)
        self.walked += 1
        return reward

    def check(self, ppo: MaskablePPO) -> None:
        """Spend the evaluations that are left on the trained policy's plans of the targets that were measured first.

        Round after round: what one teaches, the policy is told in the next.
        """
        walk = Walk(self.bank, self.model)
        network = actor(ppo.policy.state_dict(), walk.layout, self.settings.hidden, self.settings.warm_start)
        before = -1
        while self.trials.left > 0 and len(self.trials.done) > before:
            before = len(self.trials.done)
            weights = np.stack([self.model.weights] * len(self.anchors))
            walk.begin(Brief(np.array(self.anchors), weights, weights - self.learned))
            for target, plan in zip(self.anchors, deterministic(network, walk), strict=True):
                choice = fill(self.bank, plan, limit(self.bank, target))
                if self.trials.left > 0 or self.trials.known(choice):
                    self.checks[target] = self.trials.run(choice, target, "deterministic").loss

    # 3. state, result

    def save(self, ppo: MaskablePPO, env: AllocationVecEnv) -> None:
        """Write everything that the next update depends on."""
        if self.cache is None or ppo._last_obs is None:
            return
        done, units = self.trials.done, len(self.bank.linear)
        numbers, state = checkpoint.random_state()
        groups = {
            "policy": ppo.policy.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(ppo.policy.optimizer),
            "environment": env.state(),
            "trial": {
                "choice": np.array([trial.choice for trial in done], np.int64).reshape(len(done), units),
                "value": np.array([[t.target, t.loss, t.predicted, t.corrected] for t in done]).reshape(-1, 4),
            },
            "random": numbers,
            "search": {"learned": self.learned},
        }
        tensors = {f"{group}/{key}": value for group, entries in groups.items() for key, value in entries.items()}
        document = {
            "key": self.key,
            "curve": self.curve,
            "walked": self.walked,
            "sources": [trial.source for trial in done],
            "timesteps": ppo.num_timesteps,
            "updates": ppo._n_updates,
            "random": self.random.bit_generator.state,
            "global_random": state,
        }
        checkpoint.save(self.cache / "search.safetensors", tensors, document)

    def resume(self, ppo: MaskablePPO, env: AllocationVecEnv) -> bool:
        """Go on from the last `save`, if there is one of this very search."""
        found = checkpoint.load(self.cache / "search.safetensors", self.key) if self.cache else None
        if found is None:
            return False
        tensors, document = found
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = value
        ppo.policy.load_state_dict(groups["policy"])
        checkpoint.restore_optimizer(ppo.policy.optimizer, groups.get("optimizer", {}))
        values = groups["trial"]["value"].tolist()
        trials = zip(groups["trial"]["choice"].numpy(), values, document["sources"], strict=True)
        for choice, (target, loss, predicted, corrected), source in trials:
            self.trials.add(Trial(choice, target, loss, source, predicted, corrected))
        self.curve[:] = document["curve"]
        self.walked = document["walked"]
        self.learned = groups["search"]["learned"].numpy()
        ppo._last_obs = env.restore({name: value.numpy() for name, value in groups["environment"].items()})
        ppo._last_episode_starts = np.full(env.num_envs, env.walk.unit == 0)
        ppo.num_timesteps, ppo._n_updates = document["timesteps"], document["updates"]
        self.random.bit_generator.state = document["random"]
        checkpoint.restore_random_state(groups["random"], document["global_random"])
        return True

    def conclude(self, policy: dict[str, torch.Tensor], reason: str = "") -> Learned:
        """The policy, and what the search saw."""
        split = len(self.model.names)
        weights = self.model.weights
        checks = []
        for target, loss in self.checks.items():
            first = self.trials.known(lagrangian.allocate(self.bank, target))  # two targets may have the same plan
            checks.append({"target": target, "lagrangian": first.loss if first else math.inf, "policy": loss})
        document = {
            "evaluations": len(self.trials.done),
            "episodes": self.walked * self.settings.n_envs,
            "checks": checks,
            "pairs": [
                [t.source, *(round(v, 6) for v in (t.predicted, t.corrected, t.loss, t.target))]
                for t in self.trials.done
            ],
            "corrections": {n: round(float(w), 4) for n, w in zip(self.model.names, weights, strict=False)},
            "action_factors": dict(zip(self.bank.actions, np.exp(weights[split:]).round(4).tolist(), strict=True)),
            "curve": self.curve,
        }
        names, _ = features.unit_features(self.bank)
        return Learned(
            bank=self.bank.sha256,
            per=self.settings.per,
            targets=self.span,
            actions=self.bank.actions,
            features=names,
            directions=self.model.names,
            hidden=self.settings.hidden,
            warm=self.settings.warm_start,
            reason=reason,
            search=document,
            weights=weights,
            told=weights - self.learned,
            tensors=policy,
        )


def anchors(span: tuple[float, float], evaluations: int) -> list[float]:
    """The targets whose Lagrangian plans are measured: the ends of the range and its middle, if there are enough."""
    low, high = span
    if low == high or evaluations < FEW:
        return [(low * high) ** 0.5 if low < high else low]
    return np.geomspace(low, high, ANCHORS).tolist()


def spread(total: int, places: int) -> list[int]:
    """`total` measurements over the walks, more of them early: what is known early is learned."""
    share = np.cumsum(np.arange(places, 0, -1))
    return np.diff(np.round(total * share / share[-1]).astype(int), prepend=0).tolist()
