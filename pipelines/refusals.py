"""What a run is refused for once its models are known."""

from __future__ import annotations

from infra.errors import UserError
from models.licences import Licence
from models.pack import marks
from pipelines.spec import Spec
from stages.rubric import Rubric


def check_oracle(rubric: Rubric) -> None:
    """Refuse a rubric that asks what the oracle does not mark."""
    others = [question.name for question in rubric.questions if question.name not in marks.QUESTIONS]
    if others:
        raise UserError(
            f"judge.rubric: {rubric.name} asks {', '.join(others)}; judge.backend: oracle marks "
            f"{', '.join(marks.QUESTIONS)} and nothing else"
        )


def check_licences(spec: Spec, licences: dict[str, Licence]) -> None:
    if spec.policy.licences != "refuse":
        return
    for model, licence in licences.items():
        if licence.may_train != "yes":
            raise UserError(
                f"policy.licences: refuse, and {model} ({licence.name}: {licence.why}) says {licence.may_train} on training"
                " other models; choose another model, or give its generator may_train: yes if you have leave"
            )
