# SPDX-License-Identifier: Apache-2.0
"""`panda-ad ingest`: new images into the data set, and the new set into DVC."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from panda_ad.commands.run import dvc_meanwhile, fetch_images
from panda_ad.data.add_images import Additions, add_images
from panda_ad.data.add_request import Request
from panda_ad.data.links import refuse_links
from panda_ad.data.remove_images import remove_images
from panda_ad.errors import UserError
from panda_ad.params_file import load_params
from panda_ad.system.files import digest_if_readable
from panda_ad.system.lock import repository_lock

_SHOWN = 20
_SUSPECTS = 5
_CHANCE = 0.25
"""So many alarms or more on good images are a warning where they are less likely than this."""


def ingest(request: Request, check: bool = True) -> None:
    """Add images, record the new version with DVC, say what happened.

    With `check`, images labeled good are scored with build/bundle/<category> if that is there, and those that it calls
    defect are named: a batch with the wrong label spoils every model trained on it.

    Raises
    ------
    UserError
        As `add_images` does; the data set is not here in full; or DVC fails. In the last case the images are in place,
        and running again records them.
    Busy
        Another run is at work.
    """
    _ingest(request.category, [request], check)


def ingest_decided(category: str, check: bool = True) -> None:
    """Add the images that people decided on the inspector's page: good ones to train, defects to test by kind.

    Those that the set holds already are passed over, so that it may be done again and again.

    Raises
    ------
    UserError
        Nothing was decided, none of its images can be read any more, or as `ingest`.
    """
    from panda_ad.inspect.decisions import open_decisions

    groups: dict[tuple[str, str], list[Path]] = {}
    gone: list[str] = []
    decided = [d for d in open_decisions().standing(category).values() if d.label in ("good", "defect")]
    for decision in sorted(decided, key=lambda d: d.id):
        if digest_if_readable(Path(decision.path)) == decision.sha256:
            groups.setdefault((decision.label, decision.kind), []).append(Path(decision.path))
        else:
            gone.append(decision.path)
    if gone:
        more = f" and {len(gone) - _SUSPECTS} more" if len(gone) > _SUSPECTS else ""
        named = ", ".join(gone[:_SUSPECTS]) + more
        print(f"panda-ad: warning: decided, but gone or replaced since: {named}", file=sys.stderr)
    if not groups:
        raise UserError(f"--decided: no image of {category} was decided good or defect and is still there")
    requests = [
        Request(category, tuple(paths), "good" if label == "good" else "defect", kind or None)
        for (label, kind), paths in sorted(groups.items())
    ]
    _ingest(category, requests, check)


def ingest_remove(category: str, images: Sequence[str], reason: str = "") -> None:
    """Take training images that turned out to be bad out of the data set, and record its new version with DVC.

    Raises
    ------
    UserError
        A name is not that of one training image, the data set is not here in full, or DVC fails.
    """
    params = load_params()
    with repository_lock("panda-ad ingest"):
        root = Path(params.data.root)
        tracked = _tracked(root)
        _complete(tracked)
        before = _version(tracked)
        gone = remove_images(params, category, images, reason)
        unversioned = _unversioned(root)
        with nullcontext() if unversioned else dvc_meanwhile("add", "--quiet", str(tracked.with_suffix(""))):
            pass
    print("\n".join(f"{category}: {path} taken out, a copy is in quarantine/" for path in gone))
    print(unversioned or f"data: {before or 'none'} -> {_version(tracked)} ({tracked})")
    print("next: dvc repro")


def _ingest(category: str, requests: Sequence[Request], check: bool) -> None:
    params = load_params()
    with repository_lock("panda-ad ingest"):
        root = Path(params.data.root)
        if root.is_dir():
            refuse_links(root)
        tracked = _tracked(root)
        _complete(tracked)
        before = _version(tracked)
        results = [add_images(params, request) for request in requests]
        good = [
            path for r, found in zip(requests, results, strict=True) if r.label == "good" for _, path in found.added
        ]
        unversioned = _unversioned(root)
        with nullcontext() if unversioned else dvc_meanwhile("add", "--quiet", str(tracked.with_suffix(""))):
            opinion, doubtful = _opinion(root, category, good) if check and good else ("", False)
    for found in results:
        print(_summary(found, category, root))
    after = _version(tracked)
    if unversioned:
        print(unversioned)
    elif after == before:
        print(f"data: {after} as before ({tracked})")
    else:
        print(f"data: {before or 'none'} -> {after} ({tracked})")
    if opinion:
        print(f"panda-ad: warning: {opinion}" if doubtful else opinion, file=sys.stderr if doubtful else sys.stdout)
    if any(found.added for found in results):
        keep = (
            ""
            if unversioned
            else f"   (git commit {tracked} keeps this version; dvc push {tracked} sends its images to the remote)"
        )
        print(f"next: dvc repro{keep}")


def _tracked(root: Path) -> Path:
    """Return the .dvc file that versions the root, or would."""
    candidates = [Path(f"{folder}.dvc") for folder in (root, *root.parents) if folder.name]
    return next((f for f in candidates if f.is_file()), candidates[0] if candidates else Path("data.dvc"))


def _output(tracked: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(tracked.read_text(encoding="utf-8"))["outs"][0])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, IndexError, yaml.YAMLError):
        raise UserError(
            f"{tracked}: not a file that DVC wrote; `git checkout {tracked}` brings back the last one"
        ) from None


def _version(tracked: Path) -> str:
    """Return DVC's hash of the data, '' if it has none."""
    return str(_output(tracked).get("md5", "")).removesuffix(".dir")


