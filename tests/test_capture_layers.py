"""Which modules are taken as layers in models built to be tricky."""

from __future__ import annotations

import torch
from torch import nn

from autoshard import ir
from autoshard.capture import capture, check_against_eager


class Block(nn.Module):
    """Two matrices and a scale that differs from block to block."""

    def __init__(self, width: int, scale: float = 0.5, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(x, self.down(self.up(x).relu()) * self.scale)


class Stage(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, bias=i > 0) for i in range(depth))
        self.widen = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.widen(x)  # type: ignore[no-any-return]


class Scalar(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).square().mean()  # type: ignore[no-any-return]


def _capture(model: nn.Module) -> ir.Program:
    x = torch.randn(4, 8)
    program = capture(model, example_inputs=(x,))
    check_against_eager(program, model, (x,), rtol=1e-5)
    return program


def _layers(program: ir.Program) -> list[tuple[str, str]]:
    return [(s.path, s.layer.name) for s in program.segments if s.layer.kind == "layer"]


def test_blocks_of_stages_that_all_differ() -> None:
    """No two stages are equal, and in each the first block has no bias: blocks, not stages."""
    program = _capture(Scalar(nn.Sequential(Stage(8, 2), Stage(16, 3))))
    assert _layers(program) == [
        ("inner.0.blocks.0", "Block"), ("inner.0.blocks.1", "Block_1"),
        ("inner.1.blocks.0", "Block_2"), ("inner.1.blocks.1", "Block_3"),
        ("inner.1.blocks.2", "Block_3"),
    ]  # fmt: skip


def test_blocks_that_differ_in_a_number() -> None:
    """Drop rates and scales rise with depth: blocks are layers all the same, each its own class."""
    program = _capture(Scalar(nn.Sequential(*(Block(8, 0.1 * (i + 1)) for i in range(3)))))
    assert [name for _, name in _layers(program)] == ["Block", "Block_1", "Block_2"]


def test_a_single_layer() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(8, 8)
            self.layers = nn.ModuleList([Block(8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](self.stem(x)).sum()  # type: ignore[no-any-return]

    assert _layers(_capture(One())) == [("layers.0", "Block")]


def test_a_module_that_is_called_again_and_again() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(8, 8)
            self.block = Block(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for _ in range(3):
                x = self.block(x)
            return x.sum()

    program = _capture(Looped())
    assert _layers(program) == [("block", "Block")] * 3
    assert len({s.parameters for s in program.segments if s.layer.kind == "layer"}) == 1
    outputs = [name for s in program.segments for name in s.outputs]
    assert len(set(outputs)) == len(outputs)


def test_a_layer_whose_weight_lies_elsewhere_is_a_part() -> None:
    first, second, third = Block(8), Block(8), Block(8)
    third.down.weight = first.down.weight

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([first, second, third])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x.sum()

    program = _capture(Tied())
    kinds = {s.path: s.layer.kind for s in program.segments}
    assert kinds["blocks.0"] == kinds["blocks.1"] == "layer" and kinds["blocks.2"] == "part"
    (last,) = [s for s in program.segments if s.path == "blocks.2"]
    assert "blocks.0.down.weight" in last.parameters
    info = program.parameters["blocks.0.down.weight"]
    assert info.aliases == ("blocks.0.down.weight", "blocks.2.down.weight")


def test_frozen_and_trainable_layers_are_different_classes() -> None:
    stem = nn.Linear(8, 8).requires_grad_(False)
    blocks = nn.Sequential(stem, *(Block(8) for _ in range(4)))
    blocks[:3].requires_grad_(False)
    names = [name for _, name in _layers(_capture(Scalar(blocks)))]
    assert names == ["Block", "Block", "Block_1", "Block_2"]  # no gradient flows into the third


def test_models_without_layers_are_cut_at_every_weight() -> None:
    model = Scalar(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Tanh()))
    segments = _capture(model).segments
    assert [(s.path, s.layer.kind) for s in segments] == [("inner_0", "part"), ("inner_2", "part")]
