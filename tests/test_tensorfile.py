"""Weight files: what the library writes is read, what is broken is refused, the rest is carried."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectral_fast.picklefile import PickleFile
from spectral_fast.tensorfile import DTYPES, Layout, SafetensorsFile, TensorInfo, writing_safetensors


def rewrite(source: SafetensorsFile | PickleFile, path: Path, replaced: Iterable[tuple[str, torch.Tensor]]) -> None:
    with source.rewriting(path) as put:
        for name, tensor in replaced:
            put(name, tensor)


def write_safetensors(
    path: Path,
    layout: Layout,
    tensors: Iterable[tuple[str, torch.Tensor]],
    carry_from: SafetensorsFile | None = None,
) -> None:
    with writing_safetensors(path, layout, carry_from) as put:
        for name, tensor in tensors:
            put(name, tensor)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bit pattern, NaN included; bool only has two."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = max(1, torch.Size(shape).numel()) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)[: torch.Size(shape).numel()].reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    shapes = [(3, 5), (), (0, 4), (7,), (2, 3, 4)]
    return {
        f"x.{name}.{i}": random_bits(shape, dtype, i)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate(shapes)
    }


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "some.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "größer ∂"})
    return path


def test_every_dtype_that_the_library_writes_is_read_bit_for_bit(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    opened = SafetensorsFile(file)
    with safe_open(file, "pt") as reference:
        assert set(opened.tensors) == set(reference.keys())
    for name, tensor in tensors.items():
        assert opened.tensors[name] == TensorInfo(tensor.dtype, tuple(tensor.shape))
        assert same_bits(opened.read(name), tensor)


def test_a_read_tensor_may_be_changed_without_changing_the_file(file: Path) -> None:
    opened = SafetensorsFile(file)
    before = file.read_bytes()
    opened.read("x.F32.0").zero_()
    assert file.read_bytes() == before


def test_a_file_of_our_own_layout_is_one_that_the_library_reads(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    layout = Layout.of(infos, {"format": "pt"})
    path = tmp_path / "own.safetensors"
    write_safetensors(path, layout, reversed(tensors.items()))
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
    assert path.stat().st_size == layout.size
    assert all(layout.offsets[name] % info.dtype.itemsize == 0 for name, info in infos.items())
    with safe_open(path, "pt") as reference:
        assert reference.metadata() == {"format": "pt"}


def test_a_rewrite_without_replacements_is_the_same_file(file: Path, tmp_path: Path) -> None:
    rewrite(SafetensorsFile(file), tmp_path / "copy", [])
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()


def test_a_rewrite_changes_the_replaced_tensors_and_no_other_byte(file: Path, tmp_path: Path) -> None:
    source = SafetensorsFile(file)
    replaced = {
        name: random_bits(source.tensors[name].shape, source.tensors[name].dtype, seed=99)
        for name in ("x.BF16.4", "x.F64.0", "x.U8.3", "x.F32.1", "x.I64.2")
    }
    rewrite(SafetensorsFile(file), tmp_path / "new", replaced.items())
    expected = bytearray(file.read_bytes())
    for name, tensor in replaced.items():
        start = source.layout.offsets[name]
        expected[start : start + source.tensors[name].nbytes] = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    assert (tmp_path / "new").read_bytes() == bytes(expected)


def test_tensors_larger_than_the_copy_buffer_are_carried_whole(tmp_path: Path) -> None:
    large = random_bits((3, (1 << 20) + 7), torch.uint8)
    save_file({"a": large, "b": torch.ones(5)}, tmp_path / "large")
    rewrite(SafetensorsFile(tmp_path / "large"), tmp_path / "copy", [("b", torch.zeros(5))])
    assert same_bits(SafetensorsFile(tmp_path / "copy").read("a"), large)


def test_a_transposed_tensor_is_written_in_its_logical_order(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 2)}, tmp_path / "source")
    transposed = torch.arange(6.0).reshape(2, 3).T
    rewrite(SafetensorsFile(tmp_path / "source"), tmp_path / "new", [("a", transposed)])
    assert torch.equal(load_file(tmp_path / "new")["a"], transposed)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "x.F32.0",
            torch.zeros(3, 4),
            r"x\.F32\.0 is to be torch\.float32 \(3, 5\), got torch\.float32 \(3, 4\)",
        ),
        ("x.F32.0", torch.zeros(3, 5).half(), r"got torch\.float16 \(3, 5\)"),
        ("x.F32.9", torch.zeros(3, 5), r"x\.F32\.9 is not a tensor of this file"),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused(
    file: Path, tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rewrite(SafetensorsFile(file), tmp_path / "new", [(name, tensor)])


def test_a_tensor_given_twice_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.F32\.3 was given twice"):
        rewrite(SafetensorsFile(file), tmp_path / "new", [("x.F32.3", torch.zeros(7))] * 2)


def test_a_file_is_not_finished_while_tensors_are_missing(tmp_path: Path) -> None:
    layout = Layout.of({"a": TensorInfo(torch.float32, (2,)), "b": TensorInfo(torch.float32, (2,))})
    with pytest.raises(ValueError, match="1 tensors were never given, the first is b"):
        write_safetensors(tmp_path / "new", layout, [("a", torch.zeros(2))])


def test_a_tensor_that_the_source_lacks_cannot_be_carried(file: Path, tmp_path: Path) -> None:
    layout = Layout.of({"new": TensorInfo(torch.float32, (2,))})
    with pytest.raises(ValueError, match="cannot supply new"):
        write_safetensors(tmp_path / "new", layout, [], carry_from=SafetensorsFile(file))


def test_an_existing_file_is_never_written_over(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(FileExistsError):
        rewrite(SafetensorsFile(file), file, [])
    assert file.read_bytes() == before


def broken(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x01\x02\x03", "its header should have"),
        (broken({"w": entry()}, length=10**6), "should have 1000000 of its"),
        (broken({"w": entry()}, length=2**63), "truncated or not safetensors"),
        (broken(b"{nonsense"), "not a JSON object"),
        (broken(b"[1, 2]"), "not a JSON object"),
        (broken(b"\xff\xfe{}"), "not a JSON object"),
        (broken(b'{"w": 1, "w": 2}'), "a key comes twice"),
        (broken({"w": [1]}), r"w needs dtype, shape and data_offsets, got \[1\]"),
        (broken({"w": {"dtype": "F32"}}), "w needs dtype, shape and data_offsets"),
        (broken({"w": entry(data_offsets=[0])}), "w needs dtype, shape and data_offsets"),
        (broken({"w": entry(dtype="F31")}), r"w has dtype 'F31'; known are F64, F32"),
        (broken({"w": entry(dtype=["F32"])}), r"w has dtype \['F32'\]"),
        (broken({"w": entry(shape=[-2])}), "w needs whole numbers"),
        (broken({"w": entry(shape=[2.0])}), "w needs whole numbers"),
        (broken({"w": entry(shape=[True, 2])}), "w needs whole numbers"),
        (broken({"w": entry(shape=[3])}), r"w is F32 \(3,\), 12 bytes, but has 8"),
        (broken({"w": entry(data_offsets=[8, 0])}), r"w is F32 \(2,\), 8 bytes, but has -8"),
        (broken({"w": entry()}, data=bytes(7)), r"truncated: w ends at byte \d+, the file at \d+"),
        (broken({"w": entry()}, data=bytes(9)), r"its tensors end at byte \d+, the file at"),
        (
            broken({"w": entry(data_offsets=[4, 12])}, data=bytes(12)),
            "w begins at offset 4, but the tensor before it",
        ),
        (broken({"v": entry(), "w": entry(data_offsets=[4, 12])}, data=bytes(12)), "w begins at offset 4"),
        (broken({"v": entry(), "w": entry()}), "w begins at offset 0, but the tensor before it ends at 8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_a_file_cut_at_any_byte_is_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (*range(0, len(content), 97), len(content) - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors"):
            SafetensorsFile(cut)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(file: Path) -> None:
    opened = SafetensorsFile(file)
    os.truncate(file, opened.layout.offsets["x.F64.0"] + 8)
    with pytest.raises(ValueError, match="changed while it was read"):
        opened.read("x.F64.0")


def test_a_full_disk_is_noticed_before_the_first_tensor_is_asked_for(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def never() -> Any:
        pytest.fail("work began")
        yield

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device.*new") as caught:
        rewrite(SafetensorsFile(file), tmp_path / "new", never())
    assert caught.value.errno == errno.ENOSPC


def test_a_file_system_without_fallocate_still_works(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    rewrite(SafetensorsFile(file), tmp_path / "copy", [])
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()


def test_short_writes_and_reads_are_continued(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:13], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:11]], offset))
    rewrite(SafetensorsFile(file), tmp_path / "copy", [])
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()


FILE_SIZE_LIMIT = """
import resource, sys
from pathlib import Path
from spectral_fast.tensorfile import SafetensorsFile
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with SafetensorsFile(Path(sys.argv[1])).rewriting(Path(sys.argv[2])):
        pass
