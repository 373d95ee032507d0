"""Reports read back: what `to_dict` gave comes back equal through JSON; damage of any field is one message."""

import json

import pytest

from eigenpeft import AdapterCollection
from eigenpeft.audit import AuditReport, audit_adapters
from eigenpeft.errors import ArtifactError
from tests.factories import make_collection


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = make_collection(tmp_path_factory.mktemp("adapters"), n_adapters=4).folder
    return audit_adapters(AdapterCollection.from_pretrained(folder), n_components=4, n_nulls=1, progress=False)


def test_a_report_comes_back_equal(report):
    assert AuditReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_report_from_before_the_first_release_can_be_read(report):
    data = json.loads(json.dumps(report.to_dict()))
    for old, new in (("outside", "unshared"), ("held_out_in", "held_out_input"), ("held_out_out", "held_out_output")):
        data[old] = data.pop(new)
    data["held_out_alone_in"] = data.pop("held_out_alone_input")
    for row in data["compress"]["rows"]:
        row["kept"], row["error"] = row.pop("kept_share"), row.pop("relative_error")
    assert AuditReport.from_dict(data) == report


DAMAGES = {
    "curve of text": (lambda r: r["held_out"].update(real=["x"] * 4), r"held_out\.real\[0\] is 'x', not float"),
    "verdict": (lambda r: r.update(verdict=5), "verdict is 5"),
    "too many components": (lambda r: r.update(n_components=10**9), "n_components is 1000000000, beyond the"),
    "ragged similarity": (
        lambda r: r.update(similarity=[[1], [1, 2]]),
        "similarity is not a square table of its 4 adapters",
    ),
    "adapters as a number": (lambda r: r.update(adapters=7), "adapters is 7"),
    "modules as a list": (lambda r: r.update(modules=[1]), "is damaged"),
    "unshared of text": (lambda r: r.update(unshared={"a": "b"}), r"unshared\['a'\] is 'b', not float"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(report, damage):
    change, message = DAMAGES[damage]
    data = json.loads(json.dumps(report.to_dict()))
    change(data)
    with pytest.raises(ArtifactError, match=message):
        AuditReport.from_dict(data)
