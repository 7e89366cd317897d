"""Where a dataset's bytes are: a root on any fsspec filesystem, local by default, S3 through s3fs.

Everything is named relative to the root. Local files are written under a temporary name and renamed, so that a name that
exists is whole; object stores give the same by themselves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

from infra.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CREATE_ATTEMPTS = 5
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


@dataclass(frozen=True)
class Storage:
    """A dataset's root. Frozen and picklable: a worker opens its own connections. Credentials come from the environment."""

    root: str
    endpoint_url: str | None = None
    region: str | None = None
    allow_http: bool = False

    @cached_property
    def fs(self) -> AbstractFileSystem:
        import fsspec

        if not self.is_s3:
            return fsspec.filesystem(self.protocol)
        client: dict[str, Any] = {}
        if self.region:
            client["region_name"] = self.region
        return fsspec.filesystem("s3", endpoint_url=self.endpoint_url, client_kwargs=client, use_listings_cache=False)

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
        if not self.is_local:
            self.fs.pipe_file(self.path(name), data)
            return
        with self.writing(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write piece by piece. It is there once the block ends, and never where the block raises."""
        path = self.path(name)
        if not self.is_local:
            file = self.fs.open(path, "wb")
            try:
                yield file
            except BaseException:
                file.discard()
                file.closed = True  # or it would upload what is left when it is collected
                raise
            file.close()
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
        return bytes(self.fs.cat_file(self.path(name), start=start, end=end))

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
        """What deltalake needs to reach the same place."""
        if not self.is_s3:
            return {}
        options = {"conditional_put": "etag"}
        if self.endpoint_url:
            options["aws_endpoint_url"] = self.endpoint_url
            options["aws_virtual_hosted_style_request"] = "false"
        if self.region:
            options["aws_region"] = self.region
        if self.allow_http:
            options["aws_allow_http"] = "true"
        return options

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
