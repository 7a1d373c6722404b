"""`fewstep families`: rows are kept as they are done, what breaks fills its cell, the table shows every family."""

import json

import pytest

from fewstep.export import family_table
from fewstep.export.family_table import COLUMNS, ROWS, Cell, FamilyRow, command, markdown, try_family
from fewstep.models.errors import BundleError

NAMES = list(ROWS)


def row(name, **cells):
    found = {column: cells.get(column, Cell(ok=True, text=f"{column} holds")) for column in COLUMNS}
    shape, known = ROWS[name]
    return FamilyRow(name=name, shape=shape, known=known, versions={"torch": "2"}, seconds=1.0, cells=found)


def test_rows_are_kept_and_only_missing_ones_tried(tmp_path, monkeypatch, capsys):
    tried, out = [], tmp_path / "families.md"

    def attempt(name, tell):
        if name == NAMES[2] and len(tried) < 3:
            raise KeyboardInterrupt
        tried.append(name)
        return row(name)

    monkeypatch.setattr(family_table, "try_family", attempt)
    with pytest.raises(KeyboardInterrupt):
        command(["--out", str(out)])
    assert [kept["name"] for kept in json.loads(out.with_suffix(".json").read_text())] == NAMES[:2]
    assert (
        "| SDXL | `sdxl` | not run" in out.read_text()
        and "| SD 1.5 | `sd15` | import holds | exact holds" in out.read_text()
    )
    tried += ["stopped"]
    assert command(["--out", str(out)]) == 0
    assert (
        tried == [*NAMES[:2], "stopped", *NAMES[2:]] and f"{len(ROWS)} of {len(ROWS)} rows" in capsys.readouterr().out
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["families.json", "families.md"]


def test_a_failed_cell_is_said_and_is_the_exit_code(tmp_path, monkeypatch, capsys):
    bad = Cell(ok=False, text="node | Squeeze\nrefused")
    monkeypatch.setattr(family_table, "try_family", lambda name, tell: row(name, onnx=bad))
    assert command(["--out", str(tmp_path / "t.md"), "--only", NAMES[0]]) == 1
    assert f"failed: {NAMES[0]}: onnx" in capsys.readouterr().out
    assert "**no**: node / Squeeze refused" in markdown([*json.loads((tmp_path / "t.json").read_text())])


@pytest.mark.parametrize("error", [BundleError("it broke"), RuntimeError("it broke")])
def test_what_breaks_fills_its_cell_and_what_follows_from_it_is_not_tried(monkeypatch, error):
    def broken(*given):
        raise error

    monkeypatch.setattr("fewstep.models.shapes.make_folder", broken)
    cells = try_family(NAMES[0]).cells
    assert not cells["import"].ok and cells["import"].text.endswith("it broke")
    assert all(cells[column].text.startswith("not tried: ") and not cells[column].ok for column in COLUMNS[1:])


def test_the_table_is_written_where_there_is_a_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(["--out", str(tmp_path / "gone" / "t.md")])
    assert "gone is no folder" in capsys.readouterr().err
