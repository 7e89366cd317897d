from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from infra.schema import PROMPTS
from pipelines.identity import Shape
from pipelines.record_files import FIELDS, filesystem, read_rows
from pipelines.records import (
    PromptRecord,
    RecordReport,
    draw_bucket,
    expand_rows,
    read_records,
    resolve_prompts,
    unique_records,
    variant_ids,
)
from pipelines.spec import Bucket, Expand, Prompts, Spec, Storage, parse_spec

BUCKETS = (Bucket(),)
EXAMPLES = Path(__file__).parents[2] / "pipelines" / "examples"


def write(folder: Path, name: str, data: str | bytes) -> str:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def read(path: str, **prompts: Any) -> list[PromptRecord]:
    return list(read_records(Prompts(path=path, **prompts), BUCKETS, 0))


def inline(*items: Any) -> list[PromptRecord]:
    return list(read_records(Prompts(inline=items), BUCKETS, 0))


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b"red\n\nblue\n"),
        ("windows.txt", b"\xef\xbb\xbfred\r\n\r\n  blue  \r\n"),
        ("a.txt.gz", gzip.compress(b"red\n\nblue")),
        ("a.txt.zst", zstd(b"red\n\nblue\n")),
        ("a.jsonl", b'{"prompt": "red"}\n\n{"prompt": "blue"}\n'),
        ("A.NDJSON", b'\xef\xbb\xbf{"prompt": "red"}\n \n{"prompt": "blue"}'),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "red"}\n\n{"prompt": "blue"}\n')),
        ("a.csv", b"\xef\xbb\xbfid,prompt\n,red\n\n,blue\n"),
        ("a.csv.zst", zstd(b"prompt\r\nred\r\n\r\nblue\r\n")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_read_records_reads_every_format_and_counts_blank_lines(tmp_path: Path, name: str, data: bytes) -> None:
    report = RecordReport()
    records = list(read_records(Prompts(path=write(tmp_path, name, data)), BUCKETS, 5, report))
    assert [record.prompt for record in records] == ["red", "blue"]
    assert (report.read, report.blank, report.bad) == (2, 1, 0)
    assert records[0] == PromptRecord("red", 64, 64, 17, 8.0, 5)


def test_read_records_reads_parquet_row_group_by_row_group(tmp_path: Path) -> None:
    table = pa.table(
        {
            "caption": [f"prompt {at}" for at in range(10)],
            "height": pa.array([480.0, None] * 5),  # integers with gaps, as pandas writes them
            "tags": [["a", "b"], None] * 5,
            "source": [{"page": at} for at in range(10)],
            "thumbnail": [b"\x89PNG"] * 10,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    records = read(str(tmp_path / "a.parquet"), column="caption")
    assert [record.prompt for record in records] == [f"prompt {at}" for at in range(10)]
    assert [record.height for record in records[:2]] == [480, 64]
    assert [record.tags for record in records[:2]] == [("a", "b"), ()]
    assert records[3].extra == {"source": {"page": 3}}


def test_read_records_reads_all_files_of_a_pattern_in_order(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        write(tmp_path, f"{name}.txt", name)
    assert [record.prompt for record in read(str(tmp_path / "*.txt"))] == ["a", "b", "c"]


def test_read_records_reads_any_fsspec_url() -> None:
    import fsspec

    with fsspec.open("memory://prompts/a.jsonl", "wb") as file:
        file.write(b'{"prompt": "red", "image": "red.png"}\n')
    with fsspec.open("memory://prompts/red.png", "wb") as file:
        file.write(b"pixels")
    (record,) = read("memory://prompts/a.jsonl")
    assert record.inputs[0].uri == "memory:///prompts/red.png"
    assert record.inputs[0].sha256 == hashlib.sha256(b"pixels").hexdigest()


def test_read_records_reads_s3_at_the_endpoint_of_the_output(s3_endpoint: str) -> None:
    storage = Storage(endpoint_url=s3_endpoint, region="us-east-1", allow_http=True)
    fs = filesystem("s3://bucket", storage)[0]
    fs.pipe("bucket/records/a.jsonl.gz", gzip.compress(b'{"prompt": "red", "image": "red.png"}\n{"prompt": "blue"}\n'))
    fs.pipe("bucket/records/b.csv", b"prompt\ngreen\n")
    fs.pipe("bucket/records/red.png", b"pixels")
    pq.write_table(pa.table({"prompt": ["grey"]}), "bucket/records/c.parquet", filesystem=fs)
    prompts = [Prompts(path=f"s3://bucket/records/{name}") for name in ("*.jsonl.gz", "b.csv", "c.parquet")]
    records = [record for one in prompts for record in read_records(one, BUCKETS, 0, storage=storage)]
    assert [record.prompt for record in records] == ["red", "blue", "green", "grey"]
    assert records[0].inputs[0].uri == "s3://bucket/records/red.png"
    assert records[0].inputs[0].sha256 == hashlib.sha256(b"pixels").hexdigest()
    with pytest.raises(UserError, match=r"^prompts\.path: s3://bucket/none\.txt does not exist"):
        list(read_records(Prompts(path="s3://bucket/none.txt"), BUCKETS, 0, storage=storage))


def test_read_records_takes_the_fields_of_a_record(tmp_path: Path) -> None:
    fields = {
        "prompt": "a cat",
        "negative_prompt": "blurry",
        "height": 480,
        "width": "832",
        "num_frames": 81,
        "fps": 16,
        "seed": 7,
        "tags": "pets,  cute,,pets",
        "licence": "CC0-1.0",
        "id": 12,
        "aesthetic": 0.5,
        "when": None,
    }
    (record,) = read(write(tmp_path, "a.jsonl", json.dumps(fields)))
    assert record == PromptRecord(
        prompt="a cat",
        height=480,
        width=832,
        num_frames=81,
        fps=16.0,
        seed=7,
        negative_prompt="blurry",
        tags=("pets", "cute"),
        licence="CC0-1.0",
        id="12",
        extra={"aesthetic": 0.5, "id": "12"},
    )


def test_read_records_reads_the_same_from_json_and_csv(tmp_path: Path) -> None:
    json_file = write(
        tmp_path, "a.jsonl", '{"prompt": "a, b", "height": 128, "fps": 12.5, "tags": ["x", "y"], "id": "7"}'
    )
    csv_file = write(tmp_path, "a.csv", 'prompt,height,fps,tags,id,seed\n"a, b",128,12.5,"x,y",7,\n')
    assert read(json_file) == read(csv_file)


def test_read_records_finds_and_hashes_inputs_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "cat.png", b"cat")
    (tmp_path / "records").mkdir()
    known = "ab" * 32
    fields = {
        "prompt": "a cat",
        "image": "../cat.png",
        "inputs": [{"role": "video", "uri": "s3://bucket/v.mp4", "sha256": known.upper(), "start": 1, "end": 2.5}],
    }
    write(tmp_path, "records/a.jsonl", json.dumps(fields))
    monkeypatch.chdir(tmp_path)
    (record,) = read("records/a.jsonl")
    video, image = record.inputs
    assert (video.role, video.uri, video.sha256, video.start, video.end) == (
        "video",
        "s3://bucket/v.mp4",
        known,
        1.0,
        2.5,
    )
    assert (image.role, image.sha256) == ("first_frame", hashlib.sha256(b"cat").hexdigest())
    assert Path(image.uri).is_absolute()
    assert Path(image.uri).read_bytes() == b"cat"


def test_read_records_passes_on_records_that_fail_by_themselves(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": ""}',
        b'{"prompt": null}',
        b'{"prompt": "caf\xe9"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "no image", "image": "missing.png"}',
        json.dumps({"prompt": "x" * 200_000}).encode(),
        b'{"prompt": "fine"}',
    ]
    report = RecordReport()
    path = write(tmp_path, "a.jsonl", b"\n".join(lines))
    spec = Spec(prompts=Prompts(path=path, near_duplicates="ignore"))
    rows = list(resolve_prompts(spec, report))
    assert [row["prompt"][:20] for row in rows] == ["", "caf\\xe9", "\\ud800", "no image", "x" * 20, "fine"]
    assert [json.loads(row["extra_json"] or "{}") for row in rows[1:4]] == [
        {"bad_text": True},
        {"bad_text": True},
        {"bad_input": f"{tmp_path}/missing.png cannot be read (FileNotFoundError)"},
    ]
    assert (report.read, report.bad, report.identical) == (7, 5, 1)
    pa.Table.from_pylist(rows, PROMPTS)


def test_read_records_decodes_bad_utf8_alike_in_every_format(tmp_path: Path) -> None:
    bad = b"caf\xe9"
    as_text = pa.Array.from_buffers(pa.string(), 1, pa.array([bad]).buffers())  # Parquet does not check its text
    pq.write_table(pa.table({"prompt": as_text}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"prompt": pa.array([bad])}), tmp_path / "bytes.parquet")
    paths = [
        write(tmp_path, "a.txt", bad),
        write(tmp_path, "a.csv", b"prompt\n" + bad),
        write(tmp_path, "a.jsonl", b'{"prompt": "' + bad + b'"}'),
        str(tmp_path / "text.parquet"),
        str(tmp_path / "bytes.parquet"),
    ]
    for path in paths:
        (record,) = read(path)
        assert (record.prompt, record.extra) == ("caf\\xe9", {"bad_text": True}), path


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"", ["holds no prompts"]),
        ("a.txt", b"\n \n", ["holds no prompts"]),
        ("a.csv", b"prompt\n", ["holds no prompts"]),
        ("a.json", b"[]", ["unknown format", ".jsonl"]),
        ("a.txt", "red".encode("utf-16"), ["UTF-16", "UTF-8"]),
        ("a.txt.gz", gzip.compress(os.urandom(9999))[:-20], ["damaged"]),
        ("a.txt.zst", b"no zstd", ["cannot be read", "write it again"]),
        ("a.parquet", b"no parquet at all", ["damaged"]),
        ("a.jsonl", b'{"text": "a"}', ["line 1", "'prompt'", "found text", "prompts.column"]),
        ("a.csv", b"text,id\na,1\n", ["line 1", "'prompt'", "found text, id", "prompts.column"]),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"', ["line 2", "is not JSON", "column 10"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "is not JSON"]),
        ("a.jsonl", b'["a"]', ["line 1", "expected an object", "found list"]),
        ("a.jsonl", b'{"prompt": 7}', ["line 1", "prompt: expected a text, found 7"]),
        ("a.jsonl", b'{"prompt": "a", "height": "tall"}', ["line 1", "height: expected a whole number", "'tall'"]),
        ("a.jsonl", b'{"prompt": "a", "height": true}', ["height: expected", "True"]),
        ("a.jsonl", b'{"prompt": "a", "num_frames": 1.5}', ["num_frames: expected", "1.5"]),
        ("a.jsonl", b'{"prompt": "a", "fps": 0}', ["fps: expected a number above 0, found 0"]),
        ("a.jsonl", b'{"prompt": "a", "seed": -1}', ["seed: expected a whole number from 0"]),
        ("a.jsonl", b'{"prompt": "a", "tags": [1]}', ["tags: expected a list of texts"]),
        ("a.jsonl", b'{"prompt": "a", "image": {"bytes": ""}}', ["image: expected a path or URL"]),
        ("a.jsonl", b'{"prompt": "a", "inputs": [{"uri": "x"}]}', ["inputs.0.role: expected a text, found None"]),
        (
            "a.jsonl",
            b'{"prompt": "a", "inputs": [{"role": "v", "url": "x"}]}',
            ["inputs.0: expected an object of role"],
        ),
        ("a.csv", b"prompt,height\na,64\nb,x\n", ["line 3", "height"]),
        ("a.csv", b"prompt\na,b\n", ["line 2", "expected 1 cells, found 2"]),
    ],
)
def test_read_records_says_a_users_mistake_in_one_line(
    tmp_path: Path, name: str, data: bytes, words: list[str]
) -> None:
    path = write(tmp_path, name, data)
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"prompts.path: {path}")
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("path", ["missing.txt", "*.txt", "nope://x.txt", ".", "memory://missing.txt"])
def test_read_records_names_a_file_that_is_not_there(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^prompts\.path: .*; \w+"):
        read(path)


def test_read_records_names_the_inline_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^prompts\.inline\.1: height: expected"):
        inline("a", {"prompt": "b", "height": "x"})
    with pytest.raises(UserError, match=r"^prompts\.inline\.0: has no column 'prompt', found text"):
        inline({"text": "b"})


def test_read_records_holds_no_more_than_it_must(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\ntwo\n")
    rows = read_rows(path, key="prompts.path")
    assert next(rows).fields == {"prompt": "one"}  # the first is out before the last is read


TEXTS = st.text() | st.sampled_from(["a cat", "\x00", "\ud800", " ", "é" * 50])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
KNOWN = st.sampled_from(
    ["inputs", "image", "height", "width", "num_frames", "fps", "seed", "tags", "licence", "id", "negative_prompt", "x"]
)
RECORDS = st.builds(
    lambda prompt, fields: {"prompt": prompt, **fields}, TEXTS, st.dictionaries(KNOWN, VALUES, max_size=3)
)
HARD = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@HARD
@given(st.lists(TEXTS | RECORDS | st.dictionaries(TEXTS, VALUES, max_size=3), min_size=1, max_size=4))
def test_any_inline_records_give_rows_or_one_line(items: list[Any]) -> None:
    try:
        rows = list(resolve_prompts(parse_spec({"prompts": {"inline": items}})))
    except UserError as error:
        assert "\n" not in str(error)
        return
    pa.Table.from_pylist(rows, pa.schema([field for field in PROMPTS if field.name in rows[0]]))


@HARD
@given(
    st.sampled_from([".txt", ".jsonl", ".csv", ".parquet", ".txt.gz", ".csv.zst"]),
    st.binary()
    | st.lists(RECORDS, min_size=1, max_size=4).map(lambda items: "\n".join(map(json.dumps, items)).encode()),
)
def test_any_file_gives_records_or_one_line(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = write(tmp_path, f"any{suffix}", data)
    try:
        for record in read(path):
            record.prompt_id()
            record.prompt.encode()
    except UserError as error:
        assert str(error).startswith(f"prompts.path: {path}")


@HARD
@given(st.lists(st.text(min_size=1), min_size=1, max_size=5), st.lists(st.text(), max_size=5), st.integers(0, 5))
def test_ids_do_not_change_when_records_are_added(old: list[str], new: list[str], at: int) -> None:
    buckets = (Bucket(), Bucket(height=128), Bucket(width=128, weight=3))

    def ids(texts: list[str]) -> list[str]:
        spec = Spec(prompts=Prompts(inline=tuple(texts), near_duplicates="ignore"), buckets=buckets)
        return [row["prompt_id"] for row in resolve_prompts(spec)]

    mixed = ids([*old[:at], *new, *old[at:]])
    assert set(ids(old)) <= set(mixed)
    assert [one for one in mixed if one in set(ids(old))] != []
    assert len(mixed) == len(set(mixed))


def test_draw_bucket_follows_the_weights() -> None:
    buckets = (Bucket(height=64), Bucket(height=128, weight=3))
    drawn = Counter(draw_bucket(buckets, f"prompt {at}", 0).height for at in range(4000))
    assert abs(drawn[128] / 4000 - 0.75) < 0.03  # more than four standard deviations


def test_draw_bucket_moves_prompts_only_into_a_bucket_that_was_added() -> None:
    old = (Bucket(height=64), Bucket(height=128, weight=2))
    new = (*old, Bucket(height=256))
    prompts = [f"prompt {at}" for at in range(1000)]
    moved = [
        draw_bucket(new, prompt, 0).height
        for prompt in prompts
        if draw_bucket(new, prompt, 0) != draw_bucket(old, prompt, 0)
    ]
    assert 190 < len(moved) < 310  # a quarter
    assert set(moved) == {256}


def test_draw_bucket_is_golden_and_depends_on_the_seed() -> None:
    buckets = (Bucket(height=64), Bucket(height=128), Bucket(height=256))
    heights = [draw_bucket(buckets, f"prompt {at}", 0).height for at in range(8)]
    assert heights == [256, 64, 128, 128, 128, 64, 256, 128]
    assert heights != [draw_bucket(buckets, f"prompt {at}", 1).height for at in range(8)]


def test_draw_bucket_lets_the_record_choose_among_buckets() -> None:
    image, video = Bucket(height=1024, width=1024, num_frames=1), Bucket(height=480, width=832, num_frames=81)
    for at in range(10):
        assert draw_bucket((image, video), str(at), 0, {"num_frames": 1}) == Shape(1024, 1024, 1, 8.0)
        assert draw_bucket((image, video), str(at), 0, {"num_frames": 5}).num_frames == 5


def test_resolve_prompts_gives_the_rows_of_the_table() -> None:
    prompts = Prompts(inline=("a", {"prompt": "b", "tags": ["x"], "seed": 3, "page": 7}))
    first, second = resolve_prompts(Spec(prompts=prompts, seed=9))
    assert set(first) == set(PROMPTS.names) - {"run_id", "created_at"}
    assert (first["prompt"], first["source_prompt"], first["variant"], first["expander"]) == ("a", "a", 0, "")
    assert (first["seed"], first["extra_json"]) == (9, "")
    assert (second["seed"], second["tags"], json.loads(second["extra_json"])) == (3, ["x"], {"page": 7})


def test_tags_licence_and_other_columns_are_not_identity() -> None:
    report = RecordReport()
    prompts = Prompts(
        inline=("a", {"prompt": "a", "tags": "x", "licence": "MIT", "page": 7}, {"prompt": "a", "id": "1"})
    )
    assert [record.id for record in unique_records(Spec(prompts=prompts), report)] == ["", "1"]
    assert (report.read, report.identical, report.kept) == (3, 1, 2)


def test_expand_rows_keeps_the_source_and_knows_its_ids_before_the_texts() -> None:
    (record,) = inline({"prompt": "a cat", "licence": "MIT"})
    rows = expand_rows(record, ["a cat, running", "a cat, \ud800"], "ab" * 16, keep_original=True)
    assert [row["prompt"] for row in rows] == ["a cat", "a cat, running", "a cat, \\ud800"]
    assert {row["source_prompt"] for row in rows} == {"a cat"}
    assert [(row["variant"], row["expander"]) for row in rows] == [(0, ""), (0, "ab" * 16), (1, "ab" * 16)]
    assert [row["extra_json"] for row in rows] == ["", "", '{"bad_text": true}']
    expand = Expand(variants=2, keep_original=True)
    assert [row["prompt_id"] for row in rows] == variant_ids(record, expand, "ab" * 16)
    assert variant_ids(record, None) == [record.prompt_id()] == variant_ids(record, expand, "ab" * 16)[:1]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_example_prompts_are_twenty_good_ones(name: str) -> None:
    report = RecordReport()
    spec = Spec(prompts=Prompts(path=str(EXAMPLES / name)))
    prompts = [record.prompt for record in unique_records(spec, report)]
    assert (report.kept, report.bad, report.near_duplicates, report.blank) == (20, 0, 0, 0)
    assert prompts[0] == "a red circle moving right on a white background"


def test_docs_name_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
    rows = page.split("## Fields")[1].split("\n## ")[0].splitlines()
    named = {name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == FIELDS
