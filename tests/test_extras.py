import pytest

from vlearn._extras import require


def test_an_installed_module_is_returned():
    assert require("json.decoder", extra="plot").__name__ == "json.decoder"


def test_a_missing_package_is_named_with_its_remedy():
    with pytest.raises(ImportError) as error:
        require("no_such_package.part", extra="plot")
    assert str(error.value) == "vlearn.plot needs no_such_package: pip install 'vlearn[plot]'"


def test_the_feature_can_be_named():
    with pytest.raises(ImportError, match=r"^vlearn\.integrations\.wandb needs no_such_package: pip install"):
        require("no_such_package", extra="wandb", feature="vlearn.integrations.wandb")


def test_an_empty_folder_of_the_same_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="needs only_a_folder"):
        require("only_a_folder", extra="wandb")


def test_a_failure_inside_an_installed_package_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_inside.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        require("broken_inside", extra="plot")
