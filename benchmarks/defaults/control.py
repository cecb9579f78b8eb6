"""PPO on CartPole by stable-baselines3, whose own loop trains."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.loop import finish

MOST = 500.0  # the return of an episode that never fails
DRAWS = 16


@dataclasses.dataclass(frozen=True)
class Control:
    """A policy and its value, trained on what it has just done.

    Attributes:
        num_data: steps between two updates of the policy, the data of each.
        batch, epochs: of an update.
        steps: in the environment.
    """

    num_data: int = 1_024
    batch: int = 64
    epochs: int = 10
    steps: int = 40_960

    @property
    def num_terms(self) -> int:
        """Of the loss over the data of one update."""
        return self.num_data

    def run(self, method: Any, lr: float, seed: int) -> dict[str, float]:
        """Train, and let the policy's mean play; the loss is the best return there is over the mean return.

        "beyond the clip" is the share of the last actions whose probability a draw alone moves farther than PPO takes
        gradients of. The loss is infinite of an optimizer that draws in contexts of its own, for which a library's loop
        has no place.
        """
        import gymnasium
        from stable_baselines3 import PPO
        from stable_baselines3.common.evaluation import evaluate_policy
        from stable_baselines3.common.logger import Logger
        from stable_baselines3.common.monitor import Monitor

        def optimizer_of(parameters: Any, lr: float, **_: Any) -> Any:
            return method.make(list(parameters), lr, self)

        began = time.perf_counter()
        ppo = PPO(
            "MlpPolicy",
            gymnasium.make("CartPole-v1"),
            learning_rate=lambda left: lr * left,
            n_steps=self.num_data,
            batch_size=self.batch,
            n_epochs=self.epochs,
            policy_kwargs={"optimizer_class": optimizer_of, "optimizer_kwargs": {}},
            seed=seed,
            device="cpu",
        )
        if ppo.policy.optimizer.__module__.startswith("ivon"):
            return {"loss": math.inf}
        ppo.set_logger(Logger(folder=None, output_formats=[]))  # its own leaves a folder behind
        ppo.learn(self.steps)
        optimizer = ppo.policy.optimizer
        mean, _ = evaluate_policy(ppo, Monitor(gymnasium.make("CartPole-v1")), n_eval_episodes=50)
        clipped = {"beyond the clip": _moved_by_draws(ppo)} if hasattr(optimizer, "sampled_params") else {}
        finish(optimizer)
        return {"loss": MOST / float(mean), "return": float(mean), "seconds": time.perf_counter() - began, **clipped}


@torch.no_grad()
def _moved_by_draws(ppo: Any) -> float:
    """Share of the last actions, over some draws, whose probability leaves the clip around that of the mean."""
    policy, last = ppo.policy, ppo.rollout_buffer
    seen, done = torch.from_numpy(last.observations), torch.from_numpy(last.actions).flatten()

    def log_probability() -> Tensor:
        return policy.get_distribution(seen).log_prob(done)

    mean, ratios = log_probability(), []
    for _ in range(DRAWS):
        with policy.optimizer.sampled_params():
            ratios.append((log_probability() - mean).exp())
    return float(((torch.stack(ratios) - 1).abs() > ppo.clip_range(1.0)).double().mean())
