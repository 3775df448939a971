"""examples/fused_decoding.py runs, and decodes as the two lines that it replaces did."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "fused_decoding.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fused_decoding", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_runs(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    assert capsys.readouterr().out.count("mean log-probability") == 3


@torch.inference_mode()
def test_equals_the_lines_it_replaces(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_lines(base, memory, lmbda, *, vocab_size):
        base, memory = base[:, :vocab_size], memory[:, :vocab_size]
        probs = (1 - lmbda) * torch.softmax(base, -1) + lmbda * torch.softmax(memory, -1)
        return probs.log()

    torch.manual_seed(1)
    models = example.TinyModel(32, 112), example.TinyModel(16, 104)
    prompt = torch.randint(0, example.VOCAB_SIZE, (3, 5))
    tokens, scores = example.decode(*models, prompt, 20, 0.4)
    monkeypatch.setattr(example, "fused_interpolate", two_lines)
    wanted_tokens, wanted_scores = example.decode(*models, prompt, 20, 0.4)
    assert torch.equal(tokens, wanted_tokens)
    torch.testing.assert_close(scores, wanted_scores)
