"""The file of tenants: what it may say, and what counts for whom."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from photon_grpc.errors import ConfigError
from photon_grpc.frontend.tenant_terms import TenantTerms, TenantTermsOf
from photon_grpc.options import TenantOptions

FILE = """
[default]
weight = 0.5
max_priority = 3

[tenants.gateway]
weight = 4
kv_share = 0.75
requests_per_s = 100

[tenants."batch jobs"]
max_concurrent_requests = 2
tokens_per_s = 2.5e3
token_burst = 10000
request_burst = 5
"""


def write(folder: Path, text: str) -> Path:
    new = folder / "new"
    new.write_text(text)
    os.replace(new, folder / "tenants.toml")
    return folder / "tenants.toml"


def load(folder: Path, text: str, **settings: float) -> TenantTermsOf:
    return TenantTermsOf(replace(TenantOptions(file=str(write(folder, text))), **settings))


def test_without_a_file_all_have_the_settings() -> None:
    options = TenantOptions(
        max_concurrent_requests=1, requests_per_s=2.0, request_burst=3, tokens_per_s=4.0, token_burst=5
    )
    terms_of = TenantTermsOf(options)
    assert terms_of("a") is terms_of("b")
    expected = {name: value for name, value in asdict(options).items() if name != "file"}
    assert asdict(terms_of("")) == {**expected, "weight": 1.0, "max_priority": None, "kv_share": 1.0}


def test_what_a_table_lacks_is_the_default_s_and_then_the_setting_s(tmp_path: Path) -> None:
    terms_of = load(tmp_path, FILE, requests_per_s=7.0, max_concurrent_requests=9)
    default = TenantTerms(weight=0.5, max_priority=3, requests_per_s=7.0, max_concurrent_requests=9)
    assert terms_of("anybody") == default
    assert terms_of("") == default
    assert terms_of("default") == default
    assert terms_of("gateway") == replace(default, weight=4, kv_share=0.75, requests_per_s=100)
    assert terms_of("batch jobs") == replace(
        default, max_concurrent_requests=2, tokens_per_s=2500.0, token_burst=10000, request_burst=5
    )


@pytest.mark.parametrize("text", ["", "[default]\n", "[tenants]\n"])
def test_a_file_may_say_nothing(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text)("a") == TenantTerms()


BAD = [
    ("[tenants.a]\nwieght = 2\n", "[tenants, 1] wieght: no such key; did you mean weight?"),
    ("[default]\nspeed = 2\n", "[default] speed: no such key"),
    ("[tenant.a]\nweight = 2\n", "key 1 of the file: expected [default] or [tenants.NAME]"),
    ("weight = 2\n", "key 1 of the file: expected [default] or [tenants.NAME]"),
    ("[tenants]\nweight = 2\n", "[tenants, 1] expected a table"),
    ("tenants = 2\n", "tenants: expected [tenants.NAME]"),
    ("default = 2\n", "[default] expected a table"),
    ("[default]\nweight = 0\n", "[default] weight = 0: must be a number from 0.001 to 1000"),
    ("[default]\nweight = inf\n", "[default] weight = inf: must be a number"),
    ("[default]\nweight = true\n", "[default] weight = True: must be a number"),
    ('[default]\nweight = "2"\n', "[default] weight = '2': must be a number"),
    ("[default]\nmax_concurrent_requests = -1\n", "must be a whole number, 0 for any number"),
    ("[default]\nmax_concurrent_requests = 1.5\n", "must be a whole number"),
    ("[default]\nrequests_per_s = nan\n", "must be a number, 0 for any number"),
    ("[default]\nrequest_burst = 0\n", "must be a whole number above 0"),
    ("[default]\ntoken_burst = 0\n", "must be a whole number above 0"),
    ("[default]\nmax_priority = -1\n", "must be a whole number, at least 0"),
    ("[default]\nkv_share = 0\n", "must be a number above 0, at most 1"),
    ("[default]\nkv_share = 1.01\n", "must be a number above 0, at most 1"),
    ("[tenants.a]\nweight = 2\n[tenants.b]\nweight = -2\n", "[tenants, 2] weight = -2: must be"),
    ("[default\n", "not valid TOML (at line 1, column 9)"),
    ("[default]\nweight = 2", "the last line does not end"),
    ("[default]\nweight = 2\nweight = 3\n", "not valid TOML"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_a_bad_file_refuses_the_start_and_names_the_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.message.startswith(f"tenants.file: {tmp_path / 'tenants.toml'}: ")
    assert words in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "[tenants.a-secret]\nwieght = 2\n",
        "[tenants.a-secret]\nweight = 0\n",
        "[tenants]\na-secret = 2\n",
        "[a-secret]\nweight = 2\n",
        "[tenants.a-secret]\n[tenants.a-secret]\n",
        '[tenants."a-secret".x]\n[[tenants."a-secret".x]]\n',
    ],
)
def test_no_name_of_a_tenant_is_told(tmp_path: Path, text: str) -> None:
    """The same words are logged when the file changes."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert "a-secret" not in caught.value.message


def test_a_file_that_is_no_text_refuses_the_start(tmp_path: Path) -> None:
    (tmp_path / "tenants.toml").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        TenantTermsOf(TenantOptions(file=str(tmp_path / "tenants.toml")))


@pytest.mark.parametrize("text", [text for text, _ in BAD])
def test_a_bad_file_leaves_the_last_good_one(tmp_path: Path, text: str) -> None:
    terms_of = load(tmp_path, FILE)
    write(tmp_path, text)
    with capture_logs() as logs:
        assert {terms_of("gateway").weight for _ in range(3)} == {4}
    assert len(logs) == 1
    write(tmp_path, "[tenants.gateway]\nweight = 5\n")
    assert terms_of("gateway") == TenantTerms(weight=5)
