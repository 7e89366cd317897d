"""The sections of recipe curate: what they refuse, and that no other recipe has them."""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import UserError
from pipelines.identity import Shape, clip_id, source_id
from pipelines.spec import Spec, absolute_paths, parse_spec

CURATE: dict[str, Any] = {"recipe": "curate", "sources": [{"path": "x"}]}
SYNTHETIC: dict[str, Any] = {"prompts": {"inline": ["a cat"]}}


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (SYNTHETIC | {"sources": [{"path": "x"}]}, "sources: recipe synthetic generates its media; set recipe: curate"),
        (
            SYNTHETIC | {"clip": {"fps": 4}},
            "clip: recipe synthetic generates its media; set recipe: curate, or remove it",
        ),
        (SYNTHETIC | {"generators": []}, "generators: expected at least 1 of them, found an empty list"),
        ({"recipe": "curate"}, "sources: recipe curate needs at least one; give {path: FOLDER}"),
        (CURATE | SYNTHETIC, "prompts: recipe curate takes clips from sources; remove it"),
        (CURATE | {"generators": [{}]}, "generators: recipe curate generates nothing; remove it"),
        (CURATE | {"sampler": {"num_inference_steps": 4}}, "sampler: recipe curate generates nothing; remove it"),
        (CURATE | {"samples_per_prompt": 2}, "samples_per_prompt: recipe curate generates nothing; remove it"),
        (
            CURATE | {"output": {"marked": True}},
            "output.marked: recipe curate makes no media that a mark would be true",
        ),
        (CURATE | {"output": {"keep_rejected": "media"}}, "output.keep_rejected: expected preview or none with recipe"),
        (CURATE | {"output": {"tensors": {"latents": "float16"}}}, "output.tensors: recipe curate has no tensors"),
        (
            CURATE | {"cut": {"shortest": 6}},
            "cut: longest: expected at least twice shortest, so that every longer scene",
        ),
        (
            CURATE | {"sources": [{"path": "x", "shard": {"index": 2, "count": 2}}]},
            "sources.0.shard: expected an index",
        ),
        (CURATE | {"sources": [{"pth": "x"}]}, "sources.0.path: is needed and missing"),
    ],
)
def test_what_does_not_fit_the_recipe_is_one_line(data: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_spec(data, source="x.yaml")
    assert str(caught.value).splitlines()[0].startswith(f"x.yaml: {line}")


def test_a_curating_spec_has_nothing_that_generates_and_survives_being_written() -> None:
    spec = absolute_paths(parse_spec(CURATE))
    assert (spec.generators, spec.output.marked, spec.judge.rubric) == ((), False, "footage")
    assert Spec.model_validate(spec.model_dump()) == spec
    assert Spec.model_validate_json(spec.model_dump_json()) == spec


def test_ids_are_of_content_and_golden() -> None:
    shape = Shape(64, 64, 17, 8.0)
    assert clip_id("ab" * 32, 0.0, 2.125, shape) == "90a0d5c1470c90ada1b9b5b88648b92f"
    assert source_id("/a/b.mp4", "cd" * 16) == "8bc20be21f025dca3855fcccf986825a"
    assert clip_id("ab" * 32, 0, 2.125, shape) == clip_id("ab" * 32, 0.0, 2.125, shape)
    others = [("ac" * 32, 0.0, 2.125, shape), ("ab" * 32, 0.5, 2.125, shape), ("ab" * 32, None, None, shape)]
    others.append(("ab" * 32, 0.0, 2.125, Shape(64, 64, 34, 16.0)))
    assert len({clip_id(*each) for each in others} | {"90a0d5c1470c90ada1b9b5b88648b92f"}) == 5
