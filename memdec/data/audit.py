"""``memdec audit``: whether targets may be trained on, from a seeded sample of their rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memdec.config import Config, option, require
from memdec.console import Progress
from memdec.data.artefact import Artefact, check_input, write_json
from memdec.data.contexts import Contexts, contexts_of
from memdec.data.corpus import TokenCorpus
from memdec.data.datastore import Datastore
from memdec.data.targets import TargetStore
from memdec.errors import MemdecError

if TYPE_CHECKING:  # torch is slow to import, and --help needs the config alone
    import torch

    from memdec.ops import SparseTargets

# Sums of float32 probabilities, and the same row computed again on another kind of device.
_SUM_TOLERANCE = 1e-3
_ROW_TOLERANCE = 1e-2

_ROWS_A_SEARCH = 256
_KEYS_A_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Config):
    """Options of ``memdec audit``."""

    targets: Path = option(help="directory of the stage targets")
    tokens: Path = option(help="directory of the stage prepare")
    datastore: Path | None = option(
        None, help="directory of the stage datastore, where the targets were made with one"
    )
    model: str | None = option(None, help="the teacher, where the datastore keeps no keys")
    rows: int = option(512, help="rows in the sample")
    seed: int = option(0, help="seed of the sample")
    min_recall: float = option(0.8, help="least share of the true k neighbours that is found")
    max_dropped_mass: float = option(0.1, help="most probability cut off a row, on average")
    report: Path | None = option(None, help="also write the result here, as JSON")
    device: str = option("auto", help="auto, cpu or cuda")

    def check(self) -> None:
        require(self.rows > 0, "rows", "above 0", self.rows)
        there = self.report is None or self.report.absolute().parent.is_dir()
        require(there, "report", "in a directory that is there", str(self.report))
        for name in ("min_recall", "max_dropped_mass"):
            require(0 <= getattr(self, name) <= 1, name, "in [0, 1]", getattr(self, name))


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    expected: str
    found: str


def audit(config: AuditConfig) -> int:
    """Checks a sample of the rows; prints a table and writes `config.report`.

    The rows: stored position and label against the corpus, offsets, token ids, probabilities, row
    sums and dropped mass. The search that made them, for targets from neighbours: each answer
    sorted by (distance, id) and without the position itself, recall@k against an exhaustive search
    in float64, and for the source ``knn`` each stored row against the same row made again. Of kept
    neighbours the rows are those at the temperature of the stage.

    Before all that every file of the inputs is read and compared with the SHA-256 it was written
    with; where one differs nothing else is looked at.

    The report is ``{"passed": bool, "targets": fingerprint, "rows": int, "seed": int, "recall":
    float | None, "dropped_mass": float, "checks": [{"name", "passed", "expected", "found"}]}``.

    Returns:
        0 when every check passed, else 1: the command's exit status.

    Raises:
        MemdecError: inputs that do not belong together, or a datastore that is needed and missing.
    """
    corpus = TokenCorpus.open(config.tokens)
    store = TargetStore.open(config.targets)
    check_input(store.artefact, "tokens", corpus.fingerprint)
    datastore = _datastore(config, store)
    generator = np.random.default_rng(config.seed)
    positions = np.sort(generator.choice(len(store), min(config.rows, len(store)), replace=False))
    inputs = [corpus.artefact, store.artefact, *([datastore.artefact] if datastore else [])]
    checks = [_check_files(inputs)]
    result: dict[str, Any] = {"recall": None, "dropped_mass": None}
    if checks[0].passed:
        checks.append(_check_widths(store) if store.keeps_neighbours else _check_offsets(store))
    if all(check.passed for check in checks):
        rows = store.gather(positions)
        mass = _mean_dropped_mass(rows.targets)
        result["dropped_mass"] = mass if math.isfinite(mass) else None
        checks += [
            _check_equal("positions", "the row's own", rows.positions.numpy(), positions),
            _check_labels(corpus, rows.labels.numpy(), positions),
            *([_check_distances(store, positions)] if store.keeps_neighbours else []),
            *_check_values(rows.targets, corpus.vocab_size),
            _at_most("mean dropped mass", mass, config.max_dropped_mass),
        ]
        if datastore is not None:
            intact = all(check.passed for check in checks)
            stored = rows.targets if intact and store.source == "knn" else None
            contexts = contexts_of(store.drop_same_context, corpus)
            search = _Search(store, datastore, positions, corpus.vocab_size, contexts)
            result["recall"] = search.run(stored)
            checks += search.checks(config.min_recall)
    passed = all(check.passed for check in checks)
    _print_table(checks, len(positions), config)
    if config.report is not None:
        report = {"passed": passed, "targets": store.fingerprint, "rows": len(positions)}
        report |= {"seed": config.seed, **result, "checks": [asdict(check) for check in checks]}
        write_json(config.report, report)
    return 0 if passed else 1


def _datastore(config: AuditConfig, store: TargetStore) -> Datastore | None:
    from memdec.modeling.loading import pick_device

    needed = "datastore" in store.artefact.manifest["inputs"]
    if needed != (config.datastore is not None):
        made = "with a datastore: give it" if needed else "without a datastore: give none"
        raise MemdecError(f"{config.targets} was made {made}")
    if config.datastore is None:
        return None
    datastore = Datastore.open(config.datastore, str(pick_device(config.device)))
    check_input(store.artefact, "datastore", datastore.fingerprint)
    return datastore.with_keys_of(config.model, TokenCorpus.open(config.tokens))


def _check_files(artefacts: Sequence[Artefact]) -> Check:
    changed = [artefact.path / name for artefact in artefacts for name in artefact.changed_files()]
    found = f"{changed[0]} is not, {len(changed)} in all" if changed else "all are"
    return Check("files", not changed, "as they were written", found)


def _check_offsets(store: TargetStore) -> Check:
    """Each shard's offsets rise from 0 to the number of its entries, a row for each position."""
    wrong = []
    rows = 0
    for number in range(store.artefact.field(int, "shards")):
        shard = store.shard(number)
        indptr = shard["indptr"]
        entries = {len(shard["token_ids"]), len(shard["probs"]), int(indptr[-1])}
        lengths = {len(shard[name]) for name in shard if name not in ("token_ids", "probs")}
        rows += len(indptr) - 1
        if (
            indptr[0] != 0
            or (np.diff(indptr) < 0).any()
            or len(entries) > 1
            or lengths != {len(indptr) - 1, len(indptr)}
        ):
            wrong.append(number)
    found = f"shards {wrong} do not" if wrong else "they do"
    if rows != len(store):
        found = f"{rows} rows"
    return Check("offsets", found == "they do", f"rise, and make {len(store)} rows in all", found)


