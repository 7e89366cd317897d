"""What a user may say of a training: the YAML file of `ditmill distill --config`, and `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from infra.errors import UserError
from infra.safe_yaml import load_yaml
from models.distill.distance import HUBER, Distance
from pipelines.overrides import override
from pipelines.sections import Section

Method = Literal["reflow", "trajectory", "consistency", "distribution"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class ReflowSection(Section):
    """Rectified flow on couplings of noise and latent, then the whole line in one step."""

    stages: tuple[Literal["reflow", "distill"], ...] = Field(
        ("reflow", "distill"), min_length=1, description="In order; each has a learning-rate schedule of its own."
    )
    last_share: float = Field(0.5, gt=0, lt=1, description="Share of the steps that the second stage gets.")
    u_shape: float = Field(4.0, ge=0, description="How much more often the ends of the line are drawn; 0: evenly.")
    distance: Distance = Field("pseudo_huber", description="What the loss is.")
    huber: float = Field(HUBER, gt=0, description="Of pseudo-Huber.")


class TrajectorySection(Section):
    """From one kept state of the teacher's path to the next."""

    weight: Literal["uniform", "state", "signal"] = Field(
        "uniform",
        description="What is measured: uniform, velocities; state, the states that they lead to; signal, these over their "
        "share of the clean latent.",
    )
    places: tuple[int, ...] | None = Field(
        None, min_length=2, description="States to step between; left out, num_inference_steps or else all kept ones."
    )
    distance: Distance = Field("squared", description="What the loss is.")
    huber: float = Field(HUBER, gt=0, description="Of pseudo-Huber.")


class ConsistencySection(Section):
    """From any state of a path to its end, compared with an average of the student."""

    along: Literal["trajectory", "coupling"] = Field(
        "trajectory", description="The kept states, or the straight line between noise and latent."
    )
    pieces: int = Field(20, ge=1, description="Of the straight line.")
    target_decay: float = Field(0.95, ge=0, lt=1, description="Of the average that is compared with.")
    distance: Distance = Field("pseudo_huber", description="What the loss is.")
    huber: float = Field(HUBER, gt=0, description="Of pseudo-Huber.")


class DistributionSection(Section):
    """The student's own samples are drawn to where its teacher finds more of them than the student makes."""

    critic_learning_rate: float = Field(2e-4, gt=0, description="Of the critic, which learns what the student makes.")
    critic_updates: int = Field(5, ge=1, description="Of the critic, for each of the student.")


class OptimizerSection(Section):
    """AdamW with a warm-up and a cosine."""

    learning_rate: float = Field(1e-4, gt=0, description="After the warm-up.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="Of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    warmup_steps: int = Field(100, ge=0, description="Of each stage.")
    floor: float = Field(0.02, ge=0, le=1, description="Share of the learning rate that the cosine falls to.")
    clip: float = Field(1.0, ge=0, description="Greatest norm of a gradient; 0: any.")


class DeepSpeedSection(Section):
    """How the training lies on the machine."""

    ranks: int = Field(0, ge=0, description="Processes; 0: one for each GPU, or one on a CPU.")
    zero: Literal[1, 2, 3] = Field(1, description="What ZeRO divides: optimizer; and gradients; and weights.")
    precision: Literal["auto", "float32", "autocast", "bfloat16"] = Field(
        "auto",
        description="autocast: bfloat16 computation, float32 weights; bfloat16: float32 in the optimizer alone; auto: "
        "bfloat16 on GPUs, else float32.",
    )
    gradient_checkpointing: bool = Field(False, description="Compute activations twice instead of keeping them.")
    threads: int = Field(1, ge=1, description="Of torch in each process, on a CPU.")


class EvaluateSection(Section):
    """Teacher against student at the end, on validation prompts, from the same noise."""

    samples: int = Field(256, ge=0, description="Most samples of the split validation; 0: no evaluation.")
    batch_size: int = Field(16, ge=1, description="Samples denoised at once.")


class Distill(Section):
    """One training of a student."""

    method: Method = Field(description="reflow, trajectory, consistency or distribution.")
    steps: int = Field(10_000, ge=1, description="Updates of the weights, all stages together.")
    batch_size: int = Field(16, ge=1, description="Samples of each process at once.")
    accumulate: int = Field(1, ge=1, description="Batches of one update.")
    num_inference_steps: int | None = Field(
        None, ge=1, description="Steps of the student; left out, those it is trained for."
    )
    start: str | None = Field(
        None,
        description="Checkpoint that the student's weights start from, such as another student; left out, the teacher.",
    )
    seed: int = Field(0, ge=0, description="Of the order of the data and of what is drawn.")
    ema: float = Field(0.999, ge=0, lt=1, description="Decay of the average of the weights that becomes the student.")
    shuffle: int = Field(4096, ge=1, description="Rows among which the next sample is drawn.")
    reflow: ReflowSection = ReflowSection()
    trajectory: TrajectorySection = TrajectorySection()
    consistency: ConsistencySection = ConsistencySection()
    distribution: DistributionSection = DistributionSection()
    optimizer: OptimizerSection = OptimizerSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint_steps: int = Field(1000, ge=1, description="Updates after which a state is written.")
    checkpoint_minutes: float = Field(10.0, gt=0, description="Minutes after which a state is written.")
    log_steps: int = Field(50, ge=1, description="Updates of one line of loss.csv.")

    @model_validator(mode="after")
    def _enough_steps(self) -> Distill:
        if self.method == "reflow" and self.steps < len(self.reflow.stages):
            raise ValueError(f"steps: {len(self.reflow.stages)} stages need a step each, found {self.steps}")
        if len(self.reflow.stages) > 2:
            raise ValueError("reflow.stages: expected one or two")
        return self

    def identity(self) -> dict[str, Any]:
        """What makes another training: everything but how often something is written or measured."""
        said = self.model_dump(mode="json")
        for name in ("start", "evaluate", "checkpoint_steps", "checkpoint_minutes", "log_steps"):
            del said[name]
        return said


def load_settings(config: str | None, overrides: list[str], **given: Any) -> Distill:
    """Settings from a YAML file, `--set` and options (None: not given), the later the stronger. UserError that names the
    key."""
    data: Any = {}
    if config is not None:
        try:
            data = load_yaml(Path(config).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--config {config}: cannot be read as YAML ({str(error).splitlines()[0]})") from error
        if not isinstance(data, dict):
            raise UserError(f"--config {config}: expected keys such as steps: 10000, found {type(data).__name__}")
    for assignment in overrides:
        override(data, assignment, {})
    data |= {name: value for name, value in given.items() if value is not None}
    try:
        return Distill.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "settings"
        raise UserError(f"{key}: {first['msg'].removeprefix('Value error, ')}; see docs/distillation.md") from error
