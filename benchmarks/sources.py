"""Which sources a result was measured with."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def kernel_sources_sha256(backend: str) -> str:
    """Identifies the kernels of "cpu" or "cuda" that were measured, so that a stale result shows."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").glob(f"{backend}/*")) + sorted(ROOT.glob("csrc/common/*")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
