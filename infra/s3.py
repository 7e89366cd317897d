"""How S3 is reached: by s3fs for files and by deltalake for the tables' logs, with one set of settings and credentials.

Both repeat what fails and what is cut short. Credentials are botocore's to find: the environment, profiles, web identity,
the roles of containers and instances. They live in the memory of the process that uses them and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import pyarrow as pa
from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    MetadataRetrievalError,
    ResponseStreamingError,
)
from botocore.exceptions import (
    ConnectionError as ClientConnectionError,
)
from botocore.parsers import ResponseParserError
from botocore.session import Session
from pyarrow.fs import FSSpecHandler
from s3fs import S3FileSystem

from infra.errors import UserError
from infra.secrets import refuse_credentials
from infra.storage import pauses

if TYPE_CHECKING:
    from infra.storage import Storage

ATTEMPTS = 10
CONNECT_SECONDS = 5
PART_BYTES = 16 * 2**20
"""Of a large file one part is in memory at a time; 10,000 of them are the largest object that can be written."""

SMALL_BYTES = 2**18
KEPT_BYTES = 2**26
"""Of parts that are read whole, and of all of them that are kept."""

UNANSWERED = (
    ClientConnectionError,
    HTTPClientError,
    ResponseStreamingError,
    ResponseParserError,
    MetadataRetrievalError,
    CredentialRetrievalError,
    aiohttp.ClientError,
    asyncio.TimeoutError,
)
"""No answer, half an answer, or none of the service that hands out credentials."""

PASSING = re.compile(r"SlowDown|Throttl|RequestTimeout\b|InternalError|ServiceUnavailable|IncompleteBody|BadDigest")
"""Codes of answers that another try may not meet again, whatever their HTTP status."""


class PatientS3(S3FileSystem):
    """s3fs that takes a body as part of the answer: one that is cut short or stalls is asked for again, like any other.

    s3fs and botocore would each repeat on top of the other, and neither reads every body again. Here they repeat nothing.
    """

    retries = 1

    async def _call_s3(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        for pause in pauses(ATTEMPTS):
            try:
                return await self._ask(method, *arguments, **keywords)
            except Exception as error:
                if not _passes(error):
                    raise
            await asyncio.sleep(pause)
        try:
            return await self._ask(method, *arguments, **keywords)
        except UNANSWERED as error:  # callers know OSError, not what botocore and aiohttp raise
            said = f"{type(error).__name__}: {error}"
            raise ConnectionError(f"{method}: no whole answer in {ATTEMPTS} attempts, the last: {said}") from error

    async def _ask(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        answer = await super()._call_s3(method, *arguments, **keywords)
        if method == "get_object":
            body = answer["Body"]
            try:
                answer["Body"] = _Body(await body.read())
            finally:
                body.close()
        return answer

    def tail(self, path: str, nbytes: int) -> tuple[bytes, int]:
        """The last `nbytes` of a file that is not empty, and how many it has, by one request."""
        bucket, key, _ = self.split_path(path)
        answer = self.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes=-{nbytes}")
        return answer["Body"].data, int(answer["ContentRange"].rpartition("/")[2])

    def call_s3(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        from fsspec.asyn import sync

        return sync(self.loop, self._call_s3, method, *arguments, **keywords)


class _Body:
    """A body that has been read, with the interface of one that has not."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def read(self, amt: int = -1) -> bytes:
        data, self.data = (self.data, b"") if amt is None or amt < 0 else (self.data[:amt], self.data[amt:])
        return data

    def close(self) -> None:
        pass


def _passes(error: Exception) -> bool:
    """Whether asking again may help."""
    if isinstance(error, UNANSWERED):
        return True
    cause = error if isinstance(error, ClientError) else error.__cause__
    if not isinstance(cause, ClientError):
        return False
    status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or status == 429 or bool(PASSING.search(cause.response.get("Error", {}).get("Code", "")))


class Parts(FSSpecHandler):
    """Parquet files on S3, as pyarrow reads them. No name is used twice, so small ones are kept while there is room.

    pyarrow's own handler asks twice whether a file is there before it asks for its footer and then for its columns, in each
    pass over a table: a run goes over its samples a dozen times.
    """

    def __init__(self, fs: PatientS3) -> None:
        super().__init__(fs)
        self._sizes: dict[str, int] = {}
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def open_input_file(self, path: str) -> pa.NativeFile:
        with self._lock:
            data, size = self._kept.get(path), self._sizes.get(path)
        if size is None:
            data, size = self.fs.tail(path, SMALL_BYTES)
            with self._lock:
                self._keep(path, data, size)
        if data is not None and len(data) == size:
            return pa.BufferReader(data)
        return pa.PythonFile(self.fs.open(path, "rb", size=size), mode="r")

    def _keep(self, path: str, data: bytes, size: int) -> None:
        self._sizes[path] = size
        if len(data) == size and path not in self._kept:
            self._kept[path] = data
            self._nbytes += size
        while self._nbytes > KEPT_BYTES:
            old, gone = self._kept.popitem(last=False)
            self._nbytes -= len(gone)
            del self._sizes[old]


