"""Perceptual distance, PSNR and SSIM: equal to the packages' own and to numbers by hand."""

import importlib
import sys
import types

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from datakit.errors import ConfigError, MissingDependency
from trainer.evaluation.psnr_ssim import LARGEST_PSNR, psnr, ssim
from trainer.models.autoencoders.lpips import build_perceptual
from trainer.models.common.weights import WeightsError


@pytest.fixture(scope="module")
def alex():
    return build_perceptual("alex-st")


@pytest.fixture(scope="module")
def picture(footage) -> torch.Tensor:
    """[1, 3, 96, 96] of bikes.mp4, in −1..1."""
    capture = cv2.VideoCapture(str(footage["bikes.mp4"]))
    rgb = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)[40:136, 200:296]
    return torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.fixture(scope="module")
def package():
    """stlpips-pytorch's own class; of IPython and torchsummary it uses nothing that is called here."""
    names = {"IPython": {"embed": None}, "torchsummary": {"summary": None}}
    for name, members in names.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(members)
    yield importlib.import_module("stlpips_pytorch.stlpips").LPIPS
    for name in names:
        del sys.modules[name]


class Nothing(torch.nn.Identity):
    """In place of VGG's classifier, which takes half a minute to make and is not used."""


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_distances_are_those_of_the_package(net, package, picture, monkeypatch):
    vgg = sys.modules["stlpips_pytorch.models_lpf.vgg"]
    monkeypatch.setattr(vgg, "nn", types.SimpleNamespace(**{**vgg.nn.__dict__, "Linear": Nothing}))
    monkeypatch.setattr(vgg.VGG, "_initialize_weights", lambda self: None)
    torch.manual_seed(0)
    other = picture + 0.2 * torch.randn_like(picture)
    pair = torch.cat((picture, -picture)), torch.cat((other, other))
    with torch.no_grad():
        expected = package(net=net, variant="shift_tolerant", verbose=False)(*pair).flatten()
        found = build_perceptual(f"{net}-st")(*pair)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_same_is_at_zero_and_blur_is_worse_than_faint_noise(alex, picture):
    torch.manual_seed(0)
    noisy = picture + 0.02 * torch.randn_like(picture)
    blurred = F.avg_pool2d(picture, 5, 1, 2, count_include_pad=False)
    assert (picture - blurred).square().mean() < 0.05, "not another picture"
    same, noise, blur = (float(alex(picture, other)) for other in (picture, noisy, blurred))
    assert same == 0 and 0 < noise < blur / 2


def test_a_gradient_is_finite_where_no_feature_fires(alex):
    """All features are zero in places: the norm has no slope there."""
    black = torch.full((1, 3, 32, 32), -1.0, requires_grad=True)
    with torch.no_grad():
        features = alex.net["slice1"](torch.full((1, 3, 32, 32), -1.0))
    assert features.ge(0).all()
    alex(black, torch.zeros(1, 3, 32, 32)).backward()
    assert black.grad.isfinite().all() and black.grad.abs().sum() > 0
    dead = torch.zeros(1, 4, 2, 2, requires_grad=True)
    from trainer.models.autoencoders.lpips import _unit

    _unit(dead).sum().backward()
    assert dead.grad.isfinite().all()


def test_videos_are_means_over_the_frames_asked_for(alex, picture):
    torch.manual_seed(0)
    video = picture[:, :, None, :64, :64].expand(2, -1, 3, -1, -1)
    other = video + torch.tensor([0.0, 0.1, 0.3]).view(1, 1, 3, 1, 1) * torch.randn(2, 3, 3, 64, 64)
    with torch.no_grad():
        each = torch.stack([alex(video[:, :, t], other[:, :, t]) for t in range(3)], 1)
        assert each[:, 0].lt(1e-9).all() and each[:, 1].lt(each[:, 2]).all()
        torch.testing.assert_close(alex.of_videos(video, other), each.mean(1))
        chosen = torch.tensor([[0, 2], [1, 2]])
        torch.testing.assert_close(alex.of_videos(video, other, chosen), each.gather(1, chosen).mean(1))


