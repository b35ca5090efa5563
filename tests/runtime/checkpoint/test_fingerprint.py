"""Every byte of a checkpoint counts in its fingerprint, whatever was kept from earlier starts."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from shoal.runtime.checkpoint.checkpoint import Checkpoint
from shoal.runtime.checkpoint.file_digests import DigestCache, file_digests
from shoal.runtime.checkpoint.safetensors_file import FileVersion, SafetensorsFile
from shoal.runtime.random_checkpoint import make_checkpoint


def write(path: Path, content: bytes = b"some weights") -> SafetensorsFile:
    path.write_bytes(content)
    return opened(path)


def opened(path: Path) -> SafetensorsFile:
    with path.open("rb") as file:
        return SafetensorsFile(path, FileVersion.of(file.fileno()), data_start=0)


def keeping(folder: Path) -> DigestCache:
    """A cache that keeps digests of small files, and takes every file for one written long ago."""
    return DigestCache(folder, min_kept_bytes=0, clock_ns=lambda: time.time_ns() + 10**12)


def flip(path: Path, offset: int) -> None:
    """Change one bit in place, and nothing else that a program can restore: not the size, not the mtime."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # within the clock's granularity
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def fingerprint(model_dir: Path) -> str:
    with Checkpoint(model_dir) as checkpoint:
        return checkpoint.compute_fingerprint()


def test_checkpoints_of_other_weights_dtypes_or_configurations_differ(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "a", seed=1)
    make_checkpoint(tmp_path / "same", seed=1)
    make_checkpoint(tmp_path / "seed", seed=2)
    make_checkpoint(tmp_path / "dtype", seed=1, dtype=torch.bfloat16)
    make_checkpoint(tmp_path / "config", seed=1, overrides={"routed_scaling_factor": 1.5})
    fingerprints = {name: fingerprint(tmp_path / name) for name in ("a", "same", "seed", "dtype", "config")}
    assert fingerprints["a"] == fingerprints["same"]
    assert len(set(fingerprints.values())) == 4


