"""What a spec may say of each recipe."""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import UserError
from pipelines.resolve import resolve_spec
from pipelines.spec import parse_spec


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"recipe": "trajectory"}, "trajectory: recipe trajectory needs it"),
        ({"trajectory": {"keep": "all"}}, "trajectory: recipe synthetic keeps no states"),
        ({"recipe": "trajectory", "trajectory": {"keep": [21]}}, "trajectory.keep: expected states from -21 to 20"),
        (
            {
                "recipe": "trajectory",
                "trajectory": {"keep": "all"},
                "sampler": {"dualparal": {"frames": 2, "context": 1}},
            },
            "sampler.dualparal: blocks take no path",
        ),
        ({"recipe": "trajectory", "trajectory": {"keep": "some"}}, "trajectory.keep: expected"),
        ({"recipe": "prompts", "samples_per_prompt": 2}, "samples_per_prompt: recipe prompts makes one row"),
        ({"recipe": "prompts", "judge": {"backend": "oracle"}}, "judge: recipe prompts makes no media"),
        ({"recipe": "prompts", "caption": {"styles": ["short"]}}, "caption: recipe prompts makes no media"),
        ({"recipe": "prompts", "output": {"tensors": {"noise": "float32"}}}, "output.tensors: recipe prompts keeps"),
        ({"recipe": "reflow", "output": {"tensors": {}}}, "output.tensors: recipe reflow is noise and final latents"),
    ],
)
def test_specs_that_a_recipe_cannot_follow_are_refused(sections, said):
    with pytest.raises(UserError) as error:
        parse_spec({"prompts": {"inline": ["a cat"]}, **sections})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_recipes_bring_their_own_tensors():
    def tensors(**sections: Any) -> dict[str, str]:
        return dict(parse_spec({"prompts": {"inline": ["a cat"]}, **sections}).output.tensors)

    assert tensors() == {}
    assert tensors(recipe="reflow") == {"latents": "float16", "text_embeddings": "float16"}
    assert tensors(recipe="reflow", output={"tensors": {"latents": "float32"}}) == {"latents": "float32"}
    assert tensors(recipe="prompts", output={"uri": "x"}) == {"text_embeddings": "float16"}


def test_nobody_judges_prompts(tmp_path):
    asked = {"recipe": "prompts", "generators": [{"model": "pack://tiny"}], "output": {"uri": str(tmp_path / "new")}}
    run = resolve_spec(parse_spec({"prompts": {"inline": ["a cat"]}, **asked}))
    assert (run.writing().judge, run.needs_model) == ("", False)
    assert [*dict(run.licences)] == ["pack://tiny"]
    assert parse_spec(run.spec.model_dump(mode="json")) == run.spec
