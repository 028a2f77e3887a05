"""Parameters changed for one run, and what is put back after it, or after its death."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from panda_ad.errors import UserError
from panda_ad.params import parse_params
from panda_ad.system.files import renamed_file

PARAMS = "params.yaml"
SAVED = Path(".cache/before-run")
"""While a run with changed parameters is under way: params.yaml and dvc.lock as they were, and changed.yaml, what params.yaml is meanwhile."""
LEFT = Path(".cache/before-run-left")
"""The last SAVED that was not put back, since params.yaml had been edited."""


@contextlib.contextmanager
def changed_params(changes: Sequence[str]) -> Iterator[None]:
    """params.yaml with `changes` (`adapt.method=ewc`) for the duration; afterwards it and dvc.lock are as they were.

    Changes are applied by DVC's own code of `dvc exp run -S`, so its grammar holds and comments stay. The repository's lock has to
    be held: what a killed run left changed is put back by the next one that takes it (`put_back`).

    Raises
    ------
    UserError
        A change names no key or touches the gate, or the parameters it makes are not valid; params.yaml is as it was.
    """
    if not changes:
        yield
        return
    making = SAVED.with_name(f".{SAVED.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    for name in (PARAMS, "dvc.lock"):
        if Path(name).exists():
            shutil.copy2(name, making / name)
    shutil.copy2(PARAMS, making / "changed.yaml")
    _apply(changes, making / "changed.yaml")
    making.rename(SAVED)
    try:
        _copy(SAVED / "changed.yaml", Path(PARAMS))
        yield
    finally:
        if (SAVED / "dvc.lock").exists():
            _copy(SAVED / "dvc.lock", Path("dvc.lock"))
        else:
            Path("dvc.lock").unlink(missing_ok=True)
        put_back()


def put_back(root: Path = Path()) -> bool:
    """Give params.yaml back what it held before a run that changed it; whether there was anything to give back.

    Only where it still is what that run made of it: what somebody has written since is theirs, and stays. After a kill dvc.lock stays
    too, since it may hold more than that run; the next `dvc repro` takes what the old parameters gave from DVC's cache.
    """
    saved, params = root / SAVED, root / PARAMS
    if not saved.is_dir():
        return False
    now = _bytes(params)
    restored = now == _bytes(saved / "changed.yaml")
    if restored:
        _copy(saved / PARAMS, params)
    elif now != _bytes(saved / PARAMS):
        left = root / LEFT
        shutil.rmtree(left, ignore_errors=True)
        saved.rename(left)
        what = "was edited while, or since, a run worked with other parameters, and stays as it is"
        print(f"panda-ad: {PARAMS} {what}; what it held before that run: {LEFT / PARAMS}", file=sys.stderr)
        return False
    done = saved.with_name(f".{saved.name}.done")
    shutil.rmtree(done, ignore_errors=True)
    saved.rename(done)  # at once, so that a kill from here on finds nothing half removed to put back
    shutil.rmtree(done)
    return restored


def _apply(changes: Sequence[str], path: Path) -> None:
    """Change the parameter file at `path`."""
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides

    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        apply_overrides(path, list(changes))
    except DvcException as e:
        why = f"{e.__cause__ or e}".splitlines()[0].rstrip(".")
        raise UserError(f"set_params: {why}; write KEY=VALUE with a key of {PARAMS}") from None
    after = yaml.safe_load(path.read_text(encoding="utf-8"))
    if after.get("gate") != before.get("gate"):
        raise UserError(
            f"set_params: the gate's rules (gate.*) may not be changed for one run, which they are to judge; change them in {PARAMS}"
        )
    parse_params(after)


def _copy(source: Path, target: Path) -> None:
    with renamed_file(target) as temporary:
        shutil.copy2(source, temporary)


def _bytes(path: Path) -> bytes | None:
    """None where there is no such file."""
    return path.read_bytes() if path.is_file() else None
