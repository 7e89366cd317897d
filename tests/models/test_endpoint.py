"""Judging and captioning over HTTP, by a real server in a process of its own that fails when it is told to."""

from __future__ import annotations

import json
import pickle
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.errors import UserError
from infra.storage import Storage
from infra.telemetry import configure
from models import endpoint_client
from models.endpoint import FOLDER, Endpoint
from models.endpoint_client import ATTEMPTS, EndpointError, EndpointRef, _duration, _retry_after
from models.multimodal import Multimodal, MultimodalRef, evenly_spaced
from models.pack.grammar import sample_scenes
from models.pack.phrases import describe
from models.pack.train.loop import stream
from models.pack.train.questions import DENSE, MOTION_SMOOTH, NO_ARTEFACTS, SHORT
from models.pack.world import render
from models.source import resolve
from stages.actor import run_stage
from stages.batch import load_json, texts
from stages.caption import CaptionMedia
from stages.judge import JudgeQuality
from stages.rubric import load_rubric
from tests.models.openai_server import Server, openai_server

KEY = "sk-distinctive-0123456789"
INSTRUCTIONS = [SHORT.format(media="video"), DENSE.format(media="video")]
CAPTION_TOKENS = 12

LIMITED = {"status": 429, "headers": {"Retry-After": "1"}, "body": '{"error": {"message": "slow down"}}'}
FAULTS: dict[str, dict[str, Any]] = {
    "429": LIMITED,
    "500": {"status": 500, "body": "Internal Server Error"},
    "cut": {"cut": True},
    "invalid JSON": {"body": '{"choices": ['},
    "no choices": {"body": '{"choices": []}'},
    "stall": {"stall": True},
}


@pytest.fixture(scope="module")
def folder() -> str:
    return resolve("pack://shapes", "judge")


@pytest.fixture(scope="module")
def running(folder: str) -> Iterator[Server]:
    with openai_server(folder) as server:
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, with nothing seen and no fault; the API key is where the spec says."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    running.set()
    return running


@dataclass(frozen=True)
class Known:
    """Three clips, three questions about each, and what the model answers in this process."""

    frames: np.ndarray
    questions: list[list[str]]
    p_yes: np.ndarray
    captions: list[list[str]]


@pytest.fixture(scope="module")
def known(folder: str) -> Known:
    scenes = sample_scenes(stream(5, 0), 3, kinds=("one",), split="held_out")
    frames = evenly_spaced(render(scenes, range(3)), 3)
    matches = [f"Does this show what this description says? {describe(each)} Answer Yes or No." for each in scenes]
    questions = [[match, NO_ARTEFACTS.format(media="video"), MOTION_SMOOTH] for match in matches]
    model = Multimodal(MultimodalRef(folder))
    captions = model.caption(frames, INSTRUCTIONS, CAPTION_TOKENS)
    return Known(frames, questions, model.p_yes(frames, questions), captions)


def endpoint(server: Server, **changes: Any) -> Endpoint:
    return Endpoint(EndpointRef(**{"base_url": server.base_url, "model": "shapes", "timeout": 60, **changes}))


