"""Pretrained feature extractors (paper, section 3.1), split where PANDA splits them.

The *frozen layers* (stem, layer1, layer2) stay as they are, the *adapted layers* (layer3, layer4) are fine-tuned. Weights come from torchvision's
published files, from a local file, or from the ResNet-18 that ships inside this package (`embedded`).
"""

from __future__ import annotations

import hashlib
import urllib.error
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from panda_ad.errors import UserError
from panda_ad.features.resnet import NAMES, ResNet

EMBEDDED = Path(__file__).parent / "weights" / "resnet18-tiny-imagenet-64px-fp16.safetensors"
MICRO_BATCH = 8
"""Images per forward pass when scoring. Fixed, and padded up to, so that an image's score never depends on its company."""

_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class FrozenLayers(nn.Module):
    """Stem, layer1 and layer2 of a ResNet."""

    def __init__(self, resnet: ResNet):
        super().__init__()
        self.conv1, self.bn1, self.layer1, self.layer2 = resnet.conv1, resnet.bn1, resnet.layer1, resnet.layer2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) float32, normalized -> layer1 (B, C1, H/4, W/4), layer2 (B, C2, H/8, W/8)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), kernel_size=3, stride=2, padding=1)  # (B, 64, H/4, W/4)
        layer1 = self.layer1(x)
        return layer1, self.layer2(layer1)


class AdaptedLayers(nn.Module):
    """layer3 and layer4 of a ResNet, the part that PANDA adapts."""

    def __init__(self, resnet: ResNet):
        super().__init__()
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4

    def maps(self, layer2: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C2, h, w) -> layer3 (B, C3, h/2, w/2), layer4 (B, D, h/4, w/4)."""
        layer3 = self.layer3(layer2)
        return layer3, self.layer4(layer3)

    def forward(self, layer2: Tensor) -> Tensor:
        """(B, C2, h, w) -> pooled features (B, D)."""
        return self.maps(layer2)[1].mean(dim=(2, 3))


class Backbone(nn.Module):
    """A ResNet as frozen layers, head and classifier, in eval mode, all parameters frozen.

    Attributes
    ----------
    name : str
        torchvision's name of the architecture.
    fc : nn.Linear or None
        The pretrained classifier on pooled features; None where the weights hold none. Only the Fisher estimate uses it.
    fingerprint : str
        sha256 over every tensor but the classifier, hex; equal weights have equal fingerprints whatever file they came from.
    """

    def __init__(self, name: str, state: dict[str, Tensor]):
        """Build from torchvision's state dict (any float dtype). Raises ValueError where it does not fit `name`."""
        super().__init__()
        if name not in NAMES:
            raise ValueError(f"unknown architecture {name!r}")
        state = {k: v.to(torch.float32, copy=True) for k, v in state.items() if not k.endswith("num_batches_tracked")}
        classes = state["fc.weight"].shape[0] if "fc.weight" in state else 0
        with torch.device("meta"):
            net = ResNet(name, classes or 1)
        counters = {k for k in net.state_dict() if k.endswith("num_batches_tracked")}
        expected = net.state_dict().keys() - counters
        if not classes:
            expected -= {"fc.weight", "fc.bias"}
        if set(state) != expected:
            odd = sorted(expected - set(state)) or sorted(set(state) - expected)
            raise ValueError(
                f"not the weights of a {name}: {odd[0]} is {'missing' if expected - set(state) else 'unexpected'}"
            )
        try:
            net.load_state_dict({**state, **{k: torch.tensor(0) for k in counters}}, strict=False, assign=True)
        except RuntimeError as e:
            raise ValueError(f"not the weights of a {name}: {str(e).splitlines()[1].strip()}") from None
        self.name = name
        self.frozen, self.adapted = FrozenLayers(net), AdaptedLayers(net)
        self.fc = net.fc if classes else None
        self.fingerprint = fingerprint({k: v for k, v in state.items() if not k.startswith("fc.")})
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def tensors(self) -> dict[str, Tensor]:
        """torchvision's state dict without the classifier, contiguous float32: what a bundle stores."""
        parts = {**self.frozen.state_dict(), **self.adapted.state_dict()}
        return {k: v.contiguous() for k, v in parts.items() if not k.endswith("num_batches_tracked")}


