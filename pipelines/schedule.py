"""Scheduled runs in the spec: when they tick, what a tick makes, and who is told."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from hashlib import blake2b
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator, Field, field_validator, model_validator

from infra.storage import Storage
from infra.tables import Table
from pipelines.sections import Section

TICK_DOMAIN = "ditmill/tick/v1"
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

Event = Literal["failed", "paused", "finished"]


class Notify(Section):
    """Who is told how a run ended."""

    webhook: str | None = Field(
        None,
        description="URL that gets a JSON object by POST; $NAME takes it from the environment, where secrets belong.",
    )
    block: str | None = Field(
        None,
        description="A Prefect notification block, such as slack-webhook/team, on the server that runs are told to.",
    )
    events: tuple[Event, ...] = Field(
        ("failed", "paused", "finished"), description="What to tell; paused is a breach of the guards."
    )

    @field_validator("webhook")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\$[A-Za-z_]\w*|https?://\S+", value):
            raise ValueError("expected an http(s) URL, or $NAME of an environment variable that holds one")
        return value


class Schedule(Section):
    """When `ditmill deploy` has it run, and what each tick makes."""

    cron: str | None = Field(None, description="Cron expression of five fields, such as 0 3 * * *.")
    every: str | None = Field(None, description="Instead of cron: a duration such as 6h (also s, m, d).")
    timezone: str = Field("UTC", description="Of the cron expression; an IANA name.")
    epoch: Literal["scheduled_time", "new_prompts"] = Field(
        "scheduled_time",
        description="scheduled_time: a tick's nominal time enters every seed, so that each makes new samples, and target"
        " counts those of the tick; new_prompts: a tick reads the prompts anew and makes what the dataset lacks of them.",
    )
    tick: Annotated[str | None, BeforeValidator(lambda value: _utc(value))] = Field(
        None,
        description="Nominal time of one tick, ISO 8601, UTC if it says no zone. A deployment fills it in; set it to make"
        " a tick again, or to go on with it, by hand.",
    )

    @field_validator("every")
    @classmethod
    def _is_duration(cls, value: str | None) -> str | None:
        if value is not None and (not re.fullmatch(r"\d+[smhd]", value) or not int(value[:-1])):
            raise ValueError("expected a duration such as 6h (also s, m, d)")
        return value

    @field_validator("timezone")
    @classmethod
    def _is_zone(cls, value: str) -> str:
        from zoneinfo import available_timezones

        if value not in available_timezones():
            raise ValueError("expected an IANA time zone, such as Europe/Berlin")
        return value

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, value: str | None) -> str | None:
        if value is not None and len(value.split()) != 5:
            raise ValueError("expected five fields: minute, hour, day of month, month, day of week")
        return value

    @model_validator(mode="after")
    def _one_clock(self) -> Schedule:
        if self.cron and self.every:
            raise ValueError("give one of cron and every")
        if self.tick and self.epoch == "new_prompts":
            raise ValueError("tick belongs to epoch: scheduled_time; with new_prompts every tick makes what is lacking")
        return self

    @property
    def interval(self) -> timedelta | None:
        return None if self.every is None else timedelta(**{UNITS[self.every[-1]]: int(self.every[:-1])})

    def seed(self, seed: int) -> int:
        """The seed of a tick's record whose own seed, or the spec's, is `seed`; in 0..2^63-1."""
        if self.tick is None:
            return seed
        digest = blake2b(f"{TICK_DOMAIN}\n{seed}\n{self.tick}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def rows(self, storage: Storage) -> pc.Expression | None:
        """What tells rows of this tick, whichever runs made them, from those of others; None where all rows count."""
        if self.tick is None:
            return None
        runs = Table(storage, "runs").read(["run_id", "spec_json"]).to_pylist()
        ours = {row["run_id"] for row in runs if _tick(json.loads(row["spec_json"])) == self.tick}
        return pc.field("run_id").isin(pa.array(sorted(ours), pa.string()))


def _tick(spec: Mapping[str, Any]) -> str | None:
    return spec.get("schedule", {}).get("tick")


def _utc(value: Any) -> Any:
    """One spelling for each time: it is hashed."""
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("expected an ISO 8601 time, such as 2026-11-21T03:00:00Z") from None
    if isinstance(value, datetime):
        zoned = value if value.tzinfo else value.replace(tzinfo=UTC)
        return zoned.astimezone(UTC).isoformat()
    return value
