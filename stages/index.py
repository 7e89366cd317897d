"""IndexSources: a file to its clips: what it is, where its cuts are, and which pieces are long enough.

It comes before there are samples, as ExpandPrompts does: what it finds is committed as records, one for each clip.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from fractions import Fraction
from hashlib import file_digest
from typing import Any, BinaryIO, ClassVar

from infra.opening import TooLargeError, opened
from infra.storage import Storage
from stages.batch import Batch, SampleError, WorldFault, jsons, size, texts
from stages.clip import glance
from stages.crop import picture
from stages.cut import CutDetector, cuts, pieces
from stages.probe import Limits, Probe, probe

ATTEMPTS = 3
"""At a file behind HTTP, before it counts as unreachable."""
CAPTION_BYTES = 2**16
UNREACHABLE = "source_unreachable"
"""Of a file that another run may find."""


@dataclass(frozen=True)
class IndexSources:
    """Reads `source` (JSON {uri, caption, sidecars, caption_key, error}); adds `index` (JSON {kind, sha256, nbytes, seconds,
    caption, probe, clips: [{start, end, height, width, num_frames, fps, crop}], dropped: [{start, end, reason}]}).

    An image has one clip, without start and end. `height`, `width`, `num_frames` and `fps` are of what is kept of a clip;
    `crop` is [top, left, height, width] of the source's picture, null where nothing is cropped.

    Fails a source that cannot be opened (`source_missing`, `source_refused`, `source_unreachable`), is no sound media (see
    stages.probe), or has no clip in it (`no_clip`).
    """

    storage: Storage
    detector: CutDetector | None
    shortest: float
    longest: float
    limits: Limits
    crop: bool = True
    fps: float | None = None
    max_side: int | None = None

    name: ClassVar[str] = "index"
    reads: ClassVar[tuple[str, ...]] = ("source",)
    adds: ClassVar[tuple[str, ...]] = ("index",)
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        import av
        import cv2

        av.logging.set_level(None)
        cv2.setNumThreads(1)

    def __call__(self, batch: Batch) -> Batch:
        found: list[dict[str, Any]] = []
        kinds, errors = [""] * size(batch), [""] * size(batch)
        for at, source in enumerate(map(json.loads, batch["source"])):
            said: dict[str, Any] = {}
            try:
                self._index(source, said)
            except SampleError as fault:
                kinds[at], errors[at] = fault.error_type, f"{source['uri']}: {fault}"
            found.append(said)
        return {**batch, "index": jsons(found), "error_type": texts(kinds), "error": texts(errors)}

    def _index(self, source: dict[str, Any], said: dict[str, Any]) -> None:
        if source["error"]:
            raise SampleError("source_refused", source["error"])
        with opened_source(source["uri"], self.storage, self.limits.bytes) as file:
            said["nbytes"] = file.seek(0, 2)
            file.seek(0)
            said["sha256"] = file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            file.seek(0)
            found = probe(file, self.limits)
            facts = {name: value for name, value in asdict(found).items() if name != "keyframes"}
            said |= {"kind": found.kind, "seconds": found.seconds, "probe": facts}
            said["clips"], said["dropped"] = self._clips(file, found)
        said["caption"] = source["caption"] or self._beside(source)
        if not said["clips"]:
            why = "; ".join(
                f"{drop['start']:.2f}-{drop['end']:.2f} s: {drop['reason']}" for drop in said["dropped"][:5]
            )
            raise SampleError("no_clip", why)

    def _clips(self, file: BinaryIO, found: Probe) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if found.kind == "image":
            return [{"start": None, "end": None, "num_frames": 1, "fps": 1.0, **self._shape(file, found, 0.0, 0.0)}], []
        at = cuts(file, self.detector) if self.detector is not None else []
        tiled = pieces(at, found.seconds, self.shortest, self.longest, found.keyframes)
        fps = self.fps or float(Fraction(found.fps))
        clips = [
            {
                "start": piece.start,
                "end": piece.end,
                "num_frames": max(2, round((piece.end - piece.start) * fps)),
                "fps": fps,
                **self._shape(file, found, piece.start, piece.end),
            }
            for piece in tiled
            if piece.reason is None
        ]
        return clips, [
            {"start": piece.start, "end": piece.end, "reason": piece.reason} for piece in tiled if piece.reason
        ]

    def _shape(self, file: BinaryIO, found: Probe, start: float, end: float) -> dict[str, Any]:
        """Height and width of what is kept of a clip, and what of the picture is cropped out."""
        whole = 0, 0, found.height // 2 * 2, found.width // 2 * 2
        box = astuple(picture(glance(file, start, end))) if self.crop else whole
        height, width = scaled(box[2:], self.max_side)
        return {"height": height, "width": width, "crop": None if box == whole else box}

    def _beside(self, source: dict[str, Any]) -> str:
        """The caption in a file beside it; empty where none can be read."""
        for uri in source["sidecars"]:
            with opened_source(uri, self.storage, CAPTION_BYTES) as file:
                data = file.read(CAPTION_BYTES)
            text = data.decode("utf-8", "replace").strip()
            if uri.partition("#")[2].partition("@")[0].endswith(".json") or uri.endswith(".json"):
                text = _of_json(text, source["caption_key"])
            if text:
                return text
        return ""


def scaled(shape: tuple[int, ...], longer: int | None) -> tuple[int, int]:
    """Height and width of a picture whose longer side is brought down to `longer`, even, as 4:2:0 wants them."""
    height, width = shape
    share = min(1.0, longer / max(height, width)) if longer else 1.0
    return max(2, int(height * share + 1e-6) // 2 * 2), max(2, int(width * share + 1e-6) // 2 * 2)


@contextmanager
def opened_source(uri: str, storage: Storage, most: int) -> Iterator[BinaryIO]:
    """`infra.opening.opened`, whose errors are the source's, not the world's. WorldFault where object storage does not
    answer."""
    for attempt in range(1, ATTEMPTS + 1):
        entered = False
        try:
            with opened(uri, storage, most) as file:
                entered = True
                yield file
            return
        except SampleError:
            raise
        except TooLargeError as error:
            raise SampleError("too_large", str(error)) from error
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise SampleError("source_missing", type(error).__name__) from error
        except PermissionError as error:
            raise SampleError("source_refused", type(error).__name__) from error
        except Exception as error:
            if uri.startswith(("s3://", "s3a://")) and isinstance(error, OSError):
                raise WorldFault(f"{uri}: {type(error).__name__}: {error}") from error
            if entered:
                raise
            if attempt == ATTEMPTS:
                raise SampleError(UNREACHABLE, f"{type(error).__name__}: {error}"[:300]) from error
            time.sleep(attempt)


def _of_json(text: str, key: str) -> str:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    value = said.get(key) if isinstance(said, dict) else None
    return value.strip() if isinstance(value, str) else ""