@pytest.mark.parametrize("num_shards", [1, 3])
def test_one_bit_of_any_tensor_changes_it(tmp_path: Path, num_shards: int) -> None:
    make_checkpoint(tmp_path, num_shards=num_shards)
    before = fingerprint(tmp_path)
    seen = {before}
    for path in tmp_path.glob("*.safetensors"):
        size = path.stat().st_size
        for offset in (size // 3, size // 2, size - 1):
            flip(path, offset)
            seen.add(fingerprint(tmp_path))
            flip(path, offset)
    assert len(seen) == 1 + 3 * num_shards
    assert fingerprint(tmp_path) == before


def test_names_of_equal_tensors_count(tmp_path: Path) -> None:
    found = set()
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({name: torch.zeros(2)}, folder / "model.safetensors")
        found.add(fingerprint(folder))
    assert len(found) == 2


def test_a_file_that_changed_after_opening_has_no_fingerprint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    flip(tmp_path / "model.safetensors", 5000)
    with pytest.raises(ValueError, match=r"model.safetensors changed since the checkpoint was opened; start again"):
        checkpoint.compute_fingerprint()
    with pytest.raises(ValueError, match=r"model.norm.weight changed since the checkpoint was opened; start again"):
        checkpoint.read("model.norm.weight")


def test_a_file_that_changed_after_opening_has_no_kept_digest(tmp_path: Path) -> None:
    file = write(tmp_path / "weights")
    file_digests([file], keeping(tmp_path / "cache"))
    flip(file.path, 3)
    with pytest.raises(ValueError, match="weights changed since the checkpoint was opened; start again"):
        file_digests([file], keeping(tmp_path / "cache"))
    file.path.unlink()
    with pytest.raises(ValueError, match=r"weights cannot be read \(.*; download the file again"):
        file_digests([file], keeping(tmp_path / "cache"))


def test_digest_by_hand(tmp_path: Path) -> None:
    piece = 64 << 20
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(piece)  # zeros, without space on the disk
        file.seek(piece)
        file.write(b"tail")
    expected = hashlib.sha256((piece + 4).to_bytes(8, "little"))
    expected.update(xxhash.xxh3_128_digest(bytes(piece)))
    expected.update(xxhash.xxh3_128_digest(b"tail"))
    assert file_digests([opened(path)], DigestCache(tmp_path / "cache")) == {path: expected.hexdigest()}


def test_a_kept_digest_is_that_of_one_version_of_the_file(tmp_path: Path) -> None:
    path, cache = tmp_path / "weights", tmp_path / "cache"
    file = write(path)
    right = file_digests([file], keeping(cache))
    (entry,) = cache.iterdir()
    kept = json.loads(entry.read_text())
    assert kept["digest"] == right[path]
    assert cache.stat().st_mode & 0o77 == 0
    # What is kept is believed, and is not read off the file again, also through a link,
    entry.write_text(json.dumps(kept | {"digest": "0" * 64}))
    link = tmp_path / "link"
    link.symlink_to(path)
    assert file_digests([opened(path)], keeping(cache)) == {path: "0" * 64}
    assert file_digests([opened(link)], keeping(cache)) == {link: "0" * 64}
    # until a byte changes.
    flip(path, 6)
    changed = file_digests([opened(path)], keeping(cache))
    assert changed[path] not in (right[path], "0" * 64)
    flip(path, 6)
    assert file_digests([opened(path)], keeping(cache)) == right


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"digest": "00"}', b'{"digest": 3}'])
def test_a_damaged_entry_is_computed_anew(tmp_path: Path, content: bytes) -> None:
    file, cache = write(tmp_path / "weights"), tmp_path / "cache"
    right = file_digests([file], keeping(cache))
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(content)
    assert file_digests([file], keeping(cache)) == right
    assert entry.read_bytes() == whole


def test_digests_of_small_and_of_new_files_are_not_kept(tmp_path: Path) -> None:
    file = write(tmp_path / "weights")
    just_written = DigestCache(tmp_path / "new", min_kept_bytes=0, clock_ns=lambda: file.version.ctime_ns + 10**9)
    assert file_digests([file], just_written) == file_digests([file], DigestCache(tmp_path / "small"))
    assert [entry.read_bytes() for entry in (tmp_path / "new").iterdir()] == [b""]
    assert not (tmp_path / "small").exists()


def test_a_file_that_another_process_hashes_is_waited_for(tmp_path: Path) -> None:
    files, cache = [write(tmp_path / name) for name in "ab"], tmp_path / "cache"
    right = file_digests(files, keeping(cache))
    entry = next(entry for entry in cache.iterdir() if json.loads(entry.read_text())["path"] == str(files[0].path))
    theirs = json.dumps(json.loads(entry.read_text()) | {"digest": "0" * 64})
    with entry.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.truncate()
        found: dict[Path, str] = {}
        waiting = threading.Thread(target=lambda: found.update(file_digests(files, keeping(cache))))
        waiting.start()
        held.write(theirs)
    waiting.join(60)
    assert found == right | {files[0].path: "0" * 64}


def test_a_process_that_never_finishes_is_not_waited_for(tmp_path: Path) -> None:
    file, cache = write(tmp_path / "weights"), tmp_path / "cache"
    right = file_digests([file], keeping(cache))
    (entry,) = cache.iterdir()
    entry.write_bytes(b"")
    with entry.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert file_digests([file], keeping(cache), patience_s=0.0) == right


def test_without_a_place_for_digests_every_process_computes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [write(tmp_path / name) for name in "ab"]
    right = file_digests(files, keeping(tmp_path / "cache"))
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert file_digests(files, keeping(tmp_path / "file")) == right
    (record,) = caplog.records
    assert "set SHOAL_CACHE_DIR" in record.getMessage()
