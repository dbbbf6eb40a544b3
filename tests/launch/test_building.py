"""Errors of building name the section of the YAML."""

import importlib

import catalogue
import llmfoundry.registry
import pytest

from foundry_ext.launch.building import CHECKS, errors_name_their_section
from foundry_ext.preflight.components import SECTIONS
from foundry_ext.utils.errors import UserError

train_module = importlib.import_module("llmfoundry.command_utils.train")


def raising(error: Exception, module: str):
    def build(**keys):
        raise error

    build.__module__ = module
    return build


@pytest.mark.parametrize(
    ("error", "module", "expected"),
    [
        (UserError("x: 1; y"), "foundry_ext.data", (UserError, "train_loader (odd): x: 1; y")),
        (OSError("gone"), "foundry_ext.data", (UserError, "train_loader (odd): gone [OSError]")),
        (ValueError("x"), "other.data", (UserError, "train_loader (odd): x [ValueError]")),
        (ValueError("x\n  y"), "other.data", (UserError, "train_loader (odd): x y [ValueError]")),
        (ValueError("a bug"), "foundry_ext.data", (ValueError, "a bug")),
    ],
)
def test_errors_of_building_name_their_section(monkeypatch, error, module, expected):
    builder = train_module.build_dataloader
    name = (*llmfoundry.registry.dataloaders.namespace, "odd")
    monkeypatch.setitem(catalogue.REGISTRY, name, raising(error, module))
    kind, text = expected
    with pytest.raises(ValueError) as raised, errors_name_their_section():
        train_module.build_dataloader({"name": "odd"}, None, 1)
    assert type(raised.value) is kind and str(raised.value) == text
    assert train_module.build_dataloader is builder


@pytest.mark.parametrize("name", CHECKS)
def test_values_that_llm_foundry_refuses_are_the_user_s_mistake(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    """A batch that the ranks cannot share, a scheduler whose units differ from the duration's."""
    for error, kind in ((ValueError("no"), UserError), (RuntimeError("a bug"), RuntimeError)):
        monkeypatch.setattr(train_module, name, raising(error, "other"))
        with pytest.raises(kind, match=str(error)), errors_name_their_section():
            getattr(train_module, name)()


def test_every_builder_is_there_and_every_section_checked():
    """A builder that llm-foundry renames raises an AttributeError here."""
    for section in SECTIONS.values():
        assert callable(getattr(train_module, section.builder))
        for registry in section.registries:
            assert getattr(llmfoundry.registry, registry).get_all()


def test_an_argument_that_a_wrapper_hides_is_named_as_a_key():
    """llm-foundry's experimental callbacks take any argument, and then miss one."""
    with pytest.raises(UserError) as raised, errors_name_their_section():
        train_module.build_callback(name="global_lr_scaling", kwargs={}, train_config={})
    text = str(raised.value)
    assert text.startswith(
        "callbacks (global_lr_scaling): missing key, callbacks.global_lr_scaling.lr_scale; add it"
    )
    assert "\n" not in text
