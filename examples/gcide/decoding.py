"""What a token costs at decoding: base, base and memory, kNN-LM with its search, a longer prompt.

    python examples/gcide/decoding.py --base SmolLM2.gguf --tokens gcide --work work \\
        --result parts.json
    python examples/gcide/decoding.py ... --shapes   # Qwen2.5's 7B and 0.5B, random weights

Greedy, bfloat16, every contender on the same prompts. A path is how tokens are made: transformers'
``generate``; a plain loop with a growing cache, which the neighbours' search fits into; and a CUDA
graph of one step with static caches, base and memory side by side on two streams. Overhead is
against the base on the same path.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lab.command import memory_setting, open_experiment, part_parser, write_part
from lab.experiment import Experiment
from lab.memories import trained_memory
from lab.neighbours import k_of, open_datastore
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, StaticCache

from memdec import MemoryDecoderForCausalLM
from memdec.console import say
from memdec.data.datastore import Datastore
from memdec.modeling.cache import CACHE
from memdec.modeling.key_layer import KeyRecorder
from memdec.modeling.loading import load_model
from memdec.ops import interpolate_sample

BATCHES = (1, 32)
LMBDA = 0.7  # no time depends on it
KNN_TEMPERATURE = 10.0
QWEN_7B = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
QWEN_7B |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
QWEN_05B = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
QWEN_05B |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN_TOKENS = 151665  # len(tokenizer) of Qwen2.5

RETRIEVAL = "in-context retrieval"

Decode = Callable[[Tensor, int], Tensor]  # prompts [batch, length], new tokens: [batch, new]
Contender = tuple[str, str, Decode]  # a path's name, and a row's


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt, of the entries that retrieval puts before it, and of an answer."""

    prompt: int
    retrieved: int
    new: int
    repeats: int


def main(arguments: Sequence[str] | None = None) -> None:
    options = part_parser(__doc__.splitlines()[0])
    options.add_argument("--shapes", action="store_true", help="time Qwen2.5's shapes instead")
    options.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    options.add_argument("--retrieved", type=int, default=512, help="tokens retrieved before it")
    options.add_argument("--new", type=int, default=48, help="tokens to add")
    options.add_argument("--repeats", type=int, default=7, help="timed rounds, after one untimed")
    options = options.parse_args(arguments)
    lengths = Lengths(options.prompt, options.retrieved, options.new, options.repeats)
    experiment = open_experiment(options)
    if options.shapes:
        name, made = "decoding of other shapes", _shapes(experiment, lengths)
    else:
        memory = trained_memory(experiment, memory_setting(experiment, options.memory))
        name, made = "decoding", _real(experiment, memory, lengths)
    part: dict[str, Any] = {"lengths": vars(lengths), "dtype": "bfloat16", "rows": []}
    for row in made:  # written as they come: what was timed stays if a later batch fails
        part["rows"].append(row)
        write_part(options.result, name, experiment, part)


def _real(experiment: Experiment, memory_path: str, lengths: Lengths) -> Iterator[dict[str, Any]]:
    """The experiment's base and memory, and a kNN-LM on the base's keys, as the paper's is."""
    store = open_datastore(experiment, "base")
    base, memory = (
        load_model(path, device=experiment.device, dtype="bfloat16")
        for path in (experiment.base, memory_path)
    )
    width = experiment.corpus.vocab_size
    pair = MemoryDecoderForCausalLM.from_models(
        base, memory, lmbda=LMBDA, tokenizer=experiment.corpus.tokenizer()
    )
    contenders: list[Contender] = [
        *_of_base("generate", lambda: generating(base)),
        ("generate", "base and memory", generating(pair)),
        *_of_base("loop", lambda: looping(base)),
        ("loop", "base and memory", looping(pair)),
        ("loop", "kNN-LM", searching(base, store, k_of(store))),
        *_of_base("graph", lambda: StaticLoop([base], width)),
        ("graph", "base and memory", StaticLoop([base, memory], width)),
    ]
    longest = lengths.prompt + lengths.retrieved
    tokens = experiment.corpus.split("test").read(0, max(BATCHES) * longest)
    prompts = torch.from_numpy(tokens.astype(np.int64)).view(max(BATCHES), longest)
    yield from _time_all(contenders, prompts.to(experiment.device), lengths, store.size)


