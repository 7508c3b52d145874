"""csrc compiled by CuPy's NVRTC and kept on disk; it needs no GPU."""

from __future__ import annotations

import pytest

from flowturbo_kernels import _nvrtc

pytest.importorskip("cupy", reason="CuPy is not installed")

NAME = "flowturbo::adaln<float,4,3,false>"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))
    return tmp_path / "nvrtc"


@pytest.fixture
def programs(monkeypatch):
    """The names of the sources that were compiled."""
    from cupy.cuda import nvrtc

    sources, original = [], nvrtc.createProgram
    monkeypatch.setattr(
        nvrtc, "createProgram", lambda *args: sources.append(args[1]) or original(*args)
    )
    return sources


def test_what_was_compiled_is_kept_for_the_next_process(folder, programs):
    first = _nvrtc.compiled(NAME, (9, 0), _nvrtc.options())
    assert first[0].startswith("_ZN9flowturbo5adaln")
    assert first[1][:4] == b"\x7fELF"
    assert _nvrtc.compiled(NAME, (9, 0), _nvrtc.options()) == first
    assert len(programs) == 1
    assert _nvrtc.compiled(NAME, (8, 0), _nvrtc.options())[1] != first[1]
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-100], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"\n\n\n"],
)
def test_a_damaged_file_is_compiled_over(folder, programs, damage):
    first = _nvrtc.compiled(NAME, (9, 0), _nvrtc.options())
    [file] = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    name, code = _nvrtc.compiled(NAME, (9, 0), _nvrtc.options())
    assert (name, code[:4]) == (
        first[0],
        b"\x7fELF",
    )  # the same source does not give the same bytes each time
    assert len(programs) == 2
    assert _nvrtc.compiled(NAME, (9, 0), _nvrtc.options()) == (name, code)


def test_a_gpu_newer_than_nvrtc_gets_ptx(folder):
    code = _nvrtc.compiled(NAME, (99, 0), _nvrtc.options())[1]
    assert b".target sm_" in code


@pytest.mark.parametrize("known", [[80, 86], [80, 86, 90]])
def test_only_code_that_waits_is_launched_while_other_kernels_run(folder, monkeypatch, known):
    """An NVRTC of CUDA 11 knows no GPU that could."""
    from cupy.cuda import nvrtc

    monkeypatch.setattr(nvrtc, "getSupportedArchs", lambda: known)
    monkeypatch.setattr(_nvrtc, "waits", _nvrtc.waits.__wrapped__)
    code = _nvrtc.compiled(NAME, (9, 9), _nvrtc.options())[1]
    assert (b"griddepcontrol.wait" in code) == _nvrtc.waits((9, 9)) == (90 in known)
    assert not _nvrtc.waits((8, 9))


def test_a_source_that_does_not_compile_is_named_with_the_compilers_words(folder, monkeypatch):
    monkeypatch.setattr(_nvrtc, "source", lambda name: "no such thing;")
    with pytest.raises(
        RuntimeError, match=r"adaln<float,4,3,false> does not compile for -arch=sm_90: (.|\n)*error"
    ):
        _nvrtc.compiled(NAME, (9, 0), _nvrtc.options())
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_costs_no_more_than_time(tmp_path, monkeypatch, programs):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "file"))
    names = {_nvrtc.compiled(NAME, (9, 0), _nvrtc.options())[0] for _ in range(2)}
    assert len(names) == 1
    assert len(programs) == 2
