"""The PTX lint: it passes what ships and refuses what must never ship."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from exactmoe.kernels.errors import MissingEnvironment
from exactmoe.kernels.ptx_lint import ARCHS, Found, judge, opcodes
from exactmoe.kernels.ptx_lock import differences, lock_of, read_lock

PLANTS = """
import json, sys
import torch, triton
import triton.language as tl
from exactmoe.kernels.ptx_lint import lint, record

@triton.jit
def clean(x, y, M: tl.constexpr):
    i = tl.arange(0, M)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(x + i, tl.div_rn(a * b + a, tl.sqrt_rn(b)))

@triton.jit
def multiply_add(x, y, M: tl.constexpr):
    i = tl.arange(0, M)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(x + i, a * b + a)

@triton.jit
def explicit_fma(x, y, M: tl.constexpr):
    i = tl.arange(0, M)
    tl.store(x + i, tl.fma(tl.load(x + i), tl.load(y + i), 1.5))

@triton.jit
def fast_exp(x, y, M: tl.constexpr):
    i = tl.arange(0, M)
    tl.store(x + i, tl.exp(tl.load(y + i)))

@triton.jit
def slash(x, y, M: tl.constexpr):
    i = tl.arange(0, M)
    tl.store(x + i, tl.load(x + i) / tl.load(y + i))

@triton.jit
def flushing(x, y, M: tl.constexpr):
    i = tl.arange(0, M)
    y = tl.inline_asm_elementwise("{ mul.rn.ftz.f32 $0, $1, $1; }", "=f,f", [tl.load(y + i)], tl.float32, True, 1)
    tl.store(x + i, y)

@triton.jit
def atomic_sum(x, y, M: tl.constexpr):
    i = tl.arange(0, M)
    tl.atomic_add(x + i % 4, tl.load(y + i))

@triton.jit
def float_dot(x, y, M: tl.constexpr):
    i = tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :]
    tl.store(x + i, tl.dot(tl.load(x + i), tl.load(y + i)))

@triton.jit
def half_dot(x, y, M: tl.constexpr):
    i = tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :]
    tl.store(x + i, tl.dot(tl.load(x + i).to(tl.float16), tl.load(y + i).to(tl.float16)))

@triton.jit
def byte_dot(x, y, M: tl.constexpr):
    i = tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :]
    tl.store(x + i, tl.dot(tl.load(x + i).to(tl.int8), tl.load(y + i).to(tl.int8)).to(tl.float32))

@triton.jit
def broken(x, y, M: tl.constexpr):
    tl.static_assert(M == 1)

x = torch.zeros(64 * 64)
out = {}
faithful = clean, byte_dot
wrong = multiply_add, explicit_fma, fast_exp, slash, flushing, atomic_sum, float_dot, half_dot, broken
for kernel in faithful + wrong:
    options = {} if kernel is multiply_add else {"enable_fp_fusion": False}
    report = lint(record([lambda: kernel[(1,)](x, x, M=64, **options)]))
    out[kernel.__name__] = [report.clean, [f.arch for f in report.found], [" ".join(f.faults) for f in report.found]]
