import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.core.sharding import make_mesh
from easyrl.planning.cost import Loops, first_group, program_cost, varying_axes
from easyrl.planning.hlo import parse_instruction, parse_module, parse_shapes, valid_pairs

MESH = {"dp": 2, "fsdp": 2, "mp": 2}


def cost_of(function, *shapes, trips=None):
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    return program_cost(parse_module(compiled.as_text()), {"dp": 1}, Loops(trips or {}), None)


def test_an_instruction_is_read():
    line = (
        "  ROOT %fusion.1 = (f32[2,8]{1,0:T(8,128)}, bf16[4]{0:T(256)S(1)}) fusion(%a.1, %b-2), kind=kLoop, "
        'calls=%fused, metadata={op_name="jit(f)/while/body"}'
    )
    read = parse_instruction(line)
    assert (read.name, read.opcode, read.operands, read.is_root) == ("fusion.1", "fusion", ("a.1", "b-2"), True)
    assert [(shape.dims, shape.bytes, shape.in_main_memory) for shape in read.shapes] == [
        ((2, 8), 64, True),
        ((4,), 8, False),
    ]
    assert read.called == {"calls": "fused"} and read.op_name == "jit(f)/while/body"


def test_a_computation_of_another_core_ends_too():
    text = """HloModule two

%on_the_side (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %copy = f32[4]{0} copy(%x)
}, execution_thread="sparsecore"

ENTRY %main (y: f32[4]) -> f32[4] {
  ROOT %y = f32[4]{0} parameter(0)
}
"""
    assert list(parse_module(text).computations) == ["on_the_side", "main"]


def test_shapes_of_all_types():
    assert [s.bytes for s in parse_shapes("(pred[3], s32[], bf16[2,2], token[], u8[5], s4[3])")] == [3, 4, 8, 0, 5, 2]


def test_a_product_in_nested_loops_is_multiplied_out():
    def body(x, _):
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.tanh(y @ y), x), None

    cost = cost_of(lambda x: jax.lax.scan(body, x, None, length=7)[0], (16, 16))
    assert cost[""].flops == 7 * 5 * 2 * 16**3


def test_a_loop_whose_trip_count_is_data_runs_as_often_as_it_is_said_to():
    def loop(x, count):
        with jax.named_scope("rounds"):
            return jax.lax.fori_loop(0, count.astype(int), lambda _, y: jnp.tanh(y @ y), x)

    cost = cost_of(loop, (16, 16), (), trips={"rounds": 11})
    assert cost["rounds"].flops == 11 * 2 * 16**3 and cost[""].flops == 0
    with pytest.raises(ValueError, match="nothing is known of how often"):
        cost_of(loop, (16, 16), ())


@pytest.mark.parametrize(("start", "stop", "trips"), [(0, 8, 4), (0, 9, 5), (3, 8, 3), (9, 8, 0)])
@pytest.mark.parametrize("after", ["add(%count, %two)", "fusion(%two, %count), kind=kLoop, calls=%sum"])
def test_a_counter_may_go_up_by_more_than_one(start, stop, trips, after):
    """As in a product that is computed while its shards travel, two of them at a time."""
    text = f"""HloModule two

%sum (step: s32[], before: s32[]) -> s32[] {{
  %step = s32[] parameter(0)
  %before = s32[] parameter(1)
  ROOT %after = s32[] add(%before, %step)
}}

%body (carried: (f32[4,4], s32[], s32[])) -> (f32[4,4], s32[], s32[]) {{
  %carried = (f32[4,4], s32[], s32[]) parameter(0)
  %x = f32[4,4] get-tuple-element(%carried), index=0
  %count = s32[] get-tuple-element(%carried), index=1
  %two = s32[] get-tuple-element(%carried), index=2
  %product = f32[4,4] dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %next = s32[] {after}
  ROOT %results = (f32[4,4], s32[], s32[]) tuple(%product, %next, %two)
}}

%condition (inspected: (f32[4,4], s32[], s32[])) -> pred[] {{
  %inspected = (f32[4,4], s32[], s32[]) parameter(0)
  %now = s32[] get-tuple-element(%inspected), index=1
  %stop = s32[] constant({stop})
  ROOT %goes_on = pred[] compare(%now, %stop), direction=LT
}}

ENTRY %main (y: f32[4,4]) -> f32[4,4] {{
  %y = f32[4,4] parameter(0)
  %start = s32[] constant({start})
  %by = s32[] constant(2)
  %begin = (f32[4,4], s32[], s32[]) tuple(%y, %start, %by)
  %loop = (f32[4,4], s32[], s32[]) while(%begin), condition=%condition, body=%body
  ROOT %result = f32[4,4] get-tuple-element(%loop), index=0
}}
"""
    cost = program_cost(parse_module(text), {"dp": 1}, Loops({}), None)
    assert cost[""].flops == trips * 2 * 4**3