def _shapes(experiment: Experiment, lengths: Lengths) -> Iterator[dict[str, Any]]:
    """Random weights: the time of a step does not depend on what a model knows."""
    models = []
    with torch.device(experiment.device):
        for shape, tied in ((QWEN_7B, False), (QWEN_05B, True)):
            config = Qwen2Config(**shape, tie_word_embeddings=tied)
            made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            models.append(made.eval())
    base, memory = models
    pair = MemoryDecoderForCausalLM.from_models(base, memory, lmbda=LMBDA)
    pair.config.tokenizer_size = QWEN_TOKENS
    contenders: list[Contender] = [
        *_of_base("generate", lambda: generating(base)),
        ("generate", "base and memory", generating(pair)),
        *_of_base("graph", lambda: StaticLoop([base], QWEN_TOKENS)),
        ("graph", "base and memory", StaticLoop([base, memory], QWEN_TOKENS)),
    ]
    generator = torch.Generator().manual_seed(0)
    shape = (max(BATCHES), lengths.prompt + lengths.retrieved)
    prompts = torch.randint(QWEN_TOKENS, shape, generator=generator).to(experiment.device)
    yield from _time_all(contenders, prompts, lengths, None)


def _of_base(path: str, make: Callable[[], Decode]) -> list[Contender]:
    """The base on a path; once more for a longer prompt, since a graph is of one length."""
    return [(path, "base", make()), (path, RETRIEVAL, make())]


def _time_all(
    contenders: Sequence[Contender],
    prompts: Tensor,
    lengths: Lengths,
    keys: int | None,
) -> Iterator[dict[str, Any]]:
    """A row a contender and batch; those of a batch take turns, so that what disturbs one meets all."""
    for batch in BATCHES:
        short, long = (
            prompts[:batch, -length:].contiguous()
            for length in (lengths.prompt, lengths.prompt + lengths.retrieved)
        )
        runs = [(decode, long if name == RETRIEVAL else short) for _, name, decode in contenders]
        timed = _time(runs, lengths)
        for (path, name, _), times in zip(contenders, timed, strict=True):
            row = {"path": path, "name": name, "batch": batch, **times}
            yield row | ({"keys": keys} if name == "kNN-LM" else {})
            low, high = (1e3 * end for end in times["quartiles"])
            say(f"{path}, {name}, {batch}: {low:.2f} to {high:.2f} ms a token")


def _time(runs: Sequence[tuple[Decode, Tensor]], lengths: Lengths) -> list[dict[str, Any]]:
    """Of each run in seconds, medians: `first`, until the first token; `answer`, until the last.

    `token` is the median, `quartiles` the first and third, of what one more token took in a round.
    """
    seconds = np.empty((1 + lengths.repeats, len(runs), 2))
    for turn in range(len(seconds)):
        for number, (decode, prompts) in enumerate(runs):
            for which, new in enumerate((1, lengths.new)):
                _wait(prompts)
                start = time.perf_counter()
                decode(prompts, new)
                _wait(prompts)
                seconds[turn, number, which] = time.perf_counter() - start
        gc.collect()
    first, answer = np.moveaxis(seconds[1:], 2, 0)  # the first round is not timed
    token = (answer - first) / (lengths.new - 1)
    low, middle, high = np.quantile(token, (0.25, 0.5, 0.75), axis=0)
    return [
        {
            "token": float(middle[number]),
            "quartiles": [float(low[number]), float(high[number])],
            "first": float(np.median(first[:, number])),
            "answer": float(np.median(answer[:, number])),
        }
        for number in range(len(runs))
    ]


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def generating(model: PreTrainedModel) -> Decode:
    """transformers' own ``generate``."""
    model.generation_config.eos_token_id = None  # an answer has the length asked for
    model.generation_config.pad_token_id = 0

    def decode(prompts: Tensor, new: int) -> Tensor:
        mask = torch.ones_like(prompts)
        made = model.generate(prompts, attention_mask=mask, max_new_tokens=new, do_sample=False)
        return made[:, prompts.shape[1] :]

    return decode


