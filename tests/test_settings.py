"""Settings: where they come from, which wins, and what is told to who gets one wrong."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dsc_serve import machine
from dsc_serve.cli import main
from dsc_serve.config import API_KEYS, PREFIX, AccessConfig, ConfigError, LifeConfig, ServerConfig, engine_environment
from dsc_serve.settings import SECTIONS, SETTINGS, Setting, choose, document, settings_of

DOCUMENT = Path(__file__).parents[1] / "docs" / "configuration.md"
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(text: str) -> Path:
        path = tmp_path / "serve.toml"
        path.write_text(text)
        return path

    return file


def serve(*arguments: str, **variables: str) -> Result:
    return CliRunner(env=variables).invoke(main, ["serve", *arguments])


def test_names_are_unique_over_all_sections() -> None:
    listed = [setting.name for name, kind in SECTIONS.items() for setting in settings_of(name, kind)]
    assert len(listed) == len(set(listed)) == len(SETTINGS) > 30


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(write: Write) -> None:
    file = write("[server]\nport = 1\nhost = 'a'\n[limits]\nkeep_alive_s = 3\n[engine]\ndtype = 'bf16'")
    chosen = choose(file, {f"{PREFIX}PORT": "2", f"{PREFIX}HOST": "b"}, {"host": "c", "model": None})
    config = chosen.config()
    assert (config.host, config.port, config.limits.keep_alive_s, config.engine.dtype) == ("c", 2, 3.0, "bf16")
    assert config.engine.model == "dsc-tiny"
    assert chosen.sources == {
        "host": "--host",
        "port": f"{PREFIX}PORT",
        **dict.fromkeys(("keep_alive_s", "dtype"), str(file)),
    }


def test_every_kind_of_value_is_read_from_the_environment() -> None:
    texts = {"METRICS_KEY": "true", "DRAIN_S": "1.5", "MAX_RUNNING": "7", "CORS_ORIGINS": "https://a,https://b"}
    config = choose(None, {PREFIX + name: text for name, text in texts.items()}, {}).config()
    assert config.access.metrics_key is True
    assert (config.life.drain_s, config.engine.max_running) == (1.5, 7)
    assert config.access.cors_origins == ("https://a", "https://b")
    for text, origins in (("", ()), (" https://a, https://b\n", ("https://a", "https://b"))):
        assert choose(None, {f"{PREFIX}CORS_ORIGINS": text}, {}).config().access.cors_origins == origins


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[limits]\nmax_wating = 3", "max_wating is not a setting of [limits]; did you mean max_waiting?"),
        ("[limts]\nx = 3", "limts is not a section; did you mean limits?"),
        ("port = 3", "port is not a section"),
        ("limits = 3", "limits is 3; it must be a table"),
        ("[server]\nport = '80'", "port is '80'; it must be an integer of at least 0 and at most 65535"),
        ("[server]\nport = 70000", "port is 70000; it must be an integer of at least 0 and at most 65535"),
        ("[life]\ndrain_s = nan", "drain_s is nan; it must be a number of at least 0"),
        ("[log]\nlog_format = 'xml'", "log_format is 'xml'; it must be one of text, json"),
        ("[server", "cannot be read as TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(write: Write, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose(write(text), {}, {})
    assert words in str(error.value)
    assert "serve.toml" in str(error.value)


def test_what_is_wrong_in_the_environment_or_a_flag_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"DSC_SERVE__MAX_RUNING is not a variable.*did you mean DSC_SERVE__MAX_RUNNING"
    ):
        choose(None, {f"{PREFIX}MAX_RUNING": "3"}, {})
    with pytest.raises(ConfigError, match=r"DSC_SERVE__PORT: port is 'tcp://10\.0\.0\.1:80'; it must be an integer"):
        choose(None, {f"{PREFIX}PORT": "tcp://10.0.0.1:80"}, {})
    result = serve("--block-size", "0", "--print-config")
    assert result.exit_code == 1
    assert "block_size is 0; it must be an integer of at least 1" in result.output


def test_settings_that_do_not_go_together_are_named() -> None:
    with pytest.raises(ConfigError, match=r"hang_s is 1\.0 but stall_s is 5\.0"):
        LifeConfig(hang_s=1.0)
    with pytest.raises(ConfigError, match="takes both or neither"):
        ServerConfig(tls_cert="cert.pem")


def test_what_is_printed_says_the_same_when_it_is_read(write: Write) -> None:
    origins = "--cors-origins", 'https://a"b', "--cors-origins", "https://c"
    result = serve("some-model", "--print-config", *origins, DSC_SERVE__PORT="9")
    assert result.exit_code == 0
    assert "port = 9  # DSC_SERVE__PORT" in result.output
    again = choose(write(result.output), {}, {}).config()
    assert (again.port, again.engine.model, again.access.cors_origins) == (
        9,
        "some-model",
        ('https://a"b', "https://c"),
    )
    assert tomllib.loads(result.output).keys() == SECTIONS.keys()
    defaults = choose(write(serve("--print-config").output), {}, {}).config()
    assert defaults == ServerConfig()


def test_a_model_may_be_named_with_or_without_its_flag() -> None:
    for arguments in (["a-model"], ["--model", "a-model"]):
        assert 'model = "a-model"  # --model' in serve(*arguments, "--print-config").output
    result = serve("a-model", "--model", "another", "--print-config")
    assert result.exit_code == 2
    assert "MODEL is 'a-model' and --model is 'another'; give one of the two" in result.output


def test_keys_are_neither_printed_nor_passed_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEYS, "someone:a-secret-of-some-length")
    result = CliRunner().invoke(main, ["serve", "--print-config"])
    assert result.exit_code == 0
    assert "secret" not in result.output
    assert API_KEYS not in engine_environment(1)


def test_the_document_is_current() -> None:
    assert document() == DOCUMENT.read_text(encoding="utf-8"), "run: dsc-serve settings > docs/configuration.md"


@pytest.mark.parametrize("origin", ["https://chat.example/", "chat.example", "https://Chat.example", "https://", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match=f"cors_origins has {re.escape(repr(origin))}, .* allowed: "):
        AccessConfig(cors_origins=("https://good.example:8443", origin))


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 8000 << 10),
        ({"max": "max", "current": "100"}, 8000 << 10),
        ({"max": "5000", "current": "3000"}, 2000),
        ({"max": "5000", "current": "3000", "stat": "anon 1000\ninactive_file 1800\nactive_file 200"}, 3800),
        ({"max": "5000", "current": "6000", "stat": "inactive_file 0"}, 0),
        ({"max": "5000", "current": "100", "stat": "inactive_file 200"}, 5000),
    ],
    ids=str,
)
def test_files_that_were_read_leave_a_container_s_memory_available(
    files: dict[str, str], available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB"}
    texts |= {f"/sys/fs/cgroup/memory.{name}": text for name, text in files.items()}
    monkeypatch.setattr(machine, "read_text", lambda path: texts.get(path, ""))
    assert machine.available_memory() == available


@pytest.mark.parametrize("value", ["9" * 30, "9" * 400, "1e308", "inf", "nan", "-1", "99999999999999"])
@pytest.mark.parametrize("setting", [s for s in SETTINGS.values() if s.type in (int, float)], ids=lambda s: s.name)
def test_no_number_is_without_bounds(setting: Setting, value: str) -> None:
    """A value that nothing can mean is refused where it is set, not where it overflows."""
    with pytest.raises(ConfigError, match=rf"{setting.name} is .*; it must be .* at most "):
        choose(None, {setting.variable: value}, {}).config()


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 10_000, "\udcff", "[server]\nport = 1e9"])
def test_a_file_of_any_content_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"f\.toml") as refused:
        choose(tmp_path / "f.toml", {}, {})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
