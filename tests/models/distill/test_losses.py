"""The methods' losses: values worked out by hand, and a linear world in which each finds the map that there is."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from models.distill.consistency import Consistency
from models.distill.distance import distances
from models.distill.distribution import Critic, Distribution
from models.distill.reflow import Reflow, Straight, u_shaped
from models.distill.student import Batch, Loss
from models.distill.trajectory import Trajectory

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
TIMESTEPS = (999.0, 900.0, 750.0, 500.0, 0.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def full(value: float, count: int = 8) -> torch.Tensor:
    return torch.full((count, 1, 1, 2, 2), value)


def constant(value: float) -> Callable[..., torch.Tensor]:
    return lambda latents, timestep, prompt_embeds: torch.full_like(latents, value)


def batch(noise: float, latents: float, states: list[float] | None = None, sigmas: tuple[float, ...] = SIGMAS) -> Batch:
    path = None if states is None else torch.stack([full(state) for state in states], 1)
    here = None if path is None else torch.tensor(sigmas)
    return Batch(full(noise), full(latents), torch.zeros(8, 1, 1), path, here, None if here is None else 1000 * here)


def test_distances_are_mean_squares_or_pseudo_huber() -> None:
    difference = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert distances(difference, "squared").tolist() == [12.5, 0.0]
    assert distances(difference, "pseudo_huber", 1.0).tolist() == pytest.approx([13.5**0.5 - 1.0, 0.0])


def test_pseudo_huber_is_the_papers_over_the_root_of_the_size() -> None:
    difference = torch.randn(3, 50)
    c = 0.00054 * 50**0.5
    papers = (difference.square().sum(1) + c**2).sqrt() - c
    torch.testing.assert_close(distances(difference, "pseudo_huber"), papers / 50**0.5)


def test_reflow_and_straight_ask_for_noise_minus_latent() -> None:
    couple = batch(noise=3.0, latents=1.0)
    for loss in (Reflow(distance="squared"), Straight(distance="squared")):
        assert loss(constant(2.0), couple, rng()).item() == 0.0
        assert loss(constant(5.0), couple, rng()).item() == 9.0


def test_reflow_gives_the_student_the_place_on_the_line_that_its_timestep_says() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def student(latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        seen.append((latents[:, 0, 0, 0, 0], timestep))
        return torch.zeros_like(latents)

    Reflow()(student, batch(noise=3.0, latents=1.0), rng())
    Straight(timestep=999.0)(student, batch(noise=3.0, latents=1.0), rng())
    (on_line, at), (noise, first) = seen
    torch.testing.assert_close(on_line, 1.0 + 2.0 * at / 1000)
    assert len(set(at.tolist())) == 8
    assert noise.tolist() == [3.0] * 8
    assert first.tolist() == [999.0] * 8


def test_timesteps_of_reflow_are_distributed_as_a_u() -> None:
    a = 4.0
    drawn = u_shaped(rng(), 20_000, a)
    for x in (0.1, 0.25, 0.5, 0.9):
        wanted = (np.expm1(a * x) + np.exp(a) - np.exp(a * (1 - x))) / (2 * np.expm1(a))
        assert (drawn < x).mean() == pytest.approx(wanted, abs=0.01)
    assert u_shaped(rng(), 20_000, 0.0).mean() == pytest.approx(0.5, abs=0.01)


def test_trajectory_asks_for_the_velocity_that_reaches_the_next_state() -> None:
    path = batch(4.0, 1.0, [4.0, 2.0, 1.0], (1.0, 0.75, 0.0))  # velocities 8 and 4/3

    def student(latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return torch.where(timestep > 900, 8.0, 4.0 / 3).reshape(-1, 1, 1, 1, 1).expand_as(latents)

    assert Trajectory()(student, path, rng()).item() == pytest.approx(0.0, abs=1e-12)
    zero = Trajectory()(constant(0.0), path, rng()).item()
    assert zero == pytest.approx((64 + 16 / 9) / 2)
    # |dx| = 2 and 1, relative to the mean step of 1/2
    weighted = Trajectory(weight="state")(constant(0.0), path, rng()).item()
    assert weighted == pytest.approx((16 + 4) / 2)
    # the states reached hold 1/4 and all of the signal: |dx| / (1 - s) = 8 and 1, relative to the mean of 1 and 3/4
    signal = Trajectory(weight="signal")(constant(0.0), path, rng()).item()
    assert signal == pytest.approx(((2 / 0.25) ** 2 + 1) / 2 / 0.875**2)


def test_consistency_at_the_last_state_asks_for_the_end_itself() -> None:
    path = batch(4.0, 1.0, [3.0, 1.0], (0.5, 0.0))
    loss = Consistency(constant(1e6), distance="squared")  # at sigma 0 the network counts for nothing
    assert loss(constant(4.0), path, rng()).item() == 0.0
    assert loss(constant(2.0), path, rng()).item() == 1.0


def test_consistency_compares_with_the_target_at_the_next_state() -> None:
    line = batch(noise=3.0, latents=1.0)
    loss = Consistency(constant(2.0), "coupling", (1.0, 0.5, 0.0), (999.0, 500.0, 0.0), distance="squared")
    assert loss(constant(2.0), line, rng()).item() == pytest.approx(0.0, abs=1e-12)
    # f = x - s v is off by s: 1 and 1/2
    assert loss(constant(3.0), line, rng()).item() == pytest.approx((1.0 + 0.25) / 2)


def test_methods_of_paths_refuse_batches_without_states() -> None:
    with pytest.raises(ValueError, match="states"):
        Trajectory()(constant(0.0), batch(1.0, 0.0), rng())


class Linear(nn.Module):
    """v = weight[timestep] x: a weight of its own for each timestep of the schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(len(TIMESTEPS), dtype=torch.float64))

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        at = (timestep[:, None] - torch.tensor(TIMESTEPS)[None]).abs().argmin(1)
        return self.weights[at].reshape(-1, 1, 1, 1, 1) * latents


