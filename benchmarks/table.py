"""Prints a pytest-benchmark JSON of this folder as a Markdown table.

python benchmarks/table.py benchmarks/results/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def table(path: Path) -> str:
    """One line a case: each contender's median time, share of the floor, speed-up over eager."""
    result = json.loads(path.read_text())
    machine = result["machine_info"]
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for bench in result["benchmarks"]:
        extra = bench["extra_info"]
        seconds = extra.get("device_seconds", bench["stats"]["median"])
        share = extra["floor_bytes"] / extra["copy_bandwidth"] / seconds
        memory = extra.get("peak_extra_bytes")
        cases.setdefault((extra["op"], extra["case"]), {})[extra["contender"]] = {
            "seconds": seconds,
            "share": share,
            "memory": memory,
        }
    contenders = ["dense eager", "eager", "compiled", "memdec"]
    used = [name for name in contenders if any(name in case for case in cases.values())]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['threads']} threads, kernels {machine['kernel_sources']}. Medians, cold cache.",
        "",
        "| op | case | " + " | ".join(used) + " | memdec: share of the floor | against eager |",
        "|---" * (len(used) + 4) + "|",
    ]
    for (op, case), found in cases.items():
        times = [_time(found[name]["seconds"]) if name in found else "" for name in used]
        ours = found.get("memdec")
        share = f"{ours['share']:.2f}" if ours else ""
        gain = ""
        if ours and "eager" in found:
            gain = f"{found['eager']['seconds'] / ours['seconds']:.1f} x"
        lines.append(f"| {op} | {case} | " + " | ".join(times) + f" | {share} | {gain} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(Path(name)) for name in sys.argv[1:]))
