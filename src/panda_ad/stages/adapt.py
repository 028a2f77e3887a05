"""Stage `adapt`: fine-tune the head on a category's normal training images (paper, sections 3.2 to 3.4)."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from panda_ad.adapt import adapt
from panda_ad.adapt.snapshots import pack_snapshots
from panda_ad.files import atomic_folder, write_json
from panda_ad.params import load_params
from panda_ad.stages.common import BUILD, activations_for, backbone_for, category_rows, items_of, run_stage, threads


def main(category: str) -> None:
    """Write snapshots.safetensors (differences to the pretrained head, and outlier exposure's classifier), history.csv, adapt.json."""
    import pandas as pd

    params = load_params()
    threads()
    backbone = backbone_for(params)
    activations = activations_for(params, backbone)
    items = items_of(category_rows(category)["train"], params)
    activations.warm(items)
    outliers = None
    if params.adapt.method == "oe":
        outlier_items = folder_items(Path(params.adapt.outliers or ""), "adapt.outliers")
        activations.warm(outlier_items, label="outliers")
        outliers = activations.view(outlier_items)
    adapted = adapt(
        backbone, activations.view(items), params.adapt, seed=params.seed, outliers=outliers, fisher=fisher_for(params, backbone, activations)
    )
    steps = adapted.steps
    tensors = pack_snapshots(backbone.head.state_dict(), [s for s, step in zip(adapted.snapshots, steps, strict=True) if step > 0])
    with atomic_folder(BUILD / "adapt" / category) as folder:
        classifier = {f"classifier.{k}": v for k, v in (adapted.classifier or {}).items()}
        save_file({**tensors, **classifier}, folder / "snapshots.safetensors")
        pd.DataFrame(adapted.history).to_csv(folder / "history.csv", index=False)
        facts = {"method": params.adapt.method, "steps": steps, "collapsed_at": adapted.collapsed_at, "provenance": adapted.provenance}
        write_json(folder / "adapt.json", facts)
    if adapted.collapsed_at is not None:
        print(f"features collapsed at step {adapted.collapsed_at} (adapt.on_collapse: {params.adapt.on_collapse})")


if __name__ == "__main__":
    run_stage("adapt", main)