def fingerprint(state: dict[str, Tensor]) -> str:
    """sha256 (hex) over names, shapes and float32 values of the tensors."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().float().contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def load_backbone(name: str, weights: str = "DEFAULT") -> Backbone:
    """Load a backbone by parameters `backbone.name` and `backbone.weights`.

    Parameters
    ----------
    name : `embedded`, or torchvision's name of a ResNet.
    weights : a name of torchvision's weight enum (`DEFAULT`, `IMAGENET1K_V1`, ...), or a path to `.safetensors`, `.pth`, `.pt`.

    Raises
    ------
    UserError
        Weights cannot be had or do not fit; names the file expected and the alternatives.
    """
    path = Path(weights)
    if path.suffix in (".safetensors", ".pth", ".pt"):
        architecture = "resnet18" if name == "embedded" else name
        try:
            if path.suffix == ".safetensors":
                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
                state = state.get("state_dict", state)
            return Backbone(architecture, state)
        except FileNotFoundError:
            raise UserError(
                f"backbone.weights: no file {path}; give a path to .safetensors or .pth, or use backbone.name: embedded"
            ) from None
        except (ValueError, SafetensorError, RuntimeError, EOFError, AttributeError, OSError) as e:
            raise UserError(f"backbone.weights: {path} cannot be used: {' '.join(str(e).split())[:200]}") from None
        except Exception as e:  # torch.load raises pickle's own errors on a file that is not a checkpoint
            raise UserError(
                f"backbone.weights: {path} is not a plain state dict ({type(e).__name__}); save one with torch.save(model.state_dict(), path)"
            ) from None
    if name == "embedded":
        if weights != "DEFAULT":
            raise UserError(
                f"backbone.weights: the embedded backbone has one set of weights, DEFAULT, not {weights}; set backbone.name: resnet18 for torchvision's"
            )
        return Backbone("resnet18", load_file(EMBEDDED))
    return Backbone(name, _published(name, weights))


def _published(name: str, weights: str) -> dict[str, Tensor]:
    """torchvision's published weights: downloaded, or found under TORCH_HOME."""
    from torchvision.models import get_model_weights

    members = get_model_weights(name).__members__
    if weights not in members:
        raise UserError(f"backbone.weights: {name} has no weights {weights!r}; torchvision has {', '.join(members)}")
    entry = members[weights]
    url: str = entry.value.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        return dict(entry.get_state_dict(progress=True, check_hash=True))
    except (urllib.error.URLError, OSError, RuntimeError, EOFError) as e:
        raise UserError(
            f"backbone: weights {name} {weights} cannot be had ({' '.join(str(e).split())[:120]}): put {file.name} at {file} "
            f"(TORCH_HOME moves that folder), or set backbone.name: embedded, which needs no download"
        ) from None


def preprocess(rgb: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resize (bilinear, antialiased, the whole image: nothing is cropped away) and normalize with ImageNet's statistics.

    Parameters
    ----------
    rgb : uint8 (H, W, 3), any size.
    size : network input (height, width), pixels.

    Returns
    -------
    float32 (3, height, width).
    """
    x = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None]
    if x.shape[2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    return (x[0].float() / 255 - _MEAN) / _STD


def resolve_precision(precision: str) -> torch.dtype:
    """`auto` is bfloat16 where the CPU computes in it (AVX512-BF16 or AMX), else float32."""
    if precision == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


@torch.inference_mode()
def in_micro_batches(function, x: Tensor) -> tuple[Tensor, ...]:
    """Apply `function` to `x` (N, ...) in passes of exactly MICRO_BATCH rows (the last padded with zeros), and concatenate.

    A convolution's kernel, and with it the last bits of its result, depends on the batch size; a fixed one makes the
    result for an image the same alone and in any batch.
    """
    parts = []
    for i in range(0, len(x), MICRO_BATCH):
        chunk = x[i : i + MICRO_BATCH]
        n = len(chunk)
        if n < MICRO_BATCH:
            chunk = torch.cat([chunk, chunk.new_zeros(MICRO_BATCH - n, *chunk.shape[1:])])
        out = function(chunk.contiguous(memory_format=torch.channels_last))
        parts.append([o[:n] for o in (out if isinstance(out, tuple) else (out,))])
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def frozen_activations(backbone: Backbone, x: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """FrozenLayers activations in the form everything downstream uses: rounded to float16, cached or not.

    Parameters
    ----------
    x : float32 (N, 3, H, W), preprocessed.
    precision : torch.float32 or torch.bfloat16, of the computation.

    Returns
    -------
    layer1 (N, C1, H/4, W/4) and layer2 (N, C2, H/8, W/8), float16.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        layer1, layer2 = in_micro_batches(backbone.frozen, x)
    limit = torch.finfo(torch.float16).max
    return layer1.clamp(max=limit).half(), layer2.clamp(max=limit).half()
