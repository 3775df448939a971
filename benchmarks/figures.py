"""Draws docs/benchmarks.svg: how far each contender is from what the memory allows.

python benchmarks/figures.py benchmarks/results/nvidia-h100-80gb-hbm3-*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.svg"
# Mid-tones that can be told apart, by colour-blind readers too, on white and on near-black.
COLOURS = {"dense eager": "#c2577a", "eager": "#d9822b", "compiled": "#9a6dd7", "memdec": "#2f81d6"}
GREY = "#8a8f98"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "text.color": GREY, "font.size": 10}
STYLE |= {"axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": GREY}
# Cases and their labels. Of each op a narrow and a wide vocabulary; few rows are bound by latency and
# left out.
SHOWN = {
    "fused_interpolate": {
        "bfloat16 -> float32, 4096 x 50,257": "4096 x 50,257",
        "bfloat16 -> float32, 4096 x 151,936": "4096 x 151,936",
        "bfloat16 -> bfloat16, 4096 x 151,936": "bfloat16 out",
    },
    "interpolate_sample": {
        "greedy, 4096 x 151,936": "greedy",
        "temperature 1, 4096 x 151,936": "temperature 1",
        "top-k 50, top-p 0.9, 4096 x 151,936": "top-k 50, top-p 0.9",
    },
    "token_log_probs": {"bfloat16, 4096 x 151,936": "4096 x 151,936"},
    "sparse_kl_loss, forward and backward": {
        "bfloat16, mean, 8192 x 50,257, 64 entries a row": "8192 x 50,257",
        "bfloat16, mean, 4096 x 151,936, 64 entries a row": "4096 x 151,936",
    },
    "knn_scatter": {
        "1024 rows, k = 1024": "1024 rows",
        "65536 rows, k = 1024": "65,536 rows",
    },
}


def times_the_floor(paths: list[Path]) -> dict[tuple[str, str], dict[str, float]]:
    """Of each case and contender: its time over that of the bytes that must move."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for path in paths:
        for bench in json.loads(path.read_text()).get("benchmarks", []):
            extra = bench["extra_info"]
            if "device_seconds" in extra and extra["contender"] in COLOURS and extra["floor_bytes"]:
                floor = extra["floor_bytes"] / extra["bandwidth"]
                case = found.setdefault((extra["op"], extra["case"]), {})
                case[extra["contender"]] = extra["device_seconds"] / floor
    return found


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]]
    found = times_the_floor(paths)
    cases = [(op, case) for op, listed in SHOWN.items() for case in listed]
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 1.0 + 0.32 * len(cases)), layout="constrained")
        axes = figure.add_subplot()
        for place, case in enumerate(cases):
            axes.hlines(place, 1, max(found[case].values()), color=GREY, alpha=0.35, linewidth=1)
        for contender, colour in COLOURS.items():
            places = [place for place, case in enumerate(cases) if contender in found[case]]
            across = [found[cases[place]][contender] for place in places]
            axes.plot(across, places, "o", color=colour, label=contender)
        axes.axvline(1, color=GREY, linewidth=1)
        axes.set_xscale("log")
        ticks = [1, 2, 5, 10, 20, 50, 100]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("time, in times of the floor")
        names = [f"{op.partition(',')[0]}: {SHOWN[op][case]}" for op, case in cases]
        axes.set_yticks(range(len(cases)), names)
        axes.invert_yaxis()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
        figure.legend(loc="outside upper center", ncols=len(COLOURS), frameon=False)
        figure.savefig(OUT, format="svg", metadata={"Date": None}, transparent=True)


if __name__ == "__main__":
    main()
