"""The U-Net of chapter 2 is DDPM++: same numbers, same parameter names as the public EDM checkpoints, and it trains."""

import pytest
import torch
from torch import nn

from conftest import load

SMALL = dict(image_size=32, model_channels=32, mult=(1, 2, 2), num_blocks=1, attention=(16,))
TINY = dict(image_size=8, model_channels=8, mult=(1, 2), num_blocks=1, attention=(4,))

# Arguments, parameters, tensors; mean, std, first and last four entries of F; first and last four entries of D.
REFERENCE = {
    "small": (SMALL, 1_260_547, 200, [-0.103766, 0.508418],
              [0.028972, 0.065182, 0.065998, 0.066364], [-0.073077, -0.053904, -0.020963, -0.014310],
              [0.009964, 0.027662, 0.032992, 0.038155], [-0.062481, -0.052835, -0.035945, -0.032610]),
    "small, 10 classes": (dict(SMALL, classes=10), 1_260_899, 202, [0.071047, 0.444222],
                          [-0.061614, -0.092834, -0.094084, -0.095265], [0.217853, 0.176881, 0.105727, 0.042205],
                          [-0.021772, -0.027811, -0.023235, -0.018518], [0.083680, 0.062982, 0.026046, -0.006192]),
    "CIFAR-10": ({}, 55_732_739, 416, [0.018544, 0.185609],
                 [0.268212, 0.390041, 0.415333, 0.377959], [-0.035715, -0.055854, -0.053212, -0.016641],
                 [0.094355, 0.142222, 0.156115, 0.147985], [-0.042813, -0.052923, -0.052009, -0.034489]),
}  # fmt: skip


def unet(**arguments):
    torch.manual_seed(0)
    return load("02_reflow").UNet(**arguments)


@torch.no_grad()
def fill(net):
    """Weights that anyone can write down again: 0.05·sin(i + 0.1·j), and one more for the scale of a norm."""
    norms = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.GroupNorm)}
    for i, (name, p) in enumerate(net.named_parameters()):
        wave = 0.05 * torch.sin(i + 0.1 * torch.arange(p.numel(), dtype=torch.float64))
        p.copy_(wave.view_as(p) + (name in norms))
    return net


def shake(net):
    """The near-zero layers of a fresh network would hide most of it: give every parameter a size of its own."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def batch(net, n=2):
    torch.manual_seed(1)
    labels = torch.randint(net.classes, (n,)) if net.classes else None
    return torch.randn(n, *net.shape), torch.randn(n), labels


def denoise(net, y, sigma, labels, sigma_data=0.5):
    """EDM's preconditioning, D(y; σ) = c_skip y + c_out F(c_in y; ln σ / 4) (Karras et al. 2022, table 1)."""
    s = sigma[:, None, None, None]
    total = s**2 + sigma_data**2
    return sigma_data**2 / total * y + s * sigma_data / total.sqrt() * net(y / total.sqrt(), sigma.log() / 4, labels)


@pytest.mark.parametrize("row", REFERENCE)
def test_reference_numbers(row):
    arguments, parameters, tensors, moments, f_first, f_last, d_first, d_last = REFERENCE[row]
    net = fill(unet(**arguments)).eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == tensors
    x = torch.sin(0.01 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).float().view(2, 3, 32, 32)
    sigma = torch.tensor([0.5, 3.0])
    labels = torch.tensor([3, 7]) if net.classes else None
    with torch.no_grad():
        f, d = net(x, sigma.log() / 4, labels), denoise(net, x, sigma, labels)
    got = torch.cat([f.mean()[None], f.std()[None], f[0, 0, 0, :4], f[1, 2, 31, -4:], d[0, 0, 0, :4], d[1, 2, 31, -4:]])
    torch.testing.assert_close(got, torch.tensor(moments + f_first + f_last + d_first + d_last), atol=1e-4, rtol=0)


