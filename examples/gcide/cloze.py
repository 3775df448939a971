"""Nothing else lost: multiple choice in the domain and outside it, for base, memory and rivals.

    python examples/gcide/cloze.py --base SmolLM2.gguf --tokens gcide --outside WordNet=wordnet \\
        --outside Python=python --work work --result parts.json

Zero-shot: an option's score is its log-probability after the prompt, or that by character, as
lm-eval's acc and acc_norm are. The same models through lm-eval itself: harness.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab.command import memory_setting, open_experiment, part_parser, write_part
from lab.experiment import Experiment
from lab.memories import trained_memory
from lab.neighbours import k_of, open_datastore, query_model, weigh_neighbours
from lab.questions import OPTIONS, TASKS, Question, make_questions
from lab.scores import score
from lab.texts import documents
from lab.tuning import adapted
from transformers import PreTrainedModel

from memdec.console import Progress, say
from memdec.data.datastore import Datastore
from memdec.evaluation.forward import LabelScores
from memdec.evaluation.gate import fit_gate, gate_lmbda
from memdec.evaluation.knn_lm import knn_label_log_probs
from memdec.evaluation.mixture import best_lmbda, mix_log_probs
from memdec.modeling.gate import confidence
from memdec.modeling.key_layer import KeyRecorder
from memdec.modeling.loading import load_model
from memdec.ops import token_log_probs

QUESTIONS = 400  # a task and text at most
_FEWEST = 20  # a text with less of a task leaves it out
_BATCH_TOKENS = 1 << 13
_CALIBRATION = 16384  # positions of validation by which the neighbours are weighed


@dataclass(frozen=True)
class Sequences:
    """Every option after its prompt, a row each.

    Attributes:
        tokens: int64 [rows, 1 + length], a separator first, separators after the end.
        scored: bool [rows, length], whether the position predicts a token of the option.
        characters: of each option, [rows].
        ends: tokens of each row without padding, [rows].
    """

    tokens: np.ndarray
    scored: np.ndarray
    characters: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, questions: Sequence[Question], tokenizer: Any, separator: int) -> Sequences:
        def encode(texts: list[str]) -> list[list[int]]:
            options = {"add_special_tokens": False, "split_special_tokens": True}
            return tokenizer(texts, **options)["input_ids"]

        pairs = [(one.prompt, option) for one in questions for option in one.options]
        rows = encode([prompt + option for prompt, option in pairs])
        prompts = encode([prompt for prompt, _ in pairs])
        tokens = np.full((len(rows), 1 + max(map(len, rows))), separator, np.int64)
        scored = np.zeros((len(rows), tokens.shape[1] - 1), bool)
        for row, prompt, line, mask in zip(rows, prompts, tokens, scored, strict=True):
            line[1 : 1 + len(row)] = row
            # A tokenizer may join the end of the prompt with the option's first characters.
            shared = next((i for i, t in enumerate(prompt) if row[i : i + 1] != [t]), len(prompt))
            mask[shared : len(row)] = True
        characters = np.array([len(option) for _, option in pairs])
        return cls(tokens, scored, characters, np.array([1 + len(row) for row in rows]))

    def batches(self) -> list[tuple[np.ndarray, int]]:
        """Rows of similar length and the longest one's, so that hardly any padding is computed."""
        found = []
        order = np.argsort(self.ends, kind="stable")[::-1]
        while len(order):
            longest = int(self.ends[order[0]])
            count = max(_BATCH_TOKENS // longest, 1)
            found.append((order[:count], longest))
            order = order[count:]
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = part_parser(__doc__.splitlines()[0])
    options.add_argument("--questions", type=int, default=QUESTIONS, help="a task and text at most")
    options.add_argument("--write", type=Path, help="folder for the questions, as harness.py reads")
    options = options.parse_args(arguments)
    experiment = open_experiment(options)
    questions = ask(experiment, options.questions)
    for (text, task), found in questions.items():
        say(f"{text}, {task}: {len(found)} questions")
        if options.write is not None:
            options.write.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(vars(one)) + "\n" for one in found]
            (options.write / f"{text}-{task}.jsonl".replace(" ", "-")).write_text("".join(lines))
    every = [one for found in questions.values() for one in found]
    corpus = experiment.corpus
    sequences = Sequences.of(every, corpus.tokenizer(), corpus.separator_id)
    log_probs = _answers(experiment, memory_setting(experiment, options.memory), sequences)
    part = {
        "memory": options.memory,
        "options": OPTIONS,
        "models": list(log_probs),
        "tasks": _tasks(questions, sequences, log_probs),
    }
    write_part(options.result, "cloze", experiment, part)


