"""The executor of compiled kernels: control flow, memory, and every fault that it must see."""

import pytest
import torch

from engine.kernels.ptx import Fault, GlobalMemory, Grid, execute, machine

REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<20>; .reg .b64 %rd<20>;"
# %rd2: the address of the thread's 32-bit word of the first argument; %r2: its number in the block.
MINE = """
    ld.param.b64 %rd1, [k_param_0];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r4, %r1, %r3, %r2;
    mad.wide.u32 %rd2, %r4, 4, %rd1;
"""


def kernel(body, parameters=1):
    names = ", ".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(parameters))
    return f"""
        .version 8.7
        .target sm_90a
        .extern .shared .align 16 .b8 global_smem[];
        .visible .entry k({names})
        .reqntid 64
        {{ {REGISTERS}
        {body}
        ret;
        }}
    """


def run(body, *tensors, blocks=1, threads=64, shared=0, seed=0):
    storages = []
    for i, t in enumerate(tensors):
        storage = t.untyped_storage()
        storages.append((f"argument {i}", storage.data_ptr(), storage.nbytes()))
    memory, grid = GlobalMemory(storages), Grid(blocks, 1, 1, threads, shared)
    execute(kernel(body, len(tensors)), [t.data_ptr() for t in tensors], grid, memory, seed)


def words(n):
    return torch.zeros(n, dtype=torch.int32)


# ---- control flow ----------------------------------------------------------------------------


def test_every_thread_of_every_block_runs_once():
    out = words(300 * 64)
    run(MINE + "st.global.b32 [%rd2], {%r4};", out, blocks=300)
    assert torch.equal(out, torch.arange(300 * 64, dtype=torch.int32))


def test_lanes_part_and_meet_again():
    """Each lane loops as often as its number says. Then all shuffle, for which they must meet."""
    out = words(64)
    body = """
        and.b32 %r5, %r2, 7;
        mov.b32 %r6, 0;
    $L__BB0_1:
        setp.ge.s32 %p1, %r6, %r5;
        @%p1 bra $L__BB0_2;
        add.s32 %r6, %r6, 1;
        bra.uni $L__BB0_1;
    $L__BB0_2:
        shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;
        st.global.b32 [%rd2], {%r7};
    """
    run(MINE + body, out)
    assert out.tolist() == [(i ^ 1) & 7 for i in range(64)]


def test_a_predicate_holds_lanes_back():
    out = words(64)
    body = """
        setp.lt.s32 %p1, %r2, 10;
        @%p1 st.global.b32 [%rd2], {%r2};
        @!%p1 st.global.b32 [%rd2], {-7};
    """
    run(MINE + body, out)
    assert out.tolist() == [i if i < 10 else -7 for i in range(64)]


def test_a_loop_without_an_end_is_a_fault(monkeypatch):
    monkeypatch.setattr(machine, "_MOST_STEPS", 1000)
    with pytest.raises(Fault, match="no end after"):
        run("$L__BB0_1: bra.uni $L__BB0_1;", words(1), threads=32)


def test_pairs_are_computed_half_by_half():
    out = words(64)
    body = """
        mov.b32 %r5, 0x7FFF0001;
        mad.lo.s32 %r6, %r2, 65536, %r2;
        add.s16x2 %r7, %r5, %r6;
        st.global.b32 [%rd2], {%r7};
    """
    run(MINE + body, out)
    lane = torch.arange(64)
    assert torch.equal(out.view(torch.int16).view(64, 2)[:, 0].long(), lane + 1)
    assert torch.equal(out.view(torch.int16).view(64, 2)[:, 1].long() & 0xFFFF, lane + 0x7FFF)


def test_three_operands_have_a_largest():
    out = words(64)
    body = """
        cvt.rn.f32.s32 %r5, %r2;
        max.f32 %r6, %r5, 0f42000000, 0f41800000;
        cvt.rzi.s32.f32 %r7, %r6;
        st.global.b32 [%rd2], {%r7};
    """
    run(MINE + body, out)
    assert out.tolist() == [max(i, 32) for i in range(64)]


# ---- barriers and shuffles -------------------------------------------------------------------

# The block's words turned round through shared memory.
TURNED = """
    shl.b32 %r5, %r2, 2;
    mov.b32 %r6, global_smem;
    add.s32 %r7, %r6, %r5;
    st.shared.b32 [%r7], %r2;
    {barrier}
    xor.b32 %r8, %r5, {distance};
    ld.shared.b32 %r9, [%r8];
    st.global.b32 [%rd2], {{%r9}};
"""


def turned(barrier, lanes, **options):
    out = words(64)
    run(MINE + TURNED.format(barrier=barrier, distance=4 * lanes), out, shared=256, **options)
    return out.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_a_barrier_orders_the_warps(seed):
    assert turned("bar.sync 0;", 63, seed=seed) == [i ^ 63 for i in range(64)]


