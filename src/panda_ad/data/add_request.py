# SPDX-License-Identifier: Apache-2.0
"""What somebody wants to add to the data set, and the folders of its layout where that goes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from panda_ad.data import torchvision_sets
from panda_ad.data.layouts import category_folder
from panda_ad.data.listing import same_name
from panda_ad.errors import UserError
from panda_ad.params import Params

Label = Literal["good", "defect"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Request:
    """What is to be added.

    Attributes
    ----------
    category : one of the parameters'.
    paths : files, or folders of images (searched recursively; files that are no images are passed over).
    label : what the files are said to show. Defects go to test, never to train.
    kind : of defect, default 'defect'.
        For good images of a category with several normal classes (layout `folders`) it is the class.
    split : of good images, default train.
    masks : folder with a mask for each image, <stem>_mask.* or <stem>.*; None: no masks.
        Images of the set without a mask get theirs.
    session : the folder that they go to inside the folder of images, where `data.sessions` goes by folders; None: none.
    """

    category: str
    paths: tuple[Path, ...]
    label: Label = "good"
    kind: str | None = None
    split: Split | None = None
    masks: Path | None = None
    session: str | None = None


@dataclass(frozen=True)
class Target:
    """Folders, relative to the data's root, that images and masks of one kind go to."""

    images: str
    masks: str
    label: int


def refuse_kind(kind: str, option: str = "--kind") -> None:
    """Raise UserError where a kind of defect, or a session, cannot be a folder's name."""
    if not kind.strip() or kind.startswith(".") or not kind.isprintable() or set(kind) & set('/\\:*?"<>|'):
        raise UserError(f"{option}: {kind!r} cannot be a folder's name; use letters, digits, - and _")


def target_of(params: Params, request: Request) -> Target:
    """Find out where images of a request go. UserError where it makes no sense."""
    category, kind = request.category, request.kind
    layout = params.data.layout
    if layout in torchvision_sets.SETS:
        raise UserError(
            f"data.layout: {layout} is a published set, which nothing is added to; ingest is for mvtec and folders"
        )
    if layout not in ("mvtec", "folders"):
        raise UserError(f"data.layout: ingest is for mvtec and folders, and does not know where {layout} keeps images")
    if category not in params.categories:
        raise UserError(
            f"--category: {category!r} is not one of categories in params.yaml "
            f"({', '.join(params.categories)}); add it there first"
        )
    if kind is not None:
        refuse_kind(kind)
    if request.session is not None:
        refuse_kind(request.session, "--session")
        if params.data.sessions != "folder":
            raise UserError("--session: params.yaml tells sessions otherwise; set data.sessions: folder")
    root = Path(params.data.root)
    folder = category_folder(root, category).name if layout == "mvtec" else category
    target = (_defect_target if request.label == "defect" else _good_target)(params, request, folder)
    return target if request.session is None else replace(target, images=f"{target.images}/{request.session}")


def _defect_target(params: Params, request: Request, folder: str) -> Target:
    category, mvtec = request.category, params.data.layout == "mvtec"
    if request.split == "train":
        raise UserError("--split train: training images are all good ones; defects go to test")
    kind = request.kind or "defect"
    normal = ["good"] if mvtec else params.data.normal_classes.get(category, [category])
    if any(same_name(kind, name) or (mvtec and kind.casefold() == name) for name in normal):
        raise UserError(f"--kind: {kind!r} is where good images of {category} are; name the kind of defect")
    if mvtec:
        return Target(f"{folder}/test/{kind}", f"{folder}/ground_truth/{kind}", 1)
    if request.masks is not None:
        raise UserError("--masks: data.layout folders has no masks; use mvtec")
    return Target(f"test/{kind}", f"test/{kind}", 1)


def _good_target(params: Params, request: Request, folder: str) -> Target:
    category, kind, split = request.category, request.kind, request.split or "train"
    if request.masks is not None:
        raise UserError("--masks: good images have none; add --label defect")
    if params.data.layout == "mvtec":
        if kind not in (None, "good"):
            raise UserError(f"--kind {kind}: good images have no kind; add --label defect")
        return Target(f"{folder}/{split}/good", f"{folder}/{split}/good", 0)
    classes = params.data.normal_classes.get(category, [category])
    if kind is None and len(classes) > 1 or kind is not None and kind not in classes:
        raise UserError(
            f"--kind: name the normal class of {category} that the images show, one of {', '.join(classes)}"
        )
    path = f"{split}/{kind or classes[0]}"
    return Target(path, path, 0)
