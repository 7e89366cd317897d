"""What fuzz tests are made of: files as a user writes them, and ways to spoil them."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st

from infra.storage import Storage
from infra.tables import Table
from pipelines.explain import leaves
from pipelines.spec import Spec

REPO = Path(__file__).parents[2]

FULL: dict[str, Any] = {
    **Spec.model_validate({"prompts": {"inline": ["a cat"]}}).model_dump(mode="json"),
    "prompts": {
        "inline": [
            "a cat",
            {"prompt": "a dog", "height": 64, "image": "dog.png", "inputs": [{"role": "a", "uri": "b"}]},
        ],
        "column": "prompt",
        "exclude": ["bench.txt"],
        "near_duplicates": "drop",
        "expand": {"model": "pack://tiny", "variants": 2, "instruction": "More of {prompt}"},
    },
    "generators": [
        {"model": "pack://tiny", "adapters": [{"uri": "lora.safetensors", "weight": 0.5}], "licence": "own"}
    ],
    "sampler": {"num_inference_steps": 4, "shift": 3.0, "dualparal": {"frames": 4, "context": 2, "scenes": "|"}},
    "judge": {"backend": "oracle", "rubric": "default", "thresholds": {"prompt_match": 0.5}},
    "budget": {"accelerator_seconds": 10, "bytes": 1000, "deadline": "90m"},
    "policy": {"endpoints": ["files.lab"], "buckets": ["mine"]},
    "compute": {"limits": {"cpus": 2}, "actors": {"sample": 1}},
}
RUBRIC: dict[str, Any] = {
    "name": "mine",
    "questions": [
        {"name": "match", "text": "Does this {media} show {prompt}?", "threshold": 0.5, "weight": 2, "media": "any"},
        {"name": "clean", "text": "Is it clean? {{Yes}} or {{No}}"},
        {"name": "tagged", "text": "Is it {tags}, without {negative_prompt}, by {extra.the artist}?"},
    ],
}
RECORDS: list[dict[str, Any]] = [
    {"prompt": "a cat", "negative_prompt": "blur", "height": 64, "width": "64", "num_frames": 5, "fps": 8.5, "seed": 1},
    {"prompt": "a dog", "tags": "a,b", "licence": "CC0-1.0", "id": "7", "image": "dog.png", "source": "x"},
    {"prompt": "é 猫 🐈", "inputs": '[{"role": "video", "uri": "s3://b/v.mp4", "sha256": "' + "ab" * 32 + '"}]'},
]
WORDS = (
    "", " ", "\0", "\ud800", "\udcff", "\u202e", "\x1b[2J", "~nobody/x", "~", "..", "a" * 5000, "é" * 300,
    "=cmd|' /C calc'!A0",
    "{0}", "%s", "{{7*7}}", "</script>", "../../etc/passwd", "$(id)", "s3://", "s3://b", "://", "http://[", "https://u:p@h/",
    "a::b", "simplecache::s3://x", "file:///etc/passwd", "/dev/null", "nan", "inf", "1e999", "-0", "9" * 5000,
    "0x" + "f" * 300,
    "2026-99-99", "90m", "9" * 400 + "d", "null", "yes", "<<", "*", "&a", "!!python/object:os.system", "---", "...", "²",
)  # fmt: skip
NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    -0.0,
    1e308,
    5e-324,
    *map(float, ("nan", "inf", "-inf")),
)
TEXTS = st.sampled_from(WORDS) | st.text(max_size=20)
SCALARS = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(), inner, max_size=3),
    max_leaves=6,
) | st.sampled_from([0, 20, 100, 900]).map(lambda depth: _deep(depth) if depth else 10**5000)
SNIPPETS = (
    "!!python/object/apply:os.system ['id']", "!!python/name:os.system", "!!binary '@@'", "!!timestamp x", "!!bool perhaps",
    "!!int ''", "!!float x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!null x", "!<tag:x> 1", "\t", "\n\t- a",
    "&a [*a]",
    "&a {<<: *a}", "*nowhere", "<<: 3", "? [1]\n: 2", "\n---\n", "\n...\n", "%YAML 9.9\n---\n", "\0", "\x85", "\u2028",
    "\ufeff",
    '"\\ud800"', '"\\0"', '"\\U00110000"', "'", '"', "[", "]", "{", "}", "|", ">", "#", "- ", ": ", "? ", "@", "`",
    "=", "2026-99-99",
    "0b" + "1" * 5000, "1" * 5000, ".nan", ".inf", "1:2:3", "seed: 1\nseed: 2\n", "a: &b [1]\nc: [*b, *b]\n",
    "[" * 2000, "- " * 2000,
)  # fmt: skip


def _deep(depth: int) -> Any:
    value: Any = 0
    for at in range(depth):
        value = [value] if at % 2 else {"a": value}
    return value


def _places(value: Any, levels: int = 6) -> Iterator[tuple[Any, Any]]:
    """Each container and key below `value`, as far as the spec itself is deep."""
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in inner if levels else ():
        yield value, key
        yield from _places(item, levels - 1)


def _mutated(whole: dict[str, Any], changes: list[tuple[int, str, Any, str]]) -> dict[str, Any]:
    whole = copy.deepcopy(whole)
    for at, way, value, name in changes:
        places = list(_places(whole))
        if not places:
            break
        node, key = places[at % len(places)]
        if way == "replace":
            node[key] = value
        elif way == "drop":
            del node[key]
        elif isinstance(node, dict):
            node[name] = value if way == "add" else node.pop(key)
        else:
            node.insert(key, value)
    return whole


def mutations(whole: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    ways = st.sampled_from(["replace", "replace", "drop", "add", "rename"])
    change = st.tuples(st.integers(0, 10_000), ways, VALUES, TEXTS)
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _mutated(whole, changes))


def _spliced(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for at, length, new in changes:
        start = at % (len(data) + 1)
        data = data[:start] + new + data[start + length :]
    return data


def splices(data: bytes, pieces: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """`data` with a few pieces put in, or in the place of others."""
    change = st.tuples(st.integers(0, 1 << 20), st.sampled_from([0, 0, 1, 4, 40]), pieces)
    return st.lists(change, min_size=1, max_size=4).map(lambda changes: _spliced(data, changes))


def _yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True, sort_keys=False).encode()


SNIPPET = (st.sampled_from(SNIPPETS) | st.text(max_size=5)).map(lambda text: text.encode("utf-8", "surrogatepass"))


def yaml_files(whole: dict[str, Any]) -> st.SearchStrategy[bytes]:
    lines = _yaml(whole).decode().splitlines(keepends=True)
    shuffled = st.permutations(lines).map(lambda found: "".join(found).encode())
    return splices(_yaml(whole), SNIPPET | st.binary(max_size=4)) | st.binary(max_size=200) | shuffled


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {str(name): [row.get(name) for row in rows] for name in names}
    pq.write_table(
        pa.table({name: [None if x is None else str(x) for x in column] for name, column in columns.items()}), sink
    )
    return sink.getvalue()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(str(name) for row in rows for name in row))
    writer.writeheader()
    writer.writerows([{str(name): value for name, value in row.items()} for row in rows])
    return text.getvalue().encode("utf-8", "surrogatepass")


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps({str(name): value for name, value in row.items()}) for row in rows).encode()


FORMATS: dict[str, bytes] = {
    ".txt": "\n".join(row["prompt"] for row in RECORDS).encode(),
    ".jsonl": _jsonl(RECORDS),
    ".csv": _csv(RECORDS),
    ".parquet": _parquet(RECORDS),
    ".jsonl.gz": gzip.compress(_jsonl(RECORDS), mtime=0),
    ".csv.zst": bytes(pa.Codec("zstd").compress(_csv(RECORDS))),
}
PIECES = (
    st.binary(max_size=8)
    | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.sampled_from([b'"', b",", b"\n", b"\r", b"\0"])
)
SMALL = (
    st.none()
    | st.booleans()
    | st.sampled_from([number for number in NUMBERS if abs(number) < 10**400 or number != number])
    | TEXTS
)
NESTED = st.recursive(
    SMALL, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
)
FIELD = st.sampled_from([*dict.fromkeys(name for row in RECORDS for name in row), "first_frame", "video", "x"])
ROWS = st.lists(
    st.builds(lambda prompt, fields: {"prompt": prompt, **fields}, NESTED, st.dictionaries(FIELD, NESTED, max_size=3)),
    min_size=1,
    max_size=3,
)
HOSTILE_TABLES = (
    pa.table([["a"], ["b"]], names=["prompt", "prompt"]),
    pa.table({"prompt": ["a"], "when": pa.array([2**62], pa.timestamp("ns"))}),
    pa.table({"prompt": ["a"], "when": pa.array([2**62], pa.timestamp("us"))}),
    pa.table({"prompt": ["a"], "when": pa.array([2**50], pa.timestamp("s"))}),
    pa.table({"prompt": ["a"], "when": pa.array([2**31 - 1], pa.date32())}),
    pa.table({"prompt": ["a"], "when": pa.array([2**50], pa.duration("s"))}),
    pa.table({"prompt": ["a"], "when": pa.array([1], pa.timestamp("us", "Mars/Olympus"))}),
    pa.table({"prompt": [1]}),
    pa.table({"prompt": [["a"]]}),
    pa.table({"prompt": ["a"], "height": [[1]]}),
    pa.table({"prompt": ["a"], "tags": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))}),
    pa.table({"prompt": pa.array(["a"]).dictionary_encode(), "x": pa.array([None], pa.null())}),
    pa.table({"prompt": ["a"], "inputs": [[{"role": "video", "uri": "x", "start": float("nan")}]]}),
)  # fmt: skip


def _written(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


RECORD_FILES = st.one_of(
    st.sampled_from(list(FORMATS)).flatmap(lambda suffix: st.tuples(st.just(suffix), splices(FORMATS[suffix], PIECES))),
    st.tuples(st.just(".jsonl"), ROWS.map(_jsonl)),
    st.tuples(st.just(".csv"), ROWS.map(_csv)),
    st.tuples(st.just(".parquet"), st.sampled_from(HOSTILE_TABLES).map(_written)),
)
KEYS = st.sampled_from([key for key, _ in leaves(Spec)]).map(lambda key: key.replace("buckets.", "buckets.0."))
ASSIGNED = (
    st.sampled_from(SNIPPETS) | TEXTS | VALUES.map(lambda value: repr(value) if not isinstance(value, int) else "1")
)
ASSIGNMENTS = st.lists(
    st.builds(lambda key, value: f"{key}={value}", KEYS | TEXTS | st.lists(TEXTS, max_size=4).map(".".join), ASSIGNED)
    | TEXTS,
    max_size=3,
) | st.lists(
    st.sampled_from(["seed=7", "layout.batch_size=2", "buckets.0.height=128", "caption=null", "policy={}", "name=b"])
    | st.builds(
        "{}={}".format, st.sampled_from(["seed", "sampler.shift", "layout.threads", "prompts.column"]), ASSIGNED
    ),
    max_size=2,
)
SAMPLE = Table(Storage(str(REPO / "tests" / "data" / "v1")), "samples").read(["sample_id"])["sample_id"][0].as_py()
LABELS = f"sample_id,label,note\n{SAMPLE},y,sharp\n{SAMPLE},n,'=too dark\n\n".encode()
CELLS = st.lists(st.lists(TEXTS | st.just(SAMPLE), max_size=4), max_size=4)
LABEL_FILES = st.one_of(
    splices(LABELS, PIECES),
    splices(LABELS.decode().encode("utf-16"), PIECES),
    CELLS.map(lambda rows: b"sample_id;label\n" + "\n".join(map(";".join, rows)).encode("utf-8", "surrogatepass")),
    st.binary(max_size=100),
)


def _dumps(value: Any) -> bool:
    """Whether YAML can be written of it at all."""
    try:
        _yaml(value)
    except (ValueError, RecursionError, TypeError):
        return False
    return True


RUBRIC_FILES = mutations(RUBRIC).filter(_dumps).map(_yaml) | yaml_files(RUBRIC)
