"""What a compiled program moves through a chip's main memory."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import spread
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from npr_jax.decode.steps import compiled_steps
from npr_jax.model import PRESETS
from npr_jax.plan.plan import stage_config
from npr_jax.plan.programs import decode_step
from npr_jax.plan.traffic import Program

# A loop that runs as often as an input says; in it a loop of 4 over a stack of weights, and a
# conditional. Fast memory is S(1).
PROGRAM = """
%take (s: f32[4,256,128], i: s32[]) -> f32[256,128] {
  %s = f32[4,256,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,256,128]{2,1,0:T(8,128)} dynamic-slice(%s, %i, %zero, %zero), dynamic_slice_sizes={1,256,128}
  ROOT %w = f32[256,128]{1,0:T(8,128)} bitcast(%slice)
}

%product (x: f32[8,256], s: f32[4,256,128], i: s32[]) -> f32[8,128] {
  %x = f32[8,256]{1,0:T(8,128)} parameter(0)
  %s = f32[4,256,128]{2,1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %w = f32[256,128]{1,0:T(8,128)} fusion(%s, %i), kind=kLoop, calls=%take
  ROOT %y = f32[8,128]{1,0:T(8,128)S(1)} convolution(%x, %w), dim_labels=bf_io->bf
}

%write (pool: f32[64,128], at: s32[], new: f32[8,128]) -> f32[64,128] {
  %pool = f32[64,128]{1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %new = f32[8,128]{1,0:T(8,128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %out = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%pool, %new, %at, %zero)
}

%same (w: f32[512,128]) -> f32[512,128] {
  %w = f32[512,128]{1,0:T(8,128)} parameter(0)
  ROOT %b = f32[512,128]{1,0:T(8,128)} bitcast(%w)
}

%head (w: f32[512,128], x: f32[8,128]) -> f32[8,512] {
  %w = f32[512,128]{1,0:T(8,128)} parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} parameter(1)
  %b = f32[512,128]{1,0:T(8,128)} fusion(%w), kind=kLoop, calls=%same
  ROOT %y = f32[8,512]{1,0:T(8,128)} convolution(%x, %b), dim_labels=bf_oi->bf
}

%few (p: f32[8,512]) -> f32[8,512] {
  ROOT %p = f32[8,512]{1,0:T(8,128)} parameter(0)
}

%many (p: f32[8,512]) -> f32[8,512] {
  %p = f32[8,512]{1,0:T(8,128)} parameter(0)
  ROOT %n = f32[8,512]{1,0:T(8,128)S(1)} negate(%p)
}

%layers_end (t: (s32[], f32[8,256], f32[4,256,128], f32[64,128])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)S(1)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %four = s32[]{:T(128)S(6)} constant(4)
  ROOT %less = pred[]{:T(512)S(6)} compare(%i, %four), direction=LT
}

%layers (t: (s32[], f32[8,256], f32[4,256,128], f32[64,128])) -> (s32[], f32[8,256], f32[4,256,128], f32[64,128]) {
  %t = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)S(1)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %x = f32[8,256]{1,0:T(8,128)S(1)} get-tuple-element(%t), index=1
  %s = f32[4,256,128]{2,1,0:T(8,128)} get-tuple-element(%t), index=2
  %pool = f32[64,128]{1,0:T(8,128)} get-tuple-element(%t), index=3
  %y = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x, %s, %i), kind=kOutput, calls=%product
  %new = f32[64,128]{1,0:T(8,128)} fusion(%pool, %i, %y), kind=kLoop, calls=%write
  %kernel.3 = f32[8,256]{1,0:T(8,128)S(1)} custom-call(%y, %new), custom_call_target="tpu_custom_call"
  %one = s32[]{:T(128)S(6)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %result = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)S(1)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) tuple(%next, %kernel.3, %s, %new)
}

%more (u: (s32[], f32[8,256], f32[4,256,128], f32[64,128])) -> pred[] {
  %u = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)S(1)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  ROOT %go = pred[]{:T(512)S(6)} custom-call(), custom_call_target="asks"
}

