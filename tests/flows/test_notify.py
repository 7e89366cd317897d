from __future__ import annotations

import json
from typing import Any

import pytest

from flows import notify
from flows.notify import Paused, tell, telling
from infra.errors import UserError
from pipelines.schedule import Notify
from pipelines.spec import Spec, parse_spec


def _spec(**keys: Any) -> Spec:
    return parse_spec({"name": "nightly", "prompts": {"inline": ["a circle"]}, "notify": keys})


def test_the_webhook_is_told_how_a_run_ended(hook: tuple[str, list[dict[str, Any]]]) -> None:
    url, told = hook
    with telling(_spec(webhook=url)) as facts:
        facts["accepted"] = 3
    with pytest.raises(Paused), telling(_spec(webhook=url)):
        raise Paused("guards.min_accepted: 0 of the last 8")
    with pytest.raises(ValueError), telling(_spec(webhook=url)):
        raise ValueError("s3://key:0123@bucket")
    assert [event["event"] for event in told] == ["finished", "paused", "failed"]
    assert told[0]["accepted"] == 3
    assert told[0]["name"] == "nightly"
    assert told[1]["why"] == "guards.min_accepted: 0 of the last 8"
    assert "0123" not in json.dumps(told)


def test_only_what_is_asked_for_is_told(hook: tuple[str, list[dict[str, Any]]]) -> None:
    url, told = hook
    for event in ("finished", "failed", "paused"):
        tell(Notify(webhook=url, events=("failed",)), event, {})  # type: ignore[arg-type]
    assert [event["event"] for event in told] == ["failed"]


def test_a_secret_url_comes_out_of_the_environment(
    hook: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, told = hook
    monkeypatch.setenv("TEAM_HOOK", url)
    spec = _spec(webhook="$TEAM_HOOK")
    with telling(spec):
        pass
    assert len(told) == 1
    assert url not in spec.model_dump_json()


@pytest.mark.parametrize("value", [None, "", "ftp://somewhere"])
def test_a_webhook_that_is_not_there_is_told_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("TEAM_HOOK", raising=False)
    if value is not None:
        monkeypatch.setenv("TEAM_HOOK", value)
    with pytest.raises(UserError, match=r"notify\.webhook: TEAM_HOOK"), telling(_spec(webhook="$TEAM_HOOK")):
        raise AssertionError("it began")


def test_a_webhook_that_does_not_answer_fails_no_run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(notify.time, "sleep", lambda _: None)
    url = "http://127.0.0.1:9/secret-token"
    with telling(_spec(webhook=url)):
        pass
    assert "secret-token" not in capsys.readouterr().err


def test_a_webhook_outside_of_the_policy_is_not_told(hook: tuple[str, list[dict[str, Any]]], monkeypatch: Any) -> None:
    url, told = hook
    monkeypatch.setenv("TEAM_HOOK", url)
    spec = parse_spec(
        {
            "prompts": {"inline": ["a circle"]},
            "notify": {"webhook": "$TEAM_HOOK"},
            "policy": {"endpoints": ["example.org"]},
        }
    )
    with pytest.raises(UserError, match=r"notify\.webhook: .* outside of policy\.endpoints"), telling(spec):
        raise AssertionError("it began")
    assert told == []


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"notify\.webhook: expected an http"):
        _spec(webhook="team-channel")
