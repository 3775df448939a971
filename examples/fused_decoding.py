"""A plain PyTorch decoding loop of somebody else's shape, with memdec.ops and nothing else.

The loop, the modules and their state are this file's own. Before, two models were mixed by

    probs = (1 - lmbda) * torch.softmax(base_logits, -1) + lmbda * torch.softmax(memory_logits, -1)
    log_probs = probs.log()

which writes four (batch x vocabulary) matrices and turns small probabilities into -inf. Now it is
one call, `fused_interpolate`. The two models share their tokens but pad their output differently,
as Qwen2.5's sizes do (151,936 and 152,064 columns); `vocab_size` says how many tokens are real.

    python examples/fused_decoding.py
"""

import torch
from torch import Tensor, nn

from memdec.ops import fused_interpolate

VOCAB_SIZE = 97


class TinyModel(nn.Module):
    """A recurrent language model: tokens [batch] and a state in, logits and the next state out."""

    def __init__(self, width: int, output_width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, width)
        self.cell = nn.GRUCell(width, width)
        self.output = nn.Linear(width, output_width)

    def forward(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = self.cell(self.embedding(tokens), state)
        return self.output(state), state


@torch.inference_mode()
def decode(
    base: TinyModel, memory: TinyModel, prompt: Tensor, steps: int, lmbda: float
) -> tuple[Tensor, Tensor]:
    """Greedy decoding: the tokens [batch, steps] and their log-probabilities."""
    base_state = memory_state = None
    for token in prompt.T:
        base_logits, base_state = base(token, base_state)
        memory_logits, memory_state = memory(token, memory_state)
    tokens, scores = [], []
    for _ in range(steps):
        log_probs = fused_interpolate(base_logits, memory_logits, lmbda, vocab_size=VOCAB_SIZE)
        score, token = log_probs.max(dim=-1)
        tokens.append(token)
        scores.append(score)
        base_logits, base_state = base(token, base_state)
        memory_logits, memory_state = memory(token, memory_state)
    return torch.stack(tokens, dim=1), torch.stack(scores, dim=1)


def main() -> None:
    torch.manual_seed(0)
    base = TinyModel(width=32, output_width=112)
    memory = TinyModel(width=16, output_width=104)
    prompt = torch.randint(0, VOCAB_SIZE, (2, 5))
    for lmbda in (0.0, 0.5, 1.0):
        tokens, scores = decode(base, memory, prompt, steps=8, lmbda=lmbda)
        print(f"lmbda {lmbda}:", tokens.tolist(), f"mean log-probability {scores.mean():.3f}")


if __name__ == "__main__":
    main()