def canned(*tokens: tuple[str, float], **reply: Any) -> dict[str, Any]:
    """A reply whose likeliest tokens have these probabilities; without any, one without probabilities."""
    top = [{"token": token, "logprob": float(np.log(each))} for token, each in tokens]
    choice = {"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]} if top else None}
    return {"body": json.dumps({"choices": [choice], **reply})}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_answers_are_those_of_the_model_in_process(server: Server, known: Known, fault: str | None) -> None:
    faults = [FAULTS[fault]] if fault else []
    asked = endpoint(server, timeout=3 if fault == "stall" else 60)
    server.set(*faults)
    np.testing.assert_allclose(asked.p_yes(known.frames, known.questions), known.p_yes, atol=1e-4)
    assert len(server.requests) >= 9 + len(faults)
    server.set(*faults)
    assert asked.caption(known.frames, INSTRUCTIONS, CAPTION_TOKENS) == known.captions
    assert len(server.requests) >= 6 + len(faults)


FORM = {
    "type": "object",
    "additionalProperties": False,
    "required": ["background"],
    "properties": {
        "background": {"enum": ["white", "black", "grey", "blue", "yellow"], "description": "Is it {value}?"}
    },
}


def test_json_is_asked_for_by_its_schema(server: Server, known: Known, folder: str) -> None:
    asked = endpoint(server)
    values = asked.structured(known.frames, "Describe it as JSON.", FORM, 20)
    assert values == Multimodal(MultimodalRef(folder)).structured(known.frames, "", FORM, 20)
    server.set({"body": json.dumps({"choices": [{"message": {"content": '{"background": '}}]})})
    assert asked.structured(known.frames[:1], "Describe it as JSON.", FORM, 20) == [None]


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (r'{"subjects": ["\ud83d cat"]}', None),
        (r'{"\ud83d": 1}', None),
        ('{"share": NaN}', None),
        ('{"share": [-Infinity]}', None),
        ('{"share": 1e999}', None),
        (r'{"subjects": ["\ud83d\ude3a cat"], "share": 1e30}', {"subjects": ["\U0001f63a cat"], "share": 1e30}),
    ],
)
def test_json_that_cannot_be_stored_is_none(server: Server, known: Known, content: str, value: Any) -> None:
    server.set({"body": json.dumps({"choices": [{"message": {"content": content}}]})})
    assert endpoint(server).structured(known.frames[:1], "Describe it as JSON.", FORM, 20) == [value]


def test_a_caption_that_is_no_json_is_asked_for_once_more(server: Server, known: Known) -> None:
    broken = {"body": json.dumps({"choices": [{"message": {"content": '{"background": "pink"}'}}]})}
    ref = EndpointRef(base_url=server.base_url, model="shapes", timeout=60)
    stage = CaptionMedia(ref, ("structured",), schema=json.dumps(FORM))
    for faults, requests in ((1, 2), (2, 2)):
        server.set(*[broken] * faults)
        out = stage({"frames": known.frames[:1], "prompt": texts(["a"])})
        assert bool(out["caption"][0]) == (faults == 1)
        assert len(server.requests) == requests


def test_rows_of_answers_may_have_different_lengths(server: Server, known: Known) -> None:
    asked = [known.questions[0][:1], known.questions[1], []]
    p_yes = endpoint(server).p_yes(known.frames, asked)
    expected = known.p_yes.copy()
    expected[0, 1:] = expected[2] = np.nan
    np.testing.assert_allclose(p_yes, expected, atol=1e-4)


def test_no_more_requests_are_under_way_than_allowed(server: Server, known: Known) -> None:
    server.set(together=2)  # the first ones wait for each other
    endpoint(server, concurrency=2).p_yes(known.frames, known.questions)
    assert server.most == 2
    assert len(server.requests) == 9


def test_a_clip_s_first_question_is_answered_before_its_others(server: Server, known: Known) -> None:
    endpoint(server).p_yes(known.frames[:1], known.questions[:1])
    assert server.requests[0]["text"] == known.questions[0][0]
    assert {seen["text"] for seen in server.requests} == set(known.questions[0])


def test_all_requests_wait_as_long_as_a_refused_one_is_told_to(server: Server, known: Known) -> None:
    server.set(LIMITED, LIMITED, together=2)
    endpoint(server, concurrency=2).p_yes(known.frames, known.questions)
    first, _, *later = sorted(seen["at"] for seen in server.requests)
    assert len(later) == 9 and min(later) - first >= 1


@pytest.mark.parametrize(
    "limits",
    [
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s"},
        {"x-ratelimit-remaining-tokens": "100", "x-ratelimit-reset-tokens": "900ms"},
    ],
)
def test_requests_wait_where_the_limits_leave_none(server: Server, known: Known, limits: dict[str, str]) -> None:
    server.set({}, {"headers": limits})
    endpoint(server, concurrency=1).p_yes(known.frames[:1], known.questions[:1])
    _, second, third = (seen["at"] for seen in server.requests)
    assert third - second >= 0.9