GAIN = 0.4
"""The teacher of the linear world makes x = GAIN noise, along the path x(s) = (GAIN + (1 - GAIN) s^2) noise."""


def learnt(make: Callable[[nn.Module], Loss], steps: int = 1500) -> Linear:
    student = Linear()
    target = deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    loss = make(target)
    share = torch.tensor([GAIN + (1 - GAIN) * sigma**2 for sigma in SIGMAS], dtype=torch.float64)
    for step in range(steps):
        draw = rng(step)
        noise = torch.from_numpy(draw.standard_normal((32, 1, 1, 2, 2)))
        states = noise[:, None] * share.reshape(1, -1, 1, 1, 1, 1)
        told = torch.tensor(SIGMAS, dtype=torch.float64), torch.tensor(TIMESTEPS, dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        loss(student, Batch(noise, GAIN * noise, torch.zeros(32, 1, 1), states, *told), draw).backward()
        optimizer.step()
        with torch.no_grad():
            target.weights.lerp_(student.weights, 0.2)
    return student


def sampled(student: Linear, places: tuple[int, ...]) -> float:
    """Euler from noise 1 over these places."""
    x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    for here, there in pairwise(places):
        x = x + (SIGMAS[there] - SIGMAS[here]) * student(x, torch.tensor([TIMESTEPS[here]]), torch.zeros(1))
    return x.item()


def test_each_method_learns_the_exact_map_of_a_linear_world() -> None:
    stepping = learnt(lambda target: Trajectory())
    assert sampled(stepping, (0, 1, 2, 3, 4)) == pytest.approx(GAIN, abs=1e-3)
    assert sampled(stepping, (0, 1, 2)) == pytest.approx(GAIN + (1 - GAIN) * 0.75**2, abs=1e-3)
    straight = learnt(lambda target: Straight(distance="squared"))
    assert sampled(straight, (0, 4)) == pytest.approx(GAIN, abs=1e-3)
    consistent = learnt(lambda target: Consistency(target, distance="squared"))
    assert sampled(consistent, (0, 4)) == pytest.approx(GAIN, abs=1e-3)
    # From any state of the path, not from noise alone.
    middle = GAIN + (1 - GAIN) * 0.5**2
    assert middle * (1 - 0.5 * consistent.weights[3].item()) == pytest.approx(GAIN, abs=1e-3)
    along = learnt(lambda target: Consistency(target, "coupling", SIGMAS, TIMESTEPS, distance="squared"))
    assert sampled(along, (0, 4)) == pytest.approx(GAIN, abs=1e-3)
    assert sampled(along, (0, 1, 2, 3, 4)) == pytest.approx(GAIN, abs=1e-3)


def test_reflow_learns_the_velocity_of_the_line_at_every_place() -> None:
    class Curve(nn.Module):
        """v = (a / (b + c t)) x, of which the exact velocity (1 - GAIN) / (GAIN + (1 - GAIN) t) x is one."""

        def __init__(self) -> None:
            super().__init__()
            self.rest = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
            t = (timestep / 1000).reshape(-1, 1, 1, 1, 1)
            return (1 - self.rest) / (self.rest + (1 - self.rest) * t) * latents

    student = Curve()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for step in range(500):
        draw = rng(step)
        noise = torch.from_numpy(draw.standard_normal((32, 1, 1, 2, 2)))
        optimizer.zero_grad()
        Reflow(distance="squared")(student, Batch(noise, GAIN * noise, torch.zeros(32, 1, 1)), draw).backward()
        optimizer.step()
    assert student.rest.item() == pytest.approx(GAIN, abs=1e-3)


class Engine:
    """As much of DeepSpeed's as a critic uses."""

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        self.network = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network(*arguments)
        return found

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Bell(nn.Module):
    """The exact velocity of latents that are normal with this mean and deviation."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log = nn.Parameter(torch.tensor(deviation).log())

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        s, spread = (timestep / 1000).reshape(-1, 1, 1, 1, 1), (2 * self.log).exp()
        off = (latents - (1 - s) * self.mean) / ((1 - s) ** 2 * spread + s**2)
        return s * off - self.mean - (1 - s) * spread * off


def test_distribution_asks_for_what_the_teacher_finds_and_the_critic_does_not() -> None:
    def says(clean: float) -> Callable[..., torch.Tensor]:
        return lambda latents, timestep, prompt_embeds: (latents - clean) / (timestep / 1000).reshape(-1, 1, 1, 1, 1)

    critic = Critic(says(2.0), updates=1, shift=3.0)
    loss = Distribution(says(5.0), critic, 1.0, (1.0, 0.0), (1000.0,), 3.0)
    student = Bell(0.0, 1e-6)  # makes 0, whatever the noise
    value = loss(student, batch(9.0, 9.0), rng())
    # made 0, teacher 5, critic 2: (2 - 5) / |0 - 5|, squared and halved
    assert value.item() == pytest.approx(0.5 * 0.6**2, rel=1e-4)
    value.backward()
    assert student.mean.grad is not None and student.mean.grad.item() == pytest.approx(-0.6, rel=1e-3)


def test_distribution_is_guided_as_the_teacher_was() -> None:
    def teacher(latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        clean = 4.0 if prompt_embeds.sum() == 0 else 3.0
        return (latents - clean) / (timestep / 1000).reshape(-1, 1, 1, 1, 1)

    told = batch(9.0, 9.0)
    loss = Distribution(teacher, Critic(constant(0.0), 1, 3.0), 2.0, (1.0, 0.0), (1000.0,), 3.0)
    with pytest.raises(ValueError, match="negative"):
        loss(Bell(0.0, 1e-6), told, rng())
    told = Batch(told.noise, told.latents, told.prompt_embeds, negative_embeds=torch.ones(8, 1, 1))
    loss = Distribution(
        teacher,
        Critic(lambda x, t, c: (x - 2.0) / (t / 1000).reshape(-1, 1, 1, 1, 1), 1, 3.0),
        2.0,
        (1.0, 0.0),
        (1000.0,),
        3.0,
    )
    # 3 + 2 (4 - 3) = 5, as above
    assert loss(Bell(0.0, 1e-6), told, rng()).item() == pytest.approx(0.5 * 0.6**2, rel=1e-4)


def test_distribution_matching_ends_where_the_teachers_samples_are() -> None:
    teacher, student = Bell(2.0, 0.5).requires_grad_(False), Bell(0.0, 1.0)
    critic = Critic(Engine(Bell(0.0, 1.0), 0.05), updates=4, shift=3.0)
    loss = Distribution(teacher, critic, 1.0, (1.0, 0.75, 0.0), (1000.0, 750.0), 3.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    told = Batch(torch.zeros(64, 1, 1, 2, 2), torch.zeros(64, 1, 1, 2, 2), torch.zeros(64, 1, 1))
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 500)
        optimizer.zero_grad()
        loss(student, told, rng(step)).backward()
        optimizer.step()
        critic.update(student)
    x = torch.from_numpy(rng(1).standard_normal((4096, 1, 1, 1, 1), dtype=np.float32))
    with torch.no_grad():
        for here, there in ((1.0, 0.75), (0.75, 0.0)):
            x = x + (there - here) * student(x, torch.full((len(x),), 1000 * here), torch.zeros(1))
    assert x.mean().item() == pytest.approx(2.0, abs=0.05)
    assert critic.engine.network.mean.item() == pytest.approx(2.0, abs=0.2)
