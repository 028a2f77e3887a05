"""Stage `adapt`: fine-tune the head on a category's normal training images (paper, sections 3.2 to 3.5)."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from panda_ad.adapt.fisher import cached_fisher, load_fisher, source_labels
from panda_ad.adapt.snapshots import pack_snapshots
from panda_ad.adapt.train import Adapted, adapt
from panda_ad.data.images import read_image
from panda_ad.data.listing import image_files
from panda_ad.data.outliers import coarseness, is_gray, outlier_item
from panda_ad.errors import UserError
from panda_ad.features.backbones import Backbone
from panda_ad.features.cache import Activations, Item
from panda_ad.params import Params, load_params
from panda_ad.stages.common import activations_for, backbone_for, category_rows, items_of, threads
from panda_ad.system.files import atomic_folder, write_json
from panda_ad.system.paths import BUILD, CACHE
from panda_ad.system.stage import run_stage


def main(category: str) -> None:
    """Write snapshots.safetensors (differences to the pretrained head, and outlier exposure's classifier), history.csv, adapt.json."""
    import pandas as pd

    params = load_params()
    threads()
    backbone = backbone_for(params)
    activations = activations_for(params, backbone, category)
    rows = category_rows(category)["train"]
    items = items_of(rows, params)
    activations.warm(items)
    outliers = None
    if params.adapt.method == "oe":
        size = (round(rows["height"].median()), round(rows["width"].median()))
        outlier_items = outliers_like(size, is_gray(items[0].read()), params, category)
        activations.warm(outlier_items, label="outliers")
        outliers = activations.view(outlier_items)
    fisher = given_fisher(params, backbone, activations) if params.adapt.method == "ewc" else None
    adapted = adapt(
        backbone,
        activations.view(items),
        params.adapt,
        seed=params.seed,
        outliers=outliers,
        fisher=fisher,
        fisher_cache=CACHE / "fisher",
    )
    trained = [state for state, step in zip(adapted.snapshots, adapted.steps, strict=True) if step > 0]
    tensors = pack_snapshots(backbone.adapted.state_dict(), trained) | {
        f"classifier.{k}": v for k, v in (adapted.classifier or {}).items()
    }
    with atomic_folder(BUILD / "adapt" / category) as folder:
        save_file(tensors, folder / "snapshots.safetensors")
        pd.DataFrame(adapted.history).to_csv(folder / "history.csv", index=False)
        facts = {
            "method": params.adapt.method,
            "steps": adapted.steps or [0],
            "collapsed_at": adapted.collapsed_at,
            "fingerprint": backbone.fingerprint,
        }
        write_json(folder / "adapt.json", {**facts, "provenance": adapted.provenance})
    print(f"{category}: {summary(params.adapt.method, adapted)}")
    if adapted.collapsed_at is not None:
        print(
            f"{category}: features collapsed at step {adapted.collapsed_at} (adapt.on_collapse: {params.adapt.on_collapse})"
        )


def summary(method: str, adapted: Adapted) -> str:
    """One line: method, steps, and what adaptation did to the training images' features ('ses, 9 steps: ...')."""
    if len(adapted.history) < 2:
        return f"{method}, features as pretrained"
    first, last = adapted.history[0], adapted.history[-1]
    moved = (
        f"{key.replace('_', ' ')} {first[key]:.4g} to {last[key]:.4g}" for key in ("center_distance", "effective_rank")
    )
    return f"{method}, {last['step']:.0f} steps: {', '.join(moved)}"


def given_fisher(params: Params, backbone: Backbone, activations: Activations) -> dict[str, Tensor] | None:
    """Fisher diagonal from the file or the labelled source images that `adapt.fisher` names; None: to be estimated from the training images."""
    if params.adapt.fisher is None:
        return None
    source = Path(params.adapt.fisher)
    if not source.is_dir():
        return load_fisher(source, backbone)
    if backbone.fc is None:
        raise UserError(
            "adapt.fisher: these weights hold no classifier to compare labels with; give a saved Fisher file instead"
        )
    files = image_files([source])
    labels = source_labels([file.parent.name for file in files], backbone.fc.out_features, str(source))
    items = folder_items(source, "adapt.fisher")
    activations.warm(items, label="fisher source")
    view = activations.view(items)
    return cached_fisher(
        CACHE / "fisher", backbone, view, labels, samples=params.adapt.fisher_samples, seed=params.seed
    )


def outliers_like(size: tuple[int, int], gray: bool, params: Params, category: str) -> list[Item]:
    """The images of `adapt.outliers` at the resolution of a category's, (height, width) in pixels; says so where they have less."""
    files = folder_files(Path(params.adapt.outliers or ""), "adapt.outliers")
    times = coarseness(files, size, params.backbone.size)
    if times > 1:
        print(
            f"{category}: the images of adapt.outliers are {times:.1f} times coarser than the normal ones ({size[1]} x {size[0]} pixels); "
            "training may tell them apart by sharpness alone, use larger ones",
            file=sys.stderr,
        )
    return [outlier_item(file, size, gray) for file in files]


def folder_items(folder: Path, key: str) -> list[Item]:
    """All images below a folder, in the order of their paths. UserError names the parameter where there is none."""
    return [
        Item(hashlib.sha256(file.read_bytes()).hexdigest(), functools.partial(read_image, file))
        for file in folder_files(folder, key)
    ]


def folder_files(folder: Path, key: str) -> list[Path]:
    """Image files below a folder, sorted. UserError names the parameter where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{key}: no folder {folder}")
    return image_files([folder])


if __name__ == "__main__":
    run_stage("adapt", main)
