"""Models with one property each that training must get right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import zoo_models
from torch import Tensor, nn
from zoo import Built

BATCH = 8
COLUMNS = 2048


class Dropped(nn.Module):
    """Each gradient tells how many samples kept its column: 8 draws with probability 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(COLUMNS))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * self.weight, 0.5, self.training).mean()


def dropped(dtype: torch.dtype) -> Built:
    return Dropped().to(dtype), {"x": torch.ones(BATCH, COLUMNS, dtype=dtype)}, None


def language_model_with_dropout(dtype: torch.dtype) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=33, n_positions=8, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.2,
            embd_pdrop=0.2, attn_pdrop=0.2, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip
    ids = torch.randint(0, 33, (BATCH, 8))
    return model.to(dtype).train(), {"input_ids": ids, "labels": ids}, None


def frozen(dtype: torch.dtype) -> Built:
    """The embedding (tied to the head), one block and a bias are not trained."""
    torch.manual_seed(0)
    model = zoo_models.NanoGPT()
    held = [model.wte.weight, *model.h[1].parameters(), model.h[2].mlp[0].bias]
    for parameter in held:
        parameter.requires_grad_(False)
    ids = torch.randint(0, zoo_models.VOCAB, (BATCH, zoo_models.SEQUENCE))
    return model.to(dtype).train(), (ids, ids.roll(-1, 1)), None


class Buffered(nn.Module):
    """A buffer that is read, one that forward writes to, and one that is in no checkpoint."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 16)
        self.norm = nn.BatchNorm1d(16, momentum=0.3)
        self.head = nn.Linear(16, 4)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 16))
        self.register_buffer("shift", torch.linspace(-1, 1, 16), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.norm(self.linear(x)) * self.scale + self.shift
        return F.mse_loss(self.head(F.gelu(hidden)), y)


def buffered(dtype: torch.dtype) -> Built:
    torch.manual_seed(0)
    batch = {"x": torch.randn(BATCH, 12, dtype=dtype), "y": torch.randn(BATCH, 4, dtype=dtype)}
    return Buffered().to(dtype).train(), batch, None


def uncounted(dtype: torch.dtype) -> Built:
    """A mean over targets of which one rank has many and another none."""
    torch.manual_seed(0)
    model = zoo_models.NanoGPT(depth=2)
    ids = torch.randint(0, zoo_models.VOCAB, (BATCH, zoo_models.SEQUENCE))
    targets = ids.roll(-1, 1)
    targets[:2] = -100
    targets[2:4, 3:] = -100
    return model.to(dtype).train(), (ids, targets), None


class Shared(nn.Module):
    """With one sample, gradients of its parameters are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(4, 4))
        self.offset = nn.Parameter(torch.randn(1, 4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 4), x], dim=1)
        x = x + self.positions.view(1, 4, 4) + self.offset
        return F.mse_loss(self.head(x).square(), y)


def shared_gradients(dtype: torch.dtype) -> Built:
    torch.manual_seed(0)
    batch = {"x": torch.randn(BATCH, 3, 4, dtype=dtype), "y": torch.randn(BATCH, 4, 2, dtype=dtype)}
    return Shared().to(dtype).train(), batch, None
