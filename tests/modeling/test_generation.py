from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_models import saved, tiny_model, tiny_tokenizer

from memdec import MemoryDecoderForCausalLM
from memdec.data.artefact import stage
from memdec.errors import MemdecError
from memdec.generation import GenerateConfig, generate
from memdec.modeling.gate import Gate
from memdec.modeling.loading import load_model, model_fingerprint

PROMPT = "w3 w4 w5"
IDS = torch.tensor([[3, 4, 5]])


@pytest.fixture
def models(tmp_path: Path) -> dict[str, object]:
    """A base and a memory trained by the stage, which chose lmbda 0.6."""
    base = saved(tiny_model("Llama", eos_token_id=None), tmp_path / "base", tiny_tokenizer())
    stage = tmp_path / "train"
    saved(tiny_model("GPT2", seed=1), stage / "memory", tiny_tokenizer())
    (stage / "manifest.json").write_text(json.dumps({"best": {"lmbda": 0.6}}))
    return {"base": str(base), "memory": stage, "device": "cpu"}


def expected_text(
    models: dict[str, object], lmbda: float | Gate, steps: int, **options: object
) -> str:
    base = load_model(str(models["base"]))
    memory = load_model(Path(str(models["memory"])) / "memory")
    joint = MemoryDecoderForCausalLM.from_models(
        base, memory, lmbda=lmbda, tokenizer=tiny_tokenizer()
    )
    torch.manual_seed(0)
    options = {"do_sample": False} | options
    whole = joint.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=steps, **options
    )
    return tiny_tokenizer().decode(whole[0, 3:], skip_special_tokens=True)


def test_prints_prompt_and_greedy_continuation(
    models: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    [result] = generate(GenerateConfig(prompt=(PROMPT,), lmbda=0.4, max_new_tokens=6, **models))
    assert result.joint == expected_text(models, 0.4, 6)
    assert result.base is None
    assert capsys.readouterr().out.split() == f"{PROMPT} {result.joint}".split()


def test_lmbda_of_the_training_is_the_default(models: dict) -> None:
    config = GenerateConfig(prompt=(PROMPT,), max_new_tokens=6, **models)
    assert generate(config)[0].joint == expected_text(models, 0.6, 6)
    inner = models | {"memory": models["memory"] / "memory"}
    config = GenerateConfig(prompt=(PROMPT,), max_new_tokens=6, **inner)
    assert generate(config)[0].joint == expected_text(models, 0.6, 6)


# Three hidden units that look at both models' confidence and at the gains before.
GATE = Gate(
    (
        (-1.0, 0.2, 1.5, -0.2, 0.5, 0.0),
        (0.5, 0.3, 0.0, -0.5, 0.0, 1.0),
        (0.0, 0.5, 1.0, 0.0, 2.0, 0.0),
    ),
    hidden_bias=(0.5, 0.2, -0.5),
    output_weight=(2.0, 1.0, 1.5),
    output_bias=1.0,
)


def write_evaluation(models: dict, path: Path, gate: dict) -> Path:
    """What eval leaves: its lmbda, and a gate."""
    inputs = {"base": models["base"], "memory": models["memory"] / "memory"}
    inputs = {name: model_fingerprint(model) for name, model in inputs.items()}
    results = {"lmbda": {"joint": 0.2}, "gate": gate}
    with stage(path, "eval", {}, inputs) as writer:
        writer.write("eval.json", lambda file: file.write(json.dumps(results).encode()))
        writer.finish()
    return path


@pytest.fixture
def evaluation(models: dict, tmp_path: Path) -> Path:
    """Beside the training."""
    return write_evaluation(models, tmp_path / "eval", dataclasses.asdict(GATE))


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ({}, {}),
        ({"sample": True, "top_k": 8}, {"do_sample": True, "top_k": 8, "top_p": 1.0}),
        ({"beams": 4}, {"num_beams": 4}),
    ],
)
def test_adaptive_takes_the_gate_of_the_evaluation(
    models: dict, evaluation: Path, flags: dict, options: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"prompt": (PROMPT,), "max_new_tokens": 12, "lmbda": "adaptive", "compare": True}
    [result] = generate(GenerateConfig(**wanted, **flags, **models))
    assert result.joint == expected_text(models, GATE, 12, **options)
    assert "[base and memory, lmbda adaptive]" in capsys.readouterr().out
    moved = evaluation.rename(evaluation.with_name("moved"))
    with pytest.raises(MemdecError, match="lmbda adaptive needs an evaluation"):
        generate(GenerateConfig(**wanted, **models))
    [again] = generate(GenerateConfig(**wanted, **flags, **models, evaluation=moved))
    assert again == result


def test_an_evaluation_with_another_kind_of_gate_is_refused(models: dict, tmp_path: Path) -> None:
    old = write_evaluation(models, tmp_path / "eval", {"bias": 1.0, "base_entropy": 0.4})
    with pytest.raises(MemdecError, match=r"expected a gate with hidden_weight.*, got bias, base_"):
        generate(GenerateConfig(prompt=(PROMPT,), lmbda="adaptive", **models, evaluation=old))


