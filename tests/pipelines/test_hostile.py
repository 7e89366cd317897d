"""Prompts that mean harm stay text: in the tables, the tars, the report, the card, the log, the terminal."""

from __future__ import annotations

import json
import re
import sys
import tarfile
import unicodedata
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

from flows.cli import main
from flows.console import Console
from infra.errors import UserError
from infra.printable import printable
from infra.shard import MEMBER
from infra.storage import Storage
from infra.tables import Table
from infra.telemetry import configure, log
from pipelines.card import write_card
from pipelines.dedup import Example, RecordReport
from pipelines.gallery import MAX_TEXT
from pipelines.release import release
from pipelines.repack import pack
from pipelines.report import build_report
from pipelines.verify import verify
from stages.read import ReadMedia

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror=alert(1)> <svg/onload=alert(2)> <iframe srcdoc='<script>alert(3)</script>'>",
    '" onmouseover="alert(1)" x=\'',
    "<!-- <![CDATA[ ]]> --> &lt;b&gt; &#60;i&#62; <plaintext>",
    "[click](javascript:alert(1)) ![x](http://evil.example/x.png) <http://evil.example> https://evil.example",
    "| a | b |\n|---|---|\n| `c` | **d** |\n\n# heading\n\n- item\n\n    code",
    "---\nlicense: mit\nconfigs: []\n---\n# mine",
    "a\r---\rlicense: mit\r---\r<script>alert(1)</script>\r\r# mine",
    "```\n</code></pre>\n~~~",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "\x1b[2J\x1b[31mred\x1b]0;title\x07\x1b]8;;http://evil.example\x1b\\link\x9b2J",
    "line\nbreak\r\nand\rreturn\x0bvertical\x0cfeed\x85next\u2028line\u2029paragraph",
    "\u202egnp.exe\u202c \u2066isolated\u2069 \u200ezero\u200bwidth\ufeff \U000e0041tag",
    "nul \0 and \x7f",
    "{0} {prompt} %s %(x)s %n ${HOME} $(id) `id` ; rm -rf / | cat && x",
    "{{7*7}} {% for x in ().__class__.__mro__ %}{% endfor %} #{7*7} <%= 7 %>",
    "../../etc/passwd",
    "/etc/passwd\0.png",
    "C:\\Windows\\..\\x",
    "' OR 1=1; DROP TABLE samples; --",
    "a.json\tb.mp4",
    "e\u0301" * 200 + "Z\u0351\u036b\u0343" * 50,
)
LONG = "x" * 100_000 + "<b>"
HALF = "half \ud800 a character"
TOKENS = re.compile(r"alert\(|window\.pwned|evil\.example")


def steers(text: str) -> list[str]:
    """Characters of a terminal's output that a person does not see, or that move the cursor."""
    return [
        sign for sign in text if sign not in "\n\t" and unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp", "Cs")
    ]


