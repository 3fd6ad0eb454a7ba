"""PPO: a policy that learns where the bank's loss model is wrong, from few measured plans.

A measurement of a plan's real loss costs seconds and is one number for thousands of decisions. So it does not pay them
directly: it refits the *loss model* (`loss_model.py`: a few multipliers of the predicted errors), and the model's
corrected errors pay every decision (`walk.py`). The search goes round in a loop:

    1. Episodes walk through all units; the policy starts as the Lagrangian plan (`policy.py`).
    2. A few of them, made under hypotheses drawn from the loss model's posterior (Thompson sampling), are measured:
       plans that differ in what is still unknown, none of them far from the best.
    3. The loss model is refitted; PPO trains on the rewards in its errors.

At the end the deterministic policy proposes plans in the same way for the evaluations that are left. The best
*measured* plan wins; the Lagrangian plan is always the first that is measured, so nothing worse comes out, as far as
the reward split can tell.

The search's state is written after every update: a killed search goes on and ends with the same plan.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.logger import Logger

from windquant.allocation import checkpoint, lagrangian
from windquant.allocation.budget import Choice, fill, limit, prices, take
from windquant.allocation.curve import CurveWriter, Report
from windquant.allocation.environment import AllocationVecEnv
from windquant.allocation.loss_model import LossModel
from windquant.allocation.policy import AllocationPolicy
from windquant.allocation.settings import SearchSettings
from windquant.allocation.trials import Measure, Trial, Trials
from windquant.allocation.walk import Brief, Walk
from windquant.bank import Bank

UPDATES = 8  # of the policy per walk through all units
MINIBATCHES = 4  # per epoch
GAE_LAMBDA = 0.5  # the shaped rewards are local: far rewards would add noise only
TRAINING_SHARE = 2 / 3  # of the evaluations; the rest measures what the trained policy proposes
ROUND = 3  # proposals that are measured before the loss model is refitted


@dataclass(frozen=True)
class Found:
    """The plan that a search ends with."""

    choice: Choice
    fallback: bool  # the learned plans could not be used
    search: dict[str, Any]  # for the plan's file


def search(
    bank: Bank,
    target_bits: float,
    seed: int,
    settings: SearchSettings,
    measure: Measure,
    cache: Path | None = None,
    report: Report | None = None,
) -> Found:
    """Train a policy for one target and return the best measured plan.

    `measure(choice [U])` is the loss gap in nats per token of a materialized plan; it is called at most
    `settings.evaluations` times. `cache` is a folder for the state; `report(values, update)` gets the learning curve.
    Raises WindquantError if the target cannot be met. Same seed, same plan.
    """
    with threads(1) as original:

        def measured(choice: Choice) -> float:
            with threads(original):
                return measure(choice)

        return Search(bank, target_bits, seed, settings, measured, cache, report).run()


class Search:
    """One search. Its methods follow the loop above."""

    def __init__(
        self,
        bank: Bank,
        target_bits: float,
        seed: int,
        settings: SearchSettings,
        measure: Measure,
        cache: Path | None,
        report: Report | None,
    ) -> None:
        self.bank, self.target, self.seed, self.settings = bank, target_bits, seed, settings
        self.cache, self.report = cache, report or (lambda values, update: None)
        self.budget = limit(bank, target_bits)
        self.random = np.random.default_rng(seed)
        self.model = LossModel(bank)
        self.curve: list[dict[str, float]] = []
        self.walks = max(1, -(-settings.episodes // settings.n_envs))
        self.walked = 0  # finished walks (of n_envs episodes each)
        self.learned = self.model.weights  # the loss model that the policy was trained for last
        self.schedule = spread(round(TRAINING_SHARE * (settings.evaluations - 1)), self.walks)
        self.stages = [target for target in settings.curriculum if target > target_bits and not plenty(bank, target)]
        self.key = identity(bank, target_bits, seed, settings)
        record = cache / "measured.txt" if cache else None
        self.trials = Trials(self.model, measure, settings.evaluations, record, self.key)

    def run(self) -> Found:
        baseline = lagrangian.allocate(self.bank, self.target)
        if plenty(self.bank, self.target):
            return Found(baseline, False, {"chosen": "lagrangian", "reason": "the budget takes the best of everything"})
        if self.settings.evaluations < 2:
            return Found(baseline, False, {"chosen": "lagrangian", "reason": "nothing to learn without measurements"})
        env = AllocationVecEnv(Walk(self.bank, self.model), self.settings.n_envs, self.brief, self.finish)
        ppo = self.trainer(env)
        if not self.resume(ppo, env):
            self.trials.run(baseline, "lagrangian")
        steps = self.walks * len(self.bank.linear)
        for update in range(len(self.curve), -(-steps // ppo.n_steps)):
            self.save(ppo, env)
            ppo.logger.record("target", self.stage())
            ppo.learn(1, reset_num_timesteps=False, log_interval=10**9)  # one rollout and its update
            ppo.logger.record("reward", float(ppo.rollout_buffer.rewards.mean()))
            ppo.logger.dump(update)
        self.propose(ppo.policy)
        return self.conclude()

    # 1. episodes

    def trainer(self, env: AllocationVecEnv) -> MaskablePPO:
        steps = -(-len(self.bank.linear) // UPDATES)
        ppo = MaskablePPO(
            AllocationPolicy,
            env,
            n_steps=steps,
            batch_size=-(-steps * env.num_envs // MINIBATCHES),
            n_epochs=self.settings.epochs,
            learning_rate=self.settings.learning_rate,
            gamma=1.0,
            gae_lambda=GAE_LAMBDA,
            policy_kwargs={"layout": env.walk.layout, "hidden": self.settings.hidden},
            device="cpu",
            seed=self.seed,
        )
        ppo.set_logger(Logger(None, [CurveWriter(self.curve, self.report)]))
        return ppo

    def brief(self) -> Brief:
        """What the next walk is about: its target, and one hypothesis per episode.

        The first episodes will be measured, so they are at the real target. Every second one of the others follows the
        most probable loss model, which the policy has to learn; the rest is told how its hypothesis differs from that.
        """
        count = self.settings.n_envs
        measured = self.measurements()
        targets = np.array([self.target] * measured + [self.stage()] * (count - measured))
        if self.walked < self.walks:
            self.learned = self.model.weights
        samples = np.stack([self.model.sample(self.random) for _ in range(count)])
        told = (np.arange(count) < measured) | (np.arange(count) % 2 == 1)
        offset = np.where(told[:, None], samples - self.learned, 0.0)
        return Brief(targets, self.learned + offset, offset)

    def stage(self) -> float:
        """The curriculum's target for this walk."""
        place = self.walked * (len(self.stages) + 2) // self.walks  # the real target gets two shares
        return self.stages[place] if place < len(self.stages) else self.target

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
            if trial := self.trials.run(fill(self.bank, plan, self.budget), "sampled"):
                reward[episode] = trial.corrected - min(trial.loss, 2 * trial.corrected)
        self.walked += 1
        return reward

    def propose(self, policy: MaskableActorCriticPolicy) -> None:
        """Spend the evaluations that are left on plans of the deterministic policy."""
        idle = 0
        walk = Walk(self.bank, self.model)
        while self.trials.left > 0 and idle < 3:
            samples = [self.model.sample(self.random) for _ in range(ROUND - 1)]
            weights = np.stack([self.model.weights, *samples])
            walk.begin(Brief(np.full(len(weights), self.target), weights, weights - self.learned))
            plans = deterministic(policy, walk)[: self.trials.left]
            new = [self.trials.run(fill(self.bank, plan, self.budget), "deterministic") for plan in plans]
            idle = 0 if any(new) else idle + 1

    # 3. state, result

    def save(self, ppo: MaskablePPO, env: AllocationVecEnv) -> None:
        """Write everything that the next update depends on."""
        if self.cache is None or ppo._last_obs is None:
            return
        done = self.trials.done
        numbers, state = checkpoint.random_state()
        groups = {
            "policy": ppo.policy.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(ppo.policy.optimizer),
            "environment": env.state(),
            "trial": {
                "choice": np.stack([trial.choice for trial in done]),
                "value": np.array([[trial.loss, trial.predicted, trial.corrected] for trial in done]),
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
        for choice, (loss, predicted, corrected), source in trials:
            self.trials.add(Trial(choice, loss, source, predicted, corrected))
        self.curve[:] = document["curve"]
        self.walked = document["walked"]
        self.learned = groups["search"]["learned"].numpy()
        ppo._last_obs = env.restore({name: value.numpy() for name, value in groups["environment"].items()})
        ppo._last_episode_starts = np.full(env.num_envs, env.walk.unit == 0)
        ppo.num_timesteps, ppo._n_updates = document["timesteps"], document["updates"]
        self.random.bit_generator.state = document["random"]
        checkpoint.restore_random_state(groups["random"], document["global_random"])
        return True

    def conclude(self) -> Found:
        """The best measured plan, and what the search saw."""
        first, *learned = self.trials.done
        best = min(learned, key=lambda trial: trial.loss, default=first)
        usable = np.isfinite(best.loss)
        chosen = best if best.loss < first.loss else first
        split = len(self.model.names)
        factors = np.exp(self.model.weights)
        document = {
            "chosen": chosen.source,
            "lagrangian_loss": first.loss,
            "loss": chosen.loss,
            "evaluations": len(self.trials.done),
            "episodes": self.walks * self.settings.n_envs,
            "pairs": [[t.source, *(round(v, 6) for v in (t.predicted, t.corrected, t.loss))] for t in self.trials.done],
            "corrections": {n: round(float(w), 4) for n, w in zip(self.model.names, self.model.weights, strict=False)},
            "action_factors": dict(zip(self.bank.actions, factors[split:].round(4).tolist(), strict=True)),
            "curve": self.curve,
        }
        if not usable:
            document["reason"] = "the loss of every learned plan is not finite"
        elif chosen is first:
            document["reason"] = "no learned plan measured better than the Lagrangian one"
        return Found(chosen.choice, not usable, document)


def deterministic(policy: MaskableActorCriticPolicy, walk: Walk) -> NDArray[np.int64]:
    """The plans [E, U] of the policy's best actions, for a walk that has begun."""
    over = False
    while not over:
        with torch.no_grad():
            observation = torch.as_tensor(walk.observe())
            action = policy.get_distribution(observation, walk.mask()).get_actions(deterministic=True)
        _, over = walk.step(action.numpy())
    return walk.choice


def plenty(bank: Bank, target_bits: float) -> bool:
    """Whether the target pays for every unit's best action."""
    errors = prices(bank)
    return bool((take(errors, lagrangian.allocate(bank, target_bits)) == errors.min(axis=1)).all())


def spread(total: int, places: int) -> list[int]:
    """`total` measurements over the walks, more of them early: what is known early is learned."""
    share = np.cumsum(np.arange(places, 0, -1))
    return np.diff(np.round(total * share / share[-1]).astype(int), prepend=0).tolist()


@contextmanager
def threads(count: int) -> Iterator[int]:
    """Run with `count` torch threads; gives the number from before. One is fastest for a small network."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def identity(bank: Bank, target_bits: float, seed: int, settings: SearchSettings) -> str:
    """What a search depends on, as a digest."""
    digest = hashlib.sha256(json.dumps([bank.model, bank.actions, target_bits, seed, asdict(settings)]).encode())
    for array in (bank.linear, bank.position, bank.width, bank.energy, bank.errors, bank.bytes):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
