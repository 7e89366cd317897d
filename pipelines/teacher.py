"""The teacher that a generator's first steps are taken by: what the spec says of it, or else the student's own record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infra.errors import UserError
from models.hand_off import check_hand_off, check_plan, check_runs_whole
from models.loading import GeneratorRef, TeacherRef
from models.plan import SamplerPlan
from models.source import RECORD, content_sha256, is_here, resolve
from pipelines.policy import Policy, refusal
from pipelines.sections import Generator


def teacher_of(
    at: int, generator: Generator, ref: GeneratorRef, plan: SamplerPlan, policy: Policy
) -> TeacherRef | None:
    """The teacher of generator number `at`, None where it takes no step. A UserError names the key that is wrong.

    `ref` is the student. What its record names is held to the policy, as what a spec names is.
    """
    if not generator.teacher_steps:
        return None
    key = f"generators.{at}.teacher"
    model = _said(ref.path, "teacher", generator.teacher, str, key, "name the model that the student was made from")
    guidance = _said(
        ref.path,
        "teacher_guidance_scale",
        generator.teacher_guidance_scale,
        (int, float),
        f"{key}_guidance_scale",
        "give the teacher's own guidance_scale, 1 for none",
    )
    if wrong := refusal(model, policy):
        raise UserError(f"{key}: {wrong}")
    path = resolve(model, "generator", key=key)
    teacher = TeacherRef(path, model, content_sha256(path), generator.teacher_steps, float(guidance))
    check_plan(plan, teacher)
    check_runs_whole(ref)
    try:
        check_hand_off(ref.path, teacher)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return teacher


def named_teacher(generator: Generator) -> str | None:
    """The teacher's name as far as it is known without fetching anything; None too where a generator has none."""
    if not generator.teacher_steps:
        return None
    if generator.teacher is not None:
        return generator.teacher
    if not is_here(generator.model, generator.revision):
        return None
    try:
        record = json.loads(Path(resolve(generator.model, "generator", generator.revision), RECORD).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = record.get("teacher") if isinstance(record, dict) else None
    return found if isinstance(found, str) else None


def _said(folder: str, name: str, said: Any, kind: type | tuple[type, ...], key: str, mend: str) -> Any:
    """`said`, or else what the student's record has by that name."""
    if said is not None:
        return said
    file = Path(folder, RECORD)
    try:
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {file} cannot be read ({error}); {mend}") from error
    found = record.get(name) if isinstance(record, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise UserError(f"{key}: left out, and {folder} has no {RECORD} that says {name}; {mend}")
    return found
