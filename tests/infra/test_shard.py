from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from infra.shard import TarWriter, build_tar, read_safetensors, safetensors_bytes

MEMBERS = [
    ("b.mp4", b"x" * 1000),
    ("a-1.json", b"{}"),
    ("a.mp4", b""),
    ("b.json", b"y" * 512),
    ("a.json", b"z"),
    ("a-1.mp4", b"q"),
]


def test_build_tar_is_read_by_tarfile_where_it_says():
    data, places = build_tar(MEMBERS)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == dict(MEMBERS)
        for member in tar:
            assert (member.offset_data, member.size) == places[member.name]
            assert (member.mtime, member.uid, member.gid, member.mode, member.uname) == (0, 0, 0, 0o644, "")
            assert member.isreg()
    for name, content in MEMBERS:
        offset, nbytes = places[name]
        assert data[offset : offset + nbytes] == content


def test_build_tar_is_ustar_in_whole_blocks():
    data, _ = build_tar(MEMBERS)
    assert data[257:265] == b"ustar\x0000" and len(data) % 512 == 0 and data.endswith(bytes(1024))


def test_build_tar_puts_the_members_of_a_sample_side_by_side():
    data, places = build_tar(MEMBERS)
    names = ["a.json", "a.mp4", "a-1.json", "a-1.mp4", "b.json", "b.mp4"]
    assert list(places) == tarfile.open(fileobj=io.BytesIO(data)).getnames() == names  # noqa: SIM115


def test_build_tar_does_not_depend_on_the_order_it_is_given():
    assert build_tar(MEMBERS) == build_tar(MEMBERS[::-1])


@pytest.mark.parametrize(
    "name",
    ["a/b.mp4", "../a.mp4", "A.mp4", "a.b.mp4", "a", "a.", ".mp4", "a b.mp4", "a.MP4", "a" * 99 + ".mp4", "a.mp4\n"],
)
def test_build_tar_refuses_names_that_loaders_stumble_over(name):
    with pytest.raises(ValueError, match=r"expected <sample_id>\.<suffix>"):
        build_tar([(name, b"")])


def test_build_tar_refuses_a_name_that_comes_twice():
    with pytest.raises(ValueError, match=r"a\.mp4.* comes twice"):
        build_tar([("a.mp4", b"1"), ("a.mp4", b"2")])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_bytes_are_what_torch_would_have_cast(dtype):
    values = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    values.flat[:4] = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-40]  # ties to even, both ways; signed zero; a subnormal
    data = safetensors_bytes("latents", values, dtype, {"plan": "{}"})
    expected = torch.from_numpy(values).to(getattr(torch, dtype))
    found = load(data)["latents"]
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert data == safetensors_bytes("latents", np.asfortranarray(values), dtype, {"plan": "{}"})


def test_safetensors_bytes_carry_metadata_in_one_order(tmp_path):
    one = safetensors_bytes("latents", np.zeros(2, np.float32), "float32", {"a": "1", "b": "ü"})
    other = safetensors_bytes("latents", np.zeros(2, np.float32), "float32", {"b": "ü", "a": "1"})
    assert one == other
    (tmp_path / "x.safetensors").write_bytes(one)
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"a": "1", "b": "ü"}


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(np.nan, "float32"), (np.inf, "bfloat16"), (1e6, "float16"), (3.4e38, "bfloat16"), (np.nan, "bfloat16")],
)
def test_safetensors_bytes_refuse_what_does_not_fit(value, dtype):
    with pytest.raises(ValueError, match=f"latents: expected finite values that fit {dtype}"):
        safetensors_bytes("latents", np.array([0.0, value], np.float32), dtype, {})


def test_safetensors_bytes_refuse_an_unknown_dtype():
    with pytest.raises(ValueError, match=r"tensor dtype: expected one of .*found 'int8'"):
        safetensors_bytes("latents", np.zeros(2, np.float32), "int8", {})


def test_tar_writer_writes_what_build_tar_builds():
    file = io.BytesIO()
    tar = TarWriter(file)
    places = {name: tar.add(name, data) for name, data in sorted(MEMBERS, key=lambda member: member[0].split(".", 1))}
    tar.close()
    assert (file.getvalue(), places) == build_tar(MEMBERS)
    with pytest.raises(ValueError, match="comes twice"):
        tar.add("a.mp4", b"")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_read_safetensors_reads_what_was_written(dtype):
    array = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32)
    data = safetensors_bytes("latents", array, dtype, {"layout": "C T H W"})
    expected = load(data)["latents"].float().numpy()
    assert np.array_equal(read_safetensors(data, "latents"), expected)


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"\x08" + bytes(7) + b'{"a": 1}', (1 << 60).to_bytes(8, "little") + b"{}"]
)
def test_read_safetensors_refuses_other_files(data):
    with pytest.raises(ValueError, match="expected a safetensors file with a float tensor latents"):
        read_safetensors(data, "latents")


def test_read_safetensors_refuses_a_file_that_was_cut_short():
    data = safetensors_bytes("latents", np.ones((4, 4), np.float32), "float32", {})
    with pytest.raises(ValueError, match="expected a safetensors file"):
        read_safetensors(data[:-8], "latents")