@pytest.mark.parametrize("seed", range(4))
def test_a_missing_barrier_is_a_race_in_whatever_order_the_warps_run(seed):
    with pytest.raises(Fault, match=r"race: two threads of block 0 .* shared memory"):
        turned("", 63, seed=seed)


def test_a_warps_barrier_orders_its_lanes_and_no_others():
    assert turned("bar.warp.sync -1;", 1) == [i ^ 1 for i in range(64)]
    with pytest.raises(Fault, match="race"):
        turned("bar.warp.sync -1;", 63)


def test_warps_run_in_random_order():
    """The value that is left in memory says which warp ran last."""
    memory = torch.zeros(1, dtype=torch.int32)
    winners = set()
    for seed in range(12):
        with pytest.raises(Fault, match="race"):
            run(
                "ld.param.b64 %rd1, [k_param_0]; mov.u32 %r1, %tid.x; st.global.b32 [%rd1], {%r1};",
                memory, seed=seed,
            )  # fmt: skip
        winners.add(memory.item() // 32)
    assert winners == {0, 1}


def test_threads_may_write_one_value_to_one_place():
    out = words(1)
    run("ld.param.b64 %rd1, [k_param_0]; st.global.b32 [%rd1], {7};", out)
    assert out.item() == 7


@pytest.mark.parametrize("what", ["bar.sync 0;", "shfl.sync.bfly.b32 %r7, %r2, 1, 31, -1;"])
def test_divergent_code_may_not_wait_or_shuffle(what):
    part = "setp.lt.s32 %p1, %r2, {n}; @%p1 bra $L__BB0_1; {what} $L__BB0_1:"
    with pytest.raises(Fault, match="divergent code"):
        run(MINE + part.format(n=5, what=what), words(64))
    # Whole warps may shuffle by themselves, and a branch that all take is none.
    run(MINE + part.format(n=64, what=what), words(64))


def test_a_barrier_that_one_warp_never_reaches_is_a_fault():
    part = "setp.lt.s32 %p1, %r2, 32; @%p1 bra $L__BB0_1; bar.sync 0; $L__BB0_1:"
    with pytest.raises(Fault, match="never reach"):
        run(MINE + part, words(64))


def test_warps_may_not_wait_at_different_barriers():
    part = """
        setp.lt.s32 %p1, %r2, 32;
        @%p1 bra $L__BB0_1;
        bar.sync 0;
        bra.uni $L__BB0_2;
    $L__BB0_1:
        bar.sync 0;
    $L__BB0_2:
    """
    with pytest.raises(Fault, match="different barriers"):
        run(MINE + part, words(64))


def test_shuffles_and_reductions():
    values = torch.randint(-1000, 1000, (64,), dtype=torch.int32)
    for code, wanted in (
        ("shfl.sync.bfly.b32 %r6, %r5, 5, 31, -1;", lambda v: v[:, [i ^ 5 for i in range(32)]]),
        ("shfl.sync.down.b32 %r6, %r5, 3, 31, -1;", lambda v: torch.cat([v[:, 3:], v[:, 29:]], 1)),
        ("shfl.sync.up.b32 %r6, %r5, 3, 0, -1;", lambda v: torch.cat([v[:, :3], v[:, :29]], 1)),
        ("shfl.sync.idx.b32 %r6, %r5, 7, 31, -1;", lambda v: v[:, 7:8].expand(2, 32)),
        (
            "xor.b32 %r7, %r2, 9; shfl.sync.idx.b32 %r6, %r5, %r7, 31, -1;",
            lambda v: v[:, [i ^ 9 for i in range(32)]],
        ),
        ("redux.sync.add.s32 %r6, %r5, -1;", lambda v: v.sum(1, keepdim=True).expand(2, 32).int()),
        ("redux.sync.min.s32 %r6, %r5, -1;", lambda v: v.amin(1, keepdim=True).expand(2, 32)),
    ):
        out = values.clone()
        run(MINE + f"ld.global.b32 {{%r5}}, [%rd2]; {code} st.global.b32 [%rd2], {{%r6}};", out)
        assert torch.equal(out.view(2, 32), wanted(values.view(2, 32))), code


# ---- memory ----------------------------------------------------------------------------------


def test_blocks_may_not_touch_what_another_writes():
    out = words(128)
    with pytest.raises(Fault, match="race: two blocks touch byte 0 of argument 0"):
        run("ld.param.b64 %rd1, [k_param_0]; st.global.b32 [%rd1], {7};", out, blocks=2)
    neighbour = "ld.global.b32 {%r5}, [%rd2+256]; st.global.b32 [%rd2], {%r5};"
    with pytest.raises(Fault, match="race: two blocks"):
        run(MINE + neighbour, words(192), blocks=2)


@pytest.mark.parametrize(
    "name", ["ld.global.b32 {%r5}, [%rd2+4];", "st.global.b32 [%rd2+4], {%r2};"]
)
def test_an_access_past_the_end_is_a_fault(name):
    with pytest.raises(
        Fault, match="out of bounds: 4 bytes at byte 256 of argument 0, which has 256"
    ):
        run(MINE + name, words(64))
    with pytest.raises(Fault, match="out of bounds"):
        run(MINE + name.replace("+4", "+-4"), words(64))


def test_an_access_off_alignment_is_a_fault():
    load = "ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd1+16];"
    run(MINE + load, words(64))
    with pytest.raises(Fault, match="misaligned: 16 bytes"):
        run(MINE + load.replace("16", "8"), words(64))


@pytest.mark.parametrize("at", [64, -4, 62])
def test_shared_memory_has_bounds(at):
    code = f"mov.b32 %r5, {at}; st.shared.b32 [%r5], %r5;"
    with pytest.raises(Fault, match="misaligned" if at == 62 else "out of bounds"):
        run(MINE + code, words(64), shared=64, threads=32)


@pytest.mark.parametrize("code", ["ld.shared.b32 %r9, [%r5];", "mov.b32 %r9, %r19;"])
def test_what_nobody_wrote_changes_with_the_seed(code):
    found = []
    for seed in range(3):
        out = words(64)
        start = "shl.b32 %r5, %r2, 2;" + code
        run(MINE + start + "st.global.b32 [%rd2], {%r9};", out, shared=256, seed=seed)
        assert (out == -1).sum() > 10  # NaN in every float type
        found.append(out)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_narrow_and_vector_accesses():
    source = torch.tensor([-5, 200, 77, -1], dtype=torch.int16).repeat(32)
    out = torch.zeros(32, 4)
    body = """
        ld.param.b64 %rd3, [k_param_1];
        mul.wide.u32 %rd4, %r2, 8;
        add.s64 %rd4, %rd3, %rd4;
        ld.global.v4.b16 {%rs1, %rs2, %rs3, %rs4}, [%rd4];
        cvt.rn.f32.s16 %r5, %rs1;
        cvt.rn.f32.u16 %r6, %rs2;
        and.b16 %rs5, %rs4, 255;
        cvt.rn.f32.u16 %r8, %rs5;
        cvt.s16.s8 %rs6, %rs2;
        cvt.rn.f32.s16 %r7, %rs6;
        mad.wide.u32 %rd2, %r2, 16, %rd1;
        st.global.v4.b32 [%rd2], {%r5, %r6, %r7, %r8};
    """
    run(MINE + body, out, source, threads=32)
    assert out.unique(dim=0).tolist() == [[-5.0, 200.0, -56.0, 255.0]]


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_are_laid_out_as_the_isa_says(trans):
    """Lane L gets elements 2 (L % 4) and 2 (L % 4) + 1 of row, or of column, L / 4."""
    body = f"""
        shl.b32 %r5, %r2, 3;
        mad.lo.s32 %r6, %r2, 2, 1;
        shl.b32 %r7, %r6, 16;
        shl.b32 %r8, %r2, 1;
        or.b32 %r9, %r7, %r8;
        shl.b32 %r10, %r2, 2;
        st.shared.b32 [%r10], %r9;
        bar.sync 0;
        and.b32 %r11, %r2, 7;
        shl.b32 %r12, %r11, 4;
        ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r13}}, [%r12];
        st.global.b32 [%rd2], {{%r13}};
    """
    out = words(32)
    run(MINE + body, out, threads=32, shared=128)
    matrix = torch.arange(64).view(8, 8)
    matrix = matrix.t() if trans else matrix
    assert torch.equal(out.view(torch.int16).view(8, 8).long(), matrix)


def test_stored_matrices_are_loaded_again():
    body = """
        and.b32 %r11, %r2, 31;
        shl.b32 %r12, %r11, 4;
        mul.lo.s32 %r5, %r2, 3; mul.lo.s32 %r6, %r2, 5;
        mul.lo.s32 %r7, %r2, 7; mul.lo.s32 %r8, %r2, 9;
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r12], {%r5, %r6, %r7, %r8};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r13, %r14, %r15, %r16}, [%r12];
        mad.wide.u32 %rd2, %r2, 16, %rd1;
        st.global.v4.b32 [%rd2], {%r13, %r14, %r15, %r16};
    """
    out = words(128)
    run(MINE + body, out, threads=32, shared=512)
    lane = torch.arange(32, dtype=torch.int32)
    assert torch.equal(out.view(32, 4), torch.stack([lane * i for i in (3, 5, 7, 9)], 1))