def test_of_two_branches_the_dearer_one_counts():
    cost = cost_of(lambda p, x: jax.lax.cond(p > 0, lambda y: jnp.tanh(y @ y) @ y, lambda y: y @ y, x), (), (16, 16))
    assert cost[""].flops == 2 * 2 * 16**3


def test_traffic_of_a_scan_is_that_of_the_slices():
    """64 products with one matrix each of a stack: the stack is read once in all, not 64 times."""
    cost = cost_of(lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], (64, 128, 128), (8, 128))
    stack = 64 * 128 * 128 * 4
    assert stack < cost[""].bytes < 4 * stack


def test_window_positions_are_counted_as_a_slow_loop_counts_them():
    rng = random.Random(0)
    for _ in range(200):
        size, kernel, out, stride, base, dilation = (rng.randint(1, 5) for _ in range(6))
        low = rng.randint(-2, 4)
        slow = 0
        for o, k in itertools.product(range(out), range(kernel)):
            position = o * stride + k * dilation - low
            slow += 0 <= position <= (size - 1) * base and position % base == 0
        options = {"size": size, "kernel": kernel, "out": out, "stride": stride, "low": low, "base": base}
        assert valid_pairs(**options, dilation=dilation) == slow, options


CONVOLUTION = """
ENTRY %main (a: f32[256,128], b: f32[2,128,16]) -> f32[256,2,16] {
  %a = bf16[1,256,128]{2,1,0} parameter(0)
  %b = bf16[2,128,16]{2,1,0} parameter(1)
  ROOT %c = bf16[256,2,16]{2,1,0} convolution(%a, %b), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=0bf_0io->b0f
}
"""


def test_a_product_written_as_a_convolution():
    """A [256, 128] x [128, 2, 16] product as TPU programs write it: padding around one real input position."""
    cost = program_cost(parse_module(CONVOLUTION), {"dp": 1}, Loops({}), None)
    assert cost[""].flops == 2 * 256 * 128 * 2 * 16


@pytest.mark.parametrize(
    ("attributes", "members", "axes"),
    [
        ("replica_groups=[4,2]<=[8]", (0, 1), ("mp",)),
        ("replica_groups=[2,4]<=[2,4]T(0,1)", (0, 1, 2, 3), ("fsdp", "mp")),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", (0, 2), ("fsdp",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4), ("dp",)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5), ("dp", "mp")),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6), ("dp", "fsdp")),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4), ("dp",)),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1), ("mp",)),
        ("replica_groups={}", tuple(range(8)), ("dp", "fsdp", "mp")),
    ],
)
def test_groups_are_found_on_the_mesh(attributes, members, axes):
    assert first_group(attributes, MESH) == members
    assert varying_axes(members, MESH) == axes


def test_unknown_groups_are_not_taken_for_all_devices():
    with pytest.raises(ValueError, match="nothing is known of these groups"):
        first_group("replica_groups=mesh['a'=8] {'a':(1)2}", MESH)


def test_collectives_of_a_sharded_product():
    """x [8, 64] split over its columns times w [64, 32] split over its rows: one all-reduce of the result."""
    mesh = make_mesh("1,1,4", jax.devices()[:4])
    place = lambda *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=place(None, "mp"))
    w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place("mp", None))
    compiled = jax.jit(jnp.dot, out_shardings=place()).lower(x, w).compile()
    cost = program_cost(parse_module(compiled.as_text()), dict(mesh.shape), Loops({}), None)[""]
    (found,) = cost.collectives
    assert (found.kind, found.axes, found.group, found.payload) == ("all-reduce", ("mp",), 4, 8 * 32 * 4)
    assert cost.flops == 2 * 8 * 16 * 32
    assert np.isclose(cost.sent, 2 * 3 / 4 * 8 * 32 * 4)