except OSError as error:
    print(error)
"""


def test_the_kernels_refusal_to_write_names_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(5000)}, tmp_path / "source")
    result = forked.run(FILE_SIZE_LIMIT, str(tmp_path / "source"), str(tmp_path / "target"))
    assert result.returncode == 0, result.stderr
    assert "File too large" in result.stdout
    assert str(tmp_path / "target") in result.stdout


# The pickled format.


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def pickled(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shared = torch.randn(6, 4)
    state: Any = OrderedDict(
        z=torch.randn(2, 3),
        a=torch.randn(3, 2).T,
        half=torch.randn(4).bfloat16(),
        view=shared[2:4],
        text="note",
    )
    path = tmp_path / "adapter_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=request.param)
    return path


def test_a_pickled_state_dict_is_rewritten_in_its_format_and_order(pickled: Path, tmp_path: Path) -> None:
    source = PickleFile(pickled)
    assert list(source.tensors) == ["z", "a", "half", "view"]
    rewrite(source, tmp_path / "new.bin", [("half", torch.ones(4).bfloat16()), ("a", torch.ones(2, 3))])
    before, after = (torch.load(path, weights_only=True) for path in (pickled, tmp_path / "new.bin"))
    assert list(after) == list(before) == ["z", "a", "half", "view", "text"]
    assert torch.equal(after["a"], torch.ones(2, 3))
    assert torch.equal(after["half"], torch.ones(4).bfloat16())
    assert torch.equal(after["z"], before["z"])
    assert torch.equal(after["view"], before["view"])
    assert after["text"] == "note"
    assert pickled.read_bytes()[:2] == (tmp_path / "new.bin").read_bytes()[:2]


def test_reading_and_failing_rewrites_leave_a_pickled_state_as_it_was(pickled: Path, tmp_path: Path) -> None:
    source = PickleFile(pickled)
    z = source.read("z")
    source.read("z").zero_()
    with pytest.raises(ValueError, match="a is to be"):
        rewrite(source, tmp_path / "new.bin", [("z", torch.zeros(2, 3)), ("a", torch.zeros(1))])
    assert torch.equal(source.read("z"), z)
    rewrite(source, tmp_path / "copy.bin", [])
    assert torch.equal(PickleFile(tmp_path / "copy.bin").read("z"), z)


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.bin"
    torch.save({"w": torch.zeros(2), "x": Evil()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"evil\.bin needs more than weights_only"):
        PickleFile(path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.bin"),
        (b"no pickle at all", "x.bin"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (pickle.dumps({"w": 1}, protocol=2), "x.bin"),
    ],
)
def test_a_broken_pickle_is_refused_with_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PickleFile(tmp_path / "x.bin")


def test_a_truncated_pickle_is_refused(pickled: Path) -> None:
    os.truncate(pickled, pickled.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        PickleFile(pickled)


def test_a_pickle_without_a_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "x.bin")
    with pytest.raises(ValueError, match="should hold a dict of tensors, got a list"):
        PickleFile(tmp_path / "x.bin")
