"""Runs into S3 over a bad network that lose processes to SIGKILL: nothing lost, nothing doubled, and what each kill cost.

    ditmill bench soak [--kills 200] [--faults 0.05] [--minutes M] [--seed N] [--keep FOLDER]

Each dataset is 36 samples of pack://tiny on an S3 server (moto's, or Ceph where DITMILL_TEST_S3=ceph) behind a proxy that
injects each of six faults into that share of the requests it can befall. Two to six processes of its runs (driver, actors,
mailbox, reader, raylet, control store, Prefect's server, or any) are killed one after the other, at random moments; a run
that ends of it is started again.
At the end each dataset must pass `verify`, have nothing left over, and hold the very latents of the baseline: the same
spec on a local folder, undisturbed, in the same session. A kill's cost is the time until the dataset grew again, and the
rows that were written and never committed. With --keep, kills of finished datasets are counted across calls.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from chain import Chain, Kill, random_plan, summary
from harness import Launch, Watched, kill_spec
from s3_proxy import Faults, s3_proxy

from infra.storage import Storage
from tests.conftest import s3_server

STALL = 2.0
TIMEOUT = 1.0
"""Seconds: of an injected stall, and until a client gives up on an answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--faults", type=float, default=0.05, help="share of requests that each fault befalls")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no dataset after this time")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--keep", type=Path, help="folder in which kills are noted, to go on with later")
    options = parser.parse_args()
    notes = options.keep / "kills.jsonl" if options.keep else None
    kills = [Kill(**json.loads(line)) for line in notes.read_text().splitlines()] if notes and notes.exists() else []
    print(f"seed {options.seed}, {len(kills)} kills before", flush=True)
    rng, began, injected, answers, spent = random.Random(options.seed), time.monotonic(), Counter[str](), 0, 0.0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        good = stack.enter_context(s3_server(folder))
        latents, undisturbed = _baseline(folder)
        number = 0
        while len(kills) < options.kills and time.monotonic() - began < 60 * options.minutes:
            faults = Faults(share=options.faults, stall=STALL, seed=rng.randrange(10**6))
            with s3_proxy(good, faults) as bad:
                chain = _chain(folder / str(number), rng, good, bad)
                started = time.monotonic()
                chain.take(random_plan(rng), latents)
                spent += time.monotonic() - started - undisturbed
            print(summary(options.seed, [chain]), flush=True)
            kills += chain.kills
            injected.update(faults.injected)
            answers += len(faults.seen)
            number += 1
            if notes:
                options.keep.mkdir(parents=True, exist_ok=True)
                with notes.open("a") as file:
                    file.writelines(json.dumps(asdict(kill)) + "\n" for kill in chain.kills)
    if kills:
        _tell(kills, undisturbed)
        print(
            f"in this call: {number} datasets, each whole and each sample once; {answers} answers, injected {dict(injected)}"
        )
    raise SystemExit(len(kills) < options.kills and options.minutes == float("inf"))


def _baseline(folder: Path) -> tuple[dict[str, np.ndarray], float]:
    """Latents of a run that nobody disturbed, on a local folder, and its seconds."""
    launch = Launch(["run", str(kill_spec(folder / "baseline.yaml"))], folder / "baseline.log")
    if launch.wait():
        raise SystemExit(launch.said())
    return Watched(Storage(str(folder / "baseline"))).latents(), time.monotonic() - launch.began


def _chain(folder: Path, rng: random.Random, good: str, bad: str) -> Chain:
    folder.mkdir()
    uri = f"s3://bucket/soak-{folder.name}"
    output: dict[str, Any] = {"uri": uri, "storage": {"endpoint_url": bad, "allow_http": True, "timeout": TIMEOUT}}
    return Chain(folder, rng, output, Storage(uri, good, allow_http=True), patience=600)


def _tell(kills: list[Kill], undisturbed: float) -> None:
    print(
        f"\n{'process':9} {'kills':>5} {'run ended':>9} {'next rows after, median':>24} {'longest':>9} {'rows redone':>12}"
    )
    kinds: dict[str, list[Kill]] = defaultdict(list)
    for kill in kills:
        kinds[kill.process].append(kill)
    for name, found in [*sorted(kinds.items(), key=lambda item: -len(item[1])), ("all", kills)]:
        took = [kill.recovery for kill in found if kill.recovery] or [0.0]
        ended = sum(kill.outcome == "ended" for kill in found)
        redone = sum(kill.redone for kill in found) / len(found)
        print(f"{name:9} {len(found):5} {ended:9} {statistics.median(took):22.1f} s {max(took):7.1f} s {redone:12.1f}")
    print(f"baseline: a whole undisturbed run of 36 rows on a local folder, {undisturbed:.1f} s")


if __name__ == "__main__":
    main()
