"""The audit holds every kernel to its promises, and can tell when one breaks them."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from engine.kernels import audit, backends

FLAT = {
    "linf_start",
    "linf_step",
    "linf_step_bf16_grad",
    "linf_step_in_place",
    "sgd_ema",
    "adamw_ema",
    "perturb",
}


def run_compiling(code):
    """Run `code` in a Python where Triton compiles, and return what it prints as JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hold(row):
    """Every way in which a row falls short, in words."""
    failures = []
    if row["spill_bytes"] or row["local_bytes"]:
        failures.append("spills or uses local memory")
    if row["flat"] and (row["load_bits"] < 128 or row["store_bits"] < 128):
        failures.append("narrow access")
    if row["flat"] and abs(row["bytes_per_element"] - row["min_bytes_per_element"]) > 0.01:
        failures.append("moves more than it must")
    if not 0 < row["occupancy"] <= 1:
        failures.append("does not fit")
    return failures


def check_arch(arch):
    rows = audit.rows((arch,))
    # On a GPU cuDNN is fast at the stem's own gradients, and serves.
    expected = set(backends.OPS) - {"stem_input_grad", "stem_weight_grad"}
    assert {row["op"] for row in rows} == expected, "an op without a kernel"
    assert {row["kernel"] for row in rows if row["flat"]} == FLAT
    assert {f"{row['kernel']} {row['arch']}": hold(row) for row in rows if hold(row)} == {}
    images = {r["kernel"]: r for r in rows if r["op"] in ("augment", "recall")}
    # Gathered bytes come one by one; what lies in order goes 128 bits at a time.
    assert all(row["store_bits"] == 128 for row in images.values())


def test_every_kernel_keeps_its_promises():
    check_arch("sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_every_kernel_keeps_its_promises_elsewhere(arch):
    check_arch(arch)


def test_flat_kernels_keep_their_promises_on_every_architecture():
    rows = run_compiling("""
import json
from engine.kernels import audit
flat = [e for e in audit.examples() if e.flat]
audit.examples = lambda: flat
print(json.dumps(audit.rows()))
""")
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (k, a) for k in FLAT for a in audit.ARCHS
    }
    assert {f"{row['kernel']} {row['arch']}": hold(row) for row in rows if hold(row)} == {}


def test_a_channels_last_gradient_is_read_wide():
    """Read wide under bf16: 16 bits from each of 32 lines would take most of an attack step."""
    printed = run_compiling("""
import json
from engine.kernels import audit
last = [e for e in audit.examples() if e.op == "input_grad_step" and "channels_last" in e.kernel]
audit.examples = lambda: last
loads = {}
for arch in audit.ARCHS:
    for e in last:
        with audit.recording(arch) as launches:
            e.launch()
        opcodes = audit.disassemble(launches[0].cubin)["opcodes"]
        loads[f"{e.kernel} {arch}"] = audit.accesses(opcodes, "LDG")
print(json.dumps([loads, audit.rows()]))
""")
    loads, rows = printed
    assert len(loads) == 2 * len(audit.ARCHS)
    for name, widths in loads.items():
        # Eight products of one load: two pixels' gradients, and six weights of three channels.
        assert widths.count(128) == 8, name
        # Linf reads x, z, eps and alpha as well, one pixel a lane.
        assert set(widths) == ({128} if name.startswith("l2") else {128, 32}), name
    assert {f"{row['kernel']} {row['arch']}": hold(row) for row in rows if hold(row)} == {}
    # Four blocks of four warps a multiprocessor, or too few loads are on their way.
    assert all(row["occupancy"] >= 0.25 for row in rows)


