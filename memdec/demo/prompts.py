"""Three beginnings of held-out topics, continued by the base alone and with the memory."""

from __future__ import annotations

from pathlib import Path

from memdec.report import Continuation

_PROMPTS = 3
_PROMPT_TOKENS = 24
_NEW_TOKENS = 32


def continuations(out: Path, base: Path, *, lmbda: float, device: str) -> list[Continuation]:
    """Prints and returns what follows the beginnings of documents spread over the test split."""
    from memdec.data.corpus import TokenCorpus
    from memdec.generation import GenerateConfig, generate

    corpus = TokenCorpus.open(out / "prepare")
    tokenizer, test = corpus.tokenizer(), corpus.split("test")
    firsts = [
        int(test.documents[number * len(test.documents) // _PROMPTS]) for number in range(_PROMPTS)
    ]
    cuts = [first + _PROMPT_TOKENS for first in firsts]
    prompts = [
        tokenizer.decode(test.read(first, cut)) for first, cut in zip(firsts, cuts, strict=True)
    ]
    originals = [
        tokenizer.decode(test.read(cut, min(cut + _NEW_TOKENS, len(test)))) for cut in cuts
    ]
    config = GenerateConfig(
        base=str(base),
        memory=out / "train",
        prompt=tuple(prompts),
        lmbda=lmbda,
        compare=True,
        max_new_tokens=_NEW_TOKENS,
        device=device,
    )
    return [
        Continuation(found.prompt, original, found.base or "", found.joint)
        for original, found in zip(originals, generate(config), strict=True)
    ]