def test_requests_do_not_wait_where_the_limits_leave_some(server: Server, known: Known) -> None:
    limits = {"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "4m"}
    server.set(always={"headers": limits})
    endpoint(server, concurrency=1).p_yes(known.frames[:1], known.questions[:1])
    assert len(server.requests) == 3


def test_durations_of_rate_limit_headers() -> None:
    found = [_duration(text) for text in ("1s", "6m0s", "20ms", "7.66s", "1h2m3s", "", "soon", "5")]
    assert found == pytest.approx([1, 360, 0.02, 7.66, 3723, 0, 0, 0])
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert 80 < _retry_after(format_datetime(later, usegmt=True)) <= 90
    assert [_retry_after(text) for text in ("2", "0.5", "", "later", "-3")] == [2, 0.5, 0, 0, 0]


def test_a_server_that_stays_down_fails_the_batch_and_loses_nothing(
    server: Server, known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_PAUSE", 0.01)
    kept: dict[str, Any] = {"cache": Storage(str(tmp_path)), "concurrency": 2}
    server.set({}, {}, {}, {}, always={"status": 503, "body": "no healthy upstream"})
    with pytest.raises(
        EndpointError, match=r"^judge.base_url: shapes@.* failed 8 times, at last with: 503 no healthy"
    ) as caught:
        endpoint(server, **kept).p_yes(known.frames, known.questions)
    assert isinstance(caught.value, OSError)  # which an actor takes for the world's fault, and not for a sample's
    assert len(server.requests) <= 4 + 2 * ATTEMPTS, "the others gave up with the first"
    server.set()
    np.testing.assert_allclose(endpoint(server, **kept).p_yes(known.frames, known.questions), known.p_yes, atol=1e-4)
    assert len(server.requests) == 5


def test_a_server_that_is_not_there_fails_the_batch(monkeypatch: pytest.MonkeyPatch, known: Known) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_PAUSE", 0.01)
    gone = Endpoint(EndpointRef("http://127.0.0.1:9/v1", "shapes"))
    with pytest.raises(EndpointError, match="failed 8 times, at last with: ClientConnectorError"):
        gone.caption(known.frames, INSTRUCTIONS, 1)


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (401, "", "judge.api_key_env: shapes@{host} answers 401 to the key in OPENAI_API_KEY; "),
        (403, "", "judge.api_key_env: shapes@{host} answers 403 to the key in OPENAI_API_KEY; "),
        (404, "", "judge.base_url: http://{host}/v1 has no /chat/completions, or no model shapes (no, REDACTED"),
        (400, "", "judge.base_url: shapes@{host} answers 400 (no, REDACTED it is not), and has answered nothing yet; "),
        (307, "", "judge.base_url: http://{host}/v1 answers 307, which leads elsewhere"),
        (429, "insufficient_quota", "judge.base_url: shapes@{host} says that the key's account has no quota left"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_one_request(
    server: Server, known: Known, status: int, code: str, line: str
) -> None:
    body = json.dumps({"error": {"message": f"no,\n{KEY} it is not", "code": code}})
    server.set(always={"status": status, "body": body, "headers": {"Location": f"{server.root}/elsewhere"}})
    with pytest.raises(UserError) as caught:
        endpoint(server, concurrency=1).p_yes(known.frames, known.questions)
    assert str(caught.value).startswith(line.format(host=server.root.removeprefix("http://")))
    assert "\n" not in str(caught.value) and KEY not in "".join(traceback.format_exception(caught.value))
    assert len(server.requests) == (3 if status == 400 else 1), "what is refused may be one clip's fault"


def test_a_clip_that_a_working_server_refuses_fails_alone(server: Server, known: Known, tmp_path: Path) -> None:
    server.set(refuse="blue triangle")
    prompts = {"prompt": texts(["a blue triangle", "a red circle", "a red circle"])}
    stage = JudgeQuality(
        load_rubric("default"), EndpointRef(server.base_url, "shapes", cache=Storage(str(tmp_path))), "openai"
    )
    out, _ = run_stage(stage, {**batch(known), **prompts})
    assert list(out["error_type"]) == ["stage_error", "", ""]
    assert "answers 400 (content policy)" in out["error"][0]
    assert len([seen for seen in server.requests if "blue triangle" not in seen["text"]]) == 6


def batch(known: Known) -> dict[str, np.ndarray]:
    count = len(known.frames)
    empty = {name: texts([""] * count) for name in ("error", "error_type", "error_stage", "verdict")}
    ids = texts([str(at) for at in range(count)])
    return {"sample_id": ids, "prompt": texts(["a red circle"] * count), "frames": known.frames, **empty}


def test_what_was_answered_is_not_asked_again(server: Server, known: Known, storage: Storage) -> None:
    first = endpoint(server, cache=storage)
    p_yes = first.p_yes(known.frames, known.questions)
    first.caption(known.frames, INSTRUCTIONS, CAPTION_TOKENS)
    assert len(list(storage.files())) == len(list(storage.files(FOLDER))) == 3, "one object a clip"
    server.set()
    second = endpoint(server, cache=pickle.loads(pickle.dumps(storage)))
    np.testing.assert_array_equal(second.p_yes(known.frames[::-1], known.questions[::-1]), p_yes[::-1])
    assert second.caption(known.frames, INSTRUCTIONS, CAPTION_TOKENS) == known.captions
    assert server.requests == []
    second.p_yes(known.frames, [[*row, "Is this a circle? Answer Yes or No."] for row in known.questions])
    assert len(server.requests) == 3, "only what is new"
    assert len(list(storage.files(FOLDER))) == 3
    for name in list(storage.files(FOLDER)):
        assert len(json.loads(storage.read_bytes(name))["answers"]) == 6
    server.set()
    endpoint(server, cache=storage, model="another").p_yes(known.frames[:1], known.questions[:1])
    assert len(server.requests) == 3


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"answers": 3}', b'{"answers": {"%s": 7.5}}'])
def test_a_broken_object_of_the_cache_is_asked_anew(server: Server, known: Known, tmp_path: Path, data: bytes) -> None:
    storage = Storage(str(tmp_path))
    asked = (known.frames[:1], [known.questions[0][:1]])
    p_yes = endpoint(server, cache=storage).p_yes(*asked)
    (name,) = storage.files(FOLDER)
    whole = storage.read_bytes(name)
    (digest,) = json.loads(whole)["answers"]
    storage.write_bytes(name, data.replace(b"%s", digest.encode()))
    server.set()
    np.testing.assert_array_equal(endpoint(server, cache=storage).p_yes(*asked), p_yes)
    assert len(server.requests) == 1
    assert json.loads(storage.read_bytes(name)) == json.loads(whole)


def test_a_budget_of_requests_stops_and_a_larger_one_goes_on(server: Server, known: Known, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    server.set(FAULTS["500"])
    with pytest.raises(UserError, match=r"^judge.max_requests: this worker has spent 4 of 4; raise it and run again"):
        endpoint(server, cache=storage, max_requests=4).p_yes(known.frames, known.questions)
    assert len(server.requests) == 4, "one that failed counts too"
    endpoint(server, cache=storage, max_requests=6).p_yes(known.frames, known.questions)
    assert len(server.requests) == 1 + 9


def test_a_budget_of_tokens_stops(server: Server, known: Known) -> None:
    with pytest.raises(UserError, match=r"^caption.max_total_tokens: this worker has spent 303 of 250; "):
        limited = endpoint(server, max_total_tokens=250, concurrency=1, section="caption")
        limited.caption(known.frames, INSTRUCTIONS, 1)
    assert len(server.requests) == 3
    server.set(always=canned(("yes", 0.5)))
    with pytest.raises(UserError, match=r"^judge.max_total_tokens: .* does not say how many tokens"):
        endpoint(server, max_total_tokens=250).p_yes(known.frames, known.questions)


def test_each_clip_may_be_asked_another_number_of_questions(server: Server, known: Known) -> None:
    ragged = [known.questions[0][:1], [], known.questions[2]]
    found = endpoint(server).p_yes(known.frames, ragged)
    asked = np.array([[True, False, False], [False] * 3, [True] * 3])
    np.testing.assert_array_equal(np.isnan(found), ~asked)
    np.testing.assert_allclose(found[asked], known.p_yes[asked], atol=1e-4)
    assert len(server.requests) == 4


def test_p_yes_is_the_share_of_yes_however_it_is_spelled(server: Server, known: Known, tmp_path: Path) -> None:
    server.set(
        canned((" Yes", 0.3), ("yes", 0.2), ("YES\n", 0.1), ("No", 0.15), (" no", 0.05), ("Yesterday", 0.1)),
        canned(("no", 0.9)),
        canned(("maybe", 0.9), ("<think>", 0.1)),
        canned(("yes", np.nan), ("no", 0.5)),
        always=canned(),
    )
    storage = Storage(str(tmp_path))
    asked = endpoint(server, concurrency=1, cache=storage)
    found = asked.p_yes(known.frames[:1], [["a", "b", "c", "d", "e"]])
    np.testing.assert_allclose(found, [[0.75, 0.0, np.nan, np.nan, np.nan]], rtol=1e-6)
    server.set(always=canned(("yes", 1.0)))
    again = endpoint(server, cache=storage).p_yes(known.frames[:1], [["a", "b", "c", "d", "e"]])
    np.testing.assert_allclose(again, [[0.75, 0.0, np.nan, np.nan, 1.0]], rtol=1e-6)
    assert len(server.requests) == 1, "what had no probabilities is asked again, and nothing else"


def test_a_sample_without_yes_and_no_fails_as_judge_failed(server: Server, known: Known) -> None:
    server.set(canned(("maybe", 0.9)), always=canned(("yes", 0.9)))
    ref = EndpointRef(server.base_url, "shapes", concurrency=1)
    out, _ = run_stage(JudgeQuality(load_rubric("default"), ref, "openai"), batch(known))
    assert sorted(out["error_type"]) == ["", "", "judge_failed"]
    assert sorted(len(row) for row in load_json(out["scores"])) == [2, 3, 3]


def test_a_server_that_gives_no_logprobs_is_told_in_one_line(server: Server, known: Known) -> None:
    server.set(always=canned())
    with pytest.raises(UserError, match=r"^judge.model: shapes@\S+ gives no logprobs, from which .*$"):
        endpoint(server).p_yes(known.frames, known.questions)


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: Server,
    known: Known,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    monkeypatch.setenv("DITMILL_LOG_LEVEL", "DEBUG")
    monkeypatch.setattr(endpoint_client, "FIRST_PAUSE", 0.01)
    configure()
    storage = Storage(str(tmp_path))
    ref = EndpointRef(server.base_url, "shapes", api_key_env="MY_KEY", cache=storage)
    server.set({}, always={"status": 500, "body": f"Authorization: Bearer {KEY}"})
    with pytest.raises(EndpointError, match="REDACTED") as caught:
        Endpoint(ref).p_yes(known.frames, known.questions)
    told = capsys.readouterr().err
    assert "endpoint asked again" in told
    assert {seen["authorization"] for seen in server.requests} == {f"Bearer {KEY}"}
    kept = b"".join(storage.read_bytes(name) for name in storage.files())
    said = "".join(traceback.format_exception(caught.value))
    assert KEY not in told + said + repr(ref) + str(vars(Endpoint(ref)))
    assert kept and KEY.encode() not in kept + pickle.dumps(ref)
    assert ref.name == f"shapes@{server.root.removeprefix('http://')}"


def test_a_key_that_is_missing_or_no_key_is_told_before_a_request(
    server: Server, monkeypatch: pytest.MonkeyPatch, known: Known
) -> None:
    with pytest.raises(UserError, match=r"^judge.api_key_env: ELSEWHERE is not set where the worker runs"):
        endpoint(server, api_key_env="ELSEWHERE")
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with pytest.raises(UserError, match=r"^judge.api_key_env: what OPENAI_API_KEY holds is no API key; [^\n]*$"):
        endpoint(server)
    monkeypatch.delenv("OPENAI_API_KEY")
    endpoint(server).caption(known.frames[:1], ["a"], 1)
    assert [seen["authorization"] for seen in server.requests] == [None]


def test_a_url_with_credentials_is_refused() -> None:
    with pytest.raises(UserError, match=r"^caption.base_url: found credentials in a URL") as caught:
        EndpointRef("https://me:hunter2@host/v1", "shapes", section="caption")
    assert "hunter2" not in str(caught.value)
