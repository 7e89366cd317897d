from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.errors import UserError
from pipelines.explain import leaves
from pipelines.records import unique_records
from pipelines.spec import Spec, load_spec
from pipelines.starter import STARTER, json_schema, slug, spec_for, starter_spec


@pytest.mark.parametrize("full", [False, True])
def test_starter_spec_loads_as_its_defaults(tmp_path: Path, full: bool) -> None:
    (tmp_path / "a.yaml").write_text(starter_spec(full))
    spec = load_spec(tmp_path / "a.yaml")
    assert spec == Spec.model_validate(STARTER)
    assert len(list(unique_records(spec))) == 3


def test_full_starter_has_every_key_and_its_documentation() -> None:
    text = starter_spec(full=True)
    said = " ".join(line.strip().lstrip("-# ") for line in text.splitlines())
    for key, field in leaves(Spec):
        assert f"{key.split('.')[-1]}:" in text, key
        assert field.description and field.description in said, key


def test_full_starter_shows_what_is_off_by_default() -> None:
    lines = starter_spec(full=True).splitlines()
    for key in ("expand", "adapters"):
        start = next(at for at, line in enumerate(lines) if line.strip() == f"# {key}:")
        indent = " " * lines[start].index("#")
        below = takewhile(lambda line: line.startswith(f"{indent}#   "), lines[start + 1 :])  # noqa: B023
        block = "\n".join(line[len(indent) + 2 :] for line in (lines[start], *below))
        assert yaml.safe_load(block)[key]


def test_starter_is_short_and_its_lines_fit() -> None:
    text = starter_spec()
    assert len(text.splitlines()) < 80
    assert max(len(line) for line in text.splitlines()) <= 112
    assert all(line == line.rstrip() for line in starter_spec(full=True).splitlines())


def test_json_schema_refuses_and_documents_as_the_models_do() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "ditmill spec"
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        assert section["title"] and section["description"]
        for name, field in section["properties"].items():
            assert field["description"] and field.get("title", "-"), name
    assert schema["required"] == ["prompts"]


@pytest.mark.parametrize("full", [False, True])
def test_json_schema_accepts_the_starter(full: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    data: dict[str, Any] = yaml.safe_load(starter_spec(full))
    assert list(validator.iter_errors(data)) == []
    assert list(validator.iter_errors({**data, "sede": 1}))
    assert list(validator.iter_errors({**data, "layout": {"batch_size": 0}}))


def test_spec_for_makes_samples_of_one_prompt() -> None:
    spec = spec_for("a red circle bouncing", 8, model="org/model", overrides=["sampler.num_inference_steps=4"])
    assert spec.prompts.inline == ("a red circle bouncing",)
    assert (spec.samples_per_prompt, spec.layout.batch_size, spec.sampler.num_inference_steps) == (8, 8, 4)
    assert [generator.model for generator in spec.generators] == ["org/model"]
    assert (spec.name, spec.output.uri) == ("a-red-circle-bouncing", "out/a-red-circle-bouncing")
    assert spec_for("a", 3, uri="s3://b/c").output.uri == "s3://b/c"
    assert spec_for("a", 3).layout.batch_size == 3


def test_spec_for_says_a_mistake_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^ditmill make: sampler\.stepz: unknown key"):
        spec_for("a", 1, overrides=["sampler.stepz=4"])
    with pytest.raises(UserError, match=r"^ditmill make: prompts\.inline\.0: expected Unicode text, found \\xdcff"):
        spec_for("\udcff", 1)


@pytest.mark.parametrize(
    "texts",
    [
        ("a red circle", "A red circle", "a red circle!"),
        ("一只猫", "一只狗", ""),
        ("one two three four five six seven eight nine ten", "one two three four five six seven eight nine eleven"),
    ],
)
def test_slug_is_a_name_and_keeps_texts_apart(texts: tuple[str, ...]) -> None:
    names = [slug(text) for text in texts]
    assert all(Spec.model_validate({**STARTER, "name": name}).name == name and len(name) <= 48 for name in names)
    # what differs in case alone may share a folder: its samples have ids of their own
    assert len(set(names)) >= len({text.lower() for text in texts})
