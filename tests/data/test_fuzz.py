"""The fuzzer of ``make fuzz``: it ends well, and finds what is broken."""

import fuzz

from largebatch.data import native


def test_a_short_run_of_every_part_finds_nothing(capsys):
    assert fuzz.main(3, seed=0) == 0
    assert [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()] == [*fuzz.PARTS]


def test_a_traceback_of_a_reader_is_found_with_its_bytes(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    opened = fuzz.open_splits
    calls = []

    def broken(config, anew=False):
        calls.append(config)
        if len(calls) > 3:
            raise KeyError("a bug")
        return opened(config, anew)

    monkeypatch.setattr(fuzz, "open_splits", broken)
    monkeypatch.setattr(fuzz, "PARTS", {"opened": fuzz.readers})
    assert fuzz.main(1, seed=0) == 1
    assert "KeyError('a bug') (seed=0; kept as fuzz-found-readers)" in capsys.readouterr().err
    assert (tmp_path / "fuzz-found-readers").stat().st_size > 0


def test_a_decoder_of_other_pixels_is_found(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(native, "crop_into", lambda out, *_, **__: out.zero_() is not None)
    monkeypatch.setattr(fuzz, "PARTS", {"read": fuzz.against_pillow})
    assert fuzz.main(5, seed=0) == 1
    assert "the decoder" in capsys.readouterr().err
