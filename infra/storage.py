"""Where a dataset's bytes are: a root on any fsspec filesystem, local by default, S3 through s3fs.

Everything is named relative to the root. Local files are written under a temporary name and renamed, so that a name that
exists is whole; object stores give the same by themselves.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import posixpath
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from uuid import uuid4

from infra.errors import UserError
from infra.secrets import refuse_credentials

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from fsspec import AbstractFileSystem
    from pyarrow.fs import FileSystem

T = TypeVar("T")

CREATE_ATTEMPTS = 5
DELTA_ATTEMPTS = 6
"""deltalake repeats most requests itself; not a listing that is cut short, nor a conditional put that was not answered."""

REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
"""What a disk says that is full, or that will not be written by this user."""


@contextmanager
def reaching(root: str) -> Iterator[None]:
    """Tell a user whose storage cannot be reached so in one line; for what is done before a run begins."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("botocore", "aiobotocore")):
            raise
        said = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
        answer = getattr(error.__cause__, "response", None)
        code = str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""
        if code and code not in said:  # Ceph's answers have no other words
            said = code if said in ("", "None") else f"{code}: {said}"
        raise UserError(
            f"output.uri: {root} cannot be reached ({type(error).__name__}: {said[:300]}); check the name, the credentials"
            " in the environment and output.storage"
        ) from error


@contextmanager
def writing(root: str) -> Iterator[None]:
    """Tell a user whose storage is full, or may not be written, so in one line. Trying again would not help."""
    try:
        yield
    except Exception as error:
        if (said := refused(error)) is None:
            raise
        raise UserError(f"output.uri: {root} cannot be written ({said}); free space or choose another place") from error


