"""What the compiler says of every CUDA kernel: registers, spilled bytes, shared memory. Needs nvcc, no GPU.

python benchmarks/registers.py > docs/registers.md
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCH = "sm_90"
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(.*?)\n",
    re.DOTALL,
)


def report(source: Path) -> list[tuple[str, str, int, int, str]]:
    """Kernel, registers and so on of each entry function of a file."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={ARCH}", "-Xptxas=-v", "-Xcompiler=-fPIC"]
        command += [f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", f"{folder}/object.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found = ENTRY.findall(done.stdout + done.stderr)
    names = subprocess.run(
        ["c++filt"], input="\n".join(name for name, *_ in found), capture_output=True, text=True
    ).stdout.splitlines()
    rows = []
    for name, (_, stores, loads, registers, rest) in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        rows.append((short(name), registers, int(stores), int(loads), shared[1] if shared else ""))
    return rows


def short(name: str) -> str:
    """A demangled kernel without namespaces, return type and parameters."""
    name = re.sub(r"memdec::cuda::|\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void ", "", name)
    name = re.sub(r"\(\s*GroupSum\)|\(Args.*$", "", name)
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    return name[:end].replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")


def main() -> None:
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc was not found on PATH")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    print("# The compiler's report\n")
    print(
        "For whoever changes a CUDA kernel ([kernels.md](kernels.md)): what registers and shared memory"
    )
    print("each takes, and what it spills.\n")
    print(f"nvcc {release[1] if release else '?'}, {ARCH}, by `python benchmarks/registers.py`.\n")
    print("| file | kernel | registers | bytes spilled, stored / loaded | static shared bytes |")
    print("|---|---|---|---|---|")
    for source in sorted((ROOT / "csrc").glob("*/*.cu")):
        for kernel, registers, stores, loads, shared in report(source):
            spilled = f"{stores} / {loads}" if stores or loads else "none"
            print(f"| {source.name} | `{kernel}` | {registers} | {spilled} | {shared} |")
        print(source.name, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