def test_parameter_names():
    shapes = {name: tuple(p.shape) for name, p in unet(**dict(SMALL, classes=10)).state_dict().items()}
    expected = {
        "map_label.weight": (32, 10),
        "map_layer0.weight": (128, 32),
        "map_layer1.bias": (128,),
        "enc.32x32_conv.weight": (32, 3, 3, 3),
        "enc.32x32_block0.conv1.weight": (32, 32, 3, 3),
        "enc.16x16_down.skip.weight": (32, 32, 1, 1),
        "enc.16x16_block0.affine.weight": (64, 128),
        "enc.16x16_block0.norm2.weight": (64,),
        "enc.16x16_block0.qkv.weight": (192, 64, 1, 1),
        "dec.8x8_in0.proj.bias": (64,),
        "dec.8x8_in1.conv0.bias": (64,),
        "dec.8x8_block1.norm0.weight": (128,),
        "dec.16x16_up.skip.weight": (64, 64, 1, 1),
        "dec.16x16_block1.qkv.bias": (192,),
        "dec.32x32_block1.skip.weight": (32, 64, 1, 1),
        "dec.32x32_aux_norm.weight": (32,),
        "dec.32x32_aux_conv.weight": (3, 32, 3, 3),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    absent = ["enc.32x32_block0.skip.weight", "enc.32x32_block0.qkv.weight", "enc.8x8_block0.qkv.weight",
              "dec.8x8_in1.qkv.weight", "dec.16x16_block0.qkv.weight", "dec.32x32_block2.conv0.weight"]  # fmt: skip
    assert not [name for name in absent if name in shapes]


def test_order_of_parameters():
    """The order is part of the layout: whoever numbers the tensors, as the reference numbers above do, relies on it."""
    names = list(unet(**SMALL).state_dict())
    block = [name.split(".")[2] for name in names if name.startswith("enc.16x16_block0.")]
    assert block[::2] == ["norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj"]
    assert names[0] == "map_layer0.weight" and names[4] == "enc.32x32_conv.weight"
    assert names[-1] == "dec.32x32_aux_conv.bias"


def test_start_is_almost_zero():
    """Fresh networks predict nothing and every block passes its input on, so that training starts calmly."""
    net = unet(**SMALL).eval()
    x, s, _ = batch(net)
    assert net(x, s).abs().max() < 1e-3
    block = net.enc["32x32_block0"]
    h = torch.randn(2, 32, 32, 32)
    torch.testing.assert_close(block(h, torch.randn(2, 128)), h * 0.5**0.5, atol=1e-3, rtol=0)


def test_labels_arrive_one_hot():
    """With a mean square of one, as in EDM; -1 is no class."""
    net = shake(unet(**TINY, classes=5)).eval()
    x, s, labels = batch(net)
    seen = []
    net.map_label.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = net(x, s, labels)
    torch.testing.assert_close(seen.pop(), nn.functional.one_hot(labels, 5) * 5**0.5)
    assert torch.equal(out, net(x, s, nn.functional.one_hot(labels, 5).float()))        # rows of numbers are taken as well
    seen.pop()
    assert (out - net(x, s, (labels + 1) % 5)).abs().max() > 1e-4
    net(x, s, torch.full((2,), -1))
    assert not seen[-1].any()


def test_samples_do_not_mix():
    net = shake(unet(**TINY, classes=5)).eval()
    x, s, labels = batch(net, 3)
    torch.testing.assert_close(net(x, s, labels)[1:2], net(x[1:2], s[1:2], labels[1:2]))


def test_noise_label_is_read_in_float32():
    """bfloat16 keeps three digits: 0.5 and 0.501 must stay different under autocast."""
    net = shake(unet(**TINY)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        emb = net.embed(torch.tensor([0.5, 0.501]), None)
    features = []
    net.map_layer0.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        net.embed(torch.tensor([0.5, 0.501]), None)
    assert emb.dtype == torch.bfloat16 and features[0].dtype == torch.float32
    assert (features[0][0] - features[0][1]).abs().max() > 4e-4


@pytest.mark.parametrize("classes", [0, 5])
def test_compiles_without_graph_breaks(classes):
    net = shake(unet(**TINY, classes=classes)).eval()
    x, s, labels = batch(net)
    grads = []
    for f in net, torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False):
        net.zero_grad()
        out = f(x, s, labels)
        out.square().mean().backward()
        grads.append([out.detach()] + [p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("classes", [0, 5])
def test_gradient_reaches_every_parameter(classes):
    net = shake(unet(**TINY, classes=classes))
    net(*batch(net)).square().sum().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


def test_channels_last_changes_nothing():
    net = shake(unet(**TINY)).eval()
    x, s, _ = batch(net)
    expected = net(x, s)
    fast = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), s)
    torch.testing.assert_close(fast, expected, atol=1e-5, rtol=1e-4)


def test_dropout_only_in_training():
    net = shake(unet(**TINY, dropout=0.5))
    x, s, _ = batch(net)
    assert not torch.equal(net(x, s), net(x, s))
    net.eval()
    assert torch.equal(net(x, s), net(x, s))


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
def test_any_power_of_two(size):
    net = unet(image_size=size, image_channels=1, model_channels=4, mult=(1,) * min(3, size.bit_length()), num_blocks=1)
    assert net(torch.randn(2, 1, size, size), torch.zeros(2)).shape == (2, 1, size, size)


@pytest.mark.parametrize("wrong, said", [
    (dict(image_size=24), "power of two"),
    (dict(image_size=0), "power of two"),
    (dict(image_size=2, mult=(1, 2, 4)), "too small for 3 levels"),
    (dict(model_channels=6), "multiple of 4"),
    (dict(model_channels=36, mult=(1, 4)), "of 32"),
])  # fmt: skip
def test_wrong_sizes_are_refused(wrong, said):
    with pytest.raises(load("02_reflow").UserError, match=said) as error:
        unet(**{**TINY, **wrong})
    assert "\n" not in str(error.value)


def test_wrong_inputs_are_refused():
    plain, conditional = unet(**TINY), unet(**TINY, classes=5)
    right, labels = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    for net, x, labels in [(plain, torch.randn(2, 3, 16, 16), None), (plain, right[:, :1], None), (plain, right, labels),
                           (conditional, right, None)]:
        with pytest.raises(ValueError, match="built for") as error:
            net(x, torch.zeros(2), labels)
        assert "\n" not in str(error.value)