@pytest.fixture(scope="module")
def generated_of(generate_from: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A dataset that the stages made of such prompts."""
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": text, "tags": [text[:50]], "licence": text[:50], "x": text} for text in HOSTILE
    ]
    rows += [{"prompt": LONG}, {"prompt": HALF}, {"prompt": "plain", "negative_prompt": HOSTILE[0], "id": HOSTILE[13]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = {
        "prompts": {"path": str(path), "near_duplicates": "ignore"},
        "sampler": {"num_inference_steps": 1},
        "layout": {"batch_size": 8},
        "judge": {"backend": "none"},
        "caption": None,
        "score": {"reject_static": False, "reject_duplicates": False},
    }
    return Storage(str(generate_from(**spec)))


def test_parquet_has_every_prompt_as_it_was(generated_of: Storage) -> None:
    rows = Table(generated_of, "samples").read().to_pylist()
    assert {row["prompt"] for row in rows} == {*HOSTILE, "plain"}
    failed = {row["error_type"]: row["prompt"] for row in Table(generated_of, "failures").read().to_pylist()}
    assert failed == {"prompt_too_long": LONG, "bad_text": HALF.replace("\ud800", "\\ud800")}
    tags = {part.strip() for text in HOSTILE for part in text[:50].split(",")}
    assert tags - {""} == {tag for row in rows for tag in row["tags"]}
    assert list(verify(generated_of)) == []


def test_members_are_named_by_sample_ids_and_stay_in_their_folder(generated_of: Storage, tmp_path: Path) -> None:
    rows = {row["sample_id"]: row for row in Table(generated_of, "samples").read().to_pylist()}
    names: list[str] = []
    for shard in generated_of.files("media"):
        with tarfile.open(generated_of.path(shard)) as tar:
            names += tar.getnames()
            tar.extractall(tmp_path / "out", filter="data")
    assert names and all(MEMBER.fullmatch(name) and name.split(".")[0] in rows for name in names)
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")) == sorted(
        names
    )
    for path in (tmp_path / "out").glob("*.json"):
        assert json.loads(path.read_text())["prompt"] == rows[path.stem]["prompt"]


def test_a_release_packs_them_by_sample_id(generated_of: Storage) -> None:
    made = release(generated_of, "packed", pack_bytes=10**9)
    tars = [file["path"] for file in made.files if file["path"].endswith(".tar")]
    names: list[str] = []
    for path in tars:
        with tarfile.open(generated_of.path(path)) as tar:
            names += tar.getnames()
    assert len(names) == 3 * len(HOSTILE) + 3 and all(
        MEMBER.fullmatch(name) for name in names
    )  # png or mp4, json, latents


@pytest.mark.parametrize(
    "change",
    [
        {"shard": "../../../etc/passwd"},
        {"shard": "/etc/passwd"},
        {"shard": "https://evil.example/x.tar"},
        {"shard": ""},
        {"member": "../../escaped.mp4"},
        {"member": "/etc/cron.d/x.mp4"},
        {"member": f"{'1' * 32}.mp4"},
        {"member": "a\nb.mp4"},
    ],
    ids=str,
)
def test_a_row_that_leads_out_of_the_dataset_is_neither_packed_nor_read(
    change: dict[str, str], dataset: Callable[..., Storage]
) -> None:
    import pyarrow as pa

    storage = dataset(accepted=1, rejected=0, failures=0, runs=False)
    table = Table(storage, "samples").read()
    rows = table.to_pylist()
    rows[0]["media"][0] |= change
    spoilt = pa.Table.from_pylist(rows, table.schema)
    with pytest.raises(UserError, match="lies outside of the dataset") as caught:
        pack(storage, spoilt, "releases/x/x.tar")
    assert "\n" not in str(caught.value) and not storage.exists("releases/x/x.tar")
    if "shard" in change:
        read = ReadMedia(storage)
        batch = {name: np.array([rows[0][name]]) for name in ("num_frames", "height", "width")}
        found = read({**batch, "source": np.array([json.dumps(rows[0]["media"][0])], dtype=object)})
        assert "lies outside of the dataset" in found["error"][0]


def test_a_row_with_a_hostile_id_is_not_packed(dataset: Callable[..., Storage]) -> None:
    import pyarrow as pa

    storage = dataset(accepted=1, rejected=0, failures=0, runs=False)
    table = Table(storage, "samples").read()
    rows = [{**table.to_pylist()[0], "sample_id": "../../x", "media": [], "tensors": []}]
    with pytest.raises(UserError, match=r"sample '\.\./\.\./x': is no sample's id"):
        pack(storage, pa.Table.from_pylist(rows, table.schema), "releases/x/x.tar")


class Reader(HTMLParser):
    """The elements of a page, and the text of its prompts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.prompts: list[str] = []
        self._in_prompt = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if dict(attrs).get("class") == "prompt":
            self._in_prompt = True
            self.prompts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_prompt = self._in_prompt and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._in_prompt:
            self.prompts[-1] += data


def test_report_shows_them_as_text_and_nothing_of_them_is_markup(generated_of: Storage) -> None:
    reader = Reader()
    reader.feed(Path(build_report(generated_of, sheet=False).path).read_text())  # line ends as a browser reads them
    assert [tag for tag, _ in reader.elements].count("script") == 1
    assert {tag for tag, _ in reader.elements}.isdisjoint({"iframe", "plaintext", "base", "object", "embed"})
    for tag, attributes in reader.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "srcdoc"], (tag, attributes)
        source = attributes.get("src") or attributes.get("href") or "data:"
        assert source.startswith(("data:", "#")), (tag, source)
    for text in HOSTILE:
        prompt = re.sub("\r\n?", "\n", text)
        assert prompt[:MAX_TEXT] in [shown[: len(prompt[:MAX_TEXT])] for shown in reader.prompts], prompt


