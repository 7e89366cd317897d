"""Credentials in URLs: refused where they come in, because errors and tables name URLs; and taken out of what is told."""

from __future__ import annotations

import re

from infra.errors import UserError

_USER = re.compile(r"""(://)[^/\s"'<>\\]*@""")
_SIGNED = re.compile(
    r"""(?i)([?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|(?:[a-z_]+[-_])?(?:token|key|secret)"""
    r"""|awsaccesskeyid|password|passwd)=)[^&\s"'<>\\#]+"""
)
_AUTHORITY = re.compile(r"([A-Za-z0-9+.-]{1,20})://([^/\s]*)@")
_NO_USER = ("github", "abfs", "abfss", "wasb", "wasbs")
"""Schemes that write a repository or a container where others have a user."""

# A secret key of AWS may hold a slash, and a bucket's name no colon.
_HELD = re.compile(r"s3a?://(?!arn:)[^/]*[:@]")
_TOLD = re.compile(r"(s3a?://)(?!arn:)[^@\s:]*:[^@\s]*@")

GONE = "REDACTED"


def redact(text: str) -> str:
    """The text without the user:password part of URLs, and without the values of signatures, tokens and passwords."""
    return _SIGNED.sub(rf"\1{GONE}", _USER.sub(r"\1", _TOLD.sub(r"\1", text)))


def holds_secret(url: str) -> bool:
    """Whether a URL carries credentials: a password, a signature or a token."""
    if _HELD.match(url):
        return True
    for scheme, user in _AUTHORITY.findall(url):
        if (":" in user or scheme.lower() in ("http", "https")) and scheme.lower() not in _NO_USER:
            return True
    return "://" in url and _SIGNED.search(url) is not None


def refuse_credentials(key: str, url: str) -> None:
    """UserError where `url` holds credentials. It does not repeat the URL."""
    if holds_secret(url):
        raise UserError(
            f"{key}: found credentials in a URL, where logs and tables would keep them; take them out, and give credentials"
            " in the environment, in a profile or by the machine's role"
        )