def _check_widths(store: TargetStore) -> Check:
    """Each shard has a row for each position, of as many tokens as distances."""
    expected = f"{len(store)} rows of {store.k} neighbours"
    rows = 0
    for number in range(store.artefact.field(int, "shards")):
        shard = store.shard(number)
        shape = shard["tokens"].shape
        lengths = {len(array) for array in shard.values()}
        if shard["distances"].shape != shape or shape[1:] != (store.k,) or len(lengths) > 1:
            return Check("shapes", False, expected, f"shard {number} differs")
        rows += shape[0]
    return Check("shapes", rows == len(store), expected, f"{rows} rows")


def _check_distances(store: TargetStore, positions: np.ndarray) -> Check:
    """Nearest first and no number missing: that the k nearest are the first k, training relies on."""
    distances = store.gather_neighbours(positions).neighbours.distances.float()
    legal = (distances[:, 1:] >= distances[:, :-1]).all(dim=1) & (distances[:, 0] >= 0)
    wrong = int((~legal).sum())
    return Check("distances", wrong == 0, "from 0, rising", f"{wrong} rows do not")


def _check_labels(corpus: TokenCorpus, labels: np.ndarray, positions: np.ndarray) -> Check:
    stream = corpus.split("train")
    expected = [stream.read(position + 1, position + 2)[0] for position in positions.tolist()]
    return _check_equal("labels", "the corpus's tokens", labels, np.asarray(expected))


