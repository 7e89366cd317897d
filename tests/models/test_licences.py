from __future__ import annotations

from pathlib import Path

import pytest

from models.licences import licence_of


@pytest.mark.parametrize(
    ("card", "name", "may_train"),
    [
        ("license: apache-2.0", "apache-2.0", "yes"),
        ("license: MIT", "mit", "yes"),
        ("license: openrail++", "openrail++", "yes"),
        ("license: other\nlicense_name: flux-1-dev-non-commercial-license", "flux-1-dev-non-commercial-license", "no"),
        ("license: other\nlicense_name: tencent-hunyuan-community", "tencent-hunyuan-community", "no"),
        ("license: other\nlicense_name: stabilityai-ai-community", "stabilityai-ai-community", "no"),
        ("license: other\nlicense_name: ltx-video-open-weights-license-0-x", "ltx-video-open-weights", "unknown"),
        ("license: other\nlicense_name: somebody-s-own", "somebody-s-own", "unknown"),
        ("license: other", "unknown", "unknown"),
        ("license: [apache-2.0]", "apache-2.0", "yes"),
        ("tags: [video]", "unknown", "unknown"),
        ("license: [", "unknown", "unknown"),
    ],
)
def test_licence_of_reads_the_card(card: str, name: str, may_train: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n\n# A model\n")
    licence = licence_of(str(tmp_path), "somebody/model")
    assert (licence.name, licence.may_train) == (name, may_train)
    assert licence.why


@pytest.mark.parametrize(
    ("beginning", "name"),
    [
        ("                                 Apache License\n                           Version 2.0", "apache-2.0"),
        ("MIT License\n\nCopyright", "mit"),
        ("TENCENT HUNYUAN COMMUNITY LICENSE AGREEMENT", "tencent-hunyuan-community"),
        ("FLUX.1 [dev] Non-Commercial License v1.1", "flux-1-dev-non-commercial-license"),
        ("All rights reserved", "unknown"),
    ],
)
def test_licence_of_reads_a_licence_file(beginning: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text(beginning)
    assert licence_of(str(tmp_path), "somebody/model").name == name


def test_licence_of_is_overridden_by_the_spec(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: llama2\n---\n")
    assert licence_of(str(tmp_path), "model").may_train == "no"
    assert licence_of(str(tmp_path), "model", ("mit", None)).may_train == "yes"
    assert licence_of(str(tmp_path), "model", (None, "yes")).may_train == "yes"


def test_licence_of_the_pack_is_free(tiny_pack: Path) -> None:
    for part in ("generator", "judge", "expander"):
        assert licence_of(str(tiny_pack / part), "pack://tiny").may_train == "yes"