@pytest.mark.parametrize("kind", ["vgg", "alex"])
def test_published_weights_by_their_names(kind, tmp_path, picture):
    """torchvision's network and LPIPS's layers, in two files as they are published; the definition, written out, on
    random ones."""
    import torchvision

    torch.manual_seed(0)
    with torch.device("meta"):
        network = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[kind](weights=None).features
    network = network.to_empty(device="cpu").eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ends = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}[kind]
    channels = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}[kind]
    weights = [torch.rand(1, c, 1, 1) for c in channels]
    classifier = {"classifier.6.bias": torch.zeros(1000)}
    torch.save(
        {f"features.{name}": p for name, p in network.state_dict().items()} | classifier, tmp_path / "network.pth"
    )
    torch.save({f"lin{i}.model.1.weight": w for i, w in enumerate(weights)}, tmp_path / "layers.pth")
    model = build_perceptual(kind, [tmp_path / "network.pth", tmp_path / "layers.pth"])
    a, b = picture[:, :, :64, :64], picture[:, :, 32:, 32:]
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    expected = torch.zeros(1)
    with torch.no_grad():
        x, y = (a - shift) / scale, (b - shift) / scale
        for number, layer in enumerate(network):
            x, y = layer(x), layer(y)
            if number in ends:
                u, v = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
                expected += ((u - v).square() * weights[ends.index(number)]).sum(1).mean()
        torch.testing.assert_close(model(a, b), expected)
    with pytest.raises(WeightsError, match="missing"):
        build_perceptual(kind, [tmp_path / "network.pth"])


def test_what_is_missing_is_told(monkeypatch):
    with pytest.raises(ConfigError, match="vgg needs weights.*vgg-st"):
        build_perceptual("vgg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="uv sync --inexact --extra train"):
        build_perceptual("alex-st")


def test_pictures_may_be_too_small(alex):
    alex(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32))
    with pytest.raises(ValueError, match="at least 32 × 32, not 16 × 64"):
        alex(torch.zeros(1, 3, 16, 64), torch.zeros(1, 3, 16, 64))


def test_psnr_by_hand():
    """A difference of 0.2 of a range of 2 is 0.1 of it: 20 dB; frames are measured apart, equal ones count 100 dB."""
    video = torch.zeros(2, 3, 2, 8, 8)
    other = video.clone()
    other[0] += 0.2
    other[1, :, 0] += 0.02
    torch.testing.assert_close(psnr(video, other), torch.tensor([20.0, (40.0 + LARGEST_PSNR) / 2]), atol=1e-3, rtol=0)
    (
        torch.testing.assert_close(psnr(video + 1, video + 1.5), torch.tensor([LARGEST_PSNR] * 2)),
        "beyond the range is clamped",
    )


def test_ssim_by_hand(picture):
    """Two flat pictures: (2ab + c1) / (a² + b² + c1). Otherwise the definition, window by window."""
    flat = torch.full((1, 3, 1, 16, 16), 0.0), torch.full((1, 3, 1, 16, 16), 0.6)
    a, b, c1, c2 = 0.5, 0.8, 0.01**2, 0.03**2
    torch.testing.assert_close(ssim(*flat), torch.tensor([(2 * a * b + c1) / (a * a + b * b + c1)]), atol=1e-6, rtol=0)
    assert ssim(picture[:, :, None], picture[:, :, None]).item() == pytest.approx(1.0, abs=1e-7)
    torch.manual_seed(0)
    other = (picture + 0.1 * torch.randn_like(picture)).clamp(-1, 1)
    one, two = ((x[0, :, :20, :24].double().numpy() + 1) / 2 for x in (picture, other))
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for c in range(3):
        for y in range(10):
            for x in range(14):
                p, q = one[c, y : y + 11, x : x + 11], two[c, y : y + 11, x : x + 11]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                both = (weights * (p - mp) * (q - mq)).sum()
                found.append((2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(picture[:, :, None, :20, :24], other[:, :, None, :20, :24]).item() == pytest.approx(
        np.mean(found), abs=1e-6
    )
    with pytest.raises(ValueError, match="at least 11 × 11"):
        ssim(torch.zeros(1, 3, 1, 8, 16), torch.zeros(1, 3, 1, 8, 16))


def test_psnr_and_ssim_are_those_of_scikit_image():
    """scikit-image 0.26.0: peak_signal_noise_ratio, and structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False), on the same pictures, of range 1."""
    y, x, c = np.mgrid[0:32, 0:40, 0:3]
    one = (x * 6 + y * 2 + c * 11) % 256
    other = np.clip(one + (x * y * 7 + c * 5) % 41 - 20, 0, 255)
    a, b = (torch.from_numpy(p).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1 for p in (one, other))
    assert psnr(a, b).item() == pytest.approx(26.7602146, abs=1e-4) and ssim(a, b).item() == pytest.approx(
        0.68134784, abs=1e-6
    )
