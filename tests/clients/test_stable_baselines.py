"""stable-baselines3 makes the optimizer within the policy, of which it calls the parts one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vlearn
from tests.clients.problem import EXTRA, self_influence
from tests.optim.table import equal, states, weights
from tests.oracles.per_example import relative_error

pytest.importorskip("stable_baselines3", reason=EXTRA)
import gymnasium  # noqa: E402
from stable_baselines3 import A2C, DQN, PPO  # noqa: E402


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `learn` leaves a folder for its log."""
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path))


class Signs(gymnasium.Env):
    """One number is shown beside three that do not matter; naming its sign earns 1, and an episode is one step."""

    observation_space = gymnasium.spaces.Box(-5, 5, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._show(), {}

    def step(self, action: Any) -> Any:
        reward = float(action == int(self.shown[0] > 0))
        return self._show(), reward, True, False, {}

    def _show(self) -> Any:
        self.shown = self.np_random.normal(size=4).astype(np.float32).clip(-5, 5)
        return self.shown


ALGORITHMS = {
    PPO: {"n_steps": 64, "batch_size": 32, "n_epochs": 4},
    A2C: {"n_steps": 16},
    DQN: {"learning_starts": 32, "batch_size": 16, "train_freq": 2, "target_update_interval": 200},
}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
actors_and_critics = pytest.mark.parametrize("algorithm", [PPO, A2C], ids=lambda algorithm: algorithm.__name__)


SETTINGS = {"ess": 1e3, "hess_init": 1.0}
LINES = {vlearn.VAdamW: {"num_data": 64}, vlearn.EVON: {"ess": 64.0}}


def agent(algorithm: Any, kind: Any = vlearn.IVON, lr: float = 0.03) -> Any:
    return algorithm(
        "MlpPolicy",
        Signs(),
        learning_rate=lr,
        seed=0,
        device="cpu",
        policy_kwargs={
            "net_arch": [16],
            "optimizer_class": kind,
            "optimizer_kwargs": LINES.get(kind, SETTINGS),
        },
        **ALGORITHMS[algorithm],
    )


def right_answers(model: Any) -> float:
    """The share of observations whose sign the policy, which has no noise here, tells."""
    shown = np.random.default_rng(5).normal(size=(400, 4)).astype(np.float32)
    actions, _ = model.predict(shown, deterministic=True)
    return float((actions == (shown[:, 0] > 0)).mean())


@every_algorithm
def test_a_policy_learns(algorithm: Any) -> None:
    model = agent(algorithm)
    before = right_answers(model)
    model.learn(2000 if algorithm is PPO else 1500)
    assert before < 0.75 and right_answers(model) > 0.9
    trained = [p.detach() for group in model.policy.optimizer.param_groups for p in group["params"]]
    assert equal([*model.policy.optimizer.posterior().mean.values()], trained)


@pytest.mark.parametrize(("kind", "lr"), [(vlearn.VAdamW, 0.01), (vlearn.EVON, 10.0)])
def test_a_policy_learns_by_the_line_of(kind: Any, lr: float) -> None:
    model = agent(PPO, kind, lr)
    before = right_answers(model)
    model.learn(2000)
    assert before < 0.75 and right_answers(model) > 0.9


@actors_and_critics
def test_every_part_of_actor_and_critic_moves(algorithm: Any) -> None:
    model = agent(algorithm)
    before = weights(model.policy)
    model.learn(128)
    moved = [not torch.equal(p, q) for p, q in zip(before, weights(model.policy), strict=True)]
    assert all(moved) and len(moved) == 8  # two bodies, two heads, each with weight and bias


@actors_and_critics
def test_rows_of_parts_that_are_called_apart_are_refused(algorithm: Any) -> None:
    model = agent(algorithm)
    model.learn(64)
    with pytest.raises(
        RuntimeError, match=r"call '\d' \(Linear\) and '\d' \(Linear\) in the forward pass of one module"
    ):
        model.policy.optimizer.sensitivities()
    with pytest.raises(RuntimeError, match="VON updates its Hessian from .* in the forward pass of one module"):
        agent(algorithm, vlearn.VON).learn(64)


def test_the_rows_of_a_value_network_are_the_oracle_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """DQN: the squared error, within 1 of the target, of the value of the action that was taken."""
    model, given = agent(DQN), {}
    network, optimizer = model.policy.q_net, model.policy.optimizer

    def note(values: Any, targets: Any) -> Any:
        given.update(targets=targets.detach(), drawn={n: p.detach().clone() for n, p in network.named_parameters()})
        return loss(values, targets)

    loss = F.smooth_l1_loss
    monkeypatch.setattr("stable_baselines3.dqn.dqn.F.smooth_l1_loss", note)
    sample = model.replay_buffer.sample
    monkeypatch.setattr(
        model.replay_buffer, "sample", lambda *args, **kwargs: given.setdefault("data", sample(*args, **kwargs))
    )
    model.learn(34)
    data, targets = given["data"], given["targets"].double()

    def taken(twin: Any) -> Any:
        return twin.q_net(data.observations.double()).gather(1, data.actions.long())

    truth = self_influence(
        network,
        given["drawn"],
        optimizer.posterior().variance,
        taken,
        lambda q: loss(q, targets, reduction="none")[:, 0],
    )
    assert relative_error(optimizer.sensitivities().self_influence.double(), truth) < 1e-4


@every_algorithm
def test_a_saved_agent_goes_on(algorithm: Any, tmp_path: Any) -> None:
    model = agent(algorithm)
    model.learn(256)
    model.save(tmp_path / "agent")
    again = algorithm.load(tmp_path / "agent", env=Signs(), device="cpu")
    assert equal(weights(again.policy), weights(model.policy))
    assert equal(states(again.policy.optimizer), states(model.policy.optimizer))
    before = weights(again.policy)
    again.learn(128)
    assert not equal(before, weights(again.policy))
    assert again.policy.optimizer.param_groups[0]["ess"] == 1e3
