"""Base, and base with memory, in lm-eval (EleutherAI's language model evaluation harness).

    pip install lm-eval
    python examples/gcide/harness.py --base SmolLM2.gguf --memory work/train-8-layers-samples-longer \\
        --tasks hellaswag piqa arc_easy winogrande
    python examples/gcide/harness.py ... --tasks questions/*.jsonl   # of cloze.py --write questions

The pair is a transformers model, so lm-eval's own class for those takes it as it is; its tasks come
from the hub, those of a file of questions from the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import make_table

from memdec.pair import PairConfig, load_pair


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--memory", type=Path, required=True, help="what memdec train wrote")
    parser.add_argument("--lmbda", help="a number, or adaptive; by default the one train chose")
    parser.add_argument(
        "--tasks", nargs="+", required=True, help="lm-eval's, or files of questions"
    )
    parser.add_argument("--limit", type=int, help="questions of each task at most")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a context")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    pair = load_pair(
        PairConfig(
            base=options.base, memory=options.memory, lmbda=options.lmbda, device=options.device
        )
    )
    tasks = [own_task(Path(one)) if one.endswith(".jsonl") else one for one in options.tasks]
    for name, model in (("base", pair.base), ("base and memory", pair)):
        harness = HFLM(
            pretrained=model,
            tokenizer=pair.tokenizer,
            backend="causal",
            batch_size=options.batch_size,
            max_length=options.max_length,
        )
        found = simple_evaluate(model=harness, tasks=tasks, limit=options.limit)
        print(f"{name}\n\n{make_table(found)}")


def own_task(questions: Path) -> dict[str, Any]:
    """A task of lm-eval from a file of :class:`lab.questions.Question`, one a line."""
    return {
        "task": questions.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "answer",
        "target_delimiter": "",  # an option brings the white space that it begins with
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


if __name__ == "__main__":
    main()