def ask(experiment: Experiment, most: int) -> dict[tuple[str, str], list[Question]]:
    """The questions of every text and task that has enough of them."""
    found = {}
    tokenizer = experiment.corpus.tokenizer()
    for text in ("test", *experiment.outside):
        texts = [tokenizer.decode(one) for one in documents(experiment.texts[text].stream)]
        for task in TASKS:
            questions = make_questions(task, texts, most)
            if len(questions) >= min(_FEWEST, most):
                found[text, task] = questions
    return found


def score_sequences(model: PreTrainedModel, sequences: Sequences, vocab_size: int) -> LabelScores:
    """A model's answers at every position, [rows * length]; zeros after a row's end."""
    rows, length = sequences.scored.shape
    found = np.zeros((3, rows, length), np.float32)
    with Progress("multiple choice", rows, "options") as progress:
        for batch, longest in sequences.batches():
            tokens = torch.from_numpy(sequences.tokens[batch, :longest]).to(model.device)
            with torch.inference_mode():
                logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
                label = token_log_probs(logits, tokens[:, 1:], vocab_size=vocab_size)
                sure = confidence(logits, vocab_size)
            answers = torch.cat([label[..., None], sure], dim=2).permute(2, 0, 1)
            found[:, batch, : longest - 1] = answers.cpu().numpy()
            progress.advance(len(batch))
    found[:, ~_inside(sequences)] = 0
    label, *sure = found.reshape(3, -1)
    return LabelScores(label, np.stack(sure, axis=1))


def score_neighbours(
    model: PreTrainedModel,
    store: Datastore,
    sequences: Sequences,
    *,
    k: int,
    temperature: float,
) -> np.ndarray:
    """Log p(label) among the nearest keys at the options' positions, [rows * length]."""
    found = np.zeros(sequences.scored.shape, np.float32)
    with (
        KeyRecorder(model, store.key_layer) as recorder,
        Progress("neighbours", len(found), "options") as progress,
    ):
        for batch, longest in sequences.batches():
            tokens = torch.from_numpy(sequences.tokens[batch, :longest]).to(model.device)
            with torch.inference_mode():
                model(input_ids=tokens[:, :-1], use_cache=False, logits_to_keep=1)
            mask = sequences.scored[batch, : longest - 1]
            queries = recorder.keys[torch.from_numpy(mask).to(model.device)].float().cpu().numpy()
            distances, ids = store.search(queries, k)
            labels = sequences.tokens[batch, 1:longest][mask]
            part = np.zeros(mask.shape, np.float32)
            part[mask] = knn_label_log_probs(
                distances, store.neighbor_tokens(ids), labels, temperature
            )
            found[batch, : longest - 1] = part
            progress.advance(len(batch))
    return found.ravel()