def test_a_broken_promise_shows():
    """A ragged size makes accesses narrow; a register limit makes spills; a gap is seen."""
    ragged, starved, wasteful = run_compiling("""
import json, torch
from engine.kernels import audit, ops
from engine.kernels.triton.logits import loss_kernel
one, p = torch.ones(()), torch.zeros(128, 10)
x, target = torch.zeros(3, 5), torch.zeros(128, dtype=torch.int64)
wide = torch.zeros(128, 16)

def starve():
    tile = {"ROWS": 128, "BLOCK": 16, "num_warps": 4, "maxnreg": 32}
    loss_kernel[(1,)](p, target, None, None, p, p, one, one, one, one, None, 0.0, 128, 10, **tile)

cases = [
    audit.Example("ragged", "attack_step", lambda: ops.attack_step(x, x, x, one, one), 15, 16, flat=True),
    audit.Example("starved", "local_ball_loss", starve, 1280, 12.8),
    audit.Example("wasteful", "attack_step", lambda: ops.attack_step(wide, wide, wide, one, one), 2048, 12, flat=True),
]
audit.examples = lambda: cases
print(json.dumps(audit.rows(("sm_90",))))
""")  # noqa: E501
    assert "narrow access" in hold(ragged)
    assert hold(starved) == ["spills or uses local memory"]
    assert starved["spill_bytes"] > 0
    assert hold(wasteful) == ["moves more than it must"]


def test_every_op_is_one_launch():
    counts = run_compiling("""
import json
from engine.kernels import audit
counts = {}
for example in audit.examples():
    with audit.recording("sm_90") as launches:
        example.launch()
    counts[example.kernel] = len(launches)
print(json.dumps(counts))
""")
    # The gradient before the L2 step needs a pass of its own; so do the sums of a large batch.
    two = {"l2_input_grad", "l2_input_grad_bf16_channels_last", "loss_partial", "loss_finish"}
    assert {kernel for kernel, count in counts.items() if count == 2} == two
    assert all(count == 1 for kernel, count in counts.items() if kernel not in two)


COMPILE = """
import itertools, json, torch
from engine.kernels import audit, ops

f32, f64, f16, bf16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
e, rng, failures = torch.ones(()), torch.zeros(2, dtype=torch.int64), {}

def attempt(launch, *case):
    try:
        launch(*case)
    except Exception as error:
        failures[f"{launch.__name__}{case}"] = str(error)[-300:]

def images(dtype, grad, shape, norm):
    x = torch.zeros(shape, dtype=dtype)
    ops.uniform_start(x, e, rng, norm=norm, stream=1)
    ops.attack_step(x, x, x.to(grad), e, e.to(dtype), norm=norm)
    ops.attack_step_(x, x.clone(), x.to(grad), e, e, norm=norm)

def logits(dtype, rows, classes, has_ball, has_clean):
    p, target = torch.zeros(rows, classes, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    ball, clean = p if has_ball else None, p if has_clean else None
    ops.cross_entropy_grad(p, target), ops.kl_grad(p, p)
    ops.local_ball_loss(p, target, ball, clean, label_smoothing=0.1)
    torch.ops.engine.local_ball_loss_backward(e, p, target, ball, clean, e, e, 0.1)

def data(dtype, rows, shape, norm, layout):
    stored, index = torch.zeros(2, *shape, dtype=torch.uint8), torch.zeros(rows, dtype=torch.int64)
    _, crops, *_ = ops.augment(stored, index, rng, flip=norm == "L2", stream=1)
    ops.augment(stored, index, rng, stream=1, memory=stored.to(torch.int8), eps=e.to(dtype), norm=norm)
    x = torch.zeros(rows, *shape, dtype=dtype).contiguous(memory_format=layout)
    ops.recall(stored.to(torch.int8), index, crops, x, e, norm=norm)
    ops.remember(stored.to(torch.int8), index, crops, x, x, e)

def stem(dtype, grad, c, o, k, stride, norm, layout):
    x, weight, side = torch.zeros(1, c, 9, 8, dtype=dtype), torch.zeros(o, c, k, k), lambda n: (n - k) // stride + 1
    g = torch.zeros(1, o, side(9), side(8), dtype=grad).contiguous(memory_format=layout)
    ops.input_grad_step(x, x, g, weight, stride=stride, padding=0, eps=e, alpha=e, norm=norm)

def optimiser(dtype, grad, sizes, average, nesterov):
    p = [torch.zeros(n, dtype=dtype) for n in sizes]
    ops.sgd_ema_step(p, [t.to(grad) for t in p], p, p if average else [], lr=e, found_inf=e,
                     weight_decay=[0.1] * len(p), nesterov=nesterov, ema_decay=0.5)
    ops.adamw_ema_step(p, [t.to(grad) for t in p], p, p, p if average else [], lr=e, count=e, found_inf=e,
                       weight_decay=[0.1] * len(p), ema_decay=0.5)

product, norms, layouts = itertools.product, ("Linf", "L2"), (torch.contiguous_format, torch.channels_last)
record = audit.recording("sm_90")
record.__enter__()
for case in product((f32, f64), (f16, bf16), [(1, 1), (2, 1, 4, 4), (2, 3, 4, 4)], norms): attempt(images, *case)
for case in product((f32, f64, f16, bf16), [(1, 1), (1, 10), (3000, 3)]): attempt(logits, case[0], *case[1], True, True)
for case in product((False, True), (False, True)): attempt(logits, f32, 5, 1000, *case)
for case in product((f32, f64), (1, 5), [(1, 1, 1), (3, 4, 4)], norms, layouts): attempt(data, *case)
for case in product((f32, f64), (f32, bf16), [(1, 1, 1, 1), (3, 8, 3, 2), (4, 2, 2, 3), (1, 20, 8, 1)], norms, layouts): attempt(stem, *case[:2], *case[2], *case[3:])
for case in product((f32, f64), (f32, bf16), [(1,), (3, 4096)], (False, True), (False, True)): attempt(optimiser, *case)
print(json.dumps(failures))
"""  # noqa: E501


