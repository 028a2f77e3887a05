# SPDX-License-Identifier: Apache-2.0
"""A run with changed parameters: in a temporary copy of the checkout, which itself stays as it is."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from panda_ad.errors import UserError
from panda_ad.params_file import load_params, parse_params, read_yaml
from panda_ad.system.paths import BUILD

PARAMS = "params.yaml"
COPIES = Path(".dvc/tmp/panda")
"""Where the copies lie.

Git and DVC ignore it, and `registry.connection.root` takes what lies below `.dvc` for a copy.
"""


@contextlib.contextmanager
def changed_copy(changes: Sequence[str]) -> Iterator[None]:
    """Work in a temporary copy of the repository in the working directory, whose params.yaml has `changes`.

    The copy begins as the checkout is now: the files that git knows and new ones, edited or not, and the results that
    dvc.lock names. Images are links: into DVC's cache, or to the checkout's files if DVC does not track them. What else
    git ignores and no stage makes is one and the same in both: `.cache` with the activations and the lock, weights,
    folders of outliers. Results go into the checkout's DVC cache.

    The repository's lock has to be held: copies that killed runs left are removed here.

    Parameters
    ----------
    changes
        'adapt.method=ewc', as for `dvc exp run -S` and applied by DVC's code for it, so comments stay.

    Raises
    ------
    UserError
        A change names no key or touches the gate, the parameters it makes are not valid, or the checkout cannot be
        copied.
    """
    from dvc.exceptions import DvcException

    root = Path.cwd()
    if not Path(".dvc").is_dir():
        raise UserError(f"{root}: no DVC repository; run from the folder that holds .dvc")
    shutil.rmtree(COPIES, ignore_errors=True)
    COPIES.mkdir(parents=True)
    scratch = Path(tempfile.mkdtemp(dir=root / COPIES))
    try:
        try:
            copy = _copy_files(root, scratch / "copy")
            _apply(changes, copy / PARAMS)
            _fetch_results(root, copy)
        except DvcException as e:
            raise UserError(f"DVC: {' '.join(str(e).split())}") from None
        with contextlib.chdir(copy):
            yield
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def has_commit(folder: Path) -> bool:
    """Return whether the folder is in a git repository with a commit."""
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


def _copy_files(root: Path, clone: Path) -> Path:
    """Make a git repository with the checkout's commit and files; return the folder in it that corresponds to `root`.

    Where the checkout has no commit the repository has none either: DVC's experiments need one, the pipeline does not.
    """
    if has_commit(root):
        top, variables = Path(_git("rev-parse", "--show-toplevel", cwd=root).rstrip("\n")), {}
        _git("clone", "--quiet", "--shared", "--no-checkout", str(top), str(clone), cwd=root)
        _git("reset", "--quiet", cwd=clone)  # git knows the commit's files; those of the checkout take their place
    else:
        top, variables = root, {"GIT_DIR": str(clone / ".git"), "GIT_WORK_TREE": str(root)}
        _git("init", "--quiet", str(clone), cwd=root)

    images = root / load_params(root / PARAMS).data.root

    def place(how: Callable[[Path, Path], object], name: PurePath) -> None:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        how(top / name, clone / name)

    for name in _listed(top, variables, "--cached"):
        if (top / name).is_file() and ".dvc" not in name.parts[:-2]:  # .dvc/config, but nothing of .dvc/tmp
            image = (top / name).is_relative_to(images) and not name.name.endswith((".dvc", ".gitignore"))
            place(_link if image else shutil.copy2, name)
    made = [root / ".dvc", root / BUILD, *_outputs(root)]
    for name in _listed(top, variables, "--ignored", "--directory"):
        if not any(path.is_relative_to(top / name) or (top / name).is_relative_to(path) for path in made):
            # `data.links` refuses a link to the folder of images
            place(_link_files if images.is_relative_to(top / name) else os.symlink, name)
    own = root.relative_to(top)
    if (root / ".dvc/config.local").exists():
        place(shutil.copy2, own / ".dvc/config.local")
    if (root / BUILD / "timings").is_dir():  # of stages that will not run again: publish logs them
        place(shutil.copytree, own / BUILD / "timings")
    return clone / own


def _link(source: Path | str, target: Path | str) -> None:
    """Make `target` a hard link to a file that nothing writes to, a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _link_files(source: Path, target: Path) -> None:
    """Make a folder whose files are hard links."""
    shutil.copytree(source, target, symlinks=True, copy_function=_link)


