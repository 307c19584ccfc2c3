"""Every path of multi-scale deformable attention against the formula in double precision.

The Triton kernels run on a GPU if there is one, and anywhere in Triton's interpreter. That must be
chosen before Triton is imported, so `test_interpreted` runs this file with TRITON_INTERPRET=1.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import case as recorded
from parity import check, report  # noqa: F401
from torch.nn import functional as F

import common.msda
from common.msda import formula, msda

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# levels, B, Q, M, d, P: unequal sides, one pixel, one row, one column; K = 12, 16, 1, 3; padded d
# and an incomplete tile
CASES = {
    "K12": (((3, 4), (6, 8), (2, 1)), 2, 19, 2, 32, 4),
    "K16": (((1, 1), (1, 5), (5, 1), (2, 2)), 1, 5, 3, 20, 4),
    "K1": (((3, 5),), 2, 67, 1, 8, 1),
    "K3": (((2, 2), (4, 3), (1, 2)), 1, 7, 2, 64, 1),
    "d128": (((2, 3), (4, 4)), 1, 5, 1, 128, 3),
}


@pytest.fixture(params=["interpreted"] if INTERPRETED else ["cpu", "cuda"])
def device(request, monkeypatch) -> str:
    if request.param == "interpreted":
        monkeypatch.setitem(common.msda.KERNELS, "cpu", common.msda.KERNELS["cuda"])
        return "cpu"
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; the kernels are interpreted instead")
    return request.param


def draw(shapes, batch, queries, heads, d, points):
    """Returns value, shapes, offsets, logits, reference and the cotangent, in float64.

    Points are up to 3 pixels outside the map.

    No point is within 0.01 of a pixel centre, where gradients jump.
    """
    torch.manual_seed(0)
    size = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)[
        :, None
    ]  # (L, 1, 2)
    centre = torch.rand(batch, queries, 2, dtype=torch.float64)
    where = (
        torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=torch.float64) * (size + 6)
        - 3.5
    )
    where = where.floor() + where.frac().abs().clamp(0.01, 0.99)
    offsets = where - (centre[:, :, None, None, None] * size - 0.5)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, d, dtype=torch.float64)
    logits = torch.randn(batch, queries, heads, len(shapes) * points, dtype=torch.float64)
    return (
        value,
        shapes,
        offsets,
        logits,
        centre,
        torch.randn(batch, queries, heads * d, dtype=torch.float64),
    )


def run(
    function,
    value,
    shapes,
    offsets,
    logits,
    centre,
    cotangent,
    device="cpu",
    dtype=None,
    value_dtype=None,
):
    """(out, gradients of value, offsets, logits) on `device` in `dtype`."""
    inputs = [x.detach().to(device, dtype) for x in (value, offsets, logits)]
    inputs[0] = inputs[0].to(value_dtype or inputs[0].dtype)
    value, offsets, logits = (x.requires_grad_() for x in inputs)
    out = function(value, shapes, offsets, logits, centre.to(device, dtype))
    assert out.dtype == torch.promote_types(value.dtype, torch.float32)
    return out, *torch.autograd.grad(out, (value, offsets, logits), cotangent.to(out))


def compare(ours, wanted, tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        name = f"result {i}"
        assert a.shape == b.shape, name
        b = b.detach()
        error = float((a.detach().cpu().double() - b).abs().max() / b.abs().max().clamp(min=0.1))
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula(device, name):
    inputs = draw(*CASES[name])
    compare(run(msda, *inputs, device, torch.float32), run(formula, *inputs), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values(device, dtype):
    """Only the gradient of value is rounded; the others come from sums in single precision."""
    value, *inputs, cotangent = draw(*CASES["K12"])
    value = value.to(dtype).double()
    out, of_value, *others = run(msda, value, *inputs, cotangent, device, torch.float32, dtype)
    wanted = run(formula, value, *inputs, cotangent)
    assert of_value.dtype == dtype and others[0].dtype == torch.float32
    compare([out, *others], [wanted[0], *wanted[2:]], 1e-5)
    compare([of_value], wanted[1:2], 2**-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_single_sample_has_no_choice(device, dtype):
    """Its attention is 1, whatever the logit is, so that the logit has no gradient."""
    *_, of_logits = run(msda, *draw(*CASES["K1"]), device, torch.float32, dtype)
    assert float(of_logits.abs().max()) < 1e-5


def test_half_precision_offsets(device):
    inputs = [x.bfloat16().double() if torch.is_tensor(x) else x for x in draw(*CASES["K3"])]
    ours = run(msda, *inputs, device, torch.bfloat16)
    assert {x.dtype for x in ours[1:]} == {torch.bfloat16}
    compare(ours, run(formula, *inputs), 2**-6)


def test_points_on_borders_and_pixel_centres(device):
    shapes = ((1, 1), (2, 3))
    value, _, _, logits, _, cotangent = draw(shapes, 1, 81, 2, 8, 1)
    steps = torch.tensor(
        [-1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3], dtype=torch.float64
    )  # pixels; 2.5 = 3 - 0.5
    grid = torch.cartesian_prod(steps, steps)  # (81, 2)
    offsets = (grid + 0.5)[None, :, None, None, None].expand(
        1, 81, 2, 2, 1, 2
    )  # from the corner of the map, exactly
    inputs = value, shapes, offsets, logits, torch.zeros(81, 2).double(), cotangent
    compare(run(msda, *inputs, device, torch.float32), run(formula, *inputs), 1e-5)


def test_far_points_still_move_their_logits(device):
    """d/dlogit of a point without a sample is -attention <cotangent, out>, not 0."""
    value, shapes, offsets, logits, centre, cotangent = draw(*CASES["K12"])
    offsets = offsets.clone()
    offsets[:, :, :, 1] = 1e9
    ours = run(msda, value, shapes, offsets, logits, centre, cotangent, device, torch.float32)
    out, *_, grad = run(formula, value, shapes, offsets, logits, centre, cotangent)
    product = (out * cotangent).unflatten(-1, (2, 32)).sum(-1, keepdim=True)  # (B, Q, M, 1)
    far = (-logits.softmax(-1) * product)[..., 4:8]
    torch.testing.assert_close(grad[..., 4:8], far)
    assert float(ours[2][:, :, :, 1].abs().max()) == 0
    torch.testing.assert_close(ours[3].cpu().double(), grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_location_that_is_no_number_reaches_the_result(device, axis):
    """A training whose offsets diverged must not go on as if it sampled nothing there."""
    value, shapes, offsets, *rest = draw(*CASES["K12"])
    offsets = offsets.clone()
    offsets[1, 7, 0, 2, 3, axis] = torch.nan
    out, of_value, _, of_logits = run(msda, value, shapes, offsets, *rest, device, torch.float32)
    lost = torch.zeros(2, 19, 2, dtype=torch.bool)
    lost[1, 7, 0] = True
    assert torch.equal(out.cpu().isnan(), lost.repeat_interleave(32, 2))
    assert torch.equal(of_logits.cpu().isnan(), lost[..., None].expand(-1, -1, -1, 12))
    assert not of_value[0].isnan().any()


def test_all_points_far(device):
    value, shapes, offsets, *rest = draw(*CASES["K16"])
    for found in run(msda, value, shapes, offsets + 100, *rest, device, torch.float32):
        assert not found.any()


def test_images_do_not_mix(device):
    value, shapes, *tensors = draw(*CASES["K12"])
    both = run(msda, value, shapes, *tensors, device, torch.float32)
    for i in range(2):
        one = run(
            msda, value[i : i + 1], shapes, *(x[i : i + 1] for x in tensors), device, torch.float32
        )
        compare([x[i : i + 1] for x in both], [x.detach().cpu().double() for x in one], 1e-6)


def test_inputs_need_not_be_contiguous(device):
    value, shapes, offsets, logits, centre, cotangent = draw(*CASES["K12"])
    wanted = run(formula, value, shapes, offsets, logits, centre, cotangent)
    value = value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    offsets = offsets.permute(5, 2, 1, 3, 4, 0).contiguous().permute(5, 2, 1, 3, 4, 0)
    logits = torch.cat([logits, logits], -1)[..., :12]
    centre = centre.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    cotangent = cotangent.transpose(1, 2).contiguous().transpose(1, 2)
    compare(
        run(msda, value, shapes, offsets, logits, centre, cotangent, device, torch.float32),
        wanted,
        1e-5,
    )


def test_no_queries(device):
    out, grad, *_ = run(msda, *draw(*CASES["K12"][:2], 0, *CASES["K12"][3:]), device, torch.float32)
    assert out.shape == (2, 0, 64) and float(grad.abs().max()) == 0


def test_three_forms_of_reference(device):
    value, shapes, offsets, logits, centre, _ = (
        x.float() if torch.is_tensor(x) else x for x in draw(*CASES["K12"])
    )
    centre = centre[:1].expand(2, -1, -1)  # the same in both images
    forms = centre[0], centre, centre[:, :, None].expand(-1, -1, 3, -1)
    a, b, c = (
        msda(
            *(
                x.to(device) if torch.is_tensor(x) else x
                for x in (value, shapes, offsets, logits, form)
            )
        )
        for form in forms
    )
    assert torch.equal(a, b) and torch.equal(a, c)
    level = forms[2] + torch.tensor([0.0, 0.1, 0.2])[:, None]  # each level its own
    inputs = value, shapes, offsets, logits, level, torch.ones(2, 19, 64)
    compare(run(msda, *inputs, device), run(formula, *inputs, dtype=torch.float64), 1e-4)


def test_the_formula_is_grid_sample():
    value, shapes, offsets, logits, centre, _ = draw(*CASES["K12"])
    weights, start, wanted = logits.softmax(-1).unflatten(-1, (3, 4)), 0, 0
    for i, (height, width) in enumerate(shapes):
        level = (
            value[:, start : start + height * width]
            .permute(0, 2, 3, 1)
            .reshape(4, 32, height, width)
        )
        where = centre[:, :, None, None] + offsets[:, :, :, i] / torch.tensor(
            [width, height]
        )  # (B, Q, M, P, 2)
        grid = 2 * where.transpose(1, 2).flatten(0, 1) - 1
        found = F.grid_sample(level, grid, align_corners=False).view(
            2, 2, 32, 19, 4
        )  # (B, M, d, Q, P)
        wanted = wanted + torch.einsum("bmdqp,bqmp->bqmd", found, weights[:, :, :, i]).flatten(2)
        start += height * width
    torch.testing.assert_close(formula(value, shapes, offsets, logits, centre), wanted)


@pytest.mark.parametrize("function", [msda, formula])
def test_gradcheck(function):
    value, shapes, offsets, logits, centre, _ = draw(((2, 3), (1, 2)), 2, 3, 2, 8, 2)
    inputs = [x.requires_grad_() for x in (value, offsets, logits)]
    assert torch.autograd.gradcheck(lambda v, o, w: function(v, shapes, o, w, centre), inputs)


@pytest.mark.skipif(
    INTERPRETED, reason="the interpreter reads numbers, which tensors without data do not have"
)
def test_compiles_without_a_break_for_any_number_of_queries(device):
    torch._dynamo.reset()
    step = torch.compile(
        lambda *inputs: msda(*inputs).square(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for queries in (19, 23, 40):
        inputs = draw(*CASES["K12"][:2], queries, *CASES["K12"][3:])
        with torch._dynamo.config.patch(error_on_recompile=queries > 19):
            ours = run(step, *inputs, device, torch.float32)
        compare(ours, run(lambda *inputs: formula(*inputs).square(), *inputs), 1e-5)


@pytest.mark.skipif(INTERPRETED, reason="the same registration as without the interpreter")
def test_opcheck(device):
    value, shapes, offsets, logits, centre, _ = (
        x.float().to(device) if torch.is_tensor(x) else x for x in draw(*CASES["K3"])
    )
    tensors = [x.requires_grad_() for x in (value, offsets, logits)]
    sizes = [side for shape in shapes for side in shape]
    torch.library.opcheck(
        torch.ops.concord.msda.default, (*tensors, centre[:, :, None].expand(-1, -1, 3, -1), sizes)
    )


def test_wrong_shapes_are_refused():
    value, shapes, offsets, logits, centre, _ = draw(*CASES["K12"])
    with pytest.raises(ValueError, match="value has 62 pixels"):
        msda(value, shapes[:2], offsets, logits, centre)
    with pytest.raises(ValueError, match="do not fit"):
        msda(value, shapes, offsets[:, :, :1], logits, centre)
    with pytest.raises(ValueError, match="do not fit"):
        msda(value, shapes, offsets, logits[..., :-1], centre)


# -- against the official implementation -----------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_parity_core(device, precision):
    tensors, _ = recorded("mask2former_pixel_decoder")
    if precision == "fp64" and (device == "cuda" or INTERPRETED):
        pytest.skip("the kernels are for single and half precision")
    tensors = {
        key.removeprefix("msda.core."): x
        for key, x in tensors.items()
        if key.startswith("msda.core.")
    }
    shapes = tuple(map(tuple, tensors["spatial_shapes"].tolist()))
    names, dtype = (
        ("value", "sampling_locations", "attention_weights"),
        getattr(torch, f"float{precision[2:]}"),
    )
    value, locations, weights = (tensors[name].to(device, dtype).requires_grad_() for name in names)
    offsets = (
        locations * locations.new_tensor([(width, height) for height, width in shapes])[:, None]
    )
    # weights that sum to 1 are a softmax of their logarithms; others are that times their sum
    total = weights.sum((-2, -1))  # (B, Q, M)
    out = msda(
        value,
        shapes,
        offsets,
        weights.flatten(-2).log(),
        value.new_zeros(value.shape[0], offsets.shape[1], 2),
    )
    out = (out.unflatten(-1, value.shape[2:]) * total[..., None]).flatten(2)
    tolerance = 1e-12 if precision == "fp64" else 1e-5
    check(f"msda {precision}: output", out.cpu(), tensors[f"{precision}.output"], tolerance)
    grads = torch.autograd.grad(out, (value, locations, weights), tensors["cotangent"].to(out))
    for name, grad in zip(names, grads):
        check(
            f"msda {precision}: gradient of {name}",
            grad.cpu(),
            tensors[f"{precision}.grad_{name}"],
            10 * tolerance,
        )


@pytest.mark.parametrize("form", ["ref2", "ref2_padded", "ref4"])
def test_parity_module(device, form):
    tensors, record = recorded("mask2former_pixel_decoder")
    query, source, padding = (
        tensors[f"msda.module_in.{n}"] for n in ("query", "input_flatten", "padding_mask")
    )
    shapes = tuple(map(tuple, tensors["msda.module_in.spatial_shapes"].tolist()))
    heads, points = record["config"]["nheads"], record["config"]["n_points"]

    def linear(name, x):
        return F.linear(
            x, tensors[f"msda.module.{name}.weight"], tensors[f"msda.module.{name}.bias"]
        )

    value = linear("value_proj", source)
    if form == "ref2_padded":
        value = value.masked_fill(padding.bool()[..., None], 0)
    offsets = linear("sampling_offsets", query).unflatten(-1, (heads, len(shapes), points, 2))
    logits = linear("attention_weights", query).unflatten(-1, (heads, -1))
    centre = tensors[f"msda.module_in.reference_points{form[3]}"]  # (B, Q, L, 2 or 4)
    if form == "ref4":  # offsets in units of the box: to pixels
        size = torch.tensor([(width, height) for height, width in shapes])  # (L, 2)
        offsets = offsets / points * (centre[..., 2:] * 0.5 * size)[:, :, None, :, None]
    value = value.unflatten(-1, (heads, -1))
    value, offsets, logits, centre = (
        x.to(device) for x in (value, offsets, logits, centre[..., :2])
    )
    out = linear("output_proj", msda(value, shapes, offsets, logits, centre).cpu())
    check(f"msda module {form}", out, tensors[f"msda.module_out.{form}"], 1e-5)


# -- kernels without a GPU -------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="already interpreted")
def test_interpreted():
    """This file in a process of its own, with kernels in place of the CPU path."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        __file__,
    ]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("value", ["bf16", "fp32"])
def test_kernels_compile_for_hopper(value, tmp_path, monkeypatch):
    """To machine code, with 16-byte reads and vector atomics, which the speed rests on."""
    triton = pytest.importorskip("triton", minversion="3.3")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"L": 3, "P": 4, "D": 32, "T": 16, "TP": 4, "TK": 16, "TD": 32}
    numbers = ("pixels", "queries", "heads", "ref_b", "ref_q", "ref_l", "ref_xy")
    types = (
        dict.fromkeys(constants, "constexpr") | dict.fromkeys(numbers, "i32") | {"levels": "*i32"}
    )
    types |= {"value": f"*{value}"}
    for kernel in (common.msda._forward_kernel, common.msda._backward_kernel):
        names = kernel.arg_names
        signature = {name: types.get(name, "*fp32") for name in names}
        places = {(names.index(name),): number for name, number in constants.items()}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*")
        }
        built = triton.compile(
            ASTSource(kernel, signature, places, aligned), target=GPUTarget("cuda", 90, 32)
        )
        assert built.asm["cubin"] and "ld.global.v4.b32" in built.asm["ptx"]
    assert "add.v4.f32" in built.asm["ptx"]