def refused(error: Exception) -> str | None:
    """What `error` says, if it says that the storage refuses to be written. Delta's errors give the number as text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found.group(1))
    return os.strerror(number) if number in REFUSED else None


def make_folder(option: str, folder: Path) -> None:
    """A local folder, made where it is not there; UserError that names `option` where it cannot be, or may not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        said = "" if os.access(folder, os.W_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        said = error.strerror or str(error)
    if said:
        raise UserError(f"{option}: {folder} cannot be written ({said}); choose another place")


def pauses(attempts: int) -> Iterator[float]:
    """Seconds to wait after each failed attempt but the last: random, so that many clients do not come back at once."""
    for attempt in range(attempts - 1):
        yield random.uniform(0, min(8.0, 0.1 * 2**attempt))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A local file to write piece by piece that is there, or replaced, once the block ends. One writer at a time.

    Its temporary name is always `<path>.tmp`: what a killed writer has left is written over by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        yield file
    temporary.replace(path)


@dataclass(frozen=True)
class Storage:
    """A dataset's root. Frozen and picklable: a worker opens its own connections, with credentials that it finds itself.

    Args:
        root: a folder or an fsspec URL.
        endpoint_url: the S3 endpoint; None for the provider's own.
        region: of the bucket.
        allow_http: whether the endpoint may be one without TLS.
        path_style: whether the bucket is in the path and not in the host's name; None: it is where there is an endpoint_url.
        profile: named profile of the AWS configuration files that credentials come from; None for the usual chain.
        server_side_encryption: AES256 or aws:kms; None leaves it to the bucket.
        kms_key_id: the key of aws:kms.
        timeout: seconds without an answer after which a request is given up and repeated.
    """

    root: str
    endpoint_url: str | None = None
    region: str | None = None
    allow_http: bool = False
    path_style: bool | None = None
    profile: str | None = None
    server_side_encryption: str | None = None
    kms_key_id: str | None = None
    timeout: float = 20.0

    def __post_init__(self) -> None:
        refuse_credentials("output.uri", self.root)
        refuse_credentials("output.storage.endpoint_url", self.endpoint_url or "")

    @cached_property
    def fs(self) -> AbstractFileSystem:
        import fsspec

        if not self.is_s3:
            try:
                return fsspec.filesystem(self.protocol)
            except (ValueError, ImportError) as error:
                said = " ".join(str(error).split())[:200]
                raise UserError(
                    f"output.uri: {self.root} cannot be reached ({said}); give a folder or an s3:// URL"
                ) from error
        from infra.s3 import filesystem

        return filesystem(self)

    @cached_property
    def parts(self) -> FileSystem | None:
        """Where pyarrow reads tables' files; None for local ones."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        if self.is_local:
            return None
        if not self.is_s3:
            return PyFileSystem(FSSpecHandler(self.fs))
        from infra.s3 import Parts

        return PyFileSystem(Parts(self.fs))

    @cached_property
    def handles(self) -> dict[str, tuple[int, DeltaTable]]:
        """Tables that this process has open to look at, by name, and the `credentials` they were opened with."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def protocol(self) -> str:
        return self.root.split("://", 1)[0] if "://" in self.root else "file"

    @property
    def is_s3(self) -> bool:
        return self.protocol in ("s3", "s3a")

    @property
    def is_local(self) -> bool:
        return self.protocol == "file"

    def path(self, name: str = "") -> str:
        """`name` as the filesystem wants it."""
        root = self.root.split("://", 1)[1] if "://" in self.root else self.root
        return posixpath.join(root, name) if name else root

    def write_bytes(self, name: str, data: bytes) -> None:
        if self.is_local:
            with self.writing(name) as file:
                file.write(data)
        elif self.is_s3:
            from infra.s3 import PART_BYTES

            with self._completing(name, len(data)):
                self.fs.pipe_file(self.path(name), data, chunksize=PART_BYTES)
        else:
            self.fs.pipe_file(self.path(name), data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write piece by piece. It is there once the block ends, and never where the block raises."""
        path = self.path(name)
        if not self.is_local:
            file = self.fs.open(path, "wb")
            try:
                yield file
                with self._completing(name, file.tell()):
                    file.close()
            except BaseException:
                file.closed = True  # or it would upload what is left when it is collected
                with contextlib.suppress(OSError):
                    file.discard()
                raise
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        temporary = f"{path}.{uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as local:  # noqa: PTH123
                yield local
            os.replace(temporary, path)  # noqa: PTH105
        except BaseException as error:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            if isinstance(error, OSError) and error.filename is None:
                error.filename = path  # a full disk does not say which
            raise

    @contextlib.contextmanager
    def _completing(self, name: str, nbytes: int) -> Iterator[None]:
        """The answer to the end of an upload in parts may be lost; asked again, S3 says that it knows of no such upload."""
        try:
            yield
        except FileNotFoundError:
            if self.size(name) != nbytes:
                raise

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of that name; whether it is there with this data now.

        Of two callers at once with different data, one does.
        """
        if not self.is_local:
            return self._create_object(name, data)
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        temporary = f"{path}.{uuid4().hex[:8]}.tmp"
        try:
            Path(temporary).write_bytes(data)
            _link(temporary, path)
        except FileExistsError:
            return False
        finally:
            Path(temporary).unlink(missing_ok=True)
        return True

    def _create_object(self, name: str, data: bytes) -> bool:
        for attempt in range(CREATE_ATTEMPTS):
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
                return True
            except FileExistsError:
                break
            except ConnectionError:
                raise  # asked often enough
            except OSError:
                # Stores that are not AWS say "it exists" in other words, and any may say "somebody else is at it".
                if self.exists(name):
                    break
                if attempt == CREATE_ATTEMPTS - 1:
                    raise
                time.sleep(0.1 * 2**attempt)
        # The answer to our own request may have been lost, and its repetition refused.
        return self.read_bytes(name) == data

    def read_bytes(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file, or its bytes from start to end: fewer where it ends before, and none where it does before `start`."""
        try:
            return bytes(self.fs.cat_file(self.path(name), start=start, end=end))
        except (FileNotFoundError, ConnectionError):
            raise
        except OSError:
            # An object store refuses a range that lies beyond the object; else the storage is to blame.
            if start is None or self.size(name) > start:
                raise
            return b""

    def read_ranges(self, places: list[tuple[str, int, int]]) -> list[bytes]:
        """The bytes from start to end of each (name, start, end), asked for at once where the filesystem can."""
        if not places:
            return []
        names, starts, ends = zip(*places, strict=True)
        found = self.fs.cat_ranges([self.path(name) for name in names], list(starts), list(ends), on_error="raise")
        return [bytes(data) for data in found]

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[io.BufferedIOBase]:
        """A file to read from its beginning to its end."""
        with self.fs.open(self.path(name), "rb", cache_type="readahead") as file:
            yield file

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        return int(self.fs.size(self.path(name)))

    def sizes(self, names: list[str]) -> list[int]:
        """Bytes of each file, asked for at once where the filesystem can. FileNotFoundError where one is not there."""
        return [int(size) for size in self.fs.sizes([self.path(name) for name in names])] if names else []

    def modified(self, name: str) -> float:
        """When a file was written, Unix seconds by the storage's own clock."""
        return float(self.fs.modified(self.path(name)).timestamp())

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone already is no error, because two runs may sweep the same dead one."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def files(self, folder: str = "", recursive: bool = True) -> Iterator[str]:
        """Names of the files below `folder`, relative to the root; none where there is no such folder."""
        base = self.path(folder)
        try:
            found = self.fs.find(base, maxdepth=None if recursive else 1)
        except FileNotFoundError:
            return
        prefix = self.fs._strip_protocol(self.path()).rstrip("/") + "/"
        for path in found:
            yield str(path).removeprefix(prefix)

    @property
    def delta_options(self) -> dict[str, str]:
        """What deltalake needs to reach the same place, credentials included: not to be kept, nor to be shown."""
        if not self.is_s3:
            return {}
        from infra.s3 import delta_options

        return delta_options(self)

    @property
    def credentials(self) -> int:
        """What tells `delta_options` from those of another time, and does not tell what is in them."""
        return hash(frozenset(self.delta_options.items()))

    def patiently(self, ask: Callable[[], T]) -> T:
        """What deltalake gives, asked again where an object store failed it. For what may be done twice."""
        if self.is_local:
            return ask()
        from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

        for pause in pauses(DELTA_ATTEMPTS):
            try:
                return ask()
            except (CommitFailedError, TableNotFoundError):
                raise
            except (DeltaError, OSError):
                time.sleep(pause)
        return ask()

    def delta_uri(self, table: str) -> str:
        return f"s3://{self.path(table)}" if self.is_s3 else self.path(table)


def _link(source: str, path: str) -> None:
    """Give the whole file at `source` another name, which must be free. FileExistsError where it is not."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:
        # A filesystem without hard links (FAT, some network ones): the name is won first, its content comes right after.
        with open(path, "xb"):  # noqa: PTH123
            os.replace(source, path)  # noqa: PTH105
