"""Breaks each CPU kernel in one place and shows which test goes red: a test that cannot fail is none.

    python tests/break_kernels.py > docs/broken-kernels.md

Works on a copy of the tree. A break whose text is no longer in the source is an error; one that
leaves every test green is reported, and the exit status is 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# File of csrc/cpu, what is broken, its text, the text instead, the test file that must notice.
BREAKS = (
    (
        "row_stats.h",
        "the maximum's own term is dropped from the log-norm",
        "sum.max_count - 1);",
        "sum.max_count - 2);",
        "test_interpolate.py",
    ),
    (
        "row_stats.h",
        "the maximum's own term is counted twice",
        "tail += where(~is_max, term);",
        "tail += where(~is_max, term) + where(is_max, term);",
        "test_token_log_probs.py",
    ),
    (
        "interpolate.cpp",
        "padding columns come out as 0",
        "    fill_chunk(args.out, state.row, stop, end, -kInfinity);\n  }",
        "    fill_chunk(args.out, state.row, stop, end, 0.f);\n  }",
        "test_interpolate.py",
    ),
    (
        "interpolate.cpp",
        "the base is mixed in with the memory's weight",
        "make_model(state.base.used, base, 1.f, ::log1p(-lmbda))",
        "make_model(state.base.used, base, 1.f, ::log(lmbda))",
        "test_interpolate.py",
    ),
    (
        "interpolate.cpp",
        "a chunk's exponentials are taken to be relative to the row's maximum",
        "::exp(gap * model.inv_temperature + model.offset)",
        "::exp(0. * gap + model.offset)",
        "test_interpolate.py",
    ),
    (
        "interpolate.cpp",
        "columns too improbable for the kept exponentials are not made again",
        "if (any(least < kLeastProb)) {",
        "if (false) {",
        "test_interpolate.py",
    ),
    (
        "interpolate.cpp",
        "the gradient of a tensor lmbda at its ends has the wrong sign",
        "::expm1(m - b) : -::expm1(b - m)",
        "-::expm1(m - b) : ::expm1(b - m)",
        "test_interpolate.py",
    ),
    (
        "choose_token.cpp",
        "equal tokens are kept from the highest id on",
        "log_probs[a] > log_probs[b] : a < b;",
        "log_probs[a] > log_probs[b] : a > b;",
        "test_interpolate_sample.py",
    ),
    (
        "choose_token.cpp",
        "min-p is measured against all of the mass",
        "weights[ids[end - 1]] < args.min_p)",
        "weights[ids[end - 1]] < args.min_p * total)",
        "test_interpolate_sample.py",
    ),
    (
        "interpolate_sample.cpp",
        "the draw forgets its temperature",
        "vec_exp(gap / args.temperature)",
        "vec_exp(gap)",
        "test_interpolate_sample.py",
    ),
    (
        "token_log_probs.cpp",
        "a label beyond the vocabulary is not noticed",
        "label >= 0 && label < args.vocab\n                   ?",
        "label >= 0 && label < args.logits.cols\n                   ?",
        "test_token_log_probs.py",
    ),
    (
        "softmax_gradient.h",
        "the gradient forgets the log-norm",
        "(load_as<kType>(x, i, lanes) - gradient.stats.max) - gradient.stats.log_norm",
        "(load_as<kType>(x, i, lanes) - gradient.stats.max)",
        "test_token_log_probs.py",
    ),
    (
        "softmax_gradient.h",
        "a chunk's exponentials are taken to be relative to the row's maximum",
        "log_prob(sum.max, gradient.stats)",
        "-gradient.stats.log_norm",
        "test_sparse_kl.py",
    ),
    (
        "sparse_kl.cpp",
        "the gradient takes every target row to sum to 1",
        "weight.kl * (mass * q - p)",
        "weight.kl * (q - p)",
        "test_sparse_kl.py",
    ),
    (
        "sparse_kl.cpp",
        "a normaliser is ignored",
        "args.normalizer != nullptr ? static_cast<double>(*args.normalizer)",
        "false ? static_cast<double>(*args.normalizer)",
        "test_sparse_kl.py",
    ),
    (
        "sparse_kl.cpp",
        "a gradient made in forward is not rescaled in backward",
        "if (*args.grad_loss == 1.f) return {};",
        "return {};",
        "test_sparse_kl.py",
    ),
    (
        "knn_scatter.cpp",
        "equal probabilities are not put in order of their ids",
        "  sort_ties(keys, scratch, n);\n}",
        "}",
        "test_knn_scatter.py",
    ),
    (
        "knn_scatter.cpp",
        "a token below 0 counts as token 0",
        "token < 0 ? -1 : static_cast<int32_t>(token)",
        "token < 0 ? 0 : static_cast<int32_t>(token)",
        "test_knn_scatter.py",
    ),
)


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def main() -> int:
    survivors = 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "memdec"
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        environment = {**os.environ, "MEMDEC_CUDA": "off", "PYTHONPATH": str(copy)}
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        for file, what, old, new, test in BREAKS:
            path = copy / "csrc" / "cpu" / file
            source = path.read_text()
            if source.count(old) != 1:
                raise SystemExit(f"{file} has {source.count(old)} places like {old!r}, expected 1")
            path.write_text(source.replace(old, new))
            run(build, cwd=copy, env=environment, check=True)
            command = [sys.executable, "-m", "pytest", f"tests/ops/{test}", "-x", "-q"]
            result = run(
                [*command, "-k", "native", "-p", "no:cacheprovider"], cwd=copy, env=environment
            )
            red = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
            name = (
                red[0].split("::")[-1].split(" - ")[0].split("[")[0] if red else "none: it survived"
            )
            survivors += not red
            rows.append(f"| {file} | {what} | {test}: `{name}` |")
            print(rows[-1], file=sys.stderr, flush=True)
            path.write_text(source)
    print("# Kernels broken on purpose\n")
    print("For whoever changes a kernel or its tests: which test notices which mistake.\n")
    print(
        "Each CPU kernel was broken in one place, built, and put back; the last column is the first"
    )
    print(
        "test that went red. The same tests hold the CUDA kernels, which were not broken this way.\n"
    )
    print("| file in csrc/cpu | break | caught by |\n|---|---|---|")
    print("\n".join(rows))
    print("\nMade by `python tests/break_kernels.py`.")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
