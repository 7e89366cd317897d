from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from infra.commit import write_part
from infra.schema import FAILURES
from infra.storage import Storage
from pipelines.commits import Commits


def test_what_waits_for_a_commit_is_told_until_there_is_one(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    commits = Commits(storage, "run", every=3600)
    assert (commits.waiting, commits.lag) == (0, 0.0)
    rows = [{"sample_id": name, "attempt": 1, "run_id": "run", "cost": []} for name in ("a", "b")]
    part = write_part(storage, "failures/run-1.parquet", pa.Table.from_pylist(rows, FAILURES))
    commits.add([{"table": "failures", "path": part.path, "nbytes": part.nbytes, "rows": part.rows}])
    first = commits.lag
    assert commits.commit() == 0  # it is not time
    assert commits.waiting == 2 and 0 < first < commits.lag
    assert commits.commit(force=True) == 2
    assert (commits.waiting, commits.lag) == (0, 0.0)
