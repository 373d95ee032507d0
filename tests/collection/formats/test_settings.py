"""Configs: what is refused and why, and that every variant PEFT knows has been looked at."""

import dataclasses
import json

import pytest
from peft import LoraConfig

from eigenpeft.collection.formats.settings import (
    ALTERING_INITIALIZATIONS,
    PLAIN_INITIALIZATIONS,
    REFUSED_FIELDS,
    license_of,
    read_settings,
)

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def read(folder, config):
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return read_settings(folder)


def test_least_config_of_early_peft(tmp_path):
    settings, problems = read(tmp_path, PLAIN)
    assert problems == []
    assert settings is not None
    assert settings.scaling_of("any") == 2.0
    assert (settings.rank_of("any"), settings.base_model, settings.fan_in_fan_out) == (4, None, False)


def test_scaling_follows_patterns_and_rslora(tmp_path):
    patterns = {"rank_pattern": {"v_proj": 16}, "alpha_pattern": {r"layers\.0\..*": 3}}
    settings, _ = read(tmp_path, PLAIN | patterns)
    assert settings is not None
    assert settings.scaling_of("layers.0.q_proj") == 3 / 4
    assert settings.scaling_of("layers.0.v_proj") == 3 / 16
    assert settings.scaling_of("layers.1.v_proj") == 8 / 16
    settings, _ = read(tmp_path, PLAIN | patterns | {"use_rslora": True})
    assert settings is not None
    assert settings.scaling_of("layers.1.v_proj") == 8 / 4


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_variants_are_refused_by_name(tmp_path, name):
    settings, problems = read(tmp_path, PLAIN | {name: [1]})
    assert settings is None
    assert len(problems) == 1
    assert name in problems[0]


def test_every_variant_of_the_installed_peft_is_judged():
    # New variants must be put into REFUSED_FIELDS, or here if their update is s B A.
    still_plain = {"velora_config"}
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants <= set(REFUSED_FIELDS) | still_plain
    help_text = next(field for field in dataclasses.fields(LoraConfig) if field.name == "init_lora_weights").type
    named = {word.strip("' ") for word in str(help_text).partition("[")[2].rstrip("]").split(",")}
    judged = {name for name in named if name in PLAIN_INITIALIZATIONS or name.startswith(ALTERING_INITIALIZATIONS)}
    assert named - {"pissa_niter_[number of iters"} == judged - {"pissa_niter_[number of iters"}


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq", "PiSSA"])
def test_initialisations_that_alter_the_base_are_refused(tmp_path, start):
    settings, problems = read(tmp_path, PLAIN | {"init_lora_weights": start})
    assert settings is None
    assert "alters the base weights" in problems[0]
    assert ("path_initial_model_for_weight_conversion" in problems[0]) == (start != "loftq")


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_taken(tmp_path, start):
    assert read(tmp_path, PLAIN | {"init_lora_weights": start})[1] == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "holds list instead"),
        (PLAIN | {"peft_type": "IA3"}, "'IA3'; only 'LORA'"),
        ({"r": 4, "lora_alpha": 8}, "peft_type None"),
        (PLAIN | {"peft_type": "EIGENLORA"}, "export_lora"),
        (PLAIN | {"r": 0}, "r=0 .*at least 1"),
        (PLAIN | {"r": "8"}, "r='8'"),
        (PLAIN | {"r": True}, "r=True"),
        ({"peft_type": "LORA", "lora_alpha": 8}, "r=None"),
        (PLAIN | {"lora_alpha": None}, "lora_alpha=None .*finite"),
        (PLAIN | {"lora_alpha": float("nan")}, "lora_alpha=nan"),
        (PLAIN | {"lora_alpha": float("inf")}, "lora_alpha=inf"),
        (PLAIN | {"rank_pattern": [1]}, r"rank_pattern=\[1\]"),
        (PLAIN | {"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
        (PLAIN | {"alpha_pattern": {"q(": 1}}, r"'q\(', which is not a regular expression"),
        (PLAIN | {"init_lora_weights": "brand_new"}, "'brand_new', which is not known"),
        (PLAIN | {"use_mora": True}, "use_mora=True, which is not a variant"),
    ],
)
def test_bad_values_are_named(tmp_path, config, message):
    settings, problems = read(tmp_path, config)
    assert settings is None
    assert len(problems) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(problems[0])


def test_all_problems_of_a_config_at_once(tmp_path):
    assert len(read(tmp_path, PLAIN | {"use_dora": True, "init_lora_weights": "pissa"})[1]) == 2
    assert len(read(tmp_path, PLAIN | {"r": -1, "lora_alpha": "x"})[1]) == 2


def test_missing_config(tmp_path):
    assert "has no adapter_config.json" in read_settings(tmp_path)[1][0]


def test_config_that_is_no_text(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe\x00{}")
    assert "not valid JSON" in read_settings(tmp_path)[1][0]


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nbase_model: gpt2\nlicense: apache-2.0\n---\n# Card\n", "apache-2.0"),
        ("---\nlicense: 'mit'\n---\n", "mit"),
        ("---\nbase_model: gpt2\n---\nlicense: mit\n", None),
        ("# Card\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_license_is_read_from_the_front_matter_alone(tmp_path, text, license):
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == license


def test_no_readme_no_license(tmp_path):
    assert license_of(tmp_path) is None
