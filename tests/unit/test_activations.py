# SPDX-License-Identifier: Apache-2.0
"""The activation cache gives what the frozen layers gives, survives kills and stays within its budget."""

import ast
import functools
import gc
import hashlib
from pathlib import Path

import numpy as np
import PIL
import pytest

from panda_ad.features import cache
from panda_ad.features.backbones import load_backbone
from panda_ad.features.cache import Activations, Item
from panda_ad.features.export import export_network

SIZE = (32, 32)


@pytest.fixture(scope="module")
def networks():
    """The network of an input size."""
    backbone = load_backbone("embedded")
    return functools.cache(lambda size: export_network(backbone, size))


def items(n, seed=0):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (40, 30, 3), np.uint8) for _ in range(n)]
    return [Item(hashlib.sha256(im.tobytes()).hexdigest(), lambda im=im: im) for im in images]


def unreadable(item):
    def read():
        raise AssertionError("a cached image was decoded again")

    return Item(item.key, read)


def make(networks, tmp_path, gb=1.0, size=SIZE):
    return Activations(networks(size), tmp_path, gb)


def test_cached_equals_computed_and_nothing_is_decoded_twice(networks, tmp_path):
    some = items(70)
    cache = make(networks, tmp_path)
    assert cache.warm(some) == 70
    assert cache.warm([unreadable(i) for i in some]) == 0
    again = make(networks, tmp_path)
    view = again.view([unreadable(i) for i in some])
    direct = make(networks, tmp_path / "other").compute(some)
    np.testing.assert_array_equal(view[:], direct["layer2"])
    order = np.array([5, 3, 69])
    np.testing.assert_array_equal(view[order], direct["layer2"][order])
    assert cache.warm([*some, *items(2, seed=1)]) == 2  # only what is new


def test_cut_off_files_lose_only_what_was_not_listed(networks, tmp_path):
    some = items(20)
    cache = make(networks, tmp_path)
    cache.warm(some)
    store = cache.stores["layer2"]
    store.index.write_bytes(store.index.read_bytes()[:-10])  # killed while listing the last key
    with open(store.path, "ab") as f:
        f.write(b"half a record")
    again = make(networks, tmp_path)
    assert again.warm(some) == 1
    np.testing.assert_array_equal(
        make(networks, tmp_path).view([unreadable(i) for i in some])[:], again.compute(some)["layer2"]
    )


def test_over_budget_images_are_computed_at_use(networks, tmp_path, capsys):
    some = items(10)
    record = make(networks, tmp_path).stores["layer2"].record
    cache = make(networks, tmp_path, gb=4.5 * record / 1e9)
    assert cache.warm(some) == 4
    assert "cache_gb" in capsys.readouterr().err
    np.testing.assert_array_equal(cache.view(some)[:], cache.compute(some)["layer2"])


def test_older_caches_make_room(networks, tmp_path):
    old = make(networks, tmp_path)
    old.warm(items(10))
    size, folder = old.stores["layer2"].path.stat().st_size, old.folder
    del old
    new = make(networks, tmp_path, gb=1.2 * size / 1e9, size=(16, 32))
    assert new.warm(items(10)) == 10
    assert not folder.exists()


def test_both_layers_together(networks, tmp_path):
    some = items(9)
    cache = make(networks, tmp_path)
    cache.warm(some)
    cache.warm(some, layers=("layer1", "layer2"))
    direct = cache.compute(some)
    for layer in ("layer1", "layer2"):
        np.testing.assert_array_equal(cache.view(some, layer)[:], direct[layer])


def test_pooled_features_are_computed_once(networks, tmp_path):
    some = items(70)
    cache = make(networks, tmp_path)
    cache.warm(some)
    first = np.concatenate(list(cache.pooled([*some[:40], some[0]])))
    (direct,) = networks(SIZE).features(make(networks, tmp_path / "other").compute(some))
    np.testing.assert_array_equal(first, direct[[*range(40), 0]])
    for name in ("layer2.f16", "layer2.keys"):  # what is left must do for the images known, and only for them
        (cache.folder / name).unlink()
    again = make(networks, tmp_path)
    known = [unreadable(item) for item in some[:40]]
    np.testing.assert_array_equal(np.concatenate(list(again.pooled([*known, *some[40:]]))), direct)
    assert len(make(networks, tmp_path).features.row) == 70


def test_pooled_features_beyond_the_budget_are_not_kept(networks, tmp_path):
    some = items(20)
    record = make(networks, tmp_path).features.record
    cache = make(networks, tmp_path, gb=8 * record / 1e9)
    parts = list(cache.pooled(some, batch=5))
    assert [len(part) for part in parts] == [5] * 4 and len(cache.features.row) == 8
    np.testing.assert_array_equal(
        np.concatenate(parts), np.concatenate(list(make(networks, tmp_path / "all").pooled(some)))
    )


def test_a_cache_that_is_open_is_not_deleted_for_room(networks, tmp_path):
    small = make(networks, tmp_path, size=(32, 48))
    small.warm(items(4))
    used = small.stores["layer2"].record * 4
    budget = (used + small.features.record) / 1e9
    other = make(networks, tmp_path, gb=budget)
    assert other.warm(items(4)) < 4  # no room
    assert small.stores["layer2"].path.exists()
    folder = small.folder
    del small
    gc.collect()
    assert other.warm(items(4)) > 0
    assert not folder.exists()


def test_another_way_of_decoding_is_another_cache(networks, tmp_path, monkeypatch):
    before = make(networks, tmp_path)
    before.warm(items(2))
    monkeypatch.setattr(PIL, "__version__", "99.0")
    assert make(networks, tmp_path).warm(items(2)) == 2


def test_the_cache_knows_all_the_code_that_makes_pixels():
    """Whatever decoding imports decides what is cached; a change of it must not mix features of two makes."""
    source = Path(cache.__file__).parents[1]
    todo, needed = ["data/images.py"], set()
    while todo:
        name = todo.pop()
        needed.add(name)
        for node in ast.walk(ast.parse((source / name).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("panda_ad.data."):
                todo += [f"{node.module.removeprefix('panda_ad.').replace('.', '/')}.py"]
        todo = [name for name in todo if name not in needed]
    assert needed <= set(cache._RULES)