@pytest.mark.slow
def test_every_type_and_edge_compiles():
    """Compile all types and edges: sizes of one are constants, branches must agree in type."""
    assert run_compiling(COMPILE) == {}


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
                                                                      /* 0x000e300000000800 */
        /*0010*/                   LDG.E.64 R14, desc[UR4][R14.64] ;  /* 0x000008040e0e7981 */
        /*0020*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0030*/              @P1  LDG.E.U8 R5, desc[UR4][R2.64] ;    /* 0x0 */
        /*0040*/                   LDG.E R6, desc[UR4][R2.64] ;       /* 0x0 */
        /*0050*/                   STL.64 [R1+0x8], R4 ;              /* 0x0 */
        /*0060*/             @!UP0 STG.E.EF.128 desc[UR4][R2.64], R4 ;  /* 0x0 */
        /*0070*/                   EXIT ;                             /* 0x0 */
        /*0080*/                   BRA 0x80;                          /* 0x0 */
        /*0090*/                   NOP;                               /* 0x0 */
"""


def test_machine_code_is_read_as_it_stands():
    opcodes = audit.instructions(SASS)
    assert opcodes[0] == "LDC"
    assert opcodes[-1] == "EXIT"
    assert len(opcodes) == 8
    assert audit.accesses(opcodes, "LDG") == [64, 128, 8, 32]
    assert audit.accesses(opcodes, "STG") == [128]
    assert audit.accesses(opcodes, "STL") == [64]


def test_scalar_loads_are_told_from_tiles():
    ttgir = """
      %eps = tt.load %eps_ptr : !tt.ptr<f32> loc(#loc)
      %step = tt.load %at {some = 1 : i32} : !tt.ptr<i64> loc(#loc)
      %x = tt.load %x_ptrs, %mask : tensor<1024x!tt.ptr<f32>, #blocked> loc(#loc)
    """
    assert audit.scalar_loads(ttgir) == [32, 64]


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "expected"),
    [
        ("sm_80", 32, 4, 0, 1.0),
        ("sm_80", 33, 4, 0, 0.75),  # 40 registers a thread: 51 warps, handed out as 48
        ("sm_90", 255, 8, 0, 0.125),
        ("sm_90", 16, 1, 0, 0.5),  # 32 blocks of one warp
        ("sm_80", 32, 4, 81 * 1024, 0.125),  # two blocks of 82 KiB
        ("sm_90", 32, 4, 81 * 1024, 0.125),
        ("sm_90", 32, 4, 56 * 1024, 0.25),  # four of 57 KiB
    ],
)
def test_occupancy_follows_the_limits(arch, registers, warps, shared, expected):
    assert audit.occupancy(arch, registers, warps, shared) == expected


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="arch must be one of sm_80, sm_90, sm_100, got 'sm_10'"):
        audit.rows(("sm_10",))
