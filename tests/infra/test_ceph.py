from __future__ import annotations

from pathlib import Path

import pytest

from infra.ceph import PACKAGES, one_node_ceph
from infra.errors import UserError


def test_without_ceph_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=rf"^ceph-mon, .* not found; .*{PACKAGES}$"), one_node_ceph(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