def test_an_evaluation_that_is_given_says_lmbda(models: dict, evaluation: Path) -> None:
    config = GenerateConfig(
        prompt=(PROMPT,), max_new_tokens=6, evaluation=evaluation, compare=True, **models
    )
    assert generate(config)[0].joint == expected_text(models, 0.2, 6)


def test_an_evaluation_of_another_memory_is_refused(models: dict, evaluation: Path) -> None:
    saved(tiny_model("GPT2", seed=2), models["memory"] / "memory")
    with pytest.raises(MemdecError, match="was made with memory"):
        generate(GenerateConfig(prompt=(PROMPT,), lmbda="adaptive", **models))


def test_compare_shows_the_base_alone(models: dict, capsys: pytest.CaptureFixture[str]) -> None:
    config = GenerateConfig(prompt=(PROMPT,), compare=True, max_new_tokens=6, **models)
    [result] = generate(config)
    assert result.base == expected_text(models, 0.0, 6)
    assert result.base != result.joint
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[base]"
    assert lines[1].split() == f"{PROMPT} {result.base}".split()
    assert lines[2] == "[base and memory, lmbda 0.6]"
    assert lines[3].split() == f"{PROMPT} {result.joint}".split()


def test_each_prompt_is_continued_by_itself(models: dict) -> None:
    config = GenerateConfig(prompt=("w9", PROMPT), max_new_tokens=4, **models)
    first, second = generate(config)
    assert (first.prompt, second.prompt) == ("w9", PROMPT)
    assert second.joint == expected_text(models, 0.6, 4)


def test_beams(models: dict, capsys: pytest.CaptureFixture[str]) -> None:
    config = GenerateConfig(prompt=(PROMPT,), beams=4, max_new_tokens=6, **models)
    [result] = generate(config)
    assert result.joint == expected_text(models, 0.6, 6, num_beams=4)
    assert capsys.readouterr().out.split() == f"{PROMPT} {result.joint}".split()


@pytest.mark.parametrize("option", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.5}])
def test_options_of_the_draw_without_one_are_refused(models: dict, option: dict) -> None:
    with pytest.raises(MemdecError, match="give sample too"):
        GenerateConfig(prompt=(PROMPT,), **option, **models)


def test_sampling_follows_its_options_and_the_seed(models: dict) -> None:
    options = {"temperature": 0.9, "top_k": 8, "top_p": 0.95}
    config = GenerateConfig(prompt=(PROMPT,), sample=True, max_new_tokens=12, **options, **models)
    expected = expected_text(models, 0.6, 12, do_sample=True, **options)
    assert generate(config)[0].joint == expected
    other = GenerateConfig(
        prompt=(PROMPT,), sample=True, max_new_tokens=12, seed=1, **options, **models
    )
    assert generate(other)[0].joint != expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 1.5}, r"lmbda must be in \[0, 1\] or adaptive, got 1.5"),
        ({"prompt": ()}, "prompt must be given at least once"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": 0.0}, "temperature must be from 1e-30 to 1e30, got 0.0"),
        ({"temperature": 1e39}, "temperature must be from 1e-30 to 1e30"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"beams": 0}, "beams must be at least 1"),
        ({"base": "/no/such/model"}, "no model at /no/such/model"),
        ({"memory": "/no/such/memory", "lmbda": 0.3}, "no model at /no/such/memory"),
        ({"memory": "/no/such/memory"}, "no model at /no/such/memory"),
        ({"memory": "/no/such/memory", "lmbda": "adaptive"}, "no model at /no/such/memory"),
        ({"prompt": ("",)}, "the prompt '' has no tokens"),
        (
            {"max_new_tokens": 1022},
            "3 tokens and max_new_tokens 1022 exceed the 1024 positions of the memory",
        ),
    ],
)
def test_bad_requests_are_refused(models: dict, options: dict, message: str) -> None:
    with pytest.raises(MemdecError, match=message):
        generate(GenerateConfig(**({"prompt": (PROMPT,)} | models | options)))


def test_tokenizers_that_differ_are_refused(models: dict) -> None:
    tiny_tokenizer(change={8: "x"}).save_pretrained(models["memory"] / "memory")
    with pytest.raises(MemdecError, match="id 8 is 'w8' in the base and 'x' in the memory"):
        generate(GenerateConfig(prompt=(PROMPT,), **models))


def test_base_without_tokenizer_is_refused(models: dict, tmp_path: Path) -> None:
    bare = saved(tiny_model("Llama"), tmp_path / "bare")
    with pytest.raises(MemdecError, match="no tokenizer beside the base"):
        generate(GenerateConfig(prompt=(PROMPT,), **(models | {"base": str(bare)})))
