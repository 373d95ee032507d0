"""Which member a request's name means."""

import pytest

from eigenpeft.engines import StoreCatalog
from eigenpeft.errors import EigenPeftError, SubspaceNotFoundError, UnknownAdapterError
from tests.engines.conftest import Shelf


def test_a_member_has_two_names(shelf):
    catalog = StoreCatalog([shelf.folder])
    assert catalog.labels == ("shop",)
    assert catalog.find("bert") == catalog.find("shop/bert")
    assert catalog.find("bert").rank == 3
    assert catalog.find("bert").base_model == "tiny/base"
    assert catalog.find("anna").key != catalog.find("bert").key


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("carlo", "'shop/carla'|'carla'"),
        ("shop/annna", "'anna'"),
        ("shop/", "'anna'"),
        ("", "'anna'"),
        ("shop", "'anna'"),
    ],
)
def test_an_unknown_name_is_refused_with_names_near_it(shelf, name, near):
    with pytest.raises(
        UnknownAdapterError, match=rf"No adapter '{name}' among the 3 of 'shop'; names near it: .*({near})"
    ):
        StoreCatalog([shelf.folder]).find(name)


def test_members_come_and_go_while_the_catalog_is_open(shelf):
    catalog = StoreCatalog([shelf.folder])
    before = catalog.find("anna"), catalog.find("carla")
    shelf.write("anna", "bert", "dora", ("carla", 9))
    assert catalog.find("dora").member == "dora"
    assert catalog.find("carla").key != before[1].key
    with pytest.raises(UnknownAdapterError, match="'carla' was replaced or removed"):
        catalog.contents(before[1])
    shelf.write("bert")
    with pytest.raises(UnknownAdapterError, match="No adapter 'anna' among the 1"):
        catalog.find("anna")
    with pytest.raises(UnknownAdapterError, match="'anna' was replaced or removed"):
        catalog.contents(before[0])


def test_several_stores(tmp_path, shelf):
    other = Shelf(tmp_path / "office").write("bert", "emil")
    catalog = StoreCatalog([shelf.folder, other.folder])
    assert catalog.find("emil").store == "office"
    assert catalog.find("office/bert").store == "office"
    with pytest.raises(
        UnknownAdapterError, match="'bert' is in several stores; ask for one of 'shop/bert', 'office/bert'"
    ):
        catalog.find("bert")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "shop").symlink_to(other.folder)
    twin = Shelf(tmp_path / "elsewhere" / "twin" / "shop")
    twin.folder.parent.mkdir()
    twin.write("anna")
    with pytest.raises(EigenPeftError, match="Two stores are called 'shop'"):
        StoreCatalog([shelf.folder, twin.folder])


def test_no_store(tmp_path):
    with pytest.raises(EigenPeftError, match="No store is named"):
        StoreCatalog([])
    with pytest.raises(SubspaceNotFoundError, match="No coefficient store at|No adapter store at"):
        StoreCatalog([tmp_path / "nowhere"])