def _check_equal(name: str, expected: str, found: np.ndarray, truth: np.ndarray) -> Check:
    wrong = np.flatnonzero(found != truth)
    if not len(wrong):
        return Check(name, True, expected, "all equal")
    first = wrong[0]
    example = f"{found[first]} for {truth[first]}"
    return Check(name, False, expected, f"{len(wrong)} differ, as {example}")


def _check_values(rows: SparseTargets, vocab_size: int) -> Iterator[Check]:
    lengths = rows.indptr.diff()
    owner = np.repeat(np.arange(len(rows)), lengths.numpy())
    ids, probs = rows.token_ids.numpy(), rows.probs.numpy().astype(np.float64)
    inside = (ids >= 0) & (ids < vocab_size)
    pairs = np.stack([owner, ids], axis=1)
    repeats = len(pairs) - len(np.unique(pairs, axis=0))
    yield Check(
        "token ids",
        bool(inside.all()) and repeats == 0,
        f"in [0, {vocab_size}), distinct in a row",
        f"{(~inside).sum()} outside, {repeats} repeated",
    )
    legal = (probs > 0) & (probs <= 1)  # a NaN is not
    yield Check("probabilities", bool(legal.all()), "in (0, 1]", f"{(~legal).sum()} are not")
    sums = np.bincount(owner, weights=probs, minlength=len(rows))[lengths.numpy() > 0]
    error = float(np.abs(sums - 1).max(initial=0.0))
    yield Check(
        "row sums",
        error <= _SUM_TOLERANCE,
        f"1 within {_SUM_TOLERANCE:g}",
        f"off by at most {error:.2g}; {int((lengths == 0).sum())} rows are empty",
    )


def _mean_dropped_mass(rows: SparseTargets) -> float:
    return 0.0 if rows.dropped_mass is None else float(rows.dropped_mass.double().mean())


def _at_most(name: str, found: float, limit: float) -> Check:
    return Check(name, 0 <= found <= limit, f"at most {limit:g}", f"{found:.4g}")


