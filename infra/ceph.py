"""Ceph with an S3 gateway on this machine: one monitor, one OSD in memory, one radosgw, all on 127.0.0.1 and gone at the end.

A store that is nobody's imitation of S3, for tests and for trying things out. On Debian or Ubuntu, once, as root:

    apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common

and then, as any user, until Ctrl-C:

    python -m infra.ceph [--port N]
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from infra.errors import UserError

PACKAGES = "ceph-mon ceph-osd radosgw ceph-common"
PROGRAMS = ("ceph-mon", "monmaptool", "ceph-osd", "radosgw", "radosgw-admin", "ceph")
BUCKET = "bucket"
KMS_KEY = "key-1"
"""The one key that `server_side_encryption: aws:kms` can name."""

START_SECONDS = 180.0
ALONE = "--no-mon-config"
"""The monitor's settings are not asked for. A daemon that asks forgets `fsid` until it is told it anew, and an OSD that
is told late, on a busy machine, ends: "wrong fsid"."""

CONF = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
public addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
run dir = {folder}
admin socket =
log file = {folder}/$name.log
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {memory}
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw crypt require ssl = false
rgw crypt s3 kms backend = testing
rgw crypt s3 kms encryption keys = {kms_key}=AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=
"""


class Store(NamedTuple):
    """Where the gateway is and a key pair that it knows."""

    endpoint_url: str
    access_key: str
    secret_key: str


@contextmanager
def one_node_ceph(
    folder: Path, keys: Mapping[str, str] | None = None, port: int = 0, memory: int = 8 * 2**30
) -> Iterator[Store]:
    """A Ceph of its own with the bucket `bucket`, which ends with the block or, on SIGKILL, with the thread that began it.

    Args:
        folder: an empty folder for its logs and the monitor's database; objects are in memory.
        keys: access key -> secret key, all of one user; None for one pair.
        port: of the gateway; 0 for one that is free.
        memory: the most bytes that objects may take.
    """
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        raise UserError(f"{', '.join(missing)} not found; as root: apt-get install --no-install-recommends {PACKAGES}")
    keys = keys or {"ditmill": "ditmill-secret"}
    port = port or _free_port()
    found = {"fsid": uuid4(), "mon_port": _free_port(), "port": port, "folder": folder, "memory": memory}
    conf = folder / "ceph.conf"
    conf.write_text(CONF.format(**found, kms_key=KMS_KEY), encoding="utf-8")
    with ExitStack() as running:

        def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
            command = ["setpriv", "--pdeathsig", "KILL", program, "-c", str(conf), "-f", *arguments]
            with (folder / f"{program}.err").open("wb") as said:
                daemon = running.enter_context(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
                )
            running.callback(daemon.kill)
            return daemon

        def do(program: str, *arguments: str) -> None:
            _do([program, "-c", str(conf), *arguments], folder)

        monmap, osd_uuid = folder / "monmap", str(uuid4())
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        address = f"[v1:127.0.0.1:{found['mon_port']}]"
        _do(["monmaptool", "--create", "--fsid", str(found["fsid"]), "--addv", "a", address, str(monmap)], folder)
        do("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(monmap))
        start("ceph-mon", "-i", "a")
        do("ceph", "--connect-timeout", "60", "osd", "new", osd_uuid)
        do("ceph-osd", ALONE, "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        start("ceph-osd", ALONE, "-i", "0")
        gateway = start("radosgw", ALONE, "-n", "client.rgw")
        for at, (access, secret) in enumerate(keys.items()):
            what = ["key", "create", "--key-type=s3"] if at else ["user", "create", "--display-name=ditmill"]
            do("radosgw-admin", ALONE, *what, "--uid=ditmill", f"--access-key={access}", f"--secret-key={secret}")
        store = Store(f"http://127.0.0.1:{port}", *next(iter(keys.items())))
        _create_bucket(store, lambda: gateway.poll() is None)
        yield store


def _create_bucket(store: Store, lives: Callable[[], bool]) -> None:
    """Once the gateway answers."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session

    config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    client: Any = Session().create_client(
        "s3",
        "us-east-1",
        endpoint_url=store.endpoint_url,
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        config=config,
    )
    began = time.monotonic()
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
            return
        except (BotoCoreError, ClientError) as error:
            if not lives() or time.monotonic() - began > START_SECONDS:
                raise RuntimeError("the S3 gateway did not start; its logs are in its folder") from error
            time.sleep(0.2)


def _do(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=START_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} got no answer in {START_SECONDS:g} s; the logs: {folder}/*.log") from None
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.ceph", description="Ceph with an S3 gateway, until Ctrl-C.")
    parser.add_argument("--port", type=int, default=0, help="of the gateway; by default one that is free")
    port = parser.parse_args().port
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with (
            tempfile.TemporaryDirectory(prefix="ditmill-ceph-") as folder,
            one_node_ceph(Path(folder), port=port) as store,
        ):
            print(f"export AWS_ACCESS_KEY_ID={store.access_key} AWS_SECRET_ACCESS_KEY={store.secret_key}")
            print(f"export AWS_ENDPOINT_URL={store.endpoint_url} AWS_DEFAULT_REGION=us-east-1")
            print(f"# s3://{BUCKET}/ is there; Ctrl-C ends process {os.getpid()} and the store", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