def _complete(tracked: Path) -> None:
    """Fetch a versioned set that is not here, and refuse one that is here in part: recording it would drop the rest."""
    recorded = _output(tracked).get("nfiles", 0)
    folder = tracked.with_suffix("")
    if recorded and not folder.exists():
        fetch_images(str(tracked))
    here = sum(len(files) for _, _, files in os.walk(folder))
    if here < recorded:
        raise UserError(
            f"{folder}: holds {here} files, its recorded version {recorded}; "
            f"`dvc checkout {tracked}` brings them back, `dvc add {folder}` records that they are gone"
        )


def _unversioned(root: Path) -> str:
    """'' or why DVC cannot record the set."""
    if not Path(".dvc").is_dir():
        return "data: not versioned, this folder is no DVC repository (dvc init)"
    if not root.resolve().is_relative_to(Path.cwd().resolve()):
        return f"data: not versioned, {root} lies outside this repository"
    if not root.is_dir():
        return f"data: no folder {root}"
    return ""


def _summary(found: Additions, category: str, root: Path) -> str:
    where, there, refused = root / found.folder, len(found.duplicates), len(found.refused)
    counts = f"{category}: {len(found.added)} added to {where}, {there} already there, {refused} quarantined"
    copies = [f"in {_near(found.quarantine)}, with reasons.csv"] if found.quarantine else []
    copies += [f"{found.quarantined_before} of them before"] if found.quarantined_before else []
    lines = [counts + (f" ({'; '.join(copies)})" if copies else "")]
    for title, files in (
        ("already there", [(f, f"as {twin}") for f, twin in found.duplicates]),
        ("quarantined", found.refused),
        ("added, but may be damaged", found.doubtful),
    ):
        lines += [f"  {title}: {' '.join(f'{file}: {what}'.split())}" for file, what in files[:_SHOWN]]
        if len(files) > _SHOWN:
            lines.append(f"  {title}: and {len(files) - _SHOWN} more")
    if found.passed_over:
        lines.append(f"  passed over, no images: {found.passed_over}")
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _near(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _opinion(root: Path, category: str, added: list[str]) -> tuple[str, bool]:
    """Return what the present model says to new 'good' images, in a line, and whether that is a warning.

    The line names those that it calls defect.

    As many alarms as the false-alarm rate makes on good images by chance are no warning.
    """
    bundle = Path("build/bundle") / category
    if not (bundle / "bundle.json").is_file():
        return f"no model in {bundle} yet: that the new images are good is taken on trust", False
    from scipy.stats import binom

    from panda_ad.commands.score import verdicts
    from panda_ad.scoring.bundle import load_bundle

    try:
        detector = load_bundle(bundle)
        judged = verdicts(detector, [root / path for path in added])
        found = [(j.file, j.verdict) for j in judged if j.verdict is not None and j.verdict.anomalous]
    except UserError as e:
        return f"the new images could not be compared with the present model: {e}", True
    if not found:
        return f"{bundle} calls all new images good", False
    found.sort(key=lambda pair: -pair[1].score)
    more = f" and {len(found) - _SUSPECTS} more" if len(found) > _SUSPECTS else ""
    names = ", ".join(str(f) for f, _ in found[:_SUSPECTS]) + more
    expected = detector.threshold().expected
    said = (
        f"of {len(added)} new images labeled good {bundle} calls {len(found)} defect "
        f"(about {expected * len(added):.0f} are to be expected by its false-alarm rate): {names}"
    )
    if binom.sf(len(found) - 1, len(added), expected) > _CHANCE:
        return said, False
    return f"{said}. Look at them before you train", True
