"""Tables that `icl` wrote are checked column by column, and a damaged table is refused as a whole."""

import pytest

from icl.files.reading import ContentError
from icl.files.tables import read_table

WHOLE = "step,quantity,value,stderr\n0,loss,1.5,0.1\n10,loss,1.25,\n"


def test_a_whole_table_is_read(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(WHOLE)
    table = read_table(path, columns=("step", "value"))
    assert table["step"].tolist() == [0, 10]
    assert table["quantity"].tolist() == ["loss", "loss"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("10,loss", "10,", "no `quantity`"),  # the report split it as text, and failed
        ("1.25", "l.25", "column `value`"),
        ("10,", "10.5,", "column `step`"),
        ("1.25", "1e300", "above 1e"),
        ("value", "valve", "no column `value`"),
        (",stderr", "", "not a CSV table"),  # pandas took the steps as names of rows, and shifted the other cells
        ("step", "step" + ",x" * 10_000, "more than 10,000 columns"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, old, new, said):
    path = tmp_path / "x.csv"
    path.write_text(WHOLE.replace(old, new))
    with pytest.raises(ContentError, match=said):
        read_table(path, columns=("step", "value"))
