# SPDX-License-Identifier: Apache-2.0
"""Diagonal of the Fisher information of the pretrained classifier, what EWC weighs parameters by (paper, section 3.2).

F_i = E_x E_y [(d log p(y | x) / d theta_i)^2] over the adapted layers' parameters theta.
With labeled source images y is their label (the 'empirical' Fisher, as the authors').
Without labels y is drawn from the classifier's own p(y | x), as the definition has it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from panda_ad.adapt.batches import load_batch
from panda_ad.adapt.ewc import check_fisher
from panda_ad.errors import UserError
from panda_ad.features.backbones import EMBEDDED, Backbone
from panda_ad.system.files import atomic_file

SOURCE_CLASSES = EMBEDDED.with_name("tiny_imagenet_wnids.txt")
"""The embedded classifier's classes in the order of its outputs."""


def chosen_rows(n: int, samples: int, seed: int) -> np.ndarray:
    """Return the ascending row numbers of the images the estimate uses: all, or a seeded choice of `samples`."""
    if n <= samples:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, samples, replace=False))


def estimate_fisher(
    backbone: Backbone,
    activations: Any,
    labels: np.ndarray | None = None,
    *,
    samples: int,
    seed: int,
) -> dict[str, Tensor]:
    """Estimate the mean over images of the squared gradient of one image's log-likelihood.

    One image at a time: a batch's gradient squared is not the sum of squares.
    Per-sample gradients by `torch.func.vmap` took 4 to 8 times as long on a CPU, since the parameters'
    traffic is the cost.

    Parameters
    ----------
    activations : array-like of float16 (N, C, h, w), frozen activations.
    labels : (N,) class numbers of the classifier, or None to draw them from its predictions.
    samples : most images used.

    Returns
    -------
    parameter name -> float32, of the parameter's shape, >= 0.

    Raises
    ------
    UserError
        The backbone has no classifier.
    """
    if backbone.classifier is None:
        raise UserError(
            "adapt.method ewc: the weights hold no classifier to estimate the Fisher diagonal with; "
            "set adapt.fisher to a saved file, or use ses"
        )
    layers = copy.deepcopy(backbone.adapted).eval().requires_grad_(True)
    device = next(layers.parameters()).device
    classifier = copy.deepcopy(backbone.classifier).to(device)
    names, parameters = zip(*layers.named_parameters(), strict=True)
    sums = [torch.zeros_like(p) for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    rows = chosen_rows(len(activations), samples, seed)
    for row in tqdm(rows, desc="Fisher", unit="img", disable=None):
        maps = layers.maps(load_batch(activations, np.array([row]), device))  # the last: (1, C, h, w)
        log_p = nn.functional.log_softmax(classifier(maps[-1]), dim=1)[0]  # (classes,)
        if labels is None:
            label = int(torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator))
        else:
            label = int(labels[row])
        gradients = torch.autograd.grad(log_p[label], parameters)
        torch._foreach_addcmul_(sums, gradients, gradients)
    return {name: (s / len(rows)).cpu().contiguous() for name, s in zip(names, sums, strict=True)}


def cached_fisher(
    folder: Path | None,
    backbone: Backbone,
    activations: Any,
    labels: np.ndarray | None = None,
    *,
    samples: int,
    seed: int,
) -> dict[str, Tensor]:
    """Return `estimate_fisher`'s result, kept in `folder`, if any.

    The file's name is made from everything the result depends on: weights, activations, labels, seed.
    """
    if backbone.classifier is None or folder is None:
        return estimate_fisher(backbone, activations, labels, samples=samples, seed=seed)
    rows = chosen_rows(len(activations), samples, seed)
    digest = hashlib.sha256(f"1 {backbone.fingerprint} {seed} {labels is None} {len(rows)}".encode())
    for tensor in backbone.classifier.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for i in range(0, len(rows), 64):
        digest.update(np.ascontiguousarray(activations[rows[i : i + 64]]).tobytes())
    if labels is not None:
        digest.update(np.asarray(labels)[rows].astype(np.int64).tobytes())
    path = folder / f"fisher-{digest.hexdigest()[:32]}.safetensors"
    if path.exists():
        try:
            return load_fisher(path, backbone)
        except UserError:  # damaged: estimated again below
            path.unlink()
    fisher = estimate_fisher(backbone, activations, labels, samples=samples, seed=seed)
    save_fisher(path, fisher)
    return fisher


