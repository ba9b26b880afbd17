"""proxy/fitting.py: what the settings say of credentials becomes the source of logins that they name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from proxy.clock import SystemClock
from proxy.engine.tasks import TaskOwner
from proxy.errors import InvalidSettings
from proxy.fitting import Fitting, conditions_shown
from proxy.settings import Settings, file_layer, read


def settings_of(folder: Path, credentials: str) -> Settings:
    """An upstream with these credentials; files named in them are there."""
    (folder / "secret").write_text("{}")
    text = '[store]\npath = "/s"\n[upstreams."r.test"]\nurl = ["https://r.test", "https://b.test"]\n'
    return read([file_layer(text + f"credentials = {credentials}\n", "t.toml", folder=str(folder))]).settings


@pytest.mark.parametrize(
    ("credentials", "identity"),
    [
        ('{ username = "u", password_file = "secret" }', "static:u"),
        ('{ docker_config = "secret" }', "docker-config:r.test"),
        ('{ helper = "ecr", region = "eu-west-1" }', "ecr:r.test"),
        ('{ helper = "ecr-public" }', "ecr:r.test"),
        ('{ helper = "gar", key_file = "secret" }', "gar:r.test"),
        ('{ helper = "acr", tenant = "t", client_id = "c", secret_file = "secret" }', "acr:r.test"),
        ('{ helper = "github", password_file = "secret" }', "static:x-access-token"),
        ('{ helper = "gitlab", password_file = "secret" }', "static:oauth2"),
        ('{ helper = "pass" }', "helper:pass"),
    ],
)
async def test_each_source_is_made(credentials: str, identity: str, tmp_path: Path) -> None:
    """One client for each address, each with a guard of its own, shown in status."""
    owner = TaskOwner(print)
    fitting = Fitting(SystemClock(), owner, lambda _: None)
    fitting.use(await asyncio.to_thread(lambda: fitting.fit(settings_of(tmp_path, credentials))))
    shown = conditions_shown(fitting.conditions("r.test"))
    assert [each["url"] for each in shown["addresses"]] == ["https://r.test", "https://b.test"]
    assert {each["circuit"] for each in shown["addresses"]} == {"closed"}
    assert next(client.policy.identity for client in fitting._current["r.test"].clients) == identity
    await fitting.aclose()
    await owner.aclose()


@pytest.mark.parametrize(
    "credentials",
    [
        '{ helper = "acr" }',
        '{ helper = "gitlab" }',
        '{ helper = "gar", tenant = "t" }',
        '{ helper = "Not a name" }',
        '{ docker_config = "absent" }',
    ],
)
def test_what_cannot_be_used_is_said_at_the_start(credentials: str, tmp_path: Path) -> None:
    """And not by the first pull."""
    with pytest.raises(InvalidSettings):
        Fitting(SystemClock(), TaskOwner(print), lambda _: None).fit(settings_of(tmp_path, credentials))