nothing = lint([])
out["nothing"] = [nothing.clean, [], nothing.complaints]
json.dump(out, sys.stdout)
"""

INEXACT = """
fma.rn.f32 fma.rn.f64 add.rn.f64 mad.rn.f32 fma.rn.f32x2 mul.f32 add.f32 add.rz.f32 add.rn.ftz.f32 add.rn.f16
mul.rn.bf16x2 div.full.f32 div.approx.f32 div.rn.ftz.f32 sqrt.approx.f32 rsqrt.approx.f32 rcp.rn.f32
rcp.approx.ftz.f32 ex2.approx.ftz.f32 lg2.approx.f32 tanh.approx.f32 sin.approx.f32 min.ftz.f32
cvt.rn.bf16.f32 cvt.rz.f32.s32 cvt.rna.tf32.f32 cvt.rn.satfinite.e4m3x2.f32 atom.global.gpu.relaxed.add.f32
red.global.add.f32 red.global.add.noftz.f16 setp.lt.ftz.f32
mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3
tcgen05.mma.cta_group::1.kind::tf32 mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
"""

EXACT = """
add.rn.f32 sub.rn.f32 mul.rn.f32 div.rn.f32 sqrt.rn.f32 mul.rn.f32x2 max.f32 min.NaN.f32 neg.f32
abs.f32 setp.lt.f32 setp.nan.f32 selp.f32 mov.f32 ld.global.v4.f32 st.shared.f32 cvt.rn.f32.s32
cvt.rn.f32.s64 cvt.rn.f32.f64 cvt.f32.f16 cvt.f64.f32 cvt.rzi.s32.f32 cvt.rn.f16.s32 mad.lo.s32 mul.wide.u32
atom.global.add.u32 red.shared.add.s32 dp4a.s32.s32
mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8
wgmma.fence.sync.aligned tcgen05.mma.cta_group::1.kind::i8 bar.sync ret
"""


def _without_interpreter(command: list[str]) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def plants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tmp = tmp_path_factory.mktemp("plants")
    script = tmp / "plants.py"
    script.write_text(PLANTS)
    done = _without_interpreter([str(script)])
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def lint() -> tuple[int, dict[str, Any]]:
    """Exit status and report of the lint of every shipped kernel."""
    done = _without_interpreter(["-m", "exactmoe.kernels.ptx_lint", "--json", "--resources", "90"])
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout)


def test_every_shipped_kernel_compiles_to_instructions_that_round_once(lint: tuple[int, dict[str, Any]]) -> None:
    status, report = lint
    faults = [f"{f['kernel']} [{f['variant']}] sm_{f['arch']}: {f['faults']}" for f in report["found"] if f["faults"]]
    assert not faults and not report["complaints"], "\n".join(faults + report["complaints"])
    assert report["clean"] and status == 0
    assert {f["arch"] for f in report["found"]} == set(ARCHS)
    matmuls = {f["variant"] for f in report["found"] if f["kernel"] == "_matmul_kernel" and f["arch"] == 90}
    for part in ("FORMAT=12", "FORMAT=14", "S=1 ", "S=2 ", "E=0 ", "E=128 "):
        assert any(part in variant for variant in matmuls), f"no matmul variant with {part}"


def test_every_shipped_kernel_is_as_locked(lint: tuple[int, dict[str, Any]]) -> None:
    """After a change of a kernel that was meant: python -m exactmoe.kernels.ptx_lock --update"""
    found = lock_of(Found(**found) for found in lint[1]["found"])
    locked = read_lock()
    if found.triton != locked.triton:
        with pytest.raises(MissingEnvironment, match="not comparable"):
            differences(locked, found)
        pytest.fail(f"the lock is of Triton {locked.triton}, this is {found.triton}: nothing was compared")
    assert len(found.kernels) > 40
    assert not differences(locked, found), "\n".join(differences(locked, found))


@pytest.mark.parametrize(
    ("kernel", "instruction"),
    [
        ("multiply_add", "fma.rn.f32"),
        ("multiply_add", "enable_fp_fusion"),
        ("explicit_fma", "fma.rn.f32"),
        ("fast_exp", "ex2.approx"),
        ("slash", "div.full.f32"),
        ("flushing", "mul.rn.ftz.f32"),
        ("atomic_sum", "add.f32"),
        ("broken", "compile"),
    ],
)
def test_a_planted_kernel_is_refused_on_every_architecture(
    plants: dict[str, Any], kernel: str, instruction: str
) -> None:
    clean, archs, faults = plants[kernel]
    assert not clean
    assert archs == list(ARCHS)
    assert all(instruction in found for found in faults), faults


@pytest.mark.parametrize("kernel", ["float_dot", "half_dot"])
def test_a_float_matrix_product_without_a_review_is_refused(plants: dict[str, Any], kernel: str) -> None:
    clean, archs, faults = plants[kernel]
    assert not clean and archs == list(ARCHS)
    assert all("mma" in found or "fma" in found for found in faults), faults


@pytest.mark.parametrize("kernel", ["clean", "byte_dot"])
def test_a_faithful_kernel_passes_beside_the_planted_ones(plants: dict[str, Any], kernel: str) -> None:
    clean, archs, faults = plants[kernel]
    assert clean and archs == list(ARCHS), faults


def test_a_lint_of_no_kernel_is_not_clean(plants: dict[str, Any]) -> None:
    clean, _, complaints = plants["nothing"]
    assert not clean and "no kernel" in complaints[0]


def test_the_lint_refuses_to_run_in_the_interpreter() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "exactmoe.kernels.ptx_lint"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3 and "TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize("archs", ["", "91", "80;90", "80,x"])
def test_an_unknown_architecture_is_bad_usage(archs: str) -> None:
    done = _without_interpreter(["-m", "exactmoe.kernels.ptx_lint", "--arch", archs])
    assert done.returncode == 2 and "--arch" in done.stderr


@pytest.mark.parametrize("opcode", INEXACT.split())
def test_an_inexact_opcode_is_refused(opcode: str) -> None:
    assert judge(opcode)


@pytest.mark.parametrize("opcode", EXACT.split())
def test_an_opcode_that_rounds_once_or_not_at_all_passes(opcode: str) -> None:
    assert judge(opcode) is None


def test_opcodes_are_found_behind_predicates_labels_comments_and_inline_assembly() -> None:
    ptx = """
    // fma.rn.f32 in a comment
    $L__BB0_1: @%p1 bra $L__BB0_2;
    @!%p2 ex2.approx.f32 %f1, %f2;
    { .reg .f32 t; mul.rn.ftz.f32 t, %f1, %f1; add.rn.f32 %f3, t, t; }
    /* sin.approx.f32 */ ld.global.f32 %f4, [%rd1];
    """
    found = set(opcodes(ptx))
    assert {"ex2.approx.f32", "mul.rn.ftz.f32", "add.rn.f32", "ld.global.f32", "bra"} <= found
    assert not {"fma.rn.f32", "sin.approx.f32"} & found
