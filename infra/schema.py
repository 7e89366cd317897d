"""Arrow schemas of a dataset's tables, written down once.

Schema v1 of `samples` is frozen: later versions of ditmill put new facts into `extra_json` or into annotations. There are
no map columns and no type depends on the data, so that HF datasets, Polars, DuckDB and plain pyarrow all read every part.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1

UTC = pa.timestamp("us", tz="UTC")

INPUT = pa.struct(
    [
        ("role", pa.string()),
        ("uri", pa.string()),
        ("sha256", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
    ]
)
ADAPTER = pa.struct([("uri", pa.string()), ("sha256", pa.string()), ("weight", pa.float64())])
MEDIA = pa.struct(
    [
        ("role", pa.string()),
        ("shard", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("nbytes", pa.int64()),
        ("mime", pa.string()),
        ("codec", pa.string()),
        ("sha256", pa.string()),
    ]
)
TENSOR = pa.struct(
    [
        ("role", pa.string()),
        ("shard", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("nbytes", pa.int64()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("layout", pa.string()),
        ("sha256", pa.string()),
    ]
)
SCORE = pa.struct([("name", pa.string()), ("value", pa.float64())])
CAPTION = pa.struct(
    [
        ("style", pa.string()),
        ("language", pa.string()),
        ("scene", pa.int32()),
        ("text", pa.string()),
        ("model", pa.string()),
    ]
)
COST = pa.struct([("stage", pa.string()), ("accelerator_seconds", pa.float64()), ("cpu_seconds", pa.float64())])

SAMPLES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("noise_key", pa.string()),
        ("run_id", pa.string()),
        ("recipe", pa.string()),
        ("prompt_id", pa.string()),
        ("source_prompt", pa.string()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("sample_index", pa.int64()),
        ("seed", pa.int64()),
        ("inputs", pa.list_(INPUT)),
        ("model", pa.string()),
        ("model_sha256", pa.string()),
        ("adapters", pa.list_(ADAPTER)),
        ("plan_id", pa.string()),
        ("plan_json", pa.string()),
        ("layout_json", pa.string()),
        ("num_inference_steps", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("nfe", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("media", pa.list_(MEDIA)),
        ("tensors", pa.list_(TENSOR)),
        ("scores", pa.list_(SCORE)),
        ("verdict", pa.string()),
        ("reasons", pa.list_(pa.string())),
        ("judge", pa.string()),
        ("rubric", pa.string()),
        ("caption", pa.string()),
        ("captions", pa.list_(CAPTION)),
        ("tags", pa.list_(pa.string())),
        ("split", pa.string()),
        ("parent_ids", pa.list_(pa.string())),
        ("round", pa.int32()),
        ("cost", pa.list_(COST)),
        ("node", pa.string()),
        ("device", pa.string()),
        ("code_version", pa.string()),
        ("created_at", UTC),
        ("extra_json", pa.string()),
    ]
)

FAILURES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("attempt", pa.int32()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("sample_index", pa.int64()),
        ("stage", pa.string()),
        ("error_type", pa.string()),
        ("error", pa.string()),
        ("cost", pa.list_(COST)),
        ("run_id", pa.string()),
        ("node", pa.string()),
        ("created_at", UTC),
    ]
)

PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("source_prompt", pa.string()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("variant", pa.int32()),
        ("expander", pa.string()),
        ("inputs", pa.list_(INPUT)),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("seed", pa.int64()),
        ("tags", pa.list_(pa.string())),
        ("licence", pa.string()),
        ("run_id", pa.string()),
        ("created_at", UTC),
        ("extra_json", pa.string()),
    ]
)

SOURCES = pa.schema(
    [
        ("source_id", pa.string()),  # hash of uri and index: what becomes of a file depends on how it is cut
        ("index", pa.string()),  # hash of how sources are cut
        ("uri", pa.string()),
        ("kind", pa.string()),  # video, image; empty where it was not found out
        ("sha256", pa.string()),
        ("nbytes", pa.int64()),
        ("seconds", pa.float64()),
        ("prompt_ids", pa.list_(pa.string())),  # of its clips
        ("dropped", pa.list_(pa.struct([("start", pa.float64()), ("end", pa.float64()), ("reason", pa.string())]))),
        ("error_type", pa.string()),
        ("error", pa.string()),
        ("run_id", pa.string()),
        ("created_at", UTC),
        ("extra_json", pa.string()),
    ]
)

EMBEDDINGS = pa.schema(
    [
        ("text_id", pa.string()),
        ("text", pa.string()),
        ("negative", pa.bool_()),  # whether it was encoded as a negative prompt
        ("encoder_sha256", pa.string()),
        ("family", pa.string()),
        ("max_sequence_length", pa.int32()),
        ("tokens", pa.int32()),  # of the first of its arrays, prompt_embeds
        ("tensors", pa.list_(TENSOR)),  # one file, with all arrays of the text
        ("run_id", pa.string()),
        ("created_at", UTC),
        ("extra_json", pa.string()),
    ]
)

ANNOTATIONS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("kind", pa.string()),  # score, verdict, caption, label, tag, withdrawn, note
        ("name", pa.string()),  # which score, caption style or label
        ("value", pa.string()),
        ("annotator", pa.string()),
        ("rubric", pa.string()),
        ("run_id", pa.string()),
        ("created_at", UTC),
    ]
)

RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("event", pa.string()),  # started, indexed (recipe curate), ended
        ("status", pa.string()),  # running, then reached, exhausted, budget, stopped, failed
        ("command", pa.string()),
        ("spec_json", pa.string()),
        ("plan_file", pa.string()),
        ("planned_through", pa.int64()),
        ("planned", pa.int64()),
        ("accepted", pa.int64()),
        ("rejected", pa.int64()),
        ("failed", pa.int64()),
        ("allocated_accelerator_seconds", pa.float64()),
        ("overhead_json", pa.string()),
        ("versions_json", pa.string()),
        ("hosts_json", pa.string()),
        ("licences_json", pa.string()),
        ("reproducible", pa.string()),
        ("created_at", UTC),
        ("extra_json", pa.string()),
    ]
)

TABLES: dict[str, pa.Schema] = {
    "prompts": PROMPTS,
    "sources": SOURCES,
    "embeddings": EMBEDDINGS,
    "samples": SAMPLES,
    "failures": FAILURES,
    "annotations": ANNOTATIONS,
    "runs": RUNS,
}

KEYS: dict[str, tuple[str, ...]] = {
    "prompts": ("prompt_id",),
    "sources": ("source_id",),
    "embeddings": ("text_id",),
    "samples": ("sample_id",),
    "failures": ("sample_id", "attempt"),
    "annotations": ("sample_id", "kind", "name", "annotator", "rubric", "value", "run_id"),
    "runs": ("run_id", "event"),
}
"""What makes a row of each table itself: the first commit of a key wins."""