def looping(model: PreTrainedModel, change: Callable[[Tensor], Tensor] | None = None) -> Decode:
    """One forward pass a token, and nothing else but a `change` of its logits [batch, vocabulary]."""

    @torch.inference_mode()
    def decode(prompts: Tensor, new: int) -> Tensor:
        tokens, cache, found = prompts, None, []
        for _ in range(new):
            answer = model(input_ids=tokens, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            cache, scores = answer[CACHE], answer.logits[:, -1]
            tokens = (change(scores) if change else scores).argmax(dim=1, keepdim=True)
            found.append(tokens)
        return torch.cat(found, dim=1)

    return decode


def searching(model: PreTrainedModel, store: Datastore, k: int) -> Decode:
    """A loop with an exact search for each token (arXiv 1911.00172)."""

    def decode(prompts: Tensor, new: int) -> Tensor:
        with KeyRecorder(model, store.key_layer) as recorder:

            def mixed(logits: Tensor) -> Tensor:
                near = store.find(recorder.keys[:, -1].float().cpu().numpy(), k)
                weights = (-near.distances.to(logits.device) / KNN_TEMPERATURE).softmax(dim=1)
                tokens = store.tokens_of(near.ids).to(logits.device).long()
                probs = (1 - LMBDA) * logits.float().softmax(dim=1)
                return probs.scatter_add_(1, tokens, LMBDA * weights)

            return looping(model, mixed)(prompts, new)

    return decode


class StaticLoop:
    """A loop over static caches whose step is one CUDA graph; the CPU runs the step as it is.

    Args:
        models: the base, or base and memory, which then run on two streams.
        vocab_size: real tokens of both.
    """

    def __init__(self, models: Sequence[PreTrainedModel], vocab_size: int) -> None:
        self.models = models
        self.vocab_size = vocab_size
        self._shape: tuple[int, ...] = ()

    @torch.inference_mode()
    def __call__(self, prompts: Tensor, new: int) -> Tensor:
        if self._shape != prompts.shape or new > self._room:
            self._prepare(prompts, max(new, 64))
        for cache in self._caches:
            cache.reset()
        self._token.copy_(self._pick(self._run(prompts)))
        found = [self._token.clone()]
        for _ in range(new - 1):
            self._step()
            found.append(self._token.clone())
        return torch.cat(found, dim=1)

    def _prepare(self, prompts: Tensor, room: int) -> None:
        """Caches for prompts of this shape and `room` tokens after them, and the graph."""
        self._graph = None
        self._shape, self._room = prompts.shape, room
        self._token = torch.zeros_like(prompts[:, :1])
        self._caches = [
            StaticCache(config=model.config, max_cache_len=prompts.shape[1] + room)
            for model in self.models
        ]
        if prompts.is_cuda:
            self._beside = torch.cuda.Stream()
        self._run(prompts)  # makes the caches' tensors
        if not prompts.is_cuda:
            return
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is set up at first use must not be captured
            for _ in range(3):
                self._advance()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._advance()

    def _step(self) -> None:
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()

    def _advance(self) -> None:
        self._token.copy_(self._pick(self._run(self._token)))

    def _run(self, tokens: Tensor) -> list[Tensor]:
        """The logits of each model's last position, [batch, its width]."""

        def one(model: PreTrainedModel, cache: StaticCache) -> Tensor:
            answer = model(input_ids=tokens, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            return answer.logits[:, -1]

        if len(self.models) == 1 or not tokens.is_cuda:
            return [one(*pair) for pair in zip(self.models, self._caches, strict=True)]
        here = torch.cuda.current_stream()
        self._beside.wait_stream(here)
        with torch.cuda.stream(self._beside):
            memory = one(self.models[1], self._caches[1])
        base = one(self.models[0], self._caches[0])
        here.wait_stream(self._beside)
        return [base, memory]

    def _pick(self, logits: list[Tensor]) -> Tensor:
        """The most probable token, [batch, 1]."""
        if len(logits) == 1:
            return logits[0][:, : self.vocab_size].argmax(dim=1, keepdim=True)
        tokens, _ = interpolate_sample(*logits, LMBDA, temperature=0, vocab_size=self.vocab_size)
        return tokens[:, None]


if __name__ == "__main__":
    main()
