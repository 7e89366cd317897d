from __future__ import annotations

import pytest

from infra.errors import UserError
from pipelines.rules import read_rules


def test_options_stand_in_for_keys_of_the_file(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("near_duplicates: {hash: 3, cosine: 0.9}\nembedding: {model: x}\ncaps: [{by: tags, most: 1}]\n")
    found = read_rules(str(path), bits=5, against="v1,v2", caps=["a = 'b'=20%", "model=7"])
    assert found.near_duplicates.model_dump() == {"hash": 5, "cosine": 0.9, "match": "either"}
    assert found.against == ("v1", "v2")
    assert [(cap.by, cap.most, cap.share) for cap in found.caps] == [
        ("tags", 1, None),
        ("a = 'b'", None, 0.2),
        ("model", 7, None),
    ]
    assert not read_rules()


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        ("near_duplicates: {hash: 99}", "near_duplicates.hash"),
        ("near_duplicates: {bits: 9}", "near_duplicates.bits: unknown key"),
        ("near_duplicates: {cosine: 0.9}", "cosine and topic need an embedding"),
        ("caps: [{by: topic, most: 3}]", "cosine and topic need an embedding"),
        ("caps: [{by: tags}]", "expected most or share"),
        ("caps: [{words: [' '], most: 1}]", "caps.0.words"),
        ("against: [v1]", "against needs near_duplicates"),
        ("embedding: {call: 'a:b'}", "call needs a version"),
        ("rank: {prompt_match: -1}", "rank.prompt_match: expected at least 0"),
        ("keep: {overall: 2}", "keep.overall: expected less than 1"),
        ("[1, 2]", "expected near_duplicates or caps, found list"),
        ("caps: [", "is not YAML"),
    ],
)
def test_rules_that_are_wrong_are_refused(tmp_path, said, refusal):
    path = tmp_path / "rules.yaml"
    path.write_text(said)
    with pytest.raises(UserError, match=refusal):
        read_rules(str(path))


@pytest.mark.parametrize("said", ["5", "tags", "{by: tags}"])
def test_caps_that_are_no_list_are_refused_with_an_option_too(tmp_path, said):
    path = tmp_path / "rules.yaml"
    path.write_text(f"caps: {said}")
    with pytest.raises(UserError, match="caps: expected a list"):
        read_rules(str(path), caps=["tags=5"])


@pytest.mark.parametrize("cap", ["tags", "=5", "tags=", "tags=-1", "tags=x"])
def test_a_cap_that_is_none_is_refused(cap):
    with pytest.raises(UserError, match="--cap: expected BY=NUMBER"):
        read_rules(caps=[cap])