def _listed(top: Path, variables: Mapping[str, str], *which: str) -> list[PurePath]:
    """Return files that git does not know, and those that `which` adds or selects, relative to `top`."""
    names = _git("ls-files", "-z", "--others", "--exclude-standard", *which, cwd=top, variables=variables)
    return [PurePath(name) for name in names.split("\0") if name]


def _git(*arguments: str, cwd: Path, variables: Mapping[str, str] | None = None) -> str:
    """Return the output of a git command; UserError if it fails."""
    environment = {**os.environ, **(variables or {})}
    try:
        done = subprocess.run(["git", *arguments], cwd=cwd, env=environment, capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError("git is not installed; a run with changed parameters works in a copy that git makes") from None
    if done.returncode:
        raise UserError(f"git {arguments[0]}: {(os.fsdecode(done.stderr).strip().splitlines() or ['failed'])[-1]}")
    return os.fsdecode(done.stdout)


def _outputs(root: Path) -> list[Path]:
    """Return the paths that DVC tracks and that stages make."""
    from dvc.repo import Repo

    with Repo(root) as repo:
        return [Path(out.fs_path) for out in repo.index.outs]


def _fetch_results(root: Path, copy: Path) -> None:
    """Give the copy the checkout's DVC cache, its data as they are now, and the results that dvc.lock names.

    Data come as links, since nothing writes to them. Those that were edited by hand since `dvc add` come as copies,
    since DVC will add them.
    """
    from dvc.repo import Repo

    with Repo(root) as checkout:
        cache = os.path.abspath(checkout.cache.local_cache_dir)
        edited = {out.fs_path for out in checkout.index.outs if out.stage.is_data_source and out.status()}
    with Repo(copy) as repo, repo.config.edit("local") as config:
        config.setdefault("cache", {})["dir"] = cache
        notes = copy / ".dvc/tmp/site"  # DVC keeps them under /var/tmp else, and for ever
        config.setdefault("core", {})["site_cache_dir"] = str(notes)
    links = ["reflink", "hardlink", "symlink", "copy"]
    with Repo(copy, config={"cache": {"type": links}}) as repo:
        data = [out for out in repo.index.outs if out.stage.is_data_source]
        if data:
            repo.checkout([out.stage.addressing for out in data], allow_missing=True)
    for target in (Path(out.fs_path) for out in data):
        source = root / target.relative_to(copy)
        if source.exists() and (str(source) in edited or not target.exists()):
            shutil.rmtree(target, ignore_errors=True)  # not written over: a link's other end is in the cache
            target.unlink(missing_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    with Repo(copy) as repo:
        results = [stage.addressing for stage in repo.index.stages if not stage.is_data_source]
        repo.checkout(results, allow_missing=True)


def _apply(changes: Sequence[str], path: Path) -> None:
    """Change the parameter file at `path`."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides

    before = read_yaml(path.read_text(encoding="utf-8"))
    try:
        apply_overrides(path, list(changes))
    except DvcException as e:
        why = f"{e.__cause__ or e}".splitlines()[0].rstrip(".")
        raise UserError(f"set_params: {why}; write KEY=VALUE with a key of {PARAMS}") from None
    after = read_yaml(path.read_text(encoding="utf-8"))
    if after.get("gate") != before.get("gate"):
        raise UserError(
            "set_params: the gate's rules (gate.*) may not be changed for one run, which they are to judge; "
            f"change them in {PARAMS}"
        )
    parse_params(after)