class _Search:
    """The index's answers for the sampled rows, against exhaustive search and the stored rows."""

    def __init__(
        self,
        store: TargetStore,
        datastore: Datastore,
        positions: np.ndarray,
        vocab_size: int,
        contexts: Contexts | None,
    ) -> None:
        self.store = store
        self.datastore = datastore
        self.positions = positions
        self.vocab_size = vocab_size
        self.contexts = contexts
        self.unsorted = 0
        self.with_self = 0
        self.recall = 0.0
        self.differences: np.ndarray | None = None

    def run(self, stored: SparseTargets | None) -> float:
        """Searches, and compares with the `stored` rows where given; returns recall@k."""
        truths, hits = 0, 0
        differences = []
        with Progress("audit", len(self.positions), "rows") as progress:
            for start in range(0, len(self.positions), _ROWS_A_SEARCH):
                own = self.positions[start : start + _ROWS_A_SEARCH]
                keys = np.concatenate([self.datastore.keys(p, p + 1) for p in own.tolist()])
                distances, ids = self.datastore.search(keys, self.store.k, exclude=own)
                order = np.lexsort((np.where(ids < 0, np.inf, ids), distances), axis=1)
                self.unsorted += int((order != np.arange(self.store.k)).any(axis=1).sum())
                self.with_self += int((ids == own[:, None]).any(axis=1).sum())
                truths, hits = np.add(
                    (truths, hits), _exhaustive(self.datastore, keys, self.store.k, own, ids)
                )
                if stored is not None:
                    if self.contexts is not None:
                        windows = self.contexts.windows(self.contexts.tokens, own)
                        distances, ids = self.contexts.search(
                            self.datastore, keys, windows, self.store.k, own
                        )
                    rows = stored[start : start + len(own)]
                    differences.append(self._differences(rows, distances, ids))
                progress.advance(len(own))
        self.recall = float(hits / max(truths, 1))
        if stored is not None:
            self.differences = np.concatenate(differences)
        return self.recall

    def checks(self, min_recall: float) -> Iterator[Check]:
        yield Check(
            "neighbours' order",
            self.unsorted == 0,
            "by (distance, id)",
            f"{self.unsorted} rows are not",
        )
        yield Check(
            "the position itself",
            self.with_self == 0,
            "not among its neighbours",
            f"in {self.with_self} rows",
        )
        yield Check(
            f"recall@{self.store.k}",
            self.recall >= min_recall,
            f"at least {min_recall:g}",
            f"{self.recall:.4f}",
        )
        if self.differences is not None:
            wrong = int((~(self.differences <= _ROW_TOLERANCE)).sum())
            yield Check(
                "rows made again",
                wrong == 0,
                f"total variation at most {_ROW_TOLERANCE:g}",
                f"{wrong} differ, at most by {self.differences.max():.2g}",
            )

    def _differences(
        self, stored: SparseTargets, distances: np.ndarray, ids: np.ndarray
    ) -> np.ndarray:
        """Total variation between each stored row and the row of these neighbours."""
        import torch

        from memdec.ops import knn_scatter

        again = knn_scatter(
            torch.from_numpy(distances),
            torch.from_numpy(self.datastore.neighbor_tokens(ids)),
            temperature=self.store.temperature,
            max_entries=self.store.artefact.manifest["params"].get("max_entries"),
        )
        difference = stored.to_dense(self.vocab_size) - again.to_dense(self.vocab_size)
        return difference.abs().sum(1).div(2).numpy()


def _exhaustive(
    datastore: Datastore, keys: np.ndarray, k: int, own: np.ndarray, found: np.ndarray
) -> tuple[int, int]:
    """How many of the k nearest there are, and how many of them are in `found`, ids [n, k].

    In float64, by distance and not by id, so that any of several equally far counts. Shares no code
    with the indexes, which it judges.
    """
    import torch

    queries = torch.from_numpy(keys).to(datastore.device).double()
    ids = torch.from_numpy(found).to(queries.device)
    left_out = torch.from_numpy(own).to(queries.device)[:, None]
    nearest: torch.Tensor = queries.new_full((len(keys), k), torch.inf)
    reached = nearest.clone()
    for start in range(0, datastore.size, _KEYS_A_CHUNK):
        stop = min(start + _KEYS_A_CHUNK, datastore.size)
        chunk = torch.from_numpy(datastore.keys(start, stop)).to(queries.device).double()
        distances = torch.cdist(queries, chunk).square_()
        distances.masked_fill_(torch.arange(start, stop, device=ids.device) == left_out, torch.inf)
        here = (ids >= start) & (ids < stop)
        columns = (ids - start).clamp(0, stop - start - 1)
        reached = torch.where(here, distances.gather(1, columns), reached)
        nearest = torch.cat([nearest, distances], 1).topk(k, largest=False).values
    there = torch.isfinite(nearest).sum(1)
    farthest = nearest.gather(1, (there - 1).clamp(min=0)[:, None])
    hits = (torch.isfinite(reached) & (reached <= farthest * (1 + 1e-9))).sum(1)
    return int(there.sum()), int(torch.minimum(hits, there).sum())


def _print_table(checks: list[Check], rows: int, config: AuditConfig) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    passed = all(check.passed for check in checks)
    table = Table(
        title=f"{rows:,} rows of {config.targets}",
        caption="may be trained on" if passed else "must not be trained on",
        box=SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for header in ("", "expected", "found", ""):
        table.add_column(header, overflow="fold")
    for check in checks:
        table.add_row(check.name, check.expected, check.found, "ok" if check.passed else "FAILED")
    Console().print(table)