def filesystem(storage: Storage, cache_type: str = "none") -> PatientS3:
    """s3fs for a dataset. Readers of Parquet know what they need, and a read-ahead would fetch the rest too; files that are
    read from end to end want "readahead"."""
    style = {None: "auto", True: "path", False: "virtual"}[_path_style(storage)]
    settings: dict[str, Any] = {
        "endpoint_url": _endpoint(storage),
        "client_kwargs": {"region_name": storage.region} if storage.region else {},
        "config_kwargs": {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": storage.timeout,
            "s3": {"addressing_style": style},
        },
        "s3_additional_kwargs": _encryption(storage, "ServerSideEncryption", "SSEKMSKeyId"),
        "default_block_size": PART_BYTES,
        "default_cache_type": cache_type,
        "use_listings_cache": False,
    }
    if storage.profile:
        settings["profile"] = storage.profile
    return PatientS3(**settings)


class Upload(NamedTuple):
    """An upload in parts that was begun and neither completed nor aborted. It costs what its parts cost, and no listing
    shows it."""

    name: str
    upload_id: str
    began: float


def unfinished_uploads(storage: Storage) -> Iterator[Upload]:
    """Those under the dataset's root. PermissionError where they may not be listed."""
    fs = storage.fs
    bucket, _, prefix = f"{storage.path()}/".partition("/")
    more: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **more)
        for found in page.get("Uploads", ()):
            yield Upload(found["Key"].removeprefix(prefix), found["UploadId"], found["Initiated"].timestamp())
        if not page.get("IsTruncated"):
            return
        more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def abort_upload(storage: Storage, upload: Upload) -> None:
    bucket, _, key = storage.path(upload.name).partition("/")
    with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
        storage.fs.abort_mpu(bucket, key, upload.upload_id)


def delta_options(storage: Storage) -> dict[str, str]:
    """What deltalake needs to reach the same place. It holds credentials as they are now: ask anew, keep it nowhere."""
    seconds = f"{storage.timeout:g}s"
    options = {"conditional_put": "etag", "timeout": seconds, "connect_timeout": f"{CONNECT_SECONDS}s"}
    style = _path_style(storage)
    if style is not None:
        options["aws_virtual_hosted_style_request"] = "false" if style else "true"
    if endpoint := _endpoint(storage):
        options["aws_endpoint_url"] = _with_bucket(endpoint, storage) if style is False else endpoint
        if storage.allow_http or (not storage.endpoint_url and endpoint.startswith("http://")):
            options["aws_allow_http"] = "true"
    session = _session(storage.profile)
    if region := storage.region or session.get_config_variable("region"):
        options["aws_region"] = region
    options |= _encryption(storage, "aws_server_side_encryption", "aws_sse_kms_key_id")
    if found := session.get_credentials():  # botocore's own, which renew themselves before they expire
        now = found.get_frozen_credentials()
        options |= {"aws_access_key_id": now.access_key, "aws_secret_access_key": now.secret_key}
        if now.token:
            options["aws_session_token"] = now.token
        elif os.environ.get("AWS_SESSION_TOKEN"):  # deltalake would send it with a key that it does not belong to
            raise UserError(
                "output.storage.profile: the credentials found are not those of the environment, which has an"
                " AWS_SESSION_TOKEN; unset it, or leave out the profile"
            )
    return options


def _endpoint(storage: Storage) -> str | None:
    """The spec's endpoint or that of the environment, of which botocore and deltalake would each read other variables."""
    found = storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    refuse_credentials("AWS_ENDPOINT_URL", found or "")
    return found or None


def _path_style(storage: Storage) -> bool | None:
    """Whether the bucket is in the path; None leaves it to the library."""
    return bool(_endpoint(storage)) or None if storage.path_style is None else storage.path_style


def _with_bucket(endpoint: str, storage: Storage) -> str:
    """The endpoint with the bucket in its host's name, as deltalake wants it where the bucket is not in the path."""
    url, bucket = urlsplit(endpoint), storage.path().split("/", 1)[0]
    return url._replace(netloc=f"{bucket}.{url.netloc}").geturl()


def _encryption(storage: Storage, algorithm: str, key: str) -> dict[str, str]:
    asked = {algorithm: storage.server_side_encryption, key: storage.kms_key_id}
    return {name: value for name, value in asked.items() if value}


@cache
def _session(profile: str | None) -> Session:
    return Session(profile=profile)
