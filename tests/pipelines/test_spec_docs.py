from __future__ import annotations

from pipelines.spec_docs import FILE, render


def test_docs_of_the_spec_are_current() -> None:
    assert FILE.read_text(encoding="utf-8") == render(), "run: python -m pipelines.spec_docs"


def test_docs_link_to_sections_that_exist() -> None:
    text = render()
    titles = [line.strip("# `") for line in text.splitlines() if line.startswith("## ")]
    headings = {title.translate({ord(sign): None for sign in ".[]"}) for title in titles}
    linked = {part.partition(")")[0] for part in text.split("](#")[1:]}
    assert linked and linked <= headings