def _answers(
    experiment: Experiment, setting: Mapping[str, Any], sequences: Sequences
) -> dict[str, np.ndarray]:
    """Log p(label) by model, [rows, length]; every lmbda is the best on validation."""
    paths = {
        "base": ("base", experiment.base),
        "DAPT": ("adapted", adapted(experiment)),
        "memory": (setting["name"], trained_memory(experiment, setting)),
    }
    fitted_on = {name: score(experiment, *path)["validation"] for name, path in paths.items()}
    found = {}
    for name, (_, path) in paths.items():
        model = load_model(path, device=experiment.device)
        found[name] = score_sequences(model, sequences, experiment.corpus.vocab_size)
        del model
    base, memory = found["base"].log_probs, found["memory"].log_probs
    lmbda, _ = best_lmbda(fitted_on["base"].log_probs, fitted_on["memory"].log_probs)
    weights = _token_lmbda(experiment, fitted_on, found, sequences.scored.shape[1])
    answers = {
        "base": base,
        "DAPT": found["DAPT"].log_probs,
        "kNN-LM": _beside_neighbours(experiment, fitted_on["base"].log_probs, base, sequences),
        "joint": mix_log_probs(base, memory, lmbda),
        "joint, lmbda a token": mix_log_probs(base, memory, weights),
    }
    return {name: one.reshape(sequences.scored.shape) for name, one in answers.items()}


def _token_lmbda(
    experiment: Experiment,
    fitted_on: Mapping[str, LabelScores],
    found: Mapping[str, LabelScores],
    length: int,
) -> np.ndarray:
    """The gate's weight of the memory, [rows * length]; it starts anew at every row."""
    stream = experiment.corpus.split("validation")
    block_size = experiment.settings["block_size"]
    both = (fitted_on["base"], fitted_on["memory"])
    gate = fit_gate(*both, stream, block_size, device=experiment.device)
    return gate_lmbda(gate, found["base"], found["memory"], stream, length)


def _beside_neighbours(
    experiment: Experiment, validation: np.ndarray, base: np.ndarray, sequences: Sequences
) -> np.ndarray:
    """The base mixed with neighbours by the adapted teacher's keys, [rows * length]."""
    store = open_datastore(experiment, "adapted")
    chosen = weigh_neighbours(experiment, "adapted", validation, _CALIBRATION)
    near = score_neighbours(
        query_model(experiment, "adapted"),
        store,
        sequences,
        k=k_of(store),
        temperature=chosen["temperature"],
    )
    return mix_log_probs(base, near, chosen["lmbda"])


def _tasks(
    questions: Mapping[tuple[str, str], Sequence[Question]],
    sequences: Sequences,
    log_probs: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """Accuracy by task and model, plain and by character, with the difference from the base."""
    sums = {
        name: np.where(sequences.scored, values, 0).sum(axis=1)
        for name, values in log_probs.items()
    }
    tasks = []
    start = 0
    for (text, task), found in questions.items():
        rows = slice(start, start + OPTIONS * len(found))
        start = rows.stop
        right = np.array([one.answer for one in found])
        correct: dict[str, dict[str, np.ndarray]] = {}
        for name, values in sums.items():
            scores = values[rows]
            by_character = scores / sequences.characters[rows]
            correct[name] = {
                "plain": scores.reshape(-1, OPTIONS).argmax(1) == right,
                "by_character": by_character.reshape(-1, OPTIONS).argmax(1) == right,
            }
        models = {
            name: {how: accuracy(one, correct["base"][how]) for how, one in by_how.items()}
            for name, by_how in correct.items()
        }
        tasks.append({"text": text, "task": task, "questions": len(found), "models": models})
    return tasks


def accuracy(correct: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """Share of right answers and its 95 % interval (Wilson), and the paired one of the difference."""
    count, share, z = len(correct), float(correct.mean()), 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    gain = correct.astype(float) - base
    spread = z * float(gain.std()) / np.sqrt(count)
    difference = float(gain.mean())
    return {
        "accuracy": share,
        "interval": [float(middle - half), float(middle + half)],
        "from_base": difference,
        "from_base_interval": [difference - spread, difference + spread],
    }


def _inside(sequences: Sequences) -> np.ndarray:
    """Whether a position predicts a token of its row, bool [rows, length]."""
    return np.arange(sequences.scored.shape[1]) < sequences.ends[:, None] - 1


if __name__ == "__main__":
    main()