@pytest.mark.parametrize("prompt", HOSTILE)
def test_card_keeps_its_header_and_no_prompt_is_markup(
    prompt: str, generated_of: Storage, dataset: Callable[..., Storage]
) -> None:
    """A prompt comes into a card by the command line, and texts of a spec by its settings."""
    text = write_card(generated_of)
    storage = dataset(
        accepted=1,
        rejected=0,
        failures=0,
        command=f"ditmill make {prompt} -n 1",
        spec={"generators": [{"model": prompt}], "sampler": {"dualparal": {"scenes": prompt}}},
    )
    hostile = write_card(storage, out="hostile.md")
    plain, header = (yaml.safe_load(card.split("---\n")[1]) for card in (text, hostile))
    assert list(header) == [key for key in plain if key in header] and header["license"] == "other"
    body = hostile.split("---\n", 2)[2]
    tokens = list(_flat(MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)))
    assert not [token.content for token in tokens if token.type in ("html_block", "html_inline")]
    assert [token.attrs["src"] for token in tokens if token.type == "image"] == ["report/contact_sheet.png"]
    assert not [token for token in tokens if token.type == "link_open"]
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert headings[0] == storage.root.rpartition("/")[2] and "mine" not in headings and "heading" not in headings
    plain_text = [token.content for token in tokens if token.type == "text"]
    assert not [said for said in plain_text if TOKENS.search(said)], "only code may hold it"
    assert steers(hostile) == []


def _flat(tokens: Any) -> Iterator[Any]:
    for token in tokens:
        yield token
        yield from _flat(token.children or ())


@pytest.mark.parametrize("prompt", [*HOSTILE, LONG, HALF])
def test_log_and_terminal_have_it_on_one_line_and_nothing_steers(
    prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(run_id="r")
    log().warning(prompt, sample_id="00", error=prompt, prompt=prompt)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isascii() and steers(line.replace("\x7f", "")) == []
    assert json.loads(line)["prompt"] == prompt or "://" in prompt
    console = Console()
    console.say(printable(prompt))
    console.say(prompt)
    report = RecordReport(examples=[Example("near_duplicate", prompt[:200], prompt[:200])])
    console.records(report)
    assert steers(capsys.readouterr().err) == []


@pytest.mark.parametrize("prompt", HOSTILE)
def test_no_command_sends_it_to_the_terminal_raw(
    prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": f"{prompt} a b c d e f g"}) + "\n" + json.dumps({prompt: "x"})
    )
    spec = {"prompts": {"path": str(tmp_path / "a.jsonl")}, "output": {"uri": str(tmp_path / "out")}}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    (tmp_path / "bad.yaml").write_text(json.dumps({prompt: prompt, "name": prompt}))
    for arguments in (
        ["plan", str(tmp_path / "spec.yaml"), "--no-calibrate"],
        ["plan", str(tmp_path / "bad.yaml")],
        ["plan", str(tmp_path / "spec.yaml"), "--set", f"name={prompt}"],
        ["status", "--", prompt.replace("\0", "")],
        ["release", "--", prompt.replace("\0", ""), "a"],
    ):
        monkeypatch.setattr(sys, "argv", ["ditmill", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.err.startswith("ditmill: ")
        assert steers(said.out + said.err) == []


def test_no_secret_is_left_in_a_dataset(dataset: Callable[..., Storage]) -> None:
    """What older runs wrote of their command and spec is redacted where it is shown."""
    urls = [
        "https://me:hunter2@store/x",
        "s3://KEY:hunter2@b/x",
        "https://store/x?X-Amz-Signature=hunter2&token=hunter2",
    ]
    storage = dataset(
        accepted=1,
        rejected=0,
        failures=1,
        command=f"ditmill run x --set prompts.path={urls[0]} {urls[2]}",
        spec={"generators": [{"model": url} for url in urls], "sampler": {"plan": urls[2]}},
    )
    assert "hunter2" not in write_card(storage) and "hunter2" not in Path(build_report(storage).path).read_text()


def test_no_secret_is_left_in_what_a_run_writes(
    generate_from: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command line, the inputs of records, and what is logged."""
    secret = "https://me:hunter2@store.example/x.png?X-Amz-Signature=hunter2"
    monkeypatch.setattr(sys, "argv", ["ditmill", "run", "x.yaml", "--set", f"prompts.path={secret}"])
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a red cat", "image": secret}) + '\n{"prompt": "a dog"}')
    root = generate_from(prompts={"path": str(tmp_path / "a.jsonl")}, judge={"backend": "none"}, caption=None)
    write_card(Storage(str(root)))
    build_report(Storage(str(root)))
    configure()
    log().warning("cannot be read", error=f"403 for {secret}", url=secret)
    assert "hunter2" not in capsys.readouterr().err
    held = [path for path in root.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert held == []
    for table in ("prompts", "failures", "runs", "samples"):  # Parquet is compressed
        assert "hunter2" not in repr(Table(Storage(str(root)), table).read().to_pylist())
