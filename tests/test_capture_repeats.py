"""Layers that are traced once give the program that tracing all of them gives."""

from __future__ import annotations

import random

import pytest
import torch
import zoo
from special_models import language_model_with_dropout
from torch import nn

from autoshard import ir
from autoshard.capture import capture, repeats


@pytest.fixture
def captured(monkeypatch):
    """``(program, number of repeated calls)``; the program is compared with a capture in full."""

    def run(model, batch, loss_fn=None) -> tuple[ir.Program, int]:
        number = 0
        original = repeats.Repeats._repeat

        def counted(*args):
            nonlocal number
            number += 1
            return original(*args)

        with monkeypatch.context() as patched:
            patched.setattr(repeats.Repeats, "_repeat", counted)
            program = capture(model, example_inputs=batch, loss_fn=loss_fn)
        with monkeypatch.context() as patched:
            patched.setattr(repeats, "_rows", lambda model: [])
            full = capture(model, example_inputs=batch, loss_fn=loss_fn)
        assert program.segments == full.segments  # ops with their modules and source lines, too
        assert program.parameters == full.parameters
        assert program.fingerprint == full.fingerprint
        return program, number

    return run


@pytest.mark.parametrize(
    ("name", "least"),
    [("gpt2", 3), ("llama", 3), ("bert", 3), ("t5", 4), ("vit", 3), ("whisper", 4),
     ("encoder", 2), ("gemma3", 0), ("convnext", 0)],
)  # fmt: skip
def test_same_program_as_in_full(captured, name, least):
    model, batch, loss_fn = zoo.build(name)
    _, number = captured(model, batch, loss_fn)
    assert number >= least


def test_dropout_stays_one_op_per_layer(captured):
    program, number = captured(*language_model_with_dropout(torch.float32))
    assert number > 0
    drawn = {
        op.name for s in program.segments for op in s.layer.graph.ops if "dropout" in op.target
    }
    assert drawn


# ------------------------------------------------------------------- equal or only equal-looking


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.inner = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, *extra):
        return x + self.drop(self.inner(x)).relu()


class Model(nn.Module):
    """Four blocks, the arguments of each from ``extra``."""

    def __init__(self, block=Block, extra=lambda i, x: ()) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(block(i) for i in range(4))
        self.extra = extra

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x, *self.extra(i, x))
        return x.square().mean()


BATCH = (torch.randn(4, 8),)


def test_equal_blocks_are_traced_once(captured):
    assert captured(Model(), BATCH)[1] == 3


def test_skips_between_blocks_stay(captured):
    class Skipping(Model):
        def forward(self, x):
            first = self.blocks[0](self.stem(x))
            x = self.blocks[2](self.blocks[1](first)) + first
            return self.blocks[3](x).square().mean()

    assert captured(Skipping(), BATCH)[1] == 3


class Indexed(Block):
    def forward(self, x, *extra):
        return super().forward(x) if self.index % 2 else super().forward(x).tanh()


class Scaled(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.scale = float(index)

    def forward(self, x, *extra):
        return super().forward(x) * self.scale


class Counting(Block):
    calls = 0

    def forward(self, x, *extra):
        self.seen = getattr(self, "seen", 0) + 1
        return super().forward(x)


class Drawing(Block):
    def forward(self, x, *extra):
        return super().forward(x) * random.choice([1.0, 2.0, 3.0])


class Buffered(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("offset", torch.full((8,), float(index)))

    def forward(self, x, *extra):
        return super().forward(x) + self.offset


class Writing(Block):
    def forward(self, x, *extra):
        y = super().forward(x)
        x.add_(1.0)
        return y


@pytest.mark.parametrize("block", [Indexed, Scaled, Counting, Buffered, Writing])
def test_blocks_that_are_not_equal_are_not_merged(captured, block):
    assert captured(Model(block), BATCH)[1] == 0


def test_a_block_that_draws_in_python_is_no_template(captured):
    state = random.getstate()
    model = Model(Drawing)
    assert captured(model, BATCH)[1] == 0
    assert random.getstate() == state


def test_one_block_in_evaluation_mode(captured):
    model = Model()
    model.blocks[2].eval()
    assert captured(model, BATCH)[1] == 2


def test_a_forward_hook(captured):
    model = Model()
    model.blocks[1].inner.register_forward_hook(lambda module, args, output: 2 * output)
    assert captured(model, BATCH)[1] == 2


def test_a_frozen_parameter(captured):
    model = Model()
    model.blocks[3].inner.bias.requires_grad_(False)
    assert captured(model, BATCH)[1] == 2


def test_tied_inside_one_block_alone(captured):
    class Twice(Block):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.outer = nn.Linear(8, 8)

        def forward(self, x, *extra):
            return self.outer(self.inner(x))

    model = Model(Twice)
    model.blocks[1].outer.weight = model.blocks[1].inner.weight
    assert captured(model, BATCH)[1] == 2


def test_weights_shared_between_blocks(captured):
    model = Model()
    model.blocks[2].inner.weight = model.blocks[0].inner.weight
    program, number = captured(model, BATCH)
    assert number == 3
    assert any(len(p.aliases) == 2 for p in program.parameters.values())


def test_a_module_in_two_blocks(captured):
    model = Model()
    model.blocks[2].inner = model.blocks[0].inner
    captured(model, BATCH)


class Masked(Block):
    def forward(self, x, mask=None):
        y = super().forward(x)
        return y if mask is None else y * mask


def test_masks_of_one_kind_may_differ(captured):
    model = Model(Masked, lambda i, x: (x.sign() if i % 2 else x.abs(),))
    assert captured(model, BATCH)[1] == 3


@pytest.mark.parametrize(
    "extra",
    [
        lambda i, x: (x.sign(),) if i == 2 else (),
        lambda i, x: (x.sign() if i == 2 else x.sign()[:1],),
        lambda i, x: (x if i == 2 else x.sign(),),
        lambda i, x: (2.0 if i == 2 else 3.0,),
    ],
)
def test_another_argument_is_another_layer(captured, extra):
    assert captured(Model(Masked, extra), BATCH)[1] == 2


def test_values_that_leave_by_another_way(captured):
    """A block hands a value to the model behind its back: then all is traced in full."""
    kept = []

    class Leaking(Block):
        def forward(self, x, *extra):
            y = super().forward(x)
            kept.append(y.sum())
            return y

    class Collecting(Model):
        def forward(self, x):
            kept.clear()
            return super().forward(x) + sum(kept)

    captured(Collecting(Leaking), BATCH)


def test_one_module_called_in_every_layer(captured):
    class Albert(Model):
        def forward(self, x):
            x = self.stem(x)
            for i in (0, 1, 0, 1, 2):
                x = self.blocks[i](x)
            return x.square().mean()

    captured(Albert(), BATCH)


def test_model_is_left_as_it_was():
    model = Model()
    before = [dict(m.__dict__) for m in model.modules()]
    capture(model, example_inputs=BATCH)
    assert [m.__dict__ for m in model.modules()] == before
    assert all(type(b.index) is int for b in model.blocks)
