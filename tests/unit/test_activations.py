# SPDX-License-Identifier: Apache-2.0
"""The activation cache gives what the frozen layers gives, survives kills and stays within its budget."""

import gc
import hashlib

import numpy as np
import PIL
import pytest
import torch

from panda_ad.features.backbones import load_backbone
from panda_ad.features.cache import Activations, Item

SIZE = (32, 32)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("embedded")


def items(n, seed=0):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (40, 30, 3), np.uint8) for _ in range(n)]
    return [Item(hashlib.sha256(im.tobytes()).hexdigest(), lambda im=im: im) for im in images]


def unreadable(item):
    def read():
        raise AssertionError("a cached image was decoded again")

    return Item(item.key, read)


def make(backbone, tmp_path, gb=1.0, size=SIZE):
    return Activations(backbone, size, torch.float32, tmp_path, gb)


def test_cached_equals_computed_and_nothing_is_decoded_twice(backbone, tmp_path):
    some = items(70)
    cache = make(backbone, tmp_path)
    assert cache.warm(some) == 70
    assert cache.warm([unreadable(i) for i in some]) == 0
    again = make(backbone, tmp_path)
    view = again.view([unreadable(i) for i in some])
    direct = make(backbone, tmp_path / "other").compute(some)
    np.testing.assert_array_equal(view[:], direct["layer2"])
    order = np.array([5, 3, 69])
    np.testing.assert_array_equal(view[order], direct["layer2"][order])
    assert cache.warm([*some, *items(2, seed=1)]) == 2  # only what is new


def test_cut_off_files_lose_only_what_was_not_listed(backbone, tmp_path):
    some = items(20)
    cache = make(backbone, tmp_path)
    cache.warm(some)
    store = cache.stores["layer2"]
    store.index.write_bytes(store.index.read_bytes()[:-10])  # killed while listing the last key
    with open(store.path, "ab") as f:
        f.write(b"half a record")
    again = make(backbone, tmp_path)
    assert again.warm(some) == 1
    np.testing.assert_array_equal(
        make(backbone, tmp_path).view([unreadable(i) for i in some])[:], again.compute(some)["layer2"]
    )


def test_over_budget_images_are_computed_at_use(backbone, tmp_path, capsys):
    some = items(10)
    record = make(backbone, tmp_path).stores["layer2"].record
    cache = make(backbone, tmp_path, gb=4.5 * record / 1e9)
    assert cache.warm(some) == 4
    assert "cache_gb" in capsys.readouterr().err
    np.testing.assert_array_equal(cache.view(some)[:], cache.compute(some)["layer2"])


def test_older_caches_make_room(backbone, tmp_path):
    old = make(backbone, tmp_path)
    old.warm(items(10))
    size, folder = old.stores["layer2"].path.stat().st_size, old.folder
    del old
    new = make(backbone, tmp_path, gb=1.2 * size / 1e9, size=(16, 32))
    assert new.warm(items(10)) == 10
    assert not folder.exists()


def test_both_layers_together(backbone, tmp_path):
    some = items(9)
    cache = make(backbone, tmp_path)
    cache.warm(some)
    cache.warm(some, layers=("layer1", "layer2"))
    (batch,) = cache.batches(some, ("layer1", "layer2"))
    direct = cache.compute(some)
    for layer in ("layer1", "layer2"):
        np.testing.assert_array_equal(batch[layer].numpy(), direct[layer])


def test_pooled_features_are_computed_once(backbone, tmp_path):
    from panda_ad.features.backbones import in_micro_batches

    some = items(70)
    cache = make(backbone, tmp_path)
    cache.warm(some)
    first = np.concatenate(list(cache.pooled([*some[:40], some[0]])))
    layer2 = torch.from_numpy(make(backbone, tmp_path / "other").compute(some)["layer2"])
    (direct,) = in_micro_batches(lambda x: backbone.adapted(x.float()), layer2)
    np.testing.assert_array_equal(first, direct.numpy()[[*range(40), 0]])
    for name in ("layer2.f16", "layer2.keys"):  # what is left must do for the images known, and only for them
        (cache.folder / name).unlink()
    again = make(backbone, tmp_path)
    known = [unreadable(item) for item in some[:40]]
    np.testing.assert_array_equal(np.concatenate(list(again.pooled([*known, *some[40:]]))), direct.numpy())
    assert len(make(backbone, tmp_path).features.row) == 70


def test_pooled_features_beyond_the_budget_are_not_kept(backbone, tmp_path):
    some = items(20)
    record = make(backbone, tmp_path).features.record
    cache = make(backbone, tmp_path, gb=8 * record / 1e9)
    parts = list(cache.pooled(some, batch=5))
    assert [len(part) for part in parts] == [5] * 4 and len(cache.features.row) == 8
    np.testing.assert_array_equal(
        np.concatenate(parts), np.concatenate(list(make(backbone, tmp_path / "all").pooled(some)))
    )


def test_a_cache_that_is_open_is_not_deleted_for_room(backbone, tmp_path):
    small = make(backbone, tmp_path, size=(32, 48))
    small.warm(items(4))
    used = small.stores["layer2"].record * 4
    budget = (used + small.features.record) / 1e9
    other = make(backbone, tmp_path, gb=budget)
    assert other.warm(items(4)) < 4  # no room
    assert small.stores["layer2"].path.exists()
    folder = small.folder
    del small
    gc.collect()
    assert other.warm(items(4)) > 0
    assert not folder.exists()


def test_another_way_of_decoding_is_another_cache(backbone, tmp_path, monkeypatch):
    before = make(backbone, tmp_path)
    before.warm(items(2))
    monkeypatch.setattr(PIL, "__version__", "99.0")
    assert make(backbone, tmp_path).warm(items(2)) == 2
