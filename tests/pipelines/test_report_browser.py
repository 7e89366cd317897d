"""The report in a real browser: Debian's chromium, driven over its DevTools socket."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from infra.storage import Storage
from pipelines.report import build_report

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--mute-audio",
    "--remote-debugging-port=0",
    "--window-size=1400,1000",
)
CODES = {
    "y": 89,
    "n": 78,
    "u": 85,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Enter": 13,
    "Escape": 27,
}
HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    '" onload="window.pwned = 2" onfocus="window.pwned = 2',
    "'><img src=x onerror='window.pwned = 3'>",
    "\u202eevil\u202c \u200f right to left \u2066",
    "x" * 10_000,
    "=cmd|' /C calc'!A0",
    "{{ 7 * 191 }} {% raw %} ${window.pwned = 4} <svg onload=window.pwned=5>",
    "</style><style>* { display: none }</style><meta http-equiv=refresh content=0>",
)


class Page:
    """One page, and what it said and asked for since it was opened."""

    def __init__(self, socket: ClientConnection, downloads: Path) -> None:
        self._socket, self._number, self._session = socket, 0, ""
        self.downloads = downloads
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"][:200])

    def open(self, path: str, **media: str) -> Page:
        self.send(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in media.items()]
        )
        self.send("Page.navigate", url=f"file://{path}")
        self.wait("document.readyState === 'complete'")
        self.complaints.clear()
        self.requests.clear()
        self.send("Page.reload")  # what went wrong before the domains were listened to, too
        self.wait("document.readyState === 'complete'")
        return self

    def run(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.run(expression):
                return
            time.sleep(0.05)
        pytest.fail(f"after {seconds} s it is still not true that {expression}; the page said {self.complaints}")

    def press(self, *keys: str) -> None:
        for key in keys:
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            event = {"key": key, "windowsVirtualKeyCode": CODES.get(key, 0)}
            self.send("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def labels_csv(self) -> str:
        """What the download button gives."""
        target = self.downloads / "labels.csv"
        target.unlink(missing_ok=True)
        self.run("document.querySelector('#download').click()")
        until = time.monotonic() + 20
        while not (target.exists() and target.stat().st_size):
            assert time.monotonic() < until, "no labels.csv was downloaded"
            time.sleep(0.05)
        return target.read_bytes().decode()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if os.environ.get("DITMILL_NO_BROWSER") == "1":
        pytest.skip("DITMILL_NO_BROWSER=1")
    program = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if program is None:
        pytest.fail(
            "no browser: expected chromium (or google-chrome) on PATH to look at the report with; install it "
            "(apt-get install chromium), or set DITMILL_NO_BROWSER=1 to leave these tests out"
        )
    home = tmp_path_factory.mktemp("browser")
    log = (home / "log").open("wb")
    browser = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={home}"], stdout=log, stderr=log, start_new_session=True
    )
    try:
        port_file = home / "DevToolsActivePort"
        until = time.monotonic() + 60
        while not (port_file.exists() and len(port_file.read_text().split()) == 2):
            assert browser.poll() is None and time.monotonic() < until, (home / "log").read_text()
            time.sleep(0.05)
        port, path = port_file.read_text().split()
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as socket:
            yield Page(socket, tmp_path_factory.mktemp("downloads"))
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
        log.close()


@pytest.fixture(scope="module")
def shapes(dataset: Callable[..., Storage]) -> tuple[Storage, str]:
    """A dataset of six accepted and three rejected samples, and the path of its report."""
    storage = dataset(accepted=6, rejected=3, failures=2)
    return storage, build_report(storage).path


def focused(page: Page) -> str:
    return page.run("document.activeElement.dataset.id || ''")


def ids(page: Page, verdict: str = "") -> list[str]:
    side = f".side.{verdict} " if verdict else ""
    return page.run(f"[...document.querySelectorAll('{side}.card')].filter(c => !c.hidden).map(c => c.dataset.id)")


def test_report_renders_without_errors_or_network(page: Page, shapes: tuple[Storage, str]) -> None:
    page.open(shapes[1])
    page.run("scrollTo(0, document.body.scrollHeight)")
    page.run("new Promise(done => setTimeout(done, 300))")
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("file://", "data:"))] == []
    assert sum(url.startswith("file://") for url in page.requests) == 1  # the page itself
    assert page.run("document.body.innerText.includes('accelerator-seconds per accepted sample')")
    assert len(ids(page, "accepted")) == 6 and len(ids(page, "rejected")) == 3
    assert page.run("document.querySelectorAll('svg').length") >= 7


def test_videos_play(page: Page, shapes: tuple[Storage, str]) -> None:
    page.open(shapes[1])
    page.run("document.querySelector('#gallery').scrollIntoView()")
    page.wait("[...document.querySelectorAll('#gallery video')].some(v => v.readyState >= 2 && v.currentTime > 0)")
    durations = page.run(
        "[...document.querySelectorAll('#gallery video')].filter(v => v.readyState).map(v => v.duration)"
    )
    assert durations and durations == pytest.approx([17 / 8] * len(durations), abs=0.15)
    assert page.run("[...document.querySelectorAll('#gallery video')].every(v => v.muted && v.loop)")
    assert page.run("[...document.querySelectorAll('.strip img')].every(i => i.naturalWidth === 4 * i.naturalHeight)")


def test_nothing_moves_for_who_wants_no_motion(page: Page, shapes: tuple[Storage, str]) -> None:
    page.open(shapes[1], **{"prefers-reduced-motion": "reduce"})
    page.run("document.querySelector('#gallery').scrollIntoView()")
    page.run("new Promise(done => setTimeout(done, 400))")
    assert page.run("[...document.querySelectorAll('#gallery video')].every(v => v.paused)")
    page.run("document.querySelector('#play').click()")
    page.wait("[...document.querySelectorAll('#gallery video')].some(v => !v.paused)")


def test_keys_label_and_csv_says_so(page: Page, shapes: tuple[Storage, str]) -> None:
    page.open(shapes[1])
    page.run("localStorage.clear()")
    page.open(shapes[1])
    accepted, rejected = ids(page, "accepted"), ids(page, "rejected")
    page.press("ArrowRight")
    assert focused(page) == accepted[0]
    page.press("y", "ArrowRight", "n", "ArrowRight")
    assert focused(page) == accepted[2]
    page.press("ArrowRight", "ArrowRight")
    assert focused(page) == rejected[0]
    page.press("n", "ArrowRight", "u", "ArrowDown")
    assert focused(page) == rejected[2]
    assert page.run("document.querySelector('#count').textContent") == "4 of 9 labelled"
    assert page.run("document.querySelector('#agree').textContent") == " · 2 of 3 labels agree with the verdict"
    text = page.labels_csv()
    assert list(csv.DictReader(text.splitlines())) == [
        {"sample_id": accepted[0], "label": "yes", "note": ""},
        {"sample_id": accepted[1], "label": "no", "note": ""},
        {"sample_id": rejected[0], "label": "no", "note": ""},
        {"sample_id": rejected[1], "label": "unsure", "note": ""},
    ]


def test_labels_are_remembered_and_can_be_taken_back(page: Page, shapes: tuple[Storage, str]) -> None:
    page.open(shapes[1])
    page.run("localStorage.clear()")
    page.open(shapes[1])
    page.press("ArrowRight", "y", "ArrowRight", "n")
    page.open(shapes[1])
    assert page.run("document.querySelector('#progress').value") == 2
    page.press("ArrowRight", "y")
    assert page.run("document.querySelector('#progress').value") == 1
    assert page.labels_csv().count("\n") == 2


def test_notes_that_look_like_formulas_are_disarmed(page: Page, shapes: tuple[Storage, str]) -> None:
    page.open(shapes[1])
    page.run("localStorage.clear()")
    page.open(shapes[1])
    page.press("ArrowRight", "Enter")
    page.wait("document.querySelector('#closer').open")
    page.press("y")
    page.run("document.querySelector('#note').focus()")
    page.type('=cmd("y"), she said')
    page.press("Escape")
    page.wait("!document.querySelector('#closer').open")
    rows = list(csv.DictReader(page.labels_csv().splitlines()))
    assert rows == [{"sample_id": ids(page)[0], "label": "yes", "note": '\'=cmd("y"), she said'}]


def test_filters_search_and_order(page: Page, shapes: tuple[Storage, str]) -> None:
    page.open(shapes[1])
    page.run("document.querySelector('#bar [data-verdict=rejected]').click()")
    assert page.run("document.querySelector('.side.accepted').hidden") is True
    page.run("document.querySelector('#bar [data-verdict=all]').click()")
    page.run("document.querySelector('#search').focus()")
    page.type("triangle")
    found = ids(page)
    assert 0 < len(found) < 9
    assert page.run(
        "[...document.querySelectorAll('.card')].every(c => c.hidden !== /triangle/.test(c.innerText + c.textContent))"
    )
    page.press("Escape")
    page.open(shapes[1])
    page.run(
        "(s => { s.value = 'prompt_match up'; s.dispatchEvent(new Event('change')) })(document.querySelector('#sort'))"
    )
    scores = page.run(
        "[...document.querySelectorAll('.side.accepted .card')].map(c => JSON.parse(c.dataset.scores).prompt_match)"
    )
    assert scores == sorted(scores)


def test_closer_view_walks_and_closes(page: Page, shapes: tuple[Storage, str]) -> None:
    page.open(shapes[1])
    accepted = ids(page, "accepted")
    page.press("ArrowRight", "Enter")
    page.wait("document.querySelector('#closer video')?.readyState >= 1")
    page.press("ArrowRight")
    assert accepted[1] in page.run("document.querySelector('#closer .text').innerText")
    page.press("Escape")
    page.wait(f"document.activeElement.dataset.id === '{accepted[1]}'")


def test_works_where_the_browser_keeps_nothing(page: Page, shapes: tuple[Storage, str]) -> None:
    script = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError') }})"
    added = page.send("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    page.open(shapes[1])
    page.send("Page.removeScriptToEvaluateOnNewDocument", identifier=added)
    page.press("ArrowRight", "y")
    assert page.run("document.querySelector('#unkept').hidden") is False
    assert "yes" in page.labels_csv()
    assert page.complaints == []


def test_hostile_prompts_stay_text(page: Page, dataset: Callable[..., Storage]) -> None:
    storage = dataset(
        accepted=8, rejected=2, prompts=HOSTILE, annotations=((f"{0:032x}", "caption", "short", HOSTILE[0]),)
    )
    page.open(build_report(storage, title=HOSTILE[0]).path)
    page.run("new Promise(done => setTimeout(done, 300))")
    assert page.run("typeof window.pwned") == "undefined"
    assert page.run("document.scripts.length") == 1
    assert page.complaints == []
    shown = page.run("[...document.querySelectorAll('.card > .words > .prompt')].map(p => p.textContent)")
    for prompt in HOSTILE:
        assert any(text.startswith(prompt[:100]) for text in shown), prompt[:100]
    assert max(map(len, shown)) < 1100
    assert page.run("document.title").startswith(HOSTILE[0])
    assert page.run("getComputedStyle(document.querySelector('.card')).display") != "none"
    page.press("ArrowRight", "Enter", "ArrowRight", "ArrowRight", "Escape")
    assert page.run("typeof window.pwned") == "undefined"


def test_policy_stops_a_script_that_was_not_escaped(page: Page, shapes: tuple[Storage, str], tmp_path: Path) -> None:
    html = Path(shapes[1]).read_text()
    attack = (
        "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><img src='https://example.org/x.png'>"
    )
    broken = tmp_path / "broken.html"
    broken.write_text(html.replace("<main>", f"<main>{attack}", 1))
    page.open(str(broken))
    page.run("new Promise(done => setTimeout(done, 300))")
    assert page.run("typeof window.pwned") == "undefined"
    assert page.complaints  # the policy says what it refused


@pytest.mark.parametrize(
    "made",
    [
        {"accepted": 0, "rejected": 0, "failures": 0, "runs": False},
        {"accepted": 0, "rejected": 0, "failures": 3},
        {"accepted": 0, "rejected": 4, "failures": 0},
        {"accepted": 4, "rejected": 0, "failures": 0},
        {"accepted": 3, "rejected": 2, "failures": 1, "num_frames": 1},
        {"accepted": 2, "rejected": 2, "failures": 0, "keep_rejected": "none"},
    ],
    ids=["empty", "failures", "rejected", "accepted", "images", "nothing_kept"],
)
def test_any_dataset_gives_a_quiet_page(page: Page, dataset: Callable[..., Storage], made: dict[str, Any]) -> None:
    page.open(build_report(dataset(**made)).path)
    page.press("ArrowRight", "y", "Enter", "Escape")
    assert page.complaints == []
    shown = made["accepted"] + made["rejected"]
    assert len(ids(page)) == shown


@pytest.mark.parametrize("width", [1400, 420])
def test_page_does_not_scroll_sideways(page: Page, shapes: tuple[Storage, str], width: int) -> None:
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    try:
        page.open(shapes[1])
        assert page.run("document.documentElement.scrollWidth") <= width
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")