%step (u: (s32[], f32[8,256], f32[4,256,128], f32[64,128])) -> (s32[], f32[8,256], f32[4,256,128], f32[64,128]) {
  %u = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)S(1)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %loop = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)S(1)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) while(%u), condition=%layers_end, body=%layers
  %table = f32[512,128]{1,0:T(8,128)} get-tuple-element(%u), index=2
  %y = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%u), index=1
  %logits = f32[8,512]{1,0:T(8,128)} fusion(%table, %y), kind=kOutput, calls=%head
  %which = pred[]{:T(512)S(6)} get-tuple-element(%u), index=0
  %out = f32[8,512]{1,0:T(8,128)} conditional(%which, %logits, %logits), branch_computations={%few, %many}
  ROOT %end = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)S(1)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) tuple(%loop)
}

ENTRY %main (s: f32[4,256,128]) -> f32[64,128] {
  %s = f32[4,256,128]{2,1,0:T(8,128)} parameter(0)
  %copy = f32[4,256,128]{1,2,0:T(8,128)} copy(%s)
  %fast = (f32[4,256,128]{2,1,0:T(8,128)S(1)}, f32[4,256,128]{2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%copy)
  %done = f32[4,256,128]{2,1,0:T(8,128)S(1)} copy-done(%fast)
  %part = ((f32[4,256,128]{2,1,0:T(8,128)}), f32[1,256,128]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%copy), slice={[0:1]}
  %visit = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)S(1)}, f32[4,256,128]{2,1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) while(%u), condition=%more, body=%step
  ROOT %pool = f32[64,128]{1,0:T(8,128)} get-tuple-element(%visit), index=3
}
"""  # noqa: E501
STACK, WEIGHT = 4 * 4 * 256 * 128, 4 * 256 * 128


def test_bytes_are_those_that_pass_through_main_memory():
    once, step = Program(PROGRAM, {"kernel": 1000.0}, min).bytes()
    assert once == 2 * STACK + STACK + WEIGHT  # copied, brought to fast memory whole and in part
    layer = WEIGHT + 4 * 8 * 128 + 1000  # read once, written into the pool, the kernel's own
    assert step == 4 * layer + 4 * 512 * 128 + 4 * 8 * 512  # and the head, and its logits
    _, most = Program(PROGRAM, {"kernel": 1000.0}, max).bytes()
    assert most - step == 4 * 8 * 512  # which the other branch reads
    with pytest.raises(KeyError, match="kernel"):
        Program(PROGRAM, {}).bytes()


def test_what_is_written_is_told():
    program = Program(PROGRAM, {"kernel": 0.0})
    assert [line.partition(":")[0] for line in program.written(WEIGHT)] == ["copy"]
    names = {line.partition(":")[0] for line in program.written(1)}
    assert names == {"copy", "new", "logits"}


CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@pytest.mark.parametrize("chip", spread(CHIPS, test=1))
def test_a_decode_step_copies_no_weights(tpu_compiler, chip):
    """Qwen3-4B with two layers: no array as large as a matrix of theirs is written."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    device, axes = topology.devices[0], ("data", "tensor")
    mesh = Mesh(np.array([[device]]), axes, axis_types=(AxisType.Auto,) * 2)
    arch = dataclasses.replace(PRESETS["qwen3-4b"], num_layers=2)
    config = stage_config("papo", "qwen3-4b", ["engine.lanes=5"])
    _, arguments = decode_step(arch, config, mesh)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)),
        arguments,
    )
    step = compiled_steps(arch, "pallas", config.engine.steps).decode
    kernels = {"npr_paged_attention": 0.0, "npr_shared_runs": 0.0}
    program = Program(step.lower(*arguments).compile().as_text(), kernels)
    smallest = 2 * arch.hidden_size * arch.num_kv_heads * arch.head_dim
    assert program.written(smallest) == []
