"""Captured programs against the models they were captured from."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
import zoo
import zoo_models
from torch import nn
from torch._subclasses import FakeTensorMode

from autoshard import ir
from autoshard.capture import capture, check_against_eager, execute, tensors_of
from autoshard.capture.batch import layout_of
from autoshard.errors import CaptureError

# Layer classes of every model: class name -> (kind, number of occurrences). The shared part, which
# comes first, is left out.
STRUCTURE: dict[str, dict[str, tuple[str, int]]] = {
    "gpt2": {"embeddings": ("part", 1), "GPT2Block": ("layer", 4), "head": ("part", 1)},
    "llama": {"embeddings": ("part", 1), "LlamaDecoderLayer": ("layer", 4), "head": ("part", 1)},
    "qwen3": {"embeddings": ("part", 1), "Qwen3DecoderLayer": ("layer", 4), "head": ("part", 1)},
    "gemma3": {
        "embeddings": ("part", 1), "Gemma3DecoderLayer": ("layer", 6),
        "Gemma3DecoderLayer_1": ("layer", 1), "head": ("part", 1),
    },
    "mixtral": {
        "embeddings": ("part", 1), "MixtralDecoderLayer": ("layer", 4), "head": ("part", 1),
    },
    "bert": {"embeddings": ("part", 1), "BertLayer": ("layer", 4), "head": ("part", 1)},
    "t5": {
        "embeddings": ("part", 1), "T5Block": ("layer", 1), "T5Block_1": ("layer", 3),
        "encoder_final_layer_norm": ("part", 1), "T5Block_2": ("layer", 1),
        "T5Block_3": ("layer", 3), "head": ("part", 1),
    },
    "whisper": {
        "embeddings": ("part", 1), "WhisperEncoderLayer": ("layer", 4),
        "model_encoder_layer_norm": ("part", 1), "WhisperDecoderLayer": ("layer", 4),
        "head": ("part", 1),
    },
    "vit": {"stem": ("part", 1), "ViTLayer": ("layer", 4), "head": ("part", 1)},
    "resnet": {
        "stem": ("part", 1), "ResNetBasicLayer": ("layer", 3), "ResNetBasicLayer_1": ("layer", 1),
        "ResNetBasicLayer_2": ("layer", 1), "head": ("part", 1),
    },
    "convnext": {
        "stem": ("part", 1), "ConvNextLayer": ("layer", 2),
        "convnext_encoder_stages_1_downsampling_layer_0": ("part", 1),
        "ConvNextLayer_1": ("layer", 3), "head": ("part", 1),
    },
    "nanogpt": {"embeddings": ("part", 1), "Block": ("layer", 4), "head": ("part", 1)},
    "encoder": {
        "embeddings": ("part", 1), "TransformerEncoderLayer": ("layer", 4), "head": ("part", 1),
    },
    "lstm": {"embedding": ("part", 1), "lstm": ("part", 1), "head": ("part", 1)},
    "mlp": {
        "stem": ("part", 1), "Sequential": ("layer", 4), "between": ("part", 3),
        "head": ("part", 1),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def programs() -> dict[str, ir.Program]:
    return {}


def _program(programs: dict[str, ir.Program], name: str) -> ir.Program:
    if name not in programs:
        model, batch, loss_fn = zoo.build(name)
        programs[name] = capture(model, example_inputs=batch, loss_fn=loss_fn)
    return programs[name]


@pytest.mark.parametrize("name", zoo.names())
def test_program_computes_what_the_model_does(name: str, programs: dict[str, ir.Program]) -> None:
    """Loss, every gradient and every buffer, over two steps of gradient descent."""
    model, batch, loss_fn = zoo.build(name)
    check_against_eager(_program(programs, name), model, batch, loss_fn, steps=2, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(STRUCTURE))
def test_layers_are_found(name: str, programs: dict[str, ir.Program]) -> None:
    program = _program(programs, name)
    segments = [s for s in program.segments if s.layer.kind != "shared"]
    counts = Counter(s.layer.name for s in segments)
    found = {c.name: (c.kind, counts[c.name]) for c in program.classes if c.kind != "shared"}
    assert found == STRUCTURE[name]
    for segment in segments:
        if segment.layer.kind == "layer":
            assert all(p.startswith(segment.path + ".") for p in segment.parameters)


@pytest.mark.parametrize("name", zoo.names())
def test_program_is_well_formed(name: str, programs: dict[str, ir.Program]) -> None:
    program = _program(programs, name)
    known = {v.name for v in program.batch} | set(program.parameters)
    for segment in program.segments:
        graph = segment.layer.graph
        assert set(segment.inputs) | set(segment.parameters) <= known
        assert set(segment.bindings) == {
            v.name for v in (*graph.inputs, *graph.parameters, *graph.outputs)
        }
        assert not set(segment.outputs) & known, "a value is made once and never handed through"
        known |= set(segment.outputs)
        _check_graph(graph)
    assert program.loss in known
    assert [s.layer.kind for s in program.segments].count("shared") <= 1
    texts = [str(op) for s in program.segments for op in s.layer.graph.ops]
    assert not any("-1," in t for t in texts if ".reshape" in t or ".expand" in t)


def _check_graph(graph: ir.Graph) -> None:
    values = {v.name: v for v in (*graph.inputs, *graph.parameters)}
    assert len({op.name for op in graph.ops}) == len(graph.ops)
    for op in graph.ops:
        ir.resolve(op.target)
        for operand in op.operands:
            assert values[operand.name] == operand
        for output in op.outputs:
            assert output.name not in values and output.name.isidentifier()
            values[output.name] = output
        if len(op.outputs) == 1:
            assert op.name == op.output.name
    assert all(values[v.name] == v for v in graph.outputs)
    kinds = {p.type.parametric for p in graph.parameters}
    assert kinds <= {True, False}


@pytest.mark.parametrize("name", ["gpt2", "vgg_bn", "lstm", "whisper"])
def test_model_and_random_state_are_untouched(name: str) -> None:
    model, batch, loss_fn = zoo.build(name)
    model.eval()
    tensors = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()]}
    values = {n: t.detach().clone() for n, t in tensors.items()}
    attributes = copy.deepcopy({n: sorted(m.__dict__) for n, m in model.named_modules()})
    random = torch.get_rng_state()
    capture(model, example_inputs=batch, loss_fn=loss_fn)
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m.training for m in model.modules())
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert {n: id(t) for n, t in after.items()} == {n: id(t) for n, t in tensors.items()}
    assert all(torch.equal(t, values[n]) for n, t in after.items())
    assert attributes == {n: sorted(m.__dict__) for n, m in model.named_modules()}
    if name == "lstm":
        weights = [p for n, p in model.named_parameters() if n.startswith("lstm")]
        assert [id(w) for w in model.lstm._flat_weights] == [id(w) for w in weights]


def test_model_in_eval_mode_gives_the_training_program() -> None:
    model, batch, loss_fn = zoo.build("vgg_bn")
    training = capture(model, example_inputs=batch, loss_fn=loss_fn)
    assert capture(model.eval(), example_inputs=batch, loss_fn=loss_fn) == training


def test_submodules_that_the_user_froze_in_eval_mode_stay_so() -> None:
    model, batch, loss_fn = zoo.build("vgg_bn")
    model.get_submodule("features.1").eval()
    program = capture(model, example_inputs=batch, loss_fn=loss_fn)
    norms = [op for s in program.segments for op in s.layer.graph.ops
             if op.target == "aten.batch_norm.default"]  # fmt: skip
    assert [op.args[5] for op in norms] == [False] + [True] * 5
    check_against_eager(program, model, batch, loss_fn, rtol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "vgg_bn", "lstm"])
def test_a_model_on_meta_gives_the_same_program(name: str, programs: dict[str, ir.Program]) -> None:
    model, batch, loss_fn = zoo.build(name)
    meta = {k: v.to("meta") for k, v in batch.items()} if isinstance(batch, dict) else tuple(
        v.to("meta") for v in batch
    )  # fmt: skip
    model = model.to("meta")
    if hasattr(model, "tie_weights"):  # Module.to unties what is moved to meta
        model.tie_weights()
    program = capture(model, example_inputs=meta, loss_fn=loss_fn)
    assert program.fingerprint == _program(programs, name).fingerprint


def test_the_callers_modes_do_not_matter(programs: dict[str, ir.Program]) -> None:
    model, batch, _ = zoo.build("gpt2")
    with torch.no_grad():
        quiet = capture(model, example_inputs=batch)
    with FakeTensorMode():
        fake = zoo_models.NanoGPT()
    real, ids, _ = zoo.build("nanogpt", torch.float32)
    assert quiet.fingerprint == _program(programs, "gpt2").fingerprint
    expected = capture(real, example_inputs=ids).fingerprint
    assert capture(fake, example_inputs=ids).fingerprint == expected


def test_fingerprint_tells_programs_apart(programs: dict[str, ir.Program]) -> None:
    prints = [_program(programs, name).fingerprint for name in zoo.names()]
    assert len(set(prints)) == len(prints)
    model, batch, loss_fn = zoo.build("mlp")
    again = capture(model, example_inputs=batch, loss_fn=loss_fn)
    assert again.fingerprint == _program(programs, "mlp").fingerprint
    larger = capture(model, example_inputs=batch, loss_fn=loss_fn, global_batch_size=16)
    assert larger.fingerprint != again.fingerprint


def test_global_batch_size_sets_every_literal() -> None:
    """A program captured at 24 samples from an example of 8 runs on 24."""
    model, batch, loss_fn = zoo.build("t5")
    assert isinstance(batch, dict)
    program = capture(model, example_inputs=batch, loss_fn=loss_fn, global_batch_size=24)
    assert program.batch_size == 24
    assert all(v.type.shape[0] == 24 for v in program.batch if v.type.per_sample)
    tripled = {k: torch.cat([v, v.flip(1), v.roll(1, 0)]) for k, v in batch.items()}
    check_against_eager(program, model, tripled, loss_fn, rtol=1e-12)


def test_a_huge_global_batch_allocates_nothing() -> None:
    model, batch, loss_fn = zoo.build("encoder")
    program = capture(model, example_inputs=batch, loss_fn=loss_fn, global_batch_size=1 << 24)
    assert program.batch[0].type.shape == (1 << 24, zoo_models.SEQUENCE)


def test_tied_weights_are_one_parameter(programs: dict[str, ir.Program]) -> None:
    program = _program(programs, "gpt2")
    assert program.parameters["transformer.wte.weight"].aliases == (
        "transformer.wte.weight", "lm_head.weight",
    )  # fmt: skip
    users = [s.path for s in program.segments if "transformer.wte.weight" in s.parameters]
    assert users == ["embeddings", "head"]
    assert "lm_head.weight" not in program.parameters


def test_values_know_what_they_depend_on(programs: dict[str, ir.Program]) -> None:
    program = _program(programs, "whisper")
    embeddings = next(c for c in program.classes if c.name == "embeddings").graph
    types = {v.name: v.type for v in embeddings.values.values()}
    frozen = types["model.encoder.embed_positions.weight"]
    assert frozen.parametric and not frozen.differentiable and not frozen.per_sample
    bn = _program(programs, "vgg_bn").parameters
    assert bn["features.1.running_mean"].type.parametric
    assert not bn["features.1.running_mean"].trainable and bn["features.1.running_mean"].buffer
    rope = _program(programs, "llama").parameters["model.rotary_emb.inv_freq"]
    assert not rope.type.parametric and not rope.persistent


def test_shared_part_needs_no_parameters(programs: dict[str, ir.Program]) -> None:
    for name in ("llama", "gemma3", "t5", "bert", "encoder"):
        first, *others = _program(programs, name).segments
        assert first.layer.kind == "shared"
        assert not any(v.type.parametric for v in first.layer.graph.values.values())
        shared = set(first.outputs)
        assert shared, "layers use the shared values"
        for segment in others:  # nothing that could have been shared is left in a layer
            fixed = {
                v.name for v in segment.layer.graph.inputs
                if segment.bindings[v.name] in shared or segment.bindings[v.name] in
                {b.name for b in _program(programs, name).batch}
            }  # fmt: skip
            for op in segment.layer.graph.ops:
                assert not op.operands or not all(v.name in fixed for v in op.operands)


def test_transformers_attention_is_causal_without_a_mask(programs: dict[str, ir.Program]) -> None:
    """The training branch of transformers, not the one it takes when it is exported."""
    for name in ("gpt2", "llama", "qwen3"):
        layers = [c for c in _program(programs, name).classes if c.kind == "layer"]
        (attention,) = [
            op for op in layers[0].graph.ops
            if op.target == "aten.scaled_dot_product_attention.default"
        ]  # fmt: skip
        assert attention.args[3] is None and attention.args[5] is True


def test_the_self_check_notices_a_wrong_program(programs: dict[str, ir.Program]) -> None:
    model, batch, loss_fn = zoo.build("mlp")
    program = _program(programs, "mlp")
    layer = next(c for c in program.classes if c.kind == "layer")

    def wrong(op: ir.Op) -> ir.Op:
        return replace(op, target="aten.gelu.default") if op.target == "aten.relu.default" else op

    broken = replace(layer, graph=replace(layer.graph, ops=tuple(map(wrong, layer.graph.ops))))
    segments = tuple(replace(s, layer=broken) if s.layer is layer else s for s in program.segments)
    with pytest.raises(CaptureError, match="loss in step 0 is off by"):
        check_against_eager(replace(program, segments=segments), model, batch, loss_fn)


def test_the_self_check_notices_a_counter_in_forward() -> None:
    class Warmup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return (self.linear(x) / self.calls).sum()

    model, x = Warmup(), torch.randn(2, 4)
    program = capture(model, example_inputs=(x,))
    assert model.calls == 0
    with pytest.raises(CaptureError, match="loss in step 1"):
        check_against_eager(program, model, (x,))


def test_execute_takes_a_model() -> None:
    model, batch, loss_fn = zoo.build("nanogpt")
    program = capture(model, example_inputs=batch)
    tensors = layout_of(model, batch, loss_fn, None).tensors(batch)
    assert list(tensors) == ["idx", "targets"]
    loss = execute(program, model, tensors)
    assert torch.equal(loss, model(*batch)[1])
    assert torch.equal(loss, execute(program, tensors_of(program, model), tensors))


@pytest.mark.parametrize("name", zoo.names())
def test_programs_run_on_the_device_of_their_tensors(
    name: str, programs: dict[str, ir.Program]
) -> None:
    """What code creates (positions, masks) and constants follow; a CPU tensor would be refused."""
    model, batch, loss_fn = zoo.build(name)
    program = _program(programs, name)
    tensors = layout_of(model, batch, loss_fn, None).tensors(batch)
    meta = [{k: t.detach().to("meta") for k, t in side.items()}
            for side in (tensors_of(program, model), tensors)]  # fmt: skip
    assert execute(program, *meta).device.type == "meta"