def save_fisher(path: Path, fisher: Mapping[str, Tensor]) -> None:
    """Write a `.safetensors` file, parameter name -> float32."""
    with atomic_file(path) as temporary:
        save_file({k: v.float().contiguous() for k, v in fisher.items()}, temporary)


def load_fisher(path: Path | str, backbone: Backbone) -> dict[str, Tensor]:
    """Read a Fisher diagonal for this backbone's adapted layers.

    Parameters
    ----------
    path : `.safetensors` as `save_fisher` writes, or the authors' `fisher_diagonal.pth` (ResNet-152).
        The latter is a torch-saved mapping from the whole network's parameter names, or a list in their order.
        Entries of other layers are dropped.

    Raises
    ------
    UserError
        The file is missing, is none of these, or belongs to another backbone.
    """
    path = Path(path)
    source = f"adapt.fisher: {path}"
    try:
        raw = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except FileNotFoundError:
        raise UserError(
            f"{source}: no such file; give a saved Fisher file or a folder of labeled source images, or null"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as e:
        raise UserError(f"{source}: cannot be read ({' '.join(str(e).split())[:120]})") from None
    except Exception as e:  # torch.load raises pickle's own errors on a file that is not a checkpoint
        raise UserError(f"{source}: not a file of plain tensors ({type(e).__name__})") from None
    names = [name for name, _ in backbone.adapted.named_parameters()]
    if isinstance(raw, Sequence):
        frozen = len(list(backbone.frozen.parameters()))
        whole = {
            len(names): 0,
            frozen + len(names): frozen,
            frozen + len(names) + 2: frozen,
        }  # adapted layers; without fc; with fc
        if len(raw) not in whole:
            raise UserError(
                f"{source}: holds {len(raw)} tensors, "
                f"a {backbone.name} has {frozen + len(names)} without its classifier"
            )
        raw = dict(zip(names, raw[whole[len(raw)] :][: len(names)], strict=True))
    if not isinstance(raw, Mapping):
        raise UserError(f"{source}: a mapping of parameter names to tensors is expected, found {type(raw).__name__}")
    fisher = {str(k).removeprefix("module."): v.detach().float() for k, v in raw.items() if isinstance(v, Tensor)}
    check_fisher(fisher, backbone.adapted, source)
    return {name: fisher[name] for name in names}


def source_labels(folders: Sequence[str], backbone: Backbone, where: str) -> np.ndarray:
    """Return class numbers of labeled source images from the names of their folders.

    Parameters
    ----------
    folders : (N,) name of the folder each image lies in.
    backbone : whose classifier's classes are meant.
    where : the folder of these folders, for messages.

    Returns
    -------
    (N,) int64. The embedded classifier's classes are known by WordNet id, and some of them suffice.
    For other classifiers there must be as many folders as outputs, numbered in sorted order (torchvision's ImageFolder
    convention, that of ImageNet weights).

    Raises
    ------
    UserError
        The backbone has no classifier, or the folders do not correspond to its classes.
    """
    if backbone.fc is None:
        raise UserError(
            "adapt.fisher: these weights hold no classifier to compare labels with; give a saved Fisher file instead"
        )
    outputs = backbone.fc.out_features
    known = SOURCE_CLASSES.read_text().split()
    found = sorted(set(folders))
    if outputs == len(known) and found and set(found) <= set(known):
        order = known
    elif len(found) == outputs:
        order = found
    else:
        raise UserError(
            f"adapt.fisher: {where} has {len(found)} class folders, the backbone's classifier has {outputs} classes; "
            "give one folder per class, or null"
        )
    number = {name: i for i, name in enumerate(order)}
    return np.array([number[name] for name in folders], dtype=np.int64)
